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
    Node,
    Reference,
    evaluate,
    is_aggregate,
    substitute,
    walk,
)
from aidb_ray.query.builder import Outputs, Query
from aidb_ray.query.operators import Delta, Pipeline, RowChange
from tests.property.questions import FIELD_VALUES, Key, Row, queries, rows

Table = dict[Key, tuple[Row, bool]]
Commit = dict[Key, tuple[Row, bool] | None]
Place = list[tuple[Any, bool]]

keys = st.tuples(st.sampled_from(["aidb://a/1", "aidb://a/2"]), st.sampled_from("abcdef"))
written = st.tuples(rows, st.booleans())
commits: st.SearchStrategy[list[Commit]] = st.lists(
    st.dictionaries(keys, st.one_of(written, written, written, st.none()), min_size=3, max_size=8),
    min_size=2,
    max_size=8,
)


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

    @settings(max_examples=300, deadline=None)
    @given(queries(), commits)
    def law(query: Query[Any], program: list[Commit]) -> None:
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
