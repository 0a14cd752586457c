"""Tool calls as rows: written where a model asks for them, run by whoever owns the tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from pydantic import BaseModel

from aidb_ray.contracts import ToolCall
from aidb_ray.effects.waiters import waiters_of
from aidb_ray.effects.writing import error_of
from aidb_ray.errors import (
    ConfigError,
    ConflictError,
    KeyExistsError,
    KeyMissingError,
    ToolError,
)
from aidb_ray.expressions import in_array
from aidb_ray.models.tools import Tool, ToolContext, check_tools
from aidb_ray.store.collection import Collection, Site

TERMINAL = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class RequestedCall:
    """A tool call that a model asks for, as `transform` is given it."""

    id: str
    name: str
    args: Any


class DurableTool(Tool):
    """A tool whose calls are rows that an executor runs, wherever it is."""

    def __init__(
        self,
        tool: Tool,
        tool_calls: Collection[Any],
        *,
        transform: Callable[[RequestedCall, str], Any] | None,
        is_complete: Callable[[Any], bool] | None,
        get_result: Callable[[Any], Any] | None,
        timeout_ms: int | None,
    ) -> None:
        self.__dict__ |= tool.__dict__
        self._function = None
        self._tool_calls = tool_calls
        self._transform = transform
        self._is_complete = is_complete
        self._get_result = get_result
        self.timeout_ms = timeout_ms
        is_own = tool_calls.name == "tool_calls" and tool_calls.row_type is ToolCall
        # An agent's calls are such rows already; it writes them itself and waits for their ends.
        self.runs_elsewhere = is_own and (transform, is_complete, get_result) == (None, None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__getstate__())

    @property
    def has_implementation(self) -> bool:
        """Whether a call can be made here: its row can."""
        return True

    async def call(
        self, args: str | bytes | Mapping[str, Any], context: ToolContext | None = None
    ) -> Any:
        """Write the call as a row, wait until an executor has ended it, and return its result.

        A call with the idempotency key of an earlier one waits for that row. Whoever is cancelled
        stops waiting; the row goes on.

        Raises:
            ToolError: `invalid_args`: nothing was written; `timeout`: there was no end in time, and
                a row of the default type is failed with that; `gone`: the row was deleted; or what
                the row's end says.
        """
        self.parse_args(args)
        context = context or ToolContext()
        requested = RequestedCall(context.idempotency_key, self.name, _decoded(args))
        rows, site = self._home(context)
        row = self._row(requested, context)
        codec = rows.decode_row

        def is_over(value: bytes) -> bool:
            ended = codec(value)
            if self._is_complete is not None:
                return self._is_complete(ended)
            return field_of(ended, "status") in TERMINAL

        async def write() -> bool:
            try:
                await rows.insert(row)
            except KeyExistsError:
                return True
            return False

        key = str(field_of(row, rows.key))
        waiters = waiters_of(site.client, rows.session or "", rows.name)
        limit = self.timeout_ms
        try:
            async with asyncio.timeout(None if limit is None else limit / 1000):
                value = await waiters.until(key, is_over, write)
        except TimeoutError:
            await self._give_up(rows, key)
            raise ToolError(
                f"{self.name!r} was not run to its end within {limit} ms.", code="timeout"
            ) from None
        except KeyMissingError as error:
            raise ToolError(f"The call of {self.name!r} was deleted.", code="gone") from error
        ended = codec(value)
        if self._get_result is None:
            return result_of(ended)
        try:
            return self._get_result(ended)
        except Exception as error:  # A door: what the user's function raises is the call's error.
            raise error_of(error) from error

    def _home(self, context: ToolContext) -> tuple[Collection[Any], Site]:
        """Return the collection in the session that the call is of, and its partition."""
        return home_of(self._tool_calls, context)

    def _row(self, requested: RequestedCall, context: ToolContext) -> Any:
        if self._transform is not None:
            return self._transform(requested, context.generation_id)
        return call_row(self, requested, context)

    async def _give_up(self, rows: Collection[Any], key: str) -> None:
        """Fail a row of the default type, unless it has ended in this moment."""
        if rows.row_type is not ToolCall:
            return
        words = f"It was not run to its end within {self.timeout_ms} ms."
        changes = {"status": "failed", "error": words, "error_code": "timeout"}
        with suppress(ConflictError, KeyMissingError):
            await rows.update(
                key, changes, when=lambda call: in_array(call.status, ["pending", "executing"])
            )


class AsyncTool(DurableTool):
    """A tool whose calls are rows that nobody waits for: a job handle is the answer."""

    def __init__(
        self,
        tool: Tool,
        tool_calls: Collection[Any],
        *,
        transform: Callable[[RequestedCall, str], Any] | None,
        get_immediate_result: Callable[[Any], Any] | None,
        wake_agent: bool,
    ) -> None:
        super().__init__(
            tool,
            tool_calls,
            transform=transform,
            is_complete=None,
            get_result=None,
            timeout_ms=None,
        )
        self.runs_elsewhere = False
        # The answer is the job's handle, not what the tool promises.
        self.output_schema = None
        self._get_immediate_result = get_immediate_result
        self._wake_agent = wake_agent

    async def call(
        self, args: str | bytes | Mapping[str, Any], context: ToolContext | None = None
    ) -> Any:
        """Write the call as a row, and return a handle of the job once that is durable.

        Raises:
            ToolError: `invalid_args`: nothing was written.
        """
        self.parse_args(args)
        context = context or ToolContext()
        # Beside the row of the call itself, which an agent writes and ends at once.
        job_id = f"{context.idempotency_key}:job"
        requested = RequestedCall(job_id, self.name, _decoded(args))
        rows, site = self._home(context)
        row = self._row(requested, context)
        key = str(field_of(row, rows.key))
        # It is there already if a crash came between the row and the answer.
        with suppress(KeyExistsError):
            await rows.insert(row)
        found = await site.client.find(rows.session or "", rows.name, key)
        written = row if found is None else rows.decode_row(found.value)
        if self._get_immediate_result is not None:
            return self._get_immediate_result(written)
        return {"job_id": key, "status": "queued"}

    def _row(self, requested: RequestedCall, context: ToolContext) -> Any:
        row = super()._row(requested, context)
        if not self._wake_agent:
            return row
        if not context.agent:
            raise ToolError(
                "Only a call of an agent has one to wake; leave wake_agent out.", code="no_agent"
            )
        wakes = {"agent": context.agent, "wakes_agent": True}
        if isinstance(row, BaseModel):
            return row.model_copy(update=wakes)
        return {**row, **wakes}


def make_durable_tool(
    tool: Tool,
    tool_calls: Collection[Any],
    *,
    transform: Callable[[RequestedCall, str], Any] | None = None,
    is_complete: Callable[[Any], bool] | None = None,
    get_result: Callable[[Any], Any] | None = None,
    timeout_ms: int | None = 60_000,
) -> Tool:
    """Return the tool as a model sees it, whose calls are rows that an executor runs.

    The row is durable before anybody runs it, and a call that is made again after a crash, under
    the same idempotency key, finds its row. Some `create_tool_execution_effect` must own the tool.

    Args:
        tool: Needs no implementation; see `declare_tool`.
        tool_calls: Where rows are written. In an agent, rows of the session's own `tool_calls` are
            its calls themselves, so each is one row; a collection of a pattern of sessions stands
            for that of the call's session.
        transform: `(call, generation_id) -> row`; default: a `ToolCall` that is pending.
        is_complete: Whether a row has ended; default: its status is one of the three ends.
        get_result: What the model is told of an ended row. What it raises is the call's error.
        timeout_ms: How long to wait for the end; None is without bound. A call that nobody ended
            in time is an error for the model; what comes later follows the executor's
            `late_results`.
    """
    return DurableTool(
        tool,
        _checked_rows(tool_calls, is_default=transform is None),
        transform=transform,
        is_complete=is_complete,
        get_result=get_result,
        timeout_ms=_checked_timeout(timeout_ms),
    )


def make_durable_tools(
    tools: Sequence[Tool],
    tool_calls: Collection[Any],
    *,
    transform: Callable[[RequestedCall, str], Any] | None = None,
    is_complete: Callable[[Any], bool] | None = None,
    get_result: Callable[[Any], Any] | None = None,
    timeout_ms: int | None = 60_000,
) -> list[Tool]:
    """Return `make_durable_tool` of each.

    Raises:
        ConfigError: `duplicate_tool`: two share a name.
    """
    return [
        make_durable_tool(
            tool,
            tool_calls,
            transform=transform,
            is_complete=is_complete,
            get_result=get_result,
            timeout_ms=timeout_ms,
        )
        for tool in check_tools(tools).values()
    ]


def make_async_tool(
    tool: Tool,
    tool_calls: Collection[Any],
    *,
    transform: Callable[[RequestedCall, str], Any] | None = None,
    get_immediate_result: Callable[[Any], Any] | None = None,
    wake_agent: bool = False,
) -> Tool:
    """Return the tool as a model sees it, whose calls are jobs: the answer is a handle at once.

    Args:
        tool: Needs no implementation.
        tool_calls: Where the job's row is written. See `make_durable_tool`.
        transform: `(call, generation_id) -> row`; default: a `ToolCall` that is pending.
        get_immediate_result: What the model is told, from the row; default: the job's id, and that
            it is queued.
        wake_agent: Whether the end of the job is told to the agent that asked for it: by a message
            in the same commit, which the agent then answers. For rows of the default type that are
            ended by an executor's own writes, not by callbacks.
    """
    if wake_agent and tool_calls.row_type is not ToolCall:
        raise ConfigError(
            "wake_agent needs rows of the type ToolCall; for others write the message in "
            "on_complete.",
            code="invalid_option",
        )
    return AsyncTool(
        tool,
        _checked_rows(tool_calls, is_default=transform is None),
        transform=transform,
        get_immediate_result=get_immediate_result,
        wake_agent=wake_agent,
    )


def call_row(tool: Tool, requested: RequestedCall, context: ToolContext) -> dict[str, Any]:
    """Return the fields of a pending `ToolCall`."""
    return {
        "id": requested.id,
        "generation_id": context.generation_id,
        "name": requested.name,
        "args": requested.args,
        "agent": context.agent,
        "approval": "needed" if tool.needs_approval else None,
    }


def result_of(row: Any) -> Any:
    """Return the result of an ended row of the default fields.

    Raises:
        ToolError: it failed, or was cancelled.
    """
    status = field_of(row, "status")
    if status == "completed":
        return field_of(row, "result")
    code = field_of(row, "error_code") or ("cancelled" if status == "cancelled" else "tool_error")
    raise ToolError(str(field_of(row, "error") or f"The call was {status}."), code=str(code))


def home_of(rows: Collection[Any], context: ToolContext) -> tuple[Collection[Any], Site]:
    """Return a collection as it is in the session of a call, and its partition."""
    if rows.session is not None and rows.session.endswith("*"):
        if context.session is None:
            raise ToolError(f"{rows!r} is of many sessions, the call of none.", code="no_session")
        rows = rows.in_session(context.session.url)
    return rows, rows.site


def _checked_rows(rows: Collection[Any], *, is_default: bool) -> Collection[Any]:
    needed = ("id", "generation_id", "name", "args", "status")
    fields = rows.fields
    missing = [name for name in needed if fields is not None and name not in fields]
    if is_default and missing:
        raise ConfigError(
            f"Rows of {rows.name!r} have no field {', '.join(missing)}: give a `transform` that "
            f"makes them.",
            code="contract",
        )
    return rows


def _checked_timeout(timeout_ms: int | None) -> int | None:
    if timeout_ms is not None and timeout_ms < 1:
        raise ConfigError("timeout_ms is 1 or more, or None.", code="invalid_bound")
    return timeout_ms


def _decoded(args: str | bytes | Mapping[str, Any]) -> Any:
    return msgspec.json.decode(args) if isinstance(args, str | bytes) else dict(args)


def field_of(row: Any, name: str) -> Any:
    """Return a field of a row of any type, None if it has none of that name."""
    if isinstance(row, Mapping):
        return cast("Mapping[str, Any]", row).get(name)
    return getattr(row, name, None)


def _rebuild(kind: type[DurableTool], state: dict[str, Any]) -> DurableTool:
    made = object.__new__(kind)
    made.__dict__ |= state
    return made
