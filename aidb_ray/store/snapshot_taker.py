"""When a snapshot is due, and taking it while the store goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from aidb_ray.errors import StorageError
from aidb_ray.store.presence import NamePresence
from aidb_ray.store.streams import Garbage, Run, decode_stream, runs_in, spare
from aidb_ray.store.tables import STREAMS, SessionRow, Tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidb_ray.store.log import CommitLog, Snapshot

logger = logging.getLogger(__name__)

R = TypeVar("R")
_NAMES_A_TURN = 256


class SnapshotTaker:
    """Takes one snapshot at a time, so that recovery and memory stay bounded.

    One is due when the log grew by `due_bytes`, or by the size of the newest snapshot if that is
    more: then writing snapshots costs no more than writing the log. Memory above
    `max_resident_bytes` makes it due earlier, for only rows at rest may leave memory.
    """

    def __init__(
        self,
        log: CommitLog,
        tables: Tables,
        *,
        due_bytes: int,
        max_resident_bytes: int,
        replayed_bytes: int,
    ) -> None:
        self._log = log
        self._tables = tables
        self._due_bytes = due_bytes
        self._max_resident_bytes = max_resident_bytes
        newest = log.snapshot()
        self._newest_bytes = newest.size if newest else 0
        # What was replayed is not in the newest snapshot either.
        self._logged_at_snapshot = log.stats.bytes - replayed_bytes
        self._taking: asyncio.Task[int] | None = None
        self._learning: asyncio.Task[None] | None = None
        self._is_closing = False
        if newest is None:
            tables.presence = NamePresence()
        else:
            self._learning = asyncio.get_running_loop().create_task(self._learn_names(newest))

    def consider(self) -> None:
        """Begin a snapshot if one is due."""
        if self._taking is not None or self._is_closing:
            return
        grown = self._log.stats.bytes - self._logged_at_snapshot
        if grown <= self._due_bytes:
            return
        if grown > self._newest_bytes or self._tables.weight > self._max_resident_bytes:
            self._begin()

    async def take(self) -> int:
        """Take a snapshot, or wait for the one that is being taken; return its revision."""
        return await asyncio.shield(self._taking or self._begin())

    async def aclose(self) -> None:
        """Wait until nothing works on the disk any more. A snapshot that is not done is dropped."""
        self._is_closing = True
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.wait([self._learning])
        if self._taking is not None:
            await asyncio.wait([self._taking])

    def die(self) -> asyncio.Task[int] | None:
        """Stop where it is, as the end of a process does; returns what a thread must finish."""
        self._is_closing = True
        for task in (self._learning, self._taking):
            if task is not None:
                task.cancel()
        return self._taking

    def _begin(self) -> asyncio.Task[int]:
        self._logged_at_snapshot = self._log.stats.bytes
        self._taking = asyncio.get_running_loop().create_task(self._take())
        return self._taking

    async def _take(self) -> int:
        try:
            if self._learning is not None:
                # Which names the older snapshot holds must be known before it is replaced.
                await asyncio.wait([self._learning])
            return await self._write()
        except StorageError:
            logger.exception("a snapshot failed; the log goes on")
            newest = self._log.snapshot()
            return newest.revision if newest else 0
        finally:
            self._taking = None

    async def _write(self) -> int:
        tables = self._tables
        writer = self._log.begin_snapshot(tables.revision)
        walked: list[str] = []
        is_written = False
        try:
            for _ in writer.merge(self._dirty_sessions(walked)):
                await asyncio.sleep(0)
                if self._is_closing:
                    return 0
            newest = await _in_thread(writer.finish)
            is_written = True
        finally:
            if not is_written:
                writer.abort()
                # What was walked is only in the log still: it must go into the next snapshot.
                for name in walked:
                    tables.sessions[name].is_dirty = True
        self._newest_bytes = newest.size
        tables.rest_in(newest.load, walked)
        if not self._is_closing:
            await self._compact()
        return newest.revision

    async def _compact(self) -> None:
        tables = self._tables
        # All at one moment. What is garbage then is used by no stream that is begun later.
        garbage, revision = tables.garbage(), tables.revision
        if garbage and tables.has_forks:
            dirty = {name for name, rows in tables.sessions.items() if rows.is_dirty}
            used = tables.runs_in_use(garbage, dirty)
            used += await _in_thread(partial(self._runs_at_rest, garbage, dirty))
            garbage = spare(garbage, used)
        tables.forget_garbage(await _in_thread(partial(self._log.compact, garbage)), revision)

    def _runs_at_rest(self, garbage: Garbage, others: Container[str]) -> list[Run]:
        """Return runs that lie in segments with garbage, of sessions as the snapshot has them."""
        snapshot = self._log.snapshot()
        assert snapshot is not None
        return [
            run
            for name, _, _, value in snapshot.scan(STREAMS)
            if name not in others
            for run in runs_in(decode_stream(value), garbage)
        ]

    def _dirty_sessions(self, walked: list[str]) -> Iterator[tuple[str, list[SessionRow]]]:
        sessions = self._tables.sessions
        for name in sorted(name for name, rows in sessions.items() if rows.is_dirty):
            # It cannot have left memory: only what rests may.
            session = sessions[name]
            session.is_dirty = False
            session.is_resting = False
            walked.append(name)
            yield name, session.rows()

    async def _learn_names(self, snapshot: Snapshot) -> None:
        """Learn which sessions the snapshot may hold, so that a new one costs no look at it."""
        presence = NamePresence()
        try:
            for count, name in enumerate(snapshot.sessions()):
                presence.add(name)
                if count % _NAMES_A_TURN == 0:
                    await asyncio.sleep(0)
        except StorageError:
            # Reading the damaged block for a session says so to whoever asked.
            logger.exception("the names in the snapshot cannot be read")
        else:
            self._tables.presence = presence


async def _in_thread(work: Callable[[], R]) -> R:
    """Run blocking work in a thread, to its end: a cancelled caller waits for it all the same.

    A file must not be closed while another thread writes to it.
    """
    working = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise
