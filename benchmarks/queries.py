"""Microseconds that live queries over many rows take for each delta; no store, no processes."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from aidb_ray import avg, count, eq, gt, max_
from aidb_ray.expressions import SourceRef
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.query.operators import Pipeline, RowChange
from benchmarks.harness import Figure, Rig, percentile

Row = dict[str, Any]

TASKS_A_USER = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many tasks there are, each of one of a hundredth as many users, and how many change.

    Attributes:
        kept: How many there are when memory is measured.
    """

    tasks: int = 100_000
    changes: int = 5_000
    kept: tuple[int, ...] = (10_000, 40_000)


FULL = Sizes()
QUICK = Sizes(tasks=5_000, changes=500, kept=(1_000, 4_000))


@dataclass(frozen=True, slots=True)
class Rows:
    """A collection as queries know it."""

    name: str

    def as_source(self) -> SourceRef[Row]:
        return SourceRef(self.name)


TASKS, USERS = Rows("tasks"), Rows("users")


def join() -> Query[Any]:
    return QueryRoot().from_(t=TASKS).inner_join(u=USERS, on=lambda t, u: eq(t.by, u.id))


def outer_join() -> Query[Any]:
    tasks = QueryRoot().from_(t=TASKS)
    return tasks.full_join(u=USERS, on=lambda t, u: eq(t.by, u.id) & gt(t.n, u.n))


def top_20() -> Query[Any]:
    ordered = join().order_by(lambda t: t.n, "desc").order_by(lambda u: u.n).limit(20)
    return ordered.select(lambda t, u: {"task": t.id, "user": u.id})


def groups() -> Query[Any]:
    grouped = join().group_by(lambda u: u.team)
    return grouped.select(lambda t, u: {"team": u.team, "tasks": count(), "mean": avg(t.n)})


def sub_query() -> Query[Any]:
    newest = QueryRoot().from_(t=TASKS).group_by(lambda t: t.by)
    newest = newest.select(lambda t: {"by": t.by, "n": max_(t.n), "tasks": count()})
    return QueryRoot().from_(s=newest).inner_join(u=USERS, on=lambda s, u: eq(s.by, u.id))


def union() -> Query[Any]:
    pairs = join().select(lambda t, u: {"id": t.id, "n": t.n})
    high = QueryRoot().from_(t=TASKS).where(lambda t: gt(t.n, 900_000))
    return pairs.union_all(high.select(lambda t: {"id": t.id, "n": t.n}))


QUERIES: dict[str, tuple[Callable[[], Query[Any]], str]] = {
    "join": (join, "tasks with their users"),
    "outer_join": (outer_join, "a full join with a second condition"),
    "top_20": (top_20, "the greatest 20 of the join, each change a new one"),
    "groups": (groups, "the join summed up by a value of the users, 20 groups"),
    "sub_query": (sub_query, "a query with a group for each user, joined with the users"),
    "union": (union, "the join and a tenth of the tasks again"),
}


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure each query when single tasks change, and the join when a user does."""
    del rig
    figures: list[Figure] = []
    rows = f"{sizes.tasks:,} tasks of {sizes.tasks // TASKS_A_USER:,} users"
    for name, (make, about) in QUERIES.items():
        pipeline = filled(make(), sizes)
        changes = new_tops(sizes) if name == "top_20" else task_changes(pipeline, sizes)
        mean, worst = time_a_delta(pipeline, changes)
        figures.append(Figure(f"{name}_us", mean, f"a delta; {about}; {rows}"))
        figures.append(Figure(f"{name}_p99_us", worst, "a commit that changes one task"))
    pipeline = filled(join(), sizes)
    mean, _worst = time_a_delta(pipeline, user_changes(sizes))
    figures.append(Figure("join_by_user_us", mean, "a delta; a user changes, 100 pairs with it"))
    for name, (make, _about) in QUERIES.items():
        kept = [bytes_a_task(make(), tasks) for tasks in sizes.kept]
        few = ", ".join(
            f"{size:,.0f} at {tasks:,}" for size, tasks in zip(kept, sizes.kept, strict=True)
        )
        figures.append(Figure(f"{name}_bytes", kept[-1], f"kept for a task, as a row: {few} tasks"))
    return figures


def numbers(seed: int) -> Random:
    """Return the same numbers every time."""
    return Random(seed)  # noqa: S311  No secret.


def task(number: int, n: int, sizes: Sizes) -> Row:
    by = f"u{number % (sizes.tasks // TASKS_A_USER)}"
    return {"id": f"t{number}", "by": by, "n": n, "text": "hello " * 10}


def user(number: int, n: int) -> Row:
    return {"id": f"u{number}", "team": number % 20, "n": n}


def all_rows(pipeline: Pipeline[Any], sizes: Sizes) -> list[RowChange]:
    """Return every row for each input of a query."""
    drawn = numbers(1)
    tasks = [task(number, drawn.randrange(1_000_000), sizes) for number in range(sizes.tasks)]
    users = [user(number, drawn.randrange(1_000)) for number in range(sizes.tasks // TASKS_A_USER)]
    return [
        RowChange(one.name, row["id"], row, 1)
        for one in pipeline.inputs
        for row in (tasks if one.source.name == "tasks" else users)
    ]


def filled(query: Query[Any], sizes: Sizes) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(query)
    pipeline.advance(all_rows(pipeline, sizes))
    return pipeline


def task_changes(pipeline: Pipeline[Any], sizes: Sizes) -> Iterator[list[RowChange]]:
    """Yield commits in each of which a task changes, moves to another user, or goes and comes."""
    drawn = numbers(2)
    inputs = [one.name for one in pipeline.inputs if one.source.name == "tasks"]
    for at in range(sizes.changes):
        number = drawn.randrange(sizes.tasks)
        row = task(number, drawn.randrange(1_000_000), sizes)
        if at % 3 == 1:
            row["by"] = f"u{drawn.randrange(sizes.tasks // TASKS_A_USER)}"
        yield [RowChange(name, row["id"], None if at % 3 == 2 else row, at + 2) for name in inputs]


def new_tops(sizes: Sizes) -> Iterator[list[RowChange]]:
    """Yield commits in each of which a task becomes the greatest of all."""
    drawn = numbers(3)
    for at in range(sizes.changes):
        row = task(drawn.randrange(sizes.tasks), 1_000_000 + at, sizes)
        yield [RowChange("t", row["id"], row, at + 2)]


def user_changes(sizes: Sizes) -> Iterator[list[RowChange]]:
    """Yield commits in each of which a user changes."""
    for at in range(max(1, sizes.changes // TASKS_A_USER)):
        row = user(at % (sizes.tasks // TASKS_A_USER), 1_000 + at)
        yield [RowChange("u", row["id"], row, at + 2)]


def time_a_delta(
    pipeline: Pipeline[Any], commits: Iterator[list[RowChange]]
) -> tuple[float, float]:
    """Return the mean microseconds a delta, and of a commit the 99th percentile."""
    deltas = 0
    took: list[float] = []
    gc.collect()
    for commit in commits:
        began = time.perf_counter()
        deltas += len(pipeline.advance(commit))
        took.append(1e6 * (time.perf_counter() - began))
    return sum(took) / max(1, deltas), percentile(took, 99)


def bytes_a_task(query: Query[Any], tasks: int) -> float:
    """Return how much a query keeps for a task, what it keeps of the row included."""
    sizes = Sizes(tasks=tasks)
    pipeline: Pipeline[Any] = Pipeline(query)
    gc.collect()
    tracemalloc.start()
    pipeline.advance(all_rows(pipeline, sizes))
    gc.collect()
    kept, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / tasks
