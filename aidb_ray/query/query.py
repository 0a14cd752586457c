"""Queries as data: built by calls that read like a sentence. Pure.

A `Query` never changes; each method returns another. It keeps what it asks of which sources and no
handle to them, so it pickles, compares, and prints as a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast, overload

from aidb_ray.errors import QueryError
from aidb_ray.expressions import (
    SYNCED,
    Expression,
    Fields,
    Node,
    Ref,
    Reference,
    SourceRef,
    as_predicate,
    call_with_refs,
    is_aggregate,
    references,
    walk,
)
from aidb_ray.query.clauses import (
    Direction,
    OrderTerm,
    field_or_value,
    refuse_aggregates,
    whole_number,
)
from aidb_ray.query.joins import Join, JoinType, all_of, check_equality, terms_of
from aidb_ray.query.outputs import (
    Outputs,
    as_outputs,
    check_names,
    fields_of,
    is_row,
    leaves,
    merge_fields,
    output_lines,
)
from aidb_ray.query.shapes import Shape, describe_shape, shape_of_outputs, shape_of_source

T = TypeVar("T")
M = TypeVar("M")
R_co = TypeVar("R_co", covariant=True)

OfRows: TypeAlias = (
    Callable[[Ref], T]
    | Callable[[Ref, Ref], T]
    | Callable[[Ref, Ref, Ref], T]
    | Callable[[Ref, Ref, Ref, Ref], T]
)
"""A function of rows, whose parameters are named after aliases."""

JoinOn: TypeAlias = OfRows[Expression]

Source: TypeAlias = "SourceRef[R_co] | Query[R_co] | UnionAll[R_co]"

UNION_ALIAS = "row"
"""What the rows of a union are called in the clauses behind it."""


class QuerySource(Protocol[R_co]):
    """Something with rows that a query can read: a collection, or another query."""

    def as_source(self) -> Source[R_co]:
        """Return which rows these are, as data."""
        ...


@dataclass(frozen=True, slots=True)
class UnionAll(Generic[R_co]):
    """The rows of several queries, equal ones as often as they occur."""

    queries: tuple[Query[R_co], ...]

    @property
    def fields(self) -> Fields | None:
        """The fields of its rows; None if any name goes."""
        found = self.queries[0].fields
        for query in self.queries[1:]:
            found = merge_fields(found, query.fields)
        return found

    @property
    def shape(self) -> Shape:
        """What its rows look like: all queries agree in it."""
        return self.queries[0].shape

    def check(self) -> None:
        """Refuse queries whose rows do not look alike."""
        first, *others = [query.shape for query in self.queries]
        for other in others:
            if other != first:
                raise QueryError(
                    f"union_all takes queries whose rows look alike: some are "
                    f"{describe_shape(first)}, some {describe_shape(other)}.",
                    code="union_mismatch",
                )


@dataclass(frozen=True, slots=True)
class Query(Generic[R_co]):
    """A question to one or several sources, as data.

    Its steps happen in this order, whatever order they were written in: joins in theirs, `where`,
    `group_by`, `having`, `order_by`, `select`, `distinct`, `offset`, `limit`.

    The order of an answer is total, so that it is the same every time. Rows that order alike, or
    of which no order is asked, are ordered by their keys: that of a source's row is (session,
    key); of a join the keys of its sources as they were written, a missing one being least; of a
    group what its rows agree in; of a distinct row its values; of a union the number of the query
    in it, then the key there.

    Attributes:
        sources: Alias and source of those in `from_`. Several are inner joins; the equalities
            between them are in `predicate`.
        joins: Further sources, in order.
        predicate: What rows must meet.
        grouping: What rows of one group have in common; None without groups.
        group_predicate: What groups must meet.
        ordering: Most significant first.
        outputs: What a row of the answer consists of. None leaves it the source's row; of several
            sources it is a dict of their rows by alias, None where an outer join found none.
        into: What a row of the answer is made, from `outputs` by name; None leaves it a dict.
        is_distinct: Whether equal rows of the answer are one.
        skip: Rows left out at the beginning.
        max_rows: Rows kept after that; None keeps all.
        is_single: Whether at most one row is asked for.
    """

    sources: tuple[tuple[str, Source[Any]], ...]
    joins: tuple[Join, ...] = ()
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

    def join(
        self, *, on: JoinOn, join_type: JoinType = "left", **source: QuerySource[Any]
    ) -> Query[dict[str, Any]]:
        """Add the rows of a source for which `on` is true: `join(u=users, on=lambda m, u: ...)`.

        `on` has at least one equality between `u` and what comes before it; further conditions go
        beside it. Nulls equal nothing. Rows without a partner stay with `"left"` (those before),
        `"right"` (those of `u`) and `"full"` (both), and the missing row is undefined: it and its
        fields read as null, `is_undefined(u)` is true, and selected as a whole it is None.

        Raises:
            QueryError: there is not one source, its alias is taken, or `on` has no equality.
        """
        if join_type not in ("left", "right", "inner", "full"):
            raise QueryError(
                f"join_type is 'left', 'right', 'inner' or 'full', not {join_type!r}.",
                code="invalid_argument",
            )
        if len(source) != 1:
            raise QueryError(
                f"A join adds one source, not {len(source)}: join(u=users, on=lambda m, u: ...).",
                code="source_required",
            )
        ((alias, added),) = source.items()
        earlier = self.scope
        source_ref = as_source(alias, added, earlier)
        node = as_predicate(_ask(on, {**earlier, alias: source_ref}))
        refuse_aggregates(node, "join")
        check_equality(terms_of(node), earlier, alias, f"The join with {alias!r}")
        join = Join(join_type, alias, source_ref, node)
        return replace(cast("Query[Any]", self), joins=(*self.joins, join))

    def left_join(self, *, on: JoinOn, **source: QuerySource[Any]) -> Query[dict[str, Any]]:
        """Keep every row so far, with the partners it has. See `join`."""
        return self.join(on=on, join_type="left", **source)

    def right_join(self, *, on: JoinOn, **source: QuerySource[Any]) -> Query[dict[str, Any]]:
        """Keep every row of the source, with the partners it has. See `join`."""
        return self.join(on=on, join_type="right", **source)

    def inner_join(self, *, on: JoinOn, **source: QuerySource[Any]) -> Query[dict[str, Any]]:
        """Keep partners only. See `join`."""
        return self.join(on=on, join_type="inner", **source)

    def full_join(self, *, on: JoinOn, **source: QuerySource[Any]) -> Query[dict[str, Any]]:
        """Keep every row of both sides, with the partners it has. See `join`."""
        return self.join(on=on, join_type="full", **source)

    def where(self, condition: OfRows[Expression]) -> Query[R_co]:
        """Keep the rows of which `condition` is true. Several calls must all be met."""
        node = as_predicate(_ask(condition, self.scope))
        refuse_aggregates(node, "where")
        return replace(self, predicate=all_of([*terms_of(self.predicate), *terms_of(node)]))

    def group_by(self, fn: OfRows[Expression | Sequence[Expression]]) -> Query[R_co]:
        """Make one row of all rows that agree in one or several values; `select` says which."""
        value = _ask(fn, self.scope)
        values = [value] if isinstance(value, Expression) else list(value)
        nodes = tuple([field_or_value(one, "group_by") for one in values])
        for node in nodes:
            refuse_aggregates(node, "group_by")
        return replace(self, grouping=(*(self.grouping or ()), *nodes))

    def having(self, condition: OfRows[Expression]) -> Query[R_co]:
        """Keep the groups of which `condition` is true."""
        node = as_predicate(_ask(condition, self.scope))
        return replace(
            self, group_predicate=all_of([*terms_of(self.group_predicate), *terms_of(node)])
        )

    def order_by(self, fn: OfRows[Expression], direction: Direction = "asc") -> Query[R_co]:
        """Order by a value; further calls decide among equals. Nulls are least."""
        node = field_or_value(_ask(fn, self.scope), "order_by")
        term = OrderTerm.towards(direction, node)
        return replace(self, ordering=(*self.ordering, term))

    @overload
    def select(self, fn: OfRows[Mapping[str, Any]]) -> Query[dict[str, Any]]: ...
    @overload
    def select(self, fn: OfRows[Mapping[str, Any]], into: type[M]) -> Query[M]: ...
    def select(self, fn: OfRows[Mapping[str, Any]], into: type[Any] | None = None) -> Query[Any]:
        """Make the rows of the answer: a dict of names and values, or with `into` a model of them.

        A row among the values is that row as its source decodes it, or None where an outer join
        found none.
        """
        if self.outputs is not None:
            raise QueryError("select was called twice.", code="duplicate_clause")
        outputs = as_outputs(_ask(fn, self.scope))
        if into is not None:
            check_names(outputs, into)
        return replace(cast("Query[Any]", self), outputs=outputs, into=into)

    def distinct(self) -> Query[R_co]:
        """Keep one of equal rows of the answer: the first in order."""
        return replace(self, is_distinct=True)

    def offset(self, rows: int) -> Query[R_co]:
        """Leave out the first `rows` rows."""
        return replace(self, skip=whole_number(rows, "offset"))

    def limit(self, rows: int) -> Query[R_co]:
        """Keep at most `rows` rows."""
        return replace(self, max_rows=whole_number(rows, "limit"))

    def find_one(self) -> SingleQuery[R_co]:
        """Ask for the first row only; running it gives that row or None."""
        parts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        parts["is_single"] = True
        single: SingleQuery[R_co] = SingleQuery(**parts)
        return single

    def union_all(self, *queries: Query[Any]) -> Query[R_co]:
        """Ask for the rows of this query and of others, equal ones as often as they occur.

        Clauses behind it are of all those rows, which they call `row`:
        `a.union_all(b).order_by(lambda row: row.at)`. To give them another name, read the union
        with `from_`.

        Raises:
            QueryError: the rows of the queries do not look alike.
        """
        wrong = [query for query in queries if not isinstance(cast("object", query), Query)]
        if wrong or not queries:
            raise QueryError(
                "union_all takes further queries: q.from_(...)....union_all(q.from_(...)...).",
                code="invalid_source",
            )
        union: UnionAll[R_co] = UnionAll((self, *queries))
        union.check()
        return Query(((UNION_ALIAS, union),))

    def as_source(self) -> Query[R_co]:
        """Return the query itself: another one can read its rows."""
        return self

    @property
    def scope(self) -> dict[str, Source[Any]]:
        """Every source by alias, in the order they were written."""
        return dict(self.sources) | {join.alias: join.source for join in self.joins}

    @property
    def is_joined(self) -> bool:
        """Whether it reads several sources."""
        return len(self.sources) + len(self.joins) > 1

    @property
    def fields(self) -> Fields | None:
        """The fields of its rows, for a query that reads them; None if any name goes."""
        scope = {alias: source.fields for alias, source in self.scope.items()}
        if self.outputs is None and not self.is_joined:
            return next(iter(scope.values()))
        return fields_of(self._outputs, scope)

    @property
    def shape(self) -> Shape:
        """What its rows look like."""
        shapes = {
            alias: shape_of_source(source) if isinstance(source, SourceRef) else source.shape
            for alias, source in self.scope.items()
        }
        if self.outputs is None and not self.is_joined:
            return next(iter(shapes.values()))
        return shape_of_outputs(self._outputs, self.into, shapes)

    @property
    def _outputs(self) -> Outputs:
        if self.outputs is not None:
            return self.outputs
        return tuple([(alias, Reference(alias, ())) for alias in self.scope])

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
    def reads_synced(self) -> frozenset[str]:
        """The aliases of which the answer depends on which rows are durable."""
        return frozenset(
            at.alias for node in self.nodes() for at in references(node) if at.path == (SYNCED,)
        )

    def fields_read(self, alias: str) -> frozenset[str] | None:
        """Return the stored names of the fields of `alias` that matter; None if all do."""
        whole = [node for node in leaves(self._outputs) if is_row(node)]
        if any(at.alias == alias for node in whole for at in references(node)):
            return None
        # Whoever asks whether a row is there asks for none of its fields.
        return frozenset(
            at.path[0]
            for node in self.nodes()
            for at in references(node)
            if at.alias == alias and at.path
        )

    def nodes(self) -> Iterator[Node]:
        """Yield every expression of the query."""
        yield from (join.on for join in self.joins)
        optional = (self.predicate, self.group_predicate)
        yield from (node for node in optional if node is not None)
        yield from self.grouping or ()
        yield from (term.node for term in self.ordering)
        yield from leaves(self.outputs or ())

    def __str__(self) -> str:
        lines = [line for named in self.sources for line in _source_lines("from", *named)]
        for join in self.joins:
            begin, *rest = _source_lines(f"{join.join_type} join", join.alias, join.source)
            lines += [f"{begin} on {join.on}", *rest]
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
            lines += [f"select{into}", *output_lines(self.outputs, "  ")]
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


def as_source(alias: str, source: QuerySource[M], taken: Mapping[str, object]) -> Source[M]:
    """Return what a query keeps of a source under an alias that is not `taken`.

    Raises:
        QueryError: it has no rows to read, or the alias is taken or no name.
    """
    if alias in taken:
        raise QueryError(
            f"{alias!r} is an alias already; taken are {', '.join(taken)}.", code="duplicate_alias"
        )
    if not alias.isidentifier():
        raise QueryError(
            f"{alias!r} cannot be an alias: no function could name it.", code="invalid_alias"
        )
    if not hasattr(source, "as_source"):
        raise QueryError(
            f"{type(source).__name__} is not a source: give a collection or a query.",
            code="invalid_source",
        )
    return source.as_source()


def _ask(fn: Callable[..., T], scope: Mapping[str, Source[Any]]) -> T:
    """Call a function of rows, once, with what stands for them."""
    return call_with_refs(fn, {alias: source.fields for alias, source in scope.items()})


def _source_lines(verb: str, alias: str, source: Source[Any]) -> Iterator[str]:
    match source:
        case SourceRef(name, session):
            yield f"{verb} {alias}: {name if session is None else f'{name} in {session}'}"
        case Query():
            yield f"{verb} {alias}:"
            yield from (f"  {line}" for line in str(source).splitlines())
        case UnionAll(queries):
            yield f"{verb} {alias}: union all of"
            for query in queries:
                first, *rest = str(query).splitlines()
                yield f"  - {first}"
                yield from (f"    {line}" for line in rest)
