"""A live query keeps what a later change may need, and nothing else of its rows."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from aidb_ray import count, eq, gt, is_undefined, lt, max_
from aidb_ray.expressions import SourceRef
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.query.operators import Pipeline, RowChange

Row = dict[str, Any]

TEXT_BYTES = 4_000
"""How much there is in a row that no query below asks for."""

LITTLE = 1_500
"""More than any entry takes, and less than a row."""


@dataclass(frozen=True)
class Rows:
    """A collection as queries know it."""

    name: str

    def as_source(self) -> SourceRef[Row]:
        return SourceRef(self.name)


TASKS, USERS = Rows("tasks"), Rows("users")


def tasks() -> Query[Any]:
    return QueryRoot().from_(t=TASKS)


def join() -> Query[Any]:
    return tasks().left_join(u=USERS, on=lambda t, u: eq(t.by, u.id) & gt(t.n, u.n))


def newest() -> Query[Any]:
    return tasks().order_by(lambda t: t.n, "desc").limit(20)


def busiest() -> Query[Any]:
    busy = tasks().group_by(lambda t: t.by).select(lambda t: {"by": t.by, "n": max_(t.n)})
    return QueryRoot().from_(s=busy).left_join(u=USERS, on=lambda s, u: eq(s.by, u.id))


NOTHING: dict[str, Callable[[], Query[Any]]] = {
    "rows that do not pass": lambda: tasks().where(lambda t: lt(t.n, 0)),
    "rows of a join that do not pass": lambda: join().where(lambda t: lt(t.n, 0)),
}
PARTS: dict[str, Callable[[], Query[Any]]] = {
    "selected values": lambda: tasks().select(lambda t: {"id": t.id}),
    "selected values of the first": lambda: newest().select(lambda t: {"id": t.id}),
    "distinct values": lambda: tasks().select(lambda t: {"by": t.by}).distinct(),
    "a total": lambda: tasks().select(lambda t: {"n": count()}),
    "groups": lambda: tasks().group_by(lambda t: t.by).select(lambda t: {"n": max_(t.n)}),
    "values of a join": lambda: join().select(lambda t, u: {"id": t.id, "user": u.id}),
    "who has no partner": lambda: (
        join().where(lambda u: is_undefined(u)).select(lambda t, u: {"id": t.id})
    ),
    "one side of a join": lambda: join().select(lambda t, u: {"id": t.id, "user": u}),
    "groups of a join": lambda: (
        join().group_by(lambda u: u.id).select(lambda t, u: {"id": u.id, "n": count()})
    ),
    "a sub-query": busiest,
}
WHOLE: dict[str, Callable[[], Query[Any]]] = {
    "rows": tasks,
    # One of the others enters when one of the first goes.
    "the first rows": newest,
    "rows of a join": join,
}


def task(number: int) -> Row:
    text = f"{number}".ljust(TEXT_BYTES, ".")
    return {"id": f"t{number}", "by": f"u{number % 50}", "n": number, "text": text}


def puts(pipeline: Pipeline[Any], source: str, rows: Iterator[Row]) -> None:
    """Take in rows, one a commit, so that nothing but the pipeline may hold them."""
    inputs = [one.name for one in pipeline.inputs if one.source.name == source]
    for row in rows:
        pipeline.advance([RowChange(name, row["id"], row, 1) for name in inputs])


@dataclass
class Kept:
    """Bytes a pipeline holds for each task, and of all when the tasks have gone again."""

    a_task: float
    left: int


def measure(make: Callable[[], Query[Any]], size: int) -> Kept:
    pipeline = Pipeline(make())
    puts(pipeline, "users", ({"id": f"u{number}", "n": 5} for number in range(50)))
    gc.collect()
    tracemalloc.start()
    try:
        puts(pipeline, "tasks", map(task, range(size)))
        gc.collect()
        kept, _peak = tracemalloc.get_traced_memory()
        inputs = [one.name for one in pipeline.inputs if one.source.name == "tasks"]
        for number in range(size):
            pipeline.advance([RowChange(name, f"t{number}", None, 2) for name in inputs])
        gc.collect()
        left, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Kept(kept / size, left)


@pytest.mark.parametrize(
    ("make", "least", "most"),
    [
        *((make, 0, 50) for make in NOTHING.values()),
        *((make, 50, LITTLE) for make in PARTS.values()),
        *((make, TEXT_BYTES, TEXT_BYTES + LITTLE) for make in WHOLE.values()),
    ],
    ids=[*NOTHING, *PARTS, *WHOLE],
)
def test_memory_is_proportional_to_what_is_kept(
    make: Callable[[], Query[Any]], least: int, most: int
) -> None:
    small, large = measure(make, 500), measure(make, 2_000)

    for kept in (small, large):
        assert least <= kept.a_task <= most
    assert large.a_task <= 1.25 * small.a_task + 10
    # Tables that have grown stay as they are; they hold nothing.
    assert large.left < 2_000 * 200
