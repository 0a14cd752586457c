"""Which connections of this process hold the stores of one database, so that the last ends them.

Ray has one cluster per process, so stores are told apart by the name of their database.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias
from weakref import WeakValueDictionary

from aidb_ray.errors import UnavailableError

TURN_TIMEOUT_MS = 300_000
_PAUSE_S = 0.01

Ending: TypeAlias = Callable[[], Awaitable[None]]


class Holders:
    """The connections of this process that use the same stores.

    They may live in several event loops and threads.

    Attributes:
        count: Connections that have not left yet.
    """

    def __init__(self) -> None:
        self.count = 0
        self._endings: dict[str, Ending] = {}
        self._guard = threading.Lock()
        self._turn = threading.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """Be the only one of this process to open or end these stores.

        Raises:
            UnavailableError: another has not finished within 5 minutes.
        """
        deadline = time.monotonic() + TURN_TIMEOUT_MS / 1000
        # Tried again and again: a lock that a thread waits for cannot be given up by cancelling.
        while not self._turn.acquire(blocking=False):
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "Another connection of this process still opens or ends the same stores. Try "
                    "again later.",
                    outcome="not_applied",
                    code="timed_out",
                )
            await asyncio.sleep(_PAUSE_S)
        try:
            yield
        finally:
            self._turn.release()

    def join(self) -> None:
        """Count one more connection."""
        with self._guard:
            self.count += 1

    def leave(self) -> None:
        """Count one connection less; the last one ends the stores in its turn."""
        with self._guard:
            self.count -= 1

    def leave_running(self, name: str, end: Ending) -> None:
        """Let the last connection call `end`; of one name only the newest is kept."""
        with self._guard:
            self._endings[name] = end

    def take_endings(self) -> list[Ending]:
        """Return what was left running, for the last connection to end."""
        with self._guard:
            endings, self._endings = list(self._endings.values()), {}
        return endings


_guard = threading.Lock()
_holders: WeakValueDictionary[str, Holders] = WeakValueDictionary()


def holders_of(database: str) -> Holders:
    """Return the holders of a database's stores, the same to every connection of this process."""
    with _guard:
        found = _holders.get(database)
        if found is None:
            found = _holders[database] = Holders()
    return found
