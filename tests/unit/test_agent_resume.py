"""A round whose last chunk is durable is finished: its rows are rebuilt, the model is not asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from aidb_ray import AgentMessage, Database, Generation, connect, create_agent, durable_agent, tool
from aidb_ray.chunks import ChunkBuffer
from aidb_ray.contracts import GenerationStatus
from aidb_ray.models.base import ModelMessage, stream_round
from aidb_ray.models.events import EventEncoder
from aidb_ray.testing import CallTool, Part, ScriptedModel

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
