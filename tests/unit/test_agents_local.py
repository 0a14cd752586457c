"""What agents promise, shown in one process, on a store that forgets."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from ag_ui.core import Event, TextMessageContentEvent
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    AgentMessage,
    Chunk,
    ConfigError,
    Database,
    FencedError,
    Generation,
    ModelError,
    NotReadyError,
    Retry,
    RunCancelledError,
    ToolCall,
    UnavailableError,
    UsageLimits,
    and_,
    connect,
    create_agent,
    durable_agent,
    eq,
    replay,
    tool,
)
from aidb_ray.agents.cycle import ALONE_AFTER
from aidb_ray.agents.drain import DrainLifecycle
from aidb_ray.agents.replies import ReplyHandle
from aidb_ray.agents.run import GenerateContext
from aidb_ray.agents.shard import AgentActor
from aidb_ray.chunks import ChunkCollection
from aidb_ray.contracts import GenerationStatus, ToolCallStatus, utc_now
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext
from aidb_ray.runtime import LocalRef
from aidb_ray.store.changes import Change
from aidb_ray.store.collection import Collection
from aidb_ray.testing import CallTool, Player, Reply, ScriptedModel
from tests.stores import until

URL = "aidb://echo/1"
SOON_MS = 20_000
NO_PAUSE = Retry(first_pause_ms=1, longest_pause_ms=1)


def echo(messages: Sequence[ModelMessage]) -> Reply:
    return f"You said {messages[-1].content}."


class Model:
    """What the model was asked, and a door that it waits at if it is told to."""

    def __init__(self, play: Callable[[Sequence[ModelMessage]], Reply] | None = None) -> None:
        self.asked: list[list[ModelMessage]] = []
        self.was_asked = asyncio.Event()
        self.door = asyncio.Event()
        self.door.set()
        self._play = play or echo
        self.adapter = ScriptedModel(self._answer)

    async def _answer(self, messages: Sequence[ModelMessage]) -> Reply:
        self.asked.append(list(messages))
        self.was_asked.set()
        await self.door.wait()
        return self._play(messages)

    def close(self) -> None:
        self.door.clear()
        self.was_asked.clear()

    @property
    def last(self) -> list[tuple[str, str]]:
        """The newest conversation as (role, content)."""
        return [(message.role, message.content) for message in self.asked[-1]]


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


async def start(model: Model | Player, **options: Any) -> Agent:
    adapter = model.adapter if isinstance(model, Model) else ScriptedModel(model)
    given: dict[str, Any] = {"name": "echo", "adapter": adapter, **options}
    agent = create_agent(durable_agent(**given))
    await agent.ready()
    return agent


async def ask(agent: Agent, text: str, session: str = URL, **options: Any) -> AgentMessage:
    return await agent.send(text, session=session, **options).reply(timeout_ms=SOON_MS)


async def written(handle: ReplyHandle) -> None:
    """Wait until the message is durable."""
    assert handle.sent is not None
    await handle.sent


async def rows_of(db: Database, collection: str, session: str = URL) -> list[Any]:
    rows = getattr(db.session(session), collection)
    return await db.query(lambda q: q.from_(r=rows).order_by(lambda r: r.created_at))


async def generations(db: Database, session: str = URL) -> list[Generation]:
    return await rows_of(db, "generations", session)


async def chunks_of(db: Database, reply: AgentMessage) -> list[Chunk]:
    chunks, generation_id = db.session(URL).chunks, str(reply.generation_id)
    return [chunk async for chunk in replay(chunks, generation_id=generation_id)]


async def calls(db: Database, session: str = URL) -> list[ToolCall]:
    return await rows_of(db, "tool_calls", session)


# The conversation.


async def test_a_reply_says_what_it_answers_and_who_wrote_it(db: Database) -> None:
    agent = await start(Model())
    handle = agent.send("hello", session=URL, actor_id="user-42")

    reply = await handle.reply(timeout_ms=SOON_MS)

    assert reply.content == "You said hello."
    assert reply.in_reply_to == handle.message_id
    assert (reply.role, reply.actor_id, reply.target_agent) == ("assistant", "echo", "user-42")
    [asked, stored] = await rows_of(db, "messages")
    assert stored == reply
    assert (asked.processed, asked.generation_id) == (True, reply.generation_id)
    [generation] = await generations(db)
    assert generation.id == reply.generation_id
    assert (generation.status, generation.message_ids) == ("completed", [handle.message_id])


async def test_the_model_reads_the_past_in_order(db: Database) -> None:
    model = Model()
    agent = await start(model, instructions="Be brief.")
    await ask(agent, "one")
    await ask(agent, "two")

    assert model.last == [("user", "one"), ("assistant", "You said one."), ("user", "two")]


async def test_messages_that_come_while_the_agent_talks_are_answered_together(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    first = agent.send("one", session=URL)
    await model.was_asked.wait()
    later = [agent.send(text, session=URL) for text in ("two", "three")]
    await written(later[-1])
    model.door.set()

    replies = [await handle.reply(timeout_ms=SOON_MS) for handle in (first, *later)]

    assert replies[0].in_reply_to == first.message_id
    assert replies[1] == replies[2]
    assert replies[1].in_reply_to == later[-1].message_id
    assert model.last == [
        ("user", "one"),
        ("assistant", "You said one."),
        ("user", "two"),
        ("user", "three"),
    ]
    assert len(await generations(db)) == 2


async def test_a_message_sent_twice_under_one_id_is_answered_once(db: Database) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    first = agent.send("hello", session=URL, message_id="m")
    at_once = agent.send("hello", session=URL, message_id="m")
    await written(first)
    durable = agent.send("hello", session=URL, message_id="m")
    model.door.set()
    replies = [await each.reply(timeout_ms=SOON_MS) for each in (first, at_once, durable)]
    answered = await ask(agent, "hello", message_id="m")
    asked_for = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)

    assert len({reply.id for reply in (*replies, answered, asked_for)}) == 1
    assert len(model.asked) == 1


async def test_a_keyword_that_no_message_has_is_named_and_nothing_is_written(db: Database) -> None:
    agent = await start(Model())
    revision = (await db.status())[0].revision

    with pytest.raises(
        TypeError, match=r"'sesion'; .* takes session, actor_id, message_id"
    ) as told:
        agent.send("hello", sesion=URL)
    with pytest.raises(TypeError, match="'requestId'"):
        agent.in_session(URL).send("hello", requestId="r")

    assert "'actor_id'" not in str(told.value)
    assert (await db.status())[0].revision == revision
    assert (await ask(agent, "hello", request_id="r")).content == "You said hello."


async def test_a_message_waits_until_it_is_due(db: Database) -> None:
    model = Model()
    agent = await start(model)
    due = utc_now() + timedelta(milliseconds=120)
    late = agent.send("late", session=URL, not_before=due)
    never = agent.send("never", session=URL, not_before=utc_now() + timedelta(days=1))

    await late.reply(timeout_ms=SOON_MS)

    assert utc_now() >= due
    assert [asked[-1].content for asked in model.asked] == ["late"]
    assert (await agent.drain_until_idle()).completed
    with pytest.raises(TimeoutError):
        await never.reply(timeout_ms=1)


async def test_events_of_an_answer_can_be_followed_and_replayed(db: Database) -> None:
    agent = await start(Model(lambda _: ["Hel", "lo."]))
    handle = agent.send("hello", session=URL)

    heard = [event async for event in handle]
    text = "".join(e.delta for e in heard if isinstance(e, TextMessageContentEvent))
    reply = await handle.reply()
    chunks = await chunks_of(db, reply)

    assert text == "Hello."
    assert [chunk.index for chunk in chunks] == list(range(len(heard)))
    assert [chunk.type for chunk in chunks] == [event.type.value for event in heard]


async def test_agents_of_one_session_do_not_answer_each_other_s_messages(db: Database) -> None:
    one, two = Model(lambda _: "one"), Model(lambda _: "two")
    agents = [
        await start(one, name="one", stream_url=URL),
        await start(two, name="two", stream_url=URL),
    ]
    replies = [await agent.send("hello").reply(timeout_ms=SOON_MS) for agent in agents]

    assert [reply.content for reply in replies] == ["one", "two"]
    assert one.last == two.last == [("user", "hello")]


async def test_a_row_that_is_no_message_does_not_keep_others_from_being_answered(
    db: Database,
) -> None:
    agent = await start(Model())
    await ask(agent, "one")
    foreign: Collection[Any] = db.session(URL).collection("messages")
    await foreign.insert({"id": "odd", "targetAgent": "echo", "processed": False, "role": 3})

    assert (await ask(agent, "two")).content == "You said two."


# Tools.


@tool
async def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def sum_player(messages: Sequence[ModelMessage]) -> Reply:
    last = messages[-1]
    if last.role == "tool":
        return f"It is {last.content}."
    return [CallTool("add", {"a": 1, "b": 2}, id="c0"), CallTool("add", {"a": 3, "b": 4}, id="c1")]


async def test_tool_calls_are_rows_and_their_answers_go_to_the_model(db: Database) -> None:
    model = Model(sum_player)
    agent = await start(model, tools=[add])

    reply = await ask(agent, "sum")

    assert reply.content == "It is 7."
    rows = await calls(db)
    gid = reply.generation_id
    assert [(c.id, c.status, c.result, c.attempt) for c in rows] == [
        (f"{gid}:0:0", "completed", 3, 1),
        (f"{gid}:0:1", "completed", 7, 1),
    ]
    assert [m.role for m in model.asked[1]] == ["user", "assistant", "tool", "tool"]
    assert [m.tool_call_id for m in model.asked[1][2:]] == ["c0", "c1"]
    await ask(agent, "again")
    assert [m.role for m in model.asked[2]] == [
        "user", "assistant", "tool", "tool", "assistant", "user",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (CallTool("nope"), "unknown_tool"),
        (CallTool("add", '{"a": 1'), "invalid_args"),
        (CallTool("add", {"a": "x", "b": 1}), "invalid_args"),
        (CallTool("fail"), "tool_error"),
    ],
)
async def test_a_call_that_fails_is_answered_and_the_model_goes_on(
    db: Database, call: CallTool, code: str
) -> None:
    @tool
    def fail() -> str:
        """Fail."""
        raise RuntimeError("no")

    def play(messages: Sequence[ModelMessage]) -> Reply:
        return call if messages[-1].role == "user" else messages[-1].content

    agent = await start(play, tools=[add, fail])

    reply = await ask(agent, "go")

    [row] = await calls(db)
    assert (row.status, row.error_code) == ("failed", code)
    assert code in reply.content


async def test_a_tool_knows_its_key_attempt_and_session(db: Database) -> None:
    seen: list[tuple[str, int, str]] = []

    @tool
    async def look(ctx: ToolContext) -> str:
        """Look."""
        seen.append((ctx.idempotency_key, ctx.attempt, ctx.session.url))
        return "done"

    agent = await start(lambda m: CallTool("look") if m[-1].role == "user" else "ok", tools=[look])
    reply = await ask(agent, "go")

    assert seen == [(f"{reply.generation_id}:0:0", 1, URL)]


# What goes wrong with models.


async def test_an_error_that_passes_is_tried_again_as_a_new_attempt(db: Database) -> None:
    agent = create_agent(
        durable_agent(
            name="echo",
            adapter=ScriptedModel(["Hello there."], fail_at=(0, 2)),
            retry=NO_PAUSE,
        )
    )
    handle = agent.send("hello", session=URL)
    reply = await handle.reply(timeout_ms=SOON_MS)

    assert reply.content == "Hello there."
    chunks = await chunks_of(db, reply)
    assert [c.index for c in chunks] == list(range(len(chunks)))
    [marker] = [c for c in chunks if c.type == "CUSTOM"]
    assert marker.content == '{"name":"attempt","value":2}'
    assert {c.attempt for c in chunks if c.index < marker.index} == {1}
    assert {c.attempt for c in chunks if c.index >= marker.index} == {2}


@pytest.mark.parametrize(
    ("error", "rounds", "code"),
    [
        (ModelError("Busy.", retryable=True, code="busy", retry_after_ms=5), 3, "busy"),
        (ModelError("Bad key.", retryable=False, code="bad_key"), 1, "bad_key"),
        (RuntimeError("mistake"), 1, "agent_error"),
        (ConfigError("mistake", code="missing_api_key"), 1, "missing_api_key"),
        (TimeoutError("mine"), 3, "timeout"),
    ],
)
async def test_an_error_that_stays_fails_the_generation_and_whoever_waits_hears(
    db: Database, error: Exception, rounds: int, code: str
) -> None:
    model = Model(lambda _: error)
    agent = await start(model, retry=Retry(max_attempts=3, first_pause_ms=1, longest_pause_ms=1))
    handle = agent.send("hello", session=URL)

    with pytest.raises(ModelError) as raised:
        await handle.reply(timeout_ms=SOON_MS)

    assert raised.value.code == code
    assert len(model.asked) == rounds
    [generation] = await generations(db)
    assert (generation.status, generation.error_code) == ("failed", code)
    [message] = await rows_of(db, "messages")
    assert (message.processed, message.generation_id) == (True, generation.id)
    assert not await agent.has_pending_work()


async def test_after_a_failure_the_conversation_goes_on(db: Database) -> None:
    def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].content == "bad":
            return ModelError("No.", retryable=False)
        return "fine"

    model = Model(play)
    agent = await start(model)
    with pytest.raises(ModelError):
        await ask(agent, "bad")

    assert (await ask(agent, "good")).content == "fine"
    assert model.last == [("user", "bad"), ("user", "good")]


async def test_a_model_that_falls_silent_is_given_up(db: Database) -> None:
    never = asyncio.Event()

    async def play(_: Sequence[ModelMessage]) -> Reply:
        await never.wait()
        return ""

    agent = await start(play, idle_timeout_ms=20, retry=Retry(max_attempts=1))
    with pytest.raises(ModelError) as raised:
        await ask(agent, "hello")
    assert raised.value.code == "idle_timeout"


async def test_a_generation_that_takes_too_long_fails_and_its_calls_are_cancelled(
    db: Database,
) -> None:
    stopped = asyncio.Event()

    @tool
    async def hang() -> str:
        """Hang."""
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return ""

    agent = await start(lambda _: CallTool("hang"), tools=[hang], run_timeout_ms=60)
    with pytest.raises(ModelError) as raised:
        await ask(agent, "hello")

    assert raised.value.code == "run_timeout"
    assert stopped.is_set()
    assert [call.status for call in await calls(db)] == ["cancelled"]


async def test_rounds_and_tokens_have_bounds(db: Database) -> None:
    agent = await start(lambda _: CallTool("add", {"a": 1, "b": 1}), tools=[add], max_iterations=2)
    with pytest.raises(ModelError) as raised:
        await ask(agent, "go")
    assert raised.value.code == "max_iterations"
    assert len(await calls(db)) == 1

    greedy = await start(
        lambda _: CallTool("add", {"a": 1, "b": 1}),
        name="greedy",
        tools=[add],
        usage_limits=UsageLimits(max_total_tokens=1),
    )
    with pytest.raises(ModelError) as raised:
        await ask(greedy, "go", "aidb://greedy/1")
    assert raised.value.code == "usage_limit"


async def test_an_answer_must_fit_its_schema(db: Database) -> None:
    class Answer(BaseModel):
        value: int

    agent = create_agent(
        durable_agent(
            name="echo",
            adapter=ScriptedModel(["no json", '{"value": 3}']),
            output_schema=Answer,
            retry=NO_PAUSE,
        )
    )
    assert Answer.model_validate_json((await ask(agent, "go")).content) == Answer(value=3)


async def test_an_answer_that_is_too_large_fails_the_generation(db: Database) -> None:
    model = Model(lambda _: "x" * (3 << 20))
    agent = await start(model)
    with pytest.raises(ModelError) as raised:
        await ask(agent, "go")
    assert raised.value.code == "row_too_large"
    assert len(model.asked) == 1


# Cancelling.


async def test_a_cancel_stops_what_runs_and_whoever_waits_hears(db: Database) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    handle = agent.send("hello", session=URL)
    await model.was_asked.wait()

    await asyncio.gather(
        agent.cancel(session=URL, reason="enough"), agent.cancel(session=URL, reason="enough")
    )

    with pytest.raises(RunCancelledError) as raised:
        await handle.reply(timeout_ms=SOON_MS)
    assert raised.value.reason == "enough"
    model.door.set()
    assert (await ask(agent, "next")).content == "You said next."
    assert [g.status for g in await generations(db)] == ["cancelled", "completed"]
    await cancels_done(db)


async def cancels_done(db: Database) -> None:
    """Return once both requests are closed."""
    requests = db.session(URL).cancel_requests
    done = 0
    async with db.live_query(lambda q: q.from_(r=requests)) as live:
        async for delta in live:
            done += delta.row.done
            if done == 2:
                return


async def test_a_cancel_stops_a_tool_and_tells_it(db: Database) -> None:
    started, signalled = asyncio.Event(), asyncio.Event()

    @tool
    async def hang(ctx: ToolContext) -> str:
        """Hang."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            if ctx.signal.is_aborted:
                signalled.set()
        return ""

    agent = await start(lambda _: CallTool("hang"), tools=[hang])
    handle = agent.send("hello", session=URL)
    await started.wait()
    await agent.cancel(session=URL)

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert signalled.is_set()
    assert [call.status for call in await calls(db)] == ["cancelled"]


async def test_a_cancel_ends_messages_that_only_wait(db: Database) -> None:
    model = Model()
    agent = await start(model)
    waits = agent.send("later", session=URL, not_before=utc_now() + timedelta(days=1))
    await written(waits)
    await agent.cancel(session=URL, reason="not needed")

    with pytest.raises(RunCancelledError):
        await waits.reply(timeout_ms=SOON_MS)
    assert [event async for event in waits] == []
    assert not model.asked
    assert not await agent.has_pending_work()


async def test_a_cancel_reaches_a_session_whose_rows_are_still_read(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    agent = await start(model)
    reading = HeldRead(db, monkeypatch)
    handle = agent.send("hello", session=URL)
    await reading.asked.wait()
    await agent.cancel(session=URL)
    await heard_everything(db)
    reading.door.set()

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert not model.asked


class HeldRead:
    """Keeps back what is read of sessions until the door opens."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = asyncio.Event()
        self.door = asyncio.Event()
        client = db.partitions[0].client
        read_session = client.read_session

        async def slow_read(*args: Any) -> Any:
            found = await read_session(*args)
            self.asked.set()
            await self.door.wait()
            return found

        monkeypatch.setattr(client, "read_session", slow_read)


async def heard_everything(db: Database) -> None:
    client = db.partitions[0].client
    await client.feed.reached((await client.status()).revision)


async def test_a_cancel_covers_nothing_that_was_written_after_it(db: Database) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    before = agent.send("before", session=URL)
    await written(before)
    await agent.cancel(session=URL)
    after = agent.send("after", session=URL)
    await written(after)

    with pytest.raises(RunCancelledError):
        await before.reply(timeout_ms=SOON_MS)
    assert (await agent.drain_until_idle()).completed
    assert (await after.reply(timeout_ms=SOON_MS)).content == "You said after."


async def test_a_finished_call_stays_finished_when_its_generation_is_cancelled(
    db: Database,
) -> None:
    started = asyncio.Event()

    @tool
    async def hang() -> str:
        """Hang."""
        started.set()
        await asyncio.Event().wait()
        return ""

    agent = await start(
        lambda _: [CallTool("add", {"a": 1, "b": 2}), CallTool("hang")], tools=[add, hang]
    )
    handle = agent.send("go", session=URL)
    await started.wait()
    await call_has(db, "completed")
    await agent.cancel(session=URL)

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert sorted(call.status for call in await calls(db)) == ["cancelled", "completed"]


async def call_has(db: Database, status: str) -> None:
    rows = db.session(URL).tool_calls
    live = db.live_query(lambda q: q.from_(r=rows).where(lambda r: eq(r.status, status)))
    async with live:
        async for _ in live:
            return


# The loop.


async def test_an_agent_that_does_not_start_by_itself_works_when_asked(db: Database) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    one, two = URL, "aidb://echo/2"
    for session in (one, two):
        await written(agent.send("hello", session=session))

    assert await agent.has_pending_work()
    assert await agent.in_session(two).run_generation_cycle()
    assert not await agent.has_pending_work(session=two)
    assert not await agent.in_session(two).run_generation_cycle()
    assert len(model.asked) == 1
    drained = await agent.in_session(one).drain_until_idle()
    assert (drained.completed, drained.cycles) == (True, 1)
    assert not await agent.has_pending_work()
    await written(agent.send("more", session=one))
    assert await agent.has_pending_work(), "a drain left the agent reactive"
    assert await agent.run_generation_cycle()
    assert len(model.asked) == 3


async def test_a_drain_tells_its_caller_how_far_it_is(db: Database) -> None:
    agent = await start(Model(), autostart=False)
    for number in range(3):
        await written(agent.send("hello", session=f"aidb://echo/{number}"))
    told: list[object] = []

    async def heartbeat() -> None:
        told.append("alive")

    async def checkpoint(made: Sequence[Any]) -> None:
        told.append(list(made))

    async def build() -> Sequence[Any]:
        return ["cursor"]

    drained = await agent.drain_until_idle(
        lifecycle=DrainLifecycle(heartbeat, checkpoint), build_checkpoint=build
    )

    assert (drained.completed, drained.cycles) == (True, 3)
    assert told[-2:] == ["alive", ["cursor"]]


async def test_at_its_deadline_a_drain_stops_what_it_began_and_the_row_stays(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    model.close()
    handle = agent.send("hello", session=URL)
    await written(handle)

    drained = await agent.drain_until_idle(max_duration_ms=80, headroom_ms=10)

    assert not drained.completed
    assert (await agent.status())[0].running == 0
    assert await agent.has_pending_work()
    model.door.set()
    assert (await agent.drain_until_idle()).completed
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "You said hello."
    [generation] = await generations(db)
    assert (generation.attempt, generation.status) == (2, "completed")


async def test_two_drains_at_once_leave_the_agent_as_it_was(db: Database) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    model.close()
    await written(agent.send("hello", session=URL))
    drains = [asyncio.create_task(agent.drain_until_idle()) for _ in range(2)]
    await model.was_asked.wait()
    model.door.set()
    assert all([(await drain).completed for drain in drains])

    await written(agent.send("more", session=URL))
    await heard_everything(db)
    assert await agent.has_pending_work()
    assert len(model.asked) == 1


async def test_one_session_of_many_does_not_keep_others_waiting(db: Database) -> None:
    slow = asyncio.Event()

    async def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].content == "slow":
            await slow.wait()
        return "done"

    agent = await start(play, max_running=2)
    held = agent.send("slow", session="aidb://echo/slow")
    for number in range(20):
        await ask(agent, "quick", f"aidb://echo/{number}")
    slow.set()
    await held.reply(timeout_ms=SOON_MS)


async def test_no_more_sessions_are_at_work_than_allowed(db: Database) -> None:
    running = most = 0

    async def play(_: Sequence[ModelMessage]) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return "done"

    agent = await start(play, max_running=3)
    handles = [agent.send("hello", session=f"aidb://echo/{number}") for number in range(30)]
    for handle in handles:
        await handle.reply(timeout_ms=SOON_MS)
    assert most == 3


# Names and identity.


async def test_an_agent_of_a_pattern_has_no_session_of_its_own(db: Database) -> None:
    agent = await start(Model())
    for use in (lambda: agent.collections, lambda: agent.send("hello")):
        with pytest.raises(ConfigError) as raised:
            use()
        assert raised.value.code == "session_required"
    with pytest.raises(ConfigError) as raised:
        agent.in_session("aidb://other/1")
    assert raised.value.code == "foreign_session"
    there = agent.in_session(URL)
    assert (await there.send("hello").reply(timeout_ms=SOON_MS)).content == "You said hello."
    assert len(await db.query(lambda q: q.from_(m=there.collections.messages))) == 2


async def test_an_equal_definition_attaches(db: Database) -> None:
    one = await start(Model(), version="1")
    [before] = await one.status()
    two = await start(Model(), version="1")
    [after] = await two.status()
    assert after.epoch == before.epoch


async def test_a_handle_by_name_learns_the_agent_s_one_session(
    db: Database, elsewhere: Database
) -> None:
    agent = await start(Model(), stream_url=URL)
    elsewhere.local_shards = db.local_shards
    found = elsewhere.agent("echo")
    with pytest.raises(NotReadyError):
        found.send("too early")

    await found.ready()

    assert (await found.send("hello").reply(timeout_ms=SOON_MS)).content == "You said hello."
    assert found.collections.session.url == agent.collections.session.url == URL
    with pytest.raises(ConfigError) as raised:
        found.send("hello", session="aidb://echo/2")
    assert raised.value.code == "foreign_session"
    await found.detach()


async def test_handles_by_name_are_one_and_listen_while_one_is_held(
    db: Database, elsewhere: Database
) -> None:
    await start(Model())
    elsewhere.local_shards = db.local_shards
    heard = elsewhere.partitions[0].client.feed._subscriptions

    first = elsewhere.agent("echo")
    await first.ready()
    listening = len(heard)
    assert listening
    assert elsewhere.agent("echo") is first
    assert (await ask(elsewhere.agent("echo"), "one")).content == "You said one."
    assert len(heard) == listening
    await written(first.send("two", session=URL, message_id="two"))
    handle = first.reply_to("two", session=URL)
    del first
    gc.collect()
    # Whoever waits for a reply holds it, too.
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "You said two."
    assert len(heard) == listening
    del handle
    gc.collect()
    await until(lambda: not heard)
    for number in range(3):
        assert (await ask(elsewhere.agent("echo"), str(number))).content == f"You said {number}."
        gc.collect()
    await until(lambda: not heard)


async def test_a_handle_by_name_that_found_nobody_looks_again(
    db: Database, elsewhere: Database
) -> None:
    early = elsewhere.agent("echo")
    with pytest.raises(ConfigError) as raised:
        await early.ready()
    assert raised.value.code == "agent_missing"
    await start(Model())
    elsewhere.local_shards = db.local_shards

    found = elsewhere.agent("echo")
    await found.ready()
    assert (await ask(found, "hello")).content == "You said hello."
    await found.detach()


async def test_a_handle_by_name_of_a_pattern_needs_a_session(
    db: Database, elsewhere: Database
) -> None:
    await start(Model())
    elsewhere.local_shards = db.local_shards
    found = elsewhere.agent("echo")
    early = found.send("one", session=URL)
    await found.ready()

    with pytest.raises(ConfigError) as raised:
        found.send("hello")
    assert raised.value.code == "session_required"
    assert (await early.reply(timeout_ms=SOON_MS)).content == "You said one."
    assert (await ask(found, "two")).content == "You said two."
    await found.detach()


async def test_another_definition_replaces_after_what_runs_has_ended(db: Database) -> None:
    old_model, new_model = Model(lambda _: "old"), Model(lambda _: "new")
    old = await start(old_model, version="1")
    [before] = await old.status()
    old_model.close()
    running = old.send("hello", session=URL)
    await old_model.was_asked.wait()
    waiting = old.send("and me?", session=URL)

    replacing = asyncio.create_task(start(new_model, version="2"))
    await written(waiting)
    assert not replacing.done()
    old_model.door.set()
    new = await replacing

    assert (await running.reply(timeout_ms=SOON_MS)).content == "old"
    assert (await waiting.reply(timeout_ms=SOON_MS)).content == "new"
    [after] = await new.status()
    assert after.epoch > before.epoch
    assert len(old_model.asked) == len(new_model.asked) == 1


async def test_another_definition_may_attach_or_be_refused(db: Database) -> None:
    await start(Model(lambda _: "first"), version="1")
    other = durable_agent(name="echo", adapter=ScriptedModel(["second"]), version="2")

    refused = create_agent(other, on_change="error")
    with pytest.raises(ConfigError) as raised:
        await refused.ready()
    assert raised.value.code == "agent_exists"
    attached = create_agent(other, on_change="attach")
    assert (await ask(attached, "hello")).content == "first"


async def test_an_agent_that_was_ended_can_be_created_again(db: Database) -> None:
    first = await start(Model(lambda _: "first"))
    await first.aclose()
    with pytest.raises(ConfigError) as raised:
        await db.agent("echo").ready()
    assert raised.value.code == "agent_missing"

    again = await start(Model(lambda _: "again"))
    assert (await ask(again, "hello")).content == "again"


async def test_ending_an_agent_ends_what_it_started_and_a_later_one_goes_on(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    handle = agent.send("hello", session=URL)
    await model.was_asked.wait()
    before = asyncio.all_tasks()
    await agent.aclose()
    assert not [task for task in asyncio.all_tasks() & before if "_work" in repr(task)]

    model.door.set()
    again = await start(model)
    reply = await again.reply_to(handle.message_id, session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "You said hello."
    assert len(await generations(db)) == 1


async def test_plain_tools_of_a_round_run_at_once(db: Database) -> None:
    all_there = threading.Barrier(16, timeout=SOON_MS / 1000)

    @tool
    def meet() -> str:
        """Wait for the others."""
        all_there.wait()
        return "met"

    def play(messages: Sequence[ModelMessage]) -> Reply:
        met = sum(message.content == "met" for message in messages)
        return f"{met} met" if met else [CallTool("meet")] * 16

    agent = create_agent(durable_agent(name="echo", adapter=ScriptedModel(play), tools=[meet]))
    reply = await agent.send("go", session=URL).reply(timeout_ms=SOON_MS)

    assert reply.content == "16 met"


async def test_ending_an_agent_while_a_tool_runs_leaves_its_call_to_a_later_one(
    db: Database,
) -> None:
    ran, attempts = asyncio.Event(), list[int]()

    @tool
    async def add(a: int, b: int, ctx: ToolContext) -> int:
        """Come back the second time."""
        attempts.append(ctx.attempt)
        ran.set()
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return a + b

    def play(messages: Sequence[ModelMessage]) -> Reply:
        last = messages[-1]
        return "done" if last.role == "tool" else CallTool("add", {"a": 1, "b": 2})

    agent = await start(play, tools=[add])
    handle = agent.send("sum", session=URL)
    await ran.wait()
    await agent.aclose()
    [stopped] = await generations(db)
    assert stopped.status == "running"

    again = await start(play, tools=[add])
    reply = await again.reply_to(handle.message_id, session=URL).reply(timeout_ms=SOON_MS)

    assert (reply.content, attempts) == ("done", [1, 2])


async def test_two_runners_the_older_is_refused_and_stops(db: Database) -> None:
    """One runner holds a session: what the other one does writes nothing."""
    old_model, new_model = Model(lambda _: "old"), Model(lambda _: "new")
    old_model.close()
    old = LocalRef(AgentActor(db, durable_agent(name="echo", adapter=old_model.adapter), 0))
    await old.ask(AgentActor.ready)
    listener = await start_reading(db)
    handle = listener.send("hello", session=URL)
    await old_model.was_asked.wait()

    new = LocalRef(AgentActor(db, durable_agent(name="echo", adapter=new_model.adapter), 0))
    await new.ask(AgentActor.ready)
    reply = await handle.reply(timeout_ms=SOON_MS)
    drain = asyncio.create_task(old.ask(AgentActor.drain, None, SOON_MS))
    old_model.door.set()
    with pytest.raises(FencedError):
        await drain
    assert (await old.ask(AgentActor.status)).fenced

    assert reply.content == "new"
    stored = await rows_of(db, "messages")
    assert [message.content for message in stored] == ["hello", "new"]
    assert (await new.ask(AgentActor.status)).epoch > (await old.ask(AgentActor.status)).epoch
    with pytest.raises(FencedError):
        await old.ask(AgentActor.run_cycle, URL)
    with pytest.raises(FencedError):
        await old.ask(AgentActor.drain, None, SOON_MS)
    second = await listener.send("more", session=URL).reply(timeout_ms=SOON_MS)
    assert second.content == "new"
    assert len(old_model.asked) == 1
    await asyncio.gather(old.stop(), new.stop())


async def start_reading(db: Database) -> Agent:
    """Return a handle that starts nothing: it only writes messages and hears replies."""
    return Agent(db, "echo", "aidb://echo/*", 1)


# Robustness.


async def test_a_message_that_is_deleted_while_it_is_answered_leaves_nothing_open(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    handle = agent.send("hello", session=URL)
    await model.was_asked.wait()
    await db.session(URL).messages.delete(handle.message_id)
    model.door.set()

    assert (await agent.drain_until_idle()).completed
    [generation] = await generations(db)
    assert generation.status == "completed"
    assert (await ask(agent, "next")).content == "You said next."


async def test_a_message_that_is_edited_while_it_is_answered_is_stamped_as_it_is_now(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    handle = agent.send("hello", session=URL)
    await model.was_asked.wait()
    await db.session(URL).messages.update(handle.message_id, {"content": "hello!"})
    model.door.set()

    await handle.reply(timeout_ms=SOON_MS)
    [asked, _] = await rows_of(db, "messages")
    assert (asked.content, asked.processed) == ("hello!", True)
    assert len(model.asked) == 1


async def test_a_message_that_someone_else_processed_is_not_answered(db: Database) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    handle = agent.send("hello", session=URL)
    await written(handle)
    await db.session(URL).messages.update(handle.message_id, {"processed": True})
    assert not await agent.run_generation_cycle()
    assert not model.asked


async def test_losing_the_feed_loses_no_message(db: Database) -> None:
    """After a gap, what is known of a session at work is too old to go by."""
    model = Model()
    agent = await start(model)
    model.close()
    first = agent.send("one", session=URL)
    await model.was_asked.wait()
    feed = db.partitions[0].client.feed
    feed._generation = "of another store"
    note = {"role": "user", "actor_id": "bob", "content": "note", "processed": True}
    await db.session(URL).messages.insert(note)
    second = agent.send("two", session=URL)
    await written(second)
    model.door.set()

    assert (await first.reply(timeout_ms=SOON_MS)).content == "You said one."
    assert (await second.reply(timeout_ms=SOON_MS)).content == "You said two."
    assert len(model.asked) == 2
    assert ("user", "note") in model.last


async def test_losing_the_feed_while_rows_are_read_loses_no_message(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await start(Model())
    reading = HeldRead(db, monkeypatch)
    first = agent.send("one", session=URL)
    await reading.asked.wait()
    db.partitions[0].client.feed._generation = "of another store"
    second = agent.send("two", session=URL)
    await written(second)
    async with asyncio.timeout(SOON_MS / 1000):
        while (await agent.status())[0].pending < 2:
            await heard_everything(db)
    reading.door.set()

    replies = [await handle.reply(timeout_ms=SOON_MS) for handle in (first, second)]
    assert "You said two." in [reply.content for reply in replies]


async def test_a_change_that_the_feed_brings_late_does_not_keep_the_end_from_being_written(
    db: Database,
) -> None:
    model = Model()
    agent = await start(model)
    model.close()
    handle = agent.send("hello", session=URL)
    await model.was_asked.wait()
    feed = db.partitions[0].client.feed
    dispatch = feed._dispatch

    def all_but_the_edit(changes: Sequence[Change]) -> None:
        values = [change.value or b"" for change in changes]
        is_edit = [b"edited" in value and b'"processed":false' in value for value in values]
        dispatch([c for c, edit in zip(changes, is_edit, strict=True) if not edit])

    feed._dispatch = all_but_the_edit
    await db.session(URL).messages.update(handle.message_id, {"content": "edited"})
    model.door.set()

    await handle.reply(timeout_ms=SOON_MS)
    [asked, _] = await rows_of(db, "messages")
    assert (asked.content, asked.processed) == ("edited", True)
    assert len(model.asked) == 1


class HeldCommits:
    """Lets commits reach the store but keeps back the answer to those that hold some text."""

    def __init__(self, db: Database, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
        self.held = asyncio.Event()
        self.door = asyncio.Event()
        client = db.partitions[0].client
        commit = client.commit

        async def answer_later(sent: asyncio.Future[int]) -> int:
            revision = await sent
            self.held.set()
            await self.door.wait()
            return revision

        def held_commit(mutations: Sequence[Any], **options: Any) -> asyncio.Future[int]:
            sent = commit(mutations, **options)
            if any(text in getattr(mutation, "value", b"") for mutation in mutations):
                return asyncio.ensure_future(answer_later(sent))
            return sent

        monkeypatch.setattr(client, "commit", held_commit)


async def test_a_call_whose_answer_is_on_its_way_stays_finished_when_it_is_cancelled(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await start(Model(sum_player), tools=[add])
    commits = HeldCommits(db, monkeypatch, b'"result":3')
    handle = agent.send("sum", session=URL)
    await commits.held.wait()
    await agent.cancel(session=URL)
    await heard_everything(db)
    commits.door.set()

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert [call.status for call in await calls(db)] == ["completed", "completed"]


async def test_of_a_session_that_was_left_over_only_the_first_start_is_waited_for(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier process may have died of what waits at the start, but not of what comes later."""
    model = Model()
    hello = {"role": "user", "actor_id": "u", "target_agent": "echo", "content": "hello"}
    await db.session(URL).messages.insert({"id": "one", **hello})
    commits = HeldCommits(db, monkeypatch, b'"messageIds":["one"]')
    agent = await start(model)
    await commits.held.wait()
    assert not model.asked
    commits.door.set()
    await agent.reply_to("one", session=URL).reply(timeout_ms=SOON_MS)
    await agent.drain_until_idle()

    commits = HeldCommits(db, monkeypatch, b'"messageIds":["two"]')
    later = agent.send("later", session=URL, message_id="two")
    try:
        await until(lambda: len(model.asked) == 2)
    finally:
        commits.door.set()
    await later.reply(timeout_ms=SOON_MS)


async def test_rows_of_sessions_at_work_are_kept_however_full_the_cache_is(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.agents.states.CACHE_BYTES", 0)
    at_work, idle, other = (f"aidb://echo/{name}" for name in ("at-work", "idle", "other"))
    door = asyncio.Event()
    reads: list[str] = []
    client = db.partitions[0].client
    read_session = client.read_session

    async def count(session: str, collections: tuple[str, ...]) -> Any:
        reads.append(session)
        return await read_session(session, collections)

    async def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].content == "wait":
            await door.wait()
        return "done"

    monkeypatch.setattr(client, "read_session", count)
    agent = await start(Model(), adapter=ScriptedModel(play))
    await ask(agent, "hello", idle)
    waits = agent.send("wait", session=at_work)
    await until(lambda: at_work in reads)
    await ask(agent, "hello", other)
    more = agent.send("more", session=at_work)
    await written(more)
    door.set()
    for handle in (waits, more):
        await handle.reply(timeout_ms=SOON_MS)
    await ask(agent, "again", idle)

    assert reads.count(at_work) == 1
    assert reads.count(idle) == 2, "what is idle makes room"


async def test_what_is_stopped_has_nothing_on_its_way(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    agent = await start(model, autostart=False)
    model.close()
    await written(agent.send("hello", session=URL))
    commits = HeldCommits(db, monkeypatch, b'"status":"running"')
    draining = asyncio.create_task(agent.drain_until_idle(max_duration_ms=50, headroom_ms=0))
    await commits.held.wait()
    done, _ = await asyncio.wait([draining], timeout=0.2)
    assert not done
    commits.door.set()
    assert not (await draining).completed


async def test_what_the_store_cannot_say_for_a_while_is_tried_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.agents.partition.FAILURE_PAUSE_MS", 1)
    agent = await start(Model())
    client = db.partitions[0].client
    read_session = client.read_session
    failures = 3

    async def failing_read(*args: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise UnavailableError("Away.", outcome="not_applied")
        return await read_session(*args)

    monkeypatch.setattr(client, "read_session", failing_read)
    assert (await ask(agent, "hello")).content == "You said hello."
    assert failures == 0


async def test_replies_are_told_apart_from_failures_in_one_batch(db: Database) -> None:
    """Ends may be heard before the replies that were committed with them."""
    gate = asyncio.Event()

    async def play(messages: Sequence[ModelMessage]) -> Reply:
        await gate.wait()
        if messages[-1].content == "bad":
            return ModelError("No.", retryable=False)
        return "fine"

    agent = await start(play)
    texts = ["bad" if number % 2 == 0 else "good" for number in range(40)]
    handles = [
        agent.send(text, session=f"aidb://echo/{number}") for number, text in enumerate(texts)
    ]
    gate.set()
    results = await asyncio.gather(
        *(handle.reply(timeout_ms=SOON_MS) for handle in handles), return_exceptions=True
    )

    for text, result in zip(texts, results, strict=True):
        if text == "bad":
            assert isinstance(result, ModelError)
        else:
            assert isinstance(result, AgentMessage)


# After a crash: rows as a process leaves them that dies while a tool runs.


async def leave_call(db: Database, *, status: str = "executing") -> str:
    """Write what is durable when a call runs; return the call's key."""
    session = db.session(URL)
    now = utc_now()
    await session.messages.insert(
        {"id": "m", "role": "user", "actor_id": "user", "target_agent": "echo", "content": "sum"}
    )
    await session.generations.insert(
        Generation(
            id="g",
            agent="echo",
            status=GenerationStatus.RUNNING,
            message_ids=["m"],
            rounds=[""],
            created_at=now,
            updated_at=now,
        )
    )
    await session.tool_calls.insert(
        ToolCall(
            id="g:0:0",
            generation_id="g",
            name="add",
            args={"a": 1, "b": 2},
            status=ToolCallStatus(status),
            agent="echo",
            model_call_id="c0",
            attempt=1,
            created_at=now,
            updated_at=now,
        )
    )
    return "g:0:0"


async def test_a_call_in_doubt_waits_for_a_person_to_decide(db: Database) -> None:
    key = await leave_call(db)
    model = Model(sum_player)
    agent = await start(model, tools=[add], on_in_doubt="park")
    assert (await agent.drain_until_idle()).completed
    assert await agent.has_pending_work()
    [parked] = await generations(db)
    assert (parked.status, parked.attempt) == ("running", 1)
    assert not model.asked

    await db.session(URL).tool_calls.update(key, {"status": "completed", "result": 30})

    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "It is 30."
    [ended] = await generations(db)
    assert (ended.status, ended.attempt) == ("completed", 2)


@pytest.mark.parametrize(
    ("decision", "content", "attempt"),
    [
        ({"status": "completed", "result": 30}, "It is 30.", 1),
        ({"status": "failed", "error": "It was not sent."}, "It was not sent.", 1),
        ({"status": "cancelled"}, "cancelled", 1),
        ({"approval": "approved"}, "It is 3.", 2),
        ({"approval": "rejected"}, "rejected", 1),
    ],
    ids=str,
)
async def test_a_call_in_doubt_is_decided_by_its_row_from_another_process(
    db: Database, elsewhere: Database, decision: dict[str, Any], content: str, attempt: int
) -> None:
    key = await leave_call(db)
    agent = await start(sum_player, tools=[add], on_in_doubt="park")
    assert (await agent.drain_until_idle()).completed
    handle = agent.reply_to("m", session=URL)

    await elsewhere.session(URL).tool_calls.update(key, decision)

    assert content in (await handle.reply(timeout_ms=SOON_MS)).content
    [call] = await calls(db)
    assert call.attempt == attempt
    assert call.status.is_terminal


async def test_an_approval_holds_for_one_attempt(db: Database, elsewhere: Database) -> None:
    ran = asyncio.Event()

    @tool
    async def add(a: int, b: int) -> int:
        """Never come back."""
        ran.set()
        await asyncio.Event().wait()
        return a + b

    key = await leave_call(db)
    agent = await start(sum_player, tools=[add], on_in_doubt="park")
    await elsewhere.session(URL).tool_calls.update(key, {"approval": "approved"})
    await ran.wait()
    await agent.aclose()

    again = await start(sum_player, tools=[add], on_in_doubt="park")
    assert (await again.drain_until_idle()).completed
    [call] = await calls(db)
    assert (call.status, call.attempt, call.approval) == ("executing", 2, None)


async def test_a_decision_that_is_heard_before_the_rows_arrive_is_seen(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await leave_call(db)
    reading = HeldRead(db, monkeypatch)
    agent = create_agent(
        durable_agent(
            name="echo", adapter=ScriptedModel(sum_player), tools=[add], on_in_doubt="park"
        )
    )
    await reading.asked.wait()
    await db.session(URL).tool_calls.update(key, {"status": "completed", "result": 30})
    await heard_everything(db)
    reading.door.set()

    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "It is 30."


async def test_a_session_that_waits_for_a_person_can_be_cancelled(db: Database) -> None:
    await leave_call(db)
    agent = await start(Model(), tools=[add], on_in_doubt="park")
    assert (await agent.drain_until_idle()).completed
    await agent.cancel(session=URL, reason="never mind")

    with pytest.raises(RunCancelledError):
        await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert [call.status for call in await calls(db)] == ["cancelled"]
    assert [generation.status for generation in await generations(db)] == ["cancelled"]
    assert (await ask(agent, "next")).content == "You said next."


@pytest.mark.parametrize("others", [0, 1])
async def test_a_parked_generation_that_nobody_waits_for_any_more_is_ended(
    db: Database, elsewhere: Database, others: int
) -> None:
    await leave_call(db)
    agent = await start(Model(), tools=[add], on_in_doubt="park")
    assert (await agent.drain_until_idle()).completed
    later = [agent.send("next", session=URL) for _ in range(others)]
    for handle in later:
        await written(handle)
    handle = agent.reply_to("m", session=URL)

    await elsewhere.session(URL).messages.update("m", {"processed": True})

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    assert [call.status for call in await calls(db)] == ["cancelled"]
    for handle in later:
        assert (await handle.reply(timeout_ms=SOON_MS)).content == "You said next."


@pytest.mark.parametrize(
    ("policy", "content", "attempt"), [("retry", "It is 3.", 2), ("fail", "in_doubt", 1)]
)
async def test_a_call_in_doubt_is_repeated_or_answered_with_an_error(
    db: Database, policy: str, content: str, attempt: int
) -> None:
    await leave_call(db)
    agent = await start(sum_player, tools=[add], on_in_doubt=policy)
    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert content in reply.content
    [call] = await calls(db)
    assert call.attempt == attempt


async def test_what_came_after_a_crash_is_answered_after_what_it_interrupted(
    db: Database,
) -> None:
    await leave_call(db)
    second = {"id": "n", "role": "user", "actor_id": "user", "target_agent": "echo"}
    await db.session(URL).messages.insert({**second, "content": "more"})
    model = Model(lambda messages: f"To {messages[-1].content}.")
    agent = await start(model, tools=[add])

    replies = [await agent.reply_to(k, session=URL).reply(timeout_ms=SOON_MS) for k in "mn"]

    assert [reply.content for reply in replies] == ["To 3.", "To more."]
    assert [reply.in_reply_to for reply in replies] == ["m", "n"]


async def test_a_generation_that_nobody_waits_for_is_ended_without_the_model(
    db: Database,
) -> None:
    await leave_call(db)
    await db.session(URL).messages.update("m", {"processed": True})
    model = Model()
    agent = await start(model, tools=[add])
    assert (await ask(agent, "next")).content == "You said next."
    assert len(model.asked) == 1
    assert {generation.status for generation in await generations(db)} == {
        "completed",
        "cancelled",
    }


async def test_a_generation_that_nobody_waits_for_is_ended_when_the_agent_starts(
    db: Database,
) -> None:
    await leave_call(db)
    await db.session(URL).messages.update("m", {"processed": True})

    await start(Model(), tools=[add])

    [generation] = await generations(db)
    assert (generation.status, generation.error) == ("cancelled", "Nobody waits for it any more.")
    assert [call.status for call in await calls(db)] == ["cancelled"]


# Collections of the user's own.


class Task(BaseModel):
    id: str
    thread: str = "t"
    body: str = ""
    target: str = "planner"
    done: bool = False


def tasks_of(db: Database, session: str | None = None) -> Collection[Task]:
    return db.collection("tasks", Task, session=session)


async def start_raw(
    db: Database,
    generate: Callable[[GenerateContext[Any]], Any],
    *,
    tasks: Collection[Task] | None = None,
    session: Callable[[Task], str] | None = None,
    build_messages: Callable[[list[Task], Any], Any] | None = None,
    on_response: Callable[[Any, list[Task]], Any] | None = None,
) -> Agent:
    source = tasks or tasks_of(db)
    agent = create_agent(
        name="planner",
        pending_work=lambda q: q.from_(t=source).where(
            lambda t: and_(eq(t.target, "planner"), eq(t.done, False))
        ),
        generate=generate,
        session=session,
        build_messages=build_messages,
        on_response=on_response,
    )
    await agent.ready()
    return agent


@pytest.mark.parametrize("swallows", [False, True])
async def test_ending_an_agent_fires_the_signal_of_its_generate(
    db: Database, *, swallows: bool
) -> None:
    began, heard = asyncio.Event(), list[bool]()

    async def generate(ctx: GenerateContext[Any]) -> str:
        if began.is_set():
            return "later"
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            heard.append(ctx.signal.is_aborted and ctx.signal.is_stop)
            if not swallows:
                raise
        return "cut short"

    agent = await start_raw(db, generate)
    await tasks_of(db).insert({"id": "a"})
    await began.wait()
    await agent.aclose()

    assert heard == [True]
    [left] = await raw_generations(db)
    assert left.status == "running"
    again = await start_raw(db, generate, on_response=lambda said, rows: finish(db, said, rows))
    await again.drain_until_idle()
    [row] = await raw_rows(db)
    assert (row.done, row.body) == (True, "later")


def finish(db: Database, said: str, rows: list[Task]) -> None:
    for row in rows:
        tasks_of(db).update(row.id, {"done": True, "body": said})


async def raw_rows(db: Database) -> list[Task]:
    tasks = tasks_of(db)
    return await db.query(lambda q: q.from_(t=tasks).order_by(lambda t: t.id))


async def raw_generations(db: Database) -> list[Generation]:
    generations = db.collection("generations", Generation)
    return await db.query(lambda q: q.from_(g=generations).order_by(lambda g: g.id))


async def leave_generation(db: Database, key: str, *, done: bool) -> None:
    """Leave what a process leaves that dies while it answers a row, which may be done since."""
    await tasks_of(db).insert({"id": key, "thread": key, "done": done})
    await db.collection("generations", Generation).insert(
        Generation(
            id=f"g-{key}",
            agent="planner",
            status=GenerationStatus.RUNNING,
            message_ids=[key],
            # So often that it would have to wait its turn if it ran.
            interruptions=ALONE_AFTER,
        )
    )


async def test_a_generation_whose_rows_left_the_query_is_ended_when_the_agent_starts(
    db: Database,
) -> None:
    await leave_generation(db, "a", done=True)

    await start_raw(db, lambda _: "done")

    [generation] = await raw_generations(db)
    assert (generation.status, generation.message_ids) == ("cancelled", ["a"])
    assert generation.error == "Nobody waits for it any more."
    chunks = [c async for c in replay(ChunkCollection(db, ""), generation_id="g-a", follow=True)]
    assert [chunk.type for chunk in chunks] == ["CUSTOM"]


async def test_of_generations_of_many_groups_those_are_ended_that_nobody_waits_for(
    db: Database,
) -> None:
    for key, done in (("a", True), ("b", False), ("c", True)):
        await leave_generation(db, key, done=done)
    asked: list[str] = []
    door = asyncio.Event()

    async def generate(ctx: GenerateContext[Any]) -> str:
        asked.extend(row.id for row in ctx.pending)
        await door.wait()
        return "done"

    def respond(_: str, pending: list[Task]) -> None:
        tasks_of(db).update(pending[0].id, {"done": True})

    agent = await start_raw(db, generate, session=lambda row: row.thread, on_response=respond)
    assert [row.status for row in await raw_generations(db)][::2] == ["cancelled", "cancelled"]
    door.set()
    assert (await agent.drain_until_idle()).completed

    assert asked == ["b"]
    assert [row.status for row in await raw_generations(db)][1:2] == ["completed"]
    assert (await agent.status())[0].pending == 0


async def test_a_row_does_not_take_over_the_generation_of_one_that_left_the_query(
    db: Database,
) -> None:
    await leave_generation(db, "a", done=True)
    await tasks_of(db).insert({"id": "b"})

    def respond(_: str, pending: list[Task]) -> None:
        tasks_of(db).update(pending[0].id, {"done": True})

    agent = await start_raw(db, lambda _: "done", on_response=respond)
    assert (await agent.drain_until_idle()).completed

    ended = {row.message_ids[0]: (row.status, row.attempt) for row in await raw_generations(db)}
    assert ended == {"a": ("cancelled", 2), "b": ("completed", 1)}


async def test_a_raw_agent_answers_rows_of_the_user_s_own(db: Database) -> None:
    seen: list[tuple[Any, list[ModelMessage]]] = []

    async def generate(ctx: GenerateContext[Any]) -> str:
        seen.append((ctx.pending, ctx.messages))
        return f"plan for {ctx.messages[0].content}"

    def respond(response: str, pending: list[Task]) -> None:
        tasks = tasks_of(db)
        for row in pending:
            tasks.update(row.id, {"done": True})
        tasks.insert({"id": "answer", "target": "user", "body": response, "done": True})

    agent = await start_raw(
        db,
        generate,
        build_messages=lambda pending, _: [{"role": "user", "content": p.body} for p in pending],
        on_response=respond,
    )
    await tasks_of(db).insert({"id": "a", "body": "x"})
    assert (await agent.drain_until_idle()).completed

    rows = await raw_rows(db)
    assert [(row.id, row.body, row.done) for row in rows] == [
        ("a", "x", True),
        ("answer", "plan for x", True),
    ]
    assert len(seen) == 1
    assert seen[0][0] == [Task(id="a", body="x")]
    generations = db.collection("generations", Generation)
    [generation] = await db.query(lambda q: q.from_(g=generations))
    assert (generation.status, generation.message_ids) == ("completed", ["a"])


class Plan(BaseModel):
    steps: list[str]


async def texts() -> AsyncIterator[str]:
    yield "Hel"
    yield "lo"


async def events() -> AsyncIterator[Event]:
    for delta in ("Hel", "lo"):
        yield TextMessageContentEvent(message_id="m", delta=delta)


@pytest.mark.parametrize(
    ("result", "response"),
    [
        (lambda: "Hello", "Hello"),
        (lambda: Plan(steps=["a"]), Plan(steps=["a"])),
        (texts, "Hello"),
        (events, "Hello"),
    ],
    ids=["text", "model", "texts", "events"],
)
async def test_generate_may_return_text_a_model_or_a_stream(
    db: Database, result: Callable[[], Any], response: object
) -> None:
    heard: list[object] = []

    def respond(response: object, pending: list[Task]) -> None:
        heard.append(response)
        tasks_of(db).update(pending[0].id, {"done": True})

    agent = await start_raw(db, lambda _: result(), on_response=respond)
    await tasks_of(db).insert({"id": "a"})
    assert (await agent.drain_until_idle()).completed
    assert heard == [response]


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("mistake"), "agent_error"), (ConfigError("mistake", code="mine"), "mine")],
)
async def test_what_on_response_writes_commits_with_the_end_or_not_at_all(
    db: Database, error: Exception, code: str
) -> None:
    def respond(_: str, pending: list[Task]) -> None:
        tasks_of(db).update(pending[0].id, {"done": True})
        raise error

    agent = await start_raw(db, lambda _: "done", on_response=respond)
    await tasks_of(db).insert({"id": "a"})
    assert (await agent.drain_until_idle()).completed

    [row] = await raw_rows(db)
    assert not row.done
    generations = db.collection("generations", Generation)
    [generation] = await db.query(lambda q: q.from_(g=generations))
    assert (generation.status, generation.error_code) == ("failed", code)
    assert "mistake" in str(generation.error)


async def test_a_row_whose_generation_failed_waits_when_it_changes_or_the_agent_starts_again(
    db: Database,
) -> None:
    answered: list[str] = []

    def respond(_: str, pending: list[Task]) -> None:
        answered.append(pending[0].body)
        if len(answered) < 3:
            raise RuntimeError("mistake")
        tasks_of(db).update(pending[0].id, {"done": True})

    agent = await start_raw(db, lambda _: "done", on_response=respond)
    await tasks_of(db).insert({"id": "a", "body": "old"})
    for bodies in (["old"], ["old", "new"]):
        assert (await agent.drain_until_idle()).completed
        assert not await agent.has_pending_work()
        assert not await agent.run_generation_cycle()
        assert answered == bodies
        assert not (await raw_rows(db))[0].done
        await tasks_of(db).update("a", {"body": "new"})
    # The same once more is no change.
    assert (await agent.drain_until_idle()).completed
    assert answered == ["old", "new"]
    await agent.aclose()

    again = await start_raw(db, lambda _: "done", on_response=respond)
    assert (await again.drain_until_idle()).completed
    assert (await raw_rows(db))[0].done
    ends = [generation.status for generation in await raw_generations(db)]
    assert sorted(ends) == ["completed", "failed", "failed"]


async def test_on_response_may_change_a_draft_of_a_row_that_others_wrote(
    db: Database, elsewhere: Database
) -> None:
    seen: list[Task | None] = []

    def finish(draft: Any) -> None:
        draft.body += "!"
        draft.done = True

    def respond(_: str, pending: list[Task]) -> None:
        for row in pending:
            tasks = tasks_of(db)
            seen.append(tasks.get(row.id))
            tasks.update(row.id, finish)

    agent = await start_raw(db, lambda _: "done", on_response=respond)
    await tasks_of(elsewhere).insert({"id": "a", "body": "x"})
    await heard_everything(db)
    assert (await agent.drain_until_idle()).completed

    assert seen == [Task(id="a", body="x")]
    assert await raw_rows(db) == [Task(id="a", body="x!", done=True)]


@pytest.mark.parametrize("change", [{"thread": "new"}, {"target": "other", "thread": "new"}])
async def test_a_draft_in_on_response_is_of_the_row_as_it_is_now(
    db: Database, elsewhere: Database, change: dict[str, Any]
) -> None:
    """Also if it has left the query since it was taken."""

    async def generate(_: GenerateContext[Any]) -> str:
        await tasks_of(elsewhere).update("a", change)
        await heard_everything(db)
        return "done"

    def respond(_: str, pending: list[Task]) -> None:
        def finish(draft: Any) -> None:
            draft.body = f"{pending[0].thread} {draft.thread}"
            draft.done = True

        tasks_of(db).update("a", finish)

    agent = await start_raw(db, generate, on_response=respond)
    await tasks_of(elsewhere).insert({"id": "a", "thread": "old"})
    await heard_everything(db)
    assert (await agent.drain_until_idle()).completed

    assert await raw_rows(db) == [Task(id="a", body="old new", done=True, **change)]


async def test_a_draft_of_a_row_that_was_deleted_fails_the_generation(
    db: Database, elsewhere: Database
) -> None:
    async def generate(_: GenerateContext[Any]) -> str:
        await tasks_of(elsewhere).delete("a")
        await heard_everything(db)
        return "done"

    def respond(_: str, pending: list[Task]) -> None:
        tasks_of(db).update(pending[0].id, lambda draft: None)

    agent = await start_raw(db, generate, on_response=respond)
    await tasks_of(elsewhere).insert({"id": "a"})
    await heard_everything(db)
    assert (await agent.drain_until_idle()).completed

    [generation] = await raw_generations(db)
    assert generation.status == "failed"
    assert "does not exist" in str(generation.error)


async def test_a_condition_of_on_response_that_does_not_hold_fails_the_generation(
    db: Database,
) -> None:
    def respond(_: str, pending: list[Task]) -> None:
        tasks = tasks_of(db)
        tasks.update(pending[0].id, {"done": True}, when=lambda t: eq(t.body, "other"))
        tasks.insert({"id": "b", "target": "user"})

    agent = await start_raw(db, lambda _: "done", on_response=respond)
    await tasks_of(db).insert({"id": "a", "body": "x"})
    assert (await agent.drain_until_idle()).completed

    assert [(row.id, row.done) for row in await raw_rows(db)] == [("a", False)]
    generations = db.collection("generations", Generation)
    [generation] = await db.query(lambda q: q.from_(g=generations))
    assert (generation.status, generation.error_code) == ("failed", "condition_failed")


async def test_rows_of_one_session_are_answered_in_turn_and_of_two_at_once(
    db: Database,
) -> None:
    door = asyncio.Event()
    started: list[list[str]] = []
    began, two_began = asyncio.Event(), asyncio.Event()

    async def generate(ctx: GenerateContext[Any]) -> str:
        started.append([row.id for row in ctx.pending])
        began.set()
        if len(started) == 2:
            two_began.set()
        await door.wait()
        return "done"

    def respond(_: str, pending: list[Task]) -> None:
        for row in pending:
            tasks_of(db).update(row.id, {"done": True})

    agent = await start_raw(db, generate, on_response=respond, session=lambda row: row.thread)
    tasks = tasks_of(db)
    await tasks.insert({"id": "a1", "thread": "a"})
    await began.wait()
    await db.partitions[0].drain()
    await tasks.insert({"id": "b1", "thread": "b"})
    async with asyncio.timeout(10):
        await two_began.wait()
    await tasks.insert({"id": "a2", "thread": "a"})
    door.set()
    assert (await agent.drain_until_idle()).completed

    assert sorted(started[:2]) == [["a1"], ["b1"]]
    assert started[2:] == [["a2"]]
    assert all(row.done for row in await raw_rows(db))
    generations = db.collection("generations", Generation)
    found = await db.query(lambda q: q.from_(g=generations))
    assert sorted(g.message_ids for g in found) == [["a1"], ["a2"], ["b1"]]
    assert {g.attempt for g in found} == {1}


async def test_a_row_that_changes_while_it_is_answered_is_answered_anew(db: Database) -> None:
    door, began = asyncio.Event(), asyncio.Event()
    bodies: list[str] = []

    async def generate(ctx: GenerateContext[Any]) -> str:
        bodies.append(ctx.pending[0].body)
        began.set()
        await door.wait()
        return ctx.pending[0].body

    def respond(response: str, pending: list[Task]) -> None:
        if response == "new":
            tasks_of(db).update(pending[0].id, {"done": True})

    agent = await start_raw(db, generate, on_response=respond)
    await tasks_of(db).insert({"id": "a", "body": "old"})
    await began.wait()
    await tasks_of(db).update("a", {"body": "new"})
    await heard_everything(db)
    door.set()
    assert (await agent.drain_until_idle()).completed
    assert bodies == ["old", "new"]


async def test_same_group_in_two_sessions_is_kept_apart(db: Database) -> None:
    answered: list[tuple[str, list[str]]] = []

    def generate(ctx: GenerateContext[Any]) -> str:
        answered.append((ctx.session.url, [row.id for row in ctx.pending]))
        return "done"

    async def respond(_: str, pending: list[Task]) -> None:
        one, two = "aidb://plan/1", "aidb://plan/2"
        for row in pending:
            tasks_of(db, one if row.id == "a" else two).update(row.id, {"done": True})

    await tasks_of(db, "aidb://plan/1").insert({"id": "a"})
    await tasks_of(db, "aidb://plan/2").insert({"id": "b"})
    agent = await start_raw(
        db,
        generate,
        on_response=respond,
        session=lambda row: row.thread,
        tasks=tasks_of(db, "aidb://plan/*"),
    )
    assert (await agent.drain_until_idle()).completed
    assert sorted(answered) == [("aidb://plan/1", ["a"]), ("aidb://plan/2", ["b"])]


async def test_build_messages_may_choose_what_the_model_reads(db: Database) -> None:
    model = Model()

    async def build(pending: list[AgentMessage], ctx: GenerateContext[Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{ctx.session.url} {m.content}"} for m in pending]

    agent = await start(model, build_messages=build)
    await ask(agent, "hello")
    assert model.last == [("user", f"{URL} hello")]


async def test_a_definition_is_checked_before_anything_starts(db: Database) -> None:
    with pytest.raises(ConfigError) as raised:
        create_agent(durable_agent(name="echo", adapter=ScriptedModel([]), tools=[add, add]))
    assert raised.value.code == "duplicate_tool"
    raw: dict[str, Any] = {"pending_work": lambda q: q.from_(t=tasks_of(db))}  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(ConfigError) as raised:
        create_agent(name="planner", **raw)
    assert raised.value.code == "generate_required"
    assert not db.local_shards


async def test_messages_wait_while_the_agent_s_process_misses_a_key(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyed(ScriptedModel):
        def check(self) -> None:
            if "ITS_KEY" not in os.environ:
                raise ConfigError("There is no key.", code="missing_api_key")

    def begin() -> Agent:
        return create_agent(durable_agent(name="echo", adapter=Keyed(echo)))

    monkeypatch.delenv("ITS_KEY", raising=False)
    agent = begin()
    handle = agent.send("hello", session=URL, message_id="m")
    for waiting in (agent.ready(), handle.reply(), agent.status(), agent.drain_until_idle()):
        with pytest.raises(ConfigError) as raised:
            await waiting
        assert raised.value.code == "missing_api_key"

    assert not db.local_shards
    assert not await generations(db)
    [message] = await rows_of(db, "messages")
    assert not message.processed
    monkeypatch.setenv("ITS_KEY", "k")
    reply = await begin().reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "You said hello."


async def test_a_round_that_waited_for_something_cancelled_fails_once(db: Database) -> None:
    asked = 0

    async def play(_messages: Sequence[ModelMessage]) -> Reply:
        nonlocal asked
        asked += 1
        gone = asyncio.get_running_loop().create_future()
        gone.cancel()
        return await gone

    agent = await start(Model(), adapter=ScriptedModel(play))
    with pytest.raises(ModelError, match="cancelled") as raised:
        await ask(agent, "hello")

    assert raised.value.code == "agent_error"
    assert asked == 1


async def test_half_a_surrogate_pair_fails_the_round_and_not_the_others(db: Database) -> None:
    agent = await start(lambda messages: [messages[-1].content, "\ud83d"][-1:])
    with pytest.raises(ModelError, match="surrogate"):
        await ask(agent, "hello")
    assert (await ask(await start(echo, name="other"), "hi", "aidb://other/1")).content


async def test_an_error_of_a_tool_that_names_a_strange_file_is_an_answer(db: Database) -> None:
    runs = 0

    @tool
    def look() -> str:
        nonlocal runs
        runs += 1
        raise RuntimeError("cannot read caf\udce9.txt")

    def play(messages: Sequence[ModelMessage]) -> Reply:
        return CallTool("look") if messages[-1].role == "user" else "It cannot be read."

    agent = await start(play, tools=[look])
    assert (await ask(agent, "look")).content == "It cannot be read."
    assert runs == 1


# Rows of the user's own, further.


async def test_a_failed_run_whose_row_leaves_the_query_is_ended(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are grouped, and so nothing in the group tells of the generation."""
    monkeypatch.setattr("aidb_ray.agents.partition.FAILURE_PAUSE_MS", 60_000)
    tried = asyncio.Event()

    def generate(_: GenerateContext[Any]) -> str:
        tried.set()
        raise UnavailableError("The store does not answer.", outcome="unknown")

    agent = await start_raw(db, generate, session=lambda row: row.thread)
    await tasks_of(db).insert({"id": "a"})
    await tried.wait()
    await tasks_of(db).update("a", {"done": True})
    assert (await agent.drain_until_idle()).completed

    [generation] = await raw_generations(db)
    assert (generation.status, generation.error) == ("cancelled", "Nobody waits for it any more.")


async def test_pending_work_of_one_session_of_rows_of_the_user_s_own(db: Database) -> None:
    door = asyncio.Event()

    async def generate(_: GenerateContext[Any]) -> str:
        await door.wait()
        return "done"

    agent = await start_raw(db, generate, tasks=tasks_of(db, "aidb://tasks/*"))
    await tasks_of(db, "aidb://tasks/1").insert({"id": "a"})

    assert await agent.has_pending_work()
    assert await agent.has_pending_work(session="aidb://tasks/1")
    assert not await agent.has_pending_work(session="aidb://tasks/2")
    door.set()
