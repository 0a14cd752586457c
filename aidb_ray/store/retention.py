"""How long rows are kept, and when revisions were written. Pure.

Rows bear revisions and no times. So now and then, while anything is kept for a while only, it is
noted which revision was the newest at that time; what is not newer was written before.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import itemgetter
from typing import Final, NamedTuple

LEAST_KEPT_MS: Final = 1_000
_LEAST_PAUSE_MS: Final = 1_000
_LONGEST_PAUSE_MS: Final = 60_000
_LONGEST_SWEEP_PAUSE_MS: Final = 3_600_000
_SHARE: Final = 16
"""Rows are removed at most about this part of the time that they are kept late."""

_revision, _at = itemgetter(0), itemgetter(1)


class Victim(NamedTuple):
    """A row, or a stream of the collection `chunks`, to go if it is as `revision` left it."""

    session: str
    collection: str
    key: str
    revision: int


class Retention:
    """What is kept how long, and when some revisions were the newest."""

    def __init__(self) -> None:
        self.policies: dict[tuple[str, str], int] = {}
        # (revision, time): everything up to the revision was written by then. Both ascend.
        self.marks: list[tuple[int, int]] = []

    def put_policy(self, collection: str, session: str, keep_ms: int | None) -> None:
        """Keep a collection's rows so long; `session` may be a pattern ending in `*`."""
        if keep_ms is None:
            self.policies.pop((collection, session), None)
        else:
            self.policies[collection, session] = keep_ms

    def put_mark(self, revision: int, at_ms: int | None) -> None:
        """Note when a revision was the newest, or forget it."""
        at = bisect_left(self.marks, revision, key=_revision)
        if at < len(self.marks) and self.marks[at][0] == revision:
            del self.marks[at]
        if at_ms is not None:
            self.marks.insert(at, (revision, at_ms))

    def now_ms(self, clock_ms: int) -> int:
        """Return the time, which never goes back."""
        return max(clock_ms, self.marks[-1][1]) if self.marks else clock_ms

    @property
    def pause_ms(self) -> int:
        """How long to wait between two looks."""
        shortest = min(self.policies.values(), default=_LONGEST_PAUSE_MS)
        return min(max(shortest // _SHARE, _LEAST_PAUSE_MS), _LONGEST_PAUSE_MS)

    def sweep_pause_ms(self, keep_ms: int) -> int:
        """How long to wait between two searches for rows that are kept so long."""
        return min(max(keep_ms // _SHARE, self.pause_ms), _LONGEST_SWEEP_PAUSE_MS)

    def new_marks(self, revision: int, now_ms: int) -> Iterator[tuple[int, int | None]]:
        """Yield the marks to add and, without a time, to forget, now that `revision` is newest."""
        if not self.policies:
            yield from ((at, None) for at, _ in self.marks)
            return
        last, last_at = self.marks[-1] if self.marks else (-1, -_LONGEST_PAUSE_MS)
        if revision <= last or now_ms - last_at < self.pause_ms:
            return
        yield revision, now_ms
        yield from ((at, None) for at in self._superfluous(now_ms))

    def _superfluous(self, now_ms: int) -> Iterator[int]:
        """Yield marks that tell little: far from now they may lie far apart."""
        longest = max(self.policies.values())
        kept_at = None
        for index, (revision, at) in enumerate(self.marks):
            following = self.marks[index + 1][1] if index + 1 < len(self.marks) else now_ms
            is_over = following <= now_ms - longest
            near = max(self.pause_ms, (now_ms - at) // (4 * _SHARE))
            if is_over or (kept_at is not None and following - kept_at <= near):
                yield revision
            else:
                kept_at = at

    def last_expired(self, keep_ms: int, now_ms: int) -> int:
        """Return the last revision that is known to be older than `keep_ms`, 0 if none is."""
        at = bisect_right(self.marks, now_ms - keep_ms, key=_at)
        return self.marks[at - 1][0] if at else 0

    def is_governed_by(self, collection: str, session: str, pattern: str) -> bool:
        """Whether of all patterns this one says how long rows of a session are kept."""
        matching = [
            each for name, each in self.policies if name == collection and _matches(each, session)
        ]
        # The session itself comes before patterns, and longer patterns before shorter ones.
        return pattern == max(matching, key=lambda each: (not each.endswith("*"), len(each)))


def _matches(pattern: str, session: str) -> bool:
    return session.startswith(pattern[:-1]) if pattern.endswith("*") else session == pattern
