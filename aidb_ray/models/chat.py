"""`chat`: rounds and tool calls until the model has answered. Nothing of it is stored."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar, overload

import msgspec
from ag_ui.core import (
    Event,
    RunErrorEvent,
    RunFinishedEvent,
    RunStartedEvent,
    TokenUsage,
    ToolCallResultEvent,
)
from pydantic import BaseModel, ValidationError

from aidb_ray.errors import AidbError, ConfigError, ContractError, ModelError, ToolError
from aidb_ray.json_values import parse_json
from aidb_ray.models.base import (
    ModelMessage,
    TextAdapter,
    ToolCallRequest,
    Usage,
    check_adapter,
    parse_messages,
    stream_round,
)
from aidb_ray.models.round import Round
from aidb_ray.models.tools import (
    Tool,
    ToolContext,
    check_tools,
    describe_mismatch,
    encode_error,
    encode_result,
)

M = TypeVar("M", bound=BaseModel)

# A run has these once. An adapter that brings a whole run of its own adds none.
_RUN_EVENTS = (RunStartedEvent, RunFinishedEvent, RunErrorEvent)

MAX_RUNNING_TOOLS = 16
"""How many calls of one round run at once; further ones wait."""

MAX_OUTPUT_REPAIRS = 2
"""How often a model is told what is wrong with its structured answer."""


@overload
def chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    system_prompts: Sequence[str] = (),
    tools: Sequence[Tool] = (),
    max_iterations: int = 10,
    output_schema: type[BaseModel] | None = None,
    stream: Literal[True] = True,
) -> AsyncGenerator[Event, None]: ...


@overload
def chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    system_prompts: Sequence[str] = (),
    tools: Sequence[Tool] = (),
    max_iterations: int = 10,
    output_schema: None = None,
    stream: Literal[False],
) -> Coroutine[Any, Any, str]: ...


@overload
def chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    system_prompts: Sequence[str] = (),
    tools: Sequence[Tool] = (),
    max_iterations: int = 10,
    output_schema: type[M],
    stream: Literal[False],
) -> Coroutine[Any, Any, M]: ...


def chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    system_prompts: Sequence[str] = (),
    tools: Sequence[Tool] = (),
    max_iterations: int = 10,
    output_schema: type[BaseModel] | None = None,
    stream: bool = True,
) -> AsyncGenerator[Event, None] | Coroutine[Any, Any, str | BaseModel]:
    """Let the model answer, running the tools it asks for, for at most `max_iterations` rounds.

    The calls of one round run at once; their results follow in the order of the calls. A tool
    that fails, does not exist or is given wrong arguments is answered with the error, and the
    model goes on. An answer that does not fit `output_schema` is sent back with what is wrong,
    twice at most.

    With `stream`, return the events of the whole run as an async generator, which raises after
    its `RUN_ERROR`; without, an awaitable of the final text or of an instance of `output_schema`.

    Closing the generator, or cancelling the task that awaits, aborts the request in flight and
    cancels the tools; tools in threads are told by their context's signal.

    Raises:
        ConfigError: the adapter or a tool is none; two tools share a name, or one cannot run
            here because it has no implementation or needs an approval, which only an agent can
            wait for.
        ValueError: a message is malformed.
        ModelError: the provider failed; or `max_iterations`, `invalid_output`.
    """
    check_adapter(adapter)
    by_name = check_tools(tools)
    for each in tools:
        _check_runs_here(each)
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; at least one round is needed.")
    run = _Run(
        adapter, parse_messages(messages), system_prompts, by_name, max_iterations, output_schema
    )
    return run.stream() if stream else run.answer()


class _Run:
    """One conversation on its way to an answer."""

    def __init__(
        self,
        adapter: TextAdapter,
        messages: list[ModelMessage],
        system_prompts: Sequence[str],
        tools: dict[str, Tool],
        max_iterations: int,
        output_schema: type[BaseModel] | None,
    ) -> None:
        self._adapter = adapter
        self._messages = messages
        self._system_prompts = system_prompts
        self._tools = tools
        self._max_iterations = max_iterations
        self._output_schema = output_schema
        self._thread_id = uuid.uuid4().hex
        self._run_id = uuid.uuid4().hex
        self._usage: Usage | None = None
        self._repairs_left = MAX_OUTPUT_REPAIRS
        self._answer: str | BaseModel | None = None

    async def answer(self) -> str | BaseModel:
        async with aclosing(self.stream()) as events:
            async for _ in events:
                pass
        assert self._answer is not None
        return self._answer

    async def stream(self) -> AsyncGenerator[Event, None]:
        yield RunStartedEvent(thread_id=self._thread_id, run_id=self._run_id)
        try:
            for rounds_left in reversed(range(self._max_iterations)):
                heard = Round()
                async with aclosing(self._ask()) as events:
                    async for event in events:
                        heard.add(event)
                        if type(event) not in _RUN_EVENTS:
                            yield event
                calls = self._take_in(heard)
                if self._answer is not None:
                    break
                if not rounds_left:
                    # Nobody would read what the tools say, so they are not run.
                    raise ModelError(
                        f"The model had not answered after {self._max_iterations} rounds.",
                        code="max_iterations",
                        retryable=False,
                    )
                for call, content in zip(calls, await self._run_tools(calls), strict=True):
                    self._messages.append(
                        ModelMessage("tool", content, tool_call_id=call.id, name=call.name)
                    )
                    yield ToolCallResultEvent(
                        message_id=f"{call.id}:result", tool_call_id=call.id, content=content
                    )
        except AidbError as error:
            yield RunErrorEvent(message=str(error), code=error.code, usage=self._usage_entries())
            raise
        answer = self._answer
        yield RunFinishedEvent(
            thread_id=self._thread_id,
            run_id=self._run_id,
            # Plain text was streamed already; a structured answer is worth having in one piece.
            result=answer.model_dump(mode="json") if isinstance(answer, BaseModel) else None,
            usage=self._usage_entries(),
        )

    def _ask(self) -> AsyncGenerator[Event, None]:
        return stream_round(
            self._adapter,
            self._messages,
            tools=tuple(self._tools.values()),
            system_prompts=self._system_prompts,
            output_schema=self._output_schema,
        )

    def _take_in(self, heard: Round) -> list[ToolCallRequest]:
        """Continue the conversation by what was heard; return the calls to run before going on."""
        if heard.usage is not None:
            self._usage = heard.usage + (self._usage or Usage())
        if heard.error is not None:
            raise ModelError(heard.error, retryable=False)
        if not heard.is_finished:
            raise ModelError(
                "The model's stream ended before its round did.", code="truncated", retryable=True
            )
        self._messages.append(heard.to_message())
        calls = heard.tool_calls
        if not calls:
            self._accept(heard.text)
        return calls

    def _accept(self, text: str) -> None:
        if self._output_schema is None:
            self._answer = text
            return
        try:
            self._answer = parse_output(text, self._output_schema)
        except ModelError as error:
            if not self._repairs_left:
                raise
            self._repairs_left -= 1
            self._messages.append(ModelMessage("user", str(error)))

    async def _run_tools(self, calls: list[ToolCallRequest]) -> list[str]:
        slots = asyncio.Semaphore(MAX_RUNNING_TOOLS)
        async with asyncio.TaskGroup() as running:
            tasks = [running.create_task(self._run_tool(call, slots)) for call in calls]
        return [task.result() for task in tasks]

    async def _run_tool(self, call: ToolCallRequest, slots: asyncio.Semaphore) -> str:
        async with slots:
            try:
                wanted = self._tools.get(call.name)
                if wanted is None:
                    raise unknown_tool(call.name, self._tools)
                context = ToolContext(
                    idempotency_key=f"{self._run_id}:{call.id}", generation_id=self._run_id
                )
                return encode_result(await wanted.call(call.args_json, context))
            except ToolError as error:
                return encode_error(error)

    def _usage_entries(self) -> list[TokenUsage] | None:
        return None if self._usage is None else [TokenUsage(**msgspec.to_builtins(self._usage))]


def parse_output(text: str, schema: type[M]) -> M:
    """Return a model's structured answer.

    Raises:
        ModelError: `invalid_output`; the message says what is wrong in words for the model.
    """
    try:
        parse_json(text)
        return schema.model_validate_json(text)
    except (ContractError, ValidationError) as error:
        raise ModelError(
            f"The answer must be JSON that fits {schema.__name__}: {describe_mismatch(error)}.",
            code="invalid_output",
            retryable=True,
        ) from error


def unknown_tool(name: str, known: Iterable[str]) -> ToolError:
    """Return the answer to a call of a tool that does not exist."""
    return ToolError(
        f"There is no tool {name!r}; there are: {', '.join(sorted(known)) or 'none'}.",
        code="unknown_tool",
    )


def _check_runs_here(each: Tool) -> None:
    if not each.has_implementation:
        raise ConfigError(
            f"Tool {each.name!r} has no implementation and chat() runs tools itself. Give it "
            f"one, or use an agent and an executor.",
            code="missing_implementation",
        )
    if each.needs_approval:
        raise ConfigError(
            f"Tool {each.name!r} needs an approval, for which chat() cannot wait; use an agent.",
            code="approval_unsupported",
        )
