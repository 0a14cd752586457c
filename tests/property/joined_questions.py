"""Strategies for queries over several collections, and for what happens to their rows.

Values are few, so that rows often join, order alike and are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, TypeVar, cast

from hypothesis import strategies as st

from aidb_ray.expressions import (
    Expression,
    Field,
    Ref,
    Reference,
    SourceRef,
    add,
    and_,
    avg,
    coalesce,
    concat,
    count,
    eq,
    gt,
    is_null,
    is_undefined,
    lt,
    max_,
    min_,
    not_,
    or_,
    sum_,
    synced,
)
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.query.clauses import Direction
from aidb_ray.query.joins import JoinType
from aidb_ray.query.outputs import Outputs
from aidb_ray.query.query import UnionAll

T = TypeVar("T")
Row = dict[str, Any]
Key = tuple[str, str]
Commit = dict[tuple[str, Key], tuple[Row, bool] | None]
Path = tuple[str, ...]

FIELDS = {
    "k": Field("k"),
    "n": Field("num"),
    "s": Field("s"),
    "at": Field("at", "datetime"),
    "args": Field("args"),
}
NAMES: Sequence[Path] = [("k",), ("n",), ("s",), ("at",), ("args", "n")]


@dataclass(frozen=True)
class Rows:
    """A collection."""

    name: str

    def as_source(self) -> SourceRef[Row]:
        return SourceRef(self.name, "aidb://any/*", FIELDS)


COLLECTIONS = [Rows("a"), Rows("b"), Rows("c")]

VALUES: dict[str, list[Any]] = {
    "k": [0, 0, 0, 1, 1, 1, 2, None, 1.0, "1", True],
    "num": [0, 1, 1, 1, 2, 0.5, None, "x"],
    "s": ["x", "x", "x", "y", None, 1],
    "at": [
        *["2026-01-01T00:00:29Z", "2026-01-01T02:00:29+02:00"] * 2,
        "2026-01-01T00:00:30Z",
        None,
        "?",
    ],
    "args": [{"n": 1}, {"n": 1.0}, {"n": 0}, {}, {"n": None}, [1], None],
}


def _some_rows(amount: int) -> list[Row]:
    # Drawn from a list, a row costs one decision and not ten.
    random = Random(1)
    made: list[Row] = [{name: choices[0] for name, choices in VALUES.items()}]
    while len(made) < amount:
        row = {name: random.choice(choices) for name, choices in VALUES.items()}
        for name in VALUES:
            if random.random() < 0.1:
                del row[name]
        made.append(row)
    return made


PLACES = [
    (rows.name, place)
    for rows, place in product(COLLECTIONS, product(["aidb://any/1", "aidb://any/2"], "pqr"))
]
WRITES: list[tuple[Row, bool] | None] = [
    (row, at % 8 > 0) for at, row in enumerate(_some_rows(250), start=1)
]
CHANGES = [*WRITES, *[None] * 80]


def _commits(
    values: Sequence[tuple[Row, bool] | None], least: int, most: int
) -> st.SearchStrategy[Commit]:
    value = st.sampled_from(values)
    return st.dictionaries(st.sampled_from(PLACES), value, min_size=least, max_size=most)


def _program(first: Commit, later: list[Commit]) -> list[Commit]:
    return [first, *later]


commits = st.builds(
    _program,
    _commits(WRITES, 12, len(PLACES)),
    st.lists(_commits(CHANGES, 1, 9), min_size=2, max_size=5),
)


def one_in(draw: st.DrawFn, times: int) -> bool:
    return draw(st.integers(0, times - 1)) == times - 1


def pick(draw: st.DrawFn, items: Sequence[T]) -> T:
    return draw(st.sampled_from(items))


def paths_of(source: Any) -> list[Path]:
    """Return the names under which a source's rows have plain values."""
    match source:
        case SourceRef():
            return list(NAMES)
        case UnionAll():
            return paths_of(cast("UnionAll[Any]", source).queries[0])
        case _:
            query: Query[Any] = source
            scope = query.scope
            if query.outputs is None and not query.is_joined:
                return paths_of(next(iter(scope.values())))
            outputs = query.outputs or tuple([(alias, Reference(alias, ())) for alias in scope])
            return _paths_in(outputs, scope)


def _paths_in(outputs: Outputs, scope: Mapping[str, Any]) -> list[Path]:
    paths: list[Path] = []
    for name, output in outputs:
        if isinstance(output, tuple):
            paths += [(name, *path) for path in _paths_in(output, scope)]
        elif isinstance(output, Reference) and not output.path:
            paths += [(name, *path) for path in paths_of(scope[output.alias])]
        else:
            paths.append((name,))
    return paths


def always(value: T) -> Callable[[Ref], T]:
    """Return a function of rows for `Query` that looks at none of them."""
    return cast("Any", lambda: value)


def ref(query: Query[Any], alias: str) -> Ref:
    return Ref(Reference(alias, ()), query.scope[alias].fields)


def values_of(query: Query[Any], *aliases: str) -> list[Expression]:
    """Return the plain values of some sources, or of all."""
    found: list[Expression] = []
    for alias in aliases or query.scope:
        for path in paths_of(query.scope[alias]):
            value = ref(query, alias)
            for name in path:
                value = value[name]
            found.append(value)
    return found


def conditions(draw: st.DrawFn, query: Query[Any], *aliases: str, depth: int = 1) -> Expression:
    """Draw a condition on some sources, or on all."""
    values = values_of(query, *aliases)
    names = aliases or tuple(query.scope)
    # What asks for missing rows is likelier, for it is where outer joins go wrong.
    form = pick(draw, [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7, *([8, 9, 10] if depth else [])])
    value = pick(draw, values)
    match form:
        case 0 | 1:
            return pick(draw, [eq, gt, lt])(pick(draw, values), pick(draw, [0, 1, 2]))
        case 2 | 3:
            return eq(value, pick(draw, values))
        case 4:
            return pick(draw, [is_null, is_undefined])(value)
        case 5:
            return is_undefined(ref(query, pick(draw, names)))
        case 6:
            alias = pick(draw, names)
            if isinstance(query.scope[alias], SourceRef):
                return synced(ref(query, alias))
            return not_(is_null(value))
        case 7:
            return gt(add(coalesce(value, 0), 1), 1)
        case 8:
            return not_(conditions(draw, query, *aliases, depth=depth - 1))
        case _:
            both = [conditions(draw, query, *aliases, depth=depth - 1) for _ in range(2)]
            return (and_ if form == 9 else or_)(*both)


def _source(draw: st.DrawFn, depth: int) -> Any:
    if depth and one_in(draw, 4):
        return _query(draw, depth - 1)
    return pick(draw, COLLECTIONS)


def _equality(draw: st.DrawFn, query: Query[Any], earlier: Sequence[str], alias: str) -> Expression:
    left, right = values_of(query, *earlier), values_of(query, alias)
    # The first fields have the values that join best.
    ours, theirs = left[0], right[0]
    if one_in(draw, 4):
        ours, theirs = pick(draw, left), pick(draw, right)
    if one_in(draw, 10):
        ours = add(ours, 1)
    if one_in(draw, 6):
        theirs = coalesce(theirs, 1)
    return eq(ours, theirs) if one_in(draw, 2) else eq(theirs, ours)


def _base(draw: st.DrawFn, depth: int) -> Query[Any]:
    """Draw sources with their joins."""
    several = pick(draw, range(10))
    root: Any = QueryRoot()
    if several < 2:
        query: Query[Any] = root.from_(x=_source(draw, depth))
    elif several < 4:
        query = root.from_(x=_source(draw, depth), y=_source(draw, depth))
        condition = _equality(draw, query, ["x"], "y")
        query = query.where(always(condition))
    else:
        query = root.from_(x=_source(draw, depth))
        query = _joined(draw, query, "y", depth)
    # Queries that others read stay small: the oracle looks at every combination of rows.
    if len(query.scope) == 1 or (depth and one_in(draw, 3)):
        query = _joined(draw, query, "z", depth if len(query.scope) == 1 else 0)
    return query


def _joined(draw: st.DrawFn, query: Query[Any], alias: str, depth: int) -> Query[Any]:
    earlier = list(query.scope)
    source = _source(draw, depth)
    scope: Query[Any] = Query(tuple((query.scope | {alias: source.as_source()}).items()))
    on = _equality(draw, scope, earlier, alias)
    while one_in(draw, 5):
        on &= conditions(draw, scope, *pick(draw, [(alias,), tuple(earlier), ()]))
    kinds: list[JoinType] = ["left", "inner", "right", "full"]
    return query.join(on=always(on), join_type=pick(draw, kinds), **{alias: source})


def _order(draw: st.DrawFn, query: Query[Any], values: Sequence[Expression]) -> Query[Any]:
    directions: list[Direction] = ["asc", "desc"]
    for _ in range(pick(draw, [1, 1, 1, 1, 1, 2, 0])):
        value = pick(draw, values)
        query = query.order_by(always(value), pick(draw, directions))
    return query


def _grouped(draw: st.DrawFn, query: Query[Any]) -> Query[Any]:
    values = values_of(query)
    by = [pick(draw, values) for _ in range(draw(st.integers(0, 2)))]
    makers: list[Callable[[Any], Expression]] = [sum_, avg, min_, max_, count]
    totals = [count(), *(pick(draw, makers)(pick(draw, values)) for _ in range(2))]
    if by:
        query = query.group_by(always(by))
    if one_in(draw, 3):
        having = pick(draw, [gt(count(), 1), lt(totals[1], 2), is_null(totals[2])])
        query = query.having(always(having))
    named = {f"v{at}": value for at, value in enumerate([*by, *totals])}
    return _order(draw, query, [*by, *totals, count()]).select(always(named))


def _plain(draw: st.DrawFn, query: Query[Any]) -> Query[Any]:
    values = values_of(query)
    query = _order(draw, query, values if one_in(draw, 3) else values[:3:2])
    if one_in(draw, 3):
        return query
    named: Row = {"k": pick(draw, values), "n": pick(draw, values)}
    if one_in(draw, 3):
        named["row"] = ref(query, pick(draw, list(query.scope)))
    if one_in(draw, 4):
        named["in"] = {"s": concat(pick(draw, values), "/"), "n": pick(draw, values)}
    return query.select(always(named))


def _clauses(draw: st.DrawFn, query: Query[Any]) -> Query[Any]:
    if one_in(draw, 3):
        condition = conditions(draw, query)
        query = query.where(always(condition))
    query = _grouped(draw, query) if one_in(draw, 4) else _plain(draw, query)
    if one_in(draw, 5):
        query = query.distinct()
    if one_in(draw, 5):
        query = query.offset(draw(st.integers(0, 2)))
    if not one_in(draw, 4):
        query = query.limit(
            pick(draw, [2, 1, 3, 4, 5, 6, 0]) if one_in(draw, 2) else pick(draw, [1, 2, 3])
        )
    return query.find_one() if one_in(draw, 12) else query


def _union(draw: st.DrawFn, depth: int) -> Query[Any]:
    parts: list[Query[Any]] = []
    for _ in range(pick(draw, [2, 2, 2, 3])):
        query = _base(draw, depth)
        values = values_of(query)
        named = {name: pick(draw, values) for name in ("k", "n")}
        query = _order(draw, query, values).select(always(named))
        if one_in(draw, 3):
            query = query.limit(draw(st.integers(0, 3)))
        if one_in(draw, 4):
            query = query.distinct()
        parts.append(query)
    return parts[0].union_all(*parts[1:])


def _query(draw: st.DrawFn, depth: int) -> Query[Any]:
    if one_in(draw, 6):
        query = _union(draw, depth)
        return query if one_in(draw, 4) else _clauses(draw, query)
    return _clauses(draw, _base(draw, depth))


@st.composite
def joined_queries(draw: st.DrawFn) -> Query[Any]:
    return build(_query(draw, depth=1))
