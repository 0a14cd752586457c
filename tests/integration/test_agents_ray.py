"""Agents on Ray: what only other processes can show."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from aidb_ray import (
    Agent,
    ConfigError,
    Database,
    EnvKey,
    connect,
    create_agent,
    durable_agent,
    openai_text,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.runtime import ActorOptions, spawn
from aidb_ray.testing import CallTool, Reply, ScriptedModel

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

URL = "aidb://echo/1"
SOON_MS = 60_000


@tool
async def where() -> int:
    """Return the process."""
    return os.getpid()


@tool
async def talk() -> int:
    """Print where users look for it."""
    print("talk runs")  # noqa: T201
    raise ValueError("talk fails")


def play(messages: Sequence[ModelMessage]) -> Reply:
    last = messages[-1]
    if last.role == "tool":
        return f"In {last.content}."
    if last.content in ("where", "talk"):
        return CallTool(last.content)
    return f"You said {last.content}."


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


class Visitor:
    """Uses handles that came from another process."""

    def __init__(self, agent: Agent, database: Database) -> None:
        self._agent = agent
        self._database = database

    async def ask(self, text: str) -> tuple[int, str, int]:
        reply = await self._agent.send(text, session=URL).reply(timeout_ms=SOON_MS)
        [status] = await self._agent.status()
        return os.getpid(), reply.content, status.pid

    async def ask_by_name(self, name: str, text: str, session: str | None = URL) -> str:
        found = self._database.agent(name)
        await found.ready()
        return (await found.send(text, session=session).reply(timeout_ms=SOON_MS)).content


async def test_what_a_tool_prints_and_logs_is_seen_by_the_driver(
    db: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = create_agent(durable_agent(name="talker", adapter=ScriptedModel(play), tools=[talk]))
    await agent.send("talk", session="aidb://talker/1").reply(timeout_ms=SOON_MS)

    printed = logged = ""
    async with asyncio.timeout(SOON_MS / 1000):
        # Ray brings it when it has read it from the process's files.
        while "talk runs" not in printed or "ValueError: talk fails" not in logged:
            await asyncio.sleep(0.1)
            out, err = capsys.readouterr()
            printed, logged = printed + out, logged + err
    await agent.aclose()


async def test_an_agent_works_in_its_own_process_and_its_handle_travels(
    db: Database,
) -> None:
    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[where]))
    [status] = await agent.status()
    reply = await agent.send("where", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == f"In {status.pid}."
    assert status.pid != os.getpid()

    visitor = await spawn(Visitor, ActorOptions(timeout_ms=SOON_MS), agent, db)
    there, content, pid = await visitor.ask(Visitor.ask, "hello")
    assert content == "You said hello."
    assert len({there, pid, os.getpid()}) == 3
    assert await visitor.ask(Visitor.ask_by_name, "echo", "again") == "You said again."
    create_agent(durable_agent(name="one", adapter=ScriptedModel(play), stream_url="aidb://one"))
    await db.agent("one").ready()
    assert await visitor.ask(Visitor.ask_by_name, "one", "hi", None) == "You said hi."
    with pytest.raises(ConfigError) as raised:
        await visitor.ask(Visitor.ask_by_name, "nobody", "hello")
    assert raised.value.code == "agent_missing"
    await visitor.stop()

    # Who creates it again attaches.
    same = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[where]))
    assert [each.epoch for each in await same.status()] == [status.epoch]


async def test_shards_share_the_sessions_and_a_new_definition_replaces_them(
    db: Database,
) -> None:
    agent = create_agent(
        durable_agent(name="echo", adapter=ScriptedModel(play), tools=[where], shards=2)
    )
    await agent.ready()
    handles = [agent.send("where", session=f"aidb://echo/{number}") for number in range(12)]
    replies = [await handle.reply(timeout_ms=SOON_MS) for handle in handles]
    before = await agent.status()
    assert {reply.content for reply in replies} == {f"In {status.pid}." for status in before}
    assert [status.fenced for status in before] == [False, False]

    newer = create_agent(
        durable_agent(name="echo", adapter=ScriptedModel(play), tools=[where], version="2")
    )
    [after] = await newer.status()
    assert after.epoch > max(status.epoch for status in before)
    assert after.pid not in {status.pid for status in before}
    answer = await newer.send("where", session="aidb://echo/3").reply(timeout_ms=SOON_MS)
    assert answer.content == f"In {after.pid}."


async def test_one_that_lacks_its_key_does_not_end_the_old_one(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process has says nothing of where the agent runs."""
    monkeypatch.setenv("KEY_OF_THE_DRIVER", "k")
    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play)))
    before = await agent.status()
    keyed = openai_text("gpt-test", api_key=EnvKey("KEY_OF_THE_DRIVER"))

    with pytest.raises(ConfigError) as raised:
        await create_agent(durable_agent(name="echo", adapter=keyed)).ready()

    assert raised.value.code == "missing_api_key"
    assert await agent.status() == before
    reply = await agent.send("hello", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "You said hello."


async def test_a_handle_works_in_one_event_loop_after_the_other_of_a_process(db: Database) -> None:
    class Worker:
        """Plain code of a user, which runs an event loop for each call."""

        def ask(self, agent: Agent, text: str) -> str:
            async def ask() -> str:
                return (await agent.send(text, session=URL).reply(timeout_ms=SOON_MS)).content

            return asyncio.run(ask())

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play)))
    await agent.ready()
    worker: Any = ray.remote(num_cpus=0)(Worker).remote()
    for text in ("one", "two", "three"):
        assert await worker.ask.remote(agent, text) == f"You said {text}."
    ray.kill(worker)
