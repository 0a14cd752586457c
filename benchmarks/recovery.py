"""Seconds from the death of a store with many rows to its first answer."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from aidb_ray import AgentMessage, Database, eq
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import Insert
from aidb_ray.store.rows import codec_of
from benchmarks.harness import Figure, Logged, Rig, counting_log, median_of, status_of, sync_figures

ROWS_A_COMMIT = 50
AT_ONCE = 400
SNAPSHOT_TIMEOUT_MS = 600_000
NEVER_BY_ITSELF = 1 << 50


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to recover.

    Attributes:
        rows: Rows that the newest snapshot holds.
        trail: Commits of a row each that only the log holds.
    """

    rows: int = 1_000_000
    sessions: int = 10_000
    trail: int = 50_000
    kills: int = 3


FULL = Sizes()
QUICK = Sizes(rows=50_000, sessions=1_000, trail=5_000, kills=1)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Build a state, then kill the store and ask for the last row, several times."""
    logged: list[Logged] = []
    # Snapshots are taken at the moments that the sizes name and at no other.
    async with rig.open(snapshot_bytes=NEVER_BY_ITSELF) as db:
        async with counting_log(db, logged):
            # Two halves: with two snapshots the log behind the older one is compacted, as it is
            # in a store that has lived for a while.
            half = sizes.rows // 2
            await fill(db, sizes, 0, half, ROWS_A_COMMIT)
            await take_snapshot(db)
            await fill(db, sizes, half, sizes.rows, ROWS_A_COMMIT)
            await take_snapshot(db)
            last = sizes.rows + sizes.trail
            await fill(db, sizes, sizes.rows, last, 1)
        resting: list[float] = []
        inside: list[float] = []

        async def recover(_run: int) -> float:
            status = await status_of(db)
            rig.kill(status.pid)
            began = time.perf_counter()
            await check_row(db, sizes, last - 1)
            seconds = time.perf_counter() - began
            await check_row(db, sizes, 0)
            resting.append(time.perf_counter() - began)
            inside.append((await status_of(db)).recovery_ms / 1000)
            return seconds

        seconds = await median_of(sizes.kills, recover)
    return [
        Figure("rows", sizes.rows + sizes.trail, f"in {sizes.sessions:,} sessions"),
        Figure(
            "seconds",
            seconds,
            f"from SIGKILL of the store to the first answered query; median of {sizes.kills} kills",
        ),
        Figure(
            "resting_row_seconds",
            statistics.median(resting[1:]),
            "until a row that only the snapshot has was found, too; median",
        ),
        Figure("store_seconds", statistics.median(inside[1:]), "of them, reading the disk; median"),
        Figure("commits_after_snapshot", sizes.trail, "that only the log held, a row each"),
        *sync_figures(logged, "while the rows were written"),
    ]


async def fill(db: Database, sizes: Sizes, begin: int, end: int, a_commit: int) -> None:
    """Write rows `begin` to `end`, in order, `a_commit` rows a commit."""
    client = db.partitions[0].client
    rows = make_rows(sizes, begin, end)
    while waiting := [client.commit(part) for part in islice(parts_of(rows, a_commit), AT_ONCE)]:
        await asyncio.gather(*waiting)


def parts_of(rows: Iterator[Insert], size: int) -> Iterator[list[Insert]]:
    """Yield the rows in lists of `size`; the last may be shorter."""
    while part := list(islice(rows, size)):
        yield part


def make_rows(sizes: Sizes, begin: int, end: int) -> Iterator[Insert]:
    """Yield messages as a collection sends them; neighbours are in one session."""
    row = {"id": "KEY", "role": "user", "actor_id": "me", "content": "hello " * 10}
    _, value = codec_of(AgentMessage, "id").encode("messages", row)
    head, _, tail = value.partition(b"KEY")
    for n in range(begin, end):
        yield Insert(session_of(sizes, n), "messages", f"{n:08}", b"%s%08d%s" % (head, n, tail))


def session_of(sizes: Sizes, n: int) -> str:
    """Return the session that holds row `n`."""
    return f"aidb://recovery/{n // ROWS_A_COMMIT % sizes.sessions}"


async def take_snapshot(db: Database) -> None:
    """Have the store write a snapshot that holds all rows."""
    store = db.partitions[0].ref.with_timeout(SNAPSHOT_TIMEOUT_MS)
    wanted = (await status_of(db)).revision
    while await store.ask(StoreActor.snapshot) < wanted:
        pass


async def check_row(db: Database, sizes: Sizes, n: int) -> None:
    """Ask for row `n`, and raise unless it is there, once."""
    messages = db.session(session_of(sizes, n)).messages
    found = await db.query(lambda q: q.from_(m=messages).where(lambda m: eq(m.id, f"{n:08}")))
    if len(found) != 1:
        raise AssertionError(f"row {n} was found {len(found)} times after the store recovered")
