"""Queries answered incrementally: changes of rows in, deltas of the answer out. Pure.

Rows run through `Pipeline`, which keeps those that meet the predicate, to `Groups` if there are
any, to `_Rows`, which orders and selects, to `Distinct` if asked for, to `Answer`. Each takes
`put(key, ..., revision)`: this key's row is now so, or is gone. A step costs what it changes, not
what the answer holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import msgspec

from aidb_ray.expressions import (
    SYNCED,
    Call,
    Constant,
    Node,
    Reference,
    SourceRef,
    Value,
    compile_predicate,
    compile_value,
    is_aggregate,
    substitute,
    walk,
)
from aidb_ray.query.aggregates import AGGREGATES, Aggregate
from aidb_ray.query.answer import Answer, Decode, Delta, Distinct, Key, Placed, Row, Window
from aidb_ray.query.builder import Outputs, Query, build, leaves
from aidb_ray.query.groups import Groups, Keyed, aggregate_name, common_name
from aidb_ray.query.ordering import Place, compile_order

__all__ = ["Delta", "Pipeline", "RowChange"]

R = TypeVar("R")


class RowChange(msgspec.Struct, frozen=True):
    """One row of a source as it is now; `row` is None when it is gone.

    Attributes:
        alias: The source, as the query calls it.
        key: Identifies the row in its source; keys of one source can be compared.
        row: Its fields by wire name. It is kept, so it must not be changed afterwards.
        revision: The commit that made it so.
        synced: False while an optimistic write of this process to it is outstanding.
    """

    alias: str
    key: Any
    row: Row | None
    revision: int
    synced: bool = True


class Pipeline(Generic[R]):
    """A query with the answer to all changes so far.

    It keeps the rows that meet the predicate, of a query with groups only what their aggregates
    need, and nothing of other rows.
    """

    def __init__(self, query: Query[R], *, decode: Decode | None = None) -> None:
        """Begin with no rows.

        Args:
            query: What is asked.
            decode: Makes a source's row what its reader gets. By default its `row_type`.
        """
        query = build(query)
        (self._alias, source), *_ = query.sources
        self._keeps = None if query.predicate is None else compile_predicate(query.predicate)
        self._marks_synced = query.reads_synced
        self._answer = _answer(query, _show(query, decode or _decoder(source)))
        target: Placed = Distinct(self._answer) if query.is_distinct else self._answer
        self._groups, self._first = _stages(query, target)
        self._rows: list[R] | None = None
        self._revision = 0

    @property
    def rows(self) -> list[R]:
        """The answer, in order.

        Raises:
            QueryError: a row is not what its type or `select` requires (`invalid_row`).
        """
        if self._rows is None:
            self._rows = [entry.row() for entry in self._answer.in_order()]
        return self._rows.copy()

    def enters(self) -> list[Delta[R]]:
        """Return the answer as deltas for someone who knows nothing of it yet, in order.

        Their revision is that of the newest change taken in.
        """
        return [Delta.of("enter", entry, self._revision) for entry in self._answer.in_order()]

    def advance(self, changes: Iterable[RowChange]) -> list[Delta[R]]:
        """Take in the changes of one commit or snapshot, and return what they do to the answer.

        There is at most one delta for each key: exits first, then the others, both in the order
        of the answer. A row that only moves gives none. No row can make this fail; one that
        cannot be decoded fails whoever looks at it.
        """
        keeps, put, marks_synced = self._keeps, self._first.put, self._marks_synced
        newest = self._revision
        for change in changes:
            assert change.alias == self._alias, f"{change.alias!r} is not {self._alias!r}"
            row = change.row
            if row is not None and marks_synced:
                row = {**row, SYNCED: change.synced}
            if row is not None and keeps is not None and not keeps(row):
                row = None
            put(change.key, row, change.revision)
            newest = max(newest, change.revision)
        self._revision = newest
        if self._groups is not None:
            self._groups.flush()
        if not self._answer.touched:
            return []
        self._rows = None
        return [Delta.of(*move) for move in self._answer.flush()]

    def restart(self, snapshot: Iterable[RowChange], *, revision: int) -> list[Delta[R]]:
        """Take in all rows there are at `revision`; those that are not among them are gone."""
        present = list(snapshot)
        keys = {change.key for change in present}
        for key in set(self._first.keys()) - keys:
            self._first.put(key, None, revision)
        self._revision = max(self._revision, revision)
        return self.advance(present)


class _Rows:
    """Orders rows and selects from them. Keeps nothing."""

    def __init__(
        self,
        order: Callable[[Row], Place] | None,
        select: Value | None,
        target: Placed,
    ) -> None:
        self._order = order
        self._select = select
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        if row is None:
            self._target.put(key, None, None, revision)
        else:
            raw = row if self._select is None else self._select(row)
            place = (key,) if self._order is None else (*self._order(row), key)
            self._target.put(key, place, raw, revision)

    def keys(self) -> Iterable[Key]:
        return self._target.keys()


def _answer(query: Query[Any], show: Decode) -> Answer:
    begin, end = query.window
    if begin == 0 and end is None:
        return Answer(show)
    return Window(show, begin, sys.maxsize if end is None else end)


def _stages(query: Query[Any], target: Placed) -> tuple[Groups | None, Keyed]:
    """Return the stage with groups, if there is one, and the one that rows go into."""
    if not query.is_grouped:
        order = compile_order([(term.node, term.descending) for term in query.ordering])
        return None, _Rows(order, _select(query), target)
    swap, by, aggregates = _parts_of_groups(query)

    def in_group(node: Node) -> Node:
        return substitute(node, swap)

    ordering = [(in_group(term.node), term.descending) for term in query.ordering]
    # Keys of groups cannot be compared, as they may mix null and strings; their values can.
    ordering += [(in_group(node), False) for node in query.grouping or ()]
    outputs = _map_outputs(query.outputs or (), in_group)
    rows = _Rows(compile_order(ordering), _compile_outputs(outputs), target)
    having = query.group_predicate
    keeps = None if having is None else compile_predicate(in_group(having))
    groups = Groups(by, aggregates, keeps, rows)
    return groups, groups


def _parts_of_groups(
    query: Query[Any],
) -> tuple[dict[Node, Node], list[Value], list[tuple[Value, Callable[[], Aggregate]]]]:
    """Return where a group's row has what a query speaks of, and how to compute it."""
    swap: dict[Node, Node] = {}
    by: list[Value] = []
    for index, node in enumerate(query.grouping or ()):
        swap.setdefault(node, Reference("group", (common_name(index),)))
        by.append(compile_value(node))
    aggregates: list[tuple[Value, Callable[[], Aggregate]]] = []
    for node in query.nodes():
        for part in walk(node):
            if isinstance(part, Call) and is_aggregate(part) and part not in swap:
                swap[part] = Reference("group", (aggregate_name(len(aggregates)),))
                # Every row counts, as a constant is never null.
                counted = part.args[0] if part.args else Constant(1)
                aggregates.append((compile_value(counted), AGGREGATES[part.op]))
    return swap, by, aggregates


def _select(query: Query[Any]) -> Value | None:
    whole = _without_synced if query.reads_synced else None
    if query.outputs is None:
        return whole
    return _compile_outputs(query.outputs, whole)


def _without_synced(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != SYNCED}


def _compile_outputs(outputs: Outputs, whole: Value | None = None) -> Value:
    """Return a function of a row that makes the row of the answer, its parts not yet decoded."""
    parts: list[tuple[str, Value]] = []
    for name, output in outputs:
        if isinstance(output, tuple):
            parts.append((name, _compile_outputs(output, whole)))
        elif _is_row(output) and whole is not None:
            parts.append((name, whole))
        else:
            parts.append((name, compile_value(output)))
    return lambda row: {name: value(row) for name, value in parts}


def _map_outputs(outputs: Outputs, change: Callable[[Node], Node]) -> Outputs:
    return tuple(
        (name, _map_outputs(out, change) if isinstance(out, tuple) else change(out))
        for name, out in outputs
    )


def _is_row(node: Node) -> bool:
    return isinstance(node, Reference) and not node.path


def _show(query: Query[Any], decode: Decode) -> Decode:
    """Return what makes a row of the answer the thing that its reader gets."""
    outputs, into = query.outputs, query.into
    if outputs is None:
        return decode
    has_rows = any(map(_is_row, leaves(outputs)))

    def show(raw: Row) -> Any:
        row = _decode_rows(raw, outputs, decode) if has_rows else dict(raw)
        return row if into is None else into(**row)

    return show


def _decode_rows(raw: Row, outputs: Outputs, decode: Decode) -> Row:
    decoded: Row = {}
    for name, output in outputs:
        if isinstance(output, tuple):
            decoded[name] = _decode_rows(raw[name], output, decode)
        else:
            decoded[name] = decode(raw[name]) if _is_row(output) else raw[name]
    return decoded


def _decoder(source: SourceRef[Any]) -> Decode:
    row_type: Any = source.row_type
    if row_type is None or row_type is dict:
        return dict
    validate: Decode | None = getattr(row_type, "model_validate", None)
    return validate or (lambda row: row_type(**row))
