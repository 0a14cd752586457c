from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence

import pytest
from ag_ui.core import Event

from aidb_ray.errors import ModelError
from aidb_ray.models.base import ModelMessage, ToolCallRequest, Usage, adapter_fingerprint
from aidb_ray.models.round import Round
from aidb_ray.testing import CallTool, FakeClock, Reply, Say, ScriptedModel, Think

HELLO = [ModelMessage("user", "Hello")]


async def play(
    model: ScriptedModel,
    messages: Sequence[ModelMessage] = HELLO,
    *,
    into: Round | None = None,
) -> Round:
    heard = into or Round()
    async for event in model.stream(messages):
        heard.add(event)
    return heard


async def until(is_true: Callable[[], bool]) -> None:
    """Let other tasks run until `is_true`, for a bounded number of turns."""
    for _ in range(100):
        if is_true():
            return
        await asyncio.sleep(0)
    raise AssertionError("It did not become true.")


async def types_of(model: ScriptedModel) -> list[str]:
    return [event.type.value async for event in model.stream(HELLO)]


async def test_a_list_is_taken_reply_by_reply() -> None:
    model = ScriptedModel(["one", Say("two"), ["th", "ree"]])

    assert [(await play(model)).text for _ in range(3)] == ["one", "two", "three"]
    with pytest.raises(ModelError) as caught:
        await play(model)
    assert caught.value.code == "script_ended"
    assert not caught.value.retryable
    assert model.rounds_asked == 4


async def test_a_function_answers_the_conversation() -> None:
    async def answer(messages: Sequence[ModelMessage]) -> Reply:
        await asyncio.sleep(0)
        return f"{len(messages)} messages"

    plain = ScriptedModel(lambda messages: messages[-1].content.upper())

    assert (await play(plain)).text == "HELLO"
    assert (await play(ScriptedModel(answer))).text == "1 messages"


async def test_text_is_streamed_word_by_word_and_nothing_is_lost() -> None:
    text = "  Two\nlines,  and more. "
    stream = [event async for event in ScriptedModel([text]).stream(HELLO)]
    deltas = [delta for event in stream if (delta := getattr(event, "delta", None))]

    assert deltas == ["  ", "Two\n", "lines,  ", "and ", "more. "]
    assert "".join(deltas) == text


async def test_a_round_has_the_shape_of_ag_ui() -> None:
    model = ScriptedModel([[Think("hm"), "a", "b", CallTool("f"), CallTool("f")]])

    assert await types_of(model) == [
        "STEP_STARTED",
        "REASONING_START",
        "REASONING_MESSAGE_START",
        "REASONING_MESSAGE_CONTENT",
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        *["TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END"] * 2,
        "STEP_FINISHED",
    ]


async def test_a_round_says_which_tools_it_wants() -> None:
    model = ScriptedModel(
        [[CallTool("add", {"a": 1}), CallTool("add", "not json", id="mine")], CallTool("now")]
    )

    parallel, single = await play(model), await play(model)

    assert parallel.tool_calls == [
        ToolCallRequest("call-1-0", "add", '{"a":1}'),
        ToolCallRequest("mine", "add", "not json"),
    ]
    assert parallel.finish_reason == "tool_calls"
    assert single.tool_calls == [ToolCallRequest("call-1-0", "now", "{}")]


async def test_the_same_conversation_gives_the_same_events_in_any_process() -> None:
    def script(messages: Sequence[ModelMessage]) -> Reply:
        return [Think("so"), "a", CallTool("f")]

    async def events(model: ScriptedModel) -> list[Event]:
        return [event async for event in model.stream(HELLO * 3)]

    assert await events(ScriptedModel(script)) == await events(ScriptedModel(script))


async def test_usage_counts_messages_and_fragments() -> None:
    heard = await play(ScriptedModel([["a", "b", "c"]]), HELLO * 4)

    assert heard.usage == Usage(4, 3)
    assert heard.finish_reason == "stop"


async def test_a_round_can_be_made_to_fail_before_it_begins() -> None:
    model = ScriptedModel(["one", "two"], fail_at=1)

    assert (await play(model)).text == "one"
    with pytest.raises(ModelError) as caught:
        await play(model)
    assert caught.value.code == "scripted_failure"
    assert caught.value.retryable
    assert (await play(model)).text == "two"


async def test_a_round_can_be_made_to_fail_half_way() -> None:
    model = ScriptedModel([["a", "b", "c"]], fail_at=(0, 3))
    heard = Round()

    with pytest.raises(ModelError):
        await play(model, into=heard)

    assert heard.text == "a"
    assert not heard.is_finished
    assert (await play(model)).text == "abc"


async def test_an_exception_in_a_reply_is_raised_in_its_place() -> None:
    model = ScriptedModel([["a", ModelError("out", retryable=False), "b"], "after"])
    heard = Round()

    with pytest.raises(ModelError, match="out"):
        await play(model, into=heard)

    assert heard.text == "a"
    assert (await play(model)).text == "after"


async def test_fragments_come_at_the_given_rate() -> None:
    clock = FakeClock()
    model = ScriptedModel([["a", "b"]], tokens_per_second=100, clock=clock)

    async def listen() -> list[int]:
        return [
            clock.now_ms()
            async for event in model.stream(HELLO)
            if event.type.value == "TEXT_MESSAGE_CONTENT"
        ]

    listening = asyncio.create_task(listen())
    for _ in range(2):
        await until(lambda: clock.sleepers == 1)
        clock.advance(10)

    assert await listening == [10, 20]


async def test_it_pickles_and_begins_anew() -> None:
    model = ScriptedModel(["one", "two"], fail_at=1)
    await play(model)

    copy: ScriptedModel = pickle.loads(pickle.dumps(model))

    assert (await play(copy)).text == "one"
    assert adapter_fingerprint(copy) == adapter_fingerprint(model)


def test_a_script_must_be_a_list_or_a_function() -> None:
    with pytest.raises(TypeError, match="list"):
        ScriptedModel("hello")
    with pytest.raises(ValueError, match="tokens_per_second"):
        ScriptedModel(["a"], tokens_per_second=0)


async def test_a_fake_clock_wakes_sleepers_in_order() -> None:
    clock = FakeClock(now_ms=1_000)
    woken: list[str] = []

    async def sleep(name: str, duration_ms: float) -> None:
        await clock.sleep_ms(duration_ms)
        woken.append(name)

    sleepers = [
        asyncio.create_task(sleep(name, ms)) for name, ms in [("c", 30), ("a", 10), ("b", 20)]
    ]
    gone = asyncio.create_task(sleep("cancelled", 5))
    await sleep("now", 0)
    await until(lambda: clock.sleepers == 4)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert clock.sleepers == 3

    clock.advance(25)
    await until(lambda: len(woken) == 3)

    assert woken == ["now", "a", "b"]
    assert clock.sleepers == 1
    assert clock.now_ms() == 1_025
    clock.advance(5)
    await asyncio.gather(*sleepers)
    with pytest.raises(ValueError, match="back"):
        clock.advance(-1)
