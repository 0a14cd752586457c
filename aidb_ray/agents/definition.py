"""What an agent is: its definition as a value, checked when it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec
from pydantic import BaseModel

from aidb_ray.agents.delegation import AgentTool, Delegate, check_delegates
from aidb_ray.contracts import AgentMessage, is_valid_name
from aidb_ray.errors import ConfigError
from aidb_ray.models.base import TextAdapter, adapter_fingerprint, check_adapter
from aidb_ray.models.tools import Tool, check_tools
from aidb_ray.query.builder import Query, build, only_source
from aidb_ray.retry import Retry, check_bounds

BuildMessages: TypeAlias = Callable[[list[Any], Any], Any]
Generate: TypeAlias = Callable[[Any], Any]
OnResponse: TypeAlias = Callable[[Any, list[Any]], Any]
InDoubt: TypeAlias = Literal["retry", "fail", "park"]
OnCrash: TypeAlias = Literal["retry", "continue"]

_RETRY = Retry()


@dataclass(frozen=True, slots=True)
class UsageLimits:
    """Bounds of one generation; None is without. Reaching one fails the generation."""

    max_total_tokens: int | None = None
    max_tool_calls: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "max_total_tokens", "max_tool_calls", least=0, may_be_none=True)


@dataclass(frozen=True, slots=True)
class History:
    """Which messages of the session the model reads: the newest that fit.

    Attributes:
        max_tokens: Estimated as a token per 4 characters; None is without bound. The messages
            to answer always go.
    """

    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "max_tokens", least=0, may_be_none=True)


@dataclass(frozen=True, slots=True)
class AgentDefinition:
    """All that an agent is, as `create_agent` takes it; made by `durable_agent`.

    See `durable_agent` and `create_agent` for the options.
    """

    name: str
    adapter: TextAdapter | None = None
    instructions: str = ""
    tools: tuple[Tool, ...] = ()
    agents: tuple[Delegate, ...] = ()
    stream_url: str = ""
    build_messages: BuildMessages | None = None
    history: History = History()
    output_schema: type[BaseModel] | None = None
    max_iterations: int = 10
    retry: Retry = _RETRY
    usage_limits: UsageLimits = UsageLimits()
    run_timeout_ms: int | None = None
    idle_timeout_ms: int | None = 60_000
    on_in_doubt: InDoubt = "retry"
    on_crash: OnCrash = "retry"
    version: str | None = None
    shards: int = 1
    max_running: int = 256
    ray_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    autostart: bool = True
    pending_work: Query[Any] | None = None
    session: Callable[[Any], str] | None = None
    generate: Generate | None = None
    on_response: OnResponse | None = None
    system_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def is_pattern(self) -> bool:
        """Whether it works for every session that matches."""
        return self.stream_url.endswith("*")

    @property
    def is_raw(self) -> bool:
        """Whether it answers rows of the user's own, and not messages."""
        return self.pending_work is not None

    @property
    def offered(self) -> tuple[Tool, ...]:
        """What the model may call: tools and other agents."""
        return (*self.tools, *(delegate.tool for delegate in self.agents))

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the model is told before the conversation."""
        return (self.instructions, *self.system_prompts)[not self.instructions :]

    @property
    def reaches(self) -> frozenset[str]:
        """Names of the agents that it delegates to, and they in turn, as far as known."""
        names = frozenset(delegate.name for delegate in self.agents)
        return names.union(*(delegate.reaches for delegate in self.agents))

    def fingerprint(self) -> str:
        """Return a digest of what makes this agent answer as it does, and when it gives up.

        Functions count only as far as tools' schemas do; say `version=` when one changes.
        """
        parts = {
            "name": self.name,
            "instructions": self.instructions,
            "adapter": None if self.adapter is None else adapter_fingerprint(self.adapter),
            "tools": sorted(tool.fingerprint() for tool in self.tools),
            "agents": sorted(delegate.fingerprint() for delegate in self.agents),
            "stream_url": self.stream_url,
            "output": None
            if self.output_schema is None
            else self.output_schema.model_json_schema(),
            "version": self.version,
            "shards": self.shards,
            "approvals": sorted(tool.name for tool in self.tools if tool.needs_approval),
            "bounds": (self.max_iterations, self.usage_limits, self.run_timeout_ms, self.history),
            "failures": (self.retry, self.on_in_doubt, self.on_crash),
            "pending": str(self.pending_work),
        }
        encoded = msgspec.json.encode(parts, order="sorted")
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def durable_agent(
    *,
    name: str,
    adapter: TextAdapter,
    instructions: str = "",
    tools: Sequence[Tool] = (),
    agents: Sequence[AgentTool] = (),
    stream_url: str | None = None,
    build_messages: Callable[[list[AgentMessage], Any], Any] | None = None,
    history: History | None = None,
    output_schema: type[BaseModel] | None = None,
    max_iterations: int = 10,
    retry: Retry | None = None,
    usage_limits: UsageLimits | None = None,
    run_timeout_ms: int | None = None,
    idle_timeout_ms: int | None = 60_000,
    on_in_doubt: InDoubt = "retry",
    on_crash: OnCrash = "retry",
    version: str | None = None,
    shards: int = 1,
    max_running: int = 256,
    ray_options: Mapping[str, Any] | None = None,
    autostart: bool = True,
) -> AgentDefinition:
    """Return the definition of an agent over the default collections, for `create_agent`.

    Args:
        name: Messages with this `target_agent` are its work.
        adapter: The model.
        instructions: Given to the model as its system prompt.
        tools: What the model may call; each call is a row. They run in the agent's process, but
            for those that run elsewhere. Calls that need an approval, or run elsewhere, have the
            generation wait, for as long as it takes and across restarts.
        agents: Other agents that the model may ask, as it calls tools. Question and answer are
            messages of the session, correlated by `request_id` and `in_reply_to`; while it waits
            the generation is left alone, across restarts of either. A request that fails, or is
            cancelled, is answered with the error. What ends this generation before its time
            cancels what it asked.
        stream_url: One session, or a pattern ending in `*`: every session that matches, now and
            later. Default `aidb://<name>/*`. Agents it delegates to must work for them, too.
        build_messages: `(pending, ctx) -> messages` for the model; default: the history.
        history: How much of the session the model reads.
        output_schema: The reply is JSON that fits this model.
        max_iterations: Model rounds in one generation.
        retry: How errors of the provider are tried again, and how often lost processes.
        usage_limits: Bounds of one generation.
        run_timeout_ms: Bound on the work on one generation in this process, and on its age while
            it waits for others.
        idle_timeout_ms: Longest silence of a model, that before its first event included; None
            is without bound. A stream that does not end when it is cancelled for it is cancelled
            again for 5 s, then left behind.
        on_in_doubt: What becomes of a tool call that was running when the process died: run it
            again under the same idempotency key, answer it with an error, or leave the session
            alone until it is decided. Whoever decides writes the call's row: a terminal `status`
            with `result` or `error`, or `approval`, as `approve` and `reject` do: `approved` has
            it run again once, `rejected` answers it with an error.
        on_crash: What becomes of a model round whose process died in the middle. Both ways it is
            a new attempt. `"retry"` asks again from the start of the round. `"continue"` gives the
            model what it had said, as far as that is stored, as a last assistant message, and the
            round's text is that and what comes; reasoning and calls that it had begun are dropped.
            The provider must take a last assistant message for the beginning of its own answer
            (prefill) and send only the rest, by itself, as llama.cpp's server does, or when asked
            to, see `prefill` of `openai_text`. One that answers anew, as OpenAI's own models do,
            would say things twice. Where nothing is stored, as `"retry"`.
        version: Part of the agent's identity; change it when code changes that no schema shows.
        shards: Processes that share the sessions by bucket.
        max_running: Sessions at work at once, per shard; the others wait as queue entries.
        ray_options: Resources of each shard: `num_cpus`, `num_gpus`, `resources`, `runtime_env`.
        autostart: Whether it works by itself; else only when `drain_until_idle` or
            `run_generation_cycle` is called.
    """
    return AgentDefinition(
        name=name,
        adapter=adapter,
        instructions=instructions,
        tools=tuple(tools),
        agents=tuple(each.to_delegate() for each in agents),
        stream_url=stream_url if stream_url is not None else f"aidb://{name}/*",
        build_messages=build_messages,
        history=history or History(),
        output_schema=output_schema,
        max_iterations=max_iterations,
        retry=retry or Retry(),
        usage_limits=usage_limits or UsageLimits(),
        run_timeout_ms=run_timeout_ms,
        idle_timeout_ms=idle_timeout_ms,
        on_in_doubt=on_in_doubt,
        on_crash=on_crash,
        version=version,
        shards=shards,
        max_running=max_running,
        ray_options=dict(ray_options or {}),
        autostart=autostart,
    )


def raw_definition(
    *,
    name: str,
    pending_work: Callable[..., Any],
    generate: Generate | None,
    adapter: TextAdapter | None = None,
    instructions: str = "",
    tools: Sequence[Tool] = (),
    session: Callable[[Any], str] | None = None,
    build_messages: BuildMessages | None = None,
    on_response: OnResponse | None = None,
    **options: Any,
) -> AgentDefinition:
    """Return the definition of an agent over collections of the user's own."""
    if generate is None:
        raise ConfigError(
            f"Agent {name!r} has a `pending_work` of its own and so needs `generate`.",
            code="generate_required",
        )
    query = build(pending_work)
    _alias, source = only_source(query, f"The `pending_work` of agent {name!r}")
    return AgentDefinition(
        name=name,
        adapter=adapter,
        instructions=instructions,
        tools=tuple(tools),
        stream_url=source.session or "",
        build_messages=build_messages,
        pending_work=query,
        session=session,
        generate=generate,
        on_response=on_response,
        **options,
    )


def _check(definition: AgentDefinition) -> None:
    name = definition.name
    if not is_valid_name(name) or "/" in name or "*" in name:
        raise ConfigError(f"{name!r} cannot name an agent.", code="invalid_name")
    if definition.adapter is not None or definition.generate is None:
        check_adapter(definition.adapter)
    check_tools(definition.offered)
    if definition.agents and definition.is_raw:
        raise ConfigError(
            "Only agents over messages delegate; ask others in `generate` as you like.",
            code="invalid_option",
        )
    check_delegates(name, definition.stream_url, definition.agents)
    for tool in definition.tools:
        if not tool.has_implementation and not tool.runs_elsewhere:
            raise ConfigError(
                f"Tool {tool.name!r} has no implementation; agents run their tools themselves.",
                code="missing_implementation",
            )
    url = definition.stream_url
    if definition.pending_work is None and (
        not url.startswith("aidb://") or not is_valid_name(url.removesuffix("*"))
    ):
        raise ConfigError(
            f"{url!r} is no session; it looks like 'aidb://support/42' or 'aidb://support/*'.",
            code="invalid_name",
        )
    if not 1 <= definition.shards <= 1024:
        raise ConfigError("An agent has 1 to 1,024 shards.", code="invalid_shards")
    if definition.shards > 1 and not definition.is_pattern:
        raise ConfigError(
            "Rows of one session, or of none, cannot be shared by several shards; follow a "
            "pattern of sessions or leave shards=1.",
            code="invalid_shards",
        )
    check_bounds(definition, "max_running", "max_iterations", least=1)
    check_bounds(definition, "run_timeout_ms", "idle_timeout_ms", least=1, may_be_none=True)
    if definition.on_in_doubt not in ("retry", "fail", "park"):
        raise ConfigError(
            f"on_in_doubt is 'retry', 'fail' or 'park', not {definition.on_in_doubt!r}.",
            code="invalid_option",
        )
    if definition.on_crash not in ("retry", "continue"):
        raise ConfigError(
            f"on_crash is 'retry' or 'continue', not {definition.on_crash!r}.",
            code="invalid_option",
        )
    if definition.on_crash == "continue" and definition.generate is not None:
        raise ConfigError(
            "on_crash='continue' is for agents that ask their adapter; what `generate` of your own "
            "has done is kept with ctx.step().",
            code="invalid_option",
        )
