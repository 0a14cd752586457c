"""Time as a model or a test sees it, and a clock that waits for no one."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count
from typing import Protocol


class Clock(Protocol):
    """Time as a model or a test sees it."""

    def now_ms(self) -> int:
        """Return the time in milliseconds, from any origin; it never goes back."""
        ...

    async def sleep_ms(self, duration_ms: float) -> None:
        """Return once `duration_ms` have passed."""
        ...


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self, now_ms: int = 0) -> None:
        self._now_ms: float = now_ms
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._tickets = count()

    def now_ms(self) -> int:
        """See `Clock.now_ms`."""
        return int(self._now_ms)

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not sleeper.done() for _, _, sleeper in self._sleepers)

    def advance(self, duration_ms: float) -> None:
        """Let time pass; sleepers whose time has come wake in the order of their times."""
        if duration_ms < 0:
            raise ValueError(f"Time cannot go back by {-duration_ms} ms.")
        self._now_ms += duration_ms
        while self._sleepers and self._sleepers[0][0] <= self._now_ms:
            sleeper = heapq.heappop(self._sleepers)[2]
            if not sleeper.done():
                sleeper.set_result(None)

    async def sleep_ms(self, duration_ms: float) -> None:
        """See `Clock.sleep_ms`; zero or less returns at once."""
        if duration_ms <= 0:
            return
        sleeper = asyncio.get_running_loop().create_future()
        entry = (self._now_ms + duration_ms, next(self._tickets), sleeper)
        heapq.heappush(self._sleepers, entry)
        await sleeper


class LoopClock:
    """The clock of the running event loop."""

    def now_ms(self) -> int:
        """See `Clock.now_ms`."""
        return int(asyncio.get_running_loop().time() * 1_000)

    async def sleep_ms(self, duration_ms: float) -> None:
        """See `Clock.sleep_ms`."""
        await asyncio.sleep(duration_ms / 1_000)
