"""A query as stages that pass rows on. Pure.

Rows of a source that meet its conditions run through the joins, one `Joined` for each source but
the first, then through what `where` left for the end, to `Groups` if there are any, to `_Rows`,
which orders and selects, to `Distinct` if asked for, to the answer. A query that is read by
another one ends where that one's rows begin. Each stage takes `put(key, ..., revision)`: this
key's row is now so, or is gone. Stages that speak once a step do so in `flush`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from aidb_ray.expressions import (
    SYNCED,
    Call,
    Constant,
    Node,
    Reference,
    SourceRef,
    Test,
    Value,
    compile_predicate,
    compile_value,
    is_aggregate,
    substitute,
    walk,
)
from aidb_ray.query.aggregates import AGGREGATES, Aggregate
from aidb_ray.query.answer import Distinct, Key, Placed, Row, Window
from aidb_ray.query.groups import Groups, Keyed, aggregate_name, common_name
from aidb_ray.query.joined import Joined
from aidb_ray.query.ordering import Place, compile_order, rank
from aidb_ray.query.outputs import Outputs, map_outputs
from aidb_ray.query.plan import Plan, plan_of
from aidb_ray.query.query import Query, UnionAll


@dataclass(frozen=True, slots=True)
class Input:
    """Rows of one collection, as far as a query reads them.

    Attributes:
        name: The alias; in a query that is read by others, behind theirs: `outer.inner`. A query
            of a union is called by its number.
        condition: What the rows must meet, whatever else is asked of them.
    """

    name: str
    source: SourceRef[Any]
    condition: Node | None


class Entrance:
    """Where the rows of an input go in. Keeps nothing."""

    def __init__(self, wanted: Input, target: Keyed, *, marks_synced: bool) -> None:
        self.input = wanted
        self._put = _filtered(wanted.condition, target).put
        self._marks_synced = marks_synced

    def put(self, key: Key, row: Row | None, revision: int, *, synced: bool) -> None:
        """Take in a row as it is now, None if it is gone."""
        if row is not None and self._marks_synced:
            row = {**row, SYNCED: synced}
        self._put(key, row, revision)


class Circuit:
    """The stages of a query, up to where its answer is kept.

    Attributes:
        entrances: By name, where rows go in.
    """

    def __init__(self, query: Query[Any], answer: Placed) -> None:
        self.entrances: dict[str, Entrance] = {}
        self._flushes: list[Callable[[], None]] = []
        self._connect(query, answer, "")

    def flush(self) -> None:
        """Let the stages say what this step has come to, those first that others read."""
        for flush in self._flushes:
            flush()

    def _connect(
        self, query: Query[Any], end: Placed, path: str, *, is_ordered: bool = True
    ) -> None:
        plan = plan_of(query)
        is_joined = query.is_joined
        target = Distinct(end) if query.is_distinct else end
        groups, first = _last_stages(query, target, is_ordered=is_ordered or query.is_distinct)
        if plan.rest is not None:
            first = _Filter(compile_predicate(plan.rest, joined=True), first)
        doors = _join_stages(plan, first) if is_joined else {}
        for alias, source in query.scope.items():
            door = doors.get(alias, first)
            if is_joined and alias == query.sources[0][0]:
                door = _Named(alias, door)
            names = query.fields_read(alias) if is_joined else None
            if names is not None:
                door = _Narrowed(names, door)
            condition = plan.conditions.get(alias)
            if isinstance(source, SourceRef):
                wanted = Input(path + alias, source, condition)
                marks_synced = alias in query.reads_synced
                entrance = Entrance(wanted, door, marks_synced=marks_synced)
                self.entrances[wanted.name] = entrance
            else:
                self._connect_queries(source, _filtered(condition, door), f"{path}{alias}.")
        if groups is not None:
            self._flushes.append(groups.flush)

    def _connect_queries(self, source: Query[Any] | UnionAll[Any], door: Keyed, path: str) -> None:
        if isinstance(source, UnionAll):
            for number, query in enumerate(source.queries):
                self._connect_query(query, _Numbered(number, door), f"{path}{number}.")
        else:
            self._connect_query(source, door, path)

    def _connect_query(self, query: Query[Any], door: Keyed, path: str) -> None:
        window = make_window(query, _as_it_is)
        if window is None:
            self._connect(query, _Unplaced(door), path, is_ordered=False)
        else:
            self._connect(query, window, path)
            self._flushes.append(partial(_pass_on, window, door))


def make_window(query: Query[Any], show: Callable[[Row], Any]) -> Window | None:
    """Return what keeps the rows of a query that is asked for a part of them, else None."""
    begin, end = query.window
    if begin == 0 and end is None:
        return None
    return Window(show, begin, sys.maxsize if end is None else end)


def _as_it_is(row: Row) -> Row:
    return row


def _pass_on(window: Window, target: Keyed) -> None:
    for op, entry, revision in window.flush():
        target.put(entry.key, None if op == "exit" else entry.raw, revision)


def _filtered(condition: Node | None, target: Keyed) -> Keyed:
    return target if condition is None else _Filter(compile_predicate(condition), target)


def _join_stages(plan: Plan, target: Keyed) -> dict[str, Keyed]:
    """Return where the rows of each source go in; those of the first as rows by alias."""
    doors: dict[str, Keyed] = {}
    for join in reversed(plan.joins):
        stage = Joined(join, target)
        doors[join.alias] = stage.right
        target = stage.left
    doors[plan.joins[0].earlier[0]] = target
    return doors


class _Filter:
    """Passes on rows that meet a condition. Keeps nothing."""

    def __init__(self, keeps: Test, target: Keyed) -> None:
        self._keeps = keeps
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        self._target.put(key, row if row is not None and self._keeps(row) else None, revision)


class _Narrowed:
    """Leaves of rows that a join keeps only what is asked of them. Keeps nothing itself."""

    def __init__(self, names: frozenset[str], target: Keyed) -> None:
        self._names = names
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        if row is not None:
            row = {name: row[name] for name in self._names if name in row}
        self._target.put(key, row, revision)


class _Named:
    """Makes rows of the first source rows by alias. Keeps nothing."""

    def __init__(self, alias: str, target: Keyed) -> None:
        self._alias = alias
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        self._target.put((key,), None if row is None else {self._alias: row}, revision)


class _Numbered:
    """Tells the rows of one query of a union from those of the others. Keeps nothing."""

    def __init__(self, number: int, target: Keyed) -> None:
        self._number = number
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        self._target.put((self._number, key), row, revision)


class _Unplaced:
    """Hands the rows of a query on to another one, which has its own order. Keeps nothing."""

    def __init__(self, target: Keyed) -> None:
        self._target = target

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        self._target.put(key, None if place is None else raw, revision)


class _Rows:
    """Orders rows and selects from them. Keeps nothing."""

    def __init__(self, order: Callable[[Key, Row], Place], select: Value, target: Placed) -> None:
        self._order = order
        self._select = select
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        if row is None:
            self._target.put(key, None, None, revision)
        else:
            self._target.put(key, self._order(key, row), self._select(row), revision)


def _last_stages(
    query: Query[Any], target: Placed, *, is_ordered: bool
) -> tuple[Groups | None, Keyed]:
    """Return the stage with groups, if there is one, and the one that rows go into."""
    if query.is_grouped:
        groups = _group_stage(query, target)
        return groups, groups
    terms = [(term.node, term.descending) for term in query.ordering] if is_ordered else []
    values = compile_order(terms, joined=query.is_joined)
    # Keys of collections can be compared as they are.
    is_plain = not query.is_joined and isinstance(query.sources[0][1], SourceRef)
    place = _place(values, None if is_plain or not is_ordered else rank)
    return None, _Rows(place, _select(query), target)


def _place(
    values: Callable[[Row], Place] | None, rank_of: Callable[[Key], Any] | None
) -> Callable[[Key, Row], Place]:
    """Return a function that gives a row's place, which ends in its key and equals no other."""
    if rank_of is None:
        if values is None:
            return lambda key, _row: (key,)
        return lambda key, row: (*values(row), key)
    if values is None:
        return lambda key, _row: (rank_of(key), key)
    return lambda key, row: (*values(row), rank_of(key), key)


def _group_stage(query: Query[Any], target: Placed) -> Groups:
    swap, by, aggregates = _parts_of_groups(query)

    def in_group(node: Node) -> Node:
        return substitute(node, swap)

    ordering = [(in_group(term.node), term.descending) for term in query.ordering]
    # Groups that order alike are ordered by the values that make them.
    ordering += [(in_group(node), False) for node in query.grouping or ()]
    select = _compile_outputs(map_outputs(query.outputs or (), in_group), {}, joined=False)
    rows = _Rows(_place(compile_order(ordering), None), select, target)
    having = query.group_predicate
    keeps = None if having is None else compile_predicate(in_group(having))
    return Groups(by, aggregates, keeps, rows)


def _parts_of_groups(
    query: Query[Any],
) -> tuple[dict[Node, Node], list[Value], list[tuple[Value, Callable[[], Aggregate]]]]:
    """Return where a group's row has what a query speaks of, and how to compute it."""
    swap: dict[Node, Node] = {}
    by: list[Value] = []
    for index, node in enumerate(query.grouping or ()):
        swap.setdefault(node, Reference("group", (common_name(index),)))
        by.append(compile_value(node, joined=query.is_joined))
    aggregates: list[tuple[Value, Callable[[], Aggregate]]] = []
    for node in query.nodes():
        for part in walk(node):
            if isinstance(part, Call) and is_aggregate(part) and part not in swap:
                swap[part] = Reference("group", (aggregate_name(len(aggregates)),))
                # Every row counts, as a constant is never null.
                counted = part.args[0] if part.args else Constant(1)
                value = compile_value(counted, joined=query.is_joined)
                aggregates.append((value, AGGREGATES[part.op]))
    return swap, by, aggregates


def _select(query: Query[Any]) -> Value:
    """Return a function of a row that makes the row of the answer, its parts not yet decoded."""
    marked = {alias: _without_synced(alias, query) for alias in query.reads_synced}
    if query.outputs is not None:
        return _compile_outputs(query.outputs, marked, joined=query.is_joined)
    if query.is_joined:
        return lambda rows: {**rows, **{alias: bare(rows) for alias, bare in marked.items()}}
    return next(iter(marked.values()), _as_it_is)


def _without_synced(alias: str, query: Query[Any]) -> Value:
    def bare(row: Row | None) -> Row | None:
        if row is None:
            return None
        return {name: value for name, value in row.items() if name != SYNCED}

    return (lambda rows: bare(rows[alias])) if query.is_joined else bare


def _compile_outputs(outputs: Outputs, marked: Mapping[str, Value], *, joined: bool) -> Value:
    parts: list[tuple[str, Value]] = []
    for name, output in outputs:
        match output:
            case tuple():
                parts.append((name, _compile_outputs(output, marked, joined=joined)))
            case Reference(alias, ()) if alias in marked:
                parts.append((name, marked[alias]))
            case _:
                parts.append((name, compile_value(output, joined=joined)))
    return lambda row: {name: value(row) for name, value in parts}
