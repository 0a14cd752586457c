"""Expressions as nested lists of JSON values, to cross processes. What arrives is not trusted."""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

from aidb_ray.errors import QueryError
from aidb_ray.expressions.nodes import (
    MAX_DEPTH,
    MAX_LIST,
    MAX_NODES,
    Call,
    Constant,
    Node,
    Plain,
    Reference,
)
from aidb_ray.expressions.values import instant_of, scalar_of


def encode_expression(node: Node) -> list[Any]:
    """Return `node` as nested lists of JSON values; `decode_expression` gives it back."""
    match node:
        case Reference(alias, path, kind):
            return ["ref", alias, list(path), kind]
        case Constant(value):
            if isinstance(value, tuple):
                return ["list", [_encode_plain(item) for item in value]]
            return _encode_plain(value)
        case Call(op, args):
            return ["call", op, [encode_expression(arg) for arg in args]]


def _encode_plain(value: Plain) -> list[Any]:
    if isinstance(value, datetime):
        return ["instant", value.isoformat()]
    return ["value", value]


def decode_expression(data: object) -> Node:
    """Return the expression that `encode_expression` gave as `data`, which is not trusted.

    Raises:
        QueryError: `data` is not an encoded expression, or exceeds `MAX_DEPTH` or `MAX_NODES`.
    """
    return _Decoder().node(data, depth=1)


class _Decoder:
    """Counts what it reads, so that nothing large is built before it is refused."""

    def __init__(self) -> None:
        self._nodes_left = MAX_NODES

    def node(self, data: object, *, depth: int) -> Node:
        self._nodes_left -= 1
        if depth > MAX_DEPTH:
            raise QueryError("The encoded expression is too deep.", code="too_deep")
        if self._nodes_left < 0:
            raise QueryError("The encoded expression is too large.", code="too_large")
        match _list_in(data):
            case ["ref", str(alias), path, "datetime" | "other" as kind]:
                return Reference(alias, _path_in(path), kind)
            case ["list", items]:
                return Constant(tuple([_plain_in(item) for item in _list_in(items)]))
            case ["call", str(op), args]:
                parts = [self.node(arg, depth=depth + 1) for arg in _list_in(args)]
                return Call(op, tuple(parts))
            case parts:
                return Constant(_plain_in(parts))


def _list_in(data: object) -> list[Any]:
    if not isinstance(data, list):
        raise _junk(data)
    items = cast("list[Any]", data)
    if len(items) > MAX_LIST:
        raise QueryError("The encoded list is too large.", code="too_large")
    return items


def _path_in(data: object) -> tuple[str, ...]:
    path = _list_in(data)
    if len(path) > MAX_DEPTH or not all(isinstance(name, str) for name in path):
        raise _junk(data)
    return tuple(path)


def _plain_in(data: object) -> Plain:
    match _list_in(data):
        case ["value", None | str() | int() | float() as value]:
            return scalar_of(value)
        case ["instant", str(text)]:
            return instant_of(text)
        case _:
            raise _junk(data)


def _junk(data: object) -> QueryError:
    shown = repr(data) if isinstance(data, (str, int, float)) else type(data).__name__
    return QueryError(f"Not an encoded expression: {shown:.80}.", code="invalid_expression")
