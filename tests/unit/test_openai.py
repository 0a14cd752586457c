from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from aidb_ray.errors import ConfigError, ModelError
from aidb_ray.models.base import ModelMessage, ToolCallRequest, adapter_fingerprint
from aidb_ray.models.openai import (
    Backoff,
    EnvKey,
    OpenAIText,
    Timeouts,
    openai_text,
    parse_retry_after,
)
from aidb_ray.models.openai_requests import chat_body, responses_body, strict_schema
from aidb_ray.models.round import Round
from aidb_ray.models.tools import tool

HELLO = [ModelMessage("user", "Hello")]
SECRET = "sk-secret-value"
DONE = b"data: [DONE]\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c1", "choices": [choice]}).encode() + b"\n\n"


HI = [chunk({"content": "Hi"}), chunk({}, "stop"), DONE]


class Body(httpx2.AsyncByteStream):
    """A body that comes piece by piece, then ends, fails or never ends."""

    def __init__(self, *pieces: bytes, then: Exception | asyncio.Event | None = None) -> None:
        self.pieces = pieces
        self.then = then
        self.is_waiting = asyncio.Event()
        self.was_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await asyncio.sleep(0)
            yield piece
        if isinstance(self.then, Exception):
            raise self.then
        if self.then is not None:
            self.is_waiting.set()
            await self.then.wait()

    async def aclose(self) -> None:
        self.was_closed = True


Answer = Callable[[httpx2.Request], httpx2.Response] | httpx2.Response | Exception | Body


class Server(httpx2.AsyncBaseTransport):
    """A server that gives one answer after the other and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        match self.answers.pop(0):
            case Exception() as error:
                raise error
            case Body() as body:
                return httpx2.Response(200, stream=body, request=request)
            case httpx2.Response() as response:
                return response
            case answer:
                return answer(request)

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


def refusal(status: int, body: Any = None, **headers: str) -> httpx2.Response:
    return httpx2.Response(
        status,
        json=body or {"error": {"message": f"status {status}"}},
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def adapter(server: Server, **more: Any) -> OpenAIText:
    more = {"api_key": "test", "backoff": Backoff(first_ms=0), "api": "chat"} | more
    return OpenAIText("gpt-test", base_url="http://server/v1", transport=server, **more)


async def hear(model: OpenAIText, heard: Round | None = None, **more: Any) -> Round:
    heard = heard or Round()
    try:
        async for event in model.stream(HELLO, **more):
            heard.add(event)
    finally:
        await model.aclose()
    return heard


@tool
def search(query: str, limit: int = 5) -> str:
    """Search the docs."""
    return query * limit


class Point(BaseModel):
    x: int
    label: str = "none"


class Free(BaseModel):
    scores: dict[str, int]


async def test_a_request_carries_the_conversation_and_the_tools() -> None:
    server = Server(Body(*HI))

    heard = await hear(
        adapter(server, options={"temperature": 0, "stream_options": None}),
        tools=[search],
        system_prompts=["Be brief."],
        output_schema=Point,
    )

    assert heard.text == "Hi"
    (request,) = server.requests
    assert str(request.url) == "http://server/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer test"
    body = server.bodies()[0]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert body["model"] == "gpt-test"
    assert body["stream"] is True
    assert body["temperature"] == 0
    assert body["tools"][0]["function"]["parameters"] == search.parameters
    assert body["response_format"]["json_schema"]["strict"] is True
    assert "stream_options" not in body


async def test_only_a_request_to_go_on_with_an_answer_carries_the_prefill_fields() -> None:
    server = Server(Body(*HI), Body(*HI))
    model = adapter(server, prefill={"continue_final_message": True, "stream_options": None})

    await hear(model)
    async for _ in model.stream([*HELLO, ModelMessage("assistant", "Hi the")]):
        pass
    await model.aclose()

    first, second = server.bodies()
    assert "continue_final_message" not in first
    assert second["continue_final_message"] is True
    assert second["messages"][-1] == {"role": "assistant", "content": "Hi the"}
    assert ("stream_options" in first, "stream_options" in second) == (True, False)


async def test_the_responses_protocol_has_its_own_request() -> None:
    done = b'data: {"type": "response.completed", "response": {}}\n\n'
    server = Server(Body(done))

    await hear(
        adapter(server, api="responses", options={"text": {"verbosity": "low"}}),
        tools=[search],
        system_prompts=["Be brief.", "Be kind."],
        output_schema=Point,
    )

    assert str(server.requests[0].url) == "http://server/v1/responses"
    body = server.bodies()[0]
    assert body["input"] == [{"role": "user", "content": "Hello"}]
    assert body["instructions"] == "Be brief.\n\nBe kind."
    assert body["store"] is False
    assert body["tools"][0]["name"] == "search"
    assert body["text"]["verbosity"] == "low"
    assert body["text"]["format"]["name"] == "Point"


def test_a_round_of_tools_is_told_in_each_protocol_as_it_wants_it() -> None:
    messages = [
        ModelMessage("user", "Hello", name="ann"),
        ModelMessage(
            "assistant",
            tool_calls=(ToolCallRequest("c1", "f", "{}"),),
            reasoning=('{"type":"reasoning","id":"rs"}',),
        ),
        ModelMessage("tool", "7", tool_call_id="c1", name="f"),
    ]

    assert chat_body(messages, [], [], None)["messages"] == [
        {"role": "user", "content": "Hello", "name": "ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    assert responses_body(messages, [], [], None)["input"] == [
        {"role": "user", "content": "Hello"},
        {"type": "reasoning", "id": "rs"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
    ]


def test_a_schema_is_strict_where_it_can_be() -> None:
    closed = strict_schema(Point.model_json_schema())

    assert closed is not None
    assert closed["required"] == ["x", "label"]
    assert closed["additionalProperties"] is False
    assert "default" not in closed["properties"]["label"]
    assert strict_schema(Free.model_json_schema()) is None


@pytest.mark.parametrize(
    "failure",
    [
        refusal(429, retry_after_ms="1"),
        refusal(500),
        refusal(503),
        refusal(400, x_should_retry="true"),
        httpx2.ConnectError("refused"),
        httpx2.ConnectTimeout("slow"),
        Body(),
        Body(b"data: {\n\n"),
        Body(b'data: {"error": {"message": "busy", "code": "server_error"}}\n\n'),
        Body(then=httpx2.ReadError("reset")),
    ],
)
async def test_a_failure_that_may_pass_is_tried_again(failure: Answer) -> None:
    server = Server(failure, Body(*HI))

    assert (await hear(adapter(server))).text == "Hi"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (refusal(400), "invalid_request"),
        (refusal(401), "unauthorized"),
        (refusal(404), "not_found"),
        (refusal(500, x_should_retry="false"), "server_error"),
        (
            refusal(429, {"error": {"message": "m", "code": "insufficient_quota"}}),
            "insufficient_quota",
        ),
    ],
)
async def test_a_failure_that_will_not_pass_is_raised_at_once(failure: Answer, code: str) -> None:
    server = Server(failure)

    with pytest.raises(ModelError) as caught:
        await hear(adapter(server))

    assert caught.value.code == code
    assert not caught.value.retryable
    assert len(server.requests) == 1


async def test_trying_again_comes_to_an_end() -> None:
    server = Server(*[refusal(500) for _ in range(5)])

    with pytest.raises(ModelError) as caught:
        await hear(adapter(server, backoff=Backoff(retries=2, first_ms=0)))

    assert (caught.value.code, caught.value.status) == ("server_error", 500)
    assert len(server.requests) == 3


async def test_nothing_is_tried_again_once_the_model_has_spoken() -> None:
    server = Server(Body(HI[0], then=httpx2.RemoteProtocolError("cut")), Body(*HI))
    heard = Round()

    with pytest.raises(ModelError) as caught:
        await hear(adapter(server), heard)

    assert (caught.value.code, caught.value.retryable) == ("truncated", True)
    assert heard.text == "Hi"
    assert len(server.requests) == 1


async def test_a_long_wait_is_left_to_the_caller() -> None:
    server = Server(refusal(429, retry_after="3600"))

    with pytest.raises(ModelError) as caught:
        await hear(adapter(server))

    assert (caught.value.code, caught.value.retry_after_ms) == ("rate_limited", 3_600_000)
    assert len(server.requests) == 1


def test_waits_grow_are_bounded_and_follow_the_server() -> None:
    backoff = Backoff(retries=9, first_ms=500, most_ms=8_000)
    error = ModelError("m", retryable=True)

    assert [backoff.wait_ms(error, attempt, 1.0) for attempt in (0, 1, 4, 8)] == [
        500,
        1_000,
        8_000,
        8_000,
    ]
    assert backoff.wait_ms(error, 0, 0.0) == 250
    assert backoff.wait_ms(error, 9, 1.0) is None
    assert backoff.wait_ms(ModelError("m", retryable=False), 0, 1.0) is None
    assert backoff.wait_ms(ModelError("m", retryable=True, retry_after_ms=7), 3, 1.0) == 7


@pytest.mark.parametrize(
    ("headers", "wait_ms"),
    [
        ({"retry-after-ms": "1500"}, 1_500),
        ({"retry-after": "2"}, 2_000),
        ({"retry-after": "0.5"}, 500),
        ({"retry-after": "Mon, 23 Nov 2026 00:00:05 GMT"}, 5_000),
        ({"retry-after": "Mon, 23 Nov 2026 00:00:05 -0000"}, 5_000),
        ({"retry-after": "Sun, 22 Nov 2026 00:00:00 GMT"}, 0),
        ({"retry-after": "-1"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_has_three_forms(headers: dict[str, str], wait_ms: int | None) -> None:
    now = datetime(2026, 11, 23, tzinfo=UTC)

    assert parse_retry_after(headers, now) == wait_ms


SILENT_START = Timeouts(first_token_ms=30, between_tokens_ms=60_000)
SILENT_MIDDLE = Timeouts(first_token_ms=60_000, between_tokens_ms=30)


@pytest.mark.parametrize(
    ("pieces", "timeouts", "what"),
    [
        ([], SILENT_START, "first token"),
        ([b": ping\n\n"], SILENT_START, "first token"),
        ([chunk({"role": "assistant", "content": ""})], SILENT_START, "first token"),
        ([HI[0]], SILENT_MIDDLE, "next piece"),
    ],
)
async def test_a_server_that_falls_silent_times_out(
    pieces: list[bytes], timeouts: Timeouts, what: str
) -> None:
    body = Body(*pieces, then=asyncio.Event())

    async with asyncio.timeout(10):
        with pytest.raises(ModelError, match=what) as caught:
            await hear(adapter(Server(body), timeouts=timeouts, backoff=Backoff(retries=0)))

    assert (caught.value.code, caught.value.retryable) == ("timeout", True)
    assert body.was_closed


async def test_the_time_that_the_reader_takes_is_not_the_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    real_time, later_by = loop.time, 0
    monkeypatch.setattr(loop, "time", lambda: real_time() + later_by)
    model = adapter(Server(Body(*HI)))
    heard = Round()

    async for event in model.stream(HELLO):
        heard.add(event)
        later_by += 3_600
    await model.aclose()

    assert heard.is_finished


async def test_a_server_that_does_not_hang_up_is_not_waited_for() -> None:
    body = Body(*HI, then=asyncio.Event())

    assert (await hear(adapter(Server(body)))).is_finished
    assert body.was_closed


async def test_cancelling_aborts_the_request() -> None:
    body = Body(HI[0], then=asyncio.Event())
    listening = asyncio.create_task(hear(adapter(Server(body))))
    await body.is_waiting.wait()

    listening.cancel()

    with pytest.raises(asyncio.CancelledError):
        await listening
    assert body.was_closed


async def test_closing_the_stream_aborts_the_request() -> None:
    body = Body(HI[0], then=asyncio.Event())
    model = adapter(Server(body))

    async with aclosing(model.stream(HELLO)) as events:
        await anext(events)

    assert body.was_closed
    await model.aclose()


async def test_the_key_comes_from_the_environment_of_the_process_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(Body(*HI), Body(*HI), Body(*HI))
    for name in ("OPENAI_API_KEY", "MY_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)

    await hear(adapter(server, api_key=None))
    adapter(server, api_key=None).check()
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        await hear(adapter(server, api_key=EnvKey("MY_KEY")))
    with pytest.raises(ConfigError, match="MY_KEY"):
        adapter(server, api_key=EnvKey("MY_KEY")).check()
    monkeypatch.setenv("MY_KEY", "mine")
    monkeypatch.setenv("OPENAI_API_KEY", "default")
    adapter(server, api_key=EnvKey("MY_KEY")).check()
    await hear(adapter(server, api_key=EnvKey("MY_KEY")))
    await hear(adapter(server, api_key=None))

    assert caught.value.code == "missing_api_key"
    keys = [request.headers["authorization"] for request in server.requests]
    assert keys == ["Bearer none", "Bearer mine", "Bearer default"]


async def test_without_a_server_of_ones_own_a_key_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        await hear(openai_text("gpt-test"))


async def test_a_key_is_never_shown_or_sent_along() -> None:
    echo = refusal(401, {"error": {"message": f"Incorrect API key provided: {SECRET}"}})
    model = adapter(Server(echo), api_key=SECRET)

    with pytest.raises(ModelError, match=r"\*\*\*") as caught:
        await hear(model)
    with pytest.raises(ConfigError) as refused:
        pickle.dumps(model)

    assert refused.value.code == "secret_not_portable"
    shown = [repr(model), str(caught.value), repr(caught.value), model.fingerprint()]
    assert not any(SECRET in text for text in shown)
    assert SECRET not in str(refused.value)


async def test_it_pickles_and_connects_anew() -> None:
    model = openai_text("gpt-test", base_url="http://server/v1", api_key=EnvKey("K"), seed=1)

    copy: OpenAIText = pickle.loads(pickle.dumps(model))

    assert copy.fingerprint() == model.fingerprint()
    assert repr(copy) == repr(model)


def test_the_fingerprint_follows_what_decides_the_answers() -> None:
    base = openai_text("a", temperature=0)
    others: Sequence[OpenAIText] = [
        openai_text("b", temperature=0),
        openai_text("a", temperature=1),
        openai_text("a", temperature=0, api="chat"),
        openai_text("a", temperature=0, base_url="http://x/v1"),
        openai_text("a", temperature=0, prefill={"continue_final_message": True}),
    ]

    prints = {adapter_fingerprint(each) for each in [base, *others]}

    assert len(prints) == 6
    assert adapter_fingerprint(openai_text("a", temperature=0, api_key="k")) in prints


def test_options_that_the_adapter_sets_itself_are_refused() -> None:
    with pytest.raises(ConfigError, match="messages"):
        openai_text("a", messages=[])
    with pytest.raises(ConfigError, match="stream"):
        openai_text("a", prefill={"stream": False})
    with pytest.raises(ConfigError, match="api"):
        openai_text("a", api="completions")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_each_event_loop_has_connections_of_its_own() -> None:
    server = Server(Body(*HI), Body(*HI))
    model = adapter(server)

    other_loop = await asyncio.to_thread(lambda: asyncio.run(hear(model)))

    assert other_loop.text == (await hear(model)).text == "Hi"
