"""A fork at any revision of a session is what the session was then.

Random programs write rows and streams, delete the session, take snapshots while they write, have
the log compacted and the store restarted. Oracle: what the session was after each commit, noted in
the obvious way.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidb_ray.chunks import replay
from aidb_ray.database import Database, Session
from aidb_ray.errors import CompactedError
from aidb_ray.store import snapshots
from aidb_ray.store.changes import Append, ChunkColumns, Delete, DeleteSession, Insert, Mutation
from aidb_ray.store.columns import EMPTY, pack
from tests.stores import SESSION, Store, insert, open_store, row

KEYS = "abc"
STREAMS = "gh"

puts = st.tuples(st.just("put"), st.sampled_from(KEYS), st.integers(0, 9))
removes = st.tuples(st.just("remove"), st.sampled_from(KEYS), st.just(0))
appends = st.tuples(st.just("append"), st.sampled_from(STREAMS), st.integers(1, 3))
closes = st.tuples(st.just("close"), st.sampled_from(STREAMS), st.just(0))
Write = tuple[str, str, int]
writes = st.one_of(puts, puts, removes, appends, appends, closes)
steps = st.lists(
    st.one_of(
        writes,
        writes,
        writes,
        writes,
        st.lists(writes, min_size=1, max_size=4),  # While a snapshot is taken.
        st.sampled_from(["restart", "snapshot", "churn", "delete"]),
    ),
    min_size=3,
    max_size=25,
)


@dataclass
class State:
    """What a session is: values by key, and of each stream its words and whether it has ended."""

    rows: dict[str, int] = field(default_factory=dict[str, int])
    streams: dict[str, tuple[list[str], bool]] = field(
        default_factory=dict[str, tuple[list[str], bool]]
    )


class History:
    """Writes, and what the session was after each commit."""

    def __init__(self, store: Store, seen: Counter[str]) -> None:
        self.now = State()
        self.past: dict[int, State] = {0: State()}
        self.deleted_at = 0
        self._store = store
        self._client = store.client()
        self._churned = 0
        self._seen = seen

    async def take(self, step: Any) -> None:
        match step:
            case "restart":
                await self._store.restart()
            case "snapshot":
                await self._store.actor.snapshot()
            case "churn":
                for _ in range(2):
                    self._churned += 1
                    pad = '"' + "x" * 20_000 + '"'
                    key = f"k{self._churned}"
                    self._note(await self._client.commit([insert(key, pad, session="aidb://pad")]))
                    await self._store.actor.snapshot()
            case "delete":
                self.now = State()
                revision = await self._client.commit([DeleteSession(SESSION)])
                self.deleted_at = revision
                self._note(revision)
            case list():
                # These are walked first, so that the session is walked while it is written to.
                self._churned += 1
                first = [
                    insert(f"k{self._churned}.{n}", session="aidb://first") for n in range(200)
                ]
                self._note(await self._client.commit(first))
                taking = asyncio.create_task(self._store.actor.snapshot())
                for write in cast("list[Write]", step):
                    await self._write(write)
                await taking
            case _:
                await self._write(step)

    async def _write(self, write: Write) -> None:
        made = self._make(write)
        if made is not None:
            mutations, columns = made
            self._note(await self._client.commit(mutations, chunks=columns))

    def _make(self, write: Write) -> tuple[list[Mutation], ChunkColumns] | None:
        """Return the mutations of a write, and take it in; None if it cannot be made now."""
        op, name, n = write
        rows, streams = self.now.rows, self.now.streams
        words, is_closed = streams.get(name, ([], False))
        match op:
            case "put":
                made: list[Mutation] = [Delete(SESSION, "rows", name)] if name in rows else []
                rows[name] = n
                return [*made, Insert(SESSION, "rows", name, row(name, str(n)))], EMPTY
            case "remove" if name in rows:
                del rows[name]
                return [Delete(SESSION, "rows", name)], EMPTY
            case "append" if not is_closed:
                added = [f"{name}{len(words) + at}" for at in range(n)]
                streams[name] = ([*words, *added], False)
                append = Append(SESSION, name, 1, len(words), 0, n)
                return [append], pack([1] * n, added)
            case "close" if words and not is_closed:
                streams[name] = (words, True)
                return [Append(SESSION, name, 1, len(words), 0, 0, closes="finished")], EMPTY
            case _:
                return None

    def _note(self, revision: int) -> None:
        self.past[revision] = deepcopy(self.now)
        self._seen["commits"] += 1

    def at(self, revision: int) -> State:
        """Return what the session was; revisions between commits are those of others."""
        return self.past[max(known for known in self.past if known <= revision)]


async def read(db: Database, url: str) -> State:
    """Return what a session is, as its readers see it."""
    session = db.session(url)
    client = db.partitions[0].client
    state = State()
    rows = session.collection("rows")
    for found in await db.query(lambda q: q.from_(r=rows)):
        state.rows[found["id"]] = found["v"]
    for name in STREAMS:
        page = await client.read_chunks(url, name)
        if page.next_index or page.closes:
            chunks = replay(session.chunks, generation_id=name, follow=False)
            words = [chunk.content async for chunk in chunks]
            state.streams[name] = (words, page.closes == "finished")
    return state


async def fork_everywhere(store: Store, db: Database, history: History) -> dict[str, State]:
    """Fork the session at each of its revisions, and compare; return what the forks are."""
    seen, forks = history._seen, dict[str, State]()
    latest = (await db.status())[0].revision
    for revision in range(latest + 1):
        url = f"aidb://fork/{revision}"
        oldest = await oldest_for(db.session(SESSION).fork(at=revision, to=url))
        if oldest is not None:
            assert revision < oldest <= latest
            seen["deleted" if revision < history.deleted_at else "compacted"] += 1
            continue
        assert revision >= history.deleted_at
        expected = history.at(revision)
        assert await read(db, url) == expected, revision
        forks[url] = expected
        seen["forks"] += 1
        seen["streams"] += len(expected.streams)
    return forks


async def oldest_for(forking: Awaitable[Session]) -> int | None:
    """Return None if a fork can be made, else the oldest revision that is said to be known."""
    try:
        await forking
    except CompactedError as error:
        return error.oldest
    return None


async def run(program: list[Any], seen: Counter[str], directory: Path) -> None:
    async with open_store(directory, segment_bytes=1 << 12, max_resident_bytes=1) as store:
        db = Database("test", [store.ref], data_dir=str(directory), cluster=None)
        history = History(store, seen)
        for step in program:
            await history.take(step)
        forks = await fork_everywhere(store, db, history)
        await db.session(SESSION).delete()
        for step in ("churn", "restart", "churn"):
            await history.take(step)
        for url, expected in forks.items():
            assert await read(db, url) == expected
        for partition in db.partitions:
            await partition.aclose()


def test_a_fork_at_any_revision_is_what_the_session_was_then() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(steps)
    def law(program: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
            # Snapshots give way after each row, so that commits come in between.
            patch.setattr(snapshots, "_SLICE_SECONDS", 0.0)
            asyncio.run(asyncio.wait_for(run(program, seen, Path(directory)), 120))

    law()

    print(dict(seen))  # noqa: T201
    assert min(seen[trait] for trait in ("forks", "streams", "compacted", "deleted")) > 0
