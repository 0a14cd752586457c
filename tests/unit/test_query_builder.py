from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from aidb_ray.errors import QueryError
from aidb_ray.expressions import (
    Constant,
    Expression,
    Ref,
    Reference,
    SourceRef,
    and_,
    as_node,
    coalesce,
    count,
    eq,
    gt,
    max_,
    sum_,
    synced,
    upper,
)
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.query.clauses import OrderTerm
from aidb_ray.query.query import JoinOn
from tests.property.questions import FIELDS, Messages, Row


def messages() -> Query[Row]:
    return build(lambda q: q.from_(m=Messages()))


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(QueryError) as caught:
        make()
    return caught.value.code


def pending() -> Query[Row]:
    return build(
        lambda q: (
            q.from_(m=Messages())
            .where(lambda m: and_(eq(m.target_agent, "writer"), eq(m.done, False)))
            .order_by(lambda m: m.created_at, "desc")
            .limit(20)
        )
    )


def busiest() -> Query[dict[str, Any]]:
    return build(
        lambda q: (
            q.from_(m=Messages())
            .group_by(lambda m: m.target_agent)
            .having(lambda m: count() > 3)
            .select(lambda m: {"agent": m.target_agent, "stats": {"newest": max_(m.created_at)}})
            .order_by(lambda m: count(), "desc")
            .distinct()
            .offset(1)
            .find_one()
        )
    )


def test_a_query_is_data() -> None:
    query = pending()

    assert query.sources == (("m", SourceRef("messages", "aidb://support/1", FIELDS)),)
    assert query.ordering == (OrderTerm(Reference("m", ("createdAt",), "datetime"), True),)  # noqa: FBT003
    assert query.window == (0, 20)
    assert query == pending()
    assert hash(query) == hash(pending())
    assert pickle.loads(pickle.dumps(query)) == query
    assert query != query.limit(19)


def test_queries_that_differ_in_the_kind_of_a_literal_differ() -> None:
    one, true = (messages().where(lambda m, v=v: eq(m.n, v)) for v in (1, True))

    assert one != true


def test_a_query_prints_as_it_reads() -> None:
    assert str(pending()) == (
        "from m: messages in aidb://support/1\n"
        "where (m.targetAgent = 'writer') and (m.done = false)\n"
        "order by m.createdAt desc\n"
        "limit 20"
    )
    assert str(busiest()) == (
        "from m: messages in aidb://support/1\n"
        "group by m.targetAgent\n"
        "having count() > 3\n"
        "order by count() desc\n"
        "select\n"
        "  agent: m.targetAgent\n"
        "  stats:\n"
        "    newest: max(m.createdAt)\n"
        "distinct\n"
        "offset 1\n"
        "find one"
    )


def test_a_query_never_changes() -> None:
    base = messages()

    base.where(lambda m: m.done).limit(3).distinct()

    assert base == messages()


def test_clauses_add_up() -> None:
    query = (
        messages()
        .where(lambda m: m.done)
        .where(lambda m: gt(m.n, 1))
        .order_by(lambda m: m.n)
        .order_by(lambda m: m.target_agent)
        .limit(5)
        .limit(3)
        .offset(2)
    )

    assert str(query.predicate) == "m.done and (m.n > 1)"
    assert [str(term) for term in query.ordering] == ["m.n", "m.targetAgent"]
    assert query.window == (2, 5)


@pytest.mark.parametrize(
    ("query", "window"),
    [
        (messages(), (0, None)),
        (messages().find_one(), (0, 1)),
        (messages().find_one().offset(2), (2, 3)),
        (messages().find_one().limit(0), (0, 0)),
        (messages().find_one().limit(9), (0, 1)),
        (messages().offset(4), (4, None)),
    ],
)
def test_what_is_kept_of_the_answer(query: Query[Any], window: tuple[int, int | None]) -> None:
    assert query.window == window


def test_a_written_query_can_be_built_again() -> None:
    query = pending()

    assert build(query) is query


def test_a_query_knows_whether_it_depends_on_what_is_durable() -> None:
    assert messages().where(lambda m: synced(m)).reads_synced
    assert messages().select(lambda m: {"s": synced(m)}).reads_synced
    assert not pending().reads_synced


def joined(on: JoinOn, join_type: Any = "left") -> Query[Any]:
    return messages().join(u=Messages(), on=on, join_type=join_type)


def both() -> Query[Any]:
    return joined(lambda m, u: eq(m.n, u.n))


def named() -> Query[Any]:
    return messages().select(lambda m: {"agent": m.target_agent, "n": m.n})


def cast_any(value: Any) -> Any:
    return value


# Untyped, as they come from users without a type checker.
ANY: Any = None
YES: Any = True


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: messages().where(lambda m: m.statsu), "unknown_field"),
        (lambda: messages().where(lambda u: u.done), "unknown_field"),
        (lambda: messages().where(lambda m, u: eq(m.n, u.n)), "unknown_field"),
        (lambda: messages().where(lambda m: upper(m.target_agent)), "unknown_field"),
        (lambda: messages().where(lambda m: m), "unknown_field"),
        (lambda: messages().where(ANY), "invalid_lambda"),
        (lambda: messages().where(lambda m: gt(count(), 1)), "aggregate_not_allowed"),
        (lambda: messages().group_by(lambda m: sum_(m.n)), "aggregate_not_allowed"),
        (lambda: messages().group_by(lambda m: m), "invalid_expression"),
        (lambda: messages().order_by(lambda m: m), "invalid_expression"),
        (lambda: messages().order_by(lambda m: m.n, ANY), "invalid_argument"),
        (lambda: messages().limit(-1), "invalid_argument"),
        (lambda: messages().limit(YES), "invalid_argument"),
        (lambda: messages().offset(ANY), "invalid_argument"),
        (lambda: messages().select(lambda m: {}), "invalid_select"),
        (lambda: messages().select(lambda m: {"x": {}}), "invalid_select"),
        (lambda: messages().select(lambda m: {"x": object()}), "invalid_literal"),
        (
            lambda: messages().select(lambda m: {"x": m.n}).select(lambda m: {"y": m.n}),
            "duplicate_clause",
        ),
        (lambda: build(messages().having(lambda m: m.done)), "group_required"),
        (lambda: build(messages().group_by(lambda m: m.n)), "select_required"),
        (lambda: build(lambda q: ANY), "invalid_lambda"),
        (lambda: build(ANY), "invalid_lambda"),
        (lambda: cast_any(QueryRoot()).from_(), "source_required"),
        (lambda: QueryRoot().from_(m=ANY), "invalid_source"),
        (lambda: both().join(u=Messages(), on=lambda m, u: eq(m.n, u.n)), "duplicate_alias"),
        (lambda: QueryRoot().from_(**{"m.u": Messages()}), "invalid_alias"),
        (lambda: joined(lambda m, u: eq(m.n, 1)), "join_condition"),
        (lambda: joined(lambda m, u: eq(m.n, m.done)), "join_condition"),
        (lambda: joined(lambda m, u: gt(m.n, u.n)), "join_condition"),
        (lambda: joined(lambda m, u: eq(m.n, u.n) | eq(m.done, u.done)), "join_condition"),
        (lambda: joined(lambda m, u: eq(m.n, u.count)), "unknown_field"),
        (lambda: joined(lambda m, x: eq(m.n, x.n)), "unknown_field"),
        (lambda: joined(lambda m, u: eq(m.n, count(u.n))), "aggregate_not_allowed"),
        (lambda: joined(ANY), "invalid_lambda"),
        (lambda: joined(lambda m, u: eq(m.n, u.n), ANY), "invalid_argument"),
        (lambda: messages().join(on=lambda m: m.done), "source_required"),
        (lambda: messages().join(a=Messages(), b=Messages(), on=ANY), "source_required"),
        (lambda: messages().join(u=ANY, on=lambda m, u: eq(m.n, u.n)), "invalid_source"),
        (lambda: build(QueryRoot().from_(m=Messages(), u=Messages())), "join_condition"),
        (lambda: build(lambda q: q.from_(s=messages().group_by(lambda m: m.n))), "select_required"),
        (
            lambda: build(lambda q: q.from_(s=messages()).where(lambda s: synced(s))),
            "invalid_expression",
        ),
        (lambda: QueryRoot().from_(s=named()).where(lambda s: s.who), "unknown_field"),
        (lambda: QueryRoot().from_(s=both()).where(lambda s: eq(s.n, 1)), "unknown_field"),
        (lambda: messages().union_all(), "invalid_source"),
        (lambda: messages().union_all(ANY), "invalid_source"),
        (lambda: messages().union_all(named()), "union_mismatch"),
        (lambda: named().union_all(messages().select(lambda m: {"n": m.n})), "union_mismatch"),
        (lambda: named().union_all(named()).where(lambda row: row.who), "unknown_field"),
    ],
)
def test_a_mistake_is_refused(make: Callable[[], object], code: str) -> None:
    assert refused(make) == code


def test_a_join_without_an_equality_is_told_what_it_needs() -> None:
    with pytest.raises(QueryError, match=r"equality between 'u' and what comes before it \('m'\)"):
        joined(lambda m, u: gt(m.n, u.n))


def test_queries_that_cannot_be_united_are_told_apart() -> None:
    with pytest.raises(QueryError, match=r"some are \{agent, n\}, some \{agent, row: \{"):
        named().union_all(messages().select(lambda m: {"agent": m.target_agent, "row": m}))


def test_instants_of_a_query_that_is_read_are_instants() -> None:
    newest = messages().select(
        lambda m: {"first": m.created_at, "last": coalesce(m.created_at, m.n)}
    )
    query = QueryRoot().from_(s=newest).where(lambda s: gt(s.first, "2026-01-01T00:00:00Z"))

    assert query.predicate is not None
    assert refused(lambda: query.where(lambda s: gt(s.last, "yesterday"))) == "invalid_instant"


def test_a_wrong_alias_is_answered_with_the_right_ones() -> None:
    with pytest.raises(QueryError, match=r"'u' is not an alias .* aliases: m"):
        messages().where(lambda u: u.done)


def grouped(fn: Callable[[Ref], dict[str, Any]]) -> Query[Any]:
    return build(messages().group_by(lambda m: (m.target_agent, upper(m.n))).select(fn))


AGREED: list[Callable[[Ref], Any]] = [
    lambda m: m.target_agent,
    lambda m: upper(m.target_agent),
    lambda m: upper(m.n),
    lambda m: sum_(m.n) + count(m.done),
    lambda m: "literal",
]
DIFFERENT: list[Callable[[Ref], Any]] = [lambda m: m.n, lambda m: m, lambda m: sum_(m.n) + m.n]


@pytest.mark.parametrize("value", AGREED)
def test_what_a_group_agrees_in_can_be_selected(value: Callable[[Ref], Any]) -> None:
    assert grouped(lambda m: {"x": value(m)}).is_grouped


@pytest.mark.parametrize("value", DIFFERENT)
def test_what_differs_within_a_group_cannot(value: Callable[[Ref], Any]) -> None:
    assert refused(lambda: grouped(lambda m: {"y": 1, "x": value(m)})) == "not_grouped"


def test_an_aggregate_alone_makes_one_group_of_all_rows() -> None:
    query = build(messages().select(lambda m: {"n": count()}))

    assert query.is_grouped
    assert refused(lambda: build(query.order_by(lambda m: m.n))) == "not_grouped"


class Line(BaseModel):
    agent: str | None = None
    word_count: int = Field(default=0, alias="wordCount")


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


@dataclass
class Pair:
    agent: str


@pytest.mark.parametrize("into", [Line, Open, Pair, dict])
def test_select_into_knows_the_names(into: type[Any]) -> None:
    assert messages().select(lambda m: {"agent": m.target_agent}, into=into).into is into
    query = messages().select(lambda m: {"agent": m.target_agent}, into=Line)
    assert pickle.loads(pickle.dumps(query)) == query


@pytest.mark.parametrize("into", [Line, Pair])
def test_select_into_refuses_other_names(into: type[Any]) -> None:
    assert refused(lambda: messages().select(lambda m: {"agnet": m.n}, into=into)) == (
        "unknown_field"
    )


def test_literals_and_nested_objects_can_be_selected() -> None:
    query = messages().select(lambda m: {"kind": "message", "who": {"agent": m.target_agent}})

    assert query.outputs == (
        ("kind", Constant("message")),
        ("who", (("agent", Reference("m", ("targetAgent",))),)),
    )


def test_a_parameter_with_a_default_is_a_value() -> None:
    def done_by(agent: str) -> Query[Row]:
        return messages().where(lambda m, agent=agent: eq(m.target_agent, agent))

    assert done_by("a").predicate == as_node(eq(Ref(Reference("m", ()), FIELDS).target_agent, "a"))
    assert done_by("a") != done_by("b")


def test_the_function_is_called_once_where_it_is_written() -> None:
    calls: list[Ref] = []

    def condition(m: Ref) -> Expression:
        calls.append(m)
        return eq(m.done, True)

    build(messages().where(condition))

    assert len(calls) == 1
