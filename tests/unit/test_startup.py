"""Starting one agent many times at once: in one process, and from several that share names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
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
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.shard import AgentActor, ShardStatus
from aidb_ray.runtime import LocalRef
from aidb_ray.testing import ScriptedModel
from tests.stores import until

A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

URL = "aidb://echo/1"
SOON_MS = 20_000
MANY = 16


class Keyed(ScriptedModel):
    """A model that wants a key of the process it runs in."""

    def check(self) -> None:
        if "ITS_KEY" not in os.environ:
            raise ConfigError("There is no key.", code="missing_api_key")


class Unsendable(ScriptedModel):
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("It holds a socket.")


class Secretive(ScriptedModel):
    def __reduce__(self) -> tuple[Any, ...]:
        raise ConfigError("A secret stays here.", code="secret_not_portable")


def define(**options: Any) -> AgentDefinition:
    model = ScriptedModel(lambda messages: f"You said {messages[-1].content}.")
    given: dict[str, Any] = {"name": "echo", "adapter": model, **options}
    return durable_agent(**given)


async def status_of(agent: Agent) -> list[tuple[int, bool]]:
    """Return epoch of each shard, and whether it was fenced."""
    return [(each.epoch, each.fenced) for each in await agent.status()]


async def check_one_runner(agents: list[Agent]) -> list[int]:
    """All handles lead to the same shards, which work; returns their epochs."""
    [shards] = {tuple(await status_of(agent)) for agent in agents}
    assert not any(fenced for _, fenced in shards)
    for number, agent in enumerate(agents):
        reply = await agent.send(str(number), session=URL).reply(timeout_ms=SOON_MS)
        assert reply.content == f"You said {number}."
    return [epoch for epoch, _ in shards]


# In one process.


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.mark.usefixtures("db")
async def test_of_many_starts_at_once_one_starts_and_the_others_attach() -> None:
    agents = [create_agent(define()) for _ in range(MANY)]
    await asyncio.gather(*(agent.ready() for agent in agents))

    await check_one_runner(agents)


@pytest.mark.usefixtures("db")
async def test_of_many_replacements_at_once_one_replaces() -> None:
    [before] = await check_one_runner([create_agent(define())])
    agents = [create_agent(define(version="2")) for _ in range(MANY)]
    await asyncio.gather(*(agent.ready() for agent in agents))

    [after] = await check_one_runner(agents)
    assert after > before


@pytest.mark.usefixtures("db")
async def test_of_two_definitions_at_once_the_later_runs() -> None:
    older, newer = (create_agent(define(version=version)) for version in ("1", "2"))
    await asyncio.gather(older.ready(), newer.ready())

    await check_one_runner([newer])
    [status] = await newer.status()
    assert status.fingerprint == define(version="2").fingerprint()


async def check_it_does_not_replace(agent: Agent, definition: AgentDefinition, code: str) -> None:
    before = await agent.status()
    later = create_agent(definition, database=agent.database)
    with pytest.raises(ConfigError) as raised:
        await later.ready()
    assert raised.value.code == code
    assert await agent.status() == before
    await check_one_runner([agent])


async def test_one_that_lacks_its_key_does_not_end_the_old_one(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ITS_KEY", raising=False)
    agent = create_agent(define(), database=db)
    keyed = define(adapter=Keyed(lambda _: "It has its key."))

    await check_it_does_not_replace(agent, keyed, "missing_api_key")

    monkeypatch.setenv("ITS_KEY", "k")
    replaced = create_agent(keyed, database=db)
    await replaced.ready()
    reply = await replaced.send("hello", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "It has its key."


async def test_of_a_process_with_other_options_a_shard_tells_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ITS_KEY", raising=False)
    shard = AgentActor(db, define(), 0)
    options = {"runtime_env": {"env_vars": {"ITS_KEY": "k"}}}

    await shard.check(define(adapter=Keyed([]), ray_options=options))
    with pytest.raises(ConfigError):
        await shard.check(define(adapter=Keyed([])))


async def test_a_shard_that_is_dead_is_replaced_at_once(db: Database) -> None:
    await create_agent(define()).ready()
    [shard] = db.local_shards["echo"]
    await shard.stop()
    with pytest.raises(ConfigError) as raised:
        await db.agent("nobody").ready()
    assert raised.value.code == "agent_missing"

    async with asyncio.timeout(5):
        await check_one_runner([create_agent(define())])


async def test_a_start_that_the_store_refuses_fails_at_once(db: Database) -> None:
    for ref in db._refs:
        await ref.stop()

    async with asyncio.timeout(5):
        with pytest.raises(UnavailableError):
            await create_agent(define()).ready()


# From several processes, which find each other's actors by name.


class Names:
    """Names of a cluster, and the actors that have them."""

    def __init__(self) -> None:
        self.actors: dict[str, LocalRef[Any]] = {}
        self.started: list[LocalRef[Any]] = []
        self.looks = 0
        # Waited for before each look and each start, so that others get between.
        self.step: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0)

    async def find(self, _: type[Any], name: str) -> NamedRef[Any] | None:
        self.looks += 1
        await self.step()
        found = self.actors.get(name)
        return None if found is None else NamedRef(self, name, found)

    async def spawn(self, cls: Any, options: Any, *args: Any) -> NamedRef[Any]:
        await self.step()
        if options.name not in self.actors:
            self.actors[options.name] = LocalRef(cls(*args))
            self.started.append(self.actors[options.name])
        return NamedRef(self, options.name, self.actors[options.name])


class NamedRef(Generic[A_co]):
    """The address of an actor that has a name; see `RayRef`."""

    def __init__(
        self, names: Names, name: str, actor: LocalRef[A_co] | None, *, is_pinned: bool = False
    ) -> None:
        self._names = names
        self._name = name
        self._actor = actor
        self._is_pinned = is_pinned

    def with_timeout(self, timeout_ms: int) -> NamedRef[A_co]:
        actor = None if self._actor is None else self._actor.with_timeout(timeout_ms)
        return NamedRef(self._names, self._name, actor, is_pinned=self._is_pinned)

    def pinned(self) -> NamedRef[A_co]:
        return NamedRef(self._names, self._name, self._actor, is_pinned=True)

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        actor = self._actor
        if actor is None and not self._is_pinned:
            actor = self._actor = self._names.actors.get(self._name)
        if actor is None:
            raise UnavailableError("It has ended.", outcome="not_applied", code="actor_ended")
        try:
            return await actor.ask(method, *args, **kwargs)
        except UnavailableError as error:
            if error.code == "actor_ended":
                self._actor = None
            raise

    async def stop(self) -> None:
        actor = self._actor or (None if self._is_pinned else self._names.actors.get(self._name))
        if actor is not None:
            await actor.stop()
            held = self._names.actors.get(self._name)
            if held is not None and held._host is actor._host:
                del self._names.actors[self._name]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    names = Names()
    monkeypatch.setattr(startup, "find", names.find)
    monkeypatch.setattr(startup, "spawn", names.spawn)
    return names


@pytest.fixture
async def processes(
    db: Database, names: Names, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Database]]:
    """Connections to one database, each as another process has it."""
    monkeypatch.setattr(Database, "is_local", property(lambda _: False))
    others = [Database(db.name, db._refs, data_dir=db.data_dir, cluster=None) for _ in range(MANY)]
    yield others
    for actor in names.actors.values():
        await actor.stop()
    monkeypatch.undo()
    for other in others:
        for partition in other.partitions:
            await partition.aclose()


def starting_of(agent: Agent) -> asyncio.Task[None]:
    starting = agent._here().starting
    assert starting is not None
    return starting


async def start_all(processes: list[Database], *definitions: AgentDefinition) -> list[Agent]:
    agents = [
        create_agent(definitions[at % len(definitions)], database=process)
        for at, process in enumerate(processes)
    ]
    await asyncio.gather(*(agent.ready() for agent in agents))
    return agents


async def test_processes_that_start_at_once_share_one_runner(
    processes: list[Database], names: Names
) -> None:
    agents = await start_all(processes, define())

    await check_one_runner(agents)
    assert len(names.started) == 1


async def test_processes_that_start_at_once_all_have_all_shards(
    processes: list[Database], names: Names
) -> None:
    agents = await start_all(processes, define(shards=3))

    assert len(await check_one_runner(agents)) == 3
    assert len(names.started) == 3


async def test_processes_that_replace_at_once_end_the_old_one_and_no_other(
    processes: list[Database], names: Names
) -> None:
    await start_all(processes[:1], define())

    agents = await start_all(processes, define(version="2"))

    await check_one_runner(agents)
    assert len(names.started) == 2


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (Keyed, "missing_api_key"),
        (Unsendable, "not_picklable"),
        (Secretive, "secret_not_portable"),
    ],
)
async def test_one_that_could_not_start_does_not_end_the_old_one(
    processes: list[Database],
    names: Names,
    monkeypatch: pytest.MonkeyPatch,
    model: type[ScriptedModel],
    code: str,
) -> None:
    monkeypatch.delenv("ITS_KEY", raising=False)
    [agent] = await start_all(processes[:1], define(shards=2))

    await check_it_does_not_replace(agent, define(adapter=model([]), shards=2), code)

    assert len(names.started) == 2


async def test_a_shard_that_cannot_tell_is_replaced(
    processes: list[Database], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of an earlier version of this package, or that cannot read the definition."""

    async def check(_actor: AgentActor, _definition: AgentDefinition) -> None:
        raise AttributeError("check")

    await start_all(processes[:1], define())
    monkeypatch.setattr(AgentActor, "check", check)

    await check_one_runner(await start_all(processes[:1], define(version="2")))
    assert len(names.started) == 2


async def test_a_fenced_one_is_replaced_once(processes: list[Database], names: Names) -> None:
    await start_all(processes[:1], define())
    usurper = AgentActor(processes[0], define(), 0)
    await usurper.ready()
    [old] = names.started
    # It hears of it when it writes.
    handle = create_agent(define(), database=processes[0]).send("hello", session=URL)
    assert handle.sent is not None
    await handle.sent
    await until(lambda: old._host.actor._works[0].is_fenced)
    await usurper.stop()

    agents = await start_all(processes, define())

    await check_one_runner(agents)
    assert len(names.started) == 2


async def test_of_two_definitions_that_start_at_once_one_is_left(
    processes: list[Database], names: Names
) -> None:
    agents = await start_all(processes, define(version="1"), define(version="2"))

    await check_one_runner(agents)


async def test_whoever_wants_no_change_is_told_if_another_definition_was_faster(
    processes: list[Database], names: Names
) -> None:
    agents = [
        create_agent(define(version=str(at)), database=process, on_change="error")
        for at, process in enumerate(processes)
    ]
    results = await asyncio.gather(*(a.ready() for a in agents), return_exceptions=True)

    refused = [each for each in results if each is not None]
    assert len(refused) == MANY - 1
    assert {getattr(each, "code", None) for each in refused} == {"agent_exists"}
    assert len(names.started) == 1


async def test_whoever_attaches_waits_for_shards_that_are_still_to_come(
    processes: list[Database], names: Names
) -> None:
    first, second = processes[:2]
    release = asyncio.Event()

    async def step() -> None:
        # The first has started one shard of two, and the second looks for them.
        if len(names.started) == 1 and not release.is_set():
            release.set()
            await asyncio.sleep(0.1)

    names.step = step
    starting = create_agent(define(shards=2), database=first)
    await release.wait()
    other = define(version="2")

    attached = create_agent(other, database=second, on_change="attach")
    by_name = second.agent("echo")
    await asyncio.gather(starting.ready(), attached.ready(), by_name.ready())

    for agent in (attached, by_name):
        assert len(await agent.status()) == 2


def be_silent(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the first that ask a shard for its status get no answer."""
    answer = AgentActor.status
    left = times

    async def status(actor: AgentActor) -> ShardStatus:
        nonlocal left
        if left:
            left -= 1
            raise UnavailableError("It is being started anew.", outcome="not_applied")
        return await answer(actor)

    monkeypatch.setattr(AgentActor, "status", status)


async def test_one_that_is_being_started_anew_is_waited_for(
    processes: list[Database], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_all(processes[:1], define())
    be_silent(monkeypatch, 3)

    agents = await start_all(processes[:2], define())

    await check_one_runner(agents)
    assert len(names.started) == 1


async def test_one_that_does_not_come_back_is_replaced(
    processes: list[Database], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_all(processes[:1], define())
    monkeypatch.setattr(startup, "RESTART_MS", 1)
    be_silent(monkeypatch, 3)

    agents = await start_all(processes[:1], define())

    await check_one_runner(agents)
    assert len(names.started) == 2


async def test_whoever_is_late_does_not_end_the_one_that_took_the_name(
    processes: list[Database], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_all(processes[:1], define())
    monkeypatch.setattr(startup, "RESTART_MS", 0)
    ask = startup._status
    asked, door = asyncio.Event(), asyncio.Event()

    async def ask_late(ref: Any) -> ShardStatus | None:
        if not asked.is_set():
            asked.set()
            await door.wait()
        return await ask(ref)

    monkeypatch.setattr(startup, "_status", ask_late)
    late = create_agent(define(version="2"), database=processes[1])
    await asked.wait()
    [newer] = await start_all(processes[2:3], define(version="2"))
    before = await status_of(newer)

    door.set()
    await late.ready()

    assert await status_of(late) == await status_of(newer) == before
    assert len(names.started) == 2


async def test_one_whose_process_goes_away_while_it_begins_is_waited_for(
    processes: list[Database], names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_ready = AgentActor.ready
    deaths = 0

    async def ready(actor: AgentActor) -> int:
        nonlocal deaths
        deaths += 1
        if deaths == 1:
            be_silent(monkeypatch, 1)
            raise UnavailableError("It went away.", outcome="unknown")
        return await be_ready(actor)

    monkeypatch.setattr(AgentActor, "ready", ready)

    agents = await start_all(processes[:1], define())

    await check_one_runner(agents)
    assert (deaths, len(names.started)) == (2, 1)


async def test_whoever_attaches_to_one_that_is_being_replaced_gets_the_next(
    processes: list[Database], names: Names
) -> None:
    asked, door = asyncio.Event(), asyncio.Event()

    async def play(_: object) -> str:
        asked.set()
        await door.wait()
        return "Done."

    older = define(adapter=ScriptedModel(play))
    [agent] = await start_all(processes[:1], older)
    handle = agent.send("hello", session=URL)
    await asked.wait()
    newer = create_agent(define(version="2"), database=processes[1])
    [old] = names.started
    await until(lambda: old._host.actor._is_ended)
    looks = names.looks
    attaching = create_agent(older, database=processes[2], on_change="attach")
    await until(lambda: names.looks > looks + 5)
    assert not starting_of(attaching).done()

    door.set()

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "Done."
    await asyncio.gather(newer.ready(), attaching.ready())
    assert await status_of(attaching) == await status_of(newer)
    assert len(names.started) == 2
