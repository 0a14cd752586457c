"""Bad inputs, numbered, with the exact answer to each.

Whatever is refused is refused with a class to react to and a stable code, before anything is
written: no revision is taken. What comes from a model or a tool is answered in the row of the call.
"""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel

from aidb_ray import (
    AgentTool,
    AidbError,
    Collection,
    CompactedError,
    ConfigError,
    ConflictError,
    ContractError,
    CoroutineError,
    Database,
    FencedError,
    KeyExistsError,
    KeyMissingError,
    QueryError,
    SlowConsumerError,
    ToolCall,
    create_agent,
    create_tool_execution_effect,
    declare_tool,
    durable_agent,
    eq,
    replay,
    stream_to_collection,
    tool,
)
from aidb_ray.json_values import parse_json
from aidb_ray.models.base import ModelMessage
from aidb_ray.query import live as live_module
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.store import changes as wire
from aidb_ray.store import collection as collection_module
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import (
    BUCKETS,
    Append,
    Batch,
    Claim,
    ClaimBuckets,
    Commit,
    Delete,
    Held,
    Insert,
    Release,
    Runner,
)
from aidb_ray.store.columns import pack
from aidb_ray.testing import CallTool, Reply, ScriptedModel, database, eventually
from tests.stores import Process, open_store

URL = "aidb://bad/1"
DEEP = 50_000
SOON_MS = 20_000


class Task(BaseModel):
    """A row type of one's own."""

    id: str
    title: str = ""
    done: bool = False
    score: float = 0.0
    data: Any = None


class Part(BaseModel):
    """A chunk of one's own."""

    id: str
    generation_id: str
    index: int
    text: str


class Place:
    """Collections with a row in each.

    Attributes:
        elsewhere: The tasks as another process has them, which has read nothing.
    """

    def __init__(self, db: Database, other: Database) -> None:
        session = db.session(URL)
        self.db = db
        self.tasks = session.collection("tasks", Task)
        self.dicts = session.collection("dicts")
        self.messages = session.messages
        self.calls = session.tool_calls
        self.chunks = session.chunks
        self.elsewhere = other.session(URL).collection("tasks", Task)

    async def seed(self) -> None:
        await self.tasks.insert({"id": "a", "title": "first"})
        await self.dicts.insert({"id": "a"})
        await self.calls.insert(
            {"id": "a", "generation_id": "g", "name": "t", "status": "completed"}
        )
        await stream_to_collection(chunks_of("one", "two"), collection=self.chunks, **CLOSED)
        await self.elsewhere.insert({"id": "z"})
        for collection in (self.tasks, self.dicts, self.messages, self.calls):
            await collection.ready()

    def find_tasks(self, q: QueryRoot) -> Query[Task]:
        return q.from_(t=self.tasks)

    async def revision(self) -> int:
        (status,) = await self.db.status()
        return status.revision


async def chunks_of(*contents: Any) -> AsyncIterator[Any]:
    for content in contents:
        yield content


def as_chunk(event: Any, index: int, generation_id: str) -> dict[str, Any]:
    del index, generation_id
    return {"type": "TEXT_MESSAGE_CONTENT", "content": str(event)}


CLOSED: dict[str, Any] = {"generation_id": "closed", "transform": as_chunk}


@asynccontextmanager
async def connection(db: Database) -> AsyncGenerator[Database]:
    """Give another connection to the same store, as another process has."""
    other = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield other
    for partition in other.partitions:
        await partition.aclose()


@asynccontextmanager
async def seeded(data_dir: Path | None = None) -> AsyncGenerator[Place]:
    async with database(data_dir) as db, connection(db) as other:
        place = Place(db, other)
        await place.seed()
        yield place


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with database() as db:
        yield db


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        attempt: Does it; awaited if there is something to await.
        code: Ends in `_` if only its beginning is fixed.
        fields: Attributes of the error.
    """

    number: int
    what: str
    attempt: Callable[[Place], Any]
    error: type[Exception]
    code: str
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        return f"{self.number:02}-{self.what.replace(' ', '-')}"


def message(**fields: Any) -> Callable[[Place], Any]:
    """Insert a message that is right but for these fields."""
    row: dict[str, Any] = {"role": "user", "actor_id": "u", "content": "hello"}
    return lambda place: place.messages.insert({**row, **fields})


def task(**fields: Any) -> Callable[[Place], Any]:
    return lambda place: place.tasks.insert({"id": "new", **fields})


def plain(**fields: Any) -> Callable[[Place], Any]:
    return lambda place: place.dicts.insert({"id": "new", **fields})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Precious:
    """Says when somebody tries to send it."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError


def raises_here(place: Place) -> object:
    def change(draft: Any) -> None:
        draft.title = "half-way"
        raise LookupError("mine")

    return place.tasks.update("a", change)


def changes_later(place: Place) -> object:
    async def change(draft: Any) -> None:
        draft.title = "later"

    return place.tasks.update("a", change)


def returns_a_coroutine(place: Place) -> object:
    return place.tasks.update("a", lambda _draft: asyncio.sleep(0))


async def read_from(place: Place, since: Any) -> object:
    return await anext(aiter(place.tasks.changes(since)))


def is_none(t: Any) -> bool:
    return t.title is None


def ask(write: Callable[[Query[Task]], Any]) -> Callable[[Place], Any]:
    """Write a query of the tasks, without running it."""
    return lambda place: place.db.live_query(lambda q: write(q.from_(t=place.tasks)))


def stream(*contents: str | int, into: str = "g", **options: Any) -> Callable[[Place], Any]:
    given: dict[str, Any] = {"generation_id": into, "transform": as_chunk, **options}
    return lambda place: stream_to_collection(
        chunks_of(*contents), collection=place.chunks, **given
    )


def append(index: Any, *, into: str = "g") -> Callable[[Place], Any]:
    """Append one chunk as a client of one's own would."""
    columns = pack([1], ["x"])
    mutation = Append(URL, into, 1, index, 0, 1)
    return lambda place: place.db.partitions[0].client.commit([mutation], chunks=columns)


def agent(**options: Any) -> Callable[[Place], Any]:
    given: dict[str, Any] = {"name": "a", "adapter": ScriptedModel(["hi"]), **options}
    return lambda _: create_agent(durable_agent(**given))


def executor(*tools: Any, **functions: Callable[..., Any]) -> Callable[[Place], Any]:
    return lambda place: create_tool_execution_effect(
        query=lambda q: q.from_(c=place.calls).where(lambda c: eq(c.status, "pending")),
        tools=tools,
        implementations=functions,
        placement="here",
    )


class In(BaseModel):
    """The input of a tool."""

    n: int


@tool
async def double(n: int) -> int:
    return 2 * n


elsewhere = declare_tool(name="elsewhere", description="Runs elsewhere.", input_schema=In)


async def nothing(**_: Any) -> None:
    return None


CASES = [
    Case(1, "a row without its key", plain(id=None), ContractError, "missing_field"),
    Case(
        1,
        "nothing at all",
        lambda place: place.dicts.insert({}),
        ContractError,
        "missing_field",
        {"loc": ("id",)},
    ),
    Case(
        1,
        "a typed row without its key",
        lambda place: place.tasks.insert({}),
        ContractError,
        "missing_field",
        {"loc": ("id",)},
    ),
    Case(
        2,
        "a key that is here",
        lambda place: place.tasks.insert({"id": "a", "title": "second"}),
        KeyExistsError,
        "duplicate_key",
        {"key": "a", "collection": "tasks"},
    ),
    Case(
        2,
        "a key that only the store knows",
        lambda place: place.elsewhere.insert({"id": "a"}),
        KeyExistsError,
        "duplicate_key",
    ),
    Case(
        2,
        "a key twice in one insert",
        lambda place: place.tasks.insert([{"id": "b"}, {"id": "b"}]),
        KeyExistsError,
        "duplicate_key",
    ),
    Case(
        5,
        "a role that there is not",
        message(role="robot"),
        ContractError,
        "literal_error",
        {"loc": ("role",)},
    ),
    Case(
        6,
        "a word for a boolean",
        message(processed="yes"),
        ContractError,
        "bool_type",
        {"loc": ("processed",)},
    ),
    Case(
        7,
        "a field that there is not",
        message(proccessed=True),
        ContractError,
        "extra_forbidden",
        {"loc": ("proccessed",)},
    ),
    Case(
        7,
        "a field that there is not in a row type of ones own",
        task(titel="typo"),
        ContractError,
        "extra_forbidden",
        {"loc": ("titel",)},
    ),
    Case(
        7,
        "an update of a field that there is not",
        lambda place: place.tasks.update("a", {"titel": "typo"}),
        ContractError,
        "extra_forbidden",
        {"loc": ("titel",)},
    ),
    Case(
        8,
        "a word for a time",
        message(created_at="yesterday"),
        ContractError,
        "datetime_",
        {"loc": ("created_at",)},
    ),
    Case(
        8,
        "a time without a zone",
        message(created_at=datetime(2026, 1, 1)),  # noqa: DTZ001
        ContractError,
        "timezone_required",
        {"loc": ("created_at",)},
    ),
    Case(9, "an empty key", message(id=""), ContractError, "invalid_id"),
    Case(9, "a long key", message(id="k" * 4_096), ContractError, "invalid_id"),
    Case(9, "a key with NUL", message(id="a\0b"), ContractError, "invalid_id"),
    Case(9, "an empty key of a dict", plain(id=""), ContractError, "invalid_id"),
    Case(9, "a key that is no text", plain(id=5), ContractError, "invalid_id"),
    Case(
        9,
        "a path for a collection",
        lambda place: place.db.collection("../../etc/passwd"),
        ConfigError,
        "invalid_name",
    ),
    Case(
        9,
        "a path for a session",
        lambda place: place.db.session("aidb://../../etc/passwd"),
        ConfigError,
        "invalid_name",
    ),
    Case(
        10,
        "half a character",
        message(content="\ud800"),
        ContractError,
        "invalid_unicode",
        {"loc": ("content",)},
    ),
    Case(
        10,
        "half a character in a name",
        plain(data={"\udc00": 1}),
        ContractError,
        "invalid_unicode",
        {"loc": ("data",)},
    ),
    Case(11, "NaN", plain(n=float("nan")), ContractError, "invalid_number", {"loc": ("n",)}),
    Case(
        11,
        "infinity in a typed row",
        task(score=float("inf")),
        ContractError,
        "invalid_number",
        {"loc": ("score",)},
    ),
    Case(
        11,
        "infinity in a list",
        task(data=[0, 1e999]),
        ContractError,
        "invalid_number",
        {"loc": ("data", 1)},
    ),
    Case(
        11,
        "an integer of 5000 digits",
        plain(n=10**5_000),
        ContractError,
        "invalid_number",
        {"loc": ("n",)},
    ),
    Case(12, "a nested list", plain(data=nested(DEEP)), ContractError, "too_deep"),
    Case(12, "a nested list in a typed row", task(data=nested(DEEP)), ContractError, "too_deep"),
    Case(
        12,
        "a nested list in an update",
        lambda place: place.tasks.update("a", {"data": nested(DEEP)}),
        ContractError,
        "too_deep",
    ),
    Case(12, "a nested text", lambda _: parse_json("[" * DEEP), ContractError, "too_deep"),
    Case(13, "a row of 3 MiB", plain(data="x" * (3 << 20)), ContractError, "row_too_large"),
    Case(
        13,
        "a text of 2 MiB",
        lambda _: parse_json(f'"{"x" * (2 << 20)}"'),
        ContractError,
        "payload_too_large",
    ),
    Case(
        14,
        "a name twice",
        lambda _: parse_json('{"id": 1, "id": 2}'),
        ContractError,
        "duplicate_json_key",
    ),
    *(
        Case(
            15,
            f"{what} in a row without a type",
            plain(data={"here": [value]}),
            ContractError,
            "not_serializable",
            {"loc": ("data", "here", 0)},
        )
        for what, value in {
            "a time": datetime(2026, 1, 1, tzinfo=UTC),
            "a set": {1},
            "a function": print,
            "bytes": b"bytes",
            "an object": Precious(),
        }.items()
    ),
    Case(
        15,
        "an object in a typed row",
        task(data=Precious()),
        ContractError,
        "not_serializable",
        {"loc": ("data",)},
    ),
    Case(
        15,
        "an object in an update",
        lambda place: place.tasks.update("a", {"data": {"x": Precious()}}),
        ContractError,
        "not_serializable",
        {"loc": ("data", "x")},
    ),
    Case(
        16,
        "an update of no row",
        lambda place: place.tasks.update("none", {"title": "x"}),
        KeyMissingError,
        "not_found",
        {"key": "none"},
    ),
    Case(
        16,
        "a delete of no row",
        lambda place: place.tasks.delete("none"),
        KeyMissingError,
        "not_found",
    ),
    Case(
        17,
        "another key",
        lambda place: place.tasks.update("a", {"id": "b"}),
        ContractError,
        "immutable_key",
        {"loc": ("id",), "key": "a"},
    ),
    Case(18, "a function that raises", raises_here, LookupError, ""),
    Case(18, "a coroutine function", changes_later, CoroutineError, "coroutine_not_allowed"),
    Case(
        18,
        "a function that returns a coroutine",
        returns_a_coroutine,
        CoroutineError,
        "coroutine_not_allowed",
    ),
    Case(
        19,
        "a revision that is gone",
        lambda place: place.tasks.update("a", {"title": "x"}, expected_revision=10**6),
        ConflictError,
        "conflict",
        {"key": "a", "current": {"id": "a", "title": "first"}},
    ),
    Case(
        20,
        "a condition on a field that there is not",
        ask(lambda q: q.where(lambda t: eq(t.titel, "x"))),
        QueryError,
        "unknown_field",
    ),
    Case(
        20,
        "an order by a field that there is not",
        ask(lambda q: q.order_by(lambda t: t.titel)),
        QueryError,
        "unknown_field",
    ),
    Case(
        20,
        "an alias that there is not",
        ask(lambda q: q.where(lambda u: eq(u.title, "x"))),
        QueryError,
        "unknown_field",
    ),
    Case(
        20,
        "a condition that is none",
        ask(lambda q: q.where(lambda t: t.title + 1)),
        QueryError,
        "unknown_field",
    ),
    Case(
        20,
        "a condition that is a constant",
        ask(lambda q: q.where(cast("Any", is_none))),
        QueryError,
        "unknown_field",
    ),
    Case(
        21,
        "a revision that will be",
        partial(read_from, since=10**9),
        ConflictError,
        "revision_in_future",
    ),
    Case(21, "a revision below 0", partial(read_from, since=-5), ContractError, "invalid_cursor"),
    *(
        Case(
            22,
            f"{since!r} for a revision",
            partial(read_from, since=since),
            ContractError,
            "invalid_cursor",
        )
        for since in ("7", True, 1.5)
    ),
    Case(
        24,
        "an agent that generates nothing",
        lambda place: cast("Any", create_agent)(name="a", pending_work=place.find_tasks),
        ConfigError,
        "generate_required",
    ),
    Case(24, "an agent without a name", agent(name=""), ConfigError, "invalid_name"),
    Case(24, "an agent with a path for a name", agent(name="a/../b"), ConfigError, "invalid_name"),
    Case(25, "two tools of one name", agent(tools=[double, double]), ConfigError, "duplicate_tool"),
    Case(
        25,
        "a tool and an agent of one name",
        agent(tools=[double], agents=[AgentTool("double")]),
        ConfigError,
        "duplicate_tool",
    ),
    Case(26, "a tool that nobody runs", executor(elsewhere), ConfigError, "missing_implementation"),
    Case(
        26,
        "a function for no tool",
        executor(double, dubble=nothing),
        ConfigError,
        "missing_implementation",
    ),
    Case(
        32,
        "a call that is completed and then pending",
        lambda place: place.calls.update("a", {"status": "pending"}),
        ContractError,
        "illegal_transition",
        {"loc": ("status",), "key": "a"},
    ),
    Case(
        34, "a chunk below 0", append(-1), ContractError, "invalid_index", {"collection": "chunks"}
    ),
    Case(
        34,
        "a chunk too far",
        append(3),
        ConflictError,
        "sequence_gap",
        {"expected": 0, "got": 3, "key": "g"},
    ),
    Case(35, "a chunk behind the end", append(2, into="closed"), ConflictError, "stream_closed"),
    Case(35, "a stream behind the end", stream("x", into="closed"), ConflictError, "stream_closed"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_it_is_refused_before_anything_is_written(case: Case) -> None:
    async with seeded() as place:
        await check(case, place)


async def test_on_a_disk_it_is_refused_as_well(tmp_path: Path) -> None:
    async with seeded(tmp_path) as place:
        for case in CASES:
            await check(case, place)


async def check(case: Case, place: Place) -> None:
    before = await place.revision()

    with pytest.raises(case.error) as caught:
        await case.attempt(place)

    error = caught.value
    assert type(error) is case.error
    if isinstance(error, AidbError):
        assert error.code == case.code or (
            case.code.endswith("_") and error.code.startswith(case.code)
        )
    for name, value in case.fields.items():
        found = getattr(error, name)
        assert found == value or (isinstance(found, dict) and found.items() >= value.items())
    assert await place.revision() == before
    assert (await place.tasks.find("a")) == Task(id="a", title="first")


# What is not refused, or not in one step.


async def test_03_and_04_what_is_sent_again_is_applied_once_and_must_be_the_same(
    db: Database,
) -> None:
    ref = db.partitions[0].ref
    client_id, _, _ = await ref.ask(StoreActor.register, 0)

    def batch(title: str) -> bytes:
        row = Insert(URL, "tasks", "a", f'{{"id":"a","title":"{title}"}}'.encode())
        return wire.encode(Batch(client_id, 1, [Commit((row,))]))

    first = await ref.ask(StoreActor.commit, batch("x"))
    (after,) = await db.status()
    assert await ref.ask(StoreActor.commit, batch("x")) == first
    with pytest.raises(ConflictError) as caught:
        await ref.ask(StoreActor.commit, batch("y"))

    assert caught.value.code == "idempotency_mismatch"
    (now,) = await db.status()
    assert now.revision == after.revision
    found = await db.session(URL).collection("tasks", Task).find("a")
    assert found == Task(id="a", title="x")


async def test_12_nesting_without_end_costs_neither_time_nor_memory(db: Database) -> None:
    rows = db.session(URL).collection("tasks", Task)
    data, text = nested(DEEP), "[" * DEEP
    attempts: list[Callable[[], object]] = [
        lambda: rows.insert({"id": "new", "data": data}),
        lambda: parse_json(text),
        lambda: double.parse_args(text),
    ]

    for attempt in attempts:
        took: list[float] = []
        tracemalloc.start()
        for _ in range(5):
            began = time.perf_counter()
            with pytest.raises(AidbError):
                attempt()
            took.append(time.perf_counter() - began)
        _now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert min(took) < 0.05
        assert peak < 10 << 20


async def test_18_what_happens_to_a_row_after_the_call_has_no_effect(db: Database) -> None:
    rows = db.session(URL).collection("tasks", Task)
    data: dict[str, Any] = {"seen": []}
    captured: list[Any] = []

    await rows.insert({"id": "a", "data": data})
    data["seen"].append("after the insert")
    await rows.update("a", captured.append)
    captured[0].title = "after the update"
    captured[0].data["seen"].append("after the update")
    cast("Any", rows.get("a")).data["seen"].append("in what was read")

    assert await rows.find("a") == Task(id="a", data={"seen": []})


async def test_21_a_revision_that_is_not_kept_any_more(tmp_path: Path) -> None:
    async with database(tmp_path) as db:
        await db.session(URL).collection("tasks", Task).insert({"id": "a"})
        await db.partitions[0].ref.ask(StoreActor.snapshot)
    async with database(tmp_path) as db:
        rows = db.session(URL).collection("tasks", Task)
        (status,) = await db.status()

        with pytest.raises(CompactedError) as caught:
            await anext(aiter(rows.changes(since=0)))

        assert caught.value.code == "compacted"
        assert 0 < caught.value.oldest <= status.revision


async def test_22_a_revision_of_rows_that_are_gone(tmp_path: Path) -> None:
    async with open_store(tmp_path, durability="memory") as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.insert({"id": "a"})
        reading = rows.changes(since=0)
        assert (await anext(reading)).key == "a"

        await store.restart()

        with pytest.raises(CompactedError) as caught:
            await anext(reading)
        assert caught.value.code == "cursor_mismatch"


async def test_23_a_reader_that_never_reads_is_dropped(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection_module, "MAX_UNREAD_CHANGES", 10)
    monkeypatch.setattr(live_module, "MAX_UNREAD_DELTAS", 10)
    rows = db.session(URL).collection("tasks", Task)
    feed = db.partitions[0].client.feed
    first = await rows.insert({"id": "first"})
    changes = rows.changes(since=0)
    live = db.live_query(lambda q: q.from_(t=rows))
    await live.ready()
    deltas = aiter(live)
    assert (await anext(changes)).key == (await anext(deltas)).key[1] == "first"

    for number in range(40):
        written = await rows.insert({"id": f"t{number}"})
        await feed.reached(written.revision)

    for reading in (changes, deltas):
        with pytest.raises(SlowConsumerError) as caught:
            await anext(reading)
        assert caught.value.code == "slow_consumer"
        assert caught.value.resume == first.revision
    await live.aclose()
    again = rows.changes(since=first.revision)
    assert [(await anext(again)).key for _ in range(40)] == [f"t{number}" for number in range(40)]
    await cast("Any", again).aclose()


async def test_24_an_agent_that_runs_already_as_another_one(db: Database) -> None:
    definition = partial(durable_agent, name="a", adapter=ScriptedModel(["hi"]))
    await create_agent(definition(instructions="one")).ready()
    (before,) = await db.status()

    with pytest.raises(ConfigError) as caught:
        await create_agent(definition(instructions="two"), on_change="error").ready()

    assert caught.value.code == "agent_exists"
    (after,) = await db.status()
    assert after.revision == before.revision


# What a model asks for is answered in the row of the call, and the model goes on.


def calls_once(name: str, args: dict[str, Any] | str) -> ScriptedModel:
    """Return a model that calls a tool and then says what it was answered."""

    def play(messages: Sequence[ModelMessage]) -> Reply:
        last = messages[-1]
        return last.content if last.role == "tool" else CallTool(name, args)

    return ScriptedModel(play)


ran: list[object] = []


@tool
async def notes(n: int) -> int:
    ran.append(n)
    return n


@tool
async def returns_much(n: int) -> str:
    return "x" * (50 << 20)


@tool
async def returns_junk(n: int) -> object:
    return object()


@tool
async def raises(n: int) -> None:
    raise LookupError("mine")


@tool
async def exits(n: int) -> None:
    raise SystemExit(3)


@tool
def exits_in_a_thread(n: int) -> None:
    raise SystemExit(3)


ANSWERS: dict[str, tuple[str, dict[str, Any] | str, str]] = {
    "27-an-unknown-tool": ("nobody", {}, "unknown_tool"),
    "28-a-word-for-a-number": ("notes", {"n": "five"}, "invalid_args"),
    "28-no-arguments": ("notes", {}, "invalid_args"),
    "28-a-name-too-many": ("notes", {"n": 5, "m": 6}, "invalid_args"),
    "28-no-json": ("notes", '{"n": 5', "invalid_args"),
    "10-half-a-character": ("notes", r'{"n": "\ud800"}', "invalid_args"),
    "11-no-number": ("notes", '{"n": NaN}', "invalid_args"),
    "11-5000-digits": ("notes", f'{{"n": {"9" * 5_000}}}', "invalid_args"),
    "12-without-end": ("notes", '{"n": ' + "[" * DEEP, "invalid_args"),
    "13-3-MiB": ("notes", f'{{"n": "{"x" * (3 << 20)}"}}', "invalid_args"),
    "14-a-name-twice": ("notes", '{"n": 5, "n": 6}', "invalid_args"),
    "29-50-MB": ("returns_much", {"n": 5}, "result_too_large"),
    "29-no-json": ("returns_junk", {"n": 5}, "not_serializable"),
    "29-raises": ("raises", {"n": 5}, "tool_error"),
    "29-exits": ("exits", {"n": 5}, "tool_crashed"),
    "29-exits-in-a-thread": ("exits_in_a_thread", {"n": 5}, "tool_crashed"),
}
TOOLS = [notes, returns_much, returns_junk, raises, exits, exits_in_a_thread]


@pytest.mark.parametrize(("name", "args", "code"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_model_is_answered_with_what_is_wrong(
    db: Database, name: str, args: dict[str, Any] | str, code: str
) -> None:
    ran.clear()
    agent = create_agent(
        durable_agent(name="a", adapter=calls_once(name, args), tools=TOOLS, stream_url=URL)
    )

    reply = await agent.send("go").reply(timeout_ms=SOON_MS)

    assert code in reply.content
    (call,) = await rows_of(db.session(URL).tool_calls)
    assert (call.status, call.error_code) == ("failed", code)
    assert call.error
    assert ran == []


@pytest.mark.parametrize(
    ("name", "args", "code"),
    [
        answer
        for answer in ANSWERS.values()
        if isinstance(answer[1], dict) and answer[0] != "nobody"
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_executor_leaves_a_failed_row_and_lives(
    db: Database, name: str, args: dict[str, Any], code: str
) -> None:
    ran.clear()
    calls = db.session(URL).tool_calls
    await make_executor(calls).ready()

    await calls.insert({"id": "bad", "generation_id": "g", "name": name, "args": args})
    await calls.insert({"id": "good", "generation_id": "g", "name": "notes", "args": {"n": 1}})

    done = await eventually(calls, lambda rows: all(row.status.is_terminal for row in rows))
    assert [(row.id, row.status, row.error_code) for row in done] == [
        ("bad", "failed", code),
        ("good", "completed", None),
    ]
    assert ran == [1]


def make_executor(calls: Collection[ToolCall], **options: Any) -> Any:
    given: dict[str, Any] = {"tools": TOOLS, **options}
    return create_tool_execution_effect(
        query=lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "pending")),
        placement="here",
        **given,
    )


async def rows_of(collection: Collection[Any]) -> list[Any]:
    await collection.ready()
    return collection.values()


@pytest.mark.parametrize("policy", ["discard", "mark"])
async def test_30_a_tool_that_never_returns_is_stopped_and_what_comes_late_follows_the_policy(
    db: Database, policy: str
) -> None:
    done = threading.Event()

    @tool
    def waits(n: int) -> int:
        done.wait(SOON_MS / 1000)
        return n

    calls = db.session(URL).tool_calls
    effect = make_executor(calls, tools=[waits], timeout_ms=20, late_results=policy)
    await effect.ready()
    await calls.insert({"id": "a", "generation_id": "g", "name": "waits", "args": {"n": 7}})

    (failed,) = await eventually(calls, lambda rows: rows[0].status == "failed")
    done.set()
    assert (failed.error_code, failed.late_result) == ("timeout", None)
    if policy == "mark":
        (failed,) = await eventually(calls, lambda rows: rows[0].late_result is not None)
    await effect.aclose()
    (after,) = await rows_of(calls)
    assert (after.status, after.result) == ("failed", None)
    assert after.late_result == (7 if policy == "mark" else None)


async def test_31_an_end_under_a_claim_that_is_lost_and_one_that_is_written_twice(
    db: Database,
) -> None:
    calls, client = db.session(URL).tool_calls, db.partitions[0].client
    await calls.insert({"id": "a", "generation_id": "g", "name": "t"})
    where = (URL, "tool_calls", "a")
    lost = await client.commit([Claim(*where, "tools", "one", SOON_MS)])
    await client.commit([Release(*where, lost, "orphan")])
    kept = await client.commit([Claim(*where, "tools", "two", SOON_MS)])

    with pytest.raises(FencedError) as caught:
        await client.commit([Delete(*where), Release(*where, lost)], held=Held(*where, lost))

    assert caught.value.code == "stale_claim"
    assert (caught.value.our_epoch, caught.value.current_epoch) == (lost, kept)
    (status,) = await db.status()
    assert status.revision == kept
    for _ in range(2):
        await client.commit([Release(*where, kept)])
    assert await calls.find("a") is not None


async def test_33_a_second_runner_takes_over_and_the_first_is_refused(db: Database) -> None:
    client = db.partitions[0].client
    first = await client.commit([ClaimBuckets("a", 0, BUCKETS)])
    second = await client.commit([ClaimBuckets("a", 0, BUCKETS)])
    row = Insert(URL, "rows", "x", b'{"id":"x"}')

    with pytest.raises(FencedError) as caught:
        await client.commit([row], runner=Runner("a", first))

    assert caught.value.code == "fenced"
    assert (caught.value.our_epoch, caught.value.current_epoch) == (first, second)
    (status,) = await db.status()
    assert status.revision == second
    await client.commit([row], runner=Runner("a", second))


async def test_33_with_two_runners_each_message_gets_one_reply(db: Database) -> None:
    definition = durable_agent(name="a", adapter=ScriptedModel(lambda _: "once"))
    async with connection(db) as other:
        runners = [create_agent(definition, database=each) for each in (db, other)]
        await asyncio.gather(*(each.ready() for each in runners))
        handles = [
            runner.send("go", session=f"aidb://a/{number}")
            for number, runner in enumerate([*runners, *runners])
        ]
        for handle in handles:
            assert (await handle.reply(timeout_ms=SOON_MS)).content == "once"
        for runner in runners:
            await runner.aclose()

    said = await db.query(lambda q: q.from_(m=db.collection("messages", session="aidb://a/*")))
    assert sorted(message["role"] for message in said) == ["assistant"] * 4 + ["user"] * 4


# Chunks that say themselves which they are.


def numbered(chunk: tuple[Any, str], index: int, generation_id: str) -> dict[str, Any]:
    del index, generation_id
    return {"index": chunk[0], "type": "TEXT_MESSAGE_CONTENT", "content": chunk[1]}


GOOD = [(0, "a"), (1, "b")]


@pytest.mark.parametrize(
    ("came", "error", "code"),
    [
        ([*GOOD, (3, "d")], ConflictError, "sequence_gap"),
        ([*GOOD, (1, "other")], ConflictError, "chunk_conflict"),
        ([*GOOD, (-1, "d")], ContractError, "invalid_index"),
        ([*GOOD, (True, "d")], ContractError, "invalid_index"),
        ([*GOOD, ("2", "d")], ContractError, "invalid_index"),
        ([*GOOD, (2, "\ud800")], ContractError, "invalid_unicode"),
    ],
    ids=["34-gap", "34-other-bytes", "34-below-0", "34-boolean", "34-text", "10-half-a-character"],
)
async def test_a_chunk_out_of_turn_ends_the_stream_where_it_is(
    db: Database, came: list[Any], error: type[AidbError], code: str
) -> None:
    chunks = db.session(URL).chunks

    with pytest.raises(error) as caught:
        await stream_to_collection(
            chunks_of(*came), collection=chunks, generation_id="g", transform=numbered
        )

    assert caught.value.code == code
    if isinstance(caught.value, ConflictError) and code == "sequence_gap":
        assert (caught.value.expected, caught.value.got) == (2, 3)
    assert [chunk.content async for chunk in replay(chunks, generation_id="g")] == ["a", "b"]


async def test_34_a_chunk_that_comes_again_changes_nothing(db: Database) -> None:
    chunks = db.session(URL).chunks
    came = [*GOOD, (0, "a"), (2, "c"), (1, "b"), (2, "c"), (3, "d")]

    written = await stream_to_collection(
        chunks_of(*came), collection=chunks, generation_id="g", transform=numbered
    )

    assert written == 4
    told = [(chunk.index, chunk.content) async for chunk in replay(chunks, generation_id="g")]
    assert told == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


async def test_34_a_chunk_that_is_a_row_comes_once(db: Database) -> None:
    rows = db.session(URL).collection("parts", Part)

    def part(text: str, index: int, generation_id: str) -> Part:
        return Part(id=f"{generation_id}:{index % 2}", generation_id="g", index=index, text=text)

    with pytest.raises(KeyExistsError) as caught:
        await stream_to_collection(
            chunks_of("a", "b", "c"), collection=rows, generation_id="g", transform=part
        )

    assert (caught.value.code, caught.value.key) == ("duplicate_key", "g:0")
    assert await rows_of(rows) == []


async def test_35_a_stream_that_raises_keeps_what_came_before_and_is_closed(db: Database) -> None:
    chunks = db.session(URL).chunks

    async def breaks_off() -> AsyncIterator[str]:
        yield "a"
        yield "b"
        raise LookupError("mine")

    with pytest.raises(LookupError):
        await stream_to_collection(
            breaks_off(), collection=chunks, generation_id="g", transform=as_chunk
        )

    # It ends, for the end is stored.
    assert [chunk.content async for chunk in replay(chunks, generation_id="g")] == ["a", "b"]
    with pytest.raises(ConflictError) as caught:
        await stream_to_collection(
            chunks_of("c"), collection=chunks, generation_id="g", transform=as_chunk
        )
    assert caught.value.code == "stream_closed"
