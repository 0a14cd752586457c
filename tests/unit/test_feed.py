from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.store.changes import (
    Append,
    Change,
    ChunkSlice,
    Filter,
    StoredRow,
    bucket_of,
    decode_slice,
)
from aidb_ray.store.columns import pack
from aidb_ray.store.feed import MAX_SCANNED, Feed, Interest, News
from aidb_ray.store.tables import Appended, Entry, SessionRows

SESSIONS = {name: SessionRows(name) for name in ("aidb://a/1", "aidb://a/2", "aidb://b/1", "")}
EVERYTHING = Interest([Filter("rows"), Filter("notes")])


def entry(
    revision: int,
    key: str,
    after: Any,
    before: Any = None,
    *,
    session: str = "aidb://a/1",
    collection: str = "rows",
) -> Entry:
    def stored(fields: Any) -> StoredRow | None:
        return None if fields is None else StoredRow(revision, msgspec.json.encode(fields))

    return Entry(revision, SESSIONS[session], collection, key, stored(before), stored(after))


fields = st.none() | st.fixed_dictionaries(
    {"n": st.integers(0, 2), "s": st.sampled_from(["x", "y"])}
)
filters = st.builds(
    Filter,
    st.sampled_from(["rows", "notes"]),
    session=st.none() | st.sampled_from(list(SESSIONS)),
    prefix=st.sampled_from(["", "aidb://a/"]),
    buckets=st.none() | st.sampled_from([(0, 2048), (2048, 4096)]),
    where=st.sampled_from([(), (("n", (1,)),), (("s", ("x",)),), (("n", (0, 2)), ("s", ("y",)))]),
)
changes = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from(list(SESSIONS)),
        st.sampled_from(["rows", "notes"]),
        fields,
        fields,
    ),
    max_size=25,
)


def make_entries(drawn: list[tuple[int, str, str, Any, Any]]) -> list[Entry]:
    revision = 0
    made: list[Entry] = []
    for step, session, collection, before, after in drawn:
        revision += step - 1 or 1 if not made else step - 1
        made.append(
            entry(revision, f"k{len(made)}", after, before, session=session, collection=collection)
        )
    return made


def is_wanted(wanted: Filter, one: Entry) -> bool:
    name = one.home.name
    if wanted.collection != one.collection or not wanted.covers(name, bucket_of(name)):
        return False
    sides = [one.before, one.after]
    return not wanted.where or any(
        side is not None and wanted.accepts(msgspec.json.decode(side.value)) for side in sides
    )


@given(changes, st.lists(filters, max_size=4), st.integers(0, 12), st.integers(0, 400))
def test_what_a_reader_is_told_page_by_page_is_what_filtering_all_changes_gives(
    drawn: list[tuple[int, str, str, Any, Any]], wanted: list[Filter], after: int, max_bytes: int
) -> None:
    """Oracle: every filter is tried on every change."""
    entries = make_entries(drawn)
    feed = Feed(0)
    feed.extend(entries, entries[-1].revision if entries else 0)
    interest = Interest(wanted)

    told: list[Change] = []
    cursor = min(after, feed.latest)
    begin = cursor
    while cursor < feed.latest:
        assert feed.has_news(interest, cursor) or not feed.collect(interest, cursor, 1 << 20)[1]
        through, page = feed.collect(interest, cursor, max_bytes)
        assert through > cursor
        assert all(cursor < change.revision <= through for change in page)
        told += page
        cursor = through

    expected = [
        one.to_change()
        for one in entries
        if one.revision > begin and any(is_wanted(each, one) for each in wanted)
    ]
    assert told == expected


@given(changes, st.lists(filters, max_size=4))
def test_news_concern_a_reader_exactly_if_it_wants_a_change(
    drawn: list[tuple[int, str, str, Any, Any]], wanted: list[Filter]
) -> None:
    entries = make_entries(drawn)

    concerned = News(entries).concerns(Interest(wanted))

    assert concerned == any(is_wanted(each, one) for each in wanted for one in entries)


def test_a_row_that_stops_passing_is_told_to_who_saw_it_pass() -> None:
    feed = Feed(0)
    feed.extend([entry(1, "a", {"done": True}, {"done": False})], 1)

    interest = Interest([Filter("rows", where=(("done", (False,)),))])

    assert feed.has_news(interest, 0)
    assert [change.key for change in feed.collect(interest, 0, 1 << 20)[1]] == ["a"]


def test_a_commit_is_never_split_over_pages() -> None:
    feed = Feed(0)
    feed.extend([entry(1, f"a{n}", {"n": n}) for n in range(50)] + [entry(2, "b", {"n": 1})], 2)

    through, page = feed.collect(EVERYTHING, 0, max_bytes=1)

    assert through == 1
    assert len(page) == 50


def test_the_oldest_commits_make_room_whole_and_a_cursor_before_them_is_too_old() -> None:
    feed = Feed(0, max_bytes=2_000)

    for revision in range(1, 50):
        feed.extend([entry(revision, key, {"n": 1}) for key in "ab"], revision)

    assert 0 < feed.oldest < 49
    _, page = feed.collect(EVERYTHING, feed.oldest, 1 << 20)
    assert page[0].revision == feed.oldest + 1
    assert len(page) == 2 * (49 - feed.oldest)


def test_a_reader_far_behind_is_served_in_slices() -> None:
    feed = Feed(0)
    last = MAX_SCANNED + 10
    feed.extend([entry(n, "a", {"n": 1}) for n in range(1, last + 1)], last)
    nothing = Interest([Filter("other")])

    assert feed.has_news(nothing, 0)
    first, _ = feed.collect(nothing, 0, 1 << 20)
    second, _ = feed.collect(nothing, first, 1 << 20)

    assert first < last
    assert second == last


def test_chunks_are_told_as_the_slice_that_was_appended_of_the_generations_asked_for() -> None:
    feed = Feed(0)
    columns = pack([1, 2, 3], ["x", "y", "z"])
    append = Appended(Append("aidb://a/1", "g", 2, 5, 1, 2, closes="finished"), columns, 1)
    feed.extend([Entry(1, SESSIONS["aidb://a/1"], "chunks", "g", None, None, append)], 1)

    def told(generation: str) -> list[Change]:
        wanted = Filter("chunks", "aidb://a/1", where=(("generationId", (generation,)),))
        return feed.collect(Interest([wanted]), 0, 1 << 20)[1]

    assert told("other") == []
    (change,) = told("g")
    assert change.value is not None
    assert decode_slice(change.value) == ChunkSlice(
        "g", 2, 5, pack([2, 3], ["y", "z"]), (), "finished"
    )
