"""Kills a store under load, over and over, and looks for what was lost or done twice.

Each life is a process, forked from this warm one: a store on real files and a few clients that
commit without pause. Every answer goes through a pipe, so this process knows what was promised
when it kills. A client of the next life sends the batch again whose answer is missing.

    python -m tests.chaos.engine --kills 1500 --seed 7
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Final, NoReturn

from aidb_ray.errors import AidbError
from aidb_ray.store import changes as wire
from aidb_ray.store.actor import StoreActor, StoreOptions
from aidb_ray.store.changes import (
    Append,
    Batch,
    ChunkColumns,
    ChunkRead,
    Commit,
    Committed,
    Delete,
    DeleteSession,
    Filter,
    Insert,
    ReadRequest,
    Retain,
)
from aidb_ray.store.files import FileSystem
from aidb_ray.store.log import CommitLog, create_store
from tests.chaos import mistakes
from tests.faults import ForgetfulFiles

CLIENTS: Final = 6
COMMITS_A_BATCH: Final = 2
CHUNKS_A_BATCH: Final = 2
BATCHES_A_SESSION: Final = 11
LINES: Final = "lines"
LINES_KEPT_MS: Final = 1_000
HURRY: Final = 100
"""How much faster time goes for the store, so that lines are soon old."""
KILLS_A_STORE: Final = 30
LONGEST_LIFE_S: Final = 0.5
STORE_UUID: Final = "killed"

_MESSAGE: Final = struct.Struct("<cIQQ")
_SERVING, _REGISTERED, _ANSWERED, _WRONG, _BROKEN = b"S", b"R", b"A", b"W", b"B"
WRONG_STATUS: Final = 3


class WrongError(Exception):
    """The store broke a promise."""


@dataclass(slots=True)
class Promises:
    """What the clients of one store were told, kept outside of it.

    Attributes:
        client_ids: Registered id of each client, 0 if it has none.
        answered: Number of the last batch that each client had an answer for.
        revisions: First revision of that batch.
    """

    client_ids: list[int] = field(default_factory=lambda: [0] * CLIENTS)
    answered: list[int] = field(default_factory=lambda: [0] * CLIENTS)
    revisions: list[int] = field(default_factory=lambda: [0] * CLIENTS)


@dataclass(slots=True)
class Report:
    """What happened, so that a clean run also shows that things were really killed.

    Attributes:
        lines_gone: How many were missing at the end because their time was over.
    """

    seed: int = 0
    kills: int = 0
    stores: int = 0
    died_in_write: int = 0
    batches: int = 0
    torn_tails: int = 0
    torn_bytes: int = 0
    unknown_outcomes: int = 0
    lines_gone: int = 0
    reopen_ms: list[float] = field(default_factory=list[float])
    seconds: float = 0.0

    def summary(self) -> dict[str, object]:
        """Return the counts, with the median and the 99th percentile of the time to open."""
        times = sorted(self.reopen_ms) or [0.0]
        counts: dict[str, object] = {**asdict(self)}
        counts["reopen_ms"] = [
            round(times[len(times) // 2], 1), round(times[len(times) * 99 // 100], 1)
        ]  # fmt: skip
        return counts


def hurried(options: StoreOptions, files: FileSystem) -> StoreActor:
    """Return a store for which time flies."""
    return StoreActor(
        options,
        files=files,
        die=lambda: os._exit(70),
        clock=lambda: HURRY * time.monotonic(),
        wall=lambda: HURRY * time.time(),
    )


def session_of(client: int) -> str:
    """Return the session that a client writes to."""
    return f"aidb://killed/{client}"


def began_with(number: int) -> int:
    """Return the batch that began the session as batch `number` leaves it: it deletes the old."""
    return max(1, number - number % BATCHES_A_SESSION)


def chunk_of(client: int, number: int, index: int) -> bytes:
    """Return a chunk of a client's stream as batch `number` leaves it."""
    return f"{client}:{began_with(number)}:{index}".encode()


def make_batch(client: int, client_id: int, number: int) -> bytes:
    """Return batch `number` (from 1) of a client: always the same bytes.

    Replacing the row without a precondition can be done twice; a check of the log finds it. Now
    and then a batch deletes the session and begins it anew, chunks and all.
    """
    session = session_of(client)
    # Now and then a large one: what it leaves when it is torn outlasts the small ones after it.
    padding = 30_000 if (number * CLIENTS + client) % 37 == 0 else 10
    insert = Insert(session, "messages", "row", b'{"n":%d,"pad":"%s"}' % (number, b"x" * padding))
    first = (number - began_with(number)) * CHUNKS_A_BATCH
    payloads = [chunk_of(client, number, first + at) for at in range(CHUNKS_A_BATCH)]
    ends = array("i", [len(b"".join(payloads[: at + 1])) for at in range(CHUNKS_A_BATCH)])
    append = Append(session, f"g{client}", 1, first, 0, CHUNKS_A_BATCH)
    line = Insert(session, LINES, f"{number:06d}", b"{}")
    commits = [Commit((Delete(session, "messages", "row"), insert)), Commit((append, line))]
    if number == 1:
        policy = Retain(LINES, "aidb://*", LINES_KEPT_MS)
        commits = [Commit((insert, policy)), Commit((append, line))]
    elif began_with(number) == number:
        commits = [Commit((DeleteSession(session),)), Commit((insert, append, line))]
    return wire.encode(
        Batch(
            client_id,
            (number - 1) * COMMITS_A_BATCH + 1,
            commits,
            ChunkColumns(bytes([2] * CHUNKS_A_BATCH), ends.tobytes(), b"".join(payloads)),
        )
    )


def number_of(value: bytes) -> int:
    """Return the number of the batch that wrote a row."""
    number: int = json.loads(value)["n"]
    return number


async def live(
    options: StoreOptions, files: FileSystem, promises: Promises, active: list[int], pipe: int
) -> None:
    """One life: open, check all promises, then let some clients commit until killed."""

    def tell(kind: bytes, client: int = 0, first: int = 0, second: int = 0) -> None:
        os.write(pipe, _MESSAGE.pack(kind, client, first, second))

    began = time.perf_counter()
    actor = hurried(options, files)
    status = await actor.open()
    opened_us = round((time.perf_counter() - began) * 1e6)
    unknown = 0
    for client in range(CLIENTS):
        unknown += await check_client(actor, client, promises.answered[client])
    tell(_SERVING, unknown, status.torn_bytes, opened_us)

    async def sweep() -> None:
        while True:
            await actor.sweep()
            await asyncio.sleep(0.001)

    async def run_client(client: int) -> None:
        if not promises.client_ids[client]:
            promises.client_ids[client] = (await actor.register())[0]
            tell(_REGISTERED, client, promises.client_ids[client])
        while True:
            number = promises.answered[client] + 1
            raw = make_batch(client, promises.client_ids[client], number)
            answer = wire.decode_committed(await actor.commit(raw))
            check_answer(answer, client, number, promises.revisions[client])
            promises.answered[client] = number
            promises.revisions[client] = answer.first_revision
            tell(_ANSWERED, client, number, answer.first_revision)

    await asyncio.gather(sweep(), *(run_client(client) for client in active))


def check_answer(answer: Committed, client: int, number: int, last_revision: int) -> None:
    """Raise WrongError unless a batch was applied whole, after the one before."""
    if answer.refused:
        raise WrongError(f"batch {number} of client {client} was refused: {answer.refused}")
    if answer.first_revision <= last_revision:
        raise WrongError(f"batch {number} of client {client} got an older revision")


async def applied_to(actor: StoreActor, session: str) -> int:
    """Return the number of the last batch that a session holds, 0 if there is none."""
    request = ReadRequest(Filter("messages", session), "row")
    page = wire.decode_page(await actor.read(wire.encode(request)))
    return number_of(page.rows[0].value) if page.rows else 0


async def check_client(actor: StoreActor, client: int, answered: int) -> bool:
    """Check a client's row and chunks; return whether its unanswered batch had been applied."""
    session = session_of(client)
    applied = await applied_to(actor, session)
    if applied not in (answered, answered + 1):
        raise WrongError(f"client {client} had answers up to {answered}, the row says {applied}")
    index = 0
    more = True
    while more:
        read = wire.encode(ChunkRead(session, f"g{client}", index))
        chunks = wire.decode_chunk_page(await actor.read_chunks(read))
        for part in chunks.slices:
            if part.index != index:
                raise WrongError(f"chunk {part.index} of client {client} came for {index}")
            start = 0
            for end in array("i", part.columns.ends):
                if part.columns.payload[start:end] != chunk_of(client, applied, index):
                    raise WrongError(f"chunk {index} of client {client} is another")
                start = end
                index += 1
        more = chunks.more
    await check_lines(actor, session, applied)
    if index != (applied - began_with(applied) + 1) * CHUNKS_A_BATCH * (applied > 0):
        raise WrongError(f"client {client} has {index} chunks after {applied} batches")
    return applied > answered


async def check_lines(actor: StoreActor, session: str, applied: int) -> int:
    """Check that of the lines that a client wrote only the oldest have gone; return how many."""
    page = wire.decode_page(await actor.read(wire.encode(ReadRequest(Filter(LINES, session)))))
    kept = [int(row.key) for row in page.rows]
    if kept != list(range(applied + 1 - len(kept), applied + 1)):
        raise WrongError(f"of the lines up to {applied} of {session} only {kept} are kept")
    if kept and kept[0] < began_with(applied):
        raise WrongError(f"line {kept[0]} of {session} was deleted with its session")
    return max(0, applied - began_with(applied) + 1 - len(kept))


def check_log(options: StoreOptions, promises: Promises) -> None:
    """Raise WrongError unless the log holds every answered batch once, and no other twice."""
    log = CommitLog.open(
        Path(options.directory),
        FileSystem(),
        expected_uuid=STORE_UUID,
        segment_bytes=options.segment_bytes,
        reserve_bytes=0,
    )
    applied: Counter[tuple[str, int]] = Counter()
    expected = 1
    for _, frame in log.frames(0):
        if frame.first_revision != expected:
            raise WrongError(f"revision {frame.first_revision} came for {expected}")
        expected += frame.commits
        rows = frame.rows
        for session, collection, value in zip(
            rows.sessions, rows.collections, rows.values, strict=True
        ):
            if collection == "messages" and value:
                applied[session, number_of(value)] += 1
    log.close()
    for client, answered in enumerate(promises.answered):
        for number in range(1, answered + 1):
            times = applied[session_of(client), number]
            if times != 1:
                raise WrongError(f"batch {number} of client {client} was applied {times} times")
    if max(applied.values(), default=0) > 1:
        raise WrongError("a batch without an answer was applied twice")


def run_life(
    options: StoreOptions, files: FileSystem, promises: Promises, report: Report, rng: Random
) -> None:
    """Fork a life, kill it at a random moment, and note what it had promised by then."""
    reader, writer = os.pipe()
    # The first frame after a restart must not always be the one that was torn.
    active = rng.sample(range(CLIENTS), rng.randint(1, CLIENTS))
    child = os.fork()
    if child == 0:
        os.close(reader)
        be_child(options, files, promises, active, writer)
    os.close(writer)
    # Most moments are under load; some are in the middle of opening.
    life_s = rng.uniform(0, 0.012)
    opening_s = LONGEST_LIFE_S if rng.random() < 0.9 else rng.uniform(0, 0.008)
    if isinstance(files, ForgetfulFiles) and files.die_in_sync:
        life_s = opening_s = LONGEST_LIFE_S
    deadline = time.monotonic() + opening_s
    data = b""
    is_serving = False
    while (left := deadline - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
        if not is_serving and data[:1] == _SERVING:
            is_serving = True
            deadline = time.monotonic() + life_s
    else:
        os.kill(child, signal.SIGKILL)
    while part := os.read(reader, 1 << 16):
        data += part
    os.close(reader)
    _, status = os.waitpid(child, 0)
    report.kills += os.WIFSIGNALED(status)
    note(data, promises, report)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"a life ended by itself with status {status}")


def be_child(
    options: StoreOptions, files: FileSystem, promises: Promises, active: list[int], pipe: int
) -> NoReturn:
    """Run a life; never returns to the code that forked."""
    try:
        asyncio.run(live(options, files, promises, active, pipe))
    except BaseException as error:  # noqa: BLE001  Whatever it is, the parent has to hear of it.
        kind = _WRONG if isinstance(error, WrongError | AidbError) else _BROKEN
        text = traceback.format_exc()[-3000:].encode()
        os.write(pipe, _MESSAGE.pack(kind, len(text), 0, 0) + text)
    os._exit(1)


def note(data: bytes, promises: Promises, report: Report) -> None:
    """Take down the messages of a life."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        kind, client, first, second = _MESSAGE.unpack_from(data, at)
        at += _MESSAGE.size
        if kind == _SERVING:
            report.unknown_outcomes += client
            report.torn_tails += first > 0
            report.torn_bytes += first
            report.reopen_ms.append(second / 1000)
        elif kind == _REGISTERED:
            promises.client_ids[client] = first
        elif kind == _ANSWERED:
            promises.answered[client], promises.revisions[client] = first, second
            report.batches += 1
        else:
            text = data[at : at + client].decode()
            raise WrongError(text) if kind == _WRONG else RuntimeError(text)


def run(*, kills: int, seed: int, snapshot_bytes: int) -> Report:
    """Kill stores `kills` times, each store at most 30 times.

    Raises:
        WrongError: a promise was broken.
    """
    report = Report(seed=seed)
    rng = Random(seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aidb-kills-") as directory:
        while report.kills < kills:
            store = Path(directory) / str(report.stores)
            create_store(
                store, FileSystem(), store_uuid=STORE_UUID, database="killed", partition=0,
                partitions=1,
            )  # fmt: skip
            options = StoreOptions(
                database="killed",
                partition=0,
                durability="local",
                directory=str(store),
                store_uuid=STORE_UUID,
                segment_bytes=1 << (15 if snapshot_bytes else 18),
                reserve_bytes=0,
                snapshot_bytes=snapshot_bytes or 1 << 40,
            )
            promises = Promises()
            for _ in range(min(KILLS_A_STORE, kills - report.kills)):
                run_life(options, choose_files(rng, report), promises, report, rng)
            report.lines_gone += run_check(options, promises)
            if not snapshot_bytes:
                check_log(options, promises)
            report.stores += 1
    report.seconds = round(time.monotonic() - began, 1)
    return report


def choose_files(rng: Random, report: Report) -> FileSystem:
    """Return the disk of the next life."""
    choice = rng.random()
    if choice < 0.2:
        return FileSystem()
    if choice < 0.6:
        return ForgetfulFiles()
    report.died_in_write += 1
    # Some die soon after they opened: only then is a torn tail of the life before still there to
    # be misread, if it was not cut off.
    return ForgetfulFiles(die_in_sync=rng.randint(2, rng.choice((6, 30))))


def run_check(options: StoreOptions, promises: Promises) -> int:
    """Check all promises in a last life that ends well; return how many lines have gone."""

    async def check() -> int:
        actor = hurried(options, FileSystem())
        await actor.open()
        for client in range(CLIENTS):
            await check_client(actor, client, promises.answered[client])
        lines_gone = 0
        for session in map(session_of, range(CLIENTS)):
            lines_gone += await check_lines(actor, session, await applied_to(actor, session))
        await actor.stop()
        return lines_gone

    return asyncio.run(check())


def main() -> None:
    """Run and print the report as JSON; exits with 3 if a promise was broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--snapshot-bytes", type=int, default=0)
    parser.add_argument("--mistake", choices=sorted(mistakes.BY_NAME))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.mistake:
        make_mistake: Callable[[], None] = mistakes.BY_NAME[arguments.mistake]
        make_mistake()
    try:
        report = run(
            kills=arguments.kills, seed=arguments.seed, snapshot_bytes=arguments.snapshot_bytes
        )
    except (WrongError, AidbError) as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(WRONG_STATUS)
    sys.stdout.write(json.dumps(report.summary()) + "\n")


if __name__ == "__main__":
    main()
