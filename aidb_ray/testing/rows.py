"""Assertions on rows, at once or as soon as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from aidb_ray.database import Database, current_database
from aidb_ray.query.live import LiveQuery, Question
from aidb_ray.store.collection import Collection

R = TypeVar("R")

Expected: TypeAlias = "Mapping[str, Any] | object"
"""A row as it should be: its fields that matter, a value each or a function that says whether the
value will do; or the whole row as its type."""

_MOST_SHOWN = 20


async def eventually(
    rows: Collection[R] | Question[R],
    condition: Callable[[list[R]], object],
    *,
    within_ms: int = 10_000,
    database: Database | None = None,
) -> list[R]:
    """Wait until rows meet a condition, and return them as they are then.

    It is asked of the rows as they are, and again whenever one of them changes; nothing sleeps.

    Args:
        rows: A collection, or a query as `db.live_query` takes it.
        condition: What the rows must meet. One that raises AssertionError does not, yet.
        within_ms: How long to wait.
        database: Where a query reads; default: the current one.

    Raises:
        AssertionError: they did not in time. It says what there was instead.
    """
    live = _follow(rows, database)
    refusal: AssertionError | None = None
    try:
        async with asyncio.timeout(within_ms / 1000):
            await live.ready()
            deltas = aiter(live)
            while True:
                found = live.rows
                try:
                    if condition(found):
                        return found
                    refusal = None
                except AssertionError as error:
                    refusal = error
                await anext(deltas)
    except TimeoutError:
        there = live.rows if live.is_ready else []
        what = f"{_name_of(rows)} did not come to what was waited for within {within_ms} ms."
        why = f"\n{refusal}" if refusal is not None else f" Its rows are:{_shown(there)}"
        raise AssertionError(what + why) from refusal
    finally:
        await live.aclose()


async def assert_rows(
    rows: Collection[R] | Question[R],
    expected: Sequence[Expected],
    *,
    within_ms: int = 0,
    database: Database | None = None,
) -> list[R]:
    """Assert that rows are the expected ones, each exactly one, in any order; return them.

    The rows are in order of session and key, or in that of the query.

    Args:
        rows: A collection, or a query as `db.live_query` takes it.
        expected: What each row should be: a mapping of the fields that matter, whose values are
            compared, or called if they can be; or a whole row.
        within_ms: How long the rows may take to become so.
        database: Where a query reads; default: the current one.

    Raises:
        AssertionError: they are not. It says which are missing and which nobody expected.
    """

    def check(found: list[R]) -> bool:
        _check(_name_of(rows), found, expected)
        return True

    if within_ms:
        return await eventually(rows, check, within_ms=within_ms, database=database)
    live = _follow(rows, database)
    async with live:
        found = live.rows
    check(found)
    return found


def _follow(rows: Collection[R] | Question[R], database: Database | None) -> LiveQuery[R]:
    if isinstance(rows, Collection):
        collection = cast("Collection[R]", rows)
        return LiveQuery(collection.sites, lambda q: q.from_(row=collection))
    return LiveQuery(database or current_database(), rows)


def _name_of(rows: Collection[Any] | Question[Any]) -> str:
    return repr(cast("object", rows)) if isinstance(rows, Collection) else "The query"


def _check(name: str, found: Sequence[Any], expected: Sequence[Expected]) -> None:
    """Raise unless there is a way to pair each row with one of the expected, and none is left."""
    partner = _pair(found, expected)
    taken = set(partner.values())
    missing = [wanted for at, wanted in enumerate(expected) if at not in taken]
    extra = [row for at, row in enumerate(found) if at not in partner]
    if not missing and not extra:
        return
    lines = [f"{name} has {len(found)} rows; {len(expected)} were expected."]
    for wanted in missing[:_MOST_SHOWN]:
        lines.append(f"Missing: {_shown_expected(wanted)}")
        lines += [f"    {why}" for why in _nearest(wanted, extra)]
    if extra:
        lines.append(f"Not expected:{_shown(extra)}")
    raise AssertionError("\n".join(lines))


def _pair(found: Sequence[Any], expected: Sequence[Expected]) -> dict[int, int]:
    """Return which expected one each row is, as many as can be: an expectation may fit several."""
    row_of: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for at, wanted in enumerate(expected):
            if at in tried or _differences(found[row], wanted):
                continue
            tried.add(at)
            if at not in row_of or place(row_of[at], tried):
                row_of[at] = row
                return True
        return False

    for row in range(len(found)):
        place(row, set())
    return {row: at for at, row in row_of.items()}


def _differences(row: Any, wanted: Expected) -> list[str]:
    """Return in words how a row differs from what it should be."""
    if not isinstance(wanted, Mapping):
        return [] if row == wanted else ["it is another row"]
    differs: list[str] = []
    for name, value in cast("Mapping[str, Any]", wanted).items():
        there = _field(row, name)
        if there is ...:
            differs.append(f"{name}: there is no such field")
        elif callable(value):
            if not value(there):
                differs.append(f"{name} is {there!r}, which {_name_of_test(value)} refuses")
        elif there != value:
            differs.append(f"{name} is {there!r}, not {value!r}")
    return differs


def _field(row: Any, name: str) -> Any:
    if isinstance(row, Mapping):
        return cast("Mapping[str, Any]", row).get(name, ...)
    return getattr(row, name, ...)


def _nearest(wanted: Expected, rows: Sequence[Any]) -> list[str]:
    """Return how the most similar of the rows differs."""
    if not rows:
        return []
    return min((_differences(row, wanted) for row in rows), key=len)


def _name_of_test(test: Callable[..., Any]) -> str:
    return getattr(test, "__name__", repr(test))


def _shown_expected(wanted: Expected) -> str:
    if not isinstance(wanted, Mapping):
        return repr(wanted)
    fields = cast("Mapping[str, Any]", wanted)
    return ", ".join(
        f"{name}={_name_of_test(value) if callable(value) else repr(value)}"
        for name, value in fields.items()
    )


def _shown(rows: Sequence[Any]) -> str:
    shown = [f"\n    {row!r}" for row in rows[:_MOST_SHOWN]]
    if len(rows) > _MOST_SHOWN:
        shown.append(f"\n    and {len(rows) - _MOST_SHOWN} more")
    return "".join(shown) or " none"
