"""What an expression is for given rows, worked out the obvious way.

The definition that the closures of `closures.py` are tested against; it walks the tree each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

from aidb_ray.errors import QueryError
from aidb_ray.expressions.nodes import SYNCED, Call, Constant, Node, Reference
from aidb_ray.expressions.values import (
    arithmetic,
    compare,
    length_of,
    matches,
    member,
    parse_instant,
    text_of,
)

Row: TypeAlias = Mapping[str, Any]


def evaluate(node: Node, rows: Mapping[str, Row | None]) -> Any:
    """Return what `node` is for these rows, by alias. None is both null and unknown.

    A row that is None is one that an outer join did not find.
    """
    match node:
        case Constant(value):
            return value
        case Reference():
            return _look_up(node, rows)[1]
        case Call("is_undefined", (Reference() as at,)):
            return not _look_up(at, rows)[0]
        case Call("is_null", (arg,)):
            return evaluate(arg, rows) is None
        case Call("case", args):
            otherwise = args[-1] if len(args) % 2 else Constant(None)
            branches = zip(args[0::2], args[1::2], strict=False)
            chosen = (value for test, value in branches if evaluate(test, rows) is True)
            return evaluate(next(chosen, otherwise), rows)
        case Call(op, args):
            return _apply(op, [evaluate(arg, rows) for arg in args])


def _look_up(at: Reference, rows: Mapping[str, Row | None]) -> tuple[bool, Any]:
    """Return whether the field is there, and its value."""
    row = rows[at.alias]
    if at.path == (SYNCED,):
        return True, row is None or row.get(SYNCED, True)
    value: Any = row
    present = row is not None
    for name in at.path:
        present = isinstance(value, dict) and name in value
        value = cast("dict[str, Any]", value)[name] if present else None
    if at.kind == "datetime" and isinstance(value, str):
        value = parse_instant(value) or value
    return present, value


def _apply(op: str, values: list[Any]) -> Any:
    match op:
        case "eq" | "gt" | "gte" | "lt" | "lte":
            return compare(op, *values)
        case "and":
            return _junction(values, decided_by=False)
        case "or":
            return _junction(values, decided_by=True)
        case "not":
            return not values[0] if isinstance(values[0], bool) else None
        case "in":
            return member(*values)
        case "like" | "ilike":
            return matches(op, *values)
        case "upper" | "lower":
            return getattr(values[0], op)() if isinstance(values[0], str) else None
        case "length":
            return length_of(values[0])
        case "concat":
            return "".join(map(text_of, values))
        case "coalesce":
            return next((value for value in values if value is not None), None)
        case "add" | "subtract" | "multiply" | "divide":
            return arithmetic(op, *values)
        case _:
            raise not_computable(op)


def _junction(values: list[Any], *, decided_by: bool) -> bool | None:
    if any(value is decided_by for value in values):
        return decided_by
    return not decided_by if all(value is (not decided_by) for value in values) else None


def not_computable(op: str) -> QueryError:
    """Return the error for an operation that one row has no answer to."""
    return QueryError(
        f"{op}() counts the rows of a group: it belongs into select, having or order_by.",
        code="aggregate_not_allowed",
    )
