"""Generation driven by rows: whoever inserts a pending one gets it completed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
from aidb_ray.effects.writing import error_of
from aidb_ray.errors import ModelError, ToolError
from aidb_ray.models.round import Round
from aidb_ray.models.tools import ToolContext, in_thread, is_async
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.retry import Retry


def create_generation_effect(
    *,
    query: Callable[[QueryRoot], Query[Any]] | Query[Any],
    generate: Callable[[Any, ToolContext], Any],
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
    """Start an executor of generations: it claims rows that the query finds and generates for them.

    Claims, callbacks, timeouts and what happens after a crash are as for
    `create_tool_execution_effect`.

    Args:
        query: Finds the pending rows of one collection.
        generate: `(row, ctx)`: returns text, a value, or a stream of AG-UI events or texts, of
            which the text is taken. A plain function runs in a thread, and a stream or coroutine
            that it returns runs in the event loop. Its task is cancelled, and `ctx.signal` fires,
            when the row is cancelled or the effect closed, so a `chat` that it awaits is aborted.
        name: Who shares claims with whom; default: `generation.` and the collection's name.
        on_executing: Default: `status` becomes `running`.
        on_complete: `(row, result)`; default: `status` `completed`, and `result` or `output`.
        on_error: `(row, error)`; default: `status` `failed`, and `error`.
        is_complete: See `create_tool_execution_effect`, as for the others.
        max_running: Rows at once in each process.
        lease_ms: How long a claim outlives its process.
        timeout_ms: Bound on one generation.
        grace_ms: How long closing waits.
        retry: How often one that raised is tried again.
        late_results: What becomes of results that come too late.
        on_in_doubt: What becomes of a row whose process died in the middle.
        placement: `actor` or `here`.
        processes: How many actors.
        version: Part of the effect's identity.
        ray_options: Resources of each actor.
        database: Default: the current one.

    Raises:
        ConfigError: `contract`: the rows lack a field of `GenerationContract`; or an option cannot
            be.
    """
    built = build(query)
    check_contract(built, ("id", "status"))
    return start_effect(
        EffectDefinition(
            name=name or _default_name(built),
            query=built,
            handler=_Generating(generate).run,
            what=("generation",),
            on_executing=on_executing,
            on_complete=on_complete,
            on_error=on_error,
            is_complete=is_complete,
            statuses=("running", "completed", "failed"),
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


def _default_name(query: Query[Any]) -> str:
    source = query.sources[0][1]
    return f"generation.{getattr(source, 'name', '')}".replace("/", ".").rstrip(".")


class _Generating:
    """Calls the user's function and takes the text of what it streams."""

    def __init__(self, generate: Callable[[Any, ToolContext], Any]) -> None:
        self._generate = generate

    async def run(self, row: Any, context: ToolContext) -> Any:
        if is_async(self._generate) or inspect.isasyncgenfunction(self._generate):
            result = self._generate(row, context)
        else:
            result = await in_thread(context, self._in_thread, row, context)
        if inspect.isawaitable(result):
            result = await result
        if not hasattr(result, "__aiter__"):
            return result
        heard, texts = Round(), list[str]()
        async for item in result:
            if isinstance(item, str):
                texts.append(item)
            else:
                heard.add(item)
        if heard.error is not None:
            raise ModelError(heard.error, retryable=False)
        return "".join(texts) or heard.text

    def _in_thread(self, row: Any, context: ToolContext) -> Any:
        watch = context.watch
        assert watch is not None
        watch.began()
        result, failure = None, None
        try:
            result = self._generate(row, context)
        except Exception as error:
            failure = error_of(error)
            raise
        except BaseException as error:
            # Passed on, it would end the event loop.
            failure = ToolError(f"It tried to end its process: {error!r}.", code="tool_crashed")
            raise failure from error
        finally:
            is_text = not (inspect.isawaitable(result) or hasattr(result, "__aiter__"))
            watch.ended(result if is_text else None, failure)
        return result
