from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from traceback import format_exception
from typing import Annotated, Any, Literal

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import pytest
from pydantic import BaseModel, Field

from aidb_ray.errors import ConfigError, RunCancelledError, ToolError
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import (
    Tool,
    ToolContext,
    check_tools,
    declare_tool,
    encode_error,
    encode_result,
    tool,
)


class Hit(BaseModel):
    title: str
    score: float = 1.0


class Query(BaseModel):
    text: str
    limit: int = 5


@tool
async def search(query: str, limit: int = 5) -> list[Hit]:
    """Search the docs.

    Args:
        query: What to look for,
            in plain words.
        limit (int): How many hits at most.

    Returns:
        The hits.
    """
    return [Hit(title=query)] * limit


def count(query: str, limit: int = 5) -> int:
    return len(query)


def find(query: str) -> str:
    return f"found {query}"


def test_the_schema_comes_from_the_signature_and_the_docstring() -> None:
    assert search.name == "search"
    assert search.description == "Search the docs."
    assert search.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for, in plain words."},
            "limit": {"type": "integer", "default": 5, "description": "How many hits at most."},
        },
        "required": ["query"],
        "additionalProperties": False,
    }


def test_types_defined_inside_a_function_and_awkward_names_are_understood() -> None:
    class Where(BaseModel):
        city: str

    @tool
    def locate(
        schema: Where, model_config: Literal["a", "b"], json: Annotated[int, Field(ge=0)]
    ) -> None: ...

    properties = locate.parameters["properties"]
    assert list(properties) == ["schema", "model_config", "json"]
    assert properties["schema"] == {"$ref": "#/$defs/Where"}
    assert properties["json"] == {"type": "integer", "minimum": 0}


async def test_a_tool_takes_json_and_gives_json() -> None:
    result = await search.call('{"query": "ray", "limit": 2}')

    assert result == [{"title": "ray", "score": 1.0}] * 2
    assert await search.call({"query": "ray", "limit": 1}) == [{"title": "ray", "score": 1.0}]


async def test_calling_a_tool_as_a_function_runs_the_function() -> None:
    assert await search("ray", limit=1) == [Hit(title="ray")]


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        ('{"query": "a", "limit": "5"}', ["limit"]),
        ('{"limit": true}', ["query", "limit"]),
        ('{"query": "a", "colour": "red"}', ["colour"]),
        ('{"query": "a"', ["no JSON"]),
        ('{"query": "a", "query": "b"}', ["query", "twice"]),
        ('{"query": "a", "limit": NaN}', ["NaN"]),
        ("[]", ["object"]),
    ],
)
async def test_wrong_arguments_are_named_and_nothing_runs(args: str, fields: list[str]) -> None:
    ran: list[str] = []

    @tool
    async def probe(query: str, limit: int = 5) -> None:
        ran.append(query)

    with pytest.raises(ToolError) as caught:
        await probe.call(args)

    assert caught.value.code == "invalid_args"
    assert all(field in str(caught.value) for field in fields)
    assert ran == []


async def test_strictness_reaches_into_nested_models() -> None:
    @tool
    def store(hit: Hit) -> str:
        return hit.title

    assert await store.call('{"hit": {"title": "a"}}') == "a"
    with pytest.raises(ToolError, match=r"hit\.score"):
        await store.call('{"hit": {"title": "a", "score": "2"}}')


async def test_a_plain_function_runs_in_a_thread_and_a_coroutine_function_does_not() -> None:
    @tool
    def plain() -> int:
        return threading.get_ident()

    @tool
    async def inline() -> int:
        return threading.get_ident()

    assert await plain.call("{}") != threading.get_ident()
    assert await inline.call("{}") == threading.get_ident()


async def test_a_plain_function_may_return_an_awaitable() -> None:
    async def later(query: str) -> str:
        return query.upper()

    @tool
    def shout(query: str) -> Awaitable[str]:
        return later(query)

    assert await shout.call('{"query": "hey"}') == "HEY"


async def test_an_input_schema_is_given_as_a_model_or_by_field() -> None:
    @tool(name="whole", input_schema=Query)
    async def whole(query: Query) -> list[Any]:
        return [query.text, query.limit]

    @tool(name="spread", input_schema=Query)
    async def spread(*, text: str, limit: int) -> list[Any]:
        return [text, limit]

    assert await whole.call('{"text": "a"}') == await spread.call('{"text": "a"}') == ["a", 5]
    assert whole.parameters == spread.parameters
    assert whole.parameters["required"] == ["text"]


async def test_the_context_is_injected_and_not_shown_to_the_model() -> None:
    beats: list[int] = []

    @tool
    def work(ctx: ToolContext | None, n: int) -> str:
        assert ctx is not None
        ctx.heartbeat()
        return f"{ctx.idempotency_key}/{ctx.attempt}/{n}"

    context = ToolContext(idempotency_key="k", attempt=2, on_heartbeat=lambda: beats.append(1))

    assert list(work.parameters["properties"]) == ["n"]
    assert await work.call('{"n": 3}', context) == "k/2/3"
    assert beats == [1]


async def test_a_declared_tool_gets_an_implementation_where_it_has_one() -> None:
    declared = declare_tool(name="ask", description="Ask.", input_schema=Query)

    def fields(text: str, limit: int) -> list[Any]:
        return [text, limit]

    def whole(args: Query) -> int:
        return args.limit

    by_field, as_one = declared.with_implementation(fields), declared.with_implementation(whole)

    with pytest.raises(ConfigError) as caught:
        await declared.call('{"text": "a"}')

    assert caught.value.code == "missing_implementation"
    assert not declared.has_implementation
    assert await by_field.call('{"text": "a"}') == ["a", 5]
    assert await as_one.call('{"text": "a"}') == 5
    assert by_field.fingerprint() == declared.fingerprint()


async def test_a_new_implementation_may_take_whatever_comes() -> None:
    async def forward(**args: Any) -> Any:
        return args

    def other(query: str, colour: str) -> None: ...

    forwarded = search.with_implementation(forward)

    assert await forwarded.call('{"query": "a"}') == {"query": "a"}
    with pytest.raises(ConfigError, match="limit"):
        search.with_implementation(other)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("boom"), "tool_error"),
        (SystemExit(3), "tool_crashed"),
        (StopIteration(), "tool_error"),
        (KeyboardInterrupt(), "tool_crashed"),
        (ToolError("no", code="mine"), "mine"),
        (asyncio.CancelledError(), "tool_crashed"),
    ],
)
async def test_whatever_a_thread_raises_is_a_tool_error(error: BaseException, code: str) -> None:
    @tool
    def fail() -> None:
        raise error

    with pytest.raises(ToolError) as caught:
        await fail.call("{}")

    assert caught.value.code == code


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), asyncio.CancelledError()])
async def test_whatever_a_coroutine_raises_is_a_tool_error(error: BaseException) -> None:
    @tool
    async def fail() -> None:
        raise error

    with pytest.raises(ToolError, match=type(error).__name__):
        await fail.call("{}")


def refuse(error: BaseException) -> None:
    raise error


async def refuse_here(error: BaseException) -> None:
    raise error


def refuse_later(error: BaseException) -> Awaitable[None]:
    return refuse_here(error)


@pytest.mark.parametrize("fail", [refuse, refuse_here, refuse_later])
@pytest.mark.parametrize(
    ("error", "level"),
    [
        (ValueError("boom"), "WARNING"),
        (SystemExit(3), "WARNING"),
        (asyncio.CancelledError(), "WARNING"),
        (ToolError("not today", code="mine"), "INFO"),
    ],
)
async def test_what_a_tool_raises_is_logged_once(
    fail: Callable[[BaseException], Any],
    error: BaseException,
    level: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    async def wait() -> None:
        await refuse_here(error)

    function = wait if fail is refuse_here else lambda: fail(error)
    broken = tool(name="broken")(function)

    with pytest.raises(ToolError):
        await broken.call("{}", ToolContext(idempotency_key="g:0:1"))

    [record] = caplog.records
    assert record.levelname == level
    assert record.name == "aidb_ray.tool"
    assert "'broken'" in record.getMessage()
    assert "'g:0:1'" in record.getMessage()
    trace = "" if record.exc_info is None else "".join(format_exception(record.exc_info[1]))
    assert ("in refuse" in trace) == (level == "WARNING")


async def test_a_call_that_does_not_fit_or_succeeds_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    assert await search.call('{"query": "a"}')
    with pytest.raises(ToolError):
        await search.call("{}")
    assert not caplog.records


async def test_cancelling_a_call_passes_and_fires_the_signal() -> None:
    started = asyncio.Event()

    @tool
    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    context = ToolContext()
    running = asyncio.create_task(hang.call("{}", context))
    await started.wait()
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert context.signal.is_aborted


@pytest.mark.parametrize("runs_in_thread", [False, True])
async def test_a_call_that_takes_too_long_is_stopped(*, runs_in_thread: bool) -> None:
    context, ended = ToolContext(), threading.Event()

    async def wait() -> None:
        """Wait."""
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def wait_in_thread(ctx: ToolContext) -> None:
        """Wait."""
        while not ctx.signal.is_aborted:
            time.sleep(0.001)
        ended.set()

    slow = tool(timeout_ms=20)(wait_in_thread if runs_in_thread else wait)
    with pytest.raises(ToolError, match="over 20 ms") as raised:
        await slow.call({}, context)

    assert (raised.value.code, context.signal.is_aborted) == ("timeout", True)
    await asyncio.to_thread(ended.wait, 20)


@pytest.mark.parametrize("timeout_ms", [0, -1, True, 1.5])
def test_a_timeout_is_a_number_of_milliseconds(timeout_ms: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        tool(timeout_ms=timeout_ms)(find)
    assert raised.value.code == "invalid_bound"


async def test_a_thread_learns_of_its_cancellation_by_the_signal() -> None:
    started, ended = threading.Event(), threading.Event()

    @tool
    def hang(ctx: ToolContext) -> None:
        aborted = threading.Event()
        ctx.signal.add_listener(aborted.set)
        started.set()
        if aborted.wait(10):
            ended.set()

    running = asyncio.create_task(hang.call("{}"))
    assert await asyncio.to_thread(started.wait, 10)
    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert await asyncio.to_thread(ended.wait, 10)


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


def forever() -> Iterator[int]:
    while True:
        yield 1


@pytest.mark.parametrize(
    ("result", "json_value"),
    [
        (Point(1, (2, 3)), {"x": 1, "y": [2, 3]}),
        ({1: Hit(title="a")}, {"1": {"title": "a", "score": 1.0}}),
        (None, None),
        ("text", "text"),
        (b"bytes", "bytes"),
    ],
)
async def test_results_become_plain_json(result: Any, json_value: Any) -> None:
    assert await tool(name="give")(lambda: result).call("{}") == json_value


@pytest.mark.parametrize(
    "result", [object(), float("nan"), forever(), b"\xff", {"a": {1, object()}}]
)
async def test_a_result_without_json_form_is_refused(result: Any) -> None:
    with pytest.raises(ToolError) as caught:
        await tool(name="give")(lambda: result).call("{}")

    assert caught.value.code == "not_serializable"


async def test_a_result_may_be_as_large_as_the_bound_and_no_larger() -> None:
    @tool(max_result_bytes=10)
    def echo(n: int) -> str:
        return "x" * n

    assert await echo.call('{"n": 8}') == "x" * 8
    with pytest.raises(ToolError) as caught:
        await echo.call('{"n": 9}')
    assert caught.value.code == "result_too_large"


async def test_a_result_must_fit_the_output_schema() -> None:
    @tool(output_schema=list[Hit])
    async def hits(n: int) -> Any:
        return [{"title": n}]

    assert hits.output_schema is not None
    with pytest.raises(ToolError, match="title") as caught:
        await hits.call('{"n": 1}')
    assert caught.value.code == "invalid_result"


def test_what_no_model_can_call_is_refused_where_it_is_written() -> None:
    def star(*words: str) -> None: ...
    def keywords(**words: str) -> None: ...
    def by_position(a: int, /) -> None: ...
    def takes_a_lock(lock: threading.Event) -> None: ...
    def unknown_type(a: Any) -> None: ...

    unknown_type.__annotations__["a"] = "Nowhere"
    functions: list[Callable[..., Any]] = [star, keywords, by_position, takes_a_lock, unknown_type]
    for function in functions:
        with pytest.raises(ConfigError) as caught:
            tool(function)
        assert caught.value.code == "invalid_tool"
        assert function.__name__ in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        tool(name="two words")(find)
    assert caught.value.code == "invalid_name"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_tools([search, tool(name="search")(find)])

    assert caught.value.code == "duplicate_tool"


def test_the_fingerprint_follows_what_the_model_sees() -> None:
    same = tool(name="find")(find)

    assert tool(find).fingerprint() == same.fingerprint()
    assert tool(find).fingerprint() != tool(name="other")(find).fingerprint()
    assert (
        tool(find).fingerprint()
        != declare_tool(name="find", description="", input_schema=Query).fingerprint()
    )


async def test_a_tool_pickles_with_its_checks() -> None:
    class Local(BaseModel):
        n: int

    @tool(output_schema=int)
    async def double(value: Local) -> int:
        return value.n * 2

    await double.call('{"value": {"n": 1}}')
    sent: Tool = pickle.loads(cloudpickle.dumps(double))

    assert await sent.call('{"value": {"n": 21}}') == 42
    with pytest.raises(ToolError, match=r"value\.n"):
        await sent.call('{"value": {"n": "21"}}')
    assert sent.fingerprint() == double.fingerprint()
    assert b"TypeAdapter" not in cloudpickle.dumps(double)


async def test_a_tool_of_a_module_is_found_there_again() -> None:
    elsewhere = search.with_implementation(count)

    assert pickle.loads(pickle.dumps(search)) is search
    assert pickle.loads(cloudpickle.dumps([search]))[0] is search
    assert await pickle.loads(pickle.dumps(elsewhere)).call('{"query": "abc"}') == 3


async def test_partials_and_callable_objects_are_tools_too() -> None:
    class Adder:
        async def __call__(self, a: int, b: int) -> int:
            return a + b

    add = tool(name="add")(Adder())
    add_two = tool(name="add_two")(partial(Adder(), b=2))

    assert await add.call('{"a": 1, "b": 2}') == 3
    assert await add_two.call('{"a": 1}') == 3


def test_the_model_reads_text_as_text_and_the_rest_as_json() -> None:
    error = ToolError("No such row.", code="not_found")

    assert encode_result("plain") == "plain"
    assert json.loads(encode_result({"a": [1, None]})) == {"a": [1, None]}
    assert json.loads(encode_error(error)) == {"error": "not_found", "message": "No such row."}


async def test_a_signal_fires_once_and_wakes_those_who_wait() -> None:
    signal = Signal()
    heard: list[str] = []
    signal.add_listener(lambda: heard.append("kept"))
    remove = signal.add_listener(lambda: heard.append("removed"))
    remove()
    waiting = asyncio.create_task(signal.wait())
    signal.raise_if_aborted()

    await asyncio.to_thread(signal.abort, "enough")
    signal.abort("again")
    await waiting
    signal.add_listener(lambda: heard.append("late"))

    assert heard == ["kept", "late"]
    assert signal.reason == "enough"
    with pytest.raises(RunCancelledError, match="enough"):
        signal.raise_if_aborted()
