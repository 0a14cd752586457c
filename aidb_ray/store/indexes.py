"""Rows that pass a filter over many sessions, kept at hand for filters that come again. Pure.

A scan of all sessions for the few rows that are pending is slow; who asks once will ask again
when it restarts. So a filter that was scanned for twice gets an index of the rows that pass it.
It holds the rows themselves: a session may leave memory while a pending row of it stays at hand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from sortedcontainers import SortedDict

from aidb_ray.store.changes import Filter, FoundRow, StoredRow
from aidb_ray.store.matching import make_row_test
from aidb_ray.store.tables import Entry

MAX_INDEXES = 8
MAX_INDEX_BYTES = 32 << 20
_REMEMBERED_SCANS = 64
_ROW_WEIGHT = 300

Place: TypeAlias = tuple[str, str]
"""(session, key)"""


class PartialIndex:
    """The rows that pass one filter, in order of (session, key).

    Attributes:
        is_complete: Whether it holds all of them; until then it may not be read.
        is_too_large: Whether it was given up, because the rows weigh over 32 MiB.
    """

    def __init__(self, wanted: Filter) -> None:
        self.wanted = wanted
        self.is_complete = False
        self.is_too_large = False
        self._test = make_row_test(wanted)
        self._rows: SortedDict[Place, StoredRow] = SortedDict()
        # What changed since the index was begun; a row that a scan brings is older than that.
        self._changed: set[Place] = set()
        self._weight = 0

    def hear(self, entry: Entry) -> None:
        """Take in a change of the collection."""
        home = entry.home
        if not self.wanted.covers(home.name, home.bucket):
            return
        place = (home.name, entry.key)
        after = entry.after
        if not self.is_complete:
            self._changed.add(place)
        if after is not None and (self._test is None or self._test.accepts(after.value)):
            self._put(place, after)
        else:
            self._remove(place)

    def fill(self, rows: Iterable[FoundRow]) -> None:
        """Add rows that a scan found, which began after the index was."""
        for row in rows:
            place = (row.session, row.key)
            if place not in self._changed:
                self._put(place, StoredRow(row.revision, row.value))

    def complete(self) -> None:
        """Say that the scan has brought every row."""
        self.is_complete = True
        self._changed = set()

    def rows_after(self, after: Place | None) -> Iterator[FoundRow]:
        """Yield the rows behind `after`; not to be used across a change."""
        places = self._rows.irange(after, inclusive=(False, True))
        for place in places:
            row = self._rows[place]
            yield FoundRow(*place, row.revision, row.value)

    def _put(self, place: Place, row: StoredRow) -> None:
        if self.is_too_large:
            return
        self._remove(place)
        self._rows[place] = row
        self._weight += len(row.value) + _ROW_WEIGHT
        if self._weight > MAX_INDEX_BYTES:
            self.is_too_large = True
            self._rows.clear()
            self._changed = set()

    def _remove(self, place: Place) -> None:
        before = self._rows.pop(place, None)
        if before is not None:
            self._weight -= len(before.value) + _ROW_WEIGHT


class Indexes:
    """The partial indexes of a store: at most 8, those used latest."""

    def __init__(self) -> None:
        self._indexes: OrderedDict[Filter, PartialIndex] = OrderedDict()
        self._by_collection: dict[str, list[PartialIndex]] = {}
        self._scanned: OrderedDict[Filter, None] = OrderedDict()

    def hear(self, entries: Sequence[Entry]) -> None:
        """Take in the changes of a flush."""
        by_collection = self._by_collection
        if not by_collection:
            return
        for entry in entries:
            for index in by_collection.get(entry.collection, ()):
                index.hear(entry)

    def find(self, wanted: Filter) -> PartialIndex | None:
        """Return the index of a filter, if there is one that can be read."""
        index = self._indexes.get(wanted)
        if index is None:
            return None
        self._indexes.move_to_end(wanted)
        return index if index.is_complete and not index.is_too_large else None

    def begin(self, wanted: Filter) -> PartialIndex | None:
        """Note a scan for this filter; return an index to be filled by it, if it is worth one."""
        if not wanted.where or wanted in self._indexes:
            return None
        if wanted not in self._scanned:
            self._scanned[wanted] = None
            if len(self._scanned) > _REMEMBERED_SCANS:
                self._scanned.popitem(last=False)
            return None
        del self._scanned[wanted]
        index = self._indexes[wanted] = PartialIndex(wanted)
        self._by_collection.setdefault(wanted.collection, []).append(index)
        if len(self._indexes) > MAX_INDEXES:
            self.drop(next(iter(self._indexes.values())))
        return index

    def drop(self, index: PartialIndex) -> None:
        """Forget an index."""
        if self._indexes.pop(index.wanted, None) is None:
            return
        others = self._by_collection[index.wanted.collection]
        others.remove(index)
        if not others:
            del self._by_collection[index.wanted.collection]
