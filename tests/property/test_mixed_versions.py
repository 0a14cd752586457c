"""A live query over rows of several versions equals the same query over rows that are all of one.

Random programs write each row under a version of its own. The oracle is the query over the same
rows, written under the newest version from the start, without a migration anywhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from aidb_ray.database import connect
from aidb_ray.expressions import SourceRef, eq, gt
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.query.live import to_changes
from aidb_ray.query.operators import Pipeline
from aidb_ray.store.changes import StoredRow
from aidb_ray.store.collection import Collection
from aidb_ray.store.local import RowEvent
from aidb_ray.store.versions import stamp
from tests.property.deltas import fold
from tests.property.nested_loops import tag
from tests.property.questions import FIELDS, Key, Row, queries, rows

NEWEST = 3
TOO_NEW = 4


def old(row: Row, version: int) -> Row:
    """Return a row as an earlier version stored it; `migrate` undoes it."""
    fields = {name: value for name, value in row.items() if name != "id"}
    if version == 1:
        return {"body": fields, "id": row["id"]}
    return {"id": row["id"], **{f"{name}Two": value for name, value in fields.items()}}


def migrate(fields: Row, version: int) -> Row:
    if version == 1:
        return {"id": fields["id"], **fields["body"]}
    return {name.removesuffix("Two"): value for name, value in fields.items()}


PLAIN: SourceRef[Row] = SourceRef("messages", "aidb://support/1", FIELDS)
MIXED: SourceRef[Row] = SourceRef(
    "messages", "aidb://support/1", FIELDS, version=NEWEST, migrate=migrate
)

keys = st.tuples(st.sampled_from(["aidb://a/1", "aidb://a/2"]), st.sampled_from("abcdef"))
written = st.tuples(rows, st.booleans(), st.sampled_from([1, 1, 2, 2, NEWEST, NEWEST, TOO_NEW]))
Written = tuple[Row, bool, int]
commits: st.SearchStrategy[list[dict[Key, Written | None]]] = st.lists(
    st.dictionaries(keys, st.one_of(written, written, written, st.none()), min_size=3, max_size=8),
    min_size=2,
    max_size=6,
)


def store(row: Row, version: int) -> bytes:
    return stamp(msgspec.json.encode(row if version >= NEWEST else old(row, version)), version)


@settings(max_examples=200, deadline=None)
@given(queries(), commits)
def test_a_live_query_over_mixed_versions_equals_one_over_migrated_rows(
    query: Query[Any], program: list[dict[Key, Written | None]]
) -> None:
    mixed, plain = Pipeline(query), Pipeline(query)
    folded: dict[Any, Any] = {}
    for revision, commit in enumerate(program, 1):
        stored: list[RowEvent] = []
        newest: list[RowEvent] = []
        for key, change in commit.items():
            row, synced, version = change or ({}, True, 0)
            row = {**row, "id": key[1]}
            kept = StoredRow(revision, store(row, version)) if version else None
            shown = StoredRow(revision, msgspec.json.encode(row))
            stored.append(RowEvent(*key, kept, synced))
            newest.append(RowEvent(*key, shown if 0 < version <= NEWEST else None, synced))

        deltas = mixed.advance(to_changes(["m"], MIXED, stored))
        plain.advance(to_changes(["m"], PLAIN, newest))

        assert list(map(tag, mixed.rows)) == list(map(tag, plain.rows))
        fold(folded, deltas)
        assert Counter(map(tag, folded.values())) == Counter(map(tag, plain.rows))


class One(BaseModel):
    id: str
    open: str
    body: dict[str, int]


class Two(BaseModel):
    id: str
    is_open: bool
    n: int


class Three(BaseModel):
    id: str
    state: str
    n: int


def to_two(fields: Row, version: int) -> Row:
    del version
    return {"id": fields["id"], "is_open": fields["open"] == "yes", "n": fields["body"]["n"]}


def to_three(fields: Row, version: int) -> Row:
    if version == 1:
        fields = to_two(fields, version)
    state = "open" if fields.pop("is_open") else "closed"
    return {**fields, "state": state}


def as_version(version: int, key: str, n: int, *, is_open: bool) -> Row:
    match version:
        case 1:
            return {"id": key, "open": "yes" if is_open else "no", "body": {"n": n}}
        case 2:
            return {"id": key, "is_open": is_open, "n": n}
        case _:
            return {"id": key, "state": "open" if is_open else "closed", "n": n}


Step = tuple[str, int, int, bool]
"""(key, version, n, is it open?)"""
steps: st.SearchStrategy[list[Step | str]] = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 3), st.integers(0, 3), st.booleans()),
        st.sampled_from("abcd"),
    ),
    min_size=1,
    max_size=12,
)


Question = Callable[[QueryRoot], Query[Three]]


def open_rows(source: Collection[Three]) -> Question:
    def question(q: QueryRoot) -> Query[Three]:
        rows = q.from_(r=source).where(lambda r: eq(r.state, "open"))
        return rows.order_by(lambda r: r.n, "desc").limit(2)

    return question


def large_rows(source: Collection[Three]) -> Question:
    return lambda q: q.from_(r=source).where(lambda r: gt(r.n, 1))


async def follow(program: list[Step | str]) -> None:
    """Write rows as (key, version, n, is_open), a key alone deletes; compare after each."""
    async with connect("local", durability="memory") as db:
        writers: dict[int, Collection[Any]] = {
            1: db.collection("mixed", One),
            2: db.collection("mixed", Two, version=2, migrate=to_two),
            3: db.collection("mixed", Three, version=3, migrate=to_three),
        }
        plain = db.collection("plain", Three)

        questions = [(ask(writers[3]), ask(plain)) for ask in (open_rows, large_rows)]
        lives = [(db.live_query(mixed), db.live_query(expected)) for mixed, expected in questions]
        known: dict[str, int] = {}
        for step in program:
            if isinstance(step, str):
                if known.pop(step, 0):
                    await writers[1].delete(step)
                    await plain.delete(step)
            else:
                key, version, n, is_open = step
                # A row that a newer version wrote is not for older writers.
                version = known[key] = max(version, known.get(key, 0))
                row = as_version(version, key, n, is_open=is_open)
                await _put(writers[version], row)
                await _put(plain, as_version(3, key, n, is_open=is_open))
            for (mixed, expected), (question, _) in zip(lives, questions, strict=True):
                await mixed.ready()
                await expected.ready()
                assert mixed.rows == expected.rows == await db.query(question)
        rows = writers[3]
        await rows.ready()
        await plain.ready()
        assert rows.values() == plain.values()
        for pair in lives:
            for live in pair:
                await live.aclose()


async def _put(rows: Collection[Any], row: Row) -> None:
    if await rows.find(row["id"]) is None:
        await rows.insert(row)
    else:
        await rows.update(row["id"], row)


@settings(max_examples=25, deadline=None)
@given(steps)
def test_collections_of_mixed_versions_answer_as_if_all_were_migrated(
    program: list[Step | str],
) -> None:
    asyncio.run(follow(program))
