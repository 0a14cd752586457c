"""Groups of rows that agree in some values. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from aidb_ray.expressions import Test, Value, identity
from aidb_ray.query.aggregates import Aggregate
from aidb_ray.query.answer import Key, Row


class Keyed(Protocol):
    """A stage that takes rows by key."""

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        """Take in that the row of `key` is now `row`, or gone."""
        ...


class Groups:
    """Sums up rows that agree in some values, and passes on one row for each such group."""

    def __init__(
        self,
        by: list[Value],
        aggregates: list[tuple[Value, Callable[[], Aggregate]]],
        keeps: Test | None,
        target: Keyed,
    ) -> None:
        self._by = by
        self._values = [value for value, _make in aggregates]
        self._makers = [make for _value, make in aggregates]
        self._keeps = keeps
        self._target = target
        self._members: dict[Key, tuple[Key, list[Any]]] = {}
        self._groups: dict[Key, Group] = {}
        self._touched: dict[Key, int] = {}

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        """See `Keyed.put`."""
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
            group = self._groups[name] = Group(common, [make() for make in self._makers])
        group.size += 1
        for aggregate, value in zip(group.aggregates, values, strict=True):
            aggregate.add(value)
        self._touched[name] = revision

    def flush(self) -> None:
        """Pass on the groups that have changed, once each."""
        for name, revision in self._touched.items():
            group = self._groups.get(name)
            row = None if group is None else group.to_row()
            if row is not None and self._keeps is not None and not self._keeps(row):
                row = None
            self._target.put(name, row, revision)
        self._touched.clear()


class Group:
    """What rows of one group agree in, and what they come to."""

    __slots__ = ("aggregates", "common", "size")

    def __init__(self, common: list[Any], aggregates: list[Aggregate]) -> None:
        self.common = common
        self.aggregates = aggregates
        self.size = 0

    def to_row(self) -> Row:
        """Return the row that stands for the group."""
        row = {common_name(index): value for index, value in enumerate(self.common)}
        for index, aggregate in enumerate(self.aggregates):
            row[aggregate_name(index)] = aggregate.result()
        return row


def _as_whole(value: Any) -> Any:
    """Show the same for 1 and 1.0, which are in one group, whichever came first."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def common_name(index: int) -> str:
    """Return what a group's row calls one of the values that its rows agree in."""
    return f"common{index}"


def aggregate_name(index: int) -> str:
    """Return what a group's row calls one of its aggregates."""
    return f"aggregate{index}"
