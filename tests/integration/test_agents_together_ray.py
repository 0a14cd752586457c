"""Agents that work for one another, each in processes of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    AgentTool,
    Database,
    Generation,
    WorkerAgent,
    connect,
    create_agent,
    create_worker_agent,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.runtime import ActorOptions, spawn
from aidb_ray.testing import CallTool, Reply, ScriptedModel

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

URL = "aidb://brief/1"
SOON_MS = 90_000


class Long(BaseModel):
    text: str


class Where(BaseModel):
    pid: int
    flavour: str


@tool
async def where() -> dict[str, Any]:
    """Return the process, and what its environment says."""
    return {"pid": os.getpid(), "flavour": os.environ.get("FLAVOUR", "")}


def tell(messages: Sequence[ModelMessage]) -> Reply:
    return messages[-1].content if messages[-1].role == "tool" else CallTool("where")


def make_worker(**options: Any) -> WorkerAgent[Long, Where]:
    made: WorkerAgent[Long, Where] = create_worker_agent(
        name="teller",
        description="Tell where you are.",
        adapter=ScriptedModel(tell),
        input_schema=Long,
        output_schema=Where,
        tools=[where],
        **options,
    )
    return made


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


def research(messages: Sequence[ModelMessage]) -> Reply:
    if messages[-1].role == "tool":
        return f"Facts by {messages[-1].content}"
    return CallTool("teller", {"text": messages[-1].content})


def write(messages: Sequence[ModelMessage]) -> Reply:
    return f"Text of {messages[-1].content}"


def coordinate(messages: Sequence[ModelMessage]) -> Reply:
    last_user = max(at for at, message in enumerate(messages) if message.role == "user")
    match [message.content for message in messages[last_user:] if message.role == "tool"]:
        case []:
            return CallTool("researcher", {"message": "lithium"})
        case [facts]:
            return CallTool("writer", {"message": facts})
        case answers:
            return answers[-1]


async def start_brief() -> dict[str, Agent]:
    agents = {
        "researcher": create_agent(
            durable_agent(
                name="researcher",
                adapter=ScriptedModel(research, tokens_per_second=100),
                tools=[make_worker()],
                stream_url="aidb://brief/*",
            )
        ),
        "writer": create_agent(
            durable_agent(
                name="writer",
                adapter=ScriptedModel(write, tokens_per_second=100),
                stream_url="aidb://brief/*",
            )
        ),
    }
    agents["coordinator"] = create_agent(
        durable_agent(
            name="coordinator",
            adapter=ScriptedModel(coordinate, tokens_per_second=100),
            agents=[AgentTool(agent) for agent in agents.values()],
            stream_url="aidb://brief/*",
        )
    )
    for agent in agents.values():
        await agent.ready()
    return agents


async def test_a_brief_goes_through_the_processes_of_all(db: Database) -> None:
    agents = await start_brief()
    reply = await agents["coordinator"].send("brief", session=URL).reply(timeout_ms=SOON_MS)

    assert reply.content.startswith('Text of Facts by {"pid":')
    pids = {(await agent.status())[0].pid for agent in agents.values()}
    [teller] = await db.agent("teller").status()
    assert f'"pid":{teller.pid}' in reply.content
    assert len({*pids, teller.pid, os.getpid()}) == 5


async def test_isolated_runs_have_processes_and_environments_of_their_own(db: Database) -> None:
    worker = make_worker(
        isolated=True,
        pool_size=2,
        ray_options={"runtime_env": {"env_vars": {"FLAVOUR": "sweet"}}, "num_cpus": 0.1},
    )

    told = await asyncio.gather(*(worker.run(Long(text=str(n)), run_id=str(n)) for n in range(3)))

    assert len({each.pid for each in told} - {os.getpid()}) == 3
    assert {each.flavour for each in told} == {"sweet"}
    for each in told:
        await until_gone(each.pid)


async def until_gone(pid: int) -> None:
    async with asyncio.timeout(SOON_MS / 1000):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110, ASYNC240  It sends no event.
            await asyncio.sleep(0.05)


class Caller:
    """Uses a worker from a process of its own."""

    def __init__(self, database: Database, workers: list[WorkerAgent[Long, Where]]) -> None:
        self._database = database
        self._workers = workers

    async def call(self) -> list[int]:
        from aidb_ray.database import set_current_database

        set_current_database(self._database)
        calls = (worker.run(Long(text="hi")) for worker in self._workers)
        return [told.pid for told in await asyncio.gather(*calls)]


async def test_all_who_start_a_pool_at_once_get_the_same(db: Database) -> None:
    options = ActorOptions(timeout_ms=SOON_MS)
    callers = [
        await spawn(Caller, options, db, [make_worker(pool_size=2) for _ in range(4)])
        for _ in range(4)
    ]
    found = await asyncio.gather(*(caller.ask(Caller.call) for caller in callers))
    pids = list(itertools.chain(*found))

    status = await db.agent("teller").status()
    assert len(pids) == 16
    assert set(pids) <= {shard.pid for shard in status}
    assert len(status) == 2
    assert not any(shard.fenced for shard in status)


@pytest.mark.chaos
async def test_a_brief_outlives_sigkills_of_whoever_is_asked_to_work(db: Database) -> None:
    """Each brief has one agent killed while it is at work, in turn."""
    agents = await start_brief()
    kills: Counter[str] = Counter()
    victims = ["coordinator", "researcher", "writer", "teller", "coordinator", "researcher"]
    for number, victim in enumerate(victims):
        url = f"aidb://brief/{number}"
        session = db.session(url)
        watched = "aidb://teller/*" if victim == "teller" else url
        generations = db.collection("generations", Generation, session=watched)
        begun = db.live_query(
            lambda q: q.from_(g=generations).where(  # noqa: B023
                lambda g: eq(g.agent, victim) & eq(g.status, "running")  # noqa: B023
            )
        )
        await begun.ready()
        handle = agents["coordinator"].send("brief", session=url, message_id="m")
        async for delta in begun:
            if delta.op == "enter":
                break
        [status] = await db.agent(victim).status()
        os.kill(status.pid, signal.SIGKILL)
        kills[victim] += 1

        reply = await handle.reply(timeout_ms=SOON_MS)
        assert reply.content.startswith("Text of Facts by")
        messages = await db.query(lambda q: q.from_(m=session.messages))  # noqa: B023
        assert len(messages) == 6
        asked = {m.id for m in messages if m.role == "user"}
        answered = Counter(m.in_reply_to for m in messages if m.role == "assistant")
        assert answered == dict.fromkeys(asked, 1)
        assert all(message.processed for message in messages)
    assert kills == Counter(victims)
