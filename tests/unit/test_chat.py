from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from ag_ui.core import (
    Event,
    RunErrorEvent,
    RunFinishedEvent,
    RunStartedEvent,
    TextMessageContentEvent,
    ToolCallResultEvent,
)
from pydantic import BaseModel

from aidb_ray.errors import ConfigError, ModelError, ToolError
from aidb_ray.models.base import ModelMessage, TextAdapter, parse_messages, stream_round
from aidb_ray.models.chat import MAX_OUTPUT_REPAIRS, MAX_RUNNING_TOOLS, chat
from aidb_ray.models.round import Round
from aidb_ray.models.tools import Tool, ToolContext, declare_tool, tool
from aidb_ray.testing import CallTool, Reply, ScriptedModel

HELLO = [{"role": "user", "content": "Hello"}]


class Answer(BaseModel):
    value: int


@tool
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Recorded:
    """A script that keeps the conversations it was given."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.conversations: list[list[ModelMessage]] = []

    def __call__(self, messages: Sequence[ModelMessage]) -> Reply:
        self.conversations.append(list(messages))
        return self.replies[len(self.conversations) - 1]


async def run(
    script: Any,
    *,
    tools: Sequence[Tool] = (),
    max_iterations: int = 10,
    output_schema: type[BaseModel] | None = None,
) -> list[Event]:
    events: list[Event] = []
    stream = chat(
        adapter=ScriptedModel(script),
        messages=HELLO,
        tools=tools,
        max_iterations=max_iterations,
        output_schema=output_schema,
    )
    await collect(stream, events)
    return events


async def collect(stream: AsyncGenerator[Event, None], into: list[Event]) -> None:
    async for event in stream:
        into.append(event)  # noqa: PERF401  What came before a failure must be kept.


async def test_the_whole_answer_can_be_awaited() -> None:
    assert await chat(adapter=ScriptedModel(["Good day."]), messages=HELLO, stream=False) == (
        "Good day."
    )


async def test_a_run_is_streamed_as_ag_ui_events() -> None:
    events = await run(["Hi"])

    assert [event.type.value for event in events] == [
        "RUN_STARTED",
        "STEP_STARTED",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "STEP_FINISHED",
        "RUN_FINISHED",
    ]
    started, finished = events[0], events[-1]
    assert isinstance(started, RunStartedEvent)
    assert isinstance(finished, RunFinishedEvent)
    assert (started.thread_id, started.run_id) == (finished.thread_id, finished.run_id)


async def test_a_tool_is_run_and_its_result_is_given_to_the_model() -> None:
    script = Recorded(["Let me add. ", CallTool("add", {"a": 1, "b": 2})], "3")

    events = await run(script, tools=[add])

    assert script.conversations[1] == [
        ModelMessage("user", "Hello"),
        ModelMessage("assistant", "Let me add. ", tool_calls=script.conversations[1][1].tool_calls),
        ModelMessage("tool", "3", tool_call_id="call-1-0", name="add"),
    ]
    assert [e.content for e in events if isinstance(e, ToolCallResultEvent)] == ["3"]
    finished = events[-1]
    assert isinstance(finished, RunFinishedEvent)
    assert finished.usage is not None
    assert (finished.usage[0].input_tokens, finished.usage[0].output_tokens) == (1 + 3, 2 + 1)


async def test_calls_of_one_round_run_at_once_and_are_answered_in_order() -> None:
    both = asyncio.Barrier(2)

    @tool
    async def meet(name: str) -> str:
        await both.wait()
        return name

    script = Recorded([CallTool("meet", {"name": "a"}), CallTool("meet", {"name": "b"})], "met")
    events = await run(script, tools=[meet])

    assert [e.content for e in events if isinstance(e, ToolCallResultEvent)] == ["a", "b"]
    assert [m.content for m in script.conversations[1][-2:]] == ["a", "b"]


async def test_the_number_of_running_tools_is_bounded() -> None:
    running = most = 0

    @tool
    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1

    await run([[CallTool("count")] * (MAX_RUNNING_TOOLS * 3), "done"], tools=[count])

    assert most == MAX_RUNNING_TOOLS


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (CallTool("subtract", {}), "unknown_tool"),
        (CallTool("add", {"a": "1", "b": 2}), "invalid_args"),
        (CallTool("add", '{"a": 1, '), "invalid_args"),
        (CallTool("fail"), "mine"),
    ],
)
async def test_a_call_that_goes_wrong_is_an_answer_and_the_loop_goes_on(
    call: CallTool, code: str
) -> None:
    @tool
    def fail() -> None:
        raise ToolError("No.", code="mine")

    script = Recorded(call, "I see.")
    events = await run(script, tools=[add, fail])

    assert json.loads(script.conversations[1][-1].content)["error"] == code
    assert isinstance(events[-1], RunFinishedEvent)


async def test_each_call_has_an_idempotency_key_of_its_own() -> None:
    keys: list[str] = []

    @tool
    async def note(ctx: ToolContext) -> None:
        keys.append(ctx.idempotency_key)

    await run([[CallTool("note"), CallTool("note")], "done"], tools=[note])
    await run([CallTool("note"), "done"], tools=[note])

    assert len(set(keys)) == 3


async def test_a_model_that_never_answers_is_stopped_before_its_last_calls_run() -> None:
    ran: list[int] = []

    @tool
    async def again(n: int) -> None:
        ran.append(n)

    def script(messages: Sequence[ModelMessage]) -> Reply:
        return CallTool("again", {"n": len(messages)})

    with pytest.raises(ModelError) as caught:
        await run(script, tools=[again], max_iterations=3)

    assert caught.value.code == "max_iterations"
    assert not caught.value.retryable
    assert ran == [1, 3]


async def test_a_structured_answer_is_an_instance() -> None:
    answer = await chat(
        adapter=ScriptedModel(['{"value": 42}']),
        messages=HELLO,
        output_schema=Answer,
        stream=False,
    )
    events = await run(['{"value": 42}'], output_schema=Answer)

    assert answer == Answer(value=42)
    finished = events[-1]
    assert isinstance(finished, RunFinishedEvent)
    assert finished.result == {"value": 42}


async def test_a_wrong_structured_answer_is_sent_back_with_what_is_wrong() -> None:
    script = Recorded("forty-two", '{"value": "many"}', '{"value": 42}')

    answer = await chat(
        adapter=ScriptedModel(script), messages=HELLO, output_schema=Answer, stream=False
    )

    assert answer == Answer(value=42)
    assert script.conversations[2][1] == ModelMessage("assistant", "forty-two")
    assert "JSON" in script.conversations[2][2].content
    assert "value" in script.conversations[2][4].content


async def test_a_structured_answer_that_says_two_things_is_sent_back() -> None:
    script = Recorded('{"value": 41, "value": 42}', '{"value": 42}')

    answer = await chat(
        adapter=ScriptedModel(script), messages=HELLO, output_schema=Answer, stream=False
    )

    assert answer == Answer(value=42)
    assert "twice" in script.conversations[1][2].content


async def test_wrong_structured_answers_come_to_an_end() -> None:
    script = Recorded(*["no"] * 10)

    with pytest.raises(ModelError) as caught:
        await run(script, output_schema=Answer)

    assert caught.value.code == "invalid_output"
    assert len(script.conversations) == 1 + MAX_OUTPUT_REPAIRS


async def test_a_failure_ends_the_stream_with_an_error_event_and_raises() -> None:
    heard: list[Event] = []
    failing = ScriptedModel([["a", ModelError("Broken.", code="gone", retryable=True)]])

    with pytest.raises(ModelError, match="Broken"):
        await collect(chat(adapter=failing, messages=HELLO), heard)

    last = heard[-1]
    assert isinstance(last, RunErrorEvent)
    assert (last.code, last.message) == ("gone", "Broken.")


class Foreign:
    """An adapter that streams the events it is given."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    async def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        for event in self.events:
            yield event


async def test_an_adapter_with_a_run_of_its_own_adds_no_second_run() -> None:
    foreign = Foreign(
        RunStartedEvent(thread_id="x", run_id="y"),
        TextMessageContentEvent(message_id="m", delta="Hi"),
        RunFinishedEvent(thread_id="x", run_id="y"),
    )
    events = [event async for event in chat(adapter=foreign, messages=HELLO)]

    assert [event.type.value for event in events] == [
        "RUN_STARTED",
        "TEXT_MESSAGE_CONTENT",
        "RUN_FINISHED",
    ]
    assert all(getattr(event, "run_id", "") != "y" for event in events)


@pytest.mark.parametrize(
    ("foreign", "code"),
    [
        (Foreign(TextMessageContentEvent(message_id="m", delta="Hi")), "truncated"),
        (Foreign(RunErrorEvent(message="quota")), "model_error"),
    ],
)
async def test_a_round_that_does_not_finish_is_a_failure(foreign: Foreign, code: str) -> None:
    with pytest.raises(ModelError) as caught:
        await chat(adapter=foreign, messages=HELLO, stream=False)

    assert caught.value.code == code


class Hanging:
    """An adapter that says one word, then nothing, and notes that it was stopped."""

    def __init__(self) -> None:
        self.is_waiting = asyncio.Event()
        self.was_stopped = False

    async def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        try:
            yield TextMessageContentEvent(message_id="m", delta="Wait")
            self.is_waiting.set()
            await asyncio.Event().wait()
        finally:
            self.was_stopped = True


async def test_cancelling_the_awaiting_task_stops_the_adapter() -> None:
    adapter = Hanging()
    answering = asyncio.create_task(chat(adapter=adapter, messages=HELLO, stream=False))
    await adapter.is_waiting.wait()

    answering.cancel()

    with pytest.raises(asyncio.CancelledError):
        await answering
    assert adapter.was_stopped


async def test_closing_the_stream_stops_the_adapter() -> None:
    adapter = Hanging()

    async with aclosing(chat(adapter=adapter, messages=HELLO)) as events:
        async for event in events:
            if isinstance(event, TextMessageContentEvent):
                break

    assert adapter.was_stopped


async def test_cancelling_a_run_cancels_its_tools() -> None:
    started, signals = asyncio.Event(), list[ToolContext]()

    @tool
    async def hang(ctx: ToolContext) -> None:
        signals.append(ctx)
        started.set()
        await asyncio.Event().wait()

    model = ScriptedModel([CallTool("hang")])
    answering = asyncio.create_task(chat(adapter=model, messages=HELLO, tools=[hang], stream=False))
    await started.wait()
    answering.cancel()

    with pytest.raises(asyncio.CancelledError):
        await answering
    assert signals[0].signal.is_aborted


def test_what_chat_cannot_do_is_refused_before_anything_starts() -> None:
    model = ScriptedModel(["never"])
    elsewhere = declare_tool(name="elsewhere", description="", input_schema=Answer)
    guarded = tool(name="guarded", needs_approval=True)(lambda: None)

    refused: list[tuple[Any, str]] = [
        ([add, add], "duplicate_tool"),
        ([print], "not_a_tool"),
        ([elsewhere], "missing_implementation"),
        ([guarded], "approval_unsupported"),
    ]
    for tools, code in refused:
        with pytest.raises(ConfigError) as caught:
            chat(adapter=model, messages=HELLO, tools=tools)
        assert caught.value.code == code
    wrong: Any = "gpt-4o"
    with pytest.raises(ConfigError, match="openai_text") as caught:
        chat(adapter=wrong, messages=HELLO)
    assert caught.value.code == "invalid_adapter"
    with pytest.raises(ValueError, match="max_iterations"):
        chat(adapter=model, messages=HELLO, max_iterations=0)
    assert model.rounds_asked == 0


@pytest.mark.parametrize(
    "message", [{"role": "robot"}, {"role": "user", "text": "Hi"}, {"content": "Hi"}, 5]
)
def test_a_malformed_message_is_refused(message: Any) -> None:
    with pytest.raises(ValueError, match=r"role|text|object|ModelMessage"):
        chat(adapter=ScriptedModel(["never"]), messages=[message])


async def test_one_round_can_be_had_alone() -> None:
    def script(messages: Sequence[ModelMessage]) -> Reply:
        return [messages[-1].content, CallTool("add", {"a": 1, "b": 1})]

    model: TextAdapter = ScriptedModel(script)
    heard = Round()

    async for event in stream_round(model, HELLO, tools=[add]):
        heard.add(event)

    assert heard.text == "Hello"
    assert heard.to_message().tool_calls[0].name == "add"
    assert parse_messages([heard.to_message()]) == [heard.to_message()]
