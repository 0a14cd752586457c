"""Queries answered incrementally: changes of rows in, deltas of the answer out. Pure.

Rows run through `Pipeline`, which keeps those that meet the predicate, to `_Groups` if there are
any, to `_Rows`, which orders and selects, to `_Distinct` if asked for, to `_Answer`. Each takes
`put(key, ..., revision)`: this key's row is now so, or is gone. A step costs what it changes, not
what the answer holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, cast

import msgspec
from sortedcontainers import SortedList

from aidb_ray.errors import AidbError, QueryError
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
    identity,
    is_aggregate,
    substitute,
    walk,
)
from aidb_ray.query.aggregates import AGGREGATES, Aggregate
from aidb_ray.query.builder import Outputs, Query, build, leaves
from aidb_ray.query.ordering import Place, compile_order

R = TypeVar("R")

Key: TypeAlias = Hashable
Row: TypeAlias = "dict[str, Any]"
Decode: TypeAlias = Callable[[Row], Any]
Op: TypeAlias = Literal["enter", "update", "exit"]


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


class Delta(Generic[R]):
    """One row of an answer that is new, different or gone. It does not change.

    Attributes:
        op: `enter`, `update`, or `exit`.
        key: Identifies the row in the answer: the source's key, or the values that make a group
            or a distinct row what it is.
        revision: The commit that caused this; it may have changed another row than this one.
    """

    __slots__ = ("_entry", "key", "op", "revision")
    __match_args__ = ("op", "key", "row", "revision")

    def __init__(self, op: Op, key: Any, row: R, revision: int) -> None:
        self._begin(op, _Entry(key, (), None, lambda _raw: row), revision)

    @classmethod
    def of(cls, op: Op, entry: _Entry, revision: int) -> Delta[R]:
        """Return a delta whose row is decoded when someone looks at it."""
        delta = cls.__new__(cls)
        delta._begin(op, entry, revision)
        return delta

    def _begin(self, op: Op, entry: _Entry, revision: int) -> None:
        self.op: Op = op
        self.key: Any = entry.key
        self.revision = revision
        self._entry = entry

    @property
    def row(self) -> R:
        """The row as it is now; at `exit` as it was.

        Raises:
            QueryError: the row is not what its type or `select` requires (`invalid_row`).
        """
        return self._entry.row()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        ours, theirs = self._to_tuple(), cast("Delta[Any]", other)._to_tuple()
        return ours == theirs

    __hash__ = None

    def __repr__(self) -> str:
        op, key, row, revision = self._to_tuple()
        return f"Delta({op!r}, {key!r}, {row!r}, revision={revision})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Delta, self._to_tuple()

    def _to_tuple(self) -> tuple[Op, Any, R, int]:
        return self.op, self.key, self.row, self.revision


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
        target: _Placed = _Distinct(self._answer) if query.is_distinct else self._answer
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
        return self.advance(present)


class _Keyed(Protocol):
    """A stage that takes rows by key."""

    def put(self, key: Key, row: Row | None, revision: int) -> None: ...

    def keys(self) -> Iterable[Key]: ...


class _Placed(Protocol):
    """A stage that takes rows of the answer with their place in it."""

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None: ...

    def keys(self) -> Iterable[Key]: ...


class _Rows:
    """Orders rows and selects from them. Keeps nothing."""

    def __init__(
        self,
        order: Callable[[Row], Place],
        select: Value | None,
        target: _Placed,
    ) -> None:
        self._order = order
        self._select = select
        self._target = target

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        if row is None:
            self._target.put(key, None, None, revision)
        else:
            raw = row if self._select is None else self._select(row)
            self._target.put(key, (*self._order(row), key), raw, revision)

    def keys(self) -> Iterable[Key]:
        return self._target.keys()


class _Groups:
    """Sums up rows that agree in some values, and passes on one row for each such group."""

    def __init__(
        self,
        by: list[Value],
        aggregates: list[tuple[Value, Callable[[], Aggregate]]],
        keeps: Test | None,
        target: _Keyed,
    ) -> None:
        self._by = by
        self._values = [value for value, _make in aggregates]
        self._makers = [make for _value, make in aggregates]
        self._keeps = keeps
        self._target = target
        self._members: dict[Key, tuple[Key, list[Any]]] = {}
        self._groups: dict[Key, _Group] = {}
        self._touched: dict[Key, int] = {}

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        if (member := self._members.pop(key, None)) is not None:
            self._leave(*member, revision)
        if row is not None:
            common = [_as_whole(value(row)) for value in self._by]
            name = tuple(map(identity, common))
            values = [value(row) for value in self._values]
            self._members[key] = name, values
            self._join(name, common, values, revision)

    def _leave(self, name: Key, values: list[Any], revision: int) -> None:
        group = self._groups[name]
        group.size -= 1
        if not group.size:
            del self._groups[name]
        for aggregate, value in zip(group.aggregates, values, strict=True):
            aggregate.remove(value)
        self._touched[name] = revision

    def _join(self, name: Key, common: list[Any], values: list[Any], revision: int) -> None:
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(common, [make() for make in self._makers])
        group.size += 1
        for aggregate, value in zip(group.aggregates, values, strict=True):
            aggregate.add(value)
        self._touched[name] = revision

    def keys(self) -> Iterable[Key]:
        return self._members.keys()

    def flush(self) -> None:
        """Pass on the groups that have changed, once each."""
        for name, revision in self._touched.items():
            group = self._groups.get(name)
            row = None if group is None else group.to_row()
            if row is not None and self._keeps is not None and not self._keeps(row):
                row = None
            self._target.put(name, row, revision)
        self._touched.clear()


class _Group:
    __slots__ = ("aggregates", "common", "size")

    def __init__(self, common: list[Any], aggregates: list[Aggregate]) -> None:
        self.common = common
        self.aggregates = aggregates
        self.size = 0

    def to_row(self) -> Row:
        row = {_common(index): value for index, value in enumerate(self.common)}
        for index, aggregate in enumerate(self.aggregates):
            row[_aggregate(index)] = aggregate.result()
        return row


def _as_whole(value: Any) -> Any:
    """Show the same for 1 and 1.0, which are in one group, whichever came first."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _common(index: int) -> str:
    return f"common{index}"


def _aggregate(index: int) -> str:
    return f"aggregate{index}"


class _Entry:
    """A row of the answer: as computed and, once someone looked, as readers get it."""

    __slots__ = ("_show", "_shown", "key", "place", "raw")

    def __init__(self, key: Key, place: Place, raw: Any, show: Decode) -> None:
        self.key = key
        self.place = place
        self.raw = raw
        self._show: Decode | None = show
        self._shown: Any = None

    def row(self) -> Any:
        if self._show is not None:
            try:
                self._shown = self._show(self.raw)
            except (AidbError, TypeError, ValueError) as error:
                raise QueryError(
                    f"The row {self.key!r} is not what its reader asks for: {error}",
                    code="invalid_row",
                ) from error
            self._show = None
        return self._shown


class _Distinct:
    """Passes on the first of equal rows, under a key made of what they have in common."""

    def __init__(self, target: _Placed) -> None:
        self._target = target
        self._members: dict[Key, tuple[Key, Place, Any]] = {}
        self._places: dict[Key, SortedList[Place]] = {}

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        touched: dict[Key, None] = {}
        if (member := self._members.pop(key, None)) is not None:
            content, old_place, _raw = member
            places = self._places[content]
            places.remove(old_place)
            if not places:
                del self._places[content]
            touched[content] = None
        if place is not None:
            content = identity(raw)
            self._members[key] = content, place, raw
            self._places.setdefault(content, SortedList()).add(place)
            touched[content] = None
        for content in touched:
            self._pass_on(content, revision)

    def _pass_on(self, content: Key, revision: int) -> None:
        places = self._places.get(content)
        if places is None:
            self._target.put(content, None, None, revision)
        else:
            first = places[0]
            self._target.put(content, (*first, content), self._members[first[-1]][2], revision)

    def keys(self) -> Iterable[Key]:
        return self._members.keys()


class _Answer:
    """All rows, put in order when they are read."""

    def __init__(self, show: Decode) -> None:
        self._show = show
        self._entries: dict[Key, _Entry] = {}
        # What readers had of a row before this step, and the latest commit that touched it.
        self.touched: dict[Key, tuple[_Entry | None, int]] = {}

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        before = self._entries.get(key)
        if place is not None:
            self._entries[key] = _Entry(key, place, raw, self._show)
        elif before is not None:
            del self._entries[key]
        else:
            return
        self._touch(key, before, revision)

    def _touch(self, key: Key, before: _Entry | None, revision: int) -> None:
        touched = self.touched.get(key)
        self.touched[key] = (before if touched is None else touched[0]), revision

    def keys(self) -> Iterable[Key]:
        return self._entries.keys()

    def in_order(self) -> Iterator[_Entry]:
        return iter(sorted(self._entries.values(), key=_place_of))

    def _visible(self, key: Key) -> _Entry | None:
        return self._entries.get(key)

    def flush(self) -> list[tuple[Op, _Entry, int]]:
        """Return what readers have to learn since the last time, in the order of the answer."""
        gone: list[tuple[Op, _Entry, int]] = []
        here: list[tuple[Op, _Entry, int]] = []
        for key, (before, revision) in self.touched.items():
            after = self._visible(key)
            if before is None:
                if after is not None:
                    here.append(("enter", after, revision))
            elif after is None:
                gone.append(("exit", before, revision))
            elif not _same(before.raw, after.raw):
                here.append(("update", after, revision))
        self.touched.clear()
        gone.sort(key=_place_of_move)
        here.sort(key=_place_of_move)
        return gone + here


class _Window(_Answer):
    """Rows of which only those from `begin` to before `end` are the answer.

    A row that comes or goes shifts those behind it, so at most one row moves over each edge.
    Costs O(log n) for each row that changes.
    """

    def __init__(self, show: Decode, begin: int, end: int) -> None:
        super().__init__(show)
        self._begin = begin
        self._end = end
        self._places: SortedList[Place] = SortedList()

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        before = self._entries.get(key)
        if before is not None and before.place == place:
            self._entries[key] = _Entry(key, before.place, raw, self._show)
            if self._visible(key) is not None:
                self._touch(key, before, revision)
            return
        if before is not None:
            self._remove(before, revision)
        if place is not None:
            self._insert(_Entry(key, place, raw, self._show), revision)

    def _remove(self, entry: _Entry, revision: int) -> None:
        at = self._places.bisect_left(entry.place)
        del self._places[at]
        del self._entries[entry.key]
        if at >= self._end or self._begin == self._end:
            return
        leaving = entry if at >= self._begin else self._at(self._begin - 1)
        if leaving is not None:
            self._touch(leaving.key, leaving, revision)
        entering = self._at(self._end - 1)
        if entering is not None:
            self._touch(entering.key, None, revision)

    def _insert(self, entry: _Entry, revision: int) -> None:
        at = self._places.bisect_left(entry.place)
        self._places.add(entry.place)
        self._entries[entry.key] = entry
        if at >= self._end or self._begin == self._end:
            return
        entering = entry if at >= self._begin else self._at(self._begin)
        if entering is not None:
            self._touch(entering.key, None, revision)
        leaving = self._at(self._end)
        if leaving is not None:
            self._touch(leaving.key, leaving, revision)

    def _at(self, index: int) -> _Entry | None:
        return self._entries[self._places[index][-1]] if index < len(self._places) else None

    def in_order(self) -> Iterator[_Entry]:
        for place in self._places.islice(self._begin, self._end):
            yield self._entries[place[-1]]

    def _visible(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        return entry if self._begin <= self._places.bisect_left(entry.place) < self._end else None


def _place_of(entry: _Entry) -> Place:
    return entry.place


def _place_of_move(move: tuple[Op, _Entry, int]) -> Place:
    return move[1].place


def _same(before: Any, after: Any) -> bool:
    # Python takes 1 for True, and a reader may not; equal rows are rare enough to look twice.
    return before is after or (before == after and identity(before) == identity(after))


def _answer(query: Query[Any], show: Decode) -> _Answer:
    begin, end = query.window
    if begin == 0 and end is None:
        return _Answer(show)
    return _Window(show, begin, sys.maxsize if end is None else end)


def _stages(query: Query[Any], target: _Placed) -> tuple[_Groups | None, _Keyed]:
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
    groups = _Groups(by, aggregates, keeps, rows)
    return groups, groups


def _parts_of_groups(
    query: Query[Any],
) -> tuple[dict[Node, Node], list[Value], list[tuple[Value, Callable[[], Aggregate]]]]:
    """Return where a group's row has what a query speaks of, and how to compute it."""
    swap: dict[Node, Node] = {}
    by: list[Value] = []
    for index, node in enumerate(query.grouping or ()):
        swap.setdefault(node, Reference("group", (_common(index),)))
        by.append(compile_value(node))
    aggregates: list[tuple[Value, Callable[[], Aggregate]]] = []
    for node in query.nodes():
        for part in walk(node):
            if isinstance(part, Call) and is_aggregate(part) and part not in swap:
                swap[part] = Reference("group", (_aggregate(len(aggregates)),))
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
