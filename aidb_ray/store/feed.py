"""Recent changes of one partition, and which of them a reader asked for.

A reader keeps a cursor (a revision) and asks for what came after it, so nothing is held per
reader and a slow one costs no memory. No I/O, no clock, no asyncio, no Ray.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from aidb_ray.store.changes import CHUNKS, Change, Filter
from aidb_ray.store.matching import RowTest, make_row_test
from aidb_ray.store.tables import Entry

TAILING_BYTES = 64 << 10
CATCHING_UP_BYTES = 4 << 20
MAX_FEED_BYTES = 64 << 20
MAX_SCANNED = 20_000
"""Changes looked at for one reader in one go, so that others get their turn."""


class _Wish:
    """One filter of a reader, ready to be tried on changes."""

    __slots__ = ("test", "wanted")

    def __init__(self, wanted: Filter) -> None:
        self.wanted = wanted
        self.test: RowTest | None = make_row_test(wanted)

    def covers(self, entry: Entry) -> bool:
        return self.wanted.covers(entry.home.name, entry.home.bucket)

    def accepts(self, entry: Entry) -> bool:
        """Whether the row passes as it is, or may have as it was: its reader must hear of it."""
        test = self.test
        if test is None or entry.is_blind:
            return True
        if entry.collection == CHUNKS:
            return self.wanted.accepts({"generationId": entry.key})
        after, before = entry.after, entry.before
        return (after is not None and test.accepts(after.value)) or (
            before is not None and test.accepts(before.value)
        )


class Interest:
    """The filters of one reader, arranged so that a change meets only those that may want it.

    Attributes:
        general: Filters of many sessions, by collection.
        by_session: Filters of one session, by (collection, session).
    """

    __slots__ = ("by_session", "filters", "general")

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = tuple(filters)
        self.by_session: dict[tuple[str, str], list[_Wish]] = {}
        self.general: dict[str, list[_Wish]] = {}
        for wanted in filters:
            wish = _Wish(wanted)
            if wanted.session is None:
                self.general.setdefault(wanted.collection, []).append(wish)
            else:
                place = (wanted.collection, wanted.session)
                self.by_session.setdefault(place, []).append(wish)

    def wants(self, entry: Entry) -> bool:
        """Whether a filter accepts the row as it is or as it was before."""
        for wish in self.general.get(entry.collection, ()):
            if wish.covers(entry) and wish.accepts(entry):
                return True
        if self.by_session:
            for wish in self.by_session.get((entry.collection, entry.home.name), ()):
                if wish.accepts(entry):
                    return True
        return False


class News:
    """The changes of one flush, for many readers: each distinct filter is tried once."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._by_collection: dict[str, list[Entry]] = {}
        self._by_place: dict[tuple[str, str], list[Entry]] = {}
        self._known: dict[Filter, bool] = {}
        for entry in entries:
            collection = entry.collection
            self._by_collection.setdefault(collection, []).append(entry)
            self._by_place.setdefault((collection, entry.home.name), []).append(entry)

    def concerns(self, interest: Interest) -> bool:
        """Whether there is a change that the reader asked for."""
        for collection, wishes in interest.general.items():
            entries = self._by_collection.get(collection)
            if entries and any(self._has(wish, entries) for wish in wishes):
                return True
        by_session = interest.by_session
        if by_session and not self._by_place.keys().isdisjoint(by_session):
            for place in self._by_place.keys() & by_session.keys():
                entries = self._by_place[place]
                if any(self._has(wish, entries) for wish in by_session[place]):
                    return True
        return False

    def _has(self, wish: _Wish, entries: Sequence[Entry]) -> bool:
        known = self._known.get(wish.wanted)
        if known is None:
            known = any(wish.covers(entry) and wish.accepts(entry) for entry in entries)
            self._known[wish.wanted] = known
        return known


class Feed:
    """The newest changes, up to `max_bytes` of them, in the order of their commits.

    Attributes:
        oldest: Smallest cursor that can still be served.
        latest: Revision of the newest commit.
    """

    def __init__(self, revision: int, *, max_bytes: int = MAX_FEED_BYTES) -> None:
        self.oldest = revision
        self.latest = revision
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._revisions: list[int] = []
        self._first = 0
        self._bytes = 0

    def extend(self, entries: Sequence[Entry], revision: int) -> None:
        """Add the changes of newly durable commits; the oldest make room."""
        self._entries.extend(entries)
        self._revisions.extend([entry.revision for entry in entries])
        self._bytes += sum(map(_weight, entries))
        self.latest = revision
        while self._bytes > self._max_bytes and self._first < len(self._entries):
            # Whole commits only: a cursor lies between two commits.
            gone = self._revisions[self._first]
            while self._first < len(self._entries) and self._revisions[self._first] == gone:
                self._bytes -= _weight(self._entries[self._first])
                self._first += 1
            self.oldest = gone
        if self._first > len(self._entries) // 2:
            del self._entries[: self._first]
            del self._revisions[: self._first]
            self._first = 0

    def has_news(self, interest: Interest, after: int) -> bool:
        """Whether a change after the cursor `after` is wanted; also if that takes long to say."""
        start = bisect_right(self._revisions, after, self._first)
        if len(self._entries) - start > MAX_SCANNED:
            return True
        return any(interest.wants(entry) for entry in self._entries[start:])

    def collect(self, interest: Interest, after: int, max_bytes: int) -> tuple[int, list[Change]]:
        """Return a new cursor and the wanted changes between `after` and it, in order.

        A commit is never split, so one larger than `max_bytes` comes whole.
        """
        assert after >= self.oldest, (after, self.oldest)
        found: list[Change] = []
        size = 0
        entries, revisions = self._entries, self._revisions
        start = bisect_right(revisions, after, self._first)
        for index in range(start, len(entries)):
            entry = entries[index]
            is_enough = size > max_bytes or index - start >= MAX_SCANNED
            if is_enough and entry.revision != revisions[index - 1]:
                return revisions[index - 1], found
            if interest.wants(entry):
                change = entry.to_change()
                size += 64 + (len(change.value) if change.value else 0)
                found.append(change)
        return self.latest, found


def _weight(entry: Entry) -> int:
    size = 300
    if entry.after is not None:
        size += len(entry.after.value)
    if entry.before is not None:
        size += len(entry.before.value)
    if entry.append is not None:
        # All appends of a batch hold on to its columns; each counts for its own part.
        size += 32 * entry.append.wanted.count
    return size
