"""The tree of an expression: references, constants and calls. Compares, hashes, pickles, prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Literal, TypeAlias

from aidb_ray.errors import QueryError

Kind: TypeAlias = Literal["datetime", "other"]
Plain: TypeAlias = str | int | float | bool | datetime | None
Node: TypeAlias = "Reference | Constant | Call"

MAX_DEPTH = 64
MAX_NODES = 1_000
MAX_LIST = 10_000

SYNCED = "$synced"
"""Wire name under which a row says whether it is durable. A row that does not say so is."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The value at `path` (wire names) in the row called `alias`; an empty path is the row."""

    alias: str
    path: tuple[str, ...]
    kind: Kind = "other"

    depth: ClassVar[int] = 1
    size: ClassVar[int] = 1

    def __str__(self) -> str:
        return ".".join((self.alias, *self.path))


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value written in the query: a scalar, an aware datetime, or a tuple of them.

    Unlike Python, it tells 1 from True and from 1.0, as what compares equal may share an answer.
    """

    value: Plain | tuple[Plain, ...]

    depth: ClassVar[int] = 1
    size: ClassVar[int] = 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and _typed(self.value) == _typed(other.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return _literal_text(self.value)


def _typed(value: Plain | tuple[Plain, ...]) -> object:
    if isinstance(value, tuple):
        return tuple(_typed(item) for item in value)
    return type(value), value


def _literal_text(value: Plain | tuple[Plain, ...]) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case datetime():
            return value.isoformat()
        case tuple():
            return f"[{', '.join(map(_literal_text, value))}]"
        case _:
            return repr(value)


Gives: TypeAlias = Literal["boolean", "value", "any"]


@dataclass(frozen=True, slots=True)
class _Op:
    least: int
    most: int
    gives: Gives
    sign: str | None = None


_OPS: Mapping[str, _Op] = {
    "eq": _Op(2, 2, "boolean", "="),
    "gt": _Op(2, 2, "boolean", ">"),
    "gte": _Op(2, 2, "boolean", ">="),
    "lt": _Op(2, 2, "boolean", "<"),
    "lte": _Op(2, 2, "boolean", "<="),
    "and": _Op(1, MAX_NODES, "boolean", "and"),
    "or": _Op(1, MAX_NODES, "boolean", "or"),
    "not": _Op(1, 1, "boolean"),
    "in": _Op(2, 2, "boolean", "in"),
    "like": _Op(2, 2, "boolean", "like"),
    "ilike": _Op(2, 2, "boolean", "ilike"),
    "is_null": _Op(1, 1, "boolean"),
    "is_undefined": _Op(1, 1, "boolean"),
    "upper": _Op(1, 1, "value"),
    "lower": _Op(1, 1, "value"),
    "length": _Op(1, 1, "value"),
    "concat": _Op(1, MAX_NODES, "value"),
    "coalesce": _Op(1, MAX_NODES, "any"),
    "case": _Op(2, MAX_NODES, "any"),
    "add": _Op(2, 2, "value", "+"),
    "subtract": _Op(2, 2, "value", "-"),
    "multiply": _Op(2, 2, "value", "*"),
    "divide": _Op(2, 2, "value", "/"),
    "count": _Op(0, 1, "value"),
    "sum": _Op(1, 1, "value"),
    "avg": _Op(1, 1, "value"),
    "min": _Op(1, 1, "any"),
    "max": _Op(1, 1, "any"),
}

AGGREGATES = frozenset({"count", "sum", "avg", "min", "max"})


@dataclass(frozen=True, slots=True)
class Call:
    """`op` applied to `args`. One that is unknown, too deep or too large cannot be made."""

    op: str
    args: tuple[Node, ...]
    depth: int = field(init=False, compare=False, repr=False)
    size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        spec = _OPS.get(self.op)
        if spec is None:
            raise QueryError(f"Unknown operation {self.op!r}.", code="unknown_operation")
        if not spec.least <= len(self.args) <= spec.most:
            raise QueryError(
                f"{self.op!r} takes {spec.least} to {spec.most} arguments, not {len(self.args)}.",
                code="invalid_expression",
            )
        depth = 1 + max((arg.depth for arg in self.args), default=0)
        size = 1 + sum(arg.size for arg in self.args)
        if depth > MAX_DEPTH:
            raise QueryError(
                f"An expression may be {MAX_DEPTH} levels deep, this one is {depth}.",
                code="too_deep",
            )
        if size > MAX_NODES:
            raise QueryError(
                f"An expression may have {MAX_NODES} parts, this one has {size}; "
                f"in_array() takes up to {MAX_LIST} values as one part.",
                code="too_large",
            )
        object.__setattr__(self, "depth", depth)
        object.__setattr__(self, "size", size)

    def __str__(self) -> str:
        sign = _OPS[self.op].sign
        if sign is None:
            return f"{self.op}({', '.join(map(str, self.args))})"
        return f" {sign} ".join(
            f"({arg})" if isinstance(arg, Call) and _OPS[arg.op].sign else str(arg)
            for arg in self.args
        )


def walk(node: Node) -> Iterator[Node]:
    """Yield `node` and everything below it, parents first."""
    yield node
    if isinstance(node, Call):
        for arg in node.args:
            yield from walk(arg)


def references(node: Node) -> frozenset[Reference]:
    """Return every field and row that `node` reads."""
    return frozenset(part for part in walk(node) if isinstance(part, Reference))


def substitute(node: Node, swap: Mapping[Node, Node]) -> Node:
    """Return `node` with each part that is a key of `swap` replaced, outermost first."""
    if node in swap:
        return swap[node]
    if isinstance(node, Call):
        return Call(node.op, tuple(substitute(arg, swap) for arg in node.args))
    return node


def can_be_boolean(node: Node) -> bool:
    """Whether `node` may be true or false of a row, as far as one can tell from its form."""
    match node:
        case Reference():
            return bool(node.path)
        case Constant():
            return False
        case Call():
            return _OPS[node.op].gives != "value"


def is_aggregate(node: Node) -> bool:
    """Whether `node` itself is `count`, `sum`, `avg`, `min` or `max`."""
    return isinstance(node, Call) and node.op in AGGREGATES


def is_instant(node: Node) -> bool:
    """Whether the values of `node` are instants, so that strings beside it mean instants."""
    match node:
        case Reference():
            return node.kind == "datetime"
        case Constant():
            values = node.value if isinstance(node.value, tuple) else (node.value,)
            return any(isinstance(value, datetime) for value in values)
        case Call("min" | "max" | "coalesce", args):
            return any(map(is_instant, args))
        case Call("case", args):
            return any(map(is_instant, (*args[1::2], args[-1])))
        case Call():
            return False


def equalities(node: Node, alias: str | None = None) -> dict[str, frozenset[str | bool | int]]:
    """Return, by wire name, the values outside of which `node` cannot be true.

    A necessary condition, read off the terms that must all hold: a row for which `node` is true
    has one of these values, by Python's `==`, in each of these fields. Fields of instants and
    nested fields are left out. With `alias`, only the fields of that row.
    """
    allowed: dict[str, frozenset[str | bool | int]] = {}
    terms = node.args if isinstance(node, Call) and node.op == "and" else (node,)
    for term in terms:
        found = _equality(term)
        if found is None or alias not in (None, found[0].alias):
            continue
        name, values = found[0].path[0], found[1]
        allowed[name] = allowed[name] & values if name in allowed else values
    return allowed


def _equality(term: Node) -> tuple[Reference, frozenset[str | bool | int]] | None:
    values: tuple[Plain | tuple[Plain, ...], ...]
    match term:
        case Reference():
            at, values = term, (True,)
        case Call("not", (Reference() as at,)):
            values = (False,)
        case Call("eq", (Reference() as at, Constant(value))):
            values = (value,)
        case Call("eq", (Constant(value), Reference() as at)):
            values = (value,)
        case Call("in", (Reference() as at, Constant(tuple() as items))):
            values = items
        case _:
            return None
    if len(at.path) != 1 or at.kind != "other" or at.path[0] == SYNCED:
        return None
    usable = [value for value in values if isinstance(value, (str, bool, int))]
    return (at, frozenset(usable)) if len(usable) == len(values) else None
