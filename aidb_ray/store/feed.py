"""Recent changes of one partition, and which of them a reader asked for.

A reader keeps a cursor (a revision) and asks for what came after it, so nothing is held per
reader and a slow one costs no memory. No I/O, no clock, no asyncio, no Ray.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import msgspec

from aidb_ray.store.changes import CHUNKS, Change, Filter
from aidb_ray.store.tables import Entry

TAILING_BYTES = 64 << 10
CATCHING_UP_BYTES = 4 << 20
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Interest:
    """The filters of one reader, arranged so that a change meets only those that may want it."""

    __slots__ = ("_by_session", "_general", "filters")

    def __init__(self, filters: Sequence[Filter]) -> None:
        self.filters = tuple(filters)
        self._by_session: dict[tuple[str, str], list[Filter]] = {}
        self._general: dict[str, list[Filter]] = {}
        for wanted in filters:
            if wanted.session is None:
                self._general.setdefault(wanted.collection, []).append(wanted)
            else:
                place = (wanted.collection, wanted.session)
                self._by_session.setdefault(place, []).append(wanted)

    def wants(self, entry: Entry) -> bool:
        """Whether a filter accepts the row as it is or as it was before."""
        general = self._general.get(entry.collection)
        if general is not None:
            for wanted in general:
                if wanted.covers(entry.session, entry.bucket) and _passes(wanted, entry):
                    return True
        if self._by_session:
            for wanted in self._by_session.get((entry.collection, entry.session), ()):
                if _passes(wanted, entry):
                    return True
        return False


def _passes(wanted: Filter, entry: Entry) -> bool:
    if not wanted.where:
        return True
    if entry.collection == CHUNKS:
        return wanted.accepts({"generationId": entry.key})
    if entry.fields is None:
        before, after = entry.before, entry.after
        entry.fields = (
            None if before is None else _decode(before.value),
            None if after is None else _decode(after.value),
        )
    before_fields, after_fields = entry.fields
    return (after_fields is not None and wanted.accepts(after_fields)) or (
        before_fields is not None and wanted.accepts(before_fields)
    )


class Feed:
    """The newest changes, up to `max_bytes` of them, in the order of their commits.

    Attributes:
        oldest: Smallest cursor that can still be served.
        latest: Revision of the newest commit.
    """

    def __init__(self, revision: int, *, max_bytes: int = 64 << 20) -> None:
        self.oldest = revision
        self.latest = revision
        self._max_bytes = max_bytes
        self._entries: list[Entry] = []
        self._revisions: list[int] = []
        self._first = 0
        self._bytes = 0

    def extend(self, entries: Sequence[Entry], revision: int) -> None:
        """Add the changes of newly durable commits; the oldest make room."""
        for entry in entries:
            self._entries.append(entry)
            self._revisions.append(entry.revision)
            self._bytes += _weight(entry)
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
        """Whether a change after the cursor `after` is wanted."""
        start = bisect_right(self._revisions, after, self._first)
        return any(interest.wants(entry) for entry in self._entries[start:])

    def collect(self, interest: Interest, after: int, max_bytes: int) -> tuple[int, list[Change]]:
        """Return a new cursor and the wanted changes between `after` and it, in order.

        A commit is never split, so one larger than `max_bytes` comes whole.
        """
        assert after >= self.oldest, (after, self.oldest)
        found: list[Change] = []
        size = 0
        entries, revisions = self._entries, self._revisions
        index = bisect_right(revisions, after, self._first)
        total = len(entries)
        while index < total:
            entry = entries[index]
            if size > max_bytes and entry.revision != revisions[index - 1]:
                return revisions[index - 1], found
            if interest.wants(entry):
                change = entry.to_change()
                size += 64 + (len(change.value) if change.value else 0)
                found.append(change)
            index += 1
        return self.latest, found


def _weight(entry: Entry) -> int:
    size = 200
    if entry.after is not None:
        size += len(entry.after.value)
    if entry.before is not None:
        size += len(entry.before.value)
    if entry.append is not None:
        size += 32 * entry.append.wanted.count
    return size
