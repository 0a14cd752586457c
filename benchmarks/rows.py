"""Rows a second: durable inserts by many writers and by few; the same without Ray."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aidb_ray import AgentMessage, Database
from aidb_ray.store import changes as wire
from aidb_ray.store.changes import Batch, Commit, Insert
from aidb_ray.store.feed import Feed
from aidb_ray.store.files import FileSystem
from aidb_ray.store.log import CommitLog, Frame, Rows, create_store
from aidb_ray.store.plan import Plan
from aidb_ray.store.rows import codec_of
from aidb_ray.store.tables import Tables
from benchmarks.harness import (
    Figure,
    Logged,
    Rig,
    counting_log,
    median_of,
    sync_figures,
)

MANY, FEW = 2_000, 16
CONTENT = "hello " * 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows the many and the few writers write in one run."""

    many_rows: int = 60_000
    few_rows: int = 8_000
    runs: int = 5


FULL = Sizes()
QUICK = Sizes(many_rows=8_000, few_rows=800, runs=1)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure inserts by writers that each await a row before they write the next."""
    by_many: list[Logged] = []
    by_few: list[Logged] = []
    by_client: list[Logged] = []
    async with rig.open() as db:
        many = await median_of(
            sizes.runs, lambda _: collection_rate(db, MANY, sizes.many_rows, by_many)
        )
        few = await median_of(
            sizes.runs, lambda _: collection_rate(db, FEW, sizes.few_rows, by_few)
        )
        client = await median_of(
            sizes.runs, lambda run: client_rate(db, sizes.many_rows, run, by_client)
        )
        # Beside the rows, each batch logs one row about its sender.
        syncs = sum(logged.syncs for logged in by_client)
        a_sync = max(1, round(sum(logged.rows for logged in by_client) / syncs) - 1)
        bare = await bare_actor_rate(rig, sizes, a_sync)
    async with rig.scratch() as home:
        plain = await median_of(
            sizes.runs,
            lambda run: asyncio.to_thread(
                plain_loop_rate, home / str(run), make_inserts(sizes.many_rows, run), a_sync
            ),
        )
    return [
        Figure(
            "rows_per_s_2000",
            many,
            f"durable inserts through Collection by 2,000 writers; median of {sizes.runs} runs, as "
            f"all rates here",
        ),
        Figure("rows_per_s_16", few, "durable inserts through Collection by 16 writers"),
        Figure(
            "client_rows_per_s_2000",
            client,
            "encoded rows through StoreClient by 2,000 writers, a commit each",
        ),
        Figure(
            "plain_loop_rows_per_s",
            plain,
            f"those rows planned, synced and applied {a_sync} at a time in one loop, no Ray",
        ),
        Figure(
            "bare_actor_rows_per_s",
            bare,
            f"those bytes, {a_sync} rows a call, to a Ray actor that only writes and syncs",
        ),
        *sync_figures(by_many, "2,000 writers through Collection"),
        Figure(
            "rows_per_sync_16",
            Logged.total(by_few).rows_per_sync,
            "logged rows a sync, 16 writers through Collection",
        ),
    ]


async def collection_rate(db: Database, writers: int, rows: int, logged: list[Logged]) -> float:
    """Return rows a second of writers that insert into a session each."""
    each = rows // writers

    async def write(writer: int) -> None:
        messages = db.session(f"aidb://rows/{writer}").messages
        for _ in range(each):
            await messages.insert({"role": "user", "actor_id": "me", "content": CONTENT})

    async with counting_log(db, logged):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for writer in range(writers):
                tasks.create_task(write(writer))
        return each * writers / (time.perf_counter() - began)


async def client_rate(db: Database, rows: int, run: int, logged: list[Logged]) -> float:
    """Return rows a second of writers that send rows which are encoded already."""
    inserts = make_inserts(rows, run)
    client = db.partitions[0].client

    async def write(mine: Sequence[Insert]) -> None:
        for insert in mine:
            await client.commit([insert])

    async with counting_log(db, logged):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for writer in range(MANY):
                tasks.create_task(write(inserts[writer::MANY]))
        return len(inserts) / (time.perf_counter() - began)


def make_inserts(rows: int, run: int) -> list[Insert]:
    """Return rows as a collection sends them, over as many sessions as there are writers."""
    codec = codec_of(AgentMessage, "id")
    inserts: list[Insert] = []
    for n in range(rows):
        row = {"id": f"{run}-{n}", "role": "user", "actor_id": "me", "content": CONTENT}
        key, value = codec.encode("messages", row)
        inserts.append(Insert(f"aidb://rows/{n % MANY}", "messages", key, value))
    return inserts


def plain_loop_rate(directory: Path, inserts: Sequence[Insert], a_sync: int) -> float:
    """Return rows a second of all that client and store do, in one thread that does it in turn."""
    files = FileSystem()
    create_store(directory, files, store_uuid="plain", database="plain", partition=0, partitions=1)
    log = CommitLog.open(directory, files, expected_uuid="plain")
    tables, feed = Tables(), Feed(0)

    def flush(plan: Plan) -> None:
        commits = plan.revision - plan.first_revision + 1
        place = log.append(Frame(plan.first_revision, commits, Rows(*plan.log)))
        feed.extend(tables.apply(plan, (place.segment, place.offset)), tables.revision)

    try:
        plan = Plan(tables, log.epoch)
        client_id, _ = plan.add_client(0)
        flush(plan)
        began = time.perf_counter()
        for first in range(0, len(inserts), a_sync):
            commits = [Commit((insert,)) for insert in inserts[first : first + a_sync]]
            raw = wire.encode(Batch(client_id, first + 1, commits))
            plan = Plan(tables, log.epoch)
            answer = plan.add_batch(wire.decode_batch(raw), raw)
            flush(plan)
            wire.decode_committed(wire.encode(answer))
        return len(inserts) / (time.perf_counter() - began)
    finally:
        log.close()


async def bare_actor_rate(rig: Rig, sizes: Sizes, a_sync: int) -> float:
    """Return rows a second when nothing but bytes goes to a disk through Ray."""
    inserts = make_inserts(sizes.many_rows, 0)
    batches = [
        wire.encode([Commit((insert,)) for insert in inserts[first : first + a_sync]])
        for first in range(0, len(inserts), a_sync)
    ]
    async with rig.scratch() as home:
        sink = await rig.spawn(Sink, home / "bytes")

        async def send_all(_run: int) -> float:
            began = time.perf_counter()
            for batch in batches:
                await sink.ask(Sink.keep, batch)
            return len(inserts) / (time.perf_counter() - began)

        try:
            return await median_of(sizes.runs, send_all)
        finally:
            await sink.stop()


class Sink:
    """Writes and syncs what it is sent, and does nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    async def keep(self, data: bytes) -> None:
        """Return when `data` is on the disk."""
        await asyncio.to_thread(self._write, data)

    async def stop(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("wb", buffering=0)
        self._file.write(data)
        os.fdatasync(self._file.fileno())
