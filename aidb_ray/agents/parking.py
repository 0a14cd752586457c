"""Sessions that are left alone until others have answered or decided. Pure."""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a generation waits for.

    Attributes:
        is_for_persons: Whether nobody but persons is waited for; such a wait is no work.
        until_ms: When it must be looked at in any case, in milliseconds since 1970.
    """

    is_for_persons: bool
    until_ms: int | None = None


class Parking:
    """Parked sessions, and what was heard for those that are at work and may be parked next."""

    def __init__(self) -> None:
        self._parked: dict[str, Waiting] = {}
        self._at_work_elsewhere: set[str] = set()
        self._due: list[tuple[int, int, str]] = []
        self._tickets = 0
        # Of sessions at work: the newest revision that answered or decided something for them.
        self._heard: dict[str, int] = {}

    def __contains__(self, session: str) -> bool:
        return session in self._parked

    @property
    def sessions(self) -> list[str]:
        """The sessions that are parked."""
        return list(self._parked)

    def park(self, session: str, waiting: Waiting) -> None:
        """Leave a session alone."""
        self.leave(session)
        self._parked[session] = waiting
        if not waiting.is_for_persons:
            self._at_work_elsewhere.add(session)
        if waiting.until_ms is not None:
            self._tickets += 1
            heapq.heappush(self._due, (waiting.until_ms, self._tickets, session))

    def leave(self, session: str) -> bool:
        """Count a session as parked no longer; False if it was not."""
        self._at_work_elsewhere.discard(session)
        return self._parked.pop(session, None) is not None

    def is_work(self, session: str | None) -> bool:
        """Whether a parked session, or any at all, waits for more than persons."""
        if session is None:
            return bool(self._at_work_elsewhere)
        return session in self._at_work_elsewhere

    def hear(self, session: str, revision: int) -> None:
        """Note that something was answered or decided for a session that is at work."""
        self._heard[session] = max(revision, self._heard.get(session, 0))

    def has_heard(self, session: str, since: int) -> bool:
        """Whether something was noted for a session after the revision `since`."""
        return self._heard.get(session, 0) > since

    def forget(self, session: str) -> None:
        """Forget what was heard for a session whose run is over."""
        self._heard.pop(session, None)

    def due(self, now_ms: int) -> list[str]:
        """Return the parked sessions that must be looked at now."""
        found: list[str] = []
        while self._due and self._due[0][0] <= now_ms:
            until_ms, _, session = heapq.heappop(self._due)
            waiting = self._parked.get(session)
            if waiting is not None and waiting.until_ms == until_ms:
                found.append(session)
        return found

    def next_due_ms(self) -> int | None:
        """Return when the next session may have to be looked at, None if none has to."""
        return self._due[0][0] if self._due else None
