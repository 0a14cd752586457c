"""Durable chats of several processes: one runs it, and when that is killed another goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from aidb_ray import Database, UnavailableError, connect, durable_chat, tool
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext
from aidb_ray.runtime import ActorOptions, ActorRef, spawn
from aidb_ray.testing import CallTool, Reply, ScriptedModel, assert_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

URL = "aidb://chat/1"
SOON_MS = 60_000


@tool
async def where(ctx: ToolContext) -> str:
    """Tell which process it is."""
    return f"{os.getpid()} at attempt {ctx.attempt}"


class Caller:
    """A process that calls."""

    def __init__(self, database: Database, witness: Path) -> None:
        self._database = database
        self._witness = witness

    async def pid(self) -> int:
        return os.getpid()

    async def ask(self) -> str:
        return await durable_chat(
            adapter=ScriptedModel(self._play),
            messages=[{"role": "user", "content": "Where?"}],
            tools=[where],
            session=self._database.session(URL),
            generation_id="g",
            lease_ms=1_000,
        )

    def _play(self, messages: Sequence[ModelMessage]) -> Reply:
        with self._witness.open("a") as file:
            file.write(f"{len(messages)}\n")
        last = messages[-1]
        return f"In {last.content}." if last.role == "tool" else CallTool("where")


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


async def test_a_chat_of_a_killed_process_is_gone_on_with_by_one_that_waits(
    db: Database, tmp_path: Path
) -> None:
    witness = tmp_path / "asked"
    options = ActorOptions(timeout_ms=SOON_MS, max_restarts=0)
    callers: list[ActorRef[Caller]] = [await spawn(Caller, options, db, witness) for _ in range(3)]
    pids = await asyncio.gather(*(caller.ask(Caller.pid) for caller in callers))
    for caller in callers:
        # Whoever runs it first dies there; the others are let live again.
        await caller.arm("tool.ran", 1)
    asking = [asyncio.create_task(caller.ask(Caller.ask)) for caller in callers]
    dying = [asyncio.create_task(caller.until_dead()) for caller in callers]
    await asyncio.wait(dying, return_when=asyncio.FIRST_COMPLETED)
    [dead] = [at for at, task in enumerate(dying) if task.done()]
    alive = [at for at in range(3) if at != dead]
    for at in alive:
        await callers[at].disarm()

    answers = {await asking[at] for at in alive}

    with pytest.raises(UnavailableError):
        await asking[dead]
    [answer] = answers
    assert answer in {f"In {pids[at]} at attempt 2." for at in alive}
    # A round each, whoever asked.
    assert witness.read_text().split() == ["1", "3"]
    session = db.session(URL)
    await assert_rows(session.generations, [{"status": "completed", "output": answer}])
    await assert_rows(session.tool_calls, [{"attempt": 2, "in_doubt": True}])
    for task in dying:
        task.cancel()
    await asyncio.wait(dying)
    for at in alive:
        await callers[at].stop()
