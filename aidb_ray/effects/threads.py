"""Tools that run in threads, which nobody can stop: when they end, and with what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from aidb_ray.errors import ToolError


class ThreadEnd:
    """Knows whether a tool's thread still runs, and passes on what comes too late.

    Attributes:
        threads: Those that tools run in.
        on_late: Called, in the event loop, with a result that came after `is_given_up`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: Executor | None) -> None:
        self.threads = threads
        self._loop = loop
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_given_up = False
        self.on_late: Callable[[Any, ToolError | None], None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether a thread is at work."""
        return not self._idle.is_set()

    def began(self) -> None:
        """See `ThreadWatch.began`."""
        self._call(self._begin)

    def ended(self, result: Any, error: ToolError | None) -> None:
        """See `ThreadWatch.ended`."""
        self._call(self._end, result, error)

    async def wait(self) -> None:
        """Return once no thread is at work."""
        await self._idle.wait()

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        # A loop that has closed has nobody left who would listen.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(fn, *args)

    def _begin(self) -> None:
        self._running += 1
        self._idle.clear()

    def _end(self, result: Any, error: ToolError | None) -> None:
        self._running -= 1
        if not self._running:
            self._idle.set()
        if self.is_given_up and self.on_late is not None:
            self.on_late(result, error)
