"""The store in processes of its own: what only Ray, signals and other drivers can show."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import ray

import aidb_ray
from aidb_ray import (
    Collection,
    ConfigError,
    ContractError,
    Database,
    StoreMismatchError,
    connect,
    create_agent,
    durable_agent,
)
from aidb_ray.runtime import ActorOptions, find, spawn
from aidb_ray.store.changes import Change
from aidb_ray.testing import ScriptedModel

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SOON_S = 60


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    database = await connect(data_dir=tmp_path, database=f"db{time.monotonic_ns()}")
    yield database
    await database.shutdown()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110  Other processes send no events.
            await asyncio.sleep(0.01)


class Visitor:
    """Uses a collection that came from another process."""

    def __init__(self, rows: Collection[dict[str, Any]]) -> None:
        self._rows = rows

    async def follow(self) -> int:
        await self._rows.ready()
        return os.getpid()

    async def keys(self) -> list[str]:
        return [row["id"] for row in self._rows.values()]

    async def reached(self, revision: int) -> None:
        site = self._rows._sites.site_of("")
        await site.client.feed.reached(revision)

    async def insert(self, first: int, count: int) -> int:
        rows = [{"id": f"{n:05}", "by": os.getpid()} for n in range(first, first + count)]
        writes = [self._rows.insert(row) for row in rows]
        return (await writes[-1]).revision


async def test_two_processes_share_a_collection_live(db: Database) -> None:
    rows = db.session("aidb://shared/1").collection("rows")
    began = time.perf_counter()
    await rows.insert({"id": "first"})
    print(f"first durable row after {(time.perf_counter() - began) * 1e3:.0f} ms")  # noqa: T201
    visitor = await spawn(Visitor, ActorOptions(), rows)
    try:
        assert await visitor.ask(Visitor.follow) != os.getpid()
        await rows.ready()

        await visitor.ask(Visitor.insert, 0, 100)
        await eventually(lambda: len(rows) == 101)
        writing = rows.insert([{"id": f"mine{n}"} for n in range(10)])
        await writing
        await visitor.ask(Visitor.reached, writing.revision)

        assert [row["id"] for row in rows.values()] == await visitor.ask(Visitor.keys)
    finally:
        await visitor.stop()


class Follower:
    """Hears the changes of a collection, and checks that each comes once and in order."""

    def __init__(self, db: Database, rows: Collection[Any]) -> None:
        self.keys: list[str] = []
        self.begins = 0
        self._last = 0
        feed = db.partitions[0].client.feed
        self.subscription = feed.subscribe(rows.filter(), self.hear, self.see)

    def see(self, rows: Any, revision: int) -> None:
        self.begins += 1
        self._last = revision
        self.keys = [row.key for row in rows]

    def hear(self, changes: Any) -> None:
        change: Change
        for change in changes:
            assert change.revision > self._last
            self._last = change.revision
            self.keys.append(change.key)


async def test_a_store_killed_under_load_loses_nothing_and_does_nothing_twice(
    db: Database,
) -> None:
    rows = db.session("aidb://killed/1").collection("rows")
    await rows.insert({"id": "first"})
    follower = Follower(db, rows)
    await follower.subscription.ready
    written = 0
    is_over = asyncio.Event()

    async def write(writer: int) -> list[int]:
        nonlocal written
        revisions: list[int] = []
        while not is_over.is_set():
            done = await rows.insert({"id": f"{writer}-{len(revisions)}"})
            revisions.append(done.revision)
            written += 1
        return revisions

    writers = [asyncio.create_task(write(n)) for n in range(32)]
    pids: list[int] = []
    gaps: list[float] = []
    for _ in range(3):
        [status] = await db.status()
        pids.append(status.pid)
        before = written
        await eventually(lambda before=before: written > before + 100)
        os.kill(status.pid, signal.SIGKILL)
        killed, began = written, time.perf_counter()
        # What was on its way when it died may have been answered already.
        await eventually(lambda killed=killed: written > killed + 64)
        gaps.append(time.perf_counter() - began)
    is_over.set()
    revisions = [one for each in await asyncio.gather(*writers) for one in each]
    [status] = await db.status()
    print(f"{written} rows, 3 kills, writes again after {[f'{gap:.1f} s' for gap in gaps]}")  # noqa: T201

    assert len({*pids, status.pid}) == 4
    assert len(set(revisions)) == len(revisions) == written
    assert max(revisions) == status.revision, "nothing was applied that was not answered"
    await db.partitions[0].client.feed.reached(status.revision)
    assert follower.begins == 1
    assert len(follower.keys) == written + 1
    await rows.ready()
    assert sorted(follower.keys) == [row["id"] for row in rows.values()]


DRIVER = """
import asyncio, sys
import aidb_ray

async def main():
    async with aidb_ray.connect(sys.argv[1], data_dir=sys.argv[2], database=sys.argv[3]) as db:
        [status] = await db.status()
        rows = db.session("aidb://driver/1").collection("rows")
        await rows.insert({"id": sys.argv[4]})
        await rows.ready()
        print(status.pid, *[row["id"] for row in rows.values()], flush=True)

asyncio.run(main())
"""


async def drive(*args: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DRIVER,
        *args,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(aidb_ray.__file__).parent.parent,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().split()


async def test_a_second_driver_finds_the_store_that_the_first_left(tmp_path: Path) -> None:
    import ray

    address = str(ray.get_runtime_context().gcs_address)  # pyright: ignore[reportUnknownArgumentType]

    first = await drive(address, str(tmp_path), "left", "a")
    second = await drive(address, str(tmp_path), "left", "b")

    assert first[1:] == ["a"]
    assert second == [first[0], "a", "b"]
    db = await connect(data_dir=tmp_path, database="left")
    [status] = await db.status()
    assert str(status.pid) == first[0]
    await db.shutdown()


async def test_closing_one_of_two_connections_leaves_the_other_its_store(db: Database) -> None:
    home = Path(db.data_dir)
    rows = db.session("aidb://two/1").collection("rows")

    async with connect(data_dir=home.parent, database=home.name) as other:
        await other.session("aidb://two/1").collection("rows").insert({"id": "a"})

    assert await rows.find("a") == {"id": "a"}
    await rows.insert({"id": "b"})


async def test_an_agent_ends_with_the_last_connection_to_its_database(tmp_path: Path) -> None:
    name = f"db{time.monotonic_ns()}"
    one = await connect(data_dir=tmp_path, database=name)
    other = await connect(data_dir=tmp_path, database=name)
    definition = durable_agent(name="echo", adapter=ScriptedModel(lambda _: "Yes."))
    await create_agent(definition, database=one).ready()

    await one.aclose()
    asked = other.agent("echo").send("Are you there?", session="aidb://echo/1")
    assert (await asked.reply(timeout_ms=SOON_S * 1000)).content == "Yes."
    await other.aclose()

    assert await find(Visitor, f"aidb/{name}/agent/echo/0") is None
    assert await find(Visitor, f"aidb/{name}/p0") is None


async def test_a_running_database_is_not_taken_for_another(db: Database) -> None:
    home = Path(db.data_dir)

    with pytest.raises(ConfigError) as partitions:
        await connect(data_dir=home.parent, database=home.name, partitions=2)
    assert partitions.value.code == "partitions_differ"
    with pytest.raises(ConfigError) as durability:
        await connect(data_dir=home.parent, database=home.name, durability="memory")
    assert durability.value.code == "durability_differs"
    with pytest.raises(StoreMismatchError):
        await connect(data_dir=home.parent / "elsewhere", database=home.name)


async def test_handles_travel_and_find_their_way(db: Database) -> None:
    rows = db.session("aidb://travel/1").collection("rows")

    again = pickle.loads(pickle.dumps(rows))

    await again.insert({"id": "a"})
    assert await rows.find("a") == {"id": "a"}
    # In the process that is connected they share its connection.
    assert again._sites is db


async def test_a_reference_to_an_object_is_no_value_of_a_row(db: Database) -> None:
    """It dies with its owner, so a row that kept it would name nothing."""
    rows = db.collection("rows")

    with pytest.raises(ContractError) as caught:
        rows.insert({"id": "a", "data": {"here": ray.put(1)}})

    assert (caught.value.code, caught.value.loc) == ("not_serializable", ("data", "here"))
    assert await rows.find("a") is None
