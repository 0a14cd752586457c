"""What forks ask of the past of sessions: looked up on the disk before they are planned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from aidb_ray.errors import CompactedError, StorageError
from aidb_ray.store.changes import Commit, Fork, Refusal
from aidb_ray.store.plan import NO_PAST, Past
from aidb_ray.store.tables import SessionRows, Tables

if TYPE_CHECKING:
    from aidb_ray.store.log import CommitLog, MemoryLog

    Log: TypeAlias = CommitLog | MemoryLog

logger = logging.getLogger(__name__)

MAX_RECALLED = 4


class Recall:
    """Sessions as they were, which takes as long as there is log to read.

    Whoever is about to fork has that looked up first, by a call that holds nobody up; what is
    found waits for the fork. A fork that comes without is looked up for when it comes.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], SessionRows | Refusal] = {}

    async def look_up(self, log: Log, tables: Tables, name: str, revision: int) -> None:
        """Look up a session as it was, and keep that for one fork; the newest few are kept.

        Raises:
            StorageError: the disk does not say; CorruptionError: what it says is damaged.
        """
        found = await _session_at(log, tables, name, revision)
        self._found.pop((name, revision), None)
        self._found[name, revision] = found
        while len(self._found) > MAX_RECALLED:
            del self._found[next(iter(self._found))]

    async def past_of(self, log: Log, tables: Tables, commits: Iterable[Commit]) -> Past:
        """Return what the forks among some commits ask of the past."""
        asked = {
            (fork.source, fork.at)
            for commit in commits
            if len(commit.mutations) == 1
            and isinstance(fork := commit.mutations[0], Fork)
            and fork.at >= 0
        }
        if not asked:
            return NO_PAST
        past: dict[tuple[str, int], SessionRows | Refusal] = {}
        for name, revision in asked:
            found = self._found.pop((name, revision), None)
            if not isinstance(found, SessionRows):
                try:
                    found = await _session_at(log, tables, name, revision)
                except StorageError:
                    logger.exception("the past of %s cannot be read", name)
                    found = Refusal("unreadable", key=name)
            past[name, revision] = found
        return past


async def _session_at(log: Log, tables: Tables, name: str, revision: int) -> SessionRows | Refusal:
    # With the disk come libraries that take long to import.
    from aidb_ray.store.log import CommitLog
    from aidb_ray.store.past import session_at

    if revision == tables.revision:
        return tables.peek(name).copy()
    if revision > tables.revision:
        return Refusal("revision_in_future", expected=tables.revision, got=revision)
    if not isinstance(log, CommitLog):
        return Refusal("compacted", key=name, expected=tables.revision, got=revision)
    try:
        return await asyncio.to_thread(session_at, log, name, revision)
    except CompactedError as error:
        return Refusal("compacted", key=name, expected=error.oldest, got=revision)
