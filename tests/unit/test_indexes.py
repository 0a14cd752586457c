from __future__ import annotations

import pytest

from aidb_ray.store import indexes
from aidb_ray.store.changes import Filter, FoundRow, StoredRow
from aidb_ray.store.indexes import MAX_INDEXES, Indexes, PartialIndex
from aidb_ray.store.tables import Entry, SessionRows

OPEN = Filter("rows", where=(("done", (False,)),))
HOME = SessionRows("aidb://a")


def change(key: str, value: bytes | None, revision: int = 5) -> Entry:
    after = None if value is None else StoredRow(revision, value)
    return Entry(revision, HOME, "rows", key, None, after)


def keys(index: PartialIndex, after: tuple[str, str] | None = None) -> list[str]:
    return [row.key for row in index.rows_after(after)]


def made(all_indexes: Indexes, wanted: Filter) -> PartialIndex:
    assert all_indexes.begin(wanted) is None
    index = all_indexes.begin(wanted)
    assert index is not None
    return index


def test_a_filter_is_worth_an_index_when_it_is_scanned_for_again() -> None:
    some = Indexes()

    assert some.begin(OPEN) is None
    assert some.begin(OPEN) is not None
    assert some.begin(Filter("rows")) is None
    assert some.begin(Filter("rows")) is None, "every row passes: that is no index"


def test_an_index_can_be_read_only_once_it_is_complete() -> None:
    some = Indexes()
    index = made(some, OPEN)

    assert some.find(OPEN) is None
    index.complete()
    assert some.find(OPEN) is index


def test_an_index_follows_changes_in_order_of_place() -> None:
    some = Indexes()
    index = made(some, OPEN)
    index.complete()

    some.hear([change("b", b'{"done":false}'), change("a", b'{"done":false}')])
    some.hear([change("c", b'{"done":true}'), change("d", b'{"done":false}')])
    assert keys(index) == ["a", "b", "d"]
    assert keys(index, ("aidb://a", "a")) == ["b", "d"]

    some.hear([change("b", b'{"done":true}'), change("d", None)])
    assert keys(index) == ["a"]


def test_a_change_during_the_scan_counts_more_than_what_the_scan_brings() -> None:
    some = Indexes()
    index = made(some, OPEN)

    some.hear([change("a", b'{"done":true}'), change("b", b'{"done":false,"n":2}')])
    index.fill([FoundRow("aidb://a", key, 1, b'{"done":false}') for key in "abc"])
    index.complete()

    found = {row.key: row.value for row in index.rows_after(None)}
    assert found == {"b": b'{"done":false,"n":2}', "c": b'{"done":false}'}


def test_an_index_that_grows_too_large_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MAX_INDEX_BYTES", 2_000)
    some = Indexes()
    index = made(some, OPEN)
    index.complete()

    for at in range(20):
        some.hear([change(str(at), b'{"done":false}')])

    assert index.is_too_large
    assert keys(index) == []
    assert some.find(OPEN) is None
    assert some.begin(OPEN) is None, "nobody tries again"


def test_the_indexes_used_latest_are_kept() -> None:
    some = Indexes()
    wanted = [Filter(f"rows{n}", where=(("done", (False,)),)) for n in range(MAX_INDEXES + 1)]
    for each in wanted[:-1]:
        made(some, each).complete()
    assert some.find(wanted[0]) is not None

    made(some, wanted[-1]).complete()

    assert some.find(wanted[0]) is not None
    assert some.find(wanted[1]) is None
