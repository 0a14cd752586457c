"""Strategies for rows that fit badly, and for expressions and queries over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from aidb_ray.expressions import (
    Expression,
    Field,
    Ref,
    Reference,
    SourceRef,
    add,
    and_,
    avg,
    case_when,
    coalesce,
    concat,
    count,
    divide,
    eq,
    gt,
    gte,
    ilike,
    in_array,
    is_null,
    is_undefined,
    length,
    like,
    lt,
    lte,
    max_,
    min_,
    multiply,
    not_,
    or_,
    subtract,
    sum_,
    synced,
    upper,
)
from aidb_ray.query.builder import Query, build
from aidb_ray.query.clauses import Direction

Row = dict[str, Any]
Key = tuple[str, str]
Binary = Callable[[Any, Any], Expression]
Unary = Callable[[Any], Expression]

FIELDS = {
    "target_agent": Field("targetAgent"),
    "done": Field("done"),
    "n": Field("n"),
    "created_at": Field("createdAt", "datetime"),
    "args": Field("args"),
}
M = Ref(Reference("m", ()), FIELDS)


class Messages:
    """A source with the fields above."""

    def as_source(self) -> SourceRef[Row]:
        return SourceRef("messages", "aidb://support/1", FIELDS)


AGENTS = ["writer", "Writer", "é", "a", ""]
NUMBERS = [0, 1, 2, -1, 1.0, 0.5, 0.1, 0.2, 1e16, -1e16, 2**53 + 1]
# The third is the first, written elsewhere; the first two are not in the order of their texts.
INSTANTS = [
    "2026-01-01T00:00:29Z",
    "2026-01-01T00:00:29.5Z",
    "2026-01-01T02:00:29+02:00",
    "2026-01-01T00:00:30Z",
]
FIELD_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "targetAgent": st.sampled_from([*AGENTS, None, 1]),
    "done": st.sampled_from([True, False, None, 1]),
    "n": st.sampled_from([*NUMBERS, None, "1", True]),
    "createdAt": st.sampled_from([*INSTANTS, None, "yesterday", "2026-01-01T00:00:29"]),
    "args": st.sampled_from([{"n": 1}, {"n": 1.0}, {"n": None}, {"n": True}, {}, [1], None]),
}
rows: st.SearchStrategy[Row] = st.one_of(
    st.fixed_dictionaries(FIELD_VALUES), st.fixed_dictionaries({}, optional=FIELD_VALUES)
)


def call(fn: Unary, value: Any) -> Expression:
    return fn(value)


def call2(fn: Binary, left: Any, right: Any) -> Expression:
    return fn(left, right)


fields: st.SearchStrategy[Expression] = st.sampled_from(
    [M.target_agent, M.done, M.n, M.created_at, M.args.n, M.args]
)
numbers: st.SearchStrategy[Expression] = st.sampled_from(
    [
        M.n,
        M.args.n,
        add(M.n, 1),
        multiply(M.n, M.args.n),
        subtract(M.n, M.args.n),
        divide(1, M.n),
        length(M.target_agent),
    ]
)
scalars: st.SearchStrategy[Expression] = st.sampled_from(
    [
        M.target_agent,
        M.done,
        M.n,
        M.created_at,
        M.args.n,
        upper(M.target_agent),
        concat(M.target_agent, "/", M.n, M.done),
        coalesce(M.args.n, M.n),
        case_when(gt(M.n, 0), "positive", is_null(M.n), "none"),
        eq(M.n, M.args.n),
    ]
)
comparisons: st.SearchStrategy[Binary] = st.sampled_from([eq, gt, gte, lt, lte])
patterns = st.sampled_from(["%r%", "w_iter", "%", "_", "", "W%", "%e_", "\\%"])
leaves: st.SearchStrategy[Expression] = st.one_of(
    st.builds(call2, st.just(eq), st.just(M.target_agent), st.sampled_from(AGENTS)),
    st.builds(call2, comparisons, numbers, st.sampled_from([0, 1, 0.5, True, "1"])),
    st.builds(call2, comparisons, st.just(M.created_at), st.sampled_from(INSTANTS)),
    st.builds(call2, comparisons, fields, fields),
    st.builds(
        call2,
        st.just(in_array),
        numbers | st.just(M.target_agent),
        st.lists(st.sampled_from([1, True, "writer", 0.5]), max_size=3),
    ),
    st.builds(call2, st.sampled_from([like, ilike]), st.just(M.target_agent), patterns),
    st.builds(call2, st.just(in_array), numbers, st.just(M.args)),
    st.builds(call, st.sampled_from([is_null, is_undefined]), fields),
    st.sampled_from([M.done, synced(M)]),
)


def _combined(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    return st.one_of(
        st.builds(not_, inner),
        st.builds(and_, inner, inner),
        st.builds(or_, inner, inner, inner),
        st.builds(call2, st.just(eq), inner, inner),
    )


conditions = st.recursive(leaves, _combined, max_leaves=6)
directions: st.SearchStrategy[Direction] = st.sampled_from(["asc", "desc"])
# Few values, so that rows often order alike.
order_values = st.sampled_from([M.done, M.done, M.done, M.args.n]) | scalars
selections = st.dictionaries(st.sampled_from("xyz"), scalars | st.just(M), min_size=1)
totals: st.SearchStrategy[Expression] = st.one_of(
    st.just(count()),
    st.builds(call, st.sampled_from([sum_, avg, min_, max_, count]), scalars),
    st.builds(call2, st.just(add), st.builds(sum_, numbers), st.just(count())),
)


def one_in(times: int) -> st.SearchStrategy[bool]:
    return st.sampled_from([*[False] * (times - 1), True])


@st.composite
def queries(draw: st.DrawFn) -> Query[Any]:
    query: Query[Any] = build(lambda q: q.from_(m=Messages()))
    if draw(one_in(3)):
        condition = draw(conditions)
        query = query.where(lambda m, condition=condition: condition)
    query = _grouped(query, draw) if draw(one_in(3)) else _plain(query, draw)
    if draw(one_in(3)):
        query = query.distinct()
    if draw(one_in(2)):
        query = query.offset(draw(st.integers(0, 2)))
    if not draw(one_in(3)):
        query = query.limit(draw(st.sampled_from([2, 1, 3, 4, 0])))
    if draw(one_in(8)):
        query = query.find_one()
    return build(query)


def _plain(query: Query[Any], draw: st.DrawFn) -> Query[Any]:
    few = 0 if draw(one_in(3)) else 1
    for value in draw(st.lists(order_values, min_size=few, max_size=2)):
        query = query.order_by(lambda m, value=value: value, draw(directions))
    if draw(one_in(2)):
        selection = draw(selections)
        query = query.select(lambda m: dict(selection))
    return query


def _grouped(query: Query[Any], draw: st.DrawFn) -> Query[Any]:
    by = draw(st.lists(scalars, max_size=2))
    computed = draw(st.lists(totals, min_size=1, max_size=3))
    if by:
        query = query.group_by(lambda m: by)
    if draw(one_in(2)):
        having = draw(st.sampled_from([gt(count(), 1), lt(sum_(M.n), 2), ~is_null(max_(M.n))]))
        query = query.having(lambda m: having)
    for value in draw(st.lists(st.sampled_from([*by, *computed]), max_size=2)):
        query = query.order_by(lambda m, value=value: value, draw(directions))
    return query.select(lambda m: {f"x{at}": value for at, value in enumerate([*by, *computed])})
