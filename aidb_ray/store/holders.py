"""Which connections of this process hold the stores of one database, so that the last ends them.

Ray has one cluster per process, so stores are told apart by the name of their database.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from aidb_ray.errors import UnavailableError

TURN_TIMEOUT_MS = 300_000
_PAUSE_S = 0.01

Ending: TypeAlias = Callable[[], Awaitable[None]]


class Holders:
    """The connections of this process that use the same stores.

    They may live in several event loops and threads.
    """

    def __init__(self) -> None:
        # The event loop that made each. One that nobody holds any more, and so nobody can close,
        # is forgotten.
        self._loops: WeakKeyDictionary[object, asyncio.AbstractEventLoop] = WeakKeyDictionary()
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

    @property
    def count(self) -> int:
        """Connections that have neither left nor been dropped."""
        return len(self._loops)

    def join(self, connection: object) -> None:
        """Count a connection of this event loop."""
        with self._guard:
            self._loops[connection] = asyncio.get_running_loop()

    def leave(self, connection: object) -> None:
        """Count it no more; the last one ends the stores in its turn."""
        with self._guard:
            self._loops.pop(connection, None)
            is_loop_closed = any(loop.is_closed() for loop in self._loops.values())
        if is_loop_closed:
            # Its connection may be garbage that was never closed, and not be collected yet.
            gc.collect()

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
