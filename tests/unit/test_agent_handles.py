"""Handles of agents that are used in several event loops, one after the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import pytest

from aidb_ray import (
    Agent,
    ConfigError,
    Database,
    UnavailableError,
    connect,
    create_agent,
    durable_agent,
)
from aidb_ray.agents import startup
from aidb_ray.agents.replies import ReplyHandle
from aidb_ray.runtime import ActorRef
from aidb_ray.store.actor import StoreActor
from aidb_ray.testing import ScriptedModel

A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

URL = "aidb://echo/1"
SOON_MS = 20_000


class Loop:
    """An event loop of another thread."""

    def __init__(self) -> None:
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._stay()), daemon=True)
        self._thread.start()
        self._is_up.wait()

    async def _stay(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._may_end = asyncio.Event()
        self._is_up.set()
        await self._may_end.wait()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SOON_MS / 1000)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._may_end.set)
        self._thread.join()


class FarRef(Generic[A_co]):
    """An actor of another loop, reachable from any, as one of another process is."""

    def __init__(self, ref: ActorRef[A_co], home: Loop) -> None:
        self._ref = ref
        self._home = home

    def with_timeout(self, timeout_ms: int) -> FarRef[A_co]:
        return FarRef(self._ref.with_timeout(timeout_ms), self._home)

    def pinned(self) -> FarRef[A_co]:
        return self

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        async def ask() -> R:
            return await self._ref.ask(method, *args, **kwargs)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(), self._home.loop))

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        return await self.ask(method, *args, **kwargs)

    async def arm(self, point: str, hit: int) -> None:
        await self._ref.arm(point, hit)

    async def disarm(self) -> None:
        await self._ref.disarm()

    async def until_dead(self) -> None:
        await self._ref.until_dead()

    async def stop(self) -> None:
        raise AssertionError("Handles end nothing here.")


@pytest.fixture
def home() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def elsewhere() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def agent(home: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """A handle as it arrives in another process: nothing is known of the agent but its name."""

    async def start() -> tuple[Database, Agent]:
        database = await connect("local", durability="memory")
        echo = durable_agent(name="echo", adapter=ScriptedModel(lambda m: f"{m[-1].content}!"))
        started = create_agent(echo, database=database)
        await started.ready()
        return database, started

    async def find(_: type[Any], name: str) -> FarRef[Any] | None:
        shards = {f"aidb/{far.name}/agent/echo/0": started._refs[0]}
        return FarRef(shards[name], home) if name in shards else None

    near, started = home.run(start())
    stores: list[ActorRef[StoreActor]] = [FarRef(ref, home) for ref in near._refs]
    far = Database(near.name, stores, data_dir="far", cluster=None)
    monkeypatch.setattr(startup, "find", find)
    yield Agent(far, "echo", "aidb://*", 1)
    home.run(near.aclose())


async def ask(agent: Agent, text: str) -> str:
    return (await agent.send(text, session=URL).reply(timeout_ms=SOON_MS)).content


def in_loop(use: Callable[[], Awaitable[R]]) -> R:
    """Run `use` in an event loop of its own, as a task of another process does."""

    async def run() -> R:
        async with asyncio.timeout(SOON_MS / 1000):
            return await use()

    return asyncio.run(run())


def test_each_event_loop_hears_the_replies_to_what_it_sent(agent: Agent) -> None:
    texts = ["one", "two", "three"]
    assert [in_loop(lambda text=text: ask(agent, text)) for text in texts] == [
        "one!",
        "two!",
        "three!",
    ]


def test_each_event_loop_may_wait_until_the_agent_is_ready(agent: Agent) -> None:
    async def use() -> tuple[bool, bool, int]:
        await agent.ready()
        await ask(agent, "hello")
        drained = await agent.drain_until_idle()
        return drained.completed, await agent.has_pending_work(), len(await agent.status())

    assert [in_loop(use) for _ in range(2)] == [(True, False, 1)] * 2


def test_a_start_that_an_event_loop_did_not_finish_holds_up_no_other(agent: Agent) -> None:
    async def begin() -> asyncio.Task[None]:
        agent.begin(None, "attach")
        starting = agent._here().starting
        assert starting is not None
        return starting

    # A runner keeps its loop, and what is under way there, until it is closed.
    with asyncio.Runner() as paused:
        starting = paused.run(begin())
        in_loop(agent.ready)
        assert in_loop(lambda: ask(agent, "hello")) == "hello!"
        in_loop(agent.detach)
        assert not starting.done()


def test_a_start_that_failed_is_tried_again_in_the_next_event_loop(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def find_nothing(*_: object) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(startup, "find", find_nothing)
        with pytest.raises(ConfigError) as raised:
            in_loop(agent.ready)
    assert raised.value.code == "agent_missing"
    in_loop(agent.ready)


def test_letting_go_ends_the_waits_of_this_event_loop_only(agent: Agent, elsewhere: Loop) -> None:
    async def wait() -> ReplyHandle:
        return agent.reply_to("nobody", session=URL)

    async def is_waiting(handle: ReplyHandle) -> bool:
        return not handle._expected.done()

    async def let_go() -> None:
        handle = await wait()
        await agent.detach()
        with pytest.raises(UnavailableError):
            await handle._expected

    waiting = elsewhere.run(wait())
    in_loop(let_go)
    assert elsewhere.run(is_waiting(waiting))
    elsewhere.run(agent.detach())
    assert not elsewhere.run(is_waiting(waiting))


def test_what_belongs_to_closed_event_loops_is_forgotten(agent: Agent) -> None:
    for text in ("one", "two", "three"):
        in_loop(lambda text=text: ask(agent, text))
    assert len(agent._loops) == 1
