"""A chat that goes on after a crash: what is kept, what is not done twice, who runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray import (
    AgentMessage,
    ConfigError,
    ConflictError,
    ContractError,
    Database,
    Generation,
    ModelError,
    Retry,
    RunCancelledError,
    Session,
    UsageLimits,
    approve,
    create_agent,
    create_tool_execution_effect,
    durable_agent,
    durable_chat,
    eq,
    make_async_tool,
    reject,
    replay,
    tool,
)
from aidb_ray.contracts import GenerationStatus, Usage
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import ToolContext, declare_tool
from aidb_ray.models.writer import RoundWriter
from aidb_ray.runtime import LocalRef
from aidb_ray.store.changes import Disown, Filter
from aidb_ray.store.claims import CLAIMS, ClaimRecord, decode_claim
from aidb_ray.testing import (
    CallTool,
    Reply,
    Say,
    ScriptedModel,
    assert_rows,
    crash_at,
    crash_points,
    database,
    eventually,
)
from tests.stores import until

URL = "aidb://chat/1"
ASK = [{"role": "user", "content": "Twice 21?"}]
SHORT_LEASE_MS = 300


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with database() as opened:
        yield opened


@pytest.fixture
def session(db: Database) -> Session:
    return db.session(URL)


class Outside:
    """What the outside world saw, whoever died; and doors at which it can be held up."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.calls: list[int] = []
        self.tool_began = asyncio.Event()
        self.tool_door = asyncio.Event()
        self.tool_door.set()

    def play(self, messages: Sequence[ModelMessage]) -> Reply:
        self.asked.append([(message.role, message.content) for message in messages])
        last = messages[-1]
        if last.role == "tool":
            return f"It is {last.content}."
        return [Say("One moment."), CallTool("double", {"n": 21})]

    @property
    def double(self) -> Any:
        @tool
        async def double(n: int, ctx: ToolContext) -> int:
            """Double a number."""
            self.calls.append(ctx.attempt)
            self.tool_began.set()
            await self.tool_door.wait()
            return 2 * n

        return double

    async def chat(self, **options: Any) -> Any:
        given: dict[str, Any] = {
            "adapter": ScriptedModel(self.play),
            "messages": ASK,
            "generation_id": "g",
            "tools": [self.double],
            "session": URL,
            **options,
        }
        return await durable_chat(**given)


class Caller:
    """A process that calls; it can be killed."""

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self._call = call

    async def call(self) -> Any:
        return await self._call()


def start_elsewhere(
    call: Callable[[], Awaitable[Any]],
) -> tuple[LocalRef[Caller], asyncio.Task[Any]]:
    """Call in a process of its own, as far as dying goes."""
    process = LocalRef(Caller(call))
    return process, asyncio.create_task(process.ask(Caller.call))


async def claim_of(session: Session, generation_id: str = "g") -> ClaimRecord | None:
    client = session.database.site_of(session.url).client
    _, rows = await client.read(Filter(CLAIMS, session.url))
    records = [decode_claim(row.value) for row in rows]
    return next((record for record in records if record.row == generation_id), None)


async def chunks_of(session: Session) -> list[tuple[int, str, str]]:
    told = replay(session.chunks, generation_id="g", follow=True)
    return [(chunk.attempt, chunk.type, chunk.content) async for chunk in told]


def texts(chunks: list[tuple[int, str, str]]) -> str:
    return "".join(content for _, kind, content in chunks if kind == "TEXT_MESSAGE_CONTENT")


# One call.


async def test_a_chat_is_answered_and_kept(session: Session) -> None:
    outside = Outside()

    assert await outside.chat() == "It is 42."

    await assert_rows(
        session.generations,
        [
            {
                "id": "g",
                "agent": "",
                "status": "completed",
                "rounds": ["One moment."],
                "output": "It is 42.",
                "attempt": 1,
                "usage": Usage(input_tokens=4, output_tokens=3, total_tokens=7),
            }
        ],
    )
    await assert_rows(
        session.tool_calls,
        [{"id": "g:0:0", "generation_id": "g", "status": "completed", "result": 42, "agent": ""}],
    )
    # No agent hears of it.
    await assert_rows(session.messages, [])
    assert texts(await chunks_of(session)) == "One moment.It is 42."
    record = await claim_of(session)
    assert record is not None
    assert (record.state, record.holder) == ("done", "")


async def test_what_the_model_is_asked_is_what_chat_asks(session: Session) -> None:
    seen: list[tuple[str, ...]] = []

    class Prompted(ScriptedModel):
        async def stream(
            self, messages: Sequence[ModelMessage], **options: Any
        ) -> AsyncGenerator[Event, None]:
            seen.append(tuple(options["system_prompts"]))
            async for event in super().stream(messages, **options):
                yield event

    outside = Outside()
    prompts = ["Be brief.", "Be kind."]

    await outside.chat(adapter=Prompted(outside.play), system_prompts=prompts)

    assert seen == [("Be brief.", "Be kind.")] * 2
    assert outside.asked == [
        [("user", "Twice 21?")],
        [("user", "Twice 21?"), ("assistant", "One moment."), ("tool", "42")],
    ]


async def test_the_session_may_be_named_in_each_way(db: Database, session: Session) -> None:
    ways: list[dict[str, Any]] = [
        {"session": session},
        {"session": None, "tool_calls": session.tool_calls},
        {"session": None, "chunks": session.chunks},
        {"session": URL, "tool_calls": session.tool_calls, "chunks": session.chunks},
    ]
    for number, way in enumerate(ways):
        assert await Outside().chat(generation_id=f"g{number}", **way) == "It is 42."

    await assert_rows(session.generations, [{"status": "completed"}] * 4)
    assert [each.url for each in await db.sessions()] == [URL]


class Answer(BaseModel):
    number: int


async def test_a_structured_answer_is_returned_as_one_each_time(session: Session) -> None:
    model = ScriptedModel(["not JSON", '{"number": 42}'])

    for _ in range(2):
        answer = await durable_chat(
            adapter=model,
            messages=ASK,
            generation_id="g",
            session=session,
            output_schema=Answer,
        )
        assert answer == Answer(number=42)
    # Once it was told what was wrong.
    assert model.rounds_asked == 2


async def test_a_chat_that_fails_says_why_and_is_not_asked_again(session: Session) -> None:
    failure = ModelError("No credit.", retryable=False, code="insufficient_quota")
    model = ScriptedModel([failure, "Never said."])

    for _ in range(2):
        with pytest.raises(ModelError) as raised:
            await durable_chat(adapter=model, messages=ASK, generation_id="g", session=session)
        assert (raised.value.code, str(raised.value)) == ("insufficient_quota", "No credit.")

    assert model.rounds_asked == 1
    await assert_rows(session.generations, [{"status": "failed"}])


async def test_an_error_that_may_pass_is_tried_again(session: Session) -> None:
    model = ScriptedModel(["Hello."], fail_at=(0, 3))

    text = await durable_chat(
        adapter=model,
        messages=ASK,
        generation_id="g",
        session=session,
        retry=Retry(first_pause_ms=1),
    )

    assert text == "Hello."
    assert {attempt for attempt, _, _ in await chunks_of(session)} == {1, 2}


async def test_bounds_fail_the_chat(session: Session) -> None:
    with pytest.raises(ModelError) as raised:
        await Outside().chat(max_iterations=1)
    assert raised.value.code == "max_iterations"
    with pytest.raises(ModelError) as raised:
        await Outside().chat(generation_id="h", usage_limits=UsageLimits(max_tool_calls=0))
    assert raised.value.code == "usage_limit"
    outside = Outside()
    outside.tool_door.clear()
    with pytest.raises(ModelError) as raised:
        await outside.chat(generation_id="i", run_timeout_ms=50)
    assert raised.value.code == "run_timeout"
    await assert_rows(session.generations, [{"status": "failed"}] * 3)


# Called again.


async def test_a_finished_chat_is_answered_from_its_row(session: Session) -> None:
    outside = Outside()
    first = await outside.chat()

    for _ in range(2):
        assert await outside.chat() == first

    assert len(outside.asked) == 2
    assert outside.calls == [1]


async def test_one_id_stands_for_one_question(session: Session) -> None:
    outside = Outside()
    await outside.chat()
    await session.generations.insert(
        Generation(id="of-agent", agent="echo", status=GenerationStatus.RUNNING)
    )
    others: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Thrice 21?"}]},
        {"messages": [*ASK, *ASK]},
        {"system_prompts": ["Be brief."]},
        {"generation_id": "of-agent"},
    ]
    for other in others:
        with pytest.raises(ConflictError) as raised:
            await outside.chat(**other)
        assert raised.value.code == "generation_differs"
        assert raised.value.current is not None

    assert len(outside.asked) == 2


async def test_messages_may_be_given_as_values_or_mappings(session: Session) -> None:
    outside = Outside()
    await outside.chat()

    assert await outside.chat(messages=[ModelMessage("user", "Twice 21?")]) == "It is 42."
    assert len(outside.asked) == 2


POINTS = [
    name for name in crash_points() if name.startswith(("generation.", "round.", "calls.", "tool."))
]


@pytest.mark.parametrize("point", POINTS)
async def test_a_caller_that_dies_there_is_followed_by_one_that_goes_on(
    session: Session, point: str
) -> None:
    outside = Outside()
    async with crash_at(point) as crash:
        process, calling = start_elsewhere(lambda: outside.chat(lease_ms=SHORT_LEASE_MS))
        await crash.happened()
        with suppress(Exception):
            await calling
    record = await claim_of(session)
    assert record is not None
    # The end and giving up the claim are one commit.
    assert record.state == ("done" if point == "generation.ended" else "held")

    assert await outside.chat() == "It is 42."

    lost_rounds = 1 if point in ("round.heard", "generation.ending") else 0
    assert len(outside.asked) == 2 + lost_rounds
    assert outside.calls == {"tool.ran": [1, 2], "calls.written": [2]}.get(point, [1])
    await assert_rows(session.tool_calls, [{"status": "completed", "result": 42}])
    [generation] = await assert_rows(session.generations, [{"status": "completed"}])
    assert generation.interruptions <= 1
    await process.stop()


async def test_a_round_goes_on_from_what_was_said_of_it(session: Session) -> None:
    model = Halting(["It is ", "for"])
    process, calling = start_elsewhere(lambda: ask(model, lease_ms=SHORT_LEASE_MS))
    await eventually_said(session, "for")
    process.kill()
    with suppress(Exception):
        await calling
    model.words, model.ends = ["ty-two."], True

    assert await ask(model, on_crash="continue") == "It is forty-two."
    assert model.asked == ["Twice 21?", "It is for"]


# Several callers.


async def test_of_two_that_call_at_once_one_runs_and_both_get_the_answer(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    calling = [asyncio.create_task(outside.chat()) for _ in range(5)]
    await outside.tool_began.wait()
    outside.tool_door.set()

    assert await asyncio.gather(*calling) == ["It is 42."] * 5
    assert len(outside.asked) == 2
    assert outside.calls == [1]
    await assert_rows(session.generations, [{"attempt": 1, "interruptions": 0}])


async def test_one_that_waits_takes_over_when_the_other_dies(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    process, dying = start_elsewhere(lambda: outside.chat(lease_ms=SHORT_LEASE_MS))
    await outside.tool_began.wait()
    waiting = asyncio.create_task(outside.chat())
    await until_waiting(session)

    process.kill()
    outside.tool_door.set()

    assert await waiting == "It is 42."
    assert outside.calls == [1, 2]
    with pytest.raises(Exception, match="stopped"):
        await dying
    await assert_rows(session.generations, [{"status": "completed", "interruptions": 1}])
    await assert_rows(session.tool_calls, [{"status": "completed", "in_doubt": True}])


async def test_one_that_lost_its_claim_stops_and_gets_the_answer_of_the_other(
    session: Session,
) -> None:
    outside = Outside()
    outside.tool_door.clear()
    slow = asyncio.create_task(outside.chat())
    await outside.tool_began.wait()
    client = session.database.site_of(URL).client
    quick = asyncio.create_task(outside.chat())
    await until_waiting(session)
    await client.commit([Disown("durable_chat@")])
    await eventually(lambda q: q.from_(c=session.tool_calls), lambda calls: calls[0].attempt == 2)
    outside.tool_door.set()

    assert await quick == "It is 42."
    assert await slow == "It is 42."
    assert outside.calls == [1, 2]
    await assert_rows(session.generations, [{"status": "completed"}])


async def test_one_whose_lease_has_ended_is_stopped_in_the_middle(session: Session) -> None:
    outside = Outside()
    stopped = asyncio.Event()

    @tool
    async def double(n: int, ctx: ToolContext) -> int:
        """Double a number."""
        if ctx.attempt > 1:
            return 2 * n
        try:
            outside.tool_began.set()
            return await asyncio.Event().wait()
        finally:
            stopped.set()

    slow = asyncio.create_task(outside.chat(tools=[double], lease_ms=SHORT_LEASE_MS))
    await outside.tool_began.wait()
    client = session.database.site_of(URL).client
    await client.commit([Disown("durable_chat@")])

    # It goes on by itself, since nobody else has taken it.
    assert await slow == "It is 42."
    assert stopped.is_set()
    await assert_rows(session.tool_calls, [{"status": "completed", "attempt": 2}])


async def test_a_lease_is_renewed_while_the_chat_goes_on(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    slow = asyncio.create_task(outside.chat(lease_ms=SHORT_LEASE_MS))
    await outside.tool_began.wait()
    client = session.database.site_of(URL).client
    # Each renewal is a commit; several leases pass.
    before = (await client.status()).revision
    async with asyncio.timeout(20):
        while (await client.status()).revision < before + 8:
            await client.find(URL, "generations", "g")
    record = await claim_of(session)
    assert record is not None
    assert (record.state, record.attempt) == ("held", 1)
    outside.tool_door.set()

    assert await slow == "It is 42."
    assert outside.calls == [1]


# Stopping.


async def test_a_caller_that_is_cancelled_aborts_the_request_and_leaves_the_chat(
    session: Session,
) -> None:
    model = Halting(["It "])
    calling = asyncio.create_task(ask(model))
    await eventually_said(session, "It ")

    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling

    assert model.was_closed
    record = await claim_of(session)
    assert record is not None
    assert record.state == "free"
    model.words, model.ends = ["It is 42."], True
    # At once, whatever the lease.
    async with asyncio.timeout(5):
        assert await ask(model) == "It is 42."
    await assert_rows(session.generations, [{"status": "completed", "interruptions": 0}])


async def test_a_caller_that_is_cancelled_while_it_waits_disturbs_nobody(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    running = asyncio.create_task(outside.chat())
    await outside.tool_began.wait()
    waiting = asyncio.create_task(outside.chat())
    await until_waiting(session)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    outside.tool_door.set()

    assert await running == "It is 42."
    assert outside.calls == [1]


async def test_a_row_that_is_set_to_cancelled_ends_the_chat_for_all(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    calling = [asyncio.create_task(outside.chat()) for _ in range(2)]
    await outside.tool_began.wait()

    await session.generations.update("g", {"status": "cancelled", "error": "enough"})

    for call in [*calling, asyncio.create_task(outside.chat())]:
        with pytest.raises(RunCancelledError) as raised:
            await call
        assert raised.value.reason == "enough"
    await assert_rows(session.tool_calls, [{"status": "cancelled"}])
    await assert_rows(session.generations, [{"status": "cancelled", "output": None}])
    # The stream of chunks has an end as well.
    assert texts(await chunks_of(session)) == "One moment."


async def test_a_chat_whose_row_is_deleted_ends(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    running, waiting = (asyncio.create_task(outside.chat()) for _ in range(2))
    await outside.tool_began.wait()
    await until_waiting(session)

    await session.generations.delete("g")
    outside.tool_door.set()

    for call in (running, waiting):
        with pytest.raises(RunCancelledError) as raised:
            await call
        assert raised.value.reason == "deleted"
    await assert_rows(session.generations, [])


async def test_nothing_is_left_of_a_chat(session: Session) -> None:
    client = session.database.site_of(URL).client
    await Outside().chat(generation_id="warm-up")
    assert not client.feed._subscriptions
    before = len(asyncio.all_tasks())

    await Outside().chat()
    with pytest.raises(ModelError):
        await Outside().chat(generation_id="h", max_iterations=1)
    outside = Outside()
    outside.tool_door.clear()
    cancelled = asyncio.create_task(outside.chat(generation_id="i"))
    await outside.tool_began.wait()
    cancelled.cancel()
    await asyncio.wait([cancelled])

    assert not client.feed._subscriptions
    assert len(asyncio.all_tasks()) <= before


# Others who do a part.


def needs_approval(outside: Outside) -> Any:
    @tool(name="double", needs_approval=True)
    async def double(n: int) -> int:
        """Double a number."""
        outside.calls.append(n)
        return 2 * n

    return double


async def until_asked(session: Session) -> None:
    await assert_rows(session.tool_calls, [{"approval": "needed"}], within_ms=10_000)


async def test_a_tool_that_needs_an_approval_waits_for_it(session: Session) -> None:
    outside = Outside()
    calling = asyncio.create_task(outside.chat(tools=[needs_approval(outside)]))
    await until_asked(session)
    assert outside.calls == []

    await approve(session.tool_calls, "g:0:0")

    assert await calling == "It is 42."
    assert outside.calls == [21]


async def test_a_call_that_is_rejected_is_an_answer(session: Session) -> None:
    outside = Outside()
    calling = asyncio.create_task(outside.chat(tools=[needs_approval(outside)]))
    await until_asked(session)

    await reject(session.tool_calls, "g:0:0", reason="Not today.")

    assert "Not today." in await calling
    assert outside.calls == []


async def test_an_approval_that_came_while_nobody_ran_the_chat_is_found(session: Session) -> None:
    outside = Outside()
    tools = [needs_approval(outside)]
    calling = asyncio.create_task(outside.chat(tools=tools))
    await until_asked(session)
    calling.cancel()
    await asyncio.wait([calling])
    await approve(session.tool_calls, "g:0:0")

    assert await outside.chat(tools=tools) == "It is 42."
    assert outside.calls == [21]
    assert len(outside.asked) == 2
    await assert_rows(session.generations, [{"attempt": 1}])


async def test_a_chat_that_waits_for_an_approval_is_cancelled(session: Session) -> None:
    outside = Outside()
    calling = asyncio.create_task(outside.chat(tools=[needs_approval(outside)]))
    await until_asked(session)

    await session.generations.update("g", {"status": "cancelled"})

    with pytest.raises(RunCancelledError):
        await calling
    await assert_rows(session.tool_calls, [{"status": "cancelled"}])


class Number(BaseModel):
    n: int


async def test_a_tool_without_an_implementation_is_left_to_an_executor(session: Session) -> None:
    outside = Outside()
    calls = session.tool_calls
    only_told = declare_tool(name="double", description="Double.", input_schema=Number)
    calling = asyncio.create_task(outside.chat(tools=[only_told]))
    await assert_rows(calls, [{"status": "pending"}], within_ms=10_000)

    async with create_tool_execution_effect(
        query=lambda q: q.from_(c=calls).where(lambda c: eq(c.status, "pending")),
        tools=[outside.double],
        placement="here",
    ):
        assert await calling == "It is 42."

    assert outside.calls == [1]
    await assert_rows(calls, [{"id": "g:0:0", "status": "completed", "result": 42}])


async def test_a_job_cannot_wake_an_agent_that_is_none(session: Session) -> None:
    outside = Outside()
    job = make_async_tool(outside.double, session.tool_calls, wake_agent=True)

    assert "no_agent" in await outside.chat(tools=[job])


async def test_an_agent_of_the_session_leaves_chats_alone(session: Session) -> None:
    outside = Outside()
    outside.tool_door.clear()
    calling = asyncio.create_task(outside.chat())
    await outside.tool_began.wait()
    model = ScriptedModel(lambda messages: f"{len(messages)} message.")
    agent = create_agent(durable_agent(name="durable_chat", adapter=model, stream_url=URL))

    reply: AgentMessage = await agent.send("Hi.").reply(timeout_ms=10_000)
    outside.tool_door.set()

    assert reply.content == "1 message."
    assert await calling == "It is 42."
    assert outside.calls == [1]


# What cannot be.


async def refusal(options: dict[str, Any], generations: Any) -> Any:
    with pytest.raises((ConfigError, ContractError, ValueError)) as raised:
        await Outside().chat(**options)
    await assert_rows(generations, [])
    return raised.value


async def test_what_cannot_be_is_refused_before_anything_is_written(
    db: Database, session: Session
) -> None:
    other = db.session("aidb://chat/2")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"session": None}, "session_required"),
        ({"session": "aidb://chat/*"}, "session_required"),
        ({"session": "chat"}, "invalid_name"),
        ({"chunks": other.chunks}, "one_session"),
        ({"tool_calls": other.tool_calls}, "one_session"),
        ({"tool_calls": session.collection("tool_calls")}, "invalid_tool_calls"),
        ({"tool_calls": session.messages}, "invalid_tool_calls"),
        ({"generation_id": ""}, "invalid_id"),
        ({"generation_id": "a\0b"}, "invalid_id"),
        ({"generation_id": "\ud800"}, "invalid_id"),
        ({"generation_id": "g" * 1_001}, "invalid_id"),
        ({"adapter": object()}, "invalid_adapter"),
        ({"tools": [Outside().double, Outside().double]}, "duplicate_tool"),
        ({"max_iterations": 0}, "invalid_bound"),
        ({"lease_ms": 0}, "invalid_bound"),
        ({"on_crash": "hope"}, "invalid_option"),
    ]
    for options, code in cases:
        error = await refusal(options, session.generations)
        assert getattr(error, "code", None) == code, options
    malformed = {"messages": [{"role": "robot"}]}
    assert isinstance(await refusal(malformed, session.generations), ValueError)


async def test_the_longest_id_is_kept(session: Session) -> None:
    longest = "g" * 1_000

    assert await Outside().chat(generation_id=longest) == "It is 42."
    await assert_rows(session.tool_calls, [{"id": f"{longest}:0:0"}])


# Helpers that come last because they are only waited with.


class Halting:
    """A model that says some words and then no more, until it is to answer to the end."""

    def __init__(self, words: list[str]) -> None:
        self.asked: list[str] = []
        self.words = words
        self.ends = False
        self.was_closed = False

    async def stream(
        self, messages: Sequence[ModelMessage], **_: object
    ) -> AsyncGenerator[Event, None]:
        self.asked.append(messages[-1].content)
        writer = RoundWriter()
        writer.texts(self.words, "m")
        try:
            for event in writer.take():
                yield event
            if not self.ends:
                await asyncio.Event().wait()
            writer.finish("stop")
            for event in writer.take():
                yield event
        finally:
            self.was_closed = True


async def ask(model: Halting, **options: Any) -> str:
    return await durable_chat(
        adapter=model, messages=ASK, generation_id="g", session=URL, **options
    )


async def eventually_said(session: Session, text: str) -> None:
    """Wait until a text is stored."""
    async for chunk in replay(session.chunks, generation_id="g"):
        if chunk.content == text:
            return


async def until_waiting(session: Session) -> None:
    """Wait until somebody waits for a claim."""
    feed = session.database.site_of(URL).client.feed
    await until(lambda: CLAIMS in {each.filter.collection for each in feed._subscriptions})
