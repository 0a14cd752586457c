"""Tools whose calls are rows: asked for here, run by whoever owns them."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Collection,
    ConfigError,
    Database,
    RequestedCall,
    Tool,
    ToolCall,
    ToolContext,
    ToolError,
    UnavailableError,
    chat,
    connect,
    create_agent,
    create_tool_execution_effect,
    declare_tool,
    durable_agent,
    eq,
    make_async_tool,
    make_durable_tool,
    make_durable_tools,
)
from aidb_ray.effects.effect import Effect
from aidb_ray.effects.waiters import waiters_of
from aidb_ray.models.base import ModelMessage
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.testing import CallTool, Reply, ScriptedModel
from tests.unit.test_effects import ended, until

URL = "aidb://desk/1"
SOON_MS = 20_000


class Search(BaseModel):
    query: str


search = declare_tool(name="search", description="Search.", input_schema=Search)
analyze = declare_tool(name="analyze", description="Analyze.", input_schema=Search)


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def calls(db: Database) -> Collection[ToolCall]:
    return db.session(URL).tool_calls


async def find(query: str) -> dict[str, Any]:
    return {"hits": query.upper()}


def executor(rows: Collection[Any], *tools: Tool, function: Any = find, **options: Any) -> Effect:
    def pending(q: QueryRoot) -> Query[Any]:
        return q.from_(tc=rows).where(lambda tc: eq(tc.status, "pending"))

    return create_tool_execution_effect(
        query=pending,
        tools=tools,
        implementations={tool.name: function for tool in tools},
        placement="here",
        **options,
    )


def say_nothing(row: Any) -> None:
    return None


def context(key: str = "k", **fields: Any) -> ToolContext:
    return ToolContext(idempotency_key=key, generation_id="g", **fields)


async def test_a_call_is_a_row_that_an_executor_ends(calls: Collection[ToolCall]) -> None:
    durable = make_durable_tool(search, calls)
    asked = asyncio.create_task(durable.call({"query": "salt"}, context()))
    async with executor(calls, search):
        result = await asked

    row = await calls.find("k")
    assert result == {"hits": "SALT"}
    assert row is not None
    assert (row.generation_id, row.name, row.args, row.status) == (
        "g",
        "search",
        {"query": "salt"},
        "completed",
    )


async def test_a_call_made_again_finds_its_row(calls: Collection[ToolCall]) -> None:
    runs = 0

    async def count(query: str) -> int:
        nonlocal runs
        runs += 1
        return runs

    durable = make_durable_tool(search, calls)
    async with executor(calls, search, function=count):
        first = await durable.call({"query": "a"}, context())
        again = await durable.call({"query": "a"}, context())

    assert (first, again, runs) == (1, 1, 1)


async def test_wrong_arguments_write_nothing(calls: Collection[ToolCall]) -> None:
    with pytest.raises(ToolError) as raised:
        await make_durable_tool(search, calls).call({"quarry": "a"}, context())

    assert raised.value.code == "invalid_args"
    assert await calls.find("k") is None


async def test_what_an_executor_says_is_what_the_caller_hears(
    calls: Collection[ToolCall],
) -> None:
    async def refuse(query: str) -> None:
        raise ToolError("not today", code="closed")

    async with executor(calls, search, function=refuse):
        with pytest.raises(ToolError, match="not today") as raised:
            await make_durable_tool(search, calls).call({"query": "a"}, context())

    assert raised.value.code == "closed"


async def test_a_call_that_nobody_runs_in_time_is_an_error_and_its_row_failed(
    calls: Collection[ToolCall],
) -> None:
    with pytest.raises(ToolError) as raised:
        await make_durable_tool(search, calls, timeout_ms=20).call({"query": "a"}, context())

    row = await calls.find("k")
    assert row is not None
    assert (raised.value.code, row.status, row.error_code) == ("timeout", "failed", "timeout")


async def test_rows_may_be_of_ones_own_shape(db: Database) -> None:
    class Job(BaseModel):
        id: str
        name: str
        args: Any
        status: str
        run: str
        answer: Any = None

    jobs = db.session(URL).collection("jobs", Job)

    def make(call: RequestedCall, generation_id: str) -> Job:
        return Job(
            id=f"job-{call.id}", name=call.name, args=call.args, status="pending", run=generation_id
        )

    def get_result(job: Job) -> Any:
        if job.answer == "NO":
            raise ValueError("It said no.")
        return job.answer

    def end(job: Job, result: Any) -> None:
        jobs.update(job.id, {"status": "over", "answer": result["hits"]})

    [durable, _] = make_durable_tools(
        [search, analyze],
        jobs,
        transform=make,
        is_complete=lambda job: job.status == "over",
        get_result=get_result,
    )
    async with executor(jobs, search, on_executing=say_nothing, on_complete=end):
        assert await durable.call({"query": "yes"}, context("1")) == "YES"
        with pytest.raises(ToolError, match="It said no"):
            await durable.call({"query": "no"}, context("2"))

    job = await jobs.find("job-1")
    assert job is not None
    assert job.run == "g"


async def test_a_chat_uses_them_like_other_tools(calls: Collection[ToolCall]) -> None:
    def play(messages: Any) -> Reply:
        if messages[-1].role == "tool":
            return f"Found {messages[-1].content}"
        return [CallTool("search", {"query": "a"}), CallTool("analyze", {"query": "b"})]

    tools = make_durable_tools([search, analyze], calls)
    async with executor(calls, search), executor(calls, analyze):
        text = await chat(
            adapter=ScriptedModel(play),
            messages=[ModelMessage("user", "go")],
            tools=tools,
            stream=False,
        )

    assert text == 'Found {"hits":"B"}'


async def test_a_call_of_no_session_has_no_place_in_a_pattern(db: Database) -> None:
    anywhere = db.collection("tool_calls", ToolCall, session="aidb://desk/*")
    durable = make_durable_tool(search, anywhere)

    with pytest.raises(ToolError) as raised:
        await durable.call({"query": "a"}, context())
    assert raised.value.code == "no_session"

    session = db.session(URL)
    async with executor(anywhere, search):
        await durable.call({"query": "a"}, context(session=session))
    assert await session.tool_calls.find("k") is not None


async def test_a_durable_tool_says_the_same_to_a_model_and_pickles() -> None:
    async with connect("local", durability="memory") as db:
        durable = make_durable_tool(search, db.session(URL).tool_calls)

        assert durable.fingerprint() == search.fingerprint()
        with pytest.raises(ConfigError, match="sent to another"):
            pickle.dumps(durable)


async def test_an_executor_needs_a_real_implementation(calls: Collection[ToolCall]) -> None:
    durable = make_durable_tool(search, calls)
    with pytest.raises(ConfigError) as raised:
        create_tool_execution_effect(query=lambda q: q.from_(tc=calls), tools=[durable])
    assert raised.value.code == "missing_implementation"


async def test_rows_that_do_not_fit_need_a_transform(db: Database) -> None:
    class Other(BaseModel):
        id: str

    others = db.session(URL).collection("others", Other)
    with pytest.raises(ConfigError, match="generation_id, name, args, status") as raised:
        make_durable_tool(search, others)
    assert raised.value.code == "contract"


@pytest.mark.parametrize("timeout_ms", [0, -1])
async def test_a_timeout_is_positive(calls: Collection[ToolCall], timeout_ms: int) -> None:
    with pytest.raises(ConfigError) as raised:
        make_durable_tool(search, calls, timeout_ms=timeout_ms)
    assert raised.value.code == "invalid_bound"


# Jobs.


async def test_an_async_tool_answers_with_a_handle(calls: Collection[ToolCall]) -> None:
    job = make_async_tool(search, calls)

    handle = await job.call({"query": "a"}, context())
    again = await job.call({"query": "a"}, context())

    row = await calls.find(handle["job_id"])
    assert row is not None
    assert handle == again == {"job_id": row.id, "status": "queued"}
    assert row.status == "pending"
    async with executor(calls, search):
        row = await ended(calls, row.id)
    assert row.result == {"hits": "A"}


async def test_the_handle_may_be_of_ones_own_making(calls: Collection[ToolCall]) -> None:
    job = make_async_tool(search, calls, get_immediate_result=lambda row: f"see {row.id}")

    assert await job.call({"query": "a"}, context()) == "see k:job"


async def test_the_end_of_a_job_wakes_the_agent_that_asked_for_it(db: Database) -> None:
    def play(messages: Any) -> Reply:
        last = messages[-1].content
        if messages[-1].role == "tool":
            return f"Queued {last}"
        return f"I hear {last}" if "job_id" in last else CallTool("search", {"query": "a"})

    session = db.session(URL)
    job = make_async_tool(search, session.tool_calls, wake_agent=True)
    agent = create_agent(
        durable_agent(name="clerk", adapter=ScriptedModel(play), tools=[job], stream_url=URL)
    )
    first = await agent.send("go", message_id="m").reply(timeout_ms=SOON_MS)
    [row] = [row for row in await rows(db, session.tool_calls) if row.id.endswith(":job")]
    async with executor(session.tool_calls, search):
        await until(session.messages, f"{row.id}:end", lambda message: message is not None)
        second = await agent.reply_to(f"{row.id}:end").reply(timeout_ms=SOON_MS)

    assert first.content.startswith("Queued")
    assert second.content == (
        f'I hear {{"job_id":"{row.id}","tool":"search","status":"completed",'
        f'"result":{{"hits":"A"}}}}'
    )


async def test_a_job_is_no_call_of_the_conversation(db: Database) -> None:
    heard: list[int] = []

    def play(messages: Any) -> Reply:
        heard.append(sum(message.role == "tool" for message in messages))
        return "So it is." if messages[-1].role == "tool" else CallTool("search", {"query": "a"})

    calls = db.session(URL).tool_calls
    definition = durable_agent(
        name="clerk",
        adapter=ScriptedModel(play),
        tools=[make_async_tool(search, calls)],
        stream_url=URL,
    )
    agent = create_agent(definition)
    await agent.send("go").reply(timeout_ms=SOON_MS)
    await agent.aclose()
    # The next process reads the session's rows, that of the job among them, which still waits.
    await create_agent(definition).send("again").reply(timeout_ms=SOON_MS)

    assert heard == [0, 1, 1, 2]


async def test_an_agent_waits_for_calls_that_others_run_and_each_is_one_row(db: Database) -> None:
    def play(messages: Any) -> Reply:
        heard = [message.content for message in messages if message.role == "tool"]
        ask = [CallTool("search", {"query": "a"}), CallTool("analyze", {"query": "b"})]
        return f"Heard {' and '.join(heard)}." if heard else ask

    calls = db.session(URL).tool_calls
    tools = make_durable_tools([search, analyze], calls)
    agent = create_agent(
        durable_agent(name="clerk", adapter=ScriptedModel(play), tools=tools, stream_url=URL)
    )
    asked = agent.send("go")
    async with executor(calls, search), executor(calls, analyze):
        reply = await asked.reply(timeout_ms=SOON_MS)

    assert reply.content == 'Heard {"hits":"A"} and {"hits":"B"}.'
    assert [row.status for row in await rows(db, calls)] == ["completed", "completed"]


async def test_only_an_agent_can_be_woken(calls: Collection[ToolCall]) -> None:
    job = make_async_tool(search, calls, wake_agent=True)
    with pytest.raises(ToolError) as raised:
        await job.call({"query": "a"}, context())
    assert raised.value.code == "no_agent"


async def rows(db: Database, collection: Collection[Any]) -> list[Any]:
    return await db.query(lambda q: q.from_(r=collection))


# Waiting.


async def test_a_call_whose_row_is_deleted_is_an_error_for_the_model(
    calls: Collection[ToolCall],
) -> None:
    asked = asyncio.create_task(make_durable_tool(search, calls).call({"query": "a"}, context()))
    await until(calls, "k", lambda row: row is not None)
    await calls.delete("k")

    with pytest.raises(ToolError) as raised:
        await asked
    assert raised.value.code == "gone"


async def test_a_test_that_raises_fails_only_who_waits_with_it(
    db: Database, calls: Collection[ToolCall]
) -> None:
    waiters = waiters_of(db.site_of(URL).client, URL, "tool_calls")

    async def insert() -> None:
        if await calls.find("k") is None:
            await calls.insert({"id": "k", "generation_id": "g", "name": "search", "args": {}})

    def wrong(value: bytes) -> bool:
        raise ZeroDivisionError

    one = asyncio.create_task(waiters.until("k", wrong, calls.ready))
    two = asyncio.create_task(waiters.until("k", lambda value: True, insert))

    assert await two
    with pytest.raises(ZeroDivisionError):
        await one


async def test_waiting_works_again_after_it_was_refused(
    db: Database, calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = db.site_of(URL).client
    waiters = waiters_of(client, URL, "tool_calls")
    subscribe = client.feed.subscribe

    def refuse(*args: Any, **options: Any) -> Any:
        subscription = subscribe(*args, **options)
        subscription.end(UnavailableError("not now", outcome="not_applied"))
        return subscription

    async def insert() -> None:
        await calls.insert({"id": "k", "generation_id": "g", "name": "search", "args": {}})

    with monkeypatch.context() as patched:
        patched.setattr(client.feed, "subscribe", refuse)
        with pytest.raises(UnavailableError):
            await waiters.until("k", lambda value: True, insert)
    assert await calls.find("k") is None
    assert await waiters.until("k", lambda value: True, insert)


async def test_nothing_is_kept_of_a_connection_that_was_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def use() -> weakref.ref[Any]:
        async with connect("local", durability="memory") as db:
            calls = db.session(URL).tool_calls
            async with executor(calls, search, database=db):
                await make_durable_tool(search, calls).call({"query": "a"}, context())
            return weakref.ref(db.site_of(URL).client)

    monkeypatch.setattr("aidb_ray.effects.waiters.LINGER_S", 0)
    gone = await use()
    await asyncio.sleep(0.01)  # Timers and callbacks of this moment hold it still.
    gc.collect()
    assert gone() is None
