"""Worker agents in one process."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    ConfigError,
    ContractError,
    Database,
    Generation,
    ModelError,
    RunCancelledError,
    WorkerAgent,
    chat,
    connect,
    create_agent,
    create_worker_agent,
    durable_agent,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.testing import CallTool, Reply, ScriptedModel

SOON_MS = 20_000
URL = "aidb://boss/1"


class Long(BaseModel):
    text: str


class Short(BaseModel):
    bullets: list[str]


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


class Model:
    """A model that shortens, and what it was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.was_asked = asyncio.Event()
        self.door = asyncio.Event()
        self.door.set()
        self._replies = list(replies)
        self.adapter = ScriptedModel(self._play)

    async def _play(self, messages: Sequence[ModelMessage]) -> Reply:
        self.asked.append([(message.role, message.content) for message in messages])
        self.was_asked.set()
        await self.door.wait()
        if self._replies:
            return self._replies.pop(0)
        return Short(bullets=messages[-1].content.split()).model_dump_json()


def _read(long: Long) -> list[dict[str, str]]:
    return [{"role": "user", "content": long.text}]


def summarizer(model: Model, **options: Any) -> WorkerAgent[Long, Short]:
    given: dict[str, Any] = {
        "name": "summarizer",
        "description": "Summarize long text.",
        "adapter": model.adapter,
        "input_schema": Long,
        "output_schema": Short,
        "build_messages": _read,
        **options,
    }
    return cast("WorkerAgent[Long, Short]", create_worker_agent(**given))


async def generations_of(db: Database, url: str) -> list[Generation]:
    rows = db.session(url).generations
    return await db.query(lambda q: q.from_(g=rows))


async def start_boss(*tools: Any) -> Agent:
    def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].role == "tool":
            return messages[-1].content
        return CallTool("summarizer", {"text": messages[-1].content})

    agent = create_agent(durable_agent(name="boss", adapter=ScriptedModel(play), tools=tools))
    await agent.ready()
    return agent


# As a function.


async def test_a_run_takes_and_gives_what_its_schemas_say(db: Database) -> None:
    worker = summarizer(Model())

    assert await worker.run(Long(text="a b")) == Short(bullets=["a", "b"])
    assert await worker.run({"text": "c"}) == Short(bullets=["c"])
    assert not await db.agent("summarizer").has_pending_work()


async def test_without_a_schema_it_returns_text_and_reads_its_input(db: Database) -> None:
    model = Model("Short.")
    worker = summarizer(model, output_schema=None, build_messages=None)

    assert await worker.run(Long(text="a b")) == "Short."
    assert model.asked == [[("user", '{"text":"a b"}')]]


async def test_each_run_has_a_fresh_context(db: Database) -> None:
    model = Model()
    worker = summarizer(model, instructions="Be brief.")
    for text in ("one", "two"):
        await worker.run(Long(text=text))

    assert model.asked == [[("user", "one")], [("user", "two")]]


async def test_many_run_at_once(db: Database) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model, pool_size=2)
    runs = [asyncio.create_task(worker.run(Long(text=f"t{n}"))) for n in range(20)]
    async with asyncio.timeout(SOON_MS / 1000):
        while len(model.asked) < 20:
            model.was_asked.clear()
            await model.was_asked.wait()
    model.door.set()

    assert [(await run).bullets for run in runs] == [[f"t{n}"] for n in range(20)]


async def test_an_input_that_does_not_fit_starts_nothing(db: Database) -> None:
    worker = summarizer(Model())
    with pytest.raises(ContractError) as raised:
        await worker.run({"texts": "a"})
    assert (raised.value.code, raised.value.loc) == ("invalid_input", ("text",))
    with pytest.raises(ContractError) as raised:
        await worker.run(Long(text="a"), run_id="no such * id")
    assert raised.value.code == "invalid_id"
    assert await db.sessions("aidb://summarizer/") == []


async def test_a_wrong_output_is_asked_for_again_with_what_is_wrong(db: Database) -> None:
    model = Model("no JSON", '{"bullets": 3}', '{"bullets": ["a"]}')
    worker = summarizer(model)

    assert await worker.run(Long(text="a b"), run_id="r") == Short(bullets=["a"])
    assert [len(messages) for messages in model.asked] == [1, 3, 5]
    role, why = model.asked[2][-1]
    assert role == "user"
    assert "bullets: Input should be a valid array" in why
    [generation] = await generations_of(db, "aidb://summarizer/r")
    assert (generation.status, generation.attempt) == ("completed", 3)


async def test_an_output_that_stays_wrong_fails_the_run(db: Database) -> None:
    model = Model(*["no JSON"] * 5)
    with pytest.raises(ModelError) as raised:
        await summarizer(model).run(Long(text="a b"))

    assert raised.value.code == "invalid_output"
    assert len(model.asked) == 3


async def test_a_run_of_the_same_id_is_done_once(db: Database) -> None:
    model = Model()
    first = await summarizer(model).run(Long(text="a b"), run_id="r")
    again = await asyncio.gather(
        *(summarizer(model).run(Long(text="a b"), run_id="r") for _ in range(3))
    )

    assert again == [first] * 3
    assert len(model.asked) == 1


async def test_cancelling_whoever_waits_cancels_the_run(db: Database) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model)
    run = asyncio.create_task(worker.run(Long(text="a"), run_id="r"))
    await model.was_asked.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    [generation] = await generations_of(db, "aidb://summarizer/r")
    assert generation.status == "cancelled"
    with pytest.raises(RunCancelledError):
        await worker.run(Long(text="a"), run_id="r")


async def test_a_run_goes_on_after_its_pool_has_ended(db: Database) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model)
    await worker.ready()
    text = Long(text="a").model_dump_json()
    db.agent("summarizer").send(text, session="aidb://summarizer/r", message_id="r")
    await model.was_asked.wait()
    await worker.aclose()
    model.door.set()

    assert await worker.run(Long(text="a"), run_id="r") == Short(bullets=["a"])
    [generation] = await generations_of(db, "aidb://summarizer/r")
    assert generation.attempt == 2


async def test_isolated_runs_have_an_agent_each_and_no_more_at_once_than_allowed(
    db: Database,
) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model, isolated=True, pool_size=2)
    runs = [asyncio.create_task(worker.run(Long(text=f"t{n}"), run_id=str(n))) for n in range(5)]
    async with asyncio.timeout(SOON_MS / 1000):
        while len(model.asked) < 2:
            model.was_asked.clear()
            await model.was_asked.wait()
    names = sorted(db.local_shards)
    model.door.set()

    assert [(await run).bullets for run in runs] == [[f"t{n}"] for n in range(5)]
    assert names == ["summarizer.0", "summarizer.1"]
    assert db.local_shards == {}


async def test_an_isolated_run_that_is_cancelled_has_ended(db: Database) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model, isolated=True)
    run = asyncio.create_task(worker.run(Long(text="a"), run_id="r"))
    await model.was_asked.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run

    [generation] = await generations_of(db, "aidb://summarizer/r")
    assert generation.status == "cancelled"
    assert db.local_shards == {}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": "no.tool"}, "invalid_name"),
        ({"pool_size": 0}, "invalid_shards"),
        ({"max_iterations": 0}, "invalid_bound"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as raised:
        summarizer(Model(), **options)
    assert raised.value.code == code


# As a tool.


async def test_another_agent_may_call_it(db: Database) -> None:
    model = Model()
    worker = summarizer(model)
    boss = await start_boss(worker)

    reply = await boss.send("a b", session=URL).reply(timeout_ms=SOON_MS)

    assert reply.content == '{"bullets":["a","b"]}'
    assert worker.parameters["properties"]["text"]["type"] == "string"
    assert worker.description == "Summarize long text."
    calls = db.session(URL).tool_calls
    [call] = await db.query(lambda q: q.from_(c=calls))
    [generation] = await generations_of(db, f"aidb://summarizer/{call.id}")
    assert generation.status == "completed"


async def test_chat_may_call_it(db: Database) -> None:
    def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].role == "tool":
            return messages[-1].content
        return CallTool("summarizer", {"text": "a b"})

    messages = [{"role": "user", "content": "go"}]
    worker = summarizer(Model())
    said = await chat(adapter=ScriptedModel(play), messages=messages, tools=[worker], stream=False)
    assert said == '{"bullets":["a","b"]}'


async def test_what_fails_is_an_answer_for_the_model(db: Database) -> None:
    boss = await start_boss(summarizer(Model(*["no JSON"] * 3)))

    reply = await boss.send("a b", session=URL).reply(timeout_ms=SOON_MS)

    assert '"invalid_output"' in reply.content


async def test_after_a_crash_of_the_caller_its_run_is_found(db: Database) -> None:
    model = Model()
    model.door.clear()
    boss = await start_boss(summarizer(model))
    boss.send("a b", session=URL, message_id="m")
    await model.was_asked.wait()
    await boss.aclose()
    model.door.set()

    boss = await start_boss(summarizer(model))
    reply = await boss.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == '{"bullets":["a","b"]}'
    assert len(model.asked) == 1
    calls = db.session(URL).tool_calls
    [call] = await db.query(lambda q: q.from_(c=calls))
    assert (call.status, call.attempt) == ("completed", 2)


async def test_a_call_is_not_failed_because_the_pool_ends_before_its_caller(
    tmp_path: Path,
) -> None:
    """A connection that closes ends the pool first; the call goes on with the next connection."""
    model = Model()
    model.door.clear()
    async with connect("local", data_dir=tmp_path):
        boss = await start_boss(summarizer(model))
        boss.send("a b", session=URL, message_id="m")
        await model.was_asked.wait()
    model.door.set()

    async with connect("local", data_dir=tmp_path) as db:
        boss = await start_boss(summarizer(model))
        reply = await boss.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
        assert reply.content == '{"bullets":["a","b"]}'
        calls = db.session(URL).tool_calls
        [call] = await db.query(lambda q: q.from_(c=calls))
        assert (call.status, call.attempt) == ("completed", 2)


@pytest.mark.parametrize("by_time", [False, True])
async def test_cancelling_the_call_cancels_the_run(db: Database, *, by_time: bool) -> None:
    model = Model()
    model.door.clear()
    worker = summarizer(model)
    play = ScriptedModel([CallTool("summarizer", {"text": "a b"})])
    limit = 200 if by_time else None
    boss = create_agent(
        durable_agent(name="boss", adapter=play, tools=[worker], run_timeout_ms=limit)
    )
    handle = boss.send("a b", session=URL)
    await model.was_asked.wait()
    if not by_time:
        await boss.cancel(session=URL)

    with pytest.raises(ModelError if by_time else RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    [url] = [session.url for session in await db.sessions("aidb://summarizer/")]
    [generation] = await generations_of(db, url)
    assert generation.status == "cancelled"


async def test_its_name_must_not_be_that_of_another_tool(db: Database) -> None:
    @tool(name="summarizer")
    def other() -> str:
        """Be another one."""
        return ""

    with pytest.raises(ConfigError) as raised:
        await start_boss(summarizer(Model()), other)
    assert raised.value.code == "duplicate_tool"


def _speak(_: Sequence[ModelMessage]) -> Reply:
    return '{"bullets": []}'


def test_a_handle_pickles() -> None:
    worker = create_worker_agent(
        name="summarizer", adapter=ScriptedModel(_speak), input_schema=Long, output_schema=Short
    )
    found = pickle.loads(pickle.dumps(worker))

    assert found.fingerprint() == worker.fingerprint()
    assert found._definition.fingerprint() == worker._definition.fingerprint()
