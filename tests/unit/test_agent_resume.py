"""What becomes of a model round whose process died: finished ones are rebuilt, others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import pytest
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray import (
    AgentMessage,
    Database,
    Generation,
    Retry,
    connect,
    create_agent,
    durable_agent,
    replay,
    tool,
)
from aidb_ray.agents.continuation import put_taken_over
from aidb_ray.chunks import ChunkBuffer
from aidb_ray.contracts import GenerationStatus
from aidb_ray.models.base import ModelMessage, stream_round
from aidb_ray.models.events import EventEncoder
from aidb_ray.models.writer import RoundWriter
from aidb_ray.testing import CallTool, Part, Reply, Say, ScriptedModel

URL = "aidb://echo/1"


@tool
async def double(number: int) -> int:
    """Double a number."""
    return 2 * number


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


async def interrupt_run(db: Database, parts: Sequence[Part], *, leave_out: int = 0) -> None:
    """Leave what a process leaves that died after the chunks of its first round were durable."""
    session = db.session(URL)
    await session.messages.insert(
        AgentMessage(id="m", role="user", actor_id="me", target_agent="echo", content="7?")
    )
    await session.generations.insert(
        Generation(id="g", agent="echo", status=GenerationStatus.RUNNING, message_ids=["m"])
    )
    buffer = ChunkBuffer(URL, "g", next_index=0, attempt=1)
    encode = EventEncoder().encode
    model = ScriptedModel([list(parts)])
    chunks = [encode(event) async for event in stream_round(model, [ModelMessage("user", "7?")])]
    for chunk in chunks[: len(chunks) - leave_out]:
        buffer.add(*chunk)
    taken = buffer.take()
    assert taken is not None
    await db.site_of(URL).client.commit([taken[0]], chunks=taken[1])


async def test_a_reply_that_was_streamed_to_its_end_is_written_without_the_model(
    db: Database,
) -> None:
    await interrupt_run(db, ["It ", "is ", "14."])
    model = ScriptedModel(["I was asked again."])

    agent = create_agent(durable_agent(name="echo", adapter=model))
    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=10_000)

    assert reply.content == "It is 14."
    assert model.rounds_asked == 0


async def test_tool_calls_that_were_streamed_to_their_end_run_without_the_model(
    db: Database,
) -> None:
    await interrupt_run(db, [CallTool("double", {"number": 7})])
    model = ScriptedModel(lambda messages: f"It is {messages[-1].content}.")

    agent = create_agent(durable_agent(name="echo", adapter=model, tools=[double]))
    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=10_000)

    assert reply.content == "It is 14."
    assert model.rounds_asked == 1


async def test_a_reply_that_broke_off_before_its_last_chunk_is_asked_for_again(
    db: Database,
) -> None:
    await interrupt_run(db, ["It ", "is ", "14."], leave_out=1)
    model = ScriptedModel(["I was asked again."])

    agent = create_agent(durable_agent(name="echo", adapter=model))
    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=10_000)

    assert reply.content == "I was asked again."
    assert model.rounds_asked == 1


# Going on with what was said.


class Told:
    """A model that says what it is told to, and what it was asked."""

    def __init__(self, *replies: Reply, **options: Any) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self._replies = list(replies)
        self.adapter = ScriptedModel(self._play, **options)

    def _play(self, messages: Sequence[ModelMessage]) -> Reply:
        self.asked.append([(message.role, message.content) for message in messages])
        return self._replies.pop(0)


async def go_on(db: Database, model: Told, **options: Any) -> AgentMessage:
    agent = create_agent(
        durable_agent(
            name="echo",
            adapter=model.adapter,
            on_crash="continue",
            retry=Retry(first_pause_ms=1),
            **options,
        )
    )
    return await agent.reply_to("m", session=URL).reply(timeout_ms=10_000)


async def stream_of(db: Database, *, attempts: Any = "all") -> list[tuple[str, str]]:
    chunks = db.session(URL).chunks
    told = replay(chunks, generation_id="g", attempts=attempts)
    return [(chunk.type, chunk.content) async for chunk in told]


async def test_a_round_goes_on_from_what_was_stored_of_it(db: Database) -> None:
    await interrupt_run(db, ["It ", "is ", "14."], leave_out=3)
    model = Told("14.")

    reply = await go_on(db, model)

    assert model.asked == [[("user", "7?"), ("assistant", "It is ")]]
    assert reply.content == "It is 14."
    told = await stream_of(db, attempts="last")
    assert told[0] == ("CUSTOM", '{"name":"attempt","value":2}')
    assert [kind for kind, _ in told[1:5]] == [
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "STEP_STARTED",
    ]
    texts = [text for kind, text in told if kind == "TEXT_MESSAGE_CONTENT"]
    assert texts == ["It is ", "14."]


async def test_where_nothing_is_stored_the_round_starts_again(db: Database) -> None:
    await interrupt_run(db, ["It ", "is ", "14."], leave_out=5)
    model = Told("It is 14.")

    reply = await go_on(db, model)

    assert model.asked == [[("user", "7?")]]
    assert reply.content == "It is 14."
    assert [kind for kind, _ in await stream_of(db, attempts="last")][:2] == [
        "CUSTOM",
        "STEP_STARTED",
    ]


async def test_a_call_that_was_begun_is_dropped_and_the_text_before_it_kept(db: Database) -> None:
    # Without the end of the call and that of the round.
    await interrupt_run(db, [Say("Let me "), CallTool("double", {"number": 8})], leave_out=2)
    model = Told([Say("see."), CallTool("double", {"number": 7})], "It is 14.")

    reply = await go_on(db, model, tools=[double])

    assert model.asked[0] == [("user", "7?"), ("assistant", "Let me ")]
    # The round after it is asked for as any other.
    assert model.asked[1] == [("user", "7?"), ("assistant", "Let me see."), ("tool", "14")]
    assert reply.content == "It is 14."
    session = db.session(URL)
    [call] = await db.query(lambda q: q.from_(c=session.tool_calls))
    [generation] = await db.query(lambda q: q.from_(g=session.generations))
    assert call.args == {"number": 7}
    assert generation.rounds == ["Let me see."]


async def test_a_continuation_that_fails_begins_where_it_began(db: Database) -> None:
    await interrupt_run(db, ["It ", "is ", "14."], leave_out=3)
    # Fails after its first word.
    model = Told("four teen.", "14.", fail_at=(0, 3))

    reply = await go_on(db, model)

    assert reply.content == "It is 14."
    assert model.asked == [[("user", "7?"), ("assistant", "It is ")]] * 2
    assert [text for kind, text in await stream_of(db, attempts="last") if "CONTENT" in kind] == [
        "It is ",
        "14.",
    ]


class Answer(BaseModel):
    number: int


async def test_what_was_stored_and_what_comes_are_one_structured_answer(db: Database) -> None:
    await interrupt_run(db, ['{"num', 'ber": ', "14}"], leave_out=3)

    reply = await go_on(db, Told("14}"), output_schema=Answer)

    assert Answer.model_validate_json(reply.content).number == 14


class Halting:
    """A model that says some words and then no more, until it is to answer to the end."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.words: list[str] = []
        self.ends = False

    async def stream(
        self, messages: Sequence[ModelMessage], **_: object
    ) -> AsyncGenerator[Event, None]:
        self.asked.append(messages[-1].content)
        writer = RoundWriter()
        writer.texts(self.words, "m")
        for event in writer.take():
            yield event
        if not self.ends:
            await asyncio.Event().wait()
        writer.finish("stop")
        for event in writer.take():
            yield event


async def test_a_round_is_continued_as_often_as_its_process_ends(db: Database) -> None:
    model = Halting()

    async def live(*words: str) -> None:
        """Let a process say these words, and end it once they are stored."""
        model.words = list(words)
        agent = create_agent(durable_agent(name="echo", adapter=model, on_crash="continue"))
        sent = agent.send("7?", session=URL, message_id="m")
        async for event in sent:
            if getattr(event, "delta", "") == words[-1]:
                break
        await agent.aclose()

    await live("It ", "is ")
    await live("four", "te")
    model.words, model.ends = ["en."], True
    agent = create_agent(durable_agent(name="echo", adapter=model, on_crash="continue"))
    reply = await agent.reply_to("m", session=URL).reply(timeout_ms=10_000)

    assert reply.content == "It is fourteen."
    assert model.asked == ["7?", "It is ", "It is fourte"]


async def test_a_continued_round_that_was_streamed_to_its_end_is_not_asked_for_again(
    db: Database,
) -> None:
    await interrupt_run(db, ["It ", "is ", "14."], leave_out=3)
    client = db.site_of(URL).client
    page = await client.read_chunks(URL, "g")
    buffer = ChunkBuffer(URL, "g", next_index=page.next_index, attempt=2)
    buffer.begin_attempt()
    put_taken_over(buffer, "It is ")
    writer = RoundWriter()
    writer.texts(["14."], "m")
    writer.finish("stop")
    encode = EventEncoder().encode
    for event in writer.take():
        buffer.add(*encode(event))
    taken = buffer.take()
    assert taken is not None
    await client.commit([taken[0]], chunks=taken[1])
    model = Told()

    reply = await go_on(db, model)

    assert reply.content == "It is 14."
    assert model.asked == []
