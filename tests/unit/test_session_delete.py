"""A session is deleted whole, at once and for good, whoever is at work in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from aidb_ray import create_tool_execution_effect
from aidb_ray.agents.agent import Agent, create_agent
from aidb_ray.agents.definition import Retry, durable_agent
from aidb_ray.chunks import replay, stream_to_collection
from aidb_ray.contracts import DEFAULT_ROW_TYPES
from aidb_ray.database import Database, connect
from aidb_ray.errors import ConfigError, KeyMissingError
from aidb_ray.expressions import eq
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext, tool
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import DeleteSession, Filter
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Change, Collection
from aidb_ray.testing import CallTool, Reply, Say, ScriptedModel
from tests.stores import SESSION, Process, Store, insert, open_store, until

URL = "aidb://echo/1"
SOON_MS = 20_000
COLLECTIONS = ("messages", "generations", "tool_calls", "cancel_requests", "questions", "steps")


@pytest.fixture
async def db() -> AsyncGenerator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
async def elsewhere(db: Database) -> AsyncGenerator[Database]:
    """A second connection to the same store, as another process has."""
    other = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield other
    for partition in other.partitions:
        await partition.aclose()


async def left_in(db: Database, url: str = URL) -> list[str]:
    """Return what a session holds, as the store has it."""
    client = db.site_of(url).client
    found: list[str] = []
    for collection in (*COLLECTIONS, "rows", "~claims"):
        _, rows = await client.read(Filter(collection, url))
        found += [f"{collection}/{row.key}" for row in rows]
    read = await client.read_session(url, COLLECTIONS)
    return found + [f"chunks/{generation_id}" for generation_id in read.streams]


async def chunks_of(text: str) -> AsyncGenerator[dict[str, str]]:
    for word in text.split():
        yield {"type": "word", "content": word}


async def write(db: Database, url: str, generation_id: str, text: str) -> None:
    await stream_to_collection(
        chunks_of(text),
        collection=db.session(url).chunks,
        generation_id=generation_id,
        transform=lambda event, _index, _generation_id: event,
    )


async def test_everything_goes_and_everyone_hears(db: Database, elsewhere: Database) -> None:
    session, other = db.session(URL), elsewhere.session(URL)
    spared = db.session("aidb://echo/2")
    await session.messages.insert({"id": "m", "role": "user", "actor_id": "u", "content": "hi"})
    rows = session.collection("rows")
    await rows.insert([{"id": "a", "n": 1}, {"id": "b", "n": 2}])
    await spared.collection("rows").insert({"id": "a"})
    await write(db, URL, "g", "one two")
    there = other.collection("rows")
    await there.ready()
    heard: list[Change[Any]] = []
    subscribed = there.subscribe(heard.extend, where=lambda r: eq(r.n, 2))
    await subscribed.ready()
    changes = there.changes()
    told = asyncio.ensure_future(anext(changes))
    live = elsewhere.live_query(lambda q: q.from_(r=there).where(lambda r: eq(r.n, 1)))
    await live.ready()
    await elsewhere.site_of(URL).client.feed.reached((await db.status())[0].revision)

    await session.delete()

    assert await left_in(db) == []
    assert rows.get("a") is None, "written here, and not followed"
    assert [one.url for one in await db.sessions()] == [spared.url]
    await until(lambda: not there.values() and heard and not live.rows)
    assert [(change.op, change.key) for change in heard] == [("delete", "b")]
    assert ((await told).op, (await told).key) == ("delete", "a")
    assert (await session.chunks.to_arrow("g")).num_rows == 0
    assert await spared.collection("rows").find("a") == {"id": "a"}
    await changes.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    await live.aclose()
    subscribed.close()

    await session.delete()
    await rows.insert({"id": "a", "n": 3})
    assert await rows.find("a") == {"id": "a", "n": 3}


async def test_writes_made_before_go_with_it(db: Database) -> None:
    rows = db.session(URL).collection("rows")

    writing = [rows.insert({"id": str(n)}) for n in range(20)]
    changing = rows.update("7", {"n": 1})
    await db.session(URL).delete()

    for transaction in (*writing, changing):
        assert (await transaction).revision
    assert await left_in(db) == []
    with pytest.raises(KeyMissingError):
        await rows.update("7", {"n": 2})


async def test_a_copy_shows_it_when_it_returns(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await Process(store).collection("rows").insert({"id": "a"})
        db = await database_of(store)
        rows = db.session(SESSION).collection("rows")
        await rows.ready()
        before = (await db.status())[0].revision
        store.refuses_polls = True
        feed = db.partitions[0].client.feed
        feed._nudge()
        await until(lambda: not feed._is_parked and not feed._side_tasks)

        deleting = asyncio.create_task(db.session(SESSION).delete())
        await until(lambda: store.actor._tables.revision > before)
        assert rows.get("a") is not None
        assert not deleting.done()
        store.refuses_polls = False
        await deleting

        assert rows.values() == []
        await db.partitions[0].aclose()


async def test_it_is_no_part_of_a_transaction(db: Database) -> None:
    session = db.session(URL)
    await session.collection("rows").insert({"id": "a"})

    async with db.transaction(session):
        with pytest.raises(ConfigError) as caught:
            await session.delete()

    assert caught.value.code == "in_transaction"
    assert await left_in(db) == ["rows/a"]


async def test_whoever_follows_a_stream_hears_that_it_is_gone(
    db: Database, elsewhere: Database
) -> None:
    more = asyncio.Event()

    async def slowly() -> AsyncGenerator[dict[str, str]]:
        yield {"type": "word", "content": "one"}
        await more.wait()

    writing = asyncio.create_task(
        stream_to_collection(
            slowly(),
            collection=db.session(URL).chunks,
            generation_id="g",
            transform=lambda event, _index, _generation_id: event,
        )
    )
    following = replay(elsewhere.session(URL).chunks, generation_id="g")
    assert (await anext(following)).content == "one"
    reading = asyncio.ensure_future(anext(following))

    await db.session(URL).delete()

    with pytest.raises(KeyMissingError) as caught:
        await reading
    assert caught.value.code == "gone"
    more.set()
    await asyncio.wait([writing])
    assert writing.exception() is not None, "its end does not fit a stream that is gone"
    assert await left_in(db) == []


# On disk.


async def test_it_stays_deleted_across_restarts_snapshots_and_compaction(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 14) as store:
        process = Process(store)
        client = process.site.client
        for n in range(60):
            url = f"aidb://s/{n % 3}"
            await client.commit([insert(f"k{n}", '"' + "x" * 300 + '"', session=url)])
        await client.commit([DeleteSession("aidb://s/1")])

        for _ in range(3):
            await store.restart()
            assert sorted(await client.sessions()) == ["aidb://s/0", "aidb://s/2"]
            await client.commit([insert("again", session="aidb://s/1")])
            await client.commit([DeleteSession("aidb://s/1")])
            await store.actor.snapshot()

        assert await Process(store).collection("rows", session="aidb://s/1").find("k1") is None
        _, rows = await client.read(Filter("rows", "aidb://s/0"))
        assert len(rows) == 20


def bytes_on_disk(store: Store, text: bytes) -> int:
    """Return how often a text is found in the files of the store."""
    return sum(path.read_bytes().count(text) for path in store.directory.rglob("*.*"))


async def test_its_bytes_leave_the_disk_with_snapshots_and_compaction(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 14) as store:
        process = Process(store)
        db = await database_of(store)
        rows = process.collection("rows")
        await rows.insert({"id": "secret", "text": "SECRET-ROW"})
        for n in range(30):
            await write(db, SESSION, f"g{n}", "SECRET-CHUNK " * 20)
            await write(db, "aidb://other", f"g{n}", "KEPT-CHUNK " * 20)
        for _ in range(2):
            await store.actor.snapshot()
            await process.collection("others", session="aidb://other").insert({"id": new_key()})
        assert bytes_on_disk(store, b"SECRET-CHUNK") >= 600

        await db.session(SESSION).delete()
        for _ in range(4):
            await process.collection("others", session="aidb://other").insert(
                {"id": new_key(), "pad": "x" * (1 << 14)}
            )
            await store.actor.snapshot()

        assert bytes_on_disk(store, b"SECRET-ROW") == 0
        assert bytes_on_disk(store, b"SECRET-CHUNK") == 0
        assert bytes_on_disk(store, b"KEPT-CHUNK") >= 600
        assert store.actor._tables.garbage() == {}
        await store.restart()
        for n in range(30):
            table = await db.session("aidb://other").chunks.to_arrow(f"g{n}")
            assert table.column("content").to_pylist() == ["KEPT-CHUNK"] * 20
        for partition in db.partitions:
            await partition.aclose()


_keys = iter(range(1_000_000))


def new_key() -> str:
    return f"k{next(_keys)}"


async def database_of(store: Store) -> Database:
    return Database("test", [store.ref], data_dir=str(store.directory), cluster=None)


async def test_memory_forgets_the_chunks(db: Database) -> None:
    await write(db, URL, "g", "one two three")
    log = _log_of(db)
    assert log._chunks

    await db.session(URL).delete()

    assert log._chunks == {}


def _log_of(db: Database) -> Any:
    ref: Any = db._refs[0]
    return ref._host.actor._log


# Agents and effects.


class Wiper:
    """Deletes a session right before a commit of someone else, whichever it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, db: Database, url: str = URL) -> None:
        self.at = 0
        self.commits = 0
        self.is_done = asyncio.Event()
        self._client = StoreClient(db._refs[0])
        self._url = url
        self._is_wiping = False
        commit = StoreActor.commit

        @wraps(commit)
        async def counted(actor: StoreActor, raw: bytes) -> bytes:
            if self._is_wiping:
                return await commit(actor, raw)
            self.commits += 1
            if self.commits == self.at:
                self._is_wiping = True
                await self._client.commit([DeleteSession(self._url)])
                self._is_wiping = False
                self.is_done.set()
            return await commit(actor, raw)

        monkeypatch.setattr(StoreActor, "commit", counted)

    def wipe_before(self, at: int) -> None:
        """Delete before the `at`-th commit from now on, counted from 1."""
        self.at, self.commits = at, 0
        self.is_done.clear()

    async def aclose(self) -> None:
        await self._client.aclose()


def play(messages: Sequence[ModelMessage]) -> Reply:
    answers = [message for message in messages if message.role == "tool"]
    if len(answers) < 2:
        return [Say("Let me look this up for you."), CallTool("look", {"n": len(answers)})]
    return Say("It is all done and said now.")


async def is_idle(agent: Agent) -> None:
    """Wait until the agent has nothing to do any more."""
    async with asyncio.timeout(SOON_MS / 1000):
        await agent.drain_until_idle(max_duration_ms=SOON_MS)


@pytest.mark.parametrize("at", range(1, 25))
async def test_an_agent_brings_nothing_back(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    """Whichever of its commits comes after the deletion, none leaves half a session behind."""

    # A commit of chunks every few words.
    monkeypatch.setattr("aidb_ray.chunks.flusher.FLUSH_INTERVAL_MS", 2)
    monkeypatch.setattr("aidb_ray.agents.recorder.FLUSH_CHUNKS", 3)

    @tool
    async def look(n: int, ctx: ToolContext) -> int:
        """Look something up."""
        return await ctx.step("twice", lambda: 2 * n)

    wiper = Wiper(monkeypatch, db)
    agent = create_agent(
        durable_agent(
            name="echo",
            adapter=ScriptedModel(play, tokens_per_second=1_000),
            tools=[look],
            retry=Retry(first_pause_ms=1, longest_pause_ms=1),
        )
    )
    await agent.ready()
    await db.session(URL).messages.insert(message("first"))
    wiper.wipe_before(at)

    await is_idle(agent)

    if wiper.is_done.is_set():
        assert await left_in(db) == []
    else:
        assert at > 12, "a conversation has more commits than that"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    wiper.wipe_before(0)
    reply = await agent.send("again", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "It is all done and said now."
    await agent.aclose()
    await wiper.aclose()


def message(key: str) -> dict[str, Any]:
    return {
        "id": key,
        "role": "user",
        "actor_id": "u",
        "target_agent": "echo",
        "content": "hello",
    }


async def test_an_agent_that_waits_for_its_model_is_stopped(db: Database) -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def never(_messages: Sequence[ModelMessage]) -> Reply:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(never)))
    handle = agent.send("hello", session=URL)
    await asked.wait()

    await db.session(URL).delete()

    async with asyncio.timeout(SOON_MS / 1000):
        await cancelled.wait()
    await is_idle(agent)
    assert await left_in(db) == []
    assert handle.sent is not None
    await agent.aclose()


async def test_a_conversation_begins_anew_and_knows_nothing_of_the_old_one(db: Database) -> None:
    heard: list[list[str]] = []

    def note(messages: Sequence[ModelMessage]) -> Reply:
        heard.append([each.content for each in messages])
        return "ok"

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(note)))
    await agent.send("one", session=URL, message_id="m").reply(timeout_ms=SOON_MS)
    await db.session(URL).delete()

    await agent.send("two", session=URL, message_id="m").reply(timeout_ms=SOON_MS)

    assert heard == [["one"], ["two"]]
    await agent.aclose()


def is_remembered(db: Database) -> bool:
    """Whether the agent has what it knows of the session in memory."""
    ref: Any = db.local_shards["echo"][0]
    return ref._host.actor._works[0]._states.find(URL) is not None


@pytest.mark.parametrize("is_raw", [False, True])
async def test_an_agent_keeps_nothing_of_it_in_memory(
    db: Database, elsewhere: Database, *, is_raw: bool
) -> None:
    rows = db.session(URL).collection("rows")
    agent = _raw_agent(rows) if is_raw else _agent_that_says("ok")
    await agent.ready()
    if is_raw:
        await rows.insert({"id": "a", "n": 1})
        await is_idle(agent)
    else:
        await agent.send("one", session=URL).reply(timeout_ms=SOON_MS)
    assert is_remembered(db)

    await elsewhere.session(URL).delete()

    await until(lambda: not is_remembered(db))
    await agent.aclose()


def _agent_that_says(text: str) -> Agent:
    return create_agent(durable_agent(name="echo", adapter=ScriptedModel(lambda _: text)))


def _raw_agent(rows: Collection[dict[str, Any]]) -> Agent:
    """Return an agent whose rows stay pending for ever."""
    return create_agent(
        name="echo",
        pending_work=lambda q: q.from_(r=rows).where(lambda r: eq(r.n, 1)),
        generate=lambda _: "ok",
        on_response=lambda _response, _pending: None,
    )


async def test_whoever_waits_for_a_reply_hears_that_the_message_is_gone(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.agents.replies.LOOK_AGAIN_MS", 10)
    agent = create_agent(
        durable_agent(name="echo", adapter=ScriptedModel(lambda _: "late"), autostart=False)
    )
    handle = agent.send("hello", session=URL)
    waiting = asyncio.ensure_future(handle.reply(timeout_ms=SOON_MS))
    following = asyncio.ensure_future(anext(handle.events()))
    assert handle.sent is not None
    await handle.sent

    await db.session(URL).delete()

    for task in (waiting, following):
        with pytest.raises(KeyMissingError):
            await task
    await agent.aclose()


@pytest.mark.parametrize("at", range(1, 6))
async def test_an_executor_brings_nothing_back(
    db: Database, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    @tool
    async def look(n: int, ctx: ToolContext) -> int:
        """Look something up."""
        return await ctx.step("twice", lambda: 2 * n)

    wiper = Wiper(monkeypatch, db)
    calls = db.session(URL).tool_calls
    effect = create_tool_execution_effect(
        query=lambda q: q.from_(tc=calls).where(lambda tc: eq(tc.status, "pending")), tools=[look]
    )
    await effect.ready()
    await calls.insert({"id": "c", "generation_id": "g", "name": "look", "args": {"n": 1}})
    wiper.wipe_before(at)

    await calls.ready()
    await until(lambda: wiper.is_done.is_set() or _is_completed(calls))
    await effect.aclose()

    if wiper.is_done.is_set():
        assert await left_in(db) == []
    else:
        assert at > 3, "a call has more commits than that"
    await wiper.aclose()


def _is_completed(calls: Collection[Any]) -> bool:
    call = calls.get("c")
    return call is not None and call.status == "completed"


def test_the_kinds_of_rows_are_all_looked_at() -> None:
    assert set(DEFAULT_ROW_TYPES) <= set(COLLECTIONS)
