"""One generation as a state machine: from pending messages to a reply, round by round. Pure.

Nothing here waits, stores or asks. `advance` says what follows from what happened; after a crash
`resume` says what follows from the rows that were durable.

    asking ──RoundFinished, no calls──────────────────────────> ended (completed)
      │  ▲ └─RoundFailed: Pause, ask again, or ────────────────> ended (failed)
      │  │
      │  └── all calls answered
      ▼  │
    calling ──CallFinished, until the last
    any ──Cancelled──> ended (cancelled)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

import msgspec
from msgspec.structs import replace

from aidb_ray.agents.definition import Retry, UsageLimits
from aidb_ray.agents.rows import GenerationRow, ToolCallRow
from aidb_ray.models.base import ToolCallRequest, Usage

Ending: TypeAlias = Literal["completed", "failed", "cancelled"]

ALONE_AFTER = 3
"""Interruptions in a row from which on a generation may be what ends its processes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one generation may use."""

    max_rounds: int = 10
    retry: Retry = field(default_factory=Retry)
    usage: UsageLimits = field(default_factory=UsageLimits)


class Cycle(msgspec.Struct, frozen=True):
    """Where one generation stands.

    Attributes:
        rounds: Text of each finished round that asked for tools.
        open_calls: Keys of calls of the newest round that have no answer yet.
        call_count: Calls of all rounds.
        attempt: Counts starts of the unfinished round over the whole generation, from 1.
        failures: How often the unfinished round failed in a row.
        interruptions: How often in a row a process ended before the round and its calls were done.
    """

    generation_id: str
    phase: Literal["asking", "calling", "ended"] = "asking"
    rounds: tuple[str, ...] = ()
    open_calls: frozenset[str] = frozenset()
    call_count: int = 0
    attempt: int = 1
    failures: int = 0
    interruptions: int = 0
    usage: Usage = Usage()

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ends its processes, so that no other suspect runs beside it."""
        return self.interruptions >= ALONE_AFTER

    @property
    def round(self) -> int:
        """Number of the round that is asked for, or whose calls run."""
        return len(self.rounds) - (self.phase == "calling")

    def call_key(self, number: int) -> str:
        """Return the key of a call's row: `{generation_id}:{round}:{n}`."""
        return f"{self.generation_id}:{len(self.rounds)}:{number}"


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """The model's stream ended well."""

    text: str
    requests: tuple[ToolCallRequest, ...]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class RoundFailed:
    """The model's stream broke off or never came; `jitter` is random, between 0 and 1."""

    message: str
    code: str
    is_retryable: bool
    retry_after_ms: int | None = None
    jitter: float = 0.5


@dataclass(frozen=True, slots=True)
class CallFinished:
    """A tool call has its answer, durable."""

    key: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Someone wants it to stop."""

    reason: str = ""


Event: TypeAlias = RoundFinished | RoundFailed | CallFinished | Cancelled


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask the model for the next round, after a pause."""

    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class RunCalls:
    """Make rows of these requests, then run them; of these keys, in the same order."""

    requests: tuple[ToolCallRequest, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunAgain:
    """Run calls again that were running when a process died; answer the rejected ones so."""

    keys: tuple[str, ...]
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerInDoubt:
    """Answer calls that were running when a process died with an error."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Park:
    """Leave the session alone: a person decides about these calls."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Write the end: the reply `text`, or what went wrong."""

    ending: Ending
    text: str = ""
    error: str = ""
    code: str = ""


Command: TypeAlias = AskModel | RunCalls | RunAgain | AnswerInDoubt | Park | End | None


def advance(cycle: Cycle, event: Event, limits: Limits) -> tuple[Cycle, Command]:
    """Return the next state and what to do; events after the end change nothing."""
    if cycle.phase == "ended":
        return cycle, None
    match event:
        case Cancelled(reason):
            return replace(cycle, phase="ended"), End("cancelled", error=reason)
        case RoundFinished():
            assert cycle.phase == "asking", cycle
            return _finish_round(cycle, event, limits)
        case RoundFailed():
            assert cycle.phase == "asking", cycle
            return _fail_round(cycle, event, limits.retry)
        case CallFinished(key):
            assert cycle.phase == "calling", cycle
            left = cycle.open_calls - {key}
            if left:
                return replace(cycle, open_calls=left), None
            return replace(cycle, phase="asking", open_calls=left), AskModel()
        case _:
            assert_never(event)


def _finish_round(cycle: Cycle, event: RoundFinished, limits: Limits) -> tuple[Cycle, Command]:
    usage = cycle.usage + event.usage if event.usage else cycle.usage
    ended = replace(cycle, phase="ended", usage=usage)
    if not event.requests:
        return ended, End("completed", text=event.text)
    if len(cycle.rounds) + 1 >= limits.max_rounds:
        error = f"The model still asks for tools after {limits.max_rounds} rounds."
        return ended, End("failed", error=error, code="max_iterations")
    exceeded = _exceeded(cycle.call_count + len(event.requests), usage, limits.usage)
    if exceeded:
        return ended, End("failed", error=exceeded, code="usage_limit")
    keys = tuple(cycle.call_key(number) for number in range(len(event.requests)))
    calling = replace(
        cycle,
        phase="calling",
        rounds=(*cycle.rounds, event.text),
        open_calls=frozenset(keys),
        call_count=cycle.call_count + len(keys),
        failures=0,
        interruptions=0,
        usage=usage,
    )
    return calling, RunCalls(event.requests, keys)


def _exceeded(calls: int, usage: Usage, limits: UsageLimits) -> str:
    tokens = usage.input_tokens + usage.output_tokens
    if limits.max_total_tokens is not None and tokens > limits.max_total_tokens:
        return f"{tokens} tokens are over the limit of {limits.max_total_tokens}."
    if limits.max_tool_calls is not None and calls > limits.max_tool_calls:
        return f"{calls} tool calls are over the limit of {limits.max_tool_calls}."
    return ""


def _fail_round(cycle: Cycle, event: RoundFailed, retry: Retry) -> tuple[Cycle, Command]:
    failures = cycle.failures + 1
    if not event.is_retryable or failures >= retry.max_attempts:
        return replace(cycle, phase="ended"), End("failed", error=event.message, code=event.code)
    pause = retry.pause_ms(failures, asked_ms=event.retry_after_ms, jitter=event.jitter)
    return replace(cycle, failures=failures, attempt=cycle.attempt + 1), AskModel(pause)


def resume(
    generation: GenerationRow,
    calls: Sequence[ToolCallRow],
    in_doubt: Literal["retry", "fail", "park"],
    limits: Limits,
    *,
    is_interrupted: bool = True,
) -> tuple[Cycle, Command]:
    """Return where a generation stands that was begun before, and what to do next.

    Finished rounds and answered calls stay as they are. A round that was not finished is asked
    for again as a new attempt; calls that were running follow `in_doubt`. One that was interrupted
    too often in a row fails.

    Args:
        generation: Its row.
        calls: Its calls.
        in_doubt: What becomes of calls that were running.
        limits: What it may use.
        is_interrupted: Whether the process has ended that ran it; else this one goes on.
    """
    assert not generation.is_terminal, generation
    newest = len(generation.rounds) - 1
    running = [call for call in calls if call.round == newest and not call.is_terminal]
    keys = tuple(call.id for call in running)
    usage = generation.usage
    cycle = Cycle(
        generation.id,
        phase="calling" if running else "asking",
        rounds=tuple(generation.rounds),
        open_calls=frozenset(keys),
        call_count=len(calls),
        attempt=generation.attempt + 1,
        interruptions=generation.interruptions + is_interrupted,
        usage=Usage(usage.input_tokens, usage.output_tokens) if usage else Usage(),
    )
    if is_interrupted and cycle.interruptions >= limits.retry.max_interruptions:
        return replace(cycle, phase="ended"), _give_up(cycle.interruptions)
    if not running:
        return cycle, AskModel()
    match in_doubt:
        case "retry":
            return cycle, RunAgain(keys)
        case "fail":
            return cycle, AnswerInDoubt(keys)
        case "park":
            return cycle, _decide(running)
        case _:
            assert_never(in_doubt)


def is_suspect(generation: GenerationRow, *, is_interrupted: bool) -> bool:
    """Whether the cycle that `resume` would return is a suspect."""
    return generation.interruptions + is_interrupted >= ALONE_AFTER


def _give_up(interruptions: int) -> End:
    error = (
        f"The agent's process ended {interruptions} times in a row while it worked on this. Look "
        f"for what ends it before you ask again."
    )
    return End("failed", error=error, code="interrupted")


def _decide(running: Sequence[ToolCallRow]) -> Park | RunAgain:
    """Return what persons want of calls in doubt; nothing is done before all are decided."""
    undecided = [call.id for call in running if call.approval not in ("approved", "rejected")]
    if undecided:
        return Park(tuple(undecided))
    return RunAgain(
        tuple(call.id for call in running if call.approval == "approved"),
        tuple(call.id for call in running if call.approval == "rejected"),
    )
