"""The pending-work queue: what is due, by session, each session once at a time. Pure.

Sessions take turns: one that has more work when it is done goes to the back of the queue, so a
busy session cannot keep others waiting. What waits here is an entry, not a task.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from itertools import islice
from typing import Generic, TypeVar

S = TypeVar("S", bound=Hashable)
K = TypeVar("K", bound=Hashable)

_UNTIL_WOKEN = 1 << 62


class PendingWork(Generic[S, K]):
    """Pending keys by session, up to `max_running` sessions of which are at work."""

    def __init__(self, *, max_running: int) -> None:
        assert max_running > 0, max_running
        self._max_running = max_running
        # Keys and when they are due, in order of arrival; of sessions that are at work, too.
        self._keys: dict[S, dict[K, int]] = {}
        self._queue: dict[S, None] = {}
        # Those of the queue that go before the others.
        self._urgent: dict[S, None] = {}
        self._running: set[S] = set()
        self._resting: dict[S, int] = {}
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
    def is_full(self) -> bool:
        """Whether as many sessions are at work as may be."""
        return len(self._running) >= self._max_running

    def has_work(self, session: S | None = None, *, now_ms: int) -> bool:
        """Whether a session, or any at all, is at work or would be if it got its turn.

        What is not due yet, or waits to be woken, does not count; a short rest does.
        """
        self._wake_due(now_ms)
        if session is None:
            rests = any(until_ms != _UNTIL_WOKEN for until_ms in self._resting.values())
            return bool(self._running or self._queue or rests)
        if session in self._running or session in self._queue:
            return True
        return session in self._keys and self._resting.get(session, _UNTIL_WOKEN) != _UNTIL_WOKEN

    def keys(self, session: S) -> list[K]:
        """Return all of the session's keys, in order of arrival."""
        return list(self._keys.get(session, ()))

    def due_keys(self, session: S, *, now_ms: int) -> list[K]:
        """Return the session's keys that are due, in order of arrival; none while it rests."""
        if self._resting.get(session, 0) > now_ms:
            return []
        return [key for key, due_ms in self._keys.get(session, {}).items() if due_ms <= now_ms]

    def put(self, session: S, key: K, *, not_before_ms: int = 0, now_ms: int = 0) -> None:
        """Add a key, or change when it is due."""
        self._keys.setdefault(session, {})[key] = not_before_ms
        if not_before_ms > now_ms:
            self._remember(session, not_before_ms)
        elif session not in self._running and session not in self._resting:
            self._queue.setdefault(session)

    def discard(self, session: S, key: K) -> None:
        """Remove a key that is done or gone; one that is not here changes nothing."""
        keys = self._keys.get(session)
        if keys is None:
            return
        keys.pop(key, None)
        if not keys:
            del self._keys[session]
            self._leave_queue(session)
            self._resting.pop(session, None)

    def replace(self, entries: Iterable[tuple[S, K, int]], *, now_ms: int) -> None:
        """Make these the pending keys; no session rests. Sessions at work go on."""
        self._keys.clear()
        self._queue.clear()
        self._urgent.clear()
        self._resting.clear()
        self._later.clear()
        for session, key, not_before_ms in entries:
            self.put(session, key, not_before_ms=not_before_ms, now_ms=now_ms)

    def take(self, *, now_ms: int, only: S | None = None, skip: int = 0) -> S | None:
        """Return the next session with due work and count it as at work; None if there is none.

        With `only`, that session or none. With `skip`, one that so many others are before, or the
        last: whoever shares a queue with others does not reach for the same one as they do. Those
        that hurry are not skipped.
        """
        self._wake_due(now_ms)
        if len(self._running) >= self._max_running:
            return None
        while (session := self._first(only, skip)) is not None:
            self._leave_queue(session)
            # What was due when it was queued may have been put off since.
            if self.due_keys(session, now_ms=now_ms):
                self._running.add(session)
                return session
        return None

    def seize(self, session: S) -> bool:
        """Count a session as at work whatever it has and however many are; False if it is."""
        if session in self._running:
            return False
        self._leave_queue(session)
        self._running.add(session)
        return True

    def done(self, session: S, *, now_ms: int) -> None:
        """Count the session as no longer at work; what it still has goes to the back."""
        self._running.discard(session)
        if self.due_keys(session, now_ms=now_ms):
            self._queue.setdefault(session)

    def rest(self, session: S, *, until_ms: int | None = None) -> None:
        """Leave the session alone until then, or until `wake`, whatever comes for it."""
        if session not in self._keys:
            return
        self._leave_queue(session)
        self._resting[session] = _UNTIL_WOKEN if until_ms is None else until_ms
        if until_ms is not None:
            self._remember(session, until_ms)

    def wake(self, session: S, *, now_ms: int) -> None:
        """End the session's rest."""
        self._resting.pop(session, None)
        if session not in self._running and self.due_keys(session, now_ms=now_ms):
            self._queue.setdefault(session)

    def hurry(self, session: S) -> None:
        """Let a session go before the others, if it waits for its turn."""
        if session in self._queue:
            self._urgent[session] = None

    def next_due_ms(self) -> int | None:
        """Return when the next session that must wait may be due, None if none waits."""
        return self._later[0][0] if self._later else None

    def _first(self, only: S | None, skip: int) -> S | None:
        if only is None and self._urgent:
            return next(iter(self._urgent))
        if only is None:
            skip = min(skip, len(self._queue) - 1) if skip else 0
            return next(islice(self._queue, max(skip, 0), None), None)
        return only if only in self._queue else None

    def _leave_queue(self, session: S) -> None:
        self._queue.pop(session, None)
        self._urgent.pop(session, None)

    def _remember(self, session: S, due_ms: int) -> None:
        self._tickets += 1
        heapq.heappush(self._later, (due_ms, self._tickets, session))

    def _wake_due(self, now_ms: int) -> None:
        while self._later and self._later[0][0] <= now_ms:
            session = heapq.heappop(self._later)[2]
            if self._resting.get(session, _UNTIL_WOKEN) <= now_ms:
                del self._resting[session]
            if session not in self._running and self.due_keys(session, now_ms=now_ms):
                self._queue.setdefault(session)
