"""The OpenAI adapter against aimock over real HTTP, in both protocols."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx2
import pytest
from ag_ui.core import RunFinishedEvent, TextMessageContentEvent, ToolCallResultEvent
from pydantic import BaseModel

from aidb_ray.errors import ModelError
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.chat import chat
from aidb_ray.models.openai import Api, Backoff, OpenAIText, Timeouts
from aidb_ray.models.round import Round
from aidb_ray.models.tools import tool

pytestmark = pytest.mark.interop


class Point(BaseModel):
    x: int
    y: int


@pytest.fixture(params=["chat", "responses"])
async def model(request: pytest.FixtureRequest, aimock_url: str) -> AsyncIterator[OpenAIText]:
    model = make(aimock_url, request.param)
    yield model
    await model.aclose()


def make(url: str, api: Api, **more: Any) -> OpenAIText:
    more = {"backoff": Backoff(first_ms=1)} | more
    # aimock matches `responseFormat` in Chat Completions only; the other it knows by this name.
    name = "gpt-5" if api == "chat" else "gpt-5-responses"
    return OpenAIText(name, api=api, base_url=f"{url}/v1", api_key="test", **more)


async def hear(model: OpenAIText, text: str, into: Round | None = None, **more: Any) -> Round:
    heard = into or Round()
    async for event in model.stream([ModelMessage("user", text)], **more):
        heard.add(event)
    return heard


async def test_an_answer_is_streamed_in_pieces(model: OpenAIText) -> None:
    deltas = [
        event.delta
        async for event in model.stream([ModelMessage("user", "say hello")])
        if isinstance(event, TextMessageContentEvent)
    ]

    assert "".join(deltas) == "Hello, this is a streamed answer."
    assert len(deltas) > 2


async def test_usage_is_reported(model: OpenAIText) -> None:
    heard = await hear(model, "count tokens")

    assert heard.usage is not None
    assert (heard.usage.input_tokens, heard.usage.output_tokens) == (21, 5)
    assert heard.finish_reason == "stop"


async def test_parallel_tool_calls_are_run_and_answered(model: OpenAIText) -> None:
    asked: list[str] = []

    @tool
    async def weather(city: str) -> str:
        """Look up the weather."""
        asked.append(city)
        return f"weather of {city}"

    events = [
        event
        async for event in chat(
            adapter=model,
            messages=[{"role": "user", "content": "weather in two cities"}],
            tools=[weather],
        )
    ]

    texts = [event.delta for event in events if isinstance(event, TextMessageContentEvent)]
    results = [event for event in events if isinstance(event, ToolCallResultEvent)]
    assert asked == ["Oslo", "Rome"]
    assert [(each.tool_call_id, each.content) for each in results] == [
        ("call_oslo", "weather of Oslo"),
        ("call_rome", "weather of Rome"),
    ]
    assert "".join(texts) == "Let me look both up.Oslo is cold and Rome is warm."
    assert isinstance(events[-1], RunFinishedEvent)


async def test_reasoning_is_shown_apart_from_the_answer(model: OpenAIText) -> None:
    heard = await hear(model, "think about it")

    assert heard.reasoning == "Six times seven makes forty-two."
    assert heard.text == "It is 42."


async def test_encrypted_reasoning_is_kept_for_the_next_round(aimock_url: str) -> None:
    model = make(aimock_url, "responses", options={"include": ["reasoning.encrypted_content"]})

    heard = await hear(model, "think about it")
    again = [
        ModelMessage("user", "say hello"),
        heard.to_message(),
        ModelMessage("user", "say hello"),
    ]
    answer = [event async for event in model.stream(again)]
    await model.aclose()

    assert len(heard.to_message().reasoning) == 1
    assert "encrypted_content" in heard.to_message().reasoning[0]
    assert answer


async def test_a_structured_answer_is_an_instance(model: OpenAIText) -> None:
    answer = await chat(
        adapter=model,
        messages=[{"role": "user", "content": "give a point"}],
        output_schema=Point,
        stream=False,
    )

    assert answer == Point(x=3, y=4)


async def test_an_answer_that_is_cut_off_is_an_error_that_a_retry_may_mend(
    model: OpenAIText,
) -> None:
    heard = Round()

    with pytest.raises(ModelError) as caught:
        await hear(model, "stop half way", heard)

    assert (caught.value.code, caught.value.retryable) == ("truncated", True)
    assert "This answer is much longer".startswith(heard.text[:20])
    assert not heard.is_finished


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_wait_that_the_server_asks_for_is_kept(aimock_url: str, api: Api) -> None:
    await restart(aimock_url)
    model = make(aimock_url, api)
    began = time.monotonic()

    heard = await hear(model, "busy once")
    await model.aclose()

    assert heard.text == "Now there is time."
    assert time.monotonic() - began >= 1


async def test_a_wait_that_is_too_long_is_left_to_the_caller(model: OpenAIText) -> None:
    with pytest.raises(ModelError) as caught:
        await hear(model, "busy for long")

    assert caught.value.code == "rate_limited"
    assert caught.value.retry_after_ms == 600_000


async def test_a_broken_server_is_asked_again(aimock_url: str, model: OpenAIText) -> None:
    await restart(aimock_url)

    assert (await hear(model, "broken twice")).text == "Mended."
    assert await statuses(aimock_url) == [500, 503, 200]


async def test_a_server_that_stays_broken_is_not_asked_for_ever(
    aimock_url: str, model: OpenAIText
) -> None:
    await restart(aimock_url)

    with pytest.raises(ModelError) as caught:
        await hear(model, "always broken")

    assert (caught.value.code, caught.value.status) == ("server_error", 500)
    assert await statuses(aimock_url) == [500, 500, 500]


async def test_a_refusal_is_not_asked_again(aimock_url: str, model: OpenAIText) -> None:
    await restart(aimock_url)

    with pytest.raises(ModelError) as caught:
        await hear(model, "not allowed")

    assert (caught.value.code, caught.value.retryable) == ("unauthorized", False)
    assert await statuses(aimock_url) == [401]


@pytest.mark.parametrize(
    ("text", "codes"),
    [("send rubbish", {"malformed", "truncated"}), ("hang up", {"connection", "truncated"})],
)
async def test_rubbish_and_lost_connections_are_errors_that_a_retry_may_mend(
    model: OpenAIText, text: str, codes: set[str]
) -> None:
    with pytest.raises(ModelError) as caught:
        await hear(model, text)

    assert caught.value.code in codes
    assert caught.value.retryable


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize(
    ("text", "timeouts", "what"),
    [
        ("start slowly", Timeouts(first_token_ms=200), "first token"),
        ("speak slowly", Timeouts(between_tokens_ms=50), "next piece"),
    ],
)
async def test_a_server_that_is_too_slow_times_out(
    aimock_url: str, api: Api, text: str, timeouts: Timeouts, what: str
) -> None:
    model = make(aimock_url, api, timeouts=timeouts, backoff=Backoff(retries=0))

    with pytest.raises(ModelError, match=what) as caught:
        await hear(model, text)
    await model.aclose()

    assert (caught.value.code, caught.value.retryable) == ("timeout", True)


async def test_the_server_sees_a_cancelled_request_end(aimock_url: str, model: OpenAIText) -> None:
    has_spoken = asyncio.Event()

    async def listen() -> None:
        async for _ in model.stream([ModelMessage("user", "speak slowly")]):
            has_spoken.set()

    async with next_aborted(aimock_url) as path:
        listening = asyncio.create_task(listen())
        await has_spoken.wait()
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening

        assert await path() == path_of(model)


async def test_the_server_sees_a_closed_stream_end(aimock_url: str, model: OpenAIText) -> None:
    async with next_aborted(aimock_url) as path:
        async with aclosing(model.stream([ModelMessage("user", "speak slowly")])) as events:
            await anext(events)

        assert await path() == path_of(model)


def path_of(model: OpenAIText) -> str:
    return "/v1/responses" if "responses" in repr(model) else "/v1/chat/completions"


async def restart(url: str) -> None:
    """Forget the requests, and how often each fixture was asked for."""
    async with httpx2.AsyncClient() as client:
        (await client.post(f"{url}/observed/restart")).raise_for_status()


async def statuses(url: str) -> list[int]:
    async with httpx2.AsyncClient() as client:
        journal: list[dict[str, Any]] = (await client.get(f"{url}/__aimock/journal")).json()
    return [entry["response"]["status"] for entry in journal]


@asynccontextmanager
async def next_aborted(url: str) -> AsyncGenerator[Callable[[], Awaitable[str]], None]:
    """Watch for the next request that is aborted; calling the value waits for its path."""
    async with (
        httpx2.AsyncClient(timeout=10) as client,
        client.stream("GET", f"{url}/observed/aborted") as watching,
    ):

        async def path() -> str:
            await watching.aread()
            return watching.json()

        yield path
