"""The order of values: a total order over everything a row can hold, as tuples that compare. Pure.

Nulls are least, then booleans, numbers, strings, instants, and lists and objects as text. Going
down, the order is the exact reverse, so nulls come last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from aidb_ray.expressions import Node, compile_value, identity

Place: TypeAlias = "tuple[Any, ...]"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)

# UTF-8 orders as code points do and has no byte above 0xF4, so that 0xFF can end a string that
# is turned around: a string comes after those that it begins.
_REVERSED = bytes([0xF4 - byte if byte <= 0xF4 else 0xFF for byte in range(256)])


def ascending(value: Any) -> Place:
    """Return a pair that orders as `value` does."""
    kind: type[object] = value.__class__
    if kind is str:
        return 3, value
    if kind is int or kind is float:
        return 2, value
    if value is None:
        return 0, 0
    if kind is bool:
        return 1, value
    if kind is datetime:
        return 4, value
    return 5, repr(identity(value))


def descending(value: Any) -> Place:
    """Return a pair that orders as `value` does, the other way round."""
    rank, plain = ascending(value)
    match rank:
        case 0:
            turned = 0
        case 1 | 2:
            turned = -plain
        case 4:
            turned = -((value - _EPOCH) // _TICK)
        case _:
            turned = plain.encode("utf-8", "surrogatepass").translate(_REVERSED) + b"\xff"
    return -rank, turned


def rank(key: Any) -> Place:
    """Return a pair that orders as the key of a row does: by its parts, a missing one first."""
    if key.__class__ is tuple:
        return 6, tuple([rank(part) for part in key])
    return ascending(key)


def compile_order(
    terms: Sequence[tuple[Node, bool]], *, joined: bool = False
) -> Callable[[Any], Place] | None:
    """Return a function of a row that gives its place by values, each with "is it descending?".

    Without values, which leaves the order to the keys, None. `joined`: see `compile_predicate`.
    """
    parts = [
        (descending if down else ascending, compile_value(node, joined=joined))
        for node, down in terms
    ]
    if not parts:
        return None
    if len(parts) == 1:
        place, value = parts[0]
        return lambda row: place(value(row))

    def order(row: Any) -> Place:
        whole: list[Any] = []
        for place, value in parts:
            whole += place(value(row))
        return tuple(whole)

    return order
