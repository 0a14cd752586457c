"""Tools: functions a model may call, and what such a call may be given and return."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from operator import attrgetter
from typing import Any, Protocol, cast, overload

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from aidb_ray.errors import ConfigError, ContractError, ToolError
from aidb_ray.json_values import parse_json
from aidb_ray.models.signals import Signal
from aidb_ray.models.signatures import Signature, parse_docstring, read_signature
from aidb_ray.retry import check_bounds

MAX_RESULT_BYTES = 1 << 20
"""How large a tool's result may be as JSON, unless the tool says otherwise."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _ignore_heartbeat() -> None:
    return None


class Record(Protocol):
    """Where a call keeps what it must not do twice: rows, so they survive its process."""

    async def step(self, name: str, fn: Callable[[], Any]) -> Any:
        """See `ToolContext.step`."""
        ...

    async def ask(self, question: str, schema: Any = None) -> Any:
        """See `ToolContext.ask`."""
        ...


class ThreadWatch(Protocol):
    """Hears, in the thread itself, of a tool that runs in a thread: it cannot be stopped."""

    @property
    def threads(self) -> Executor | None:
        """Those that tools run in, None for the event loop's own."""
        ...

    def began(self) -> None:
        """Hear that the thread runs."""
        ...

    def ended(self, result: Any, error: ToolError | None) -> None:
        """Hear what it came to, wanted or not."""
        ...


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What an implementation may know about the call it serves.

    A parameter annotated with this type receives it and is not shown to the model.

    Attributes:
        signal: Fires when the call should stop; a tool in a thread must look at it itself.
        idempotency_key: The same for every attempt of one call, different for any other call.
        attempt: 1 the first time, higher after a crash or a retry.
        session: The session the call belongs to, None outside of one.
        log: Logger for this call.
        on_heartbeat: What `heartbeat` does.
        generation_id: The generation, or run of `chat`, that the call is part of.
        record: Where steps and questions are kept, None where there is no session.
        watch: Hears of the thread, if the tool runs in one.
        agent: The agent whose model asked for the call, `""` for none.
    """

    signal: Signal = field(default_factory=Signal)
    idempotency_key: str = ""
    attempt: int = 1
    session: Any = None
    log: logging.Logger | logging.LoggerAdapter[Any] = field(
        default_factory=lambda: logging.getLogger("aidb_ray.tool")
    )
    on_heartbeat: Callable[[], None] = _ignore_heartbeat
    generation_id: str = ""
    record: Record | None = None
    watch: ThreadWatch | None = None
    agent: str = ""

    def heartbeat(self) -> None:
        """Say that the call is still at work. Returns at once; threads may call it too."""
        self.on_heartbeat()

    async def step(self, name: str, fn: Callable[[], Any]) -> Any:
        """Run `fn`, plain or async, and record its result; return that, as plain JSON.

        Once the result is durable, no later attempt of this call runs `fn` again: it is given the
        recorded result. Of a step that was running when its process died nothing is known, so it
        runs again. A name is used once in a call; a step that raised may be tried again under its
        name. If the caller is cancelled while the result is being written, it may be recorded.

        Raises:
            ToolError: `duplicate_step`; `invalid_step`, before `fn` runs: the name is empty or too
                long, or `fn` is no function; `not_serializable` or `result_too_large`, after it
                ran; `not_durable`: the call has no session. What `fn` raises is raised and not
                recorded.
        """
        return await self._durable().step(name, fn)

    async def ask(self, question: str, schema: Any = None) -> Any:
        """Ask a person or a program, by a row in the session's `questions`; return the answer.

        Waits until someone calls `answer`, from whatever process; the row stays if the caller is
        cancelled. The n-th question of a call is asked once: a later attempt finds it, and its
        answer. `schema` is the type of the answer.

        Raises:
            ToolError: `invalid_answer`: it does not fit `schema`; `question_withdrawn`: its row
                was deleted; `question_differs`: an earlier attempt asked something else in its
                place; `not_durable`: the call has no session.
        """
        return await self._durable().ask(question, schema)

    def _durable(self) -> Record:
        if self.record is None:
            raise ToolError(
                "There is no session here in which steps and questions could be kept.",
                code="not_durable",
            )
        return self.record


class Tool:
    """A function with a name and a checked input, as `tool` makes it.

    Calling it calls the function, unchecked, as if it were not a tool; a model's request goes
    through `call`. It pickles when its function and the types of its signature do.

    Attributes:
        name: What the model calls it: letters, digits, `_` and `-`, at most 64.
        description: What the model is told about it.
        parameters: JSON schema of the arguments, an object.
        output_schema: JSON schema of the result, None if none was declared.
        needs_approval: Whether a person must agree before it runs.
        max_result_bytes: How large a result may be as JSON.
        runs_elsewhere: Whether an agent only writes the call's row and waits until an executor
            has ended it.
        timeout_ms: How long a call may take, None without bound: to run, or until an executor has
            ended it.
    """

    def __init__(
        self,
        *,
        name: str,
        description: str,
        signature: Signature,
        function: Callable[..., Any] | None,
        output_type: Any = None,
        needs_approval: bool = False,
        max_result_bytes: int = MAX_RESULT_BYTES,
        runs_elsewhere: bool = False,
        timeout_ms: int | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a tool name: use 1 to 64 letters, digits, '_' or '-'.",
                code="invalid_name",
            )
        self.name = name
        self.description = description
        self.needs_approval = needs_approval
        self.max_result_bytes = max_result_bytes
        self.runs_elsewhere = runs_elsewhere
        self.timeout_ms = timeout_ms
        check_bounds(self, "timeout_ms", least=1, may_be_none=True)
        self._function = function
        self._signature = signature
        self._output_type = output_type
        self.parameters: dict[str, Any] = signature.json_schema()
        self.output_schema: dict[str, Any] | None = (
            None if output_type is None else self._output.json_schema()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself."""
        return self._implementation(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_output"}

    def __reduce__(self) -> tuple[Any, ...]:
        # A decorated function is no longer found under its own name, so it would travel by value
        # and take the globals it uses along. The tool that took its place can be found.
        place = (
            getattr(self._function, "__module__", ""),
            getattr(self._function, "__qualname__", ""),
        )
        if place[0] != "__main__" and _find(*place) is self:
            return _find, place
        return _rebuild, (self.__getstate__(),)

    def __repr__(self) -> str:
        return f"Tool({self.name!r})"

    @property
    def has_implementation(self) -> bool:
        """Whether it can run here; without, it only describes a tool that runs elsewhere."""
        return self._function is not None

    def with_implementation(self, function: Callable[..., Any]) -> Tool:
        """Return the same tool, as the model sees it, run by `function`.

        `function` gets the arguments by name, or the whole model if its one parameter is
        annotated with the tool's input model, and the context if it asks for it.

        Raises:
            ConfigError: `function` cannot take these arguments.
        """
        replaced = _rebuild(self.__getstate__())
        replaced._function = function
        replaced._signature = self._signature.bind(function, ToolContext)
        replaced.runs_elsewhere = False
        return replaced

    def fingerprint(self) -> str:
        """Return a digest of what the model sees: name, description and schemas."""
        seen = [self.name, self.description, self.parameters, self.output_schema]
        return hashlib.blake2b(
            msgspec.json.encode(seen, order="sorted"), digest_size=16
        ).hexdigest()

    def parse_args(self, args: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for the function, checked and with their Python types.

        Raises:
            ToolError: `invalid_args`; the message lists each wrong field for the model to mend.
        """
        args_json = args if isinstance(args, str | bytes) else msgspec.json.encode(args)
        try:
            # Of a name that comes twice, say, what follows would see one value only.
            parse_json(args_json)
            return self._signature.parse(args_json)
        except (ContractError, ValidationError) as error:
            raise ToolError(
                f"The arguments of {self.name!r} do not fit: {describe_mismatch(error)}.",
                code="invalid_args",
            ) from error

    async def call(
        self, args: str | bytes | Mapping[str, Any], context: ToolContext | None = None
    ) -> Any:
        """Run the implementation with checked arguments and return its result as plain JSON.

        A plain function runs in a thread, a coroutine function here. Cancelling fires
        `context.signal`; a thread then goes on until it returns, and its result is dropped.
        What it raises is logged to `context.log`, once: at WARNING with its traceback, a
        `ToolError` at INFO.

        Raises:
            ToolError: with code `invalid_args` if it was not run; `tool_error` if it raised,
                `tool_crashed` if it tried to end the process, `timeout` if it took longer than
                `timeout_ms`; `not_serializable`,
                `result_too_large` or `invalid_result` if it ran but its result is unusable;
                or the `ToolError` that it raised itself.
        """
        arguments = self.parse_args(args)
        context = context or ToolContext()
        if self._signature.context_parameter:
            arguments[self._signature.context_parameter] = context
        run = partial(self._implementation, **arguments)
        limit = self.timeout_ms
        bound = asyncio.timeout(None if limit is None else limit / 1000)
        try:
            async with bound:
                result = await self._execute(run, context)
        except asyncio.CancelledError as error:
            context.signal.abort("cancelled")
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled us: the tool awaited something that was cancelled.
            raise self._failure(error, context) from error
        except (Exception, SystemExit) as error:
            if bound.expired():
                context.signal.abort("timeout")
                raise ToolError(
                    f"It took over {limit} ms and was stopped.", code="timeout"
                ) from None
            raise self._failure(error, context) from error
        if isinstance(result, ToolError):
            raise result
        return result

    async def _execute(self, run: Callable[[], Any], context: ToolContext) -> Any:
        """Return the result, or as what it failed in a thread."""
        if self._runs_here:
            return self._to_json_value(await run())
        result = await in_thread(context, self._run_in_thread, run, context)
        return self._to_json_value(await result) if inspect.isawaitable(result) else result

    def _run_in_thread(self, run: Callable[[], Any], context: ToolContext) -> Any:
        """Return the result, or as what it failed."""
        watch = context.watch
        if watch is not None:
            watch.began()
        result, failure = None, None
        try:
            result = run()
            # Encoding a large result would hold up the loop.
            return result if inspect.isawaitable(result) else self._to_json_value(result)
        except BaseException as error:  # noqa: BLE001
            # A future cannot carry StopIteration (the waiter would never wake), and passing on
            # KeyboardInterrupt would stop the loop.
            failure = self._failure(error, context)
            if failure is not error:
                failure.__cause__ = error
            return failure
        finally:
            if watch is not None:
                watch.ended(result, failure)

    def _failure(self, error: BaseException, context: ToolContext) -> ToolError:
        """Log what a call raised, which is done once, and return it as an answer for the model."""
        call = context.idempotency_key
        if isinstance(error, ToolError):
            context.log.info("tool %r answers call %r with an error: %s", self.name, call, error)
            return error
        context.log.warning("tool %r failed in call %r", self.name, call, exc_info=error)
        code = "tool_error" if isinstance(error, Exception) else "tool_crashed"
        return ToolError(f"{self.name!r} failed: {type(error).__name__}: {error}", code=code)

    def _to_json_value(self, result: Any) -> Any:
        if self._output_type is not None:
            result = self._checked_output(result)
        # An iterator may never end.
        if isinstance(result, Iterator):
            kind = type(cast("object", result)).__name__
            raise self._not_serializable(f"it is an iterator ({kind}); return a list")
        try:
            encoded = to_json(result)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._not_serializable(error) from error
        if len(encoded) > self.max_result_bytes:
            raise ToolError(
                f"The result of {self.name!r} is {len(encoded):,} bytes of JSON; at most "
                f"{self.max_result_bytes:,} are kept.",
                code="result_too_large",
            )
        try:
            return from_json(encoded, allow_inf_nan=False)
        except ValueError as error:
            raise self._not_serializable(error) from error

    def _checked_output(self, result: Any) -> Any:
        try:
            return self._output.validate_python(result)
        except ValidationError as error:
            raise ToolError(
                f"{self.name!r} did not return what it promises: {describe_mismatch(error)}.",
                code="invalid_result",
            ) from error

    def _not_serializable(self, why: object) -> ToolError:
        return ToolError(
            f"The result of {self.name!r} has no JSON form: {why}.", code="not_serializable"
        )

    @property
    def _implementation(self) -> Callable[..., Any]:
        if self._function is None:
            raise ConfigError(
                f"Tool {self.name!r} has no implementation here; give it one, or run it where "
                f"it has one.",
                code="missing_implementation",
            )
        return self._function

    @property
    def _runs_here(self) -> bool:
        return is_async(self._function)

    @cached_property
    def _output(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._output_type)


def _rebuild(state: dict[str, Any]) -> Tool:
    made = object.__new__(Tool)
    made.__dict__ |= state
    return made


def _find(module: str, qualname: str) -> object:
    with suppress(ImportError, AttributeError, ValueError):
        return attrgetter(qualname)(import_module(module))
    return None


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    input_schema: type[BaseModel] | None = None,
    output_schema: Any = None,
    needs_approval: bool = False,
    max_result_bytes: int = MAX_RESULT_BYTES,
    timeout_ms: int | None = None,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    input_schema: type[BaseModel] | None = None,
    output_schema: Any = None,
    needs_approval: bool = False,
    max_result_bytes: int = MAX_RESULT_BYTES,
    timeout_ms: int | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a function a tool, as `@tool` or `@tool(...)`.

    Name and description come from the function and its docstring, the arguments from its
    annotations; a Google `Args:` section describes them. An `input_schema` takes the place of
    the signature: a function with one parameter annotated with it gets the model, any other gets
    the fields by name. A result must fit `output_schema`, if there is one. A call that takes over
    `timeout_ms` is cancelled and answered with an error; a thread goes on, which nobody can stop.

    Raises:
        ConfigError: the name, a parameter or a type cannot be offered to a model; or a bound
            cannot be (`invalid_bound`).
    """
    # Types defined inside a function are found nowhere else when annotations are strings.
    frame = inspect.currentframe()
    local_names = frame.f_back.f_locals if frame and frame.f_back else {}

    def make(function: Callable[..., Any]) -> Tool:
        tool_name = name or getattr(function, "__name__", type(function).__name__)
        if input_schema is None:
            signature = read_signature(
                function, tool_name=tool_name, context_type=ToolContext, local_names=local_names
            )
        else:
            signature = Signature(tool_name, model=input_schema).bind(
                function, ToolContext, local_names
            )
        return Tool(
            name=tool_name,
            description=description or parse_docstring(inspect.getdoc(function) or "")[0],
            signature=signature,
            function=function,
            output_type=output_schema,
            needs_approval=needs_approval,
            max_result_bytes=max_result_bytes,
            timeout_ms=timeout_ms,
        )

    return make if function is None else make(function)


def declare_tool(
    *,
    name: str,
    description: str,
    input_schema: type[BaseModel],
    output_schema: Any = None,
    needs_approval: bool = False,
    max_result_bytes: int = MAX_RESULT_BYTES,
    timeout_ms: int | None = None,
) -> Tool:
    """Return a tool without an implementation, for a model here and an executor elsewhere.

    An agent that has it writes a row for each call and waits, up to `timeout_ms`, until it ends.

    Raises:
        ConfigError: the name or a type cannot be offered to a model.
    """
    return Tool(
        name=name,
        description=description,
        signature=Signature(name, model=input_schema),
        function=None,
        output_type=output_schema,
        needs_approval=needs_approval,
        max_result_bytes=max_result_bytes,
        runs_elsewhere=True,
        timeout_ms=timeout_ms,
    )


def check_tools(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Return the tools by name.

    Raises:
        ConfigError: `duplicate_tool`: two share a name, so a call could mean either;
            `not_a_tool`: one is something else, such as a function without `@tool`.
    """
    by_name: dict[str, Tool] = {}
    for each in tools:
        if not isinstance(cast("object", each), Tool):
            raise ConfigError(
                f"{each!r} is not a tool: decorate the function with @tool.",
                code="not_a_tool",
            )
        if each.name in by_name:
            raise ConfigError(f"Two tools are named {each.name!r}.", code="duplicate_tool")
        by_name[each.name] = each
    return by_name


def encode_result(result: Any) -> str:
    """Return a result as the model reads it: text as it is, anything else as JSON."""
    return result if isinstance(result, str) else msgspec.json.encode(result).decode()


def encode_error(error: ToolError) -> str:
    """Return a failure as the model reads it, as JSON with its code and message."""
    return msgspec.json.encode({"error": error.code, "message": str(error)}).decode()


def describe_mismatch(error: ContractError | ValidationError) -> str:
    """Return what is wrong in one line, field by field, without the values."""
    if isinstance(error, ContractError):
        return str(error).removesuffix(".")
    return "; ".join(
        f"{where}: {wrong['msg']}" if (where := ".".join(map(str, wrong["loc"]))) else wrong["msg"]
        for wrong in error.errors(include_url=False, include_input=False)
    )


def is_async(function: object) -> bool:
    """Whether calling it makes a coroutine, so that it may run in the event loop."""
    while isinstance(function, partial):
        function = cast("partial[Any]", function).func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  An object with an async __call__.
    )


async def in_thread(context: ToolContext, run: Callable[..., Any], *args: Any) -> Any:
    """Run a plain function in one of the threads that are for the user's functions."""
    threads = None if context.watch is None else context.watch.threads
    call = partial(copy_context().run, run, *args)
    return await asyncio.get_running_loop().run_in_executor(threads, call)
