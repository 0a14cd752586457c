"""A fork begins with the rows of an earlier moment, shares what it can, and repeats nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aidb_ray import create_tool_execution_effect
from aidb_ray.agents.agent import create_agent
from aidb_ray.agents.definition import durable_agent
from aidb_ray.chunks import replay, stream_to_collection
from aidb_ray.contracts import Generation, ToolCall
from aidb_ray.database import Database, Session, connect
from aidb_ray.errors import (
    AidbError,
    CompactedError,
    ConfigError,
    ConflictError,
    ContractError,
    CorruptionError,
    KeyExistsError,
)
from aidb_ray.expressions import eq
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext, tool
from aidb_ray.store import past
from aidb_ray.store.changes import (
    Append,
    Batch,
    Claim,
    Commit,
    Committed,
    DeleteSession,
    Filter,
    Fork,
    StoredRow,
    Update,
)
from aidb_ray.store.columns import pack
from aidb_ray.store.forks import fork_rows
from aidb_ray.store.frames import Frame, Rows
from aidb_ray.store.log import CommitLog
from aidb_ray.store.past import session_at
from aidb_ray.store.plan import Plan
from aidb_ray.store.snapshots import Snapshot
from aidb_ray.store.tables import SHARE
from aidb_ray.testing import CallTool, Reply, Say, ScriptedModel
from tests.frame_builders import create, open_log
from tests.planner import Engine
from tests.stores import SESSION, Store, insert, open_store, row, until

URL = "aidb://echo/1"
TO = "aidb://echo/2"
SOON_MS = 20_000


# What becomes of rows.


def forked(rows: dict[tuple[str, str], dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    given = [
        (collection, key, StoredRow(1, msgspec.json.encode({"id": key, **fields})))
        for (collection, key), fields in rows.items()
    ]
    found = {
        (collection, key): msgspec.json.decode(value) for collection, key, value in fork_rows(given)
    }
    for (_, key), fields in found.items():
        assert fields.pop("id") == key
    return found


def test_what_was_under_way_does_not_go_on() -> None:
    ended = {"status": "completed", "error": None}
    assert forked(
        {
            ("generations", "g"): {"status": "running"},
            ("generations", "done"): ended,
            ("tool_calls", "a"): {"status": "executing", "generationId": "g"},
            ("tool_calls", "b"): {"status": "completed", "generationId": "g"},
            ("tool_calls", "c"): {"status": "pending"},
            ("cancel_requests", "r"): {"done": False, "agent": "a"},
            ("cancel_requests", "s"): {"done": True, "agent": "a"},
            ("questions", "q"): {"status": "open"},
            ("questions", "p"): {"status": "answered", "answer": 1},
            ("messages", "m"): {"processed": False, "targetAgent": "a"},
            ("messages", "g:0:0"): {
                "processed": False,
                "requestId": "g:0:0",
                "generationId": "g",
            },
            ("messages", "done:0:0"): {
                "processed": False,
                "requestId": "done:0:0",
                "generationId": "done",
            },
            ("steps", "s"): {"result": 1},
            ("mine", "x"): {"status": "running"},
            ("~claims", "mine x"): {"state": "held"},
        }
    ) == {
        ("generations", "g"): {"status": "cancelled", "error": "forked", "errorCode": "forked"},
        ("generations", "done"): ended,
        ("tool_calls", "a"): {"status": "cancelled", "generationId": "g"},
        ("tool_calls", "b"): {"status": "completed", "generationId": "g"},
        ("tool_calls", "c"): {"status": "cancelled"},
        ("cancel_requests", "r"): {"done": True, "agent": "a"},
        ("cancel_requests", "s"): {"done": True, "agent": "a"},
        ("questions", "p"): {"status": "answered", "answer": 1},
        ("messages", "m"): {"processed": False, "targetAgent": "a"},
        ("messages", "g:0:0"): {"processed": True, "requestId": "g:0:0", "generationId": "g"},
        ("messages", "done:0:0"): {
            "processed": False,
            "requestId": "done:0:0",
            "generationId": "done",
        },
        ("steps", "s"): {"result": 1},
        ("mine", "x"): {"status": "running"},
    }


def test_rows_of_other_types_are_copied_as_they_are() -> None:
    rows = [
        ("generations", "a", StoredRow(1, b'{"~v":2,"id":"a","status":"thinking"}')),
        ("messages", "b", StoredRow(1, b"no json")),
        ("tool_calls", "c", StoredRow(1, b'{"~v":2,"id":"c","status":"pending","x":1.50}')),
    ]

    assert list(fork_rows(rows)) == [
        ("generations", "a", rows[0][2].value),
        ("messages", "b", b"no json"),
        ("tool_calls", "c", b'{"~v":2,"id":"c","status":"cancelled","x":1.5}'),
    ]


def test_what_is_cancelled_still_fits_its_type() -> None:
    call = ToolCall(id="c", generation_id="g", name="look")
    generation = Generation(id="g", agent="a", status="running")  # pyright: ignore[reportArgumentType]
    rows = [
        ("tool_calls", "c", StoredRow(1, call.model_dump_json(by_alias=True).encode())),
        ("generations", "g", StoredRow(1, generation.model_dump_json(by_alias=True).encode())),
    ]

    (_, _, c), (_, _, g) = fork_rows(rows)

    assert ToolCall.model_validate_json(c).status == "cancelled"
    assert Generation.model_validate_json(g).error == "forked"


# In a plan.


def streaming(engine: Engine, generation_id: str, index: int, *, closes: str = "") -> None:
    append = Append(SESSION, generation_id, 1, index, 0, 2, closes=closes)
    engine.commit(Commit((append,)), chunks=pack([1, 2], ["x", "y"]))


def test_a_fork_shares_bytes_and_chunks() -> None:
    engine = Engine()
    engine.one(insert("a"), insert("b", into="others"))
    streaming(engine, "g", 0)
    streaming(engine, "h", 0, closes="finished")

    assert engine.one(Fork(TO, SESSION)) is None

    source, copy = engine.tables.session(SESSION), engine.tables.session(TO)
    revision = engine.tables.revision
    for collection in ("rows", "others"):
        for key, stored in source.collections[collection].items():
            assert copy.collections[collection][key].value is stored.value
            assert copy.collections[collection][key].revision == revision
    assert copy.streams["g"].runs == source.streams["g"].runs
    assert copy.streams["g"].runs is not source.streams["g"].runs
    assert {key: stream.closes for key, stream in copy.streams.items()} == {
        "g": "cancelled",
        "h": "finished",
    }
    assert engine.last_plan.log.ops.count(SHARE) == 2
    streaming(engine, "g", 2)
    assert copy.streams["g"].next_index == 2
    before = {name: engine.tables.session(name).rows() for name in (SESSION, TO)}
    weight = engine.tables.weight
    engine.restart()
    assert {name: engine.tables.session(name).rows() for name in (SESSION, TO)} == before
    assert engine.tables.weight == weight
    assert engine.tables.has_forks


def test_a_fork_has_no_claims() -> None:
    engine = Engine()
    engine.one(insert("a"))
    engine.one(Claim(SESSION, "rows", "a", "effect", "holder", 1_000))

    engine.one(Fork(TO, SESSION))

    assert list(engine.tables.session(TO).collections) == ["rows"]
    assert engine.one(Claim(TO, "rows", "a", "effect", "other", 1_000)) is None


@pytest.mark.parametrize(
    ("fork", "reason"),
    [
        (Fork(SESSION, "aidb://test/9"), "session_exists"),
        (Fork(TO, "~"), "reserved_name"),
        (Fork("~", SESSION), "reserved_name"),
        (Fork("", SESSION), "reserved_name"),
        (Fork(TO, SESSION, 100), "revision_in_future"),
    ],
)
def test_forks_that_cannot_be_are_refused(fork: Fork, reason: str) -> None:
    engine = Engine()
    engine.one(insert("a"))
    before = engine.tables.revision

    refusal = engine.one(fork)

    assert refusal is not None
    assert refusal.reason == reason
    assert engine.tables.revision == before
    assert engine.one(fork, insert("b")) is not None


def test_a_fork_and_other_commits_of_its_plan() -> None:
    """It is as of what is applied: where chunks of this plan will lie is not known yet."""
    engine = Engine()
    engine.one(insert("a"))

    answer = engine.commit(
        Commit((insert("b"),)),
        Commit((Fork(TO, SESSION),)),
        Commit((Fork(TO, SESSION),)),
        Commit((insert("c", session="aidb://test/3"),)),
        Commit((Fork("aidb://test/3", SESSION),)),
        Commit((DeleteSession(SESSION),)),
        Commit((Fork("aidb://test/4", SESSION),)),
        Commit((Fork("aidb://test/5", SESSION, 2),)),
    )

    assert [(at, refusal.reason) for at, refusal in answer.refused] == [
        (2, "session_exists"),
        (4, "session_exists"),
        (7, "compacted"),
    ]
    assert list(engine.tables.session(TO).collections["rows"]) == ["a"]
    assert engine.tables.session("aidb://test/4").rows() == []


# In a database.


@pytest.fixture
async def db(tmp_path: Path) -> AsyncGenerator[Database]:
    async with connect("local", data_dir=tmp_path) as database:
        yield database


async def write(db: Database, generation_id: str, text: str, url: str = URL) -> None:
    async def words() -> AsyncGenerator[dict[str, str]]:
        for word in text.split():
            yield {"type": "word", "content": word}

    await stream_to_collection(
        words(),
        collection=db.session(url).chunks,
        generation_id=generation_id,
        transform=lambda event, _index, _generation_id: event,
    )


async def text_of(session: Session, generation_id: str) -> str:
    chunks = [chunk async for chunk in replay(session.chunks, generation_id=generation_id)]
    return " ".join(chunk.content for chunk in chunks)


async def test_a_fork_is_a_session_of_its_own(db: Database) -> None:
    session = db.session(URL)
    rows = session.collection("rows")
    await rows.insert({"id": "a", "n": 1})
    await write(db, "g", "one two three")

    fork = await session.fork()
    assert fork.url.startswith(f"{URL}/")
    copies = fork.collection("rows")
    await copies.ready()
    await rows.update("a", {"n": 2})
    await rows.insert({"id": "b"})
    await copies.insert({"id": "c"})

    assert copies.values() == [{"id": "a", "n": 1}, {"id": "c"}]
    assert await rows.find("c") is None
    assert await text_of(fork, "g") == "one two three"
    assert (await fork.chunks.to_arrow("g")).num_rows == 3
    again = await fork.fork(to=TO)
    assert again == db.session(TO)
    assert await again.collection("rows").find("c") == {"id": "c"}
    assert await text_of(again, "g") == "one two three"


async def test_a_fork_may_begin_at_any_revision(db: Database) -> None:
    rows = db.session(URL).collection("rows")
    revisions = [(await rows.insert({"id": "a", "n": 0})).revision]
    revisions += [(await rows.update("a", {"n": n})).revision for n in range(1, 5)]
    await rows.delete("a")

    for n, revision in enumerate(revisions):
        fork = await db.session(URL).fork(at=revision)
        assert await fork.collection("rows").find("a") == {"id": "a", "n": n}
    before = await db.session(URL).fork(at=revisions[0] - 1)
    assert await before.collection("rows").find("a") is None
    assert await (await db.session(URL).fork()).collection("rows").find("a") is None


async def test_writes_made_before_are_in_it(db: Database) -> None:
    rows = db.session(URL).collection("rows")
    for n in range(50):
        rows.insert({"id": str(n)})

    fork = await db.session(URL).fork()

    copies = fork.collection("rows")
    await copies.ready()
    assert len(copies) == 50


async def test_a_fork_outlives_what_it_was_made_of(db: Database) -> None:
    session = db.session(URL)
    await session.collection("rows").insert({"id": "a"})
    await write(db, "g", "one two three")
    fork = await session.fork()

    await session.delete()

    assert await fork.collection("rows").find("a") == {"id": "a"}
    assert await text_of(fork, "g") == "one two three"


async def test_whoever_follows_the_stream_of_a_fork_gets_all_of_it(db: Database) -> None:
    await write(db, "g", "one two three")
    following = asyncio.create_task(text_of(db.session(TO), "g"))
    await until(lambda: db.partitions[0].client.feed.cursor >= 0)

    await db.session(URL).fork(to=TO)

    assert await following == "one two three"


@pytest.mark.parametrize(
    ("at", "to", "code"),
    [
        (-1, None, "invalid_cursor"),
        (True, None, "invalid_cursor"),
        ("3", None, "invalid_cursor"),
        (10**9, None, "revision_in_future"),
        (None, "aidb://other/*", "session_required"),
        (None, "other", "invalid_name"),
        (None, "aidb://taken/1", "session_exists"),
    ],
)
async def test_forks_that_make_no_sense_are_refused(
    db: Database, at: Any, to: Any, code: str
) -> None:
    await db.session(URL).collection("rows").insert({"id": "a"})
    await db.session("aidb://taken/1").collection("rows").insert({"id": "b"})

    with pytest.raises(AidbError) as caught:
        await db.session(URL).fork(at=at, to=to)

    assert caught.value.code == code
    kinds = {
        "invalid_cursor": ContractError,
        "revision_in_future": ConflictError,
        "session_exists": KeyExistsError,
    }
    assert type(caught.value) is kinds.get(code, ConfigError)
    assert sorted(one.url for one in await db.sessions()) == [URL, "aidb://taken/1"]


async def test_many_sessions_at_once_are_neither_forked_nor_deleted(db: Database) -> None:
    sessions = db.session("aidb://echo/*")

    for refused in (sessions.fork(), sessions.delete()):
        with pytest.raises(ConfigError) as caught:
            await refused
        assert caught.value.code == "session_required"


async def test_a_fork_lies_in_the_partition_of_its_session(tmp_path: Path) -> None:
    async with connect("local", data_dir=tmp_path, partitions=5) as db:
        await write(db, "g", "one two")
        here = db.site_of(URL)
        for _ in range(5):
            fork = await db.session(URL).fork()
            assert db.site_of(fork.url) is here
            assert await text_of(fork, "g") == "one two"
        other = next(url for n in range(50) if db.site_of(url := f"aidb://far/{n}") is not here)
        with pytest.raises(ConfigError) as caught:
            await db.session(URL).fork(to=other)
        assert caught.value.code == "spans_partitions"


async def test_in_memory_only_what_is_now_can_be_forked() -> None:
    async with connect("local", durability="memory") as db:
        rows = db.session(URL).collection("rows")
        first = await rows.insert({"id": "a", "n": 1})
        await rows.update("a", {"n": 2})
        await write(db, "g", "one two")

        fork = await db.session(URL).fork()
        latest = (await db.status())[0].revision
        same = await fork.fork(at=latest)
        with pytest.raises(CompactedError) as caught:
            await db.session(URL).fork(at=first.revision)

        assert caught.value.oldest >= latest
        await db.session(URL).delete()
        await fork.delete()
        assert await same.collection("rows").find("a") == {"id": "a", "n": 2}
        assert await text_of(same, "g") == "one two"
        await same.delete()
        ref: Any = db._refs[0]
        assert ref._host.actor._log._chunks == {}


# On disk.


async def database_of(store: Store) -> Database:
    return Database("test", [store.ref], data_dir=str(store.directory), cluster=None)


async def churn(store: Store, times: int) -> None:
    """Have the log grow, snapshots taken and segments compacted."""
    for n in range(times):
        rows = [
            insert(f"{store.now}-{n}-{at}", '"' + "x" * 900 + '"', session="aidb://churn")
            for at in range(20)
        ]
        await store.client().commit(rows)
        await store.actor.snapshot()
    store.now += 1


async def test_what_is_not_known_any_more_is_said(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 13) as store:
        db = await database_of(store)
        rows = db.session(SESSION).collection("rows")
        first = (await rows.insert({"id": "a", "n": 1})).revision
        await rows.update("a", {"n": 2})
        await churn(store, 5)

        with pytest.raises(CompactedError) as caught:
            await db.session(SESSION).fork(at=first)

        oldest = caught.value.oldest
        assert first < oldest
        for at in range(oldest, (await db.status())[0].revision + 1):
            fork = await db.session(SESSION).fork(at=at)
            assert await fork.collection("rows").find("a") == {"id": "a", "n": 2}
        await db.partitions[0].aclose()


async def test_a_deleted_session_does_not_come_back_by_a_fork(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = await database_of(store)
        session = db.session(SESSION)
        at = (await session.collection("rows").insert({"id": "a"})).revision
        await session.delete()
        deleted_at = (await db.status())[0].revision
        new = (await session.collection("rows").insert({"id": "b"})).revision

        for _ in range(2):
            with pytest.raises(CompactedError) as caught:
                await session.fork(at=at)
            assert caught.value.oldest == deleted_at
            # What this process remembers of deletions is gone then; the log knows.
            await store.restart()
        assert await (await session.fork(at=new)).collection("rows").find("b") == {"id": "b"}
        assert await (await session.fork(at=deleted_at)).collection("rows").find("b") is None
        await db.partitions[0].aclose()


async def test_shared_chunks_stay_while_any_session_has_them(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 13) as store:
        db = await database_of(store)
        for n in range(20):
            await write(db, f"g{n}", "KEPT " * 40, SESSION)
        await store.client().commit([insert("a")])
        fork = await db.session(SESSION).fork(to="aidb://fork/1")
        second = await fork.fork(to="aidb://fork/2")
        await churn(store, 4)

        for gone in (db.session(SESSION), fork):
            await gone.delete()
            await churn(store, 4)
            await store.restart()
            for n in range(20):
                assert await text_of(second, f"g{n}") == ("KEPT " * 40).strip()
        assert files_with(store, b"KEPT")
        await second.delete()
        await churn(store, 6)
        assert files_with(store, b"KEPT") == []
        await db.partitions[0].aclose()


def files_with(store: Store, text: bytes) -> list[str]:
    return [path.name for path in store.directory.rglob("*.*") if text in path.read_bytes()]


async def test_forks_survive_restarts_snapshots_and_compaction(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 13, max_resident_bytes=1) as store:
        db = await database_of(store)
        await store.client().commit([insert("a", "1")])
        await write(db, "g", "one two", SESSION)
        fork = await db.session(SESSION).fork(to=TO)
        await store.client().commit([Update(SESSION, "rows", "a", row("a", "2"), 0)])

        for _ in range(3):
            await store.restart()
            assert await fork.collection("rows").find("a") == {"id": "a", "v": 1}
            assert await text_of(fork, "g") == "one two"
            await churn(store, 3)
        await db.partitions[0].aclose()


async def test_a_fork_that_is_sent_again_is_made_once(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = await database_of(store)
        at = (await db.session(SESSION).collection("rows").insert({"id": "a"})).revision
        await db.session(SESSION).collection("rows").delete("a")
        store.lose_answers = 1

        fork = await db.session(SESSION).fork(at=at)

        assert store.lose_answers == 0
        assert await fork.collection("rows").find("a") == {"id": "a"}
        await db.partitions[0].aclose()


# Agents and effects.


def play(messages: Sequence[ModelMessage]) -> Reply:
    if messages[-1].role == "user":
        return [Say("Let me look."), CallTool("look", {"n": len(messages)})]
    return Say(f"I saw {messages[-1].content}.")


async def test_a_conversation_goes_on_from_an_old_point(db: Database) -> None:
    @tool
    async def look(n: int) -> int:
        """Look something up."""
        return n

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[look]))
    await agent.send("one", session=URL).reply(timeout_ms=SOON_MS)
    at = (await db.status())[0].revision
    await agent.send("two", session=URL).reply(timeout_ms=SOON_MS)

    fork = await db.session(URL).fork(at=at)
    reply = await agent.send("other", session=fork).reply(timeout_ms=SOON_MS)

    assert reply.content == "I saw 5."
    assert await contents(fork) == ["one", "I saw 1.", "other", "I saw 5."]
    assert await contents(db.session(URL)) == ["one", "I saw 1.", "two", "I saw 5."]
    [first, *_] = await db.query(
        lambda q: q.from_(g=fork.generations).order_by(lambda g: g.created_at)
    )
    assert await text_of(fork, first.id)
    await agent.aclose()


async def contents(session: Session) -> list[str]:
    rows = await session.database.query(
        lambda q: q.from_(m=session.messages).order_by(lambda m: m.created_at)
    )
    return [message.content for message in rows]


async def test_an_unanswered_message_is_answered_anew_in_the_fork(db: Database) -> None:
    asked, door = asyncio.Event(), asyncio.Event()
    rounds: list[str] = []

    async def answer(messages: Sequence[ModelMessage]) -> Reply:
        rounds.append(messages[-1].content)
        if len(rounds) == 1:
            asked.set()
            await door.wait()
        return f"answer {len(rounds)}"

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(answer)))
    handle = agent.send("hello", session=URL, message_id="m")
    await asked.wait()
    generations = db.session(URL).generations
    await generations.ready()
    await until(generations.values)

    fork = await db.session(URL).fork(to=TO)
    copied = agent.reply_to("m", session=fork)
    assert (await copied.reply(timeout_ms=SOON_MS)).content == "answer 2"

    door.set()
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "answer 2"
    found = await db.query(lambda q: q.from_(g=fork.generations).order_by(lambda g: g.created_at))
    assert [(g.status, g.error) for g in found] == [("cancelled", "forked"), ("completed", None)]
    assert rounds == ["hello", "hello"]
    await agent.aclose()


async def test_a_tool_call_that_was_running_is_not_run_again(db: Database) -> None:
    began, door = asyncio.Event(), asyncio.Event()
    runs: list[str] = []

    @tool
    async def look(ctx: ToolContext) -> str:
        """Look something up."""
        runs.append(ctx.session.url if ctx.session is not None else "")
        began.set()
        await door.wait()
        return "seen"

    effect = create_tool_execution_effect(
        query=lambda q: q.from_(
            tc=db.collection("tool_calls", ToolCall, session="aidb://echo/*")
        ).where(lambda tc: eq(tc.status, "pending")),
        tools=[look],
    )
    await effect.ready()
    calls = db.session(URL).tool_calls
    await calls.insert({"id": "c", "generation_id": "g", "name": "look", "args": {}})
    await began.wait()

    fork = await db.session(URL).fork(to=TO)
    door.set()
    await calls.ready()
    await until(lambda: (call := calls.get("c")) is not None and call.status == "completed")

    copy = await fork.tool_calls.find("c")
    assert copy is not None
    assert copy.status == "cancelled"
    _, claims = await db.site_of(TO).client.read(Filter("~claims", TO))
    assert claims == []
    await effect.aclose()
    assert runs == [URL]


# Between one commit and the next.


async def test_a_fork_is_of_its_revision_whatever_is_committed_meanwhile(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = await database_of(store)
        at = (await db.session(SESSION).collection("rows").insert({"id": "a", "v": 1})).revision
        client = store.client()
        await client.commit([insert("b", session="aidb://other")])
        at = (await db.status())[0].revision
        store.files.hold_syncs()
        writing = asyncio.ensure_future(
            client.commit([Update(SESSION, "rows", "a", row("a", "2"), 0)])
        )
        await until(lambda: store.actor._taken)

        forking = asyncio.create_task(db.session(SESSION).fork(at=at, to=TO))
        await until(lambda: store.actor._arrivals)
        store.files.let_syncs_go()
        await writing

        assert await (await forking).collection("rows").find("a") == {"id": "a", "v": 1}
        await db.partitions[0].aclose()


async def test_a_deletion_that_comes_first_keeps_its_word(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = await database_of(store)
        at = (await db.session(SESSION).collection("rows").insert({"id": "a"})).revision
        client = store.client()
        await client.commit([insert("b", session="aidb://other")])
        store.files.hold_syncs()
        deleting = asyncio.ensure_future(client.commit([DeleteSession(SESSION)]))
        await until(lambda: store.actor._taken)

        forking = asyncio.create_task(db.session(SESSION).fork(at=at, to=TO))
        await until(lambda: store.actor._arrivals)
        store.files.let_syncs_go()

        with pytest.raises(CompactedError) as caught:
            await forking
        assert caught.value.oldest == await deleting
        await db.partitions[0].aclose()


def test_a_stream_that_was_begun_anew_since_is_not_shared() -> None:
    engine = Engine()
    streaming(engine, "g", 0, closes="finished")
    at = engine.tables.revision
    past = engine.tables.session(SESSION).copy()
    past.streams["g"].runs[0] = msgspec.structs.replace(past.streams["g"].runs[0], start=7)
    engine.one(insert("a"))
    plan = Plan(engine.tables, 1)
    fork = Batch(engine.client_id, engine.seq, [Commit((Fork(TO, SESSION, at),))])

    answer = plan.add_batch(fork, b"raw", {(SESSION, at): past})

    assert isinstance(answer, Committed)
    assert answer.refused == []
    assert plan.entries == []


async def test_chunks_of_a_fork_that_no_snapshot_has_stay(tmp_path: Path) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 13) as store:
        db = await database_of(store)
        for n in range(20):
            await write(db, f"g{n}", "KEPT " * 40, SESSION)
        await churn(store, 4)
        fork = await db.session(SESSION).fork(to=TO)
        await db.session(SESSION).delete()
        taker = store.actor._snapshots
        assert taker is not None
        assert store.actor._tables.garbage()

        await taker._compact()

        for n in range(20):
            assert await text_of(fork, f"g{n}") == ("KEPT " * 40).strip()
        await db.partitions[0].aclose()


async def test_the_past_is_found_though_compaction_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path, segment_bytes=1 << 13) as store:
        db = await database_of(store)
        await db.session(SESSION).collection("rows").insert({"id": "a"})
        await churn(store, 3)
        log = store.actor._log
        assert isinstance(log, CommitLog)
        outdated = [log.snapshots()]
        await churn(store, 3)
        await store.client().commit([insert("b", session="aidb://other")])
        at = (await db.status())[0].revision
        await store.client().commit([insert("c", session="aidb://other")])
        with pytest.raises(CompactedError):
            list(log.rows_of(SESSION, outdated[0][-1].revision))
        snapshots = CommitLog.snapshots

        def late(self: CommitLog) -> tuple[Snapshot, ...]:
            return outdated.pop() if outdated else snapshots(self)

        monkeypatch.setattr(CommitLog, "snapshots", late)

        assert session_at(log, SESSION, at).collections["rows"]["a"]
        assert outdated == []
        await db.partitions[0].aclose()


def test_a_snapshot_does_not_tell_of_what_it_mixes_up(tmp_path: Path) -> None:
    """It bears revision 1, and was written while revision 2 came."""
    log = open_log(create(tmp_path))
    log.append(frame_of(1, "1"))
    writer = log.begin_snapshot(1)
    log.append(frame_of(2, "2"))
    for _ in writer.merge([(SESSION, [("rows", "a", 2, row("a", "2"))])]):
        pass
    snapshot = writer.finish()
    log.append(frame_of(3, "3"))
    assert snapshot.revision == 1

    for revision in (1, 2, 3):
        session = session_at(log, SESSION, revision)
        assert session.collections["rows"]["a"].value == row("a", str(revision))
    log.close()


def frame_of(revision: int, value: str) -> Frame:
    rows = Rows([revision], [1], [SESSION], ["rows"], ["a"], [row("a", value)])
    return Frame(revision, 1, rows)


# What it costs.


def log_bytes(directory: Path) -> int:
    # A live segment has its whole size from the beginning; what is not written yet is zeros.
    segments = directory.glob("**/log/seg-*.log")
    return sum(len(segment.read_bytes().rstrip(b"\0")) for segment in segments)


async def test_a_fork_logs_rows_and_no_chunks(tmp_path: Path) -> None:
    async with connect("local", data_dir=tmp_path) as db:
        for n in range(10):
            await write(db, f"g{n}", "lorem " * 20_000, SESSION)
        at = (await db.session(SESSION).collection("rows").insert({"id": "a"})).revision
        before = log_bytes(tmp_path)
        now = await db.session(SESSION).fork()
        then = await db.session(SESSION).fork(at=at)
        logged = log_bytes(tmp_path) - before

        assert before > 1_000_000
        assert 0 < logged < before / 20
        for fork in (now, then):
            assert await text_of(fork, "g9") == ("lorem " * 20_000).strip()


async def test_a_fork_of_the_past_holds_up_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looking, may_look = past.session_at, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(*args: Any) -> Any:
        loop.call_soon_threadsafe(looking.set)
        assert may_look.wait(20)
        return look(*args)

    monkeypatch.setattr(past, "session_at", wait)
    async with connect("local", data_dir=tmp_path) as db:
        rows = db.session(SESSION).collection("rows")
        at = (await rows.insert({"id": "a"})).revision
        await rows.insert({"id": "b"})
        forking = asyncio.create_task(db.session(SESSION).fork(at=at))
        await looking.wait()
        await asyncio.wait_for(rows.insert({"id": "c"}), 20)
        assert not forking.done()
        may_look.set()
        copies = (await forking).collection("rows")
        assert (await copies.find("a"), await copies.find("b")) == ({"id": "a"}, None)


def damage(directory: Path, text: bytes) -> Path:
    [segment] = directory.glob("**/log/seg-*.log")
    with segment.open("r+b") as file:
        file.seek(segment.read_bytes().index(text))
        file.write(b"?")
    return segment


async def test_damage_that_a_fork_of_the_past_meets_is_named(tmp_path: Path) -> None:
    async with connect("local", data_dir=tmp_path) as db:
        rows = db.session(SESSION).collection("rows")
        at = (await rows.insert({"id": "a", "text": "DAMAGED HERE"})).revision
        await rows.insert({"id": "b"})
        segment = damage(tmp_path, b"DAMAGED HERE")
        revision = (await db.status())[0].revision

        with pytest.raises(CorruptionError) as caught:
            await db.session(SESSION).fork(at=at)

        assert caught.value.file.endswith(segment.name)
        assert (await db.status())[0].revision == revision
