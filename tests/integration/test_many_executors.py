"""Many processes that start one effect at the same time: one executor, and no row is run twice."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aidb_ray import connect, create_tool_execution_effect, eq, tool
from tests.starters import PROCESSES, TASKS, Starters, starting
from tests.unit.test_effects import ended

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

STARTERS = PROCESSES * TASKS
URL = "aidb://many/1"


@tool
def note(path: str, what: str) -> int:
    """Write a line, and say where."""
    with Path(path).open("a") as file:
        file.write(what + "\n")
    return os.getpid()


@pytest.fixture
async def starters() -> AsyncIterator[Starters]:
    async with starting() as ready:
        yield ready


def start_effect(data_dir: Path, placement: Any) -> Callable[[int], Awaitable[tuple[int, int]]]:
    """Return what each starter does: start the effect and have a row of its own run."""
    path = str(data_dir.with_name(placement))

    async def start(number: int) -> tuple[int, int]:
        async with connect(data_dir=data_dir, database="executors") as db:
            calls = db.session(URL).tool_calls
            effect = create_tool_execution_effect(
                query=lambda q: q.from_(tc=calls).where(lambda tc: eq(tc.status, "pending")),
                tools=[note],
                name=f"notes-{placement}",
                placement=placement,
                database=db,
            )
            await effect.ready()
            args = {"path": path, "what": f"{placement} {number}"}
            key = f"{placement}-{number}"
            await calls.insert({"id": key, "generation_id": "g", "name": "note", "args": args})
            async with asyncio.timeout(60):
                row = await ended(calls, key)
            [status] = await effect.status()
            return row.result, status.pid

    return start


@pytest.mark.parametrize("placement", ["actor", "here"])
async def test_each_row_is_run_once_whoever_starts_the_effect(
    starters: Starters, tmp_path: Path, placement: str
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()

    ran = await starters.run(start_effect(data_dir, placement))

    lines = Counter((tmp_path / placement).read_text("utf-8").splitlines())
    assert lines == {f"{placement} {number}": 1 for number in range(STARTERS)}
    pids = {pid for _, pid in ran}
    assert len(pids) == (1 if placement == "actor" else PROCESSES)
    assert {result for result, _ in ran} <= pids
    async with connect(data_dir=data_dir, database="executors") as db:
        calls = db.session(URL).tool_calls
        if placement == "actor":
            effect = create_tool_execution_effect(
                query=lambda q: q.from_(tc=calls).where(lambda tc: eq(tc.status, "pending")),
                tools=[note],
                name="notes-actor",
                database=db,
            )
            await effect.aclose()
        await db.shutdown()
