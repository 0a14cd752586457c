"""Crash points of actors that are processes: they are killed, and Ray starts others for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from aidb_ray import (
    Database,
    ToolCall,
    connect,
    create_agent,
    create_tool_execution_effect,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext
from aidb_ray.testing import CallTool, Reply, ScriptedModel, assert_rows, crash_at

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

URL = "aidb://echo/1"
SOON_MS = 60_000


@tool
async def pay(ctx: ToolContext) -> str:
    """Pay."""
    return f"attempt {ctx.attempt}"


def play(messages: Sequence[ModelMessage]) -> Reply:
    last = messages[-1]
    return f"Paid at {last.content}." if last.role == "tool" else CallTool("pay")


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


async def test_an_agent_is_killed_at_a_point_and_another_process_goes_on(db: Database) -> None:
    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[pay]))
    [before] = await agent.status()

    async with crash_at("tool.ran", of=agent) as crash:
        asked = agent.send("Pay.", session=URL)
        await crash.happened(within_ms=SOON_MS)

    assert (await asked.reply(timeout_ms=SOON_MS)).content == "Paid at attempt 2."
    [after] = await agent.status()
    assert after.pid != before.pid
    assert after.epoch > before.epoch
    # The one that took its place is not armed.
    again = agent.send("Pay.", session="aidb://echo/2")
    assert (await again.reply(timeout_ms=SOON_MS)).content == "Paid at attempt 1."


async def test_a_store_is_killed_at_a_point_and_keeps_what_it_logged(db: Database) -> None:
    rows = db.collection("rows")
    [before] = await db.status()

    async with crash_at("store.logged", of=db) as crash:
        writing = rows.insert({"id": "a"})
        await crash.happened(within_ms=SOON_MS)

    # Sent again to the next one, which knows that it has it.
    await writing
    [after] = await db.status()
    assert after.pid != before.pid
    await assert_rows(rows, [{"id": "a"}])


async def test_an_executor_is_killed_at_a_point_and_another_process_goes_on(db: Database) -> None:
    calls = db.session(URL).tool_calls
    effect = create_tool_execution_effect(
        query=lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "pending")), tools=[pay]
    )
    [before] = await effect.status()

    async with crash_at("effect.ran", of=effect) as crash:
        await calls.insert(ToolCall(id="c", generation_id="g", name="pay"))
        await crash.happened(within_ms=SOON_MS)

    await assert_rows(calls, [{"status": "completed", "result": "attempt 2"}], within_ms=SOON_MS)
    [after] = await effect.status()
    assert after.pid != before.pid
    await effect.aclose()
