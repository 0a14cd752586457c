"""Where a query begins, and where it is checked whole. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from aidb_ray.errors import QueryError
from aidb_ray.expressions import Node, Reference, SourceRef, is_aggregate
from aidb_ray.query.outputs import leaves
from aidb_ray.query.plan import plan_of
from aidb_ray.query.query import (
    Query,
    QuerySource,
    SingleQuery,
    Source,
    UnionAll,
    as_source,
)

__all__ = [
    "Query",
    "QueryRoot",
    "SingleQuery",
    "build",
    "only_source",
]

M = TypeVar("M")


class QueryRoot:
    """What a query function is given; a query begins with its `from_`."""

    def from_(self, **sources: QuerySource[M]) -> Query[M]:
        """Read the rows of a source, called by an alias: `q.from_(m=messages)`.

        A source is a collection or another query. Several are joined: `where` has an equality
        between each of them and those before it. Their rows then are dicts of rows by alias,
        unless `select` makes them something else.

        Raises:
            QueryError: there is no source, or one has no rows to read.
        """
        if not sources:
            raise QueryError("from_ needs a source: q.from_(m=messages).", code="source_required")
        named = [(alias, as_source(alias, source, {})) for alias, source in sources.items()]
        return Query(tuple(named))


def build(question: Callable[[QueryRoot], Query[M]] | Query[M]) -> Query[M]:
    """Return the query that a query function writes, or that was written before, checked whole.

    Raises:
        QueryError: it is not a query; it, or one that it reads, mixes values of groups with values
            of rows, lacks an equality between sources, or asks a query's row whether it is synced.
    """
    query = question(QueryRoot()) if callable(question) else question
    if not isinstance(query, Query):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise QueryError(
            f"Expected a query, not {query!r}: begin with q.from_() and return the result.",
            code="invalid_lambda",
        )
    _check(query)
    return query


def only_source(query: Query[Any], reader: str) -> tuple[str, SourceRef[Any]]:
    """Return alias and collection of a query that reads one collection.

    Raises:
        QueryError: it reads several, or another query; `reader` cannot follow that.
    """
    alias, source = query.sources[0]
    if query.is_joined or not isinstance(source, SourceRef):
        raise QueryError(f"{reader} reads one collection, not:\n{query}", code="unsupported_query")
    return alias, source


def _check(query: Query[Any]) -> None:
    for source in query.scope.values():
        for inner in _queries_in(source):
            _check(inner)
    for alias in sorted(query.reads_synced):
        if not isinstance(query.scope[alias], SourceRef):
            raise QueryError(
                f"The rows of {alias!r} are a query's: ask synced() in that query.",
                code="invalid_expression",
            )
    plan_of(query)
    _check_groups(query)


def _queries_in(source: Source[Any]) -> Sequence[Query[Any]]:
    match source:
        case SourceRef():
            return ()
        case Query():
            return (source,)
        case UnionAll(queries):
            return queries


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
