"""A live query equals the same query run afresh, after every commit.

Random programs of inserts, updates and deletes run against random queries. The oracle below
answers a query in the obvious way, from the definitions in `Query` and `evaluate` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from fractions import Fraction
from functools import cmp_to_key
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from aidb_ray.expressions import (
    SYNCED,
    Expression,
    Field,
    Node,
    Ref,
    Reference,
    SourceRef,
    add,
    and_,
    avg,
    case_when,
    coalesce,
    count,
    eq,
    evaluate,
    gt,
    gte,
    in_array,
    is_aggregate,
    is_null,
    is_undefined,
    like,
    lt,
    max_,
    min_,
    multiply,
    not_,
    or_,
    substitute,
    sum_,
    synced,
    upper,
    walk,
)
from aidb_ray.query.builder import Outputs, Query, build
from aidb_ray.query.operators import Delta, Pipeline, RowChange

FIELDS = {
    "id": Field("id"),
    "target_agent": Field("targetAgent"),
    "done": Field("done"),
    "n": Field("n"),
    "created_at": Field("createdAt", "datetime"),
    "args": Field("args"),
}
SOURCE: SourceRef[Any] = SourceRef("messages", "aidb://support/1", FIELDS)
M = Ref(Reference("m", ()), FIELDS)

Row = dict[str, Any]
Key = tuple[str, str]
Table = dict[Key, tuple[Row, bool]]


class Messages:
    def as_source(self) -> SourceRef[Any]:
        return SOURCE


# Rows that fit badly, on purpose: other kinds, nulls, absent fields, instants written in many ways.

AGENTS = ["writer", "Writer", "é", "a", ""]
NUMBERS = [0, 1, 2, -1, 1.0, 0.5, 0.1, 0.2, 1e16, -1e16, 2**53 + 1]
INSTANTS = [
    "2026-01-01T00:00:29Z",
    "2026-01-01T00:00:29.5Z",
    "2026-01-01T02:00:29+02:00",
    "2026-01-01T00:00:30Z",
]
FIELD_VALUES = {
    "targetAgent": st.sampled_from([*AGENTS, None, 1]),
    "done": st.sampled_from([True, False, None, 1]),
    "n": st.sampled_from([*NUMBERS, None, "1", True]),
    "createdAt": st.sampled_from([*INSTANTS, None, "yesterday"]),
    "args": st.sampled_from([{"n": 1}, {"n": 1.0}, {"n": None}, {}, [1], None]),
}
rows = st.fixed_dictionaries(FIELD_VALUES) | st.fixed_dictionaries({}, optional=FIELD_VALUES)
keys = st.tuples(st.sampled_from(["aidb://support/1", "aidb://support/2"]), st.sampled_from("abcd"))
commits = st.lists(
    st.dictionaries(
        keys,
        st.one_of(*[st.tuples(rows, st.booleans())] * 3, st.none()),
        min_size=1,
        max_size=6,
    ),
    min_size=2,
    max_size=8,
)

fields = st.sampled_from([M.target_agent, M.done, M.n, M.created_at, M.args.n])
numbers = st.sampled_from([M.n, M.args.n, add(M.n, 1), multiply(M.n, M.args.n)])
scalars = st.sampled_from(
    [
        M.target_agent,
        M.done,
        M.n,
        M.created_at,
        M.args.n,
        upper(M.target_agent),
        coalesce(M.args.n, M.n),
        case_when(gt(M.n, 0), "positive", is_null(M.n), "none"),
    ]
)
comparisons = st.sampled_from([eq, gt, gte, lt])
leaves: st.SearchStrategy[Expression] = st.one_of(
    st.builds(eq, st.just(M.target_agent), st.sampled_from(AGENTS)),
    st.builds(
        lambda op, a, b: op(a, b), comparisons, numbers, st.sampled_from([0, 1, 0.5, True, "1"])
    ),
    st.builds(lambda op, text: op(M.created_at, text), comparisons, st.sampled_from(INSTANTS)),
    st.builds(lambda op, a, b: op(a, b), comparisons, fields, fields),
    st.builds(in_array, numbers | st.just(M.target_agent), st.lists(st.sampled_from([1, True, "writer", 0.5]), max_size=3)),
    st.builds(is_null, fields),
    st.builds(is_undefined, fields),
    st.builds(like, st.just(M.target_agent), st.sampled_from(["%r%", "w_iter", "%", "_", ""])),
    st.sampled_from([M.done, synced(M)]),
)
conditions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(not_, inner),
        st.builds(and_, inner, inner),
        st.builds(or_, inner, inner, inner),
    ),
    max_leaves=5,
)
orders = st.lists(st.tuples(scalars, st.sampled_from(["asc", "desc"])), max_size=2)
selections = st.dictionaries(st.sampled_from("xyz"), scalars | st.just(M), min_size=1)
aggregates = st.one_of(
    st.just(count()),
    st.builds(
        lambda fn, value: fn(value), st.sampled_from([sum_, avg, min_, max_, count]), scalars
    ),
    st.builds(lambda value: add(sum_(value), count()), numbers),
)


@st.composite
def queries(draw: st.DrawFn) -> Query[Any]:
    query: Query[Any] = build(lambda q: q.from_(m=Messages()))
    if draw(st.integers(0, 2)) == 2:
        condition = draw(conditions)
        query = query.where(lambda m, condition=condition: condition)
    if draw(st.integers(0, 2)) == 2:
        query = _grouped(query, draw)
    else:
        for value, direction in draw(orders):
            query = query.order_by(lambda m, value=value: value, cast("Any", direction))
        if draw(st.booleans()):
            selection = draw(selections)
            query = query.select(lambda m, selection=selection: selection)
    if draw(st.booleans()):
        query = query.distinct()
    if draw(st.booleans()):
        query = query.offset(draw(st.integers(0, 2)))
    if draw(st.booleans()):
        query = query.limit(draw(st.sampled_from([1, 2, 3, 4, 0])))
    if draw(st.integers(0, 7)) == 7:
        query = query.find_one()
    return build(query)


def _grouped(query: Query[Any], draw: st.DrawFn) -> Query[Any]:
    by = draw(st.lists(scalars, max_size=2))
    totals = draw(st.lists(aggregates, min_size=1, max_size=3))
    if by:
        query = query.group_by(lambda m: by)
    if draw(st.booleans()):
        having = draw(st.sampled_from([gt(count(), 1), lt(sum_(M.n), 2), ~is_null(max_(M.n))]))
        query = query.having(lambda m: having)
    for value in draw(st.lists(st.sampled_from([*by, *totals]), max_size=2)):
        direction = draw(st.sampled_from(["asc", "desc"]))
        query = query.order_by(lambda m, value=value: value, cast("Any", direction))
    selection = {f"x{index}": value for index, value in enumerate([*by, *totals])}
    return query.select(lambda m: selection)


# The oracle.


def evaluate_query(query: Query[Any], table: Table) -> list[Any]:
    """Answer a query from all rows, one step after the other."""
    found = [
        (key, {**row, SYNCED: synced})
        for key, (row, synced) in table.items()
        if query.predicate is None
        or evaluate(query.predicate, {"m": {**row, SYNCED: synced}}) is True
    ]
    candidates = _groups(query, found) if query.is_grouped else _rows(query, found)
    candidates.sort(key=cmp_to_key(lambda a, b: _compare_places(a[0], b[0])))
    answer = [output for _place, output in candidates]
    if query.is_distinct:
        answer = [row for at, row in enumerate(answer) if _tag(row) not in map(_tag, answer[:at])]
    first, end = query.window
    return answer[first:end]


Place = list[tuple[Any, bool]]


def _rows(query: Query[Any], found: list[tuple[Key, Row]]) -> list[tuple[Place, Any]]:
    def value(node: Node, row: Row) -> Any:
        result = evaluate(node, {"m": row})
        return _bare(row) if result is row else result

    return [
        (
            [*((value(term.node, row), term.descending) for term in query.ordering), (key, False)],
            _bare(row)
            if query.outputs is None
            else _output(query.outputs, lambda node, row=row: value(node, row)),
        )
        for key, row in found
    ]


def _groups(query: Query[Any], found: list[tuple[Key, Row]]) -> list[tuple[Place, Any]]:
    grouping = query.grouping or ()
    groups: dict[Any, list[Row]] = {}
    for _key, row in found:
        common = [evaluate(node, {"m": row}) for node in grouping]
        groups.setdefault(_tag(common), []).append(row)

    result: list[tuple[Place, Any]] = []
    for members in groups.values():

        def value(node: Node, members: list[Row] = members) -> Any:
            return _in_group(node, grouping, members)

        if query.group_predicate is None or value(query.group_predicate) is True:
            place = [(value(term.node), term.descending) for term in query.ordering]
            place += [(value(node), False) for node in grouping]
            result.append((place, _output(query.outputs or (), value)))
    return result


def _in_group(node: Node, grouping: Iterable[Node], members: list[Row]) -> Any:
    known: dict[Node, Any] = {part: evaluate(part, {"m": members[0]}) for part in grouping}
    for part in walk(node):
        if is_aggregate(part):
            known.setdefault(part, _aggregated(part, members))
    swap: dict[Node, Node] = {part: Reference("known", (str(at),)) for at, part in enumerate(known)}
    values = {str(at): value for at, value in enumerate(known.values())}
    return evaluate(substitute(node, swap), {"known": values})


def _aggregated(node: Any, members: list[Row]) -> Any:
    if not node.args:
        return len(members)
    values = [evaluate(node.args[0], {"m": row}) for row in members]
    present = [value for value in values if value is not None]
    numbers = [value for value in present if type(value) in (int, float)]
    exact = sum(map(Fraction, numbers), Fraction())
    match node.op:
        case "count":
            return len(present)
        case "sum":
            whole = all(isinstance(value, int) for value in numbers)
            return (int(exact) if whole else float(exact)) if numbers else None
        case "avg":
            return float(exact / len(numbers)) if numbers else None
        case op:
            plain = [value for value in present if not isinstance(value, (list, dict))]
            plain.sort(key=cmp_to_key(_compare))
            return plain[0 if op == "min" else -1] if plain else None


def _output(outputs: Outputs, value: Callable[[Node], Any]) -> dict[str, Any]:
    return {
        name: _output(node, value) if isinstance(node, tuple) else value(node)
        for name, node in outputs
    }


def _bare(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != SYNCED}


def _compare_places(a: Place, b: Place) -> int:
    for (left, descending), (right, _same) in zip(a, b, strict=True):
        if result := _compare(left, right):
            return -result if descending else result
    return 0


def _compare(a: Any, b: Any) -> int:
    kinds = [type(None), bool, (int, float), str, datetime, tuple]
    left, right = (next(i for i, kind in enumerate(kinds) if isinstance(v, kind)) for v in (a, b))
    if left != right:
        return left - right
    return 0 if a is None else (a > b) - (a < b)


def _tag(value: Any) -> Any:
    """Make values equal exactly if a query takes them to be the same."""
    match value:
        case bool():
            return "boolean", value
        case list():
            return "list", tuple(map(_tag, cast("list[Any]", value)))
        case dict():
            items = cast("dict[str, Any]", value).items()
            return "object", frozenset((name, _tag(item)) for name, item in items)
        case _:
            return value


# The law.


def fold(answer: dict[Any, Any], deltas: list[Delta[Any]]) -> None:
    assert len({delta.key for delta in deltas}) == len(deltas)
    ops = [delta.op for delta in deltas]
    assert ops == sorted(ops, key=lambda op: op != "exit")
    for delta in deltas:
        assert (delta.key in answer) == (delta.op != "enter")
        if delta.op == "exit":
            assert _tag(answer.pop(delta.key)) == _tag(delta.row)
        else:
            assert delta.op == "enter" or _tag(answer[delta.key]) != _tag(delta.row)
            answer[delta.key] = delta.row


def test_a_live_query_equals_the_same_query_run_afresh() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None)
    @given(queries(), commits)
    def law(query: Query[Any], program: list[dict[Key, tuple[Row, bool] | None]]) -> None:
        pipeline = Pipeline(query)
        table: Table = {}
        folded: dict[Any, Any] = {}
        traits: set[str] = set()
        for revision, commit in enumerate(program, 1):
            traits |= {"deletes"} if any(k in table and not commit[k] for k in commit) else set()
            changes = [
                RowChange("m", key, value and value[0], revision, synced=not value or value[1])
                for key, value in commit.items()
            ]
            for key, value in commit.items():
                table.pop(key, None)
                if value is not None:
                    table[key] = value

            deltas = pipeline.advance(changes)

            fresh = evaluate_query(query, table)
            assert list(map(_tag, pipeline.rows)) == list(map(_tag, fresh))
            fold(folded, deltas)
            assert Counter(map(_tag, folded.values())) == Counter(map(_tag, fresh))
            assert all(delta.revision == revision for delta in deltas)
            traits |= _traits(query, table, fresh)
        seen.update(traits | {"cases"})

    law()

    cases = seen.pop("cases")
    print({trait: f"{share / cases:.0%}" for trait, share in sorted(seen.items())})  # noqa: T201
    expected = {"deletes", "distinct", "groups", "nulls", "rows", "tie at a limit", "window moves"}
    assert expected <= seen.keys()


def _traits(query: Query[Any], table: Table, fresh: list[Any]) -> set[str]:
    traits = {"rows"} if fresh else set[str]()
    if any(None in row.values() or len(row) < len(FIELD_VALUES) for row, _synced in table.values()):
        traits.add("nulls")
    if fresh and query.is_grouped:
        traits.add("groups")
    if fresh and query.is_distinct:
        traits.add("distinct")
    if fresh and query.window != (0, None):
        traits.add("window moves")
    if query.window[1] and query.ordering and not query.is_grouped and not query.is_distinct:
        ordered = [
            [evaluate(term.node, {"m": row}) for term in query.ordering]
            for row, synced in table.values()
            if query.predicate is None
            or evaluate(query.predicate, {"m": {**row, SYNCED: synced}}) is True
        ]
        ordered.sort(
            key=cmp_to_key(
                lambda a, b: _compare_places(
                    [(v, t.descending) for v, t in zip(a, query.ordering, strict=True)],
                    [(v, t.descending) for v, t in zip(b, query.ordering, strict=True)],
                )
            )
        )
        end = query.window[1]
        if end < len(ordered) and _tag(ordered[end - 1]) == _tag(ordered[end]):
            traits.add("tie at a limit")
    return traits
