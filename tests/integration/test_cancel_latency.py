"""A cancel reaches the model's server from another process, and leaves nothing behind.

How long it takes is a figure: `python -m benchmarks cancel`.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aidb_ray import Agent, Database, connect, tool
from aidb_ray.runtime import ActorOptions, ActorRef, spawn
from aidb_ray.store.claims import CLAIMS
from benchmarks.cancel import cancel_one, make_agent
from benchmarks.model_server import ModelServer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CANCELS = 50
SOON_MS = 60_000


class Held(NamedTuple):
    """What a process holds.

    Attributes:
        sockets: Its open connections to the model's server.
    """

    tasks: int
    threads: int
    files: int
    sockets: int


def connections_to(port: int) -> set[str]:
    """Return the inodes of sockets of this machine that are connected to a local port."""
    found: set[str] = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == port:
            found.add(fields[9])
    return found


def held_by(pid: int, port: int, tasks: int) -> Held:
    """Look at a process from outside."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    connected = connections_to(port)
    return Held(
        tasks,
        len(os.listdir(f"/proc/{pid}/task")),
        len(links),
        sum(link.removeprefix("socket:[").removesuffix("]") in connected for link in links),
    )


@tool
async def count_tasks() -> int:
    """Count the tasks of the agent's process."""
    gc.collect()
    return len(asyncio.all_tasks())


async def look(agent: Agent, port: int, name: str) -> Held:
    """Have the agent count its tasks, and look at its process once that has been answered."""
    handle = agent.send("tool count_tasks", session=f"aidb://talker/{name}")
    tasks = int((await handle.reply(timeout_ms=SOON_MS)).content)
    [status] = await agent.status()
    return held_by(status.pid, port, tasks)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


@pytest.fixture
async def server() -> AsyncIterator[ActorRef[ModelServer]]:
    found = await spawn(ModelServer, ActorOptions(timeout_ms=SOON_MS))
    yield found
    await found.stop()


async def look_until_as(before: Held, agent: Agent, port: int) -> Held:
    """Look until the process holds no more than before; a call of its own may be under way."""
    after = before
    for number in range(20):
        after = await look(agent, port, f"after-{number}")
        if all(now <= was for now, was in zip(after, before, strict=True)):
            break
    return after


async def test_a_cancelled_run_leaves_no_task_thread_socket_or_claim(
    db: Database, server: ActorRef[ModelServer]
) -> None:
    port = await server.ask(ModelServer.listen)
    agent = make_agent(port, tools=[count_tasks])
    # What is made once, such as the threads of a pool, is made by then.
    for number in range(3):
        await cancel_one(agent, server, f"warm-up {number}")
    before = await look(agent, port, "before")

    for number in range(CANCELS):
        until_closed, until_written = await cancel_one(agent, server, f"stream {number}")
        assert until_closed > 0
        assert until_written > 0

    assert await server.ask(ModelServer.open_streams) == []
    after = await look_until_as(before, agent, port)
    assert all(now <= was for now, was in zip(after, before, strict=True)), (after, before)
    assert after.sockets == 0
    [status] = await agent.status()
    assert (status.pending, status.running) == (0, 0)
    await check_rows(db)


async def check_rows(db: Database) -> None:
    """Every run ended as cancelled, every request was carried out, and nothing is claimed."""
    sessions = await db.sessions("aidb://talker/stream")
    assert len(sessions) == CANCELS
    for session in sessions:
        generations = await db.query(lambda q: q.from_(g=session.generations))  # noqa: B023
        requests = await db.query(lambda q: q.from_(r=session.cancel_requests))  # noqa: B023
        claims: list[Any] = await db.query(
            lambda q: q.from_(c=session.collection(CLAIMS)),  # noqa: B023
        )
        assert [generation.status for generation in generations] == ["cancelled"]
        assert [request.done for request in requests] == [True]
        assert claims == []


async def test_a_socket_that_is_left_is_seen(db: Database, server: ActorRef[ModelServer]) -> None:
    """What looks for leftovers finds those of a run that still goes on."""
    port = await server.ask(ModelServer.listen)
    agent = make_agent(port, tools=[count_tasks])
    before = await look(agent, port, "before")
    asked = agent.send("on and on", session="aidb://talker/on")
    await server.ask(ModelServer.begun, "on and on")

    during = await look(agent, port, "during")

    assert during.sockets == before.sockets + 1
    assert during.tasks > before.tasks
    assert await server.ask(ModelServer.open_streams) == ["on and on"]
    await agent.cancel(session=asked.session)
    await server.ask(ModelServer.closed_at, "on and on")
