"""Queries answered the obvious way: nested loops over all rows, one step after the other.

Works from the data of `Query` and from `evaluate` alone, so that it shares no mistake with what
answers queries incrementally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from functools import cmp_to_key
from typing import Any, cast

from aidb_ray.expressions import (
    SYNCED,
    Node,
    Reference,
    SourceRef,
    evaluate,
    identity,
    is_aggregate,
    substitute,
    walk,
)
from aidb_ray.query.outputs import Outputs
from aidb_ray.query.query import Query, UnionAll

Row = dict[str, Any]
Table = Mapping[Any, tuple[Row, bool]]
"""Rows by key, each with whether it is synced."""

Tables = Mapping[str, Table]
"""By the name of the collection."""

Env = dict[str, Any]
"""Rows by alias; None for one that an outer join did not find."""

Place = list[tuple[Any, bool]]
"""Values, most significant first, each with "is it descending?"."""


@dataclass
class Trace:
    """What happened on the way to an answer.

    Attributes:
        pairs: Keys of rows that a join found to be partners.
        lonely: Rows that an outer join kept without a partner.
        ties: Limits that cut between rows which order alike.
    """

    pairs: set[Any] = field(default_factory=set[Any])
    lonely: int = 0
    ties: int = 0


def evaluate_query(
    query: Query[Any], tables: Tables, trace: Trace | None = None
) -> list[tuple[Any, Any]]:
    """Return the answer in order, each row with its key."""
    trace = trace or Trace()
    found = [
        (key, env)
        for key, env in _joined(query, tables, trace)
        if query.predicate is None or evaluate(query.predicate, env) is True
    ]
    candidates = _groups(query, found) if query.is_grouped else _rows(query, found)
    candidates.sort(key=cmp_to_key(lambda a, b: _compare_places(a[0], b[0])))
    if query.is_distinct:
        first_of: dict[Any, tuple[Place, Any, Any]] = {}
        for place, _key, row in candidates:
            first_of.setdefault(identity(row), (place, identity(row), row))
        candidates = list(first_of.values())
    first, end = query.window
    if query.ordering and end and end < len(candidates):
        last_in, first_out = (candidates[at][0][: len(query.ordering)] for at in (end - 1, end))
        trace.ties += _compare_places(last_in, first_out) == 0
    return [(key, row) for _place, key, row in candidates[first:end]]


def _joined(query: Query[Any], tables: Tables, trace: Trace) -> list[tuple[Any, Env]]:
    envs: list[tuple[tuple[Any, ...], Env]] = [((), {})]
    for alias, source in query.sources:
        envs = [
            ((*key, other_key), {**env, alias: row})
            for key, env in envs
            for other_key, row in _rows_of(source, tables, trace)
        ]
    known = [alias for alias, _source in query.sources]
    for number, join in enumerate(query.joins):
        others = _rows_of(join.source, tables, trace)
        joined: list[tuple[tuple[Any, ...], Env]] = []
        met: set[int] = set()
        for key, env in envs:
            partners = [
                at
                for at, (_other_key, row) in enumerate(others)
                if evaluate(join.on, {**env, join.alias: row}) is True
            ]
            met.update(partners)
            for at in partners:
                joined.append(((*key, others[at][0]), {**env, join.alias: others[at][1]}))
                trace.pairs.add((number, key, others[at][0]))
            if not partners and join.join_type in ("left", "full"):
                joined.append(((*key, None), {**env, join.alias: None}))
                trace.lonely += 1
        for at, (other_key, row) in enumerate(others):
            if at not in met and join.join_type in ("right", "full"):
                joined.append(
                    ((*(None for _ in known), other_key), {**dict.fromkeys(known), join.alias: row})
                )
                trace.lonely += 1
        envs = joined
        known.append(join.alias)
    return [(key if query.is_joined else key[0], env) for key, env in envs]


def _rows_of(source: Any, tables: Tables, trace: Trace) -> list[tuple[Any, Any]]:
    match source:
        case SourceRef(name=name):
            return [(key, {**row, SYNCED: synced}) for key, (row, synced) in tables[name].items()]
        case UnionAll():
            union = cast("UnionAll[Any]", source)
            return [
                ((number, key), row)
                for number, query in enumerate(union.queries)
                for key, row in evaluate_query(query, tables, trace)
            ]
        case _:
            return evaluate_query(source, tables, trace)


def _rows(query: Query[Any], found: list[tuple[Any, Env]]) -> list[tuple[Place, Any, Any]]:
    result: list[tuple[Place, Any, Any]] = []
    for key, env in found:

        def value(node: Node, env: Env = env) -> Any:
            result = evaluate(node, env)
            return _bare(result) if isinstance(node, Reference) and not node.path else result

        place = [(value(term.node), term.descending) for term in query.ordering]
        if query.outputs is not None:
            row = _output(query.outputs, value)
        elif query.is_joined:
            row = {alias: _bare(part) for alias, part in env.items()}
        else:
            (row,) = map(_bare, env.values())
        result.append(([*place, (key, False)], key, row))
    return result


def _groups(query: Query[Any], found: list[tuple[Any, Env]]) -> list[tuple[Place, Any, Any]]:
    grouping = query.grouping or ()
    groups: dict[Any, list[Env]] = {}
    for _key, env in found:
        common = [evaluate(node, env) for node in grouping]
        groups.setdefault(tuple(map(identity, common)), []).append(env)

    result: list[tuple[Place, Any, Any]] = []
    for key, members in groups.items():

        def value(node: Node, members: list[Env] = members) -> Any:
            return _in_group(node, grouping, members)

        if query.group_predicate is None or value(query.group_predicate) is True:
            place = [(value(term.node), term.descending) for term in query.ordering]
            place += [(value(node), False) for node in grouping]
            result.append((place, key, _output(query.outputs or (), value)))
    return result


def _in_group(node: Node, grouping: Iterable[Node], members: list[Env]) -> Any:
    known: dict[Node, Any] = {part: evaluate(part, members[0]) for part in grouping}
    for part in walk(node):
        if is_aggregate(part):
            known.setdefault(part, _aggregated(part, members))
    swap: dict[Node, Node] = {part: Reference("known", (str(at),)) for at, part in enumerate(known)}
    values = {str(at): value for at, value in enumerate(known.values())}
    return evaluate(substitute(node, swap), {"known": values})


def _aggregated(node: Any, members: list[Env]) -> Any:
    if not node.args:
        return len(members)
    values = [evaluate(node.args[0], env) for env in members]
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


def _bare(row: Row | None) -> Row | None:
    if row is None:
        return None
    return {name: value for name, value in row.items() if name != SYNCED}


def _compare_places(a: Place, b: Place) -> int:
    for (left, descending), (right, _same) in zip(a, b, strict=True):
        if result := _compare(left, right):
            return -result if descending else result
    return 0


def _compare(a: Any, b: Any) -> int:
    left, right = _rank_of_kind(a), _rank_of_kind(b)
    if left != right:
        return left - right
    if isinstance(a, (list, dict)):
        return _compare(repr(identity(a)), repr(identity(b)))
    if isinstance(a, tuple):
        for one, other in zip(cast("tuple[Any]", a), cast("tuple[Any]", b), strict=False):
            if result := _compare(one, other):
                return result
        return len(cast("tuple[Any]", a)) - len(cast("tuple[Any]", b))
    return 0 if a is None else (a > b) - (a < b)


def _rank_of_kind(value: object) -> int:
    kinds = [type(None), bool, (int, float), str, datetime, (list, dict), tuple]
    return next(at for at, kind in enumerate(kinds) if isinstance(value, kind))


def tag(value: Any) -> Any:
    """Make values equal exactly if a query takes them to be the same."""
    match value:
        case bool():
            return "boolean", value
        case list():
            return "list", tuple(map(tag, cast("list[Any]", value)))
        case dict():
            items = cast("dict[str, Any]", value).items()
            return "object", frozenset((name, tag(item)) for name, item in items)
        case _:
            return value
