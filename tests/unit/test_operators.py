from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from aidb_ray.errors import QueryError
from aidb_ray.expressions import Field, SourceRef, avg, count, eq, gt, max_, min_, sum_, synced
from aidb_ray.query.aggregates import AGGREGATES
from aidb_ray.query.builder import Query, build
from aidb_ray.query.operators import Delta, Pipeline, RowChange
from aidb_ray.query.ordering import ascending, descending

Row = dict[str, Any]


class Rows:
    """A source without a schema."""

    def as_source(self) -> SourceRef[Row]:
        return SourceRef("rows")


def query() -> Query[Row]:
    return build(lambda q: q.from_(r=Rows()))


def changes(revision: int, **rows: Row | None) -> list[RowChange]:
    return [RowChange("r", key, row, revision) for key, row in rows.items()]


def brief(deltas: Iterable[Delta[Any]]) -> list[tuple[str, Any]]:
    return [(delta.op, delta.key) for delta in deltas]


def ns(pipeline: Pipeline[Any]) -> list[Any]:
    return [row["n"] for row in pipeline.rows]


def test_rows_enter_change_and_exit_with_the_predicate() -> None:
    pipeline = Pipeline(query().where(lambda r: gt(r.n, 1)))

    assert brief(pipeline.advance(changes(1, a={"n": 2}, b={"n": 0}))) == [("enter", "a")]
    assert pipeline.advance(changes(2, a={"n": 3})) == [Delta("update", "a", {"n": 3}, 2)]
    assert brief(pipeline.advance(changes(3, b={"n": 9}))) == [("enter", "b")]
    assert pipeline.advance(changes(4, a={"n": 1})) == [Delta("exit", "a", {"n": 3}, 4)]
    assert brief(pipeline.advance(changes(5, b=None, c=None))) == [("exit", "b")]
    assert pipeline.rows == []


def test_rows_without_an_order_are_in_the_order_of_their_keys() -> None:
    pipeline = Pipeline(query())

    pipeline.advance(changes(1, c={"n": 1}, a={"n": 2}))
    pipeline.advance(changes(2, b={"n": 3}))

    assert ns(pipeline) == [2, 3, 1]


def test_a_row_that_stays_as_it_was_gives_no_delta() -> None:
    pipeline = Pipeline(query())
    pipeline.advance(changes(1, a={"n": 1}))

    assert pipeline.advance(changes(2, a={"n": 1})) == []
    assert brief(pipeline.advance(changes(3, a={"n": True}))) == [("update", "a")]


def test_a_row_that_comes_and_goes_within_a_commit_gives_no_delta() -> None:
    pipeline = Pipeline(query().limit(2))

    assert pipeline.advance([*changes(1, a={"n": 1}), *changes(1, a=None)]) == []
    assert pipeline.rows == []


def test_exits_come_first_and_the_rest_in_the_order_of_the_answer() -> None:
    pipeline = Pipeline(query().order_by(lambda r: r.n, "desc"))
    pipeline.advance(changes(1, a={"n": 1}, b={"n": 2}, c={"n": 3}))

    deltas = pipeline.advance(changes(2, a={"n": 5}, d={"n": 9}, b=None, c=None, e={"n": 4}))

    assert brief(deltas) == [
        ("exit", "c"),
        ("exit", "b"),
        ("enter", "d"),
        ("update", "a"),
        ("enter", "e"),
    ]


def test_a_change_of_another_source_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Pipeline(query()).advance([RowChange("x", "a", {}, 1)])


def test_the_rows_a_reader_holds_do_not_change() -> None:
    pipeline = Pipeline(query())
    pipeline.advance(changes(1, a={"n": 1}))
    held = pipeline.rows

    pipeline.advance(changes(2, b={"n": 2}))
    held.append({"n": 9})

    assert ns(pipeline) == [1, 2]


def test_ties_are_decided_by_key_and_nulls_are_least() -> None:
    rows = changes(1, d={"n": 1}, a={"n": 1}, b={"n": None}, c={}, e={"n": "x"}, f={"n": True})
    up = Pipeline(query().order_by(lambda r: r.n).select(lambda r: {"n": r.n}))
    down = Pipeline(query().order_by(lambda r: r.n, "desc").select(lambda r: {"n": r.n}))

    assert [delta.key for delta in up.advance(rows)] == ["b", "c", "f", "a", "d", "e"]
    assert [delta.key for delta in down.advance(rows)] == ["e", "a", "d", "f", "b", "c"]


def test_a_window_moves_by_one_row_at_each_edge() -> None:
    pipeline = Pipeline(query().order_by(lambda r: r.n).offset(1).limit(2))
    pipeline.advance(changes(1, a={"n": 1}, b={"n": 2}, c={"n": 3}, d={"n": 4}))
    assert ns(pipeline) == [2, 3]

    assert brief(pipeline.advance(changes(2, z={"n": 0}))) == [("exit", "c"), ("enter", "a")]
    assert brief(pipeline.advance(changes(3, a=None))) == [("exit", "a"), ("enter", "c")]
    assert brief(pipeline.advance(changes(4, b={"n": 9}))) == [("exit", "b"), ("enter", "d")]
    assert pipeline.advance(changes(5, x={"n": 8})) == []
    assert brief(pipeline.advance(changes(6, c={"n": 3, "x": 1}))) == [("update", "c")]
    assert ns(pipeline) == [3, 4]


def test_rows_change_places_without_a_delta() -> None:
    pipeline = Pipeline(query().order_by(lambda r: r.n).select(lambda r: {"id": r.id}))
    pipeline.advance(changes(1, a={"id": "a", "n": 1}, b={"id": "b", "n": 2}))
    assert pipeline.rows == [{"id": "a"}, {"id": "b"}]

    assert pipeline.advance(changes(2, a={"id": "a", "n": 3})) == []
    assert pipeline.rows == [{"id": "b"}, {"id": "a"}]


def test_find_one_is_the_first_row_or_none() -> None:
    pipeline = Pipeline(query().order_by(lambda r: r.n).find_one())
    assert pipeline.rows == []

    pipeline.advance(changes(1, b={"n": 2}))
    deltas = pipeline.advance(changes(2, a={"n": 1}))

    assert brief(deltas) == [("exit", "b"), ("enter", "a")]
    assert ns(pipeline) == [1]


def test_an_empty_window_says_nothing() -> None:
    pipeline = Pipeline(query().offset(1).limit(0))

    assert pipeline.advance(changes(1, a={}, b={}, c={})) == []
    assert pipeline.advance(changes(2, a=None, b={"n": 1})) == []


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | st.integers(0, 3)), max_size=30),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_a_window_is_the_slice_of_all_rows(
    program: list[tuple[str, int | None]], skip: int, size: int
) -> None:
    """Oracle: the same query without a window."""
    ordered = query().order_by(lambda r: r.n, "desc")
    everything = Pipeline(ordered)
    window = Pipeline(ordered.offset(skip).limit(size))
    folded: dict[str, Row] = {}

    for revision, (key, n) in enumerate(program, 1):
        change = changes(revision, **{key: None if n is None else {"n": n, "key": key}})
        everything.advance(change)
        for delta in window.advance(change):
            folded.pop(delta.key, None)
            if delta.op != "exit":
                folded[delta.key] = delta.row

        expected = everything.rows[skip : skip + size]
        assert window.rows == expected
        assert sorted(folded) == sorted(row["key"] for row in expected)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=False),
    st.text("ab\0\x7fé\ud800\U0001f600", max_size=3),
    st.datetimes(timezones=st.just(UTC)),
    st.integers(0, 2).map(lambda ticks: datetime(2026, 1, 1, 0, 0, 0, ticks, tzinfo=UTC)),
)


@given(scalars, scalars)
def test_the_descending_order_is_the_ascending_one_reversed(a: Any, b: Any) -> None:
    assert (ascending(a) < ascending(b)) == (descending(a) > descending(b))
    assert (ascending(a) == ascending(b)) == (descending(a) == descending(b))


def test_instants_order_by_time() -> None:
    texts = ["2026-01-01T00:00:29.5Z", "2026-01-01T00:00:29Z", "2026-01-01T02:00:29.2+02:00"]
    source: SourceRef[Row] = SourceRef("rows", fields={"at": Field("at", "datetime")})

    class Timed:
        def as_source(self) -> SourceRef[Row]:
            return source

    timed = build(lambda q: q.from_(r=Timed()).order_by(lambda r: r.at))
    pipeline = Pipeline(timed)
    pipeline.advance(changes(1, **{str(at): {"at": text} for at, text in enumerate(texts)}))

    assert [row["at"] for row in pipeline.rows] == [texts[1], texts[2], texts[0]]


def test_equal_rows_are_one_until_the_last_is_gone() -> None:
    pipeline = Pipeline(query().select(lambda r: {"n": r.n}).distinct())

    (entered,) = pipeline.advance(changes(1, a={"n": 1}, b={"n": 1.0}))
    assert entered.op == "enter"
    assert pipeline.advance(changes(2, a=None)) == []
    assert pipeline.advance(changes(3, c={"n": 1}, b=None)) == []
    assert brief(pipeline.advance(changes(4, c=None))) == [("exit", entered.key)]


def test_distinct_tells_true_from_one() -> None:
    pipeline = Pipeline(query().select(lambda r: {"n": r.n}).distinct())

    pipeline.advance(changes(1, a={"n": 1}, b={"n": True}))

    assert [type(n) for n in ns(pipeline)] == [int, bool]


def test_a_distinct_row_stands_where_the_first_of_its_equals_does() -> None:
    by_size = query().order_by(lambda r: r.size).select(lambda r: {"n": r.n}).distinct()
    pipeline = Pipeline(by_size)
    pipeline.advance(changes(1, a={"n": 1, "size": 1}, b={"n": 2, "size": 2}))
    assert ns(pipeline) == [1, 2]

    assert pipeline.advance(changes(2, c={"n": 2, "size": 0})) == []
    assert ns(pipeline) == [2, 1]


def totals() -> Query[dict[str, Any]]:
    return (
        query()
        .group_by(lambda r: r.agent)
        .select(
            lambda r: {
                "agent": r.agent,
                "rows": count(),
                "known": count(r.n),
                "sum": sum_(r.n),
                "mean": avg(r.n),
                "least": min_(r.n),
                "most": max_(r.n),
            }
        )
    )


def test_groups_are_summed_up_and_vanish_when_empty() -> None:
    pipeline = Pipeline(totals())

    pipeline.advance(changes(1, a={"agent": "x", "n": 1}, b={"agent": "x"}, c={"agent": None}))
    assert pipeline.rows == [
        {
            "agent": None,
            "rows": 1,
            "known": 0,
            "sum": None,
            "mean": None,
            "least": None,
            "most": None,
        },
        {"agent": "x", "rows": 2, "known": 1, "sum": 1, "mean": 1.0, "least": 1, "most": 1},
    ]

    deltas = pipeline.advance(changes(2, b={"agent": "x", "n": 4}, c=None))
    assert brief(deltas) == [("exit", (None,)), ("update", ("x",))]
    assert pipeline.rows == [
        {"agent": "x", "rows": 2, "known": 2, "sum": 5, "mean": 2.5, "least": 1, "most": 4}
    ]

    assert brief(pipeline.advance(changes(3, a=None, b=None))) == [("exit", ("x",))]


def test_a_row_that_moves_to_another_group_changes_both_once() -> None:
    pipeline = Pipeline(totals())
    pipeline.advance(changes(1, a={"agent": "x"}, b={"agent": "x"}, c={"agent": "y"}))

    deltas = pipeline.advance(changes(2, a={"agent": "y"}, c={"agent": "y", "n": 1}))

    assert brief(deltas) == [("update", ("x",)), ("update", ("y",))]


def test_groups_enter_and_exit_with_having_and_are_ordered_by_aggregates() -> None:
    busy = (
        query()
        .group_by(lambda r: r.agent)
        .having(lambda r: count() > 1)
        .select(lambda r: {"agent": r.agent, "n": count()})
        .order_by(lambda r: count(), "desc")
        .limit(1)
    )
    pipeline = Pipeline(busy)

    assert pipeline.advance(changes(1, a={"agent": "x"}, b={"agent": "y"})) == []
    assert brief(pipeline.advance(changes(2, c={"agent": "x"}))) == [("enter", ("x",))]
    assert pipeline.advance(changes(3, d={"agent": "y"})) == [], "x comes before y"
    deltas = pipeline.advance(changes(4, e={"agent": "y"}))
    assert brief(deltas) == [("exit", ("x",)), ("enter", ("y",))]
    assert pipeline.rows == [{"agent": "y", "n": 3}]


def test_aggregates_without_groups_are_of_all_rows() -> None:
    pipeline = Pipeline(build(query().select(lambda r: {"n": count(), "top": max_(r.n) + 1})))
    assert pipeline.rows == []

    pipeline.advance(changes(1, a={"n": 1}, b={"n": 7}))
    assert pipeline.rows == [{"n": 2, "top": 8}]

    assert brief(pipeline.advance(changes(2, a=None, b=None))) == [("exit", ())]


def test_groups_tell_true_from_one_and_take_whole_numbers_as_one() -> None:
    rows = changes(1, a={"agent": 1.0}, b={"agent": 1}, c={"agent": True})
    pipeline = Pipeline(totals())
    pipeline.advance(rows)

    assert [(row["agent"], type(row["agent"]), row["rows"]) for row in pipeline.rows] == [
        (True, bool, 1),
        (1, int, 2),
    ]


numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))


@given(st.lists(numbers, min_size=1), st.lists(numbers))
def test_sums_are_exact_whatever_came_and_went(kept: list[float], gone: list[float]) -> None:
    """Oracle: fractions. Floats added and taken away again would leave a rest."""
    total, mean = AGGREGATES["sum"](), AGGREGATES["avg"]()
    for value in [*gone, *kept, None, "1", True]:
        total.add(value)
        mean.add(value)
    for value in [*gone, None, "1", True]:
        total.remove(value)
        mean.remove(value)

    exact = sum(map(Fraction, kept), Fraction())

    assert mean.result() == rounded(exact / len(kept))
    if any(isinstance(value, float) for value in kept):
        assert total.result() == rounded(exact)
    else:
        whole = int(exact) if -(2**63) <= exact < 2**64 else None
        assert (type(total.result()), total.result()) == (type(whole), whole)


def rounded(exact: Fraction) -> float | None:
    try:
        return float(exact)
    except OverflowError:
        return None


def test_a_sum_beyond_a_double_is_null() -> None:
    total = AGGREGATES["sum"]()
    total.add(1.7e308)
    total.add(1.7e308)
    assert total.result() is None

    total.remove(1.7e308)
    assert math.isclose(total.result(), 1.7e308)


def test_extremes_of_mixed_kinds_and_instants() -> None:
    least, most = AGGREGATES["min"](), AGGREGATES["max"]()
    now = datetime.now(UTC)
    for value in [None, [1], {"a": 1}, "text", 3, True, now]:
        least.add(value)
        most.add(value)

    assert least.result() is True
    assert most.result() == now
    most.remove(now)
    assert most.result() == "text"


class Message(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")

    target_agent: str
    n: int = 0


class Messages:
    def as_source(self) -> SourceRef[Message]:
        fields = {"target_agent": Field("targetAgent"), "n": Field("n")}
        return SourceRef("messages", None, fields, Message)


def typed() -> Query[Message]:
    return build(lambda q: q.from_(r=Messages()))


def test_rows_are_what_their_source_says() -> None:
    pipeline = Pipeline(typed())

    (delta,) = pipeline.advance(changes(1, a={"targetAgent": "writer"}))

    assert pipeline.rows == [Message(target_agent="writer")]
    assert delta.row is pipeline.rows[0], "decoded once"


def test_decoding_can_be_given_and_is_left_until_someone_looks() -> None:
    decoded: list[Row] = []

    def decode(row: Row) -> int:
        decoded.append(row)
        return row["n"]

    pipeline = Pipeline(typed().order_by(lambda r: r.n).limit(1), decoder_of=lambda _source: decode)
    pipeline.advance(changes(1, a={"n": 1}, b={"n": 2}))
    assert decoded == []

    assert pipeline.rows == [1]
    assert decoded == [{"n": 1}]


def test_select_makes_dicts_models_and_whole_rows() -> None:
    row = changes(1, a={"targetAgent": "writer", "n": 3})
    named = Pipeline(typed().select(lambda r: {"who": r.target_agent, "in": {"row": r}}))
    named.advance(row)
    model = Pipeline(
        typed().select(lambda r: {"target_agent": r.target_agent, "n": r.n + 1}, into=Message)
    )
    model.advance(row)

    assert named.rows == [{"who": "writer", "in": {"row": Message(target_agent="writer", n=3)}}]
    assert model.rows == [Message(target_agent="writer", n=4)]


def test_an_update_that_select_does_not_show_is_none() -> None:
    pipeline = Pipeline(query().select(lambda r: {"n": r.n}))
    pipeline.advance(changes(1, a={"n": 1, "m": 1}))

    assert pipeline.advance(changes(2, a={"n": 1, "m": 2})) == []


def test_a_row_that_cannot_be_decoded_fails_only_who_looks_at_it() -> None:
    pipeline = Pipeline(typed())

    bad, good = pipeline.advance(changes(1, bad={"targetAgent": 7}, good={"targetAgent": "x"}))

    assert good.row == Message(target_agent="x")
    for look in (lambda: bad.row, lambda: pipeline.rows):
        with pytest.raises(QueryError, match="'bad'") as caught:
            look()
        assert caught.value.code == "invalid_row"
    pipeline.advance(changes(2, bad={"targetAgent": "y"}))
    assert [row.target_agent for row in pipeline.rows] == ["y", "x"]


def test_a_delta_is_a_value_that_crosses_processes() -> None:
    pipeline = Pipeline(typed())
    (delta,) = pipeline.advance(changes(3, a={"targetAgent": "writer"}))

    assert pickle.loads(pickle.dumps(delta)) == delta
    assert delta == Delta("enter", "a", Message(target_agent="writer"), 3)
    assert delta != Delta("update", "a", Message(target_agent="writer"), 3)
    assert repr(Delta("exit", "a", 1, 3)) == "Delta('exit', 'a', 1, revision=3)"


def test_a_new_reader_begins_with_the_answer_as_it_is() -> None:
    pipeline = Pipeline(query().order_by(lambda r: r.n, "desc").limit(2))
    pipeline.advance(changes(1, a={"n": 1}, b={"n": 2}, c={"n": 3}))
    pipeline.advance(changes(2, b={"n": 9}))

    assert pipeline.enters() == [
        Delta("enter", "b", {"n": 9}, 2),
        Delta("enter", "c", {"n": 3}, 2),
    ]


def test_a_row_becomes_visible_once_it_is_durable() -> None:
    pipeline = Pipeline(query().where(lambda r: eq(r.n, 1) & synced(r)))

    assert pipeline.advance([RowChange("r", "a", {"n": 1}, 0, synced=False)]) == []
    assert pipeline.advance([RowChange("r", "a", {"n": 1}, 7)]) == [
        Delta("enter", "a", {"n": 1}, 7)
    ]


def test_whether_a_row_is_durable_can_be_selected_and_is_no_part_of_the_row() -> None:
    shown = Pipeline(query().select(lambda r: {"synced": synced(r), "row": r}))

    shown.advance([RowChange("r", "a", {"n": 1}, 0, synced=False)])
    assert shown.rows == [{"synced": False, "row": {"n": 1}}]
    assert brief(shown.advance(changes(1, a={"n": 1}))) == [("update", "a")]
