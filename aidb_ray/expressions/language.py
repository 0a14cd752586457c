"""What users write: rows and fields, the functions and operators on them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from enum import Enum
from typing import Any, TypeAlias, cast
from uuid import UUID

from aidb_ray.errors import QueryError
from aidb_ray.expressions.nodes import (
    MAX_DEPTH,
    MAX_LIST,
    SYNCED,
    Call,
    Constant,
    Node,
    Reference,
    can_be_boolean,
    is_aggregate,
    is_instant,
    walk,
)
from aidb_ray.expressions.sources import Fields
from aidb_ray.expressions.values import instant_of, scalar_of

Scalar: TypeAlias = str | int | float | bool | datetime | UUID | Enum
Operand: TypeAlias = "Expression | Scalar | Sequence[Scalar]"


class Expression:
    """A value computed from rows. Its operators build further expressions.

    It has no truth value of its own: use `&`, `|` and `~`, or `and_`, `or_` and `not_`.
    """

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def __eq__(self, other: Any) -> Expression:  # type: ignore[override]
        return eq(self, other)

    def __ne__(self, other: Any) -> Expression:  # type: ignore[override]
        return not_(eq(self, other))

    def __hash__(self) -> int:
        return hash(self._node)

    def __gt__(self, other: Operand) -> Expression:
        return gt(self, other)

    def __ge__(self, other: Operand) -> Expression:
        return gte(self, other)

    def __lt__(self, other: Operand) -> Expression:
        return lt(self, other)

    def __le__(self, other: Operand) -> Expression:
        return lte(self, other)

    def __and__(self, other: Expression) -> Expression:
        return and_(self, other)

    def __or__(self, other: Expression) -> Expression:
        return or_(self, other)

    def __invert__(self) -> Expression:
        return not_(self)

    def __add__(self, other: Operand) -> Expression:
        return add(self, other)

    def __radd__(self, other: Operand) -> Expression:
        return add(other, self)

    def __sub__(self, other: Operand) -> Expression:
        return subtract(self, other)

    def __rsub__(self, other: Operand) -> Expression:
        return subtract(other, self)

    def __mul__(self, other: Operand) -> Expression:
        return multiply(self, other)

    def __rmul__(self, other: Operand) -> Expression:
        return multiply(other, self)

    def __truediv__(self, other: Operand) -> Expression:
        return divide(self, other)

    def __rtruediv__(self, other: Operand) -> Expression:
        return divide(other, self)

    def __bool__(self) -> bool:
        raise QueryError(
            f"{self} is not yet true or false: combine conditions with &, | and ~ (in parentheses) "
            f"instead of and, or, not and chained comparisons.",
            code="no_truth_value",
        )

    def __contains__(self, item: object) -> bool:
        raise QueryError(f"Use in_array(value, {self}) instead of `in`.", code="no_truth_value")

    def __iter__(self) -> Iterator[Any]:
        raise QueryError(f"{self} has no items while the query is written.", code="not_iterable")

    def __str__(self) -> str:
        return str(self._node)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"


class Ref(Expression):
    """A row, or a field of one. Attributes and `["name"]` name the fields below it."""

    __slots__ = ("_fields",)

    def __init__(self, node: Reference, fields: Fields | None) -> None:
        super().__init__(node)
        self._fields = fields

    def __getattr__(self, name: str) -> Ref:
        # Interpreters and notebooks probe for such names; they must find nothing.
        if name.startswith("_"):
            raise AttributeError(f'{name!r} begins with an underscore: write ["{name}"].')
        return self[name]

    def __getitem__(self, name: str) -> Ref:
        at = cast("Reference", self._node)
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise QueryError(f"A field of {at} is named by a string.", code="unknown_field")
        if len(at.path) >= MAX_DEPTH:
            raise QueryError(f"{at} is nested too deeply.", code="too_deep")
        if self._fields is None:
            return Ref(Reference(at.alias, (*at.path, name)), None)
        found = self._fields.get(name)
        if found is None:
            raise _unknown_field(name, at, self._fields)
        # An instant has no fields, whatever its name on the wire promises.
        below: Fields | None = {} if found.kind == "datetime" else found.fields
        return Ref(Reference(at.alias, (*at.path, found.wire), found.kind), below)


def _unknown_field(name: str, at: Reference, fields: Fields) -> QueryError:
    similar = [python for python, known in fields.items() if known.wire == name]
    similar = similar or difflib.get_close_matches(name, fields, n=1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    known = ", ".join(sorted(fields)) or "none"
    return QueryError(
        f"{at} has no field {name!r}.{hint} Its fields: {known}.", code="unknown_field"
    )


def as_node(value: object) -> Node:
    """Return the tree of an expression, or a constant for any other value.

    Raises:
        QueryError: the value is no scalar, instant or list of them.
    """
    if isinstance(value, Expression):
        return value._node  # pyright: ignore[reportPrivateUsage]
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(cast("Iterable[object]", value))
        if isinstance(value, (set, frozenset)):
            # Sets come in another order in each process, and equal queries are to be equal.
            items.sort(key=repr)
        if len(items) > MAX_LIST:
            raise QueryError(f"A list may have {MAX_LIST} values.", code="too_large")
        return Constant(tuple(scalar_of(item) for item in items))
    return Constant(scalar_of(value))


def as_predicate(value: object) -> Node:
    """Return the tree of a condition.

    Raises:
        QueryError: the value can never be true or false of a row.
    """
    if not isinstance(value, Expression):
        raise QueryError(
            f"Expected a condition on rows, such as eq(m.status, 'pending'), not {value!r}. "
            f"Python's `is`, `in` and `not` cannot be part of one.",
            code="unknown_field",
        )
    node = as_node(value)
    if not can_be_boolean(node):
        raise QueryError(f"{value} is neither true nor false of a row.", code="unknown_field")
    return node


def _operand(value: object, op: str) -> Node:
    node = as_node(value)
    if isinstance(node, Reference) and not node.path:
        raise QueryError(
            f"{op} needs a field of {node}, not the whole row.", code="invalid_expression"
        )
    return node


def _call(op: str, *args: object) -> Expression:
    return Expression(Call(op, tuple(_operand(arg, op) for arg in args)))


def _comparison(op: str, left: object, right: object) -> Expression:
    a, b = _alike(_operand(left, op), _operand(right, op))
    for node, other in ((a, b), (b, a)):
        if isinstance(node, Constant) and node.value is None:
            raise QueryError(
                f"Comparing with null is never true: write is_null({other}).",
                code="null_comparison",
            )
    return Expression(Call(op, (a, b)))


def _alike(a: Node, b: Node) -> tuple[Node, Node]:
    """Let a string beside an instant mean an instant, on either side."""
    if is_instant(a):
        return a, _to_instant(b)
    if is_instant(b):
        return _to_instant(a), b
    return a, b


def _to_instant(node: Node) -> Node:
    match node:
        case Constant(str() as text):
            return Constant(instant_of(text))
        case Constant(tuple() as items):
            return Constant(tuple(instant_of(item) for item in items))
        case Reference(kind="other"):
            return replace(node, kind="datetime")
        case _:
            return node


def eq(left: Operand, right: Operand) -> Expression:
    """Both are of one kind and equal; whole and decimal numbers are one kind."""
    return _comparison("eq", left, right)


def gt(left: Operand, right: Operand) -> Expression:
    """`left` is greater. Strings order by code point, instants by time."""
    return _comparison("gt", left, right)


def gte(left: Operand, right: Operand) -> Expression:
    """`left` is greater or equal; see `gt`."""
    return _comparison("gte", left, right)


def lt(left: Operand, right: Operand) -> Expression:
    """`left` is less; see `gt`."""
    return _comparison("lt", left, right)


def lte(left: Operand, right: Operand) -> Expression:
    """`left` is less or equal; see `gt`."""
    return _comparison("lte", left, right)


def and_(*conditions: Expression) -> Expression:
    """All are true. False as soon as one is false, whatever the others are."""
    return _junction("and", conditions)


def or_(*conditions: Expression) -> Expression:
    """At least one is true."""
    return _junction("or", conditions)


def _junction(op: str, conditions: tuple[Expression, ...]) -> Expression:
    # Flat, so that a long chain of `&` stays shallow.
    args: list[Node] = []
    for condition in conditions:
        node = as_predicate(condition)
        args.extend(node.args if isinstance(node, Call) and node.op == op else (node,))
    return Expression(args[0] if len(args) == 1 else Call(op, tuple(args)))


def not_(condition: Expression) -> Expression:
    """True where the condition is false; still unknown where it is unknown."""
    node = as_predicate(condition)
    if isinstance(node, Call) and node.op == "not":
        return Expression(node.args[0])
    return Expression(Call("not", (node,)))


def in_array(value: Operand, items: Operand) -> Expression:
    """`value` equals one of `items`: a list written here, or a field that holds one."""
    needle, values = _alike(_operand(value, "in"), _operand(items, "in"))
    if isinstance(values, Constant):
        if not isinstance(values.value, tuple):
            raise QueryError(f"{values} is not a list of values.", code="invalid_expression")
        if None in values.value:
            raise QueryError(
                f"null is in no list: write is_null({needle}) beside it.", code="null_comparison"
            )
    return Expression(Call("in", (needle, values)))


def like(text: Operand, pattern: Operand) -> Expression:
    r"""`text` matches from end to end: `%` any characters, `_` one, `\%` and `\_` themselves."""
    return _call("like", text, pattern)


def ilike(text: Operand, pattern: Operand) -> Expression:
    """See `like`; upper and lower case are one."""
    return _call("ilike", text, pattern)


def is_null(value: Expression) -> Expression:
    """The value is null or absent. Never unknown."""
    return Expression(Call("is_null", (as_node(value),)))


def is_undefined(value: Expression) -> Expression:
    """The field, or the whole row, is absent; a null that is present is not. Never unknown."""
    node = as_node(value)
    if not isinstance(node, Reference):
        raise QueryError(f"{value} is not a field.", code="invalid_expression")
    return Expression(Call("is_undefined", (node,)))


def upper(text: Operand) -> Expression:
    """The string in upper case; null for anything else."""
    return _call("upper", text)


def lower(text: Operand) -> Expression:
    """The string in lower case; null for anything else."""
    return _call("lower", text)


def length(value: Operand) -> Expression:
    """Characters of a string or items of a list; null for anything else."""
    return _call("length", value)


def concat(*parts: Operand) -> Expression:
    """The parts as one string, numbers and booleans as JSON writes them, nulls left out."""
    return _call("concat", *parts)


def coalesce(*values: Operand) -> Expression:
    """The first value that is not null."""
    return _call("coalesce", *values)


def case_when(condition: Expression, value: Operand | None, *more: Any) -> Expression:
    """The value behind the first condition that is true.

    Further conditions and values follow in pairs; a last one alone is what else it is, and
    null without it: `case_when(m.n > 9, "many", m.n > 0, "some", "none")`.
    """
    args = [as_predicate(condition), _operand(value, "case")]
    for index, arg in enumerate(more):
        is_condition = index % 2 == 0 and index + 1 < len(more)
        args.append(as_predicate(arg) if is_condition else _operand(arg, "case"))
    return Expression(Call("case", tuple(args)))


def add(left: Operand, right: Operand) -> Expression:
    """Sum of two numbers. Null for anything else, and beyond 64 bits or the range of a double."""
    return _call("add", left, right)


def subtract(left: Operand, right: Operand) -> Expression:
    """Difference of two numbers; see `add`."""
    return _call("subtract", left, right)


def multiply(left: Operand, right: Operand) -> Expression:
    """Product of two numbers; see `add`."""
    return _call("multiply", left, right)


def divide(left: Operand, right: Operand) -> Expression:
    """Quotient of two numbers, a decimal; null if `right` is zero; see `add`."""
    return _call("divide", left, right)


def count(value: Expression | None = None) -> Expression:
    """Rows of the group; with a value, those in which it is not null."""
    return Expression(Call("count", () if value is None else (_aggregated(value, "count"),)))


def sum_(value: Expression) -> Expression:
    """Sum over the numbers of the group, exact until it is rounded once; null without any."""
    return Expression(Call("sum", (_aggregated(value, "sum"),)))


def avg(value: Expression) -> Expression:
    """Mean of the numbers of the group; null without any."""
    return Expression(Call("avg", (_aggregated(value, "avg"),)))


def min_(value: Expression) -> Expression:
    """Least value of the group, nulls left out: booleans, numbers, strings, then instants."""
    return Expression(Call("min", (_aggregated(value, "min"),)))


def max_(value: Expression) -> Expression:
    """Greatest value of the group; see `min_`."""
    return Expression(Call("max", (_aggregated(value, "max"),)))


def _aggregated(value: Expression, op: str) -> Node:
    node = as_node(value) if op == "count" else _operand(value, op)
    if any(map(is_aggregate, walk(node))):
        raise QueryError(f"{op} of an aggregate: {node}.", code="aggregate_not_allowed")
    return node


def synced(row: Ref) -> Expression:
    """The row is durable: no optimistic write of this process to it is outstanding."""
    node = as_node(row)
    if not isinstance(node, Reference) or node.path:
        raise QueryError(f"synced() takes a row, not {node}.", code="invalid_expression")
    return Expression(Reference(node.alias, (SYNCED,)))
