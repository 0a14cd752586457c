"""Reading rows and chunks of one partition: pages of sessions in memory and in the snapshot.

Long reads give way to other work every 5 ms. Nothing here changes a row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from heapq import merge
from typing import TYPE_CHECKING, TypeAlias

from aidb_ray.errors import CorruptionError
from aidb_ray.store.changes import (
    ChunkPage,
    ChunkRead,
    ChunkSlice,
    Filter,
    FoundRow,
    ReadRequest,
    RowPage,
    SessionRowsRead,
    SessionsRead,
    bucket_of,
)
from aidb_ray.store.columns import ERASED, from_arrow
from aidb_ray.store.indexes import Indexes, PartialIndex, Place
from aidb_ray.store.matching import RowTest, make_row_test
from aidb_ray.store.streams import Run, Stream, decode_stream
from aidb_ray.store.tables import STREAMS, SYSTEM, Tables

if TYPE_CHECKING:
    from aidb_ray.store.log import CommitLog, MemoryLog, Snapshot

SLICE_MS = 5
"""Longest piece of reading between two turns of the event loop."""

Scanned: TypeAlias = "tuple[str, str, int, bytes | None]"
"""(session, key, revision, value); a session without rows comes once, without a value."""


class _Turns:
    """Gives the event loop a turn when a piece of work has lasted long enough."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + SLICE_MS / 1000

    async def give_way(self) -> None:
        if time.monotonic() > self._deadline:
            await asyncio.sleep(0)
            self._deadline = time.monotonic() + SLICE_MS / 1000


class RowReader:
    """Answers read requests from the tables and, for sessions at rest, from the snapshot."""

    def __init__(self, tables: Tables, log: CommitLog | MemoryLog) -> None:
        self._tables = tables
        self._log = log
        self.indexes = Indexes()

    async def read(self, request: ReadRequest) -> RowPage:
        """Return a page of rows. See `StoreActor.read`."""
        wanted = request.filter
        if wanted.session is None:
            return await self._scan(request)
        if request.key is None:
            return self._page(request, self._session_rows(wanted, wanted.session, request.after))
        row = self._tables.get(wanted.session, wanted.collection, request.key)
        found = [FoundRow(wanted.session, request.key, row.revision, row.value)] if row else []
        return RowPage(self._tables.revision, found)

    async def read_sessions(self, request: SessionsRead) -> list[SessionRowsRead]:
        """Return all rows asked for, each session at one revision."""
        turns = _Turns()
        answer: list[SessionRowsRead] = []
        for name, collections in request.sessions:
            session = self._tables.peek(name)
            rows = {
                collection: [
                    FoundRow(name, key, row.revision, row.value)
                    for key, row in session.collections.get(collection, {}).items()
                ]
                for collection in collections
            }
            streams = {key: (s.next_index, s.closes) for key, s in session.streams.items()}
            answer.append(SessionRowsRead(self._tables.revision, rows, streams))
            await turns.give_way()
        return answer

    def read_chunks(self, request: ChunkRead) -> ChunkPage:
        """Return stored chunks of one generation."""
        revision = self._tables.revision
        stream = self._tables.peek(request.session).streams.get(request.generation_id)
        if stream is None:
            return ChunkPage(revision, [], 0)
        slices: list[ChunkSlice] = []
        size = 0
        more = False
        for run in stream.runs:
            if run.index + run.count <= request.index:
                continue
            if size > request.max_bytes:
                more = True
                break
            part = self._load_run(request.generation_id, run, max(0, request.index - run.index))
            slices.append(part)
            size += len(part.columns.payload) + 5 * len(part.columns.types)
        attempt = stream.runs[-1].attempt if stream.runs else 0
        return ChunkPage(revision, slices, stream.next_index, stream.closes, more, attempt)

    def _load_run(self, generation_id: str, run: Run, skip: int) -> ChunkSlice:
        from aidb_ray.store.log import Position

        place = Position(run.segment, run.offset)
        batch = self._log.read_chunks(place, run.start + skip, run.count - skip)
        columns = from_arrow(batch)
        if ERASED in columns.types:
            raise CorruptionError(
                f"Chunks of {generation_id!r} were erased from segment {run.segment}.",
                file=f"segment {run.segment}",
                offset=run.offset,
            )
        return ChunkSlice(generation_id, run.attempt, run.index + skip, columns, run.types)

    async def sessions(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of sessions that hold rows, ascending, after `after`."""
        turns = _Turns()
        resident = set(self._tables.sessions)
        names: list[str] = []
        for name, session in list(self._tables.sessions.items()):
            is_asked = name != SYSTEM and name > after and name.startswith(prefix)
            if is_asked and any(session.collections.values()):
                names.append(name)
            await turns.give_way()
        names.sort()
        found: list[str] = []
        for name in merge(names, self._resting_sessions(prefix, after, resident)):
            if len(found) == limit:
                break
            found.append(name)
            await turns.give_way()
        return found

    def _resting_sessions(self, prefix: str, after: str, resident: set[str]) -> Iterator[str]:
        snapshot = self._log.snapshot()
        if snapshot is not None:
            for name in snapshot.sessions(prefix):
                if name > after and name != SYSTEM and name not in resident:
                    yield name

    async def rows(self, wanted: Filter) -> AsyncIterator[FoundRow]:
        """Yield the rows of a filter, each as it is when it comes by or was when this began."""
        if wanted.session is None:
            async for row in self._matches(wanted, None):
                yield row
            return
        for row in list(self._session_rows(wanted, wanted.session, None)):
            yield row

    async def streams(self, wanted: Filter) -> AsyncIterator[tuple[str, str, Stream]]:
        """Yield (session, generation, stream) of the sessions of a filter. See `rows`."""
        turns = _Turns()
        names = list(self._tables.sessions) if wanted.session is None else [wanted.session]
        for name in names:
            session = self._tables.peek(name)
            if wanted.covers(name, session.bucket):
                for key, stream in list(session.streams.items()):
                    yield name, key, stream
            await turns.give_way()
        snapshot = self._log.snapshot()
        if snapshot is None or wanted.session is not None:
            return
        resident = set(names)
        for name, key, _, value in snapshot.scan(STREAMS):
            if name not in resident and wanted.covers(name, 0):
                yield name, key, decode_stream(value)
            await turns.give_way()

    # Pages.

    def _page(self, request: ReadRequest, rows: Iterator[FoundRow]) -> RowPage:
        found: list[FoundRow] = []
        size = 0
        for row in rows:
            if size > request.max_bytes:
                return RowPage(self._tables.revision, found, more=True)
            found.append(row)
            size += len(row.value) + 64
        return RowPage(self._tables.revision, found)

    def _session_rows(
        self, wanted: Filter, session: str, after: Place | None
    ) -> Iterator[FoundRow]:
        rows = self._tables.peek(session).collections.get(wanted.collection, {})
        test = make_row_test(wanted)
        for key in sorted(rows):
            row = rows[key]
            if after is not None and key <= after[1]:
                continue
            if test is None or test.accepts(row.value):
                yield FoundRow(session, key, row.revision, row.value)

    async def _scan(self, request: ReadRequest) -> RowPage:
        wanted = request.filter
        index = self.indexes.find(wanted)
        if index is None and request.after is None:
            begun = self.indexes.begin(wanted)
            if begun is not None:
                await self._fill(begun)
                index = self.indexes.find(wanted)
        if index is not None:
            return self._page(request, index.rows_after(request.after))
        revision = self._tables.revision
        found: list[FoundRow] = []
        size = 0
        async for row in self._matches(wanted, request.after):
            if size > request.max_bytes:
                return RowPage(revision, found, more=True)
            found.append(row)
            size += len(row.value) + 64
        return RowPage(revision, found)

    async def _fill(self, index: PartialIndex) -> None:
        try:
            async for row in self._matches(index.wanted, None):
                index.fill([row])
                if index.is_too_large:
                    # It stays among the indexes, empty, so that nobody tries again.
                    break
            index.complete()
        finally:
            if not index.is_complete:
                self.indexes.drop(index)

    async def _matches(self, wanted: Filter, after: Place | None) -> AsyncIterator[FoundRow]:
        """Yield rows of all sessions that pass, in order of (session, key).

        Each is as it is when it comes by, or as it was when this began.
        """
        turns = _Turns()
        test = make_row_test(wanted)
        # Which sessions rest is decided once: one that is loaded or evicted meanwhile must
        # come neither twice nor not at all.
        resident = set(self._tables.sessions)
        rows = merge(
            self._resident(wanted, after, resident), self._resting(wanted, after, resident, test)
        )
        for count, (session, key, revision, value) in enumerate(rows):
            if count % 64 == 0:
                await turns.give_way()
            if value is not None and (test is None or test.accepts(value)):
                yield FoundRow(session, key, revision, value)

    def _resident(
        self, wanted: Filter, after: Place | None, resident: set[str]
    ) -> Iterator[Scanned]:
        prefix, first = wanted.prefix, after[0] if after else ""
        names = [name for name in resident if name >= first and name.startswith(prefix)]
        names.sort()
        for name in names:
            session = self._tables.peek(name)
            if name == SYSTEM or not wanted.covers(name, session.bucket):
                continue
            # A session without a match still takes a turn, so that the scan gives way.
            yield name, "", 0, None
            rows = session.collections.get(wanted.collection, {})
            for key in sorted(rows):
                row = rows.get(key)
                if row is not None and (after is None or (name, key) > after):
                    yield name, key, row.revision, row.value

    def _resting(
        self, wanted: Filter, after: Place | None, resident: set[str], test: RowTest | None
    ) -> Iterator[Scanned]:
        snapshot = self._log.snapshot()
        if snapshot is None:
            return
        if after is None:
            probe = None if test is None else test.probe
            rows = snapshot.scan(wanted.collection, probe)
        else:
            rows = _scan_after(snapshot, wanted.collection, after)
        for session, key, revision, value in rows:
            if session not in resident and wanted.covers(
                session, bucket_of(session) if wanted.buckets else 0
            ):
                yield session, key, revision, value


def _scan_after(
    snapshot: Snapshot, collection: str, after: Place
) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield a collection's rows behind `after`, reading only blocks that may hold some."""
    number = 0
    while (block := snapshot.block(number)) is not None:
        if block.last_session >= after[0]:
            sessions, collections, keys, revisions, values = snapshot.read_columns(number)
            for at, name in enumerate(collections):
                if name == collection and (sessions[at], keys[at]) > after:
                    yield sessions[at], keys[at], revisions[at], values[at]
        number += 1
