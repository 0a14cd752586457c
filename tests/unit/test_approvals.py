"""Calls that others decide about or answer: approvals, questions, tools that run elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    Database,
    Generation,
    ModelError,
    Question,
    Retry,
    RunCancelledError,
    Tool,
    ToolCall,
    ToolContext,
    answer,
    approve,
    connect,
    create_agent,
    durable_agent,
    eq,
    reject,
    replay,
    tool,
)
from aidb_ray.agents.run import GenerateContext
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import declare_tool
from aidb_ray.store.collection import Collection
from aidb_ray.testing import CallTool, Reply, Say, ScriptedModel
from tests.stores import until

URL = "aidb://echo/1"
SOON_MS = 20_000


class To(BaseModel):
    to: str


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
async def elsewhere(db: Database) -> AsyncIterator[Database]:
    """A second connection to the same store, as another process has."""
    other = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield other
    for partition in other.partitions:
        await partition.aclose()


def plays(*requests: CallTool) -> Callable[[Sequence[ModelMessage]], Reply]:
    """Return a model that asks for these calls, then says what it was told."""

    def play(messages: Sequence[ModelMessage]) -> Reply:
        told = [message.content for message in messages if message.role == "tool"]
        return " ".join(told) if told else list(requests)

    return play


def send_to(*names: str) -> Callable[[Sequence[ModelMessage]], Reply]:
    return plays(*(CallTool("send", {"to": name}) for name in names))


class Sender:
    """A tool that needs an approval, and whom it sent to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

        @tool(needs_approval=True)
        async def send(to: str, ctx: ToolContext) -> str:
            """Send."""
            self.sent.append((to, ctx.attempt))
            return f"sent to {to}"

        self.tool = send


def remote(timeout_ms: int | None = None, *, needs_approval: bool = False) -> Tool:
    return declare_tool(
        name="send",
        description="Send, elsewhere.",
        input_schema=To,
        timeout_ms=timeout_ms,
        needs_approval=needs_approval,
    )


async def start(
    play: Callable[[Sequence[ModelMessage]], Reply | Awaitable[Reply]],
    *tools: Tool,
    **options: Any,
) -> Agent:
    agent = create_agent(
        durable_agent(name="echo", adapter=ScriptedModel(play), tools=tools, **options)
    )
    await agent.ready()
    return agent


async def rows(db: Database, name: str) -> list[Any]:
    source: Collection[Any] = getattr(db.session(URL), name)
    return await db.query(lambda q: q.from_(r=source).order_by(lambda r: r.id))


async def calls_that_wait(db: Database, count: int = 1) -> list[ToolCall]:
    """Return the open calls once there are so many and the agent has left them alone."""
    calls = db.session(URL).tool_calls
    async with db.live_query(
        lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "pending")).order_by(lambda c: c.id)
    ) as live:
        await until(lambda: live.is_ready and len(live.rows) == count)
        return list(live.rows)


# Approval.


async def test_a_call_waits_until_it_is_approved_and_then_runs_once(db: Database) -> None:
    sender = Sender()
    agent = await start(send_to("ann"), sender.tool)
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    assert (waits.approval, waits.attempt) == ("needed", 0)
    assert (await agent.drain_until_idle()).completed, "a person is no work"
    assert await agent.has_pending_work()
    assert (await agent.status())[0].running == 0

    await approve(db.session(URL).tool_calls, waits.id)

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "sent to ann"
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.attempt, call.approval) == ("completed", 1, "approved")
    assert sender.sent == [("ann", 1)]
    [generation] = await rows(db, "generations")
    assert (generation.attempt, generation.interruptions) == (1, 0)


@pytest.mark.parametrize(("reason", "told"), [("Ann left.", "Ann left."), ("", "does not run")])
async def test_a_rejected_call_is_an_answer_for_the_model(
    db: Database, reason: str, told: str
) -> None:
    sender = Sender()
    agent = await start(send_to("ann"), sender.tool)
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)

    await reject(db.session(URL).tool_calls, waits.id, reason=reason)

    content = (await handle.reply(timeout_ms=SOON_MS)).content
    assert '"rejected"' in content
    assert told in content
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.error_code, call.attempt) == ("failed", "rejected", 0)
    assert sender.sent == []


async def test_many_are_decided_in_any_order_by_any_process_across_restarts(
    db: Database, elsewhere: Database
) -> None:
    sender = Sender()
    names = ["ann", "bob", "cem", "dan", "eve"]
    agent = await start(send_to(*names), sender.tool)
    agent.send("go", session=URL, message_id="m")
    keys = [call.id for call in await calls_that_wait(db, 5)]
    here, there = db.session(URL).tool_calls, elsewhere.session(URL).tool_calls

    await approve(there, keys[3])
    await calls_that_wait(db, 4)
    await agent.aclose()
    await reject(here, keys[1], reason="No.")
    await approve(there, keys[4])
    agent = await start(send_to(*names), sender.tool)
    await calls_that_wait(db, 2)
    await agent.aclose()
    agent = await start(send_to(*names), sender.tool)
    await asyncio.gather(approve(here, keys[0]), approve(there, keys[2]))

    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert sorted(sender.sent) == [("ann", 1), ("cem", 1), ("dan", 1), ("eve", 1)]
    told = ["sent to ann", '{"error":"rejected","message":"No."}', "sent to cem"]
    assert reply.content == " ".join([*told, "sent to dan", "sent to eve"])
    [generation] = await rows(db, "generations")
    assert (generation.attempt, generation.interruptions) == (1, 0)


async def test_nobody_is_asked_about_arguments_that_do_not_fit(db: Database) -> None:
    sender = Sender()
    agent = await start(plays(CallTool("send", {"too": "ann"})), sender.tool)

    reply = await agent.send("go", session=URL).reply(timeout_ms=SOON_MS)

    assert "invalid_args" in reply.content
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.error_code, call.approval) == ("failed", "invalid_args", None)


async def test_other_calls_of_the_round_run_meanwhile(db: Database) -> None:
    sender = Sender()

    @tool
    def look() -> str:
        """Look."""
        return "seen"

    play = plays(CallTool("send", {"to": "ann"}), CallTool("look"))
    agent = await start(play, sender.tool, look)
    handle = agent.send("go", session=URL)
    calls = db.session(URL).tool_calls
    async with db.live_query(
        lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "completed"))
    ) as live:
        await until(lambda: live.is_ready and [c.name for c in live.rows] == ["look"])
    [waits] = await calls_that_wait(db)
    await approve(calls, waits.id)

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "sent to ann seen"


async def test_a_call_that_is_approved_waits_for_no_other_of_its_round(db: Database) -> None:
    sender, door = Sender(), asyncio.Event()

    @tool
    async def look() -> str:
        """Look, for long."""
        await door.wait()
        return "seen"

    @tool(needs_approval=True)
    async def wait() -> str:
        """Wait, for long."""
        await door.wait()
        return "waited"

    play = plays(
        CallTool("send", {"to": "ann"}),
        CallTool("look"),
        CallTool("wait"),
        CallTool("send", {"to": "bob"}),
    )
    agent = await start(play, sender.tool, look, wait)
    handle = agent.send("go", session=URL)
    calls = db.session(URL).tool_calls
    ann, waits, bob = await calls_that_wait(db, 3)
    for call, sent in ((ann, 1), (waits, 1), (bob, 2)):
        await approve(calls, call.id)
        await until(lambda sent=sent: len(sender.sent) == sent)
    door.set()

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "sent to ann seen waited sent to bob"
    assert sender.sent == [("ann", 1), ("bob", 1)]
    assert [call.attempt for call in await rows(db, "tool_calls")] == [1, 1, 1, 1]


async def test_a_decision_is_seen_while_calls_of_an_earlier_decision_run(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    sender, door = Sender(), asyncio.Event()

    @tool(needs_approval=True)
    async def wait() -> str:
        """Wait, for long."""
        await door.wait()
        return "waited"

    play = plays(CallTool("wait"), CallTool("send", {"to": "ann"}), CallTool("send", {"to": "bob"}))
    agent = await start(play, sender.tool, wait)
    handle = agent.send("go", session=URL)
    calls = db.session(URL).tool_calls
    waits, ann, bob = await calls_that_wait(db, 3)
    await approve(calls, waits.id)
    await calls_that_wait(db, 2)
    await approve(calls, ann.id)
    await until(lambda: len(sender.sent) == 1)
    await reject(calls, bob.id, reason="No.")
    door.set()

    assert "No." in (await handle.reply(timeout_ms=SOON_MS)).content
    assert sender.sent == [("ann", 1)]
    assert [record.message for record in caplog.records if record.exc_info] == []


async def test_a_call_that_was_approved_and_died_is_in_doubt(db: Database) -> None:
    began = asyncio.Event()
    attempts: list[int] = []

    @tool(needs_approval=True)
    async def send(to: str, ctx: ToolContext) -> str:
        """Send, the second time."""
        attempts.append(ctx.attempt)
        began.set()
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return f"sent to {to}"

    agent = await start(send_to("ann"), send)
    agent.send("go", session=URL, message_id="m")
    [waits] = await calls_that_wait(db)
    await approve(db.session(URL).tool_calls, waits.id)
    await began.wait()
    await agent.aclose()

    agent = await start(send_to("ann"), send)
    await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    [call] = await rows(db, "tool_calls")
    assert (attempts, call.in_doubt, call.approval) == ([1, 2], True, "approved")


# Tools that run elsewhere.


async def test_a_call_that_runs_elsewhere_waits_for_its_end(
    db: Database, elsewhere: Database
) -> None:
    agent = await start(send_to("ann"), remote())
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    assert (waits.approval, waits.attempt, waits.args) == (None, 0, {"to": "ann"})
    drained = await agent.drain_until_idle(max_duration_ms=50, headroom_ms=0)
    assert not drained.completed, "an executor is at work"

    calls = elsewhere.session(URL).tool_calls
    await calls.update(waits.id, {"status": "executing"})
    await calls.update(waits.id, {"status": "completed", "result": "sent"})

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "sent"
    assert (await agent.drain_until_idle()).completed
    [generation] = await rows(db, "generations")
    assert (generation.attempt, generation.interruptions) == (1, 0)


@pytest.mark.parametrize("ends_meanwhile", [True, False])
async def test_what_runs_elsewhere_is_not_in_doubt_when_the_agent_dies(
    db: Database, *, ends_meanwhile: bool
) -> None:
    agent = await start(send_to("ann"), remote(), on_in_doubt="fail")
    agent.send("go", session=URL, message_id="m")
    [waits] = await calls_that_wait(db)
    calls = db.session(URL).tool_calls
    await calls.update(waits.id, {"status": "executing"})
    await agent.aclose()
    end = {"status": "failed", "error": "No stamp.", "error_code": "no_stamp"}
    if ends_meanwhile:
        await calls.update(waits.id, end)

    agent = await start(send_to("ann"), remote(), on_in_doubt="fail")
    if not ends_meanwhile:
        await calls.update(waits.id, end)

    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == '{"error":"no_stamp","message":"No stamp."}'
    [generation] = await rows(db, "generations")
    assert (generation.attempt, generation.interruptions) == (1, 0)


async def test_a_call_that_nobody_runs_in_time_fails_as_an_answer(db: Database) -> None:
    agent = await start(send_to("ann"), remote(timeout_ms=30))

    reply = await agent.send("go", session=URL).reply(timeout_ms=SOON_MS)

    assert '"timeout"' in reply.content
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.error_code) == ("failed", "timeout")


def complete_after_the_next_read(
    db: Database, elsewhere: Database, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Have an executor end a call right after the agent has read its rows."""
    client = db.partitions[0].client
    read_session = client.read_session

    async def read_too_early(*args: Any) -> Any:
        found = await read_session(*args)
        monkeypatch.setattr(client, "read_session", read_session)
        end = {"status": "completed", "result": "sent"}
        await elsewhere.session(URL).tool_calls.update(key, end)
        return found

    monkeypatch.setattr(client, "read_session", read_too_early)


async def test_an_end_that_comes_with_the_timeout_counts(
    db: Database, elsewhere: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await start(send_to("ann"), remote(timeout_ms=300))
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    complete_after_the_next_read(db, elsewhere, monkeypatch, waits.id)

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "sent"
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.error) == ("completed", None)


async def test_a_rejected_call_ends_also_if_it_would_run_elsewhere(db: Database) -> None:
    agent = await start(send_to("ann"), remote(needs_approval=True))
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    assert (await agent.drain_until_idle()).completed, "only a person is waited for"

    await reject(db.session(URL).tool_calls, waits.id, reason="No.")

    assert '"rejected"' in (await handle.reply(timeout_ms=SOON_MS)).content


async def test_what_waits_can_be_cancelled(db: Database) -> None:
    agent = await start(send_to("ann"), remote())
    handle = agent.send("go", session=URL)
    await calls_that_wait(db)

    await agent.cancel(session=URL, reason="never mind")

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert [call.status for call in await rows(db, "tool_calls")] == ["cancelled"]
    assert not await agent.has_pending_work()


async def test_a_cancel_that_comes_with_an_end_takes_no_result_back(
    db: Database, elsewhere: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await start(send_to("ann"), remote())
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    assert not (await agent.drain_until_idle(max_duration_ms=20, headroom_ms=0)).completed
    complete_after_the_next_read(db, elsewhere, monkeypatch, waits.id)

    await agent.cancel(session=URL)

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert [call.status for call in await rows(db, "tool_calls")] == ["completed"]


async def test_waiting_has_a_bound_too(db: Database) -> None:
    agent = await start(send_to("ann"), Sender().tool, run_timeout_ms=50)

    with pytest.raises(ModelError) as raised:
        await agent.send("go", session=URL).reply(timeout_ms=SOON_MS)

    assert raised.value.code == "run_timeout"
    assert [call.status for call in await rows(db, "tool_calls")] == ["cancelled"]


@pytest.mark.parametrize("waits", [False, True])
async def test_calls_are_followed_only_where_someone_else_may_write_them(
    db: Database, *, waits: bool
) -> None:
    @tool
    def look() -> str:
        """Look."""
        return "seen"

    await start(send_to("ann"), remote() if waits else look)

    followed = [each.filter.collection for each in db.partitions[0].client.feed._subscriptions]
    assert ("tool_calls" in followed) == waits


async def attempts_of(db: Database) -> list[int]:
    """Return the attempts that chunks were written in, and in the end the row's own."""
    [generation] = await rows(db, "generations")
    chunks = [c async for c in replay(db.session(URL).chunks, generation_id=generation.id)]
    return [*dict.fromkeys(chunk.attempt for chunk in chunks), generation.attempt]


async def test_a_wait_takes_no_attempt_back(db: Database) -> None:
    failures = [ModelError("busy", retryable=True, retry_after_ms=1)]

    def play(messages: Sequence[ModelMessage]) -> Reply:
        return failures.pop() if failures else send_to("ann")(messages)

    agent = await start(play, remote(), retry=Retry(first_pause_ms=1))
    handle = agent.send("go", session=URL)
    [waits] = await calls_that_wait(db)
    await db.session(URL).tool_calls.update(waits.id, {"status": "completed", "result": "sent"})
    await handle.reply(timeout_ms=SOON_MS)

    assert await attempts_of(db) == [2, 2]


async def test_an_attempt_after_a_crash_is_a_new_one(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.agents.recorder.FLUSH_CHUNKS", 1)
    hangs = asyncio.Event()
    failures = 0

    async def play(_: Sequence[ModelMessage]) -> Reply:
        nonlocal failures
        failures += 1
        if failures < 3:
            return [Say("Let me"), ModelError("busy", retryable=True, retry_after_ms=1)]
        if failures == 3:
            hangs.set()
            await asyncio.Event().wait()
        return "Here."

    agent = await start(play, retry=Retry(first_pause_ms=1))
    agent.send("go", session=URL, message_id="m")
    await hangs.wait()
    await agent.aclose()
    agent = await start(play)
    await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)

    assert await attempts_of(db) == [1, 2, 3, 3]


# Questions and steps.


async def question_of(db: Database) -> Question:
    questions = db.session(URL).questions
    async with db.live_query(lambda q: q.from_(r=questions)) as live:
        await until(lambda: live.is_ready and bool(live.rows))
        return live.rows[0]


async def test_a_tool_may_ask_and_dying_meanwhile_is_no_interruption(db: Database) -> None:
    posted: list[str] = []

    @tool
    async def send(to: str, ctx: ToolContext) -> str:
        """Ask when, then send."""

        async def post() -> str:
            posted.append(to)
            return "a stamp"

        stamp = await ctx.step("stamp", post)
        day = await ctx.ask(f"When to send to {to}?", int)
        return f"{stamp}, day {day}"

    agent = await start(send_to("ann"), send)
    agent.send("go", session=URL, message_id="m")
    await question_of(db)
    calls = db.session(URL).tool_calls
    for attempt in (2, 3, 4):
        await agent.aclose()
        agent = await start(send_to("ann"), send)
        async with db.live_query(lambda q: q.from_(c=calls)) as live:
            await until(lambda n=attempt: live.is_ready and live.rows[0].attempt == n)
    asked = await question_of(db)
    assert (asked.agent, asked.question) == ("echo", "When to send to ann?")

    await answer(db.session(URL).questions, asked.id, 3)

    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "a stamp, day 3"
    assert posted == ["ann"]
    assert len(await rows(db, "questions")) == 1
    [generation] = await rows(db, "generations")
    assert generation.interruptions == 0


async def test_steps_of_generate_are_recorded(db: Database) -> None:
    ran: list[str] = []

    async def generate(ctx: GenerateContext[Any]) -> str:
        async def first() -> int:
            ran.append("first")
            return 7

        value = await ctx.step("first", first)
        if ctx.attempt == 1:
            raise ModelError("busy", retryable=True, retry_after_ms=1)
        return str(value + await ctx.step("second", lambda: 1))

    class Task(BaseModel):
        id: str
        done: bool = False

    tasks = db.collection("tasks", Task)
    answers: list[str] = []

    def respond(said: str, pending: list[Task]) -> None:
        answers.append(said)
        tasks.update(pending[0].id, {"done": True})

    agent = create_agent(
        name="planner",
        pending_work=lambda q: q.from_(t=tasks).where(lambda t: eq(t.done, False)),
        generate=generate,
        on_response=respond,
    )
    await agent.ready()
    await tasks.insert(Task(id="t"))
    assert (await agent.drain_until_idle()).completed

    assert (answers, ran) == (["8"], ["first"])
    generations = db.collection("generations", Generation)
    [generation] = await db.query(lambda q: q.from_(g=generations))
    steps = db.collection("steps")
    assert {row["owner"] for row in await db.query(lambda q: q.from_(s=steps))} == {generation.id}


async def test_a_tool_that_waited_for_something_cancelled_fails_its_call_only(
    db: Database,
) -> None:
    @tool
    async def send(to: str) -> str:
        """Wait for what never comes."""
        gone = asyncio.get_running_loop().create_future()
        gone.cancel()
        return await gone

    agent = await start(send_to("ann"), send)

    reply = await agent.send("go", session=URL).reply(timeout_ms=SOON_MS)

    assert '"tool_crashed"' in reply.content
    [call] = await rows(db, "tool_calls")
    assert (call.status, call.error_code) == ("failed", "tool_crashed")
