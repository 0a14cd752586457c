"""Queries as data: built by calls that read like a sentence, checked as each is written. Pure.

A `Query` never changes; each method returns another. It keeps what it asks of which sources and no
handle to them, so it pickles, compares, and prints as a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Literal, NoReturn, Protocol, TypeAlias, TypeVar, cast, overload

from aidb_ray.errors import QueryError
from aidb_ray.expressions import (
    SYNCED,
    Expression,
    Fields,
    Node,
    Ref,
    Reference,
    SourceRef,
    as_node,
    as_predicate,
    call_with_refs,
    is_aggregate,
    references,
    walk,
)

T = TypeVar("T")
M = TypeVar("M")
R_co = TypeVar("R_co", covariant=True)

Direction: TypeAlias = Literal["asc", "desc"]
OfRows: TypeAlias = (
    Callable[[Ref], T]
    | Callable[[Ref, Ref], T]
    | Callable[[Ref, Ref, Ref], T]
    | Callable[[Ref, Ref, Ref, Ref], T]
)
"""A function of rows, whose parameters are named after aliases."""

JoinOn: TypeAlias = OfRows[Expression]

Outputs: TypeAlias = "tuple[tuple[str, Node | Outputs], ...]"
"""Names of a selected row with what stands under each; tuples within are objects within."""


class QuerySource(Protocol[R_co]):
    """Something with rows that a query can read, such as a collection."""

    def as_source(self) -> SourceRef[R_co]:
        """Return which rows these are, as data."""
        ...


@dataclass(frozen=True, slots=True)
class OrderTerm:
    """One thing that rows are ordered by. Nulls are least."""

    node: Node
    descending: bool = False

    def __str__(self) -> str:
        return f"{self.node}{' desc' if self.descending else ''}"


@dataclass(frozen=True, slots=True)
class Query(Generic[R_co]):
    """A question to one source, as data.

    Its steps happen in this order, whatever order they were written in: `where`, `group_by`,
    `having`, `order_by`, `select`, `distinct`, `offset`, `limit`. Rows that order alike, or of
    which no order is asked, are ordered by their keys, so that an answer is the same every time.

    Attributes:
        sources: Alias and source.
        predicate: What rows must meet.
        grouping: What rows of one group have in common; None without groups.
        group_predicate: What groups must meet.
        ordering: Most significant first.
        outputs: What a row of the answer consists of; None leaves it the source's row.
        into: What a row of the answer is made, from `outputs` by name; None leaves it a dict.
        is_distinct: Whether equal rows of the answer are one.
        skip: Rows left out at the beginning.
        max_rows: Rows kept after that; None keeps all.
        is_single: Whether at most one row is asked for.
    """

    sources: tuple[tuple[str, SourceRef[Any]], ...]
    predicate: Node | None = None
    grouping: tuple[Node, ...] | None = None
    group_predicate: Node | None = None
    ordering: tuple[OrderTerm, ...] = ()
    outputs: Outputs | None = None
    into: type[R_co] | None = None
    is_distinct: bool = False
    skip: int = 0
    max_rows: int | None = None
    is_single: bool = False

    def where(self, condition: OfRows[Expression]) -> Query[R_co]:
        """Keep the rows of which `condition` is true. Several calls must all be met."""
        node = as_predicate(self._ask(condition))
        _refuse_aggregates(node, "where")
        return replace(self, predicate=_both(self.predicate, node))

    def group_by(self, fn: OfRows[Expression | Sequence[Expression]]) -> Query[R_co]:
        """Make one row of all rows that agree in one or several values; `select` says which."""
        value = self._ask(fn)
        values = [value] if isinstance(value, Expression) else list(value)
        nodes = tuple([_field_or_value(one, "group_by") for one in values])
        for node in nodes:
            _refuse_aggregates(node, "group_by")
        return replace(self, grouping=(*(self.grouping or ()), *nodes))

    def having(self, condition: OfRows[Expression]) -> Query[R_co]:
        """Keep the groups of which `condition` is true."""
        node = as_predicate(self._ask(condition))
        return replace(self, group_predicate=_both(self.group_predicate, node))

    def order_by(self, fn: OfRows[Expression], direction: Direction = "asc") -> Query[R_co]:
        """Order by a value; further calls decide among equals. Nulls are least."""
        if direction not in ("asc", "desc"):
            raise QueryError(
                f"The direction is 'asc' or 'desc', not {direction!r}.", code="invalid_argument"
            )
        node = _field_or_value(self._ask(fn), "order_by")
        term = OrderTerm(node, descending=direction == "desc")
        return replace(self, ordering=(*self.ordering, term))

    @overload
    def select(self, fn: OfRows[Mapping[str, Any]]) -> Query[dict[str, Any]]: ...
    @overload
    def select(self, fn: OfRows[Mapping[str, Any]], into: type[M]) -> Query[M]: ...
    def select(self, fn: OfRows[Mapping[str, Any]], into: type[Any] | None = None) -> Query[Any]:
        """Make the rows of the answer: a dict of names and values, or with `into` a model of them.

        A row among the values is that row as its source decodes it.
        """
        if self.outputs is not None:
            raise QueryError("select was called twice.", code="duplicate_clause")
        outputs = _outputs(self._ask(fn))
        if into is not None:
            _check_names(outputs, into)
        return replace(cast("Query[Any]", self), outputs=outputs, into=into)

    def distinct(self) -> Query[R_co]:
        """Keep one of equal rows of the answer: the first in order."""
        return replace(self, is_distinct=True)

    def offset(self, rows: int) -> Query[R_co]:
        """Leave out the first `rows` rows."""
        return replace(self, skip=_whole(rows, "offset"))

    def limit(self, rows: int) -> Query[R_co]:
        """Keep at most `rows` rows."""
        return replace(self, max_rows=_whole(rows, "limit"))

    def find_one(self) -> SingleQuery[R_co]:
        """Ask for the first row only; running it gives that row or None."""
        parts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        parts["is_single"] = True
        single: SingleQuery[R_co] = SingleQuery(**parts)
        return single

    def join(self, *, on: JoinOn | None = None, **_sources: QuerySource[Any]) -> NoReturn:
        """Raise `QueryError`: a query reads one source."""
        raise _unsupported("join")

    def left_join(self, *, on: JoinOn | None = None, **_sources: QuerySource[Any]) -> NoReturn:
        """See `join`."""
        raise _unsupported("left_join")

    def right_join(self, *, on: JoinOn | None = None, **_sources: QuerySource[Any]) -> NoReturn:
        """See `join`."""
        raise _unsupported("right_join")

    def inner_join(self, *, on: JoinOn | None = None, **_sources: QuerySource[Any]) -> NoReturn:
        """See `join`."""
        raise _unsupported("inner_join")

    def full_join(self, *, on: JoinOn | None = None, **_sources: QuerySource[Any]) -> NoReturn:
        """See `join`."""
        raise _unsupported("full_join")

    def union_all(self, *_queries: object) -> NoReturn:
        """See `join`."""
        raise _unsupported("union_all")

    @property
    def window(self) -> tuple[int, int | None]:
        """First row and end of what is kept of the whole answer; no end is None."""
        size = self.max_rows
        if self.is_single:
            size = 1 if size is None else min(size, 1)
        return self.skip, None if size is None else self.skip + size

    @property
    def is_grouped(self) -> bool:
        """Whether rows of the answer stand for groups."""
        if self.grouping is not None:
            return True
        return any(is_aggregate(part) for node in self.nodes() for part in walk(node))

    @property
    def reads_synced(self) -> bool:
        """Whether the answer depends on which rows are durable."""
        return any(at.path == (SYNCED,) for node in self.nodes() for at in references(node))

    def nodes(self) -> Iterator[Node]:
        """Yield every expression of the query."""
        optional = (self.predicate, self.group_predicate)
        yield from (node for node in optional if node is not None)
        yield from self.grouping or ()
        yield from (term.node for term in self.ordering)
        yield from leaves(self.outputs or ())

    def _ask(self, fn: Callable[..., T]) -> T:
        scope: dict[str, Fields | None] = {alias: source.fields for alias, source in self.sources}
        return call_with_refs(fn, scope)

    def __str__(self) -> str:
        lines = [f"from {alias}: {_source_text(source)}" for alias, source in self.sources]
        if self.predicate is not None:
            lines.append(f"where {self.predicate}")
        if self.grouping is not None:
            lines.append(f"group by {', '.join(map(str, self.grouping))}")
        if self.group_predicate is not None:
            lines.append(f"having {self.group_predicate}")
        if self.ordering:
            lines.append(f"order by {', '.join(map(str, self.ordering))}")
        if self.outputs is not None:
            into = f" into {self.into.__qualname__}" if self.into else ""
            lines += [f"select{into}", *_output_lines(self.outputs, "  ")]
        if self.is_distinct:
            lines.append("distinct")
        if self.skip:
            lines.append(f"offset {self.skip}")
        if self.max_rows is not None:
            lines.append(f"limit {self.max_rows}")
        if self.is_single:
            lines.append("find one")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class SingleQuery(Query[R_co]):
    """A question whose answer is one row or none; made by `find_one`."""


class QueryRoot:
    """What a query function is given; a query begins with its `from_`."""

    def from_(self, **sources: QuerySource[M]) -> Query[M]:
        """Read the rows of a source, called by an alias: `q.from_(m=messages)`.

        Raises:
            QueryError: there is not exactly one source, or it has no rows to read.
        """
        if not sources:
            raise QueryError("from_ needs a source: q.from_(m=messages).", code="source_required")
        if len(sources) > 1 or any(isinstance(source, Query) for source in sources.values()):
            raise _unsupported("from_ with several sources or a sub-query")
        return Query(tuple((alias, _source_of(source)) for alias, source in sources.items()))


def build(question: Callable[[QueryRoot], Query[M]] | Query[M]) -> Query[M]:
    """Return the query that a query function writes, or that was written before, checked whole.

    Raises:
        QueryError: it is not a query, or it mixes values of groups with values of rows.
    """
    query = question(QueryRoot()) if callable(question) else question
    if not isinstance(query, Query):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise QueryError(
            f"Expected a query, not {query!r}: begin with q.from_() and return the result.",
            code="invalid_lambda",
        )
    _check_groups(query)
    return query


def leaves(outputs: Outputs) -> Iterator[Node]:
    """Yield the expressions under `outputs`, in order."""
    for _name, output in outputs:
        if isinstance(output, tuple):
            yield from leaves(output)
        else:
            yield output


def _check_groups(query: Query[Any]) -> None:
    if not query.is_grouped:
        if query.group_predicate is not None:
            raise QueryError("having needs group_by or an aggregate.", code="group_required")
        return
    if query.outputs is None:
        raise QueryError(
            "A query with groups needs select, to say what a row of the answer is.",
            code="select_required",
        )
    grouping = query.grouping or ()
    having = () if query.group_predicate is None else (query.group_predicate,)
    ordering = (term.node for term in query.ordering)
    for node in (*leaves(query.outputs), *having, *ordering):
        stray = _outside_groups(node, grouping)
        if stray is not None:
            raise QueryError(
                f"{stray} differs within a group: group_by it, or aggregate it.",
                code="not_grouped",
            )


def _outside_groups(node: Node, grouping: tuple[Node, ...]) -> Node | None:
    """Return the first part of `node` that a group has no single value of."""
    if node in grouping or is_aggregate(node):
        return None
    if isinstance(node, Reference):
        return node
    args = getattr(node, "args", ())
    return next((stray for arg in args if (stray := _outside_groups(arg, grouping))), None)


def _source_of(source: QuerySource[M]) -> SourceRef[M]:
    if not hasattr(source, "as_source"):
        raise QueryError(
            f"{type(source).__name__} is not a source: give a collection.", code="invalid_source"
        )
    return source.as_source()


def _both(first: Node | None, second: Node) -> Node:
    if first is None:
        return second
    return as_node(Expression(first) & Expression(second))


def _field_or_value(value: object, clause: str) -> Node:
    if not isinstance(value, Expression):
        raise QueryError(
            f"{clause} needs a field or value of a row, not {value!r}.", code="invalid_expression"
        )
    node = as_node(value)
    if isinstance(node, Reference) and not node.path:
        raise QueryError(
            f"{clause} needs a field of {node}, not the whole row.", code="invalid_expression"
        )
    return node


def _refuse_aggregates(node: Node, clause: str) -> None:
    for part in walk(node):
        if is_aggregate(part):
            raise QueryError(
                f"{clause} comes before groups are made: {part} belongs into having or select.",
                code="aggregate_not_allowed",
            )


def _outputs(value: object) -> Outputs:
    if not isinstance(value, Mapping) or not value:
        raise QueryError(
            f"select returns names and values, such as {{'id': m.id}}, not {value!r}.",
            code="invalid_select",
        )
    named = cast("Mapping[object, object]", value)
    if not all(isinstance(name, str) for name in named):
        raise QueryError("The names in select are strings.", code="invalid_select")
    return tuple(
        (
            cast("str", name),
            _outputs(cast("object", item)) if isinstance(item, Mapping) else as_node(item),
        )
        for name, item in named.items()
    )


def _check_names(outputs: Outputs, into: type[Any]) -> None:
    """Refuse names that `into`, a pydantic model or dataclass, does not have."""
    known: set[str] = set()
    if getattr(into, "model_config", {}).get("extra") != "allow":
        for name, info in getattr(into, "model_fields", {}).items():
            known |= {name, info.alias or name}
    if dataclasses.is_dataclass(into):
        known = {one.name for one in dataclasses.fields(into)}
    if not known:
        return
    for name, _output in outputs:
        if name not in known:
            raise QueryError(
                f"{into.__name__} has no field {name!r}. Its fields: {', '.join(sorted(known))}.",
                code="unknown_field",
            )


def _whole(value: int, clause: str) -> int:
    if type(value) is not int or value < 0:
        raise QueryError(
            f"{clause} takes a whole number from 0, not {value!r}.", code="invalid_argument"
        )
    return value


def _unsupported(what: str) -> QueryError:
    return QueryError(
        f"{what} is not supported: a query reads one source.", code="unsupported_query"
    )


def _source_text(source: SourceRef[Any]) -> str:
    return source.name if source.session is None else f"{source.name} in {source.session}"


def _output_lines(outputs: Outputs, indent: str) -> Iterator[str]:
    for name, output in outputs:
        if isinstance(output, tuple):
            yield f"{indent}{name}:"
            yield from _output_lines(output, indent + "  ")
        else:
            yield f"{indent}{name}: {output}"
