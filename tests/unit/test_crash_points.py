"""Dying at named points: each is reached, nothing is lost there, and the dead do nothing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aidb_ray import (
    ConfigError,
    Database,
    ToolCall,
    UnavailableError,
    create_agent,
    create_tool_execution_effect,
    durable_agent,
    eq,
    tool,
)
from aidb_ray import crash_points as points
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext
from aidb_ray.runtime import LocalRef
from aidb_ray.testing import (
    CallTool,
    Crash,
    Reply,
    ScriptedModel,
    assert_rows,
    crash_at,
    crash_points,
    database,
)

URL = "aidb://echo/1"
OF_AGENTS = [name for name in crash_points() if not name.startswith(("store.", "effect."))]
OF_EFFECTS = [name for name in crash_points() if name.startswith("effect.")]
OF_STORES = [name for name in crash_points() if name.startswith("store.")]


class Outside:
    """What the outside world saw, whoever died."""

    def __init__(self) -> None:
        self.rounds = 0
        self.calls: list[int] = []
        self.steps = 0

    def play(self, messages: Sequence[ModelMessage]) -> Reply:
        self.rounds += 1
        last = messages[-1]
        return f"It is {last.content}." if last.role == "tool" else CallTool("pay")

    def pay(self) -> Any:
        @tool
        async def pay(ctx: ToolContext) -> int:
            """Pay."""
            self.calls.append(ctx.attempt)
            return await ctx.step("charge", self.charge)

        return pay

    def charge(self) -> int:
        self.steps += 1
        return 42


@pytest.mark.parametrize("point", OF_AGENTS)
async def test_an_agent_that_dies_there_is_followed_by_one_that_goes_on(point: str) -> None:
    outside = Outside()

    def start() -> Any:
        model = ScriptedModel(outside.play)
        return create_agent(durable_agent(name="echo", adapter=model, tools=[outside.pay()]))

    async with database() as db:
        async with crash_at(point) as crash:
            sent = start().send("Pay.", session=URL, message_id="m").sent
            await crash.happened()
        assert sent is not None
        await sent
        reply = await start().reply_to("m", session=URL).reply(timeout_ms=10_000)

        assert reply.content == "It is 42."
        session = db.session(URL)
        await assert_rows(session.messages, [{"role": "user"}, {"role": "assistant"}])
        await assert_rows(session.generations, [{"status": "completed"}])
        await assert_rows(session.tool_calls, [{"status": "completed", "result": 42}])
    # Only what was in doubt was done again.
    assert outside.rounds == (3 if point in ("round.heard", "generation.ending") else 2)
    attempts = {"calls.written": [2]}
    for in_doubt in ("tool.ran", "step.ran", "step.recorded"):
        attempts[in_doubt] = [1, 2]
    assert outside.calls == attempts.get(point, [1])
    assert outside.steps == (2 if point == "step.ran" else 1)


@pytest.mark.parametrize("point", OF_EFFECTS)
async def test_an_executor_that_dies_there_is_followed_by_one_that_goes_on(point: str) -> None:
    runs: list[int] = []

    async def pay(ctx: ToolContext) -> int:
        runs.append(ctx.attempt)
        return 42

    async with database() as db:
        calls = db.session(URL).tool_calls

        def start() -> Any:
            return create_tool_execution_effect(
                query=lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "pending")),
                tools=[tool(pay)],
            )

        first = start()
        async with crash_at(point, of=first) as crash:
            await calls.insert(ToolCall(id="c", generation_id="g", name="pay"))
            await crash.happened()
        start()

        await assert_rows(calls, [{"status": "completed", "result": 42}], within_ms=10_000)
    assert len(runs) == (2 if point == "effect.ran" else 1)


@pytest.mark.parametrize("point", OF_STORES)
async def test_a_store_that_dies_there_keeps_what_it_should(point: str, tmp_path: Path) -> None:
    async with database(tmp_path) as db:
        rows = db.collection("rows")
        await rows.insert({"id": "before"})
        async with crash_at(point, of=db) as crash:
            writing = rows.insert({"id": "a"})
            await crash.happened()
        with pytest.raises(UnavailableError) as raised:
            await writing
        assert raised.value.outcome == "unknown"

    async with database(tmp_path) as db:
        kept = [{"id": "before"}] + [{"id": "a"}] * (point == "store.logged")
        await assert_rows(db.collection("rows"), kept)


def test_every_point_has_a_scenario() -> None:
    assert {*OF_AGENTS, *OF_EFFECTS, *OF_STORES} == crash_points().keys()
    assert all(OF for OF in (OF_AGENTS, OF_EFFECTS, OF_STORES))


# What dying means.


async def test_the_dead_write_nothing_not_even_at_the_end(db: Database) -> None:
    refused: list[str] = []

    @tool
    async def clean_up(ctx: ToolContext) -> None:
        """Leave a trace."""
        try:
            await ctx.step("forever", lambda: "done")
        finally:
            try:
                await ctx.session.collection("traces").insert({"id": "trace"})
            except UnavailableError as error:
                refused.append(error.code)

    def start() -> Any:
        model = ScriptedModel(lambda _: CallTool("clean_up"))
        return create_agent(durable_agent(name="echo", adapter=model, tools=[clean_up]))

    async with crash_at("step.recorded") as crash:
        start().send("Go.", session=URL)
        await crash.happened()
    await eventually_refused(refused)

    assert refused == ["killed"]
    await assert_rows(db.session(URL).collection("traces"), [])
    # Others of the process go on.
    await db.session(URL).collection("traces").insert({"id": "mine"})


async def eventually_refused(refused: list[str]) -> None:
    async with asyncio.timeout(10):
        while not refused:  # noqa: ASYNC110  A task that is cancelled sends no event.
            await asyncio.sleep(0)


@pytest.fixture
async def db() -> Any:
    async with database() as opened:
        yield opened


async def test_the_n_th_arrival_is_the_one(db: Database) -> None:
    outside = Outside()
    rows = db.session(URL).tool_calls

    def play(messages: Sequence[ModelMessage]) -> Reply:
        done = sum(message.role == "tool" for message in messages)
        return CallTool("pay") if done < 3 else "Done."

    async with crash_at("tool.recorded", hit=2) as crash:
        model = ScriptedModel(play)
        agent = create_agent(durable_agent(name="echo", adapter=model, tools=[outside.pay()]))
        agent.send("Pay.", session=URL)
        await crash.happened()

    await assert_rows(rows, [{"status": "completed"}] * 2)


async def test_only_what_is_named_dies(db: Database) -> None:
    def start(name: str) -> Any:
        return create_agent(durable_agent(name=name, adapter=ScriptedModel(lambda _: "Hello.")))

    one, other = start("one"), start("other")
    async with crash_at("generation.begun", of=one) as crash:
        reply = await other.send("Hi.", session="aidb://other/1").reply(timeout_ms=10_000)
        assert reply.content == "Hello."
        assert not crash.has_happened
        one.send("Hi.", session="aidb://one/1")
        await crash.happened()

    with pytest.raises(UnavailableError):
        await one.status()
    assert (await other.status())[0].cycles == 1


async def test_what_has_not_happened_does_not_happen_later(db: Database) -> None:
    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(lambda _: "Hello.")))
    async with crash_at("generation.begun", of=agent):
        pass
    async with crash_at("generation.ended"):
        pass

    assert not points.armed
    assert (await agent.send("Hi.", session=URL).reply(timeout_ms=10_000)).content == "Hello."


async def test_a_point_that_is_not_reached_is_a_failed_test(db: Database) -> None:
    async with crash_at("tool.ran") as crash:
        with pytest.raises(AssertionError, match=r"'tool\.ran' was not reached within 1 ms"):
            await crash.happened(within_ms=1)
    assert not crash.has_happened


async def test_what_cannot_be_is_refused(db: Database) -> None:
    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(lambda _: "Hello.")))
    for of in (None, agent):
        with pytest.raises(ConfigError, match=r"there are: store\.planned") as raised:
            async with crash_at("tool.run", of=of):
                pass
        assert raised.value.code == "unknown_crash_point"
    with pytest.raises(ConfigError):
        async with crash_at("tool.ran", hit=0):
            pass
    effect = create_tool_execution_effect(
        query=lambda q: q.from_(c=db.session(URL).tool_calls),
        tools=[Outside().pay()],
        placement="here",
    )
    with pytest.raises(ConfigError) as raised:
        async with crash_at("effect.ran", of=effect):
            pass
    assert raised.value.code == "no_process"


class Mortal:
    """An actor with a call that does not end, and a `start` and a `stop`."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def start(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.log.append("start ended")
            raise

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self.log.append("stopped")

    def die(self) -> None:
        self.log.append("died")


async def test_an_actor_that_is_killed_is_not_stopped() -> None:
    actor = Mortal()
    ref = LocalRef(actor)
    waiting = asyncio.create_task(ref.ask(Mortal.wait))
    dying = asyncio.create_task(ref.until_dead())
    await asyncio.sleep(0)

    ref.kill()
    ref.kill()

    with pytest.raises(UnavailableError) as in_flight:
        await waiting
    with pytest.raises(UnavailableError) as later:
        await ref.ask(Mortal.wait)
    await dying
    await ref.stop()
    assert (in_flight.value.outcome, later.value.outcome) == ("unknown", "not_applied")
    assert sorted(actor.log) == ["died", "start ended"]


PROGRAM = """
import asyncio
from aidb_ray import crash_points as points
from aidb_ray.testing import crash_at

async def main():
    async with crash_at("tool.ran", hit=2):
        await points.reach("tool.ran")
        print("once", flush=True)
        await points.reach("tool.ran")
        print("twice", flush=True)

asyncio.run(main())
"""


def test_a_process_that_gets_there_by_itself_is_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60
    )

    assert (done.returncode, done.stdout) == (-9, "once\n")


def test_a_crash_that_is_expected_no_longer_leaves_no_task() -> None:
    async def main() -> set[Any]:
        crash = Crash("tool.ran", [asyncio.Event().wait()])
        await crash.aclose()
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(main()) == set()
