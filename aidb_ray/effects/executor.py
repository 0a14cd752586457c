"""Executors of tool calls: whoever owns the tools runs the rows that ask for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel

from aidb_ray.contracts import AgentMessage
from aidb_ray.database import Database
from aidb_ray.effects.definition import (
    ONCE,
    EffectDefinition,
    InDoubt,
    LateResults,
    Placement,
    Reconcile,
    check_contract,
)
from aidb_ray.effects.effect import Effect, start_effect
from aidb_ray.effects.tools import TERMINAL, DurableTool, field_of
from aidb_ray.errors import ConfigError
from aidb_ray.models.tools import Tool, ToolContext, check_tools
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.retry import Retry
from aidb_ray.store.changes import Insert
from aidb_ray.store.rows import codec_of

_messages = codec_of(AgentMessage, "id")
_MAX_DEFAULT_NAME = 200


def create_tool_execution_effect(
    *,
    query: Callable[[QueryRoot], Query[Any]] | Query[Any],
    tools: Sequence[Tool],
    implementations: Mapping[str, Callable[..., Any]] | None = None,
    name: str | None = None,
    on_executing: Callable[..., Any] | None = None,
    on_complete: Callable[..., Any] | None = None,
    on_error: Callable[..., Any] | None = None,
    is_complete: Callable[[Any], bool] | None = None,
    max_running: int = 8,
    lease_ms: int = 30_000,
    timeout_ms: int | None = None,
    grace_ms: int = 5_000,
    retry: Retry = ONCE,
    late_results: LateResults = "discard",
    on_in_doubt: InDoubt | Reconcile = "retry",
    placement: Placement = "actor",
    processes: int = 1,
    version: str | None = None,
    ray_options: Mapping[str, Any] | None = None,
    database: Database | None = None,
) -> Effect:
    """Start an executor of tool calls: it claims rows that the query finds and runs their tools.

    Several executors, of one process or of many, may follow the same rows: each row is run by
    whoever claims it, and written once. What an executor leaves in the middle when its process
    dies is taken over by another one of the same name, at the latest when its lease has ended.

    A callback is given the row as it is, and the context if it takes one more argument. What it
    writes to the row's session is made under the claim; of `on_complete` and `on_error` in one
    commit with the end of the claim.

    Args:
        query: Finds the pending rows of one collection; it may join others. Rows whose `name` is
            not among the tools are left to others, and so is what is not synced.
        tools: What it runs; rows name them.
        implementations: Functions by tool name, where a tool has none or another one.
        name: Who shares claims with whom; default: the names of the tools, or a digest of them
            if they are many.
        on_executing: Writes that a row is being worked on; default: `status` and `attempt`.
        on_complete: `(row, result)`; default: `status` and `result`.
        on_error: `(row, error)`, a `ToolError`; default: `status`, `error` and `error_code`.
        is_complete: Whether a row has ended; default: its status is not the one that
            `on_executing` gave it, and the query does not find it.
        max_running: Rows run at once in each process.
        lease_ms: How long a claim outlives its process. Leases are renewed while rows run.
        timeout_ms: Bound on one call. An async tool is cancelled; a thread goes on, and its slot
            stays taken until it returns.
        grace_ms: How long closing waits for threads.
        retry: How often a tool that raised is tried again, and how many lost processes a row may
            have.
        late_results: What becomes of a result that comes after the row has ended, by a cancel or a
            timeout: dropped and logged, or written to its `late_result`.
        on_in_doubt: What becomes of a row that was run when a process died: run again, under the
            same idempotency key; failed with the code `in_doubt`; left until a person writes it
            (`approve`, `reject`, or whatever makes it pending again); or a function `(row, ctx)`
            that finds out, and returns `Happened(result)`, or None to have it run again.
        placement: `actor`: a process of its own on Ray, found by its name; `here`: in this process,
            which has the credentials, say.
        processes: How many actors.
        version: Change it when only code changes, so that an effect that runs is replaced. What
            else is given here counts by itself, but for `grace_ms`.
        ray_options: Resources of each actor.
        database: Default: the current one.

    Raises:
        ConfigError: `missing_implementation`: a tool has none, or one names no tool;
            `duplicate_tool`; `contract`: the rows lack a field of `ToolCallContract`; or an option
            cannot be.
        QueryError: the query does not find rows of a collection.
    """
    owned = _with_implementations(tools, implementations or {})
    built = build(query)
    needs_approval = any(tool.needs_approval for tool in owned.values())
    needed = ("id", "name", "status", "args", *(("approval",) if needs_approval else ()))
    check_contract(built, needed)
    execution = _Execution(owned)
    return start_effect(
        EffectDefinition(
            name=name or _default_name(owned),
            query=built,
            handler=execution.run,
            what=tuple(f"{tool.fingerprint()} {tool.needs_approval}" for tool in owned.values()),
            on_executing=on_executing,
            on_complete=on_complete,
            on_error=on_error,
            is_complete=is_complete,
            owns=execution.owns,
            needs_approval=execution.needs_approval,
            follow_up=tell_agent,
            max_running=max_running,
            lease_ms=lease_ms,
            timeout_ms=timeout_ms,
            grace_ms=grace_ms,
            retry=retry,
            late_results=late_results,
            on_in_doubt=on_in_doubt,
            placement=placement,
            processes=processes,
            version=version,
            ray_options=dict(ray_options or {}),
        ),
        database,
    )


def _default_name(names: Iterable[str]) -> str:
    name = ".".join(sorted(names))
    if len(name) <= _MAX_DEFAULT_NAME:
        return name
    return f"tools.{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


class _Execution:
    """Runs the tools that rows name."""

    def __init__(self, tools: Mapping[str, Tool]) -> None:
        self._tools = tools

    async def run(self, row: Any, context: ToolContext) -> Any:
        args = field_of(row, "args")
        if isinstance(args, BaseModel):
            args = args.model_dump(mode="json", by_alias=True)
        return await self._tools[field_of(row, "name")].call({} if args is None else args, context)

    def owns(self, fields: Mapping[str, Any]) -> bool:
        return fields.get("name") in self._tools

    def needs_approval(self, fields: Mapping[str, Any]) -> bool:
        return self._tools[fields["name"]].needs_approval


def tell_agent(session: str, fields: Mapping[str, Any]) -> Sequence[Insert]:
    """Return the message that tells an agent of the end of its job, if it wants to hear of it."""
    if not fields.get("wakesAgent") or fields.get("status") not in TERMINAL:
        return ()
    told = {"job_id": fields["id"], "tool": fields.get("name"), "status": fields["status"]}
    if fields["status"] == "completed":
        told["result"] = fields.get("result")
    else:
        told["error"] = fields.get("error")
    message = AgentMessage(
        id=f"{fields['id']}:end",
        role="user",
        actor_id=str(fields.get("name")),
        target_agent=str(fields.get("agent")),
        content=msgspec.json.encode(told).decode(),
    )
    key, value = _messages.encode("messages", message)
    return (Insert(session, "messages", key, value),)


def _with_implementations(
    tools: Sequence[Tool], implementations: Mapping[str, Callable[..., Any]]
) -> dict[str, Tool]:
    by_name = check_tools(tools)
    if not by_name:
        raise ConfigError("An executor without tools runs nothing.", code="missing_implementation")
    for extra in implementations.keys() - by_name.keys():
        raise ConfigError(
            f"There is an implementation of {extra!r}, but no such tool.",
            code="missing_implementation",
        )
    for name, function in implementations.items():
        by_name[name] = by_name[name].with_implementation(function)
    for name, tool in by_name.items():
        if not tool.has_implementation or isinstance(tool, DurableTool):
            raise ConfigError(
                f"Tool {name!r} has no implementation: give it one in `implementations`.",
                code="missing_implementation",
            )
    return by_name
