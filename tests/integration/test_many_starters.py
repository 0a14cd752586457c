"""Many processes that start one database and one agent at the same time: all get the same one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aidb_ray import Database, connect, create_agent, durable_agent
from aidb_ray.models.base import ModelMessage
from aidb_ray.testing import Reply, ScriptedModel
from tests.starters import PROCESSES, TASKS, Starters, starting

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

STARTERS = PROCESSES * TASKS
SHARED = "aidb://echo/shared"


@dataclass(frozen=True)
class Started:
    """What one starter saw: process and epoch of each shard, and the replies it got."""

    shards: list[tuple[int, int]]
    reply: str
    shared: str


def start_agent(
    data_dir: Path, round_name: str, *, shards: int = 1, partitions: int = 1, **options: Any
) -> Callable[[int], Awaitable[Started]]:
    """Return what each starter does: connect, create the agent, and talk to it."""
    witness = data_dir.with_name("asked")

    def play(messages: Sequence[ModelMessage]) -> Reply:
        # The model is asked in the agent's process; appending a line is atomic.
        with witness.open("a") as file:
            file.write(messages[-1].content + "\n")
        return f"You said {messages[-1].content}."

    async def start(number: int) -> Started:
        if number % 4 == 1:
            # One that gives up in the middle keeps nobody else from starting.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.03 * number):
                    await connect(data_dir=data_dir, database="starters", partitions=partitions)
        db = await connect(data_dir=data_dir, database="starters", partitions=partitions)
        definition = durable_agent(
            name="echo", adapter=ScriptedModel(play), shards=shards, **options
        )
        agent = create_agent(definition, database=db)
        await agent.ready()
        shards_seen = [(status.pid, status.epoch) for status in await agent.status()]
        mine = agent.send(f"{round_name} {number}", session=f"aidb://echo/{round_name}-{number}")
        # Whoever comes first asks; the others find the question, or the answer.
        shared = agent.send(round_name, session=SHARED, message_id=f"shared-{round_name}")
        reply = (await mine.reply(timeout_ms=60_000)).content
        seen = Started(shards_seen, reply, (await shared.reply(timeout_ms=60_000)).content)
        await db.aclose()
        return seen

    return start


def check(data_dir: Path, round_name: str, started: list[Started]) -> list[tuple[int, int]]:
    """All saw one runner and got their own answer, and nothing was asked twice."""
    assert len(started) == STARTERS
    [shards] = {tuple(each.shards) for each in started}
    assert [each.reply for each in started] == [
        f"You said {round_name} {number}." for number in range(STARTERS)
    ]
    assert {each.shared for each in started} == {f"You said {round_name}."}
    asked = Counter(data_dir.with_name("asked").read_text().splitlines())
    of_round = {words: n for words, n in asked.items() if words.startswith(round_name)}
    assert of_round == {
        round_name: 1,
        **{f"{round_name} {number}": 1 for number in range(STARTERS)},
    }
    return [*shards]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    home = tmp_path / "data"
    home.mkdir()
    return home


@pytest.fixture
async def starters() -> AsyncIterator[Starters]:
    async with starting() as ready:
        yield ready


async def shut_down(data_dir: Path, partitions: int = 1) -> None:
    db: Database = await connect(data_dir=data_dir, database="starters", partitions=partitions)
    await db.agent("echo").aclose()
    await db.shutdown()


async def test_all_get_one_runner_and_no_message_is_answered_twice(
    starters: Starters, data_dir: Path
) -> None:
    first = check(data_dir, "first", await starters.run(start_agent(data_dir, "first")))
    # It outlives those who started it, and whoever comes later finds it.
    assert check(data_dir, "again", await starters.run(start_agent(data_dir, "again"))) == first

    [(pid, epoch)] = first
    os.kill(pid, signal.SIGKILL)
    [(new_pid, new_epoch)] = check(
        data_dir, "killed", await starters.run(start_agent(data_dir, "killed"))
    )
    assert new_pid != pid
    assert new_epoch > epoch

    [(newer_pid, newer_epoch)] = check(
        data_dir, "newer", await starters.run(start_agent(data_dir, "newer", version="2"))
    )
    assert newer_pid != new_pid
    assert newer_epoch > new_epoch
    await shut_down(data_dir)


async def test_all_get_all_shards_and_all_partitions(starters: Starters, data_dir: Path) -> None:
    start = start_agent(data_dir, "first", shards=2, partitions=2)

    shards = check(data_dir, "first", await starters.run(start))

    assert len(shards) == 2
    assert len({pid for pid, _ in shards}) == 2
    await shut_down(data_dir, partitions=2)
