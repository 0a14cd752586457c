"""The pending-work queue: what is due, by session, each session once at a time. Pure.

Sessions take turns: one that has more work when it is done goes to the back of the queue, so a
busy session cannot keep others waiting. What waits here is an entry, not a task.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
K = TypeVar("K", bound=Hashable)


class PendingWork(Generic[S, K]):
    """Pending keys by session, up to `max_running` sessions of which are at work."""

    def __init__(self, *, max_running: int) -> None:
        assert max_running > 0, max_running
        self._max_running = max_running
        # Keys by session, in order of arrival; of sessions that are at work, too.
        self._keys: dict[S, dict[K, int]] = {}
        self._queue: dict[S, None] = {}
        self._running: set[S] = set()
        self._later: list[tuple[int, int, S]] = []
        self._tickets = 0

    def __len__(self) -> int:
        return sum(map(len, self._keys.values()))

    @property
    def running(self) -> frozenset[S]:
        """The sessions that are at work."""
        return frozenset(self._running)

    @property
    def running_count(self) -> int:
        """How many sessions are at work."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is pending and nothing at work."""
        return not self._keys and not self._running

    def has_work(self, session: S) -> bool:
        """Whether the session has pending keys or is at work."""
        return session in self._keys or session in self._running

    def put(self, session: S, key: K, *, not_before_ms: int = 0, now_ms: int = 0) -> None:
        """Add a key, or change when it is due."""
        self._keys.setdefault(session, {})[key] = not_before_ms
        if not_before_ms > now_ms:
            self._tickets += 1
            heapq.heappush(self._later, (not_before_ms, self._tickets, session))
        elif session not in self._running:
            self._queue.setdefault(session)

    def discard(self, session: S, key: K) -> None:
        """Remove a key that is done or gone; one that is not here changes nothing."""
        keys = self._keys.get(session)
        if keys is None:
            return
        keys.pop(key, None)
        if not keys:
            del self._keys[session]
            self._queue.pop(session, None)

    def replace(self, entries: Iterable[tuple[S, K, int]], *, now_ms: int) -> None:
        """Make these the pending keys. Sessions at work go on."""
        self._keys.clear()
        self._queue.clear()
        self._later.clear()
        for session, key, not_before_ms in entries:
            self.put(session, key, not_before_ms=not_before_ms, now_ms=now_ms)

    def take(self, *, now_ms: int, only: S | None = None) -> S | None:
        """Return the next session with due work and count it as at work; None if there is none.

        With `only`, that session or none.
        """
        self._wake(now_ms)
        if len(self._running) >= self._max_running:
            return None
        session = next(iter(self._queue), None) if only is None else only
        if session is None or session not in self._queue:
            return None
        del self._queue[session]
        self._running.add(session)
        return session

    def due_keys(self, session: S, *, now_ms: int) -> list[K]:
        """Return the session's keys that are due, in order of arrival."""
        return [key for key, due_ms in self._keys.get(session, {}).items() if due_ms <= now_ms]

    def done(self, session: S, *, now_ms: int) -> None:
        """Count the session as no longer at work; what it still has goes to the back."""
        self._running.discard(session)
        if self.due_keys(session, now_ms=now_ms):
            self._queue.setdefault(session)

    def delay(self, session: S, *, until_ms: int) -> None:
        """Leave the session alone until then, whatever it has."""
        self._queue.pop(session, None)
        for key in self._keys.get(session, {}):
            self._keys[session][key] = max(until_ms, self._keys[session][key])
        self._tickets += 1
        heapq.heappush(self._later, (until_ms, self._tickets, session))

    def next_due_ms(self) -> int | None:
        """Return when the next key that must wait is due, None if none waits."""
        return self._later[0][0] if self._later else None

    def _wake(self, now_ms: int) -> None:
        while self._later and self._later[0][0] <= now_ms:
            session = heapq.heappop(self._later)[2]
            if session not in self._running and self.due_keys(session, now_ms=now_ms):
                self._queue.setdefault(session)
