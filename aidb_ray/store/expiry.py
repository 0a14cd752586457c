"""Removes rows and streams when their time is over, a bounded number at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final

from aidb_ray.errors import AidbError
from aidb_ray.store.changes import CHUNKS, Filter
from aidb_ray.store.retention import Victim
from aidb_ray.store.under_way import has_ended, is_over

if TYPE_CHECKING:
    from aidb_ray.store.reader import RowReader
    from aidb_ray.store.tables import SessionRows, Tables

logger = logging.getLogger(__name__)

MAX_VICTIMS: Final = 1_000
"""Rows that go in one commit."""


class Expirer:
    """Looks for rows that are older than they are kept, while there is a policy.

    Args:
        submit: Has victims removed that are as they were, and returns how many went; it also
            notes the time.
        clock_ms: Time in milliseconds since 1970.
    """

    def __init__(
        self,
        tables: Tables,
        reader: RowReader,
        submit: Callable[[Sequence[Victim]], Awaitable[int]],
        clock_ms: Callable[[], int],
    ) -> None:
        self._tables = tables
        self._reader = reader
        self._submit = submit
        self._clock_ms = clock_ms
        self._sweeping = asyncio.Lock()
        # By policy: up to which revision it was swept, and when it is to be swept again.
        self._swept: dict[tuple[str, str], int] = {}
        self._due_ms: dict[tuple[str, str], int] = {}
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Begin to look now and then, if there is something to look for."""
        if self._tables.retention.policies and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._look_forever())

    async def aclose(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def sweep(self, *, waits: bool = True) -> int:
        """Remove what is over, with `waits` only where a search is due; return how much."""
        async with self._sweeping:
            await self._submit(())
            retention = self._tables.retention
            now_ms = retention.now_ms(self._clock_ms())
            removed = 0
            for policy, keep_ms in list(retention.policies.items()):
                last = retention.last_expired(keep_ms, now_ms)
                is_due = not waits or self._due_ms.get(policy, 0) <= now_ms
                if is_due and last > self._swept.get(policy, 0):
                    removed += await self._sweep_one(*policy, last)
                    self._swept[policy] = last
                    self._due_ms[policy] = now_ms + retention.sweep_pause_ms(keep_ms)
            return removed

    async def _look_forever(self) -> None:
        retention = self._tables.retention
        while retention.policies:
            await asyncio.sleep(retention.pause_ms / 1000)
            try:
                removed = await self.sweep()
            except AidbError as error:
                # The disk is full, or damaged where a session rests: what is over can wait.
                logger.warning("rows whose time is over could not be removed: %s", error)
            else:
                if removed:
                    logger.info("removed what was kept long enough", extra={"count": removed})

    async def _sweep_one(self, collection: str, pattern: str, last: int) -> int:
        removed = 0
        victims: list[Victim] = []
        find = self._streams if collection == CHUNKS else self._rows
        async for victim in find(collection, pattern, last):
            victims.append(victim)
            if len(victims) == MAX_VICTIMS:
                removed += await self._submit(victims)
                victims = []
        return removed + (await self._submit(victims) if victims else 0)

    async def _rows(self, collection: str, pattern: str, last: int) -> AsyncIterator[Victim]:
        session: SessionRows | None = None
        async for row in self._reader.rows(_filter(collection, pattern)):
            if row.revision > last or not self._is_governed(collection, row.session, pattern):
                continue
            if session is None or session.name != row.session:
                session = self._tables.peek(row.session)
            if is_over(collection, row.key, row.value, session):
                yield Victim(row.session, collection, row.key, row.revision)

    async def _streams(self, collection: str, pattern: str, last: int) -> AsyncIterator[Victim]:
        async for name, key, stream in self._reader.streams(_filter(collection, pattern)):
            if stream.revision > last or not self._is_governed(collection, name, pattern):
                continue
            if has_ended(key, self._tables.peek(name)):
                yield Victim(name, collection, key, stream.revision)

    def _is_governed(self, collection: str, session: str, pattern: str) -> bool:
        return self._tables.retention.is_governed_by(collection, session, pattern)


def _filter(collection: str, pattern: str) -> Filter:
    if pattern.endswith("*"):
        return Filter(collection, prefix=pattern[:-1])
    return Filter(collection, pattern)
