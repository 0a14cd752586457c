"""Rows of two sides that agree in some values, as pairs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from aidb_ray.expressions import Node, Test, Value, compile_predicate, compile_value, identity
from aidb_ray.query.answer import Key, Row, are_same
from aidb_ray.query.groups import Keyed
from aidb_ray.query.joins import LEFT_STAYS, RIGHT_STAYS
from aidb_ray.query.plan import JoinPlan

Pair: TypeAlias = Callable[[Any, "Row | None", Any, "Row | None"], "tuple[Key, Row]"]
"""Key and row of a side, then of the other one, as key and row of a pair."""

_NOBODY: Mapping[Key, Row] = {}


class Joined:
    """Passes on a row for each pair of partners, and for each row that stays without one.

    Rows of the left side and those passed on are rows by alias, their keys tuples with a key for
    each alias; a row that is missing is None, and so is its key.

    It keeps the rows of both sides once, found by the values that they join by, and of a side
    whose rows stay without a partner how many partners each has. It keeps no pairs. A change costs
    as much as the row finds by its values, whether that meets the further condition or not; it
    does not depend on how many rows there are.

    Attributes:
        left: Takes rows of the left side.
        right: Takes rows of the source that is joined.
    """

    def __init__(self, plan: JoinPlan, target: Keyed) -> None:
        alias = plan.alias
        nobody: Row = dict.fromkeys(plan.earlier)
        nobodys_key = (None,) * len(plan.earlier)

        def pair(left_key: Any, left: Row | None, key: Any, row: Row | None) -> tuple[Key, Row]:
            return (*(left_key or nobodys_key), key), {**(left or nobody), alias: row}

        def pair_turned(
            key: Any, row: Row | None, left_key: Any, left: Row | None
        ) -> tuple[Key, Row]:
            return pair(left_key, left, key, row)

        rest = None if plan.rest is None else compile_predicate(plan.rest, joined=True)
        by_left, by_right = _values(plan.left, joined=True), _values(plan.right, joined=False)
        self.left = _Side(by_left, pair, rest, target, stays=plan.join_type in LEFT_STAYS)
        self.right = _Side(by_right, pair_turned, rest, target, stays=plan.join_type in RIGHT_STAYS)
        self.left.other, self.right.other = self.right, self.left


class _Side:
    """Rows of one side, and what becomes of their pairs when one changes."""

    other: _Side

    def __init__(
        self, by: Value, pair: Pair, rest: Test | None, target: Keyed, *, stays: bool
    ) -> None:
        self._by = by
        self._pair = pair
        self._rest = rest
        self._target = target
        self._stays = stays
        self._rows: dict[Key, tuple[Row, Any]] = {}
        self._by_value: dict[Any, dict[Key, Row]] = {}
        self._partners: dict[Key, int] = {}

    def put(self, key: Key, row: Row | None, revision: int) -> None:
        """See `Keyed.put`."""
        old = self._rows.pop(key, None)
        if old is not None and row is not None and are_same(old[0], row):
            # Such as an own write that has become durable, or a group that stays as it was.
            self._rows[key] = old
            return
        before = after = _NOBODY
        if old is not None:
            before = self._partners_of(key, *old)
            self._unlink(key, old[1])
        if row is not None:
            value = self._by(row)
            self._link(key, row, value)
            after = self._partners_of(key, row, value)
        if before is not after:
            self._part(key, before, after, revision)
        if row is not None:
            self._meet(key, row, before, after, revision)
        if self._stays:
            self._settle(key, old is not None and not before, row, len(after), revision)

    def _link(self, key: Key, row: Row, value: Any) -> None:
        self._rows[key] = row, value
        if value is not None:
            self._by_value.setdefault(value, {})[key] = row

    def _unlink(self, key: Key, value: Any) -> None:
        if value is not None:
            same = self._by_value[value]
            del same[key]
            if not same:
                del self._by_value[value]

    def _partners_of(self, key: Key, row: Row, value: Any) -> Mapping[Key, Row]:
        """Return the rows of the other side that are partners; null is nobody's."""
        found = self.other._by_value.get(value, _NOBODY)
        rest, pair = self._rest, self._pair
        if rest is None:
            return found
        return {
            other_key: other
            for other_key, other in found.items()
            if rest(pair(key, row, other_key, other)[1])
        }

    def _part(
        self, key: Key, before: Mapping[Key, Row], after: Mapping[Key, Row], revision: int
    ) -> None:
        """Take back the pairs that are no more."""
        for other_key in before:
            if other_key not in after:
                pair_key, _row = self._pair(key, None, other_key, None)
                self._target.put(pair_key, None, revision)
                self.other.lose_partner(other_key, revision)

    def _meet(
        self,
        key: Key,
        row: Row,
        before: Mapping[Key, Row],
        after: Mapping[Key, Row],
        revision: int,
    ) -> None:
        """Pass on the pairs that are new or changed."""
        for other_key, other in after.items():
            if before is not after and other_key not in before:
                self.other.gain_partner(other_key, revision)
            self._target.put(*self._pair(key, row, other_key, other), revision)

    def _settle(
        self,
        key: Key,
        was_alone: bool,  # noqa: FBT001  A value.
        row: Row | None,
        partners: int,
        revision: int,
    ) -> None:
        """Remember how many partners a row has that was put, and pass it on if it is alone."""
        if row is None:
            self._partners.pop(key, None)
        else:
            self._partners[key] = partners
        if row is not None and not partners:
            self._pass_on_alone(key, row, revision)
        elif was_alone:
            self._pass_on_alone(key, None, revision)

    def gain_partner(self, key: Key, revision: int) -> None:
        """Count a partner that a row has found."""
        if self._stays:
            if not self._partners[key]:
                self._pass_on_alone(key, None, revision)
            self._partners[key] += 1

    def lose_partner(self, key: Key, revision: int) -> None:
        """Count a partner that a row has lost."""
        if self._stays:
            self._partners[key] -= 1
            if not self._partners[key]:
                self._pass_on_alone(key, self._rows[key][0], revision)

    def _pass_on_alone(self, key: Key, row: Row | None, revision: int) -> None:
        pair_key, pair = self._pair(key, row, None, None)
        self._target.put(pair_key, None if row is None else pair, revision)


def _values(nodes: Sequence[Node], *, joined: bool) -> Value:
    """Return a function of a row that gives what it joins by, None if a part of it is null."""
    values = [compile_value(node, joined=joined) for node in nodes]
    if len(values) == 1:
        (only,) = values
        return lambda row: identity(only(row))

    def several(row: Any) -> Any:
        found = tuple([identity(value(row)) for value in values])
        return None if None in found else found

    return several
