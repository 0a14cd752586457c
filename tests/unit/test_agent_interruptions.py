"""Generations whose processes end again and again: how often, and what others have of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from aidb_ray import (
    Agent,
    Database,
    Generation,
    ModelError,
    Retry,
    RunCancelledError,
    connect,
    create_agent,
    durable_agent,
    tool,
)
from aidb_ray.agents.cycle import ALONE_AFTER
from aidb_ray.contracts import GenerationStatus
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext
from aidb_ray.testing import CallTool, Reply, ScriptedModel
from tests.stores import until

SOON_MS = 20_000
KILLER, BYSTANDER = "aidb://echo/1", "aidb://echo/2"


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aidb_ray.agents.partition.TURN_PAUSE_MS", 1)


async def say(db: Database, session: str, content: str) -> None:
    await db.session(session).messages.insert(
        {
            "id": session,
            "role": "user",
            "actor_id": "me",
            "target_agent": "echo",
            "content": content,
        }
    )


async def leave_suspect(db: Database, session: str, content: str) -> None:
    """Leave what a process leaves that was the last of some to end in the middle of a round."""
    await say(db, session, content)
    await db.session(session).generations.insert(
        Generation(
            id=session,
            agent="echo",
            status=GenerationStatus.RUNNING,
            message_ids=[session],
            interruptions=ALONE_AFTER - 1,
        )
    )


async def generation_of(db: Database, session: str) -> Generation:
    generations = db.session(session).generations
    [found] = await db.query(lambda q: q.from_(g=generations))
    return found


class Lives:
    """Processes of an agent, each of which ends once `kill` was asked and as many others run.

    A message is answered if it says so; `kill` and `hang` are not.
    """

    def __init__(self, db: Database, **options: Any) -> None:
        self._db = db
        self._options = options
        self.beside = 0
        self.asked: list[str] = []
        self._changed = asyncio.Event()
        self.asked_now: list[str] = []

    async def live(self) -> Agent:
        """Begin a life."""
        self.asked_now = []
        agent = create_agent(
            durable_agent(name="echo", adapter=ScriptedModel(self._play), **self._options)
        )
        await agent.ready()
        return agent

    async def live_and_die(self) -> list[str]:
        """Live until the killer was asked; return what was asked in this life."""
        agent = await self.live()
        async with asyncio.timeout(SOON_MS / 1000):
            while "kill" not in self.asked_now or len(self.asked_now) <= self.beside:
                self._changed.clear()
                await self._changed.wait()
        await agent.aclose()
        return self.asked_now

    async def _play(self, messages: Sequence[ModelMessage]) -> Reply:
        content = messages[-1].content
        self.asked_now.append(content)
        self.asked.append(content)
        self._changed.set()
        if content in ("kill", "hang"):
            await asyncio.Event().wait()
        return f"You said {content}."


async def test_a_round_that_ends_its_process_each_time_fails_and_others_go_on(
    db: Database,
) -> None:
    lives = Lives(db, retry=Retry(max_interruptions=5))
    await say(db, KILLER, "kill")
    for _ in range(5):
        await lives.live_and_die()

    agent = await lives.live()
    with pytest.raises(ModelError) as raised:
        await agent.reply_to(KILLER, session=KILLER).reply(timeout_ms=SOON_MS)

    assert raised.value.code == "interrupted"
    assert "5 times in a row" in str(raised.value)
    assert lives.asked == ["kill"] * 5
    failed = await generation_of(db, KILLER)
    assert (failed.status, failed.interruptions, failed.attempt) == ("failed", 5, 6)
    reply = await agent.send("hello", session=KILLER).reply(timeout_ms=SOON_MS)
    assert reply.content == "You said hello."


async def test_who_merely_runs_beside_is_counted_only_until_it_runs_alone(db: Database) -> None:
    lives = Lives(db)
    await say(db, KILLER, "kill")
    await say(db, BYSTANDER, "hang")
    lives.beside = 1
    for _ in range(ALONE_AFTER):
        assert sorted(await lives.live_and_die()) == ["hang", "kill"]

    lives.beside = 0
    left = Retry().max_interruptions - ALONE_AFTER
    for _ in range(left):
        assert await lives.live_and_die() == ["kill"]
    agent = await lives.live()
    with pytest.raises(ModelError):
        await agent.reply_to(KILLER, session=KILLER).reply(timeout_ms=SOON_MS)

    await until(lambda: "hang" in lives.asked_now)
    bystander = await generation_of(db, BYSTANDER)
    assert (bystander.status, bystander.interruptions) == ("running", ALONE_AFTER)


async def test_a_suspect_that_has_finished_a_round_lets_the_next_one_go_on(db: Database) -> None:
    waiting, gate = list[str](), asyncio.Event()

    @tool
    async def wait(ctx: ToolContext) -> str:
        """Wait."""
        waiting.append(ctx.idempotency_key)
        await gate.wait()
        return "waited"

    def play(messages: Sequence[ModelMessage]) -> Reply:
        return "done" if messages[-1].role == "tool" else CallTool("wait")

    for session in (KILLER, BYSTANDER):
        await leave_suspect(db, session, "go")

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[wait]))
    await agent.ready()
    await until(lambda: len(waiting) == 2)
    gate.set()

    assert (await agent.drain_until_idle()).completed
    for session in (KILLER, BYSTANDER):
        found = await generation_of(db, session)
        assert (found.status, found.interruptions) == ("completed", 0)


async def test_a_suspect_that_waits_its_turn_can_be_cancelled(db: Database) -> None:
    lives = Lives(db)
    for session, content in ((KILLER, "kill"), (BYSTANDER, "hang")):
        await leave_suspect(db, session, content)
    agent = await lives.live()
    await until(lambda: lives.asked)
    waiting = BYSTANDER if lives.asked == ["kill"] else KILLER

    await agent.cancel(session=waiting, reason="enough")

    with pytest.raises(RunCancelledError):
        await agent.reply_to(waiting, session=waiting).reply(timeout_ms=SOON_MS)
    assert len(lives.asked) == 1


async def test_trying_again_in_the_same_process_counts_nothing(db: Database) -> None:
    lives = Lives(db, autostart=False)
    agent = await lives.live()
    agent.send("hang", session=KILLER, message_id=KILLER)
    for _ in range(3):
        result = await agent.drain_until_idle(max_duration_ms=60, headroom_ms=10)
        assert not result.completed

    found = await generation_of(db, KILLER)
    assert (found.status, found.interruptions) == ("running", 0)
    assert found.attempt == len(lives.asked)


async def test_suspects_of_different_partitions_take_turns(tmp_path: Path) -> None:
    """What ends the process ends the work of every partition."""
    async with connect("local", data_dir=tmp_path, partitions=2) as db:
        sessions = [f"aidb://echo/{number}" for number in range(8)]
        one = sessions[0]
        other = next(s for s in sessions if db.site_of(s) is not db.site_of(one))
        lives = Lives(db)
        for session in (one, other):
            await leave_suspect(db, session, "hang")

        agent = await lives.live()
        drained = await agent.drain_until_idle(max_duration_ms=300, headroom_ms=0)
        await agent.aclose()

        assert not drained.completed
        assert lives.asked == ["hang"]
