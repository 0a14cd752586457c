"""Queries over several sources: what their rows, deltas and keys are."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray.expressions import (
    Field,
    SourceRef,
    count,
    eq,
    gt,
    is_null,
    is_undefined,
    max_,
    sum_,
    synced,
)
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.query.operators import Delta, Pipeline, RowChange

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A collection without a schema."""

    name: str

    def as_source(self) -> SourceRef[Row]:
        return SourceRef(self.name)


TASKS, USERS = Rows("tasks"), Rows("users")
q: QueryRoot = QueryRoot()


def tasks_and_users(join_type: Any) -> Query[Row]:
    return q.from_(t=TASKS).join(u=USERS, on=lambda t, u: eq(t.by, u.id), join_type=join_type)


def changes(alias: str, revision: int = 1, **rows: Row | None) -> list[RowChange]:
    return [RowChange(alias, key, row, revision) for key, row in rows.items()]


def brief(deltas: Iterable[Delta[Any]]) -> list[tuple[str, Any]]:
    return [(delta.op, delta.key) for delta in deltas]


def filled(query: Query[Any]) -> Pipeline[Any]:
    pipeline = Pipeline(query)
    pipeline.advance(
        [
            *changes("t", t1={"by": 1, "n": 1}, t2={"by": 1, "n": 2}, t3={"by": None, "n": 3}),
            *changes("u", ann={"id": 1}, bob={"id": 2}, nil={"id": None}),
        ]
    )
    return pipeline


PAIRS = [("t1", "ann"), ("t2", "ann")]


@pytest.mark.parametrize(
    ("join_type", "keys"),
    [
        ("inner", PAIRS),
        ("left", [*PAIRS, ("t3", None)]),
        ("right", [(None, "bob"), (None, "nil"), *PAIRS]),
        ("full", [(None, "bob"), (None, "nil"), *PAIRS, ("t3", None)]),
    ],
)
def test_rows_without_a_partner_stay_as_the_join_says_and_nulls_are_nobodys(
    join_type: str, keys: list[Any]
) -> None:
    pipeline = filled(tasks_and_users(join_type))

    assert [delta.key for delta in pipeline.enters()] == keys


def test_a_row_of_a_join_is_its_rows_by_alias() -> None:
    pipeline = filled(tasks_and_users("full").where(lambda t, u: is_undefined(t) | eq(t.n, 3)))

    assert pipeline.rows == [
        {"t": None, "u": {"id": 2}},
        {"t": None, "u": {"id": None}},
        {"t": {"by": None, "n": 3}, "u": None},
    ]


def test_partners_come_and_go() -> None:
    pipeline = filled(tasks_and_users("left"))

    assert brief(pipeline.advance(changes("t", 2, t3={"by": 2, "n": 3}))) == [
        ("exit", ("t3", None)),
        ("enter", ("t3", "bob")),
    ]
    assert brief(pipeline.advance(changes("u", 3, ann=None))) == [
        ("exit", ("t1", "ann")),
        ("exit", ("t2", "ann")),
        ("enter", ("t1", None)),
        ("enter", ("t2", None)),
    ]
    deltas = pipeline.advance(changes("u", 4, bob={"id": 2, "name": "Bob"}))
    assert deltas == [
        Delta("update", ("t3", "bob"), {"t": {"by": 2, "n": 3}, "u": {"id": 2, "name": "Bob"}}, 4)
    ]


def test_a_row_that_stays_as_it_was_gives_no_delta_and_one_of_another_kind_does() -> None:
    pipeline = filled(tasks_and_users("inner"))

    assert pipeline.advance(changes("u", 2, ann={"id": 1})) == []
    assert brief(pipeline.advance(changes("u", 3, ann={"id": 1.0}))) == []
    assert brief(pipeline.advance(changes("u", 4, ann={"id": True}))) == [
        ("exit", ("t1", "ann")),
        ("exit", ("t2", "ann")),
    ]


def test_a_pair_that_comes_in_one_commit_is_never_seen_alone() -> None:
    pipeline = Pipeline(tasks_and_users("full"))

    deltas = pipeline.advance([*changes("t", a={"by": 1}), *changes("u", b={"id": 1})])

    assert brief(deltas) == [("enter", ("a", "b"))]


def test_further_conditions_decide_who_is_a_partner() -> None:
    query = q.from_(t=TASKS).full_join(
        u=USERS, on=lambda t, u: eq(t.by, u.id) & gt(t.n, u.least) & eq(u.open, True)
    )
    pipeline = Pipeline(query)
    pipeline.advance(changes("t", t1={"by": 1, "n": 5}))
    pipeline.advance(changes("u", a={"id": 1, "least": 9, "open": True}, b={"id": 1, "least": 1}))

    assert [delta.key for delta in pipeline.enters()] == [(None, "a"), (None, "b"), ("t1", None)]
    assert brief(pipeline.advance(changes("t", 2, t1={"by": 1, "n": 10}))) == [
        ("exit", (None, "a")),
        ("exit", ("t1", None)),
        ("enter", ("t1", "a")),
    ]


def test_several_sources_of_from_are_joined_by_the_equalities_of_where() -> None:
    query = q.from_(t=TASKS, u=USERS).where(lambda t, u: eq(u.id, t.by) & gt(t.n, 1))

    assert [delta.key for delta in filled(query).enters()] == [("t2", "ann")]


def test_a_collection_can_be_joined_with_itself() -> None:
    query = (
        q.from_(a=TASKS)
        .inner_join(b=TASKS, on=lambda a, b: eq(a.next, b.id))
        .select(lambda a, b: {"from": a.id, "to": b.id})
    )
    pipeline = Pipeline(query)
    chain = {"x": {"id": "x", "next": "y"}, "y": {"id": "y", "next": "x"}}

    pipeline.advance([*changes("a", 1, **chain), *changes("b", 1, **chain)])

    assert pipeline.rows == [{"from": "x", "to": "y"}, {"from": "y", "to": "x"}]


def test_groups_are_made_of_pairs() -> None:
    query = (
        tasks_and_users("left")
        .group_by(lambda u: u.id)
        .having(lambda t: count() > 1)
        .select(lambda t, u: {"user": u.id, "tasks": count(), "users": count(u), "sum": sum_(t.n)})
    )
    pipeline = filled(query)
    assert pipeline.rows == [{"user": 1, "tasks": 2, "users": 2, "sum": 3}]

    (update,) = pipeline.advance(changes("t", 2, t1={"by": 1, "n": 10}))
    assert (update.op, update.row["sum"]) == ("update", 12)
    assert brief(pipeline.advance(changes("t", 3, t2=None))) == [("exit", (1,))]


def test_pairs_are_ordered_cut_and_told_apart() -> None:
    query = tasks_and_users("left").order_by(lambda u: u.id, "desc").limit(2)
    pipeline = filled(query)
    assert [delta.key for delta in pipeline.enters()] == PAIRS

    deltas = pipeline.advance(changes("t", 2, t0={"by": 1}))
    assert brief(deltas) == [("exit", ("t2", "ann")), ("enter", ("t0", "ann"))]
    distinct = filled(tasks_and_users("left").select(lambda u: {"id": u.id}).distinct())
    assert distinct.rows == [{"id": 1}, {"id": None}]


def test_a_query_can_be_read_like_a_collection() -> None:
    busiest = (
        q.from_(t=TASKS)
        .group_by(lambda t: t.by)
        .select(lambda t: {"by": t.by, "tasks": count()})
        .order_by(lambda t: count(), "desc")
        .limit(1)
    )
    query = q.from_(b=busiest).inner_join(u=USERS, on=lambda b, u: eq(b.by, u.id))
    pipeline = Pipeline(query)
    pipeline.advance(changes("u", ann={"id": 1}, bob={"id": 2}))
    pipeline.advance(changes("b.t", x={"by": 1}, y={"by": 1}, z={"by": 2}))
    assert pipeline.rows == [{"b": {"by": 1, "tasks": 2}, "u": {"id": 1}}]

    deltas = pipeline.advance(changes("b.t", 2, v={"by": 2}, w={"by": 2}))
    assert brief(deltas) == [("exit", ((1,), "ann")), ("enter", ((2,), "bob"))]


def test_a_union_has_the_rows_of_all_as_often_as_they_are() -> None:
    names = q.from_(t=TASKS).select(lambda t: {"id": t.by})
    query = names.union_all(q.from_(u=USERS).select(lambda u: {"id": u.id}))
    pipeline = Pipeline(query.order_by(lambda row: row.id))

    pipeline.advance([*changes("row.0.t", x={"by": 2}, y={"by": 1})])
    deltas = pipeline.advance([*changes("row.1.u", ann={"id": 1})])

    assert brief(deltas) == [("enter", (1, "ann"))]
    assert pipeline.rows == [{"id": 1}, {"id": 1}, {"id": 2}]
    assert [delta.key for delta in pipeline.enters()] == [(0, "y"), (1, "ann"), (0, "x")]


class Task(BaseModel):
    id: str
    by: int | None = None


class Typed:
    def as_source(self) -> SourceRef[Task]:
        return SourceRef("tasks", None, {"id": Field("id"), "by": Field("by")}, Task)


def test_rows_are_decoded_as_their_sources_say_however_deep() -> None:
    inner = q.from_(t=Typed()).left_join(u=USERS, on=lambda t, u: eq(t.by, u.id))
    query = (
        q.from_(pair=inner)
        .where(lambda pair: is_null(pair.u.id) & eq(pair.t.by, 1))
        .select(lambda pair: {"it": pair, "in": {"task": pair.t}, "user": pair.u})
    )
    pipeline = Pipeline(query)

    pipeline.advance(changes("pair.t", a={"id": "a", "by": 1}))

    task = Task(id="a", by=1)
    assert pipeline.rows == [
        {"it": {"t": task, "u": None}, "in": {"task": {"id": "a", "by": 1}}, "user": None}
    ]


def test_whether_a_row_of_a_join_is_durable() -> None:
    query = tasks_and_users("left").where(lambda t, u: synced(t) & synced(u))
    pipeline = Pipeline(query)

    pipeline.advance([RowChange("t", "a", {"by": 1}, 0, synced=False)])
    assert pipeline.rows == []
    assert pipeline.advance([RowChange("t", "a", {"by": 1}, 1)])[0].row == {
        "t": {"by": 1},
        "u": None,
    }
    assert brief(pipeline.advance([RowChange("u", "b", {"id": 1}, 0, synced=False)])) == [
        ("exit", ("a", None))
    ]


def conditions(query: Query[Any]) -> dict[str, str]:
    return {one.name: str(one.condition) for one in Pipeline(query).inputs if one.condition}


def test_conditions_on_one_source_are_asked_before_rows_are_joined() -> None:
    def asked(join_type: Any) -> dict[str, str]:
        return conditions(
            q.from_(t=TASKS)
            .join(
                u=USERS,
                on=lambda t, u: eq(t.by, u.id) & eq(u.open, True) & eq(t.open, True),
                join_type=join_type,
            )
            .where(lambda t, u: eq(t.kind, "x") & eq(u.kind, "y") & is_null(u.gone))
        )

    tasks, users = "(t.kind = 'x')", "(u.kind = 'y')"
    assert asked("inner") == {
        "t": f"(t.open = true) and {tasks}",
        "u": f"(u.open = true) and {users} and is_null(u.gone)",
    }
    assert asked("left") == {"t": tasks[1:-1], "u": f"(u.open = true) and {users}"}
    assert asked("right") == {
        "t": f"(t.open = true) and {tasks}",
        "u": f"{users} and is_null(u.gone)",
    }
    assert asked("full") == {"t": tasks[1:-1], "u": users[1:-1]}


def test_a_query_of_several_sources_is_data_and_prints_as_a_tree() -> None:
    newest = (
        q.from_(t=TASKS).group_by(lambda t: t.by).select(lambda t: {"by": t.by, "n": max_(t.n)})
    )
    names = q.from_(u=USERS).union_all(q.from_(u=USERS).limit(1))
    query = build(
        q.from_(u=names, t=TASKS)
        .left_join(n=newest, on=lambda u, n: eq(u.id, n.by))
        .where(lambda t, u: eq(t.by, u.id))
    )

    assert pickle.loads(pickle.dumps(query)) == query
    assert hash(query) == hash(pickle.loads(pickle.dumps(query)))
    assert str(query) == (
        "from u:\n"
        "  from row: union all of\n"
        "    - from u: users\n"
        "    - from u: users\n"
        "      limit 1\n"
        "from t: tasks\n"
        "left join n: on u.id = n.by\n"
        "  from t: tasks\n"
        "  group by t.by\n"
        "  select\n"
        "    by: t.by\n"
        "    n: max(t.n)\n"
        "where t.by = u.id"
    )
