"""Connections that share stores, of one process or of several, on a cluster that only counts."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from aidb_ray.database import Database, connect, connecting, stores
from aidb_ray.errors import ConfigError, StorageError, UnavailableError
from aidb_ray.runtime import Cluster
from aidb_ray.store import holders as holders_module
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.holders import Holders, holders_of
from tests.stores import until


class FakeStore:
    """A store that runs under a name and does nothing."""

    def __init__(self, ray: FakeRay, name: str) -> None:
        self.name = name
        self.problem = ""
        self._ray = ray

    def with_timeout(self, timeout_ms: int) -> FakeStore:
        del timeout_ms
        return self

    def pinned(self) -> FakeStore:
        return self

    async def ask(self, method: Any, *args: Any) -> Any:
        assert method in (StoreActor.open, StoreActor.status), (method, args)
        if self._ray.stores.get(self.name) is not self:
            # Only another process may have ended it.
            assert not self._ray.is_owned
            raise UnavailableError("It has ended.", outcome="not_applied")
        state = "recovering"
        if method is StoreActor.open:
            self._ray.log.append(f"{self.name} opens")
            await self._ray.may_open.wait()
            self.problem = self._ray.problem
            if self.problem:
                raise StorageError(self.problem)
            state = "serving"
        return SimpleNamespace(
            partitions=self._ray.partitions,
            partition=0,
            durability="memory",
            directory="",
            state=state,
            problem=self.problem,
        )

    async def stop(self) -> None:
        self._ray.log.append(f"{self.name} stops")
        await self._ray.may_stop.wait()
        if self._ray.stores.get(self.name) is self:
            del self._ray.stores[self.name]


class FakeRay:
    """A cluster that this process started: its stores by name, and what happened in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stores: dict[str, FakeStore] = {}
        self.clusters = 0
        self.log: list[str] = []
        self.problem = ""
        self.partitions = 1
        self.is_owned = True
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        monkeypatch.setattr(connecting, "connect_cluster", self.connect)
        monkeypatch.setattr(stores, "find", self.find)
        monkeypatch.setattr(stores, "spawn", self.spawn)

    async def connect(self, address: str | None) -> Cluster:
        assert address is None
        self.clusters += 1
        return FakeCluster(self)

    async def find(self, _: type[Any], name: str) -> FakeStore | None:
        return self.stores.get(name)

    async def spawn(self, _: type[Any], options: Any, *args: Any) -> FakeStore:
        del args
        assert options.detached != self.is_owned
        return self.stores.setdefault(options.name, FakeStore(self, options.name))


class FakeCluster(Cluster):
    """What one connection holds of the cluster."""

    def __init__(self, ray: FakeRay) -> None:
        super().__init__(None, "node")
        self.owned = ray.is_owned
        self._ray = ray

    async def close(self) -> None:
        self._ray.clusters -= 1


class FakeAgent:
    """An agent that says what becomes of it."""

    def __init__(self, ray: FakeRay, name: str, database: Database) -> None:
        self.name = name
        self.database = database
        self._ray = ray

    async def aclose(self) -> None:
        self._ray.log.append(f"{self.name} ends")

    async def detach(self) -> None:
        self._ray.log.append(f"{self.name} goes on")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    return FakeRay(monkeypatch)


async def connect_again(data_dir: str = "anywhere") -> Database:
    return await connect(data_dir=data_dir, durability="memory")


def keep_agent(database: Database, ray: FakeRay, name: str) -> None:
    database.keep_agent(FakeAgent(ray, name, database))  # pyright: ignore[reportArgumentType]


async def test_the_last_connection_ends_the_stores(ray: FakeRay) -> None:
    # Rows in memory lie nowhere, so where the second one wants them makes no difference.
    one, other = await connect_again(), await connect_again("elsewhere")
    (store,) = ray.stores.values()

    await one.aclose()
    assert list(ray.stores.values()) == [store]
    assert ray.clusters == 1
    await other.aclose()
    assert not ray.stores
    assert ray.clusters == 0


async def test_one_that_still_writes_keeps_its_store_while_another_closes(ray: FakeRay) -> None:
    slow, quick = await connect_again(), await connect_again()
    is_written = asyncio.Event()

    async def write() -> None:
        await is_written.wait()
        ray.log.append("written")

    slow.partitions[0].spawn(write())
    closing = asyncio.create_task(slow.aclose())
    await until(lambda: slow.is_closed)
    await quick.aclose()
    is_written.set()
    await closing

    assert ray.log[-2:] == ["written", "aidb/default/p0 stops"]


def test_a_connection_counts_beyond_the_event_loop_that_made_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(monkeypatch)

    async def connect_and_close() -> None:
        await (await connect_again()).aclose()

    kept = asyncio.run(connect_again())
    gc.collect()
    asyncio.run(connect_and_close())
    assert ray.stores
    asyncio.run(kept.aclose())
    assert not ray.stores


def test_a_connection_that_was_dropped_with_its_event_loop_counts_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = FakeRay(monkeypatch)

    async def connect_and_forget() -> None:
        database = await connect_again()
        assert database.partitions[0].client
        keep_agent(database, ray, "echo")

    async def connect_and_close() -> None:
        await (await connect_again()).aclose()

    gc.disable()
    try:
        asyncio.run(connect_and_forget())
        assert ray.stores
        asyncio.run(connect_and_close())
    finally:
        gc.enable()
    assert not ray.stores


async def test_who_connects_while_the_last_one_closes_gets_stores_that_run(ray: FakeRay) -> None:
    first = await connect_again()
    (ended,) = ray.stores.values()
    ray.may_stop.clear()
    closing = asyncio.create_task(first.aclose())
    await until(lambda: "aidb/default/p0 stops" in ray.log)
    connecting = asyncio.create_task(connect_again())
    await until(lambda: ray.clusters == 2)
    ray.may_stop.set()

    async with await connecting:
        await closing
        assert list(ray.stores.values()) != [ended]
        assert len(ray.stores) == 1


async def test_who_closes_while_another_one_connects_leaves_it_the_stores(ray: FakeRay) -> None:
    first = await connect_again()
    (store,) = ray.stores.values()
    async with holders_of("default").turn():
        closing = asyncio.create_task(first.aclose())
        await until(lambda: not holders_of("default").count)
        holders_of("default").join(ray)
    await closing

    assert list(ray.stores.values()) == [store]
    holders_of("default").leave(ray)


async def test_an_agent_goes_on_until_the_last_connection_ends_it(ray: FakeRay) -> None:
    creator, other = await connect_again(), await connect_again()
    keep_agent(creator, ray, "echo")
    ray.log.clear()

    await creator.aclose()
    assert ray.log == ["echo goes on"]
    await other.aclose()
    assert ray.log == ["echo goes on", "echo ends", "aidb/default/p0 stops"]


async def test_agents_of_connections_that_close_at_once_end_before_the_stores(
    ray: FakeRay,
) -> None:
    connections = [await connect_again() for _ in range(3)]
    for number, connection in enumerate(connections):
        keep_agent(connection, ray, f"a{number}")

    await asyncio.gather(*(connection.aclose() for connection in connections))

    ends = sorted(line for line in ray.log if line.endswith("ends"))
    assert ends == ["a0 ends", "a1 ends", "a2 ends"]
    assert ray.log[-1] == "aidb/default/p0 stops"
    assert not ray.stores


async def test_of_agents_of_one_name_only_the_newest_is_remembered(ray: FakeRay) -> None:
    async with await connect_again():
        for _ in range(5):
            async with await connect_again() as passing:
                keep_agent(passing, ray, "echo")
    assert ray.log.count("echo ends") == 1


async def test_a_database_that_cannot_be_opened_is_held_by_nobody(
    ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> None:
        raise UnavailableError("no", outcome="not_applied")

    monkeypatch.setattr(FakeStore, "ask", refuse)
    with pytest.raises(UnavailableError):
        await connect_again()

    assert not ray.stores
    assert ray.clusters == 0
    assert holders_of("default").count == 0


# On a cluster that goes on, other processes may have the stores as well.


async def start_at_once(ray: FakeRay, count: int = 3) -> list[asyncio.Task[Database]]:
    """Let several processes start the database; all wait until the store is open."""
    ray.is_owned = False
    ray.may_open.clear()
    starting = [asyncio.create_task(connect_again()) for _ in range(count)]
    await until(lambda: len(ray.log) == count)
    return starting


async def test_a_start_that_is_given_up_leaves_the_store_to_others(ray: FakeRay) -> None:
    first, *others = await start_at_once(ray)

    first.cancel()
    await asyncio.wait([first])
    ray.may_open.set()
    databases = [await other for other in others]

    assert first.cancelled()
    assert list(ray.stores) == ["aidb/default/p0"]
    for database in databases:
        await database.aclose()
    assert "aidb/default/p0 stops" not in ray.log


async def test_a_store_that_cannot_be_opened_is_left_to_nobody(ray: FakeRay) -> None:
    starting = await start_at_once(ray)
    ray.problem = "damaged"
    ray.may_open.set()

    results = await asyncio.gather(*starting, return_exceptions=True)

    assert {type(result) for result in results} == {StorageError}
    assert not ray.stores
    assert ray.clusters == 0


async def test_a_store_that_another_driver_was_faster_to_start_must_fit(ray: FakeRay) -> None:
    starting = await start_at_once(ray)
    ray.partitions = 2
    ray.may_open.set()

    results = await asyncio.gather(*starting, return_exceptions=True)

    assert {getattr(result, "code", "") for result in results} == {"partitions_differ"}
    assert all(isinstance(result, ConfigError) for result in results)
    # It serves whoever wanted it so.
    assert list(ray.stores) == ["aidb/default/p0"]


async def test_a_turn_has_a_bound_and_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    holders = Holders()
    async with holders.turn():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(holders.turn().__aenter__(), 0.001)
        monkeypatch.setattr(holders_module, "TURN_TIMEOUT_MS", -1)
        with pytest.raises(UnavailableError, match="same stores"):
            await holders.turn().__aenter__()
    async with holders.turn():
        pass


def test_each_database_has_its_own_holders() -> None:
    one = holders_of("one")
    assert holders_of("one") is one
    assert holders_of("other") is not one
