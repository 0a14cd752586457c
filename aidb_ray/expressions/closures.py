"""Expressions as closures: the tree is walked once, not once per row.

A predicate answers only "is it true?". `not` is pushed down to where three values end, so that the
common comparisons need two values and one look at the row. Anything else computes all three.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeAlias, cast

from aidb_ray.expressions.evaluate import not_computable
from aidb_ray.expressions.nodes import SYNCED, Call, Constant, Node, Plain, Reference
from aidb_ray.expressions.values import (
    KINDS,
    arithmetic,
    compare,
    length_of,
    matches,
    member,
    parse_instant,
    text_of,
)

Value: TypeAlias = Callable[[Any], Any]
Test: TypeAlias = Callable[[Any], bool]


def compile_predicate(node: Node, *, joined: bool = False) -> Test:
    """Return a function of a row that says whether `node` is true of it; unknown is not.

    The function takes the row itself, or, when `joined`, a mapping from alias to row. It never
    raises for any row of JSON values.
    """
    return _Compiler(joined=joined).test(node, want=True)


def compile_value(node: Node, *, joined: bool = False) -> Value:
    """Return a function that computes `node`; see `compile_predicate`. None is null."""
    return _Compiler(joined=joined).value(node)


class _Compiler:
    def __init__(self, *, joined: bool) -> None:
        self._joined = joined

    def test(self, node: Node, *, want: bool) -> Test:
        """Return a function that says whether `node` is `want`."""
        match node:
            case Reference(path=(name,), kind="other") if not self._joined and name != SYNCED:
                return lambda row: row.get(name) is want
            case Call("not", (arg,)):
                return self.test(arg, want=not want)
            case Call("and", args):
                tests = [self.test(arg, want=want) for arg in args]
                return _every(tests) if want else _some(tests)
            case Call("or", args):
                tests = [self.test(arg, want=want) for arg in args]
                return _some(tests) if want else _every(tests)
            case Call("is_null", (arg,)):
                value = self.value(arg)
                return lambda row: (value(row) is None) is want
            case Call("eq", (Reference() as at, Constant(str() | bool() as constant))) if want:
                return self._equals(at, constant)
            case Call("eq" | "gt" | "gte" | "lt" | "lte" as op, (arg, Constant(constant))) if (
                type(constant) in _SCALARS
            ):
                return _compares(op, self.value(arg), constant, want=want)
            case Call("in", (arg, Constant(tuple() as items))) if want:
                return _is_in(self.value(arg), items)
            case _:
                value = self.value(node)
                return lambda row: value(row) is want

    def _equals(self, at: Reference, constant: str | bool) -> Test:  # noqa: FBT001  A value.
        if isinstance(constant, bool):
            value = self._load(at)
            return lambda row: value(row) is constant
        if len(at.path) == 1 and at.kind == "other" and not self._joined:
            name = at.path[0]
            return lambda row: row.get(name) == constant
        value = self._load(at)
        return lambda row: value(row) == constant

    def value(self, node: Node) -> Value:
        """Return a function that computes `node`, each part of it at most once."""
        match node:
            case Constant(constant):
                return lambda _row: constant
            case Reference():
                return self._load(node)
            case Call("is_undefined", (Reference() as at,)):
                return self._is_absent(at)
            case Call("is_null", (arg,)):
                value = self.value(arg)
                return lambda row: value(row) is None
            case Call("and", args):
                return _junction([self.value(arg) for arg in args], decided_by=False)
            case Call("or", args):
                return _junction([self.value(arg) for arg in args], decided_by=True)
            case Call("case", args):
                return self._case(args)
            case Call("coalesce", args):
                return _first([self.value(arg) for arg in args])
            case Call("concat", args):
                parts = [self.value(arg) for arg in args]
                return lambda row: "".join([text_of(part(row)) for part in parts])
            case Call(op, (arg,)) if op in _UNARY:
                apply, value = _UNARY[op], self.value(arg)
                return lambda row: apply(value(row))
            case Call(op, (left, right)) if op in _BINARY:
                apply, a, b = _BINARY[op], self.value(left), self.value(right)
                return lambda row: apply(op, a(row), b(row))
            case Call("in", (needle, items)):
                a, b = self.value(needle), self.value(items)
                return lambda row: member(a(row), b(row))
            case Call(op):
                raise not_computable(op)

    def _load(self, at: Reference) -> Value:
        if at.path == (SYNCED,):
            return self._is_synced(at.alias)
        load = self._load_raw(at)
        return _instant(load) if at.kind == "datetime" else load

    def _load_raw(self, at: Reference) -> Value:
        alias, path = at.alias, at.path
        if self._joined:
            return _below(lambda rows: rows[alias], path)
        if not path:
            return lambda row: row
        name = path[0]
        if len(path) == 1:
            return lambda row: row.get(name)
        return _below(lambda row: row.get(name), path[1:])

    def _is_synced(self, alias: str) -> Value:
        if not self._joined:
            return lambda row: row.get(SYNCED, True)

        def is_synced(rows: Mapping[str, Any]) -> Any:
            row = rows[alias]
            return row is None or row.get(SYNCED, True)

        return is_synced

    def _is_absent(self, at: Reference) -> Test:
        if at.path == (SYNCED,):
            return lambda _row: False
        if not at.path:
            row_of = self._load_raw(at)
            return lambda row: row_of(row) is None
        parent = self._load_raw(Reference(at.alias, at.path[:-1]))
        name = at.path[-1]

        def is_absent(row: Any) -> bool:
            found = parent(row)
            return type(found) is not dict or name not in found

        return is_absent

    def _case(self, args: tuple[Node, ...]) -> Value:
        otherwise = self.value(args[-1] if len(args) % 2 else Constant(None))
        branches = [
            (self.test(condition, want=True), self.value(value))
            for condition, value in zip(args[0::2], args[1::2], strict=False)
        ]

        def choose(row: Any) -> Any:
            for test, value in branches:
                if test(row):
                    return value(row)
            return otherwise(row)

        return choose


_SCALARS = frozenset({bool, int, float, str, datetime})
_ORDER: Mapping[tuple[str, bool], Callable[[Any, Any], bool]] = {
    ("eq", True): operator.eq,
    ("gt", True): operator.gt,
    ("gte", True): operator.ge,
    ("lt", True): operator.lt,
    ("lte", True): operator.le,
    ("eq", False): operator.ne,
    ("gt", False): operator.le,
    ("gte", False): operator.lt,
    ("lt", False): operator.ge,
    ("lte", False): operator.gt,
}


def _upper(value: Any) -> str | None:
    return value.upper() if type(value) is str else None


def _lower(value: Any) -> str | None:
    return value.lower() if type(value) is str else None


def _not(value: Any) -> bool | None:
    return not value if type(value) is bool else None


_UNARY: Mapping[str, Callable[[Any], Any]] = {
    "not": _not,
    "upper": _upper,
    "lower": _lower,
    "length": length_of,
}
_BINARY: Mapping[str, Callable[[str, Any, Any], Any]] = {
    **dict.fromkeys(("eq", "gt", "gte", "lt", "lte"), compare),
    **dict.fromkeys(("like", "ilike"), matches),
    **dict.fromkeys(("add", "subtract", "multiply", "divide"), arithmetic),
}


def _compares(op: str, value: Value, constant: Any, *, want: bool) -> Test:
    holds = _ORDER[op, want]
    if KINDS[type(constant)] == "number":

        def compares(row: Any) -> bool:
            found = value(row)
            kind: type[object] = found.__class__
            return (kind is int or kind is float) and holds(found, constant)

        return compares

    same: type[object] = constant.__class__
    return lambda row: type(found := value(row)) is same and holds(found, constant)


def _is_in(value: Value, items: tuple[Plain, ...]) -> Test:
    by_kind: dict[str, set[Any]] = {}
    for item in items:
        by_kind.setdefault(KINDS.get(type(item), ""), set()).add(item)
    by_type: Mapping[type[object], Any] = {
        kind: by_kind.get(name, ()) for kind, name in KINDS.items() if kind in _SCALARS
    }

    def is_in(row: Any) -> bool:
        found = value(row)
        kind: type[object] = found.__class__
        return found in by_type.get(kind, ())

    return is_in


def _instant(load: Value) -> Value:
    def instant(row: Any) -> Any:
        found = load(row)
        return (parse_instant(found) or found) if type(found) is str else found

    return instant


def _below(load: Value, path: tuple[str, ...]) -> Value:
    def below(row: Any) -> Any:
        found = load(row)
        for name in path:
            if type(found) is not dict:
                return None
            found = cast("dict[str, Any]", found).get(name)
        return found

    return below


def _every(tests: list[Test]) -> Test:
    match tests:
        case [only]:
            return only
        case [a, b]:
            return lambda row: a(row) and b(row)
        case [a, b, c]:
            return lambda row: a(row) and b(row) and c(row)
        case _:

            def every(row: Any) -> bool:
                for test in tests:  # noqa: SIM110  Half the time of all() with a generator.
                    if not test(row):
                        return False
                return True

            return every


def _some(tests: list[Test]) -> Test:
    match tests:
        case [only]:
            return only
        case [a, b]:
            return lambda row: a(row) or b(row)
        case _:

            def some(row: Any) -> bool:
                for test in tests:  # noqa: SIM110  See `_every`.
                    if test(row):
                        return True
                return False

            return some


def _junction(values: list[Value], *, decided_by: bool) -> Value:
    def junction(row: Any) -> bool | None:
        known = True
        for value in values:
            found = value(row)
            if found is decided_by:
                return decided_by
            known = known and type(found) is bool
        return not decided_by if known else None

    return junction


def _first(values: list[Value]) -> Value:
    def first(row: Any) -> Any:
        for value in values:
            found = value(row)
            if found is not None:
                return found
        return None

    return first
