"""One generation as a state machine: from pending messages to a reply, round by round. Pure.

Nothing here waits, stores or asks. `advance` says what follows from what happened; after a crash,
or once others have done their part, `resume` says what follows from the rows that were durable.
`TRANSITIONS` has every step that there is.

    asking ──RoundFinished, no calls──────────────────────────> ended (completed)
      │  ▲ ├─RoundFailed: Pause, ask again, or ────────────────> ended (failed)
      │  │ └─OutputRefused: say what is wrong, ask again, or ──> ended (failed)
      │  └── all calls answered ──────────────┐
      ▼                                       │
    calling ──CallFinished, until the last────┤
      │  ▲                                    │
      │  └── decided, timed out ──┐           │
      ▼                           │           │
    waiting (others answer or decide) ──Resumed
    any ──Cancelled──> ended (cancelled)
    any ──TimedOut───> ended (failed)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

import msgspec
from msgspec.structs import replace

from aidb_ray.agents.definition import UsageLimits
from aidb_ray.agents.rows import GenerationRow
from aidb_ray.models.base import ToolCallRequest, Usage
from aidb_ray.retry import Retry

Ending: TypeAlias = Literal["completed", "failed", "cancelled"]
Phase: TypeAlias = Literal["asking", "calling", "waiting", "ended"]

ALONE_AFTER = 3
"""Interruptions in a row from which on a generation may be what ends its processes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one generation may use."""

    max_rounds: int = 10
    retry: Retry = field(default_factory=Retry)
    usage: UsageLimits = field(default_factory=UsageLimits)
    max_repairs: int = 2


class Cycle(msgspec.Struct, frozen=True):
    """Where one generation stands.

    Attributes:
        rounds: Text of each finished round that asked for tools.
        open_calls: Keys of calls of the newest round that have no answer yet.
        awaited: Those of them that someone else must answer or decide.
        call_count: Calls of all rounds.
        attempt: Counts starts of the unfinished round over the whole generation, from 1.
        failures: How often the unfinished round failed in a row.
        repairs: How often the unfinished round gave an answer of the wrong form.
        interruptions: How often in a row a process ended before the round and its calls were done.
    """

    generation_id: str
    phase: Phase = "asking"
    rounds: tuple[str, ...] = ()
    open_calls: frozenset[str] = frozenset()
    call_count: int = 0
    attempt: int = 1
    failures: int = 0
    interruptions: int = 0
    usage: Usage = Usage()
    awaited: frozenset[str] = frozenset()
    repairs: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ends its processes, so that no other suspect runs beside it."""
        return self.interruptions >= ALONE_AFTER

    @property
    def round(self) -> int:
        """Number of the round that is asked for, or whose calls run."""
        return len(self.rounds) - (self.phase in ("calling", "waiting"))

    def call_key(self, number: int) -> str:
        """Return the key of a call's row: `{generation_id}:{round}:{n}`."""
        return f"{self.generation_id}:{len(self.rounds)}:{number}"


# What happens.


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """The model's stream ended well."""

    text: str
    requests: tuple[ToolCallRequest, ...]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class OutputRefused:
    """The model's stream ended well with an answer that does not have the form it should have."""

    error: str
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
class CallDeferred:
    """A call's row is durable, and someone else must answer or decide."""

    key: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """It was found in its rows, by another process or after a wait. See `resume`."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Someone wants it to stop."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """It took longer than it may."""

    limit_ms: int


Event: TypeAlias = (
    RoundFinished | OutputRefused | RoundFailed | CallFinished | CallDeferred | Cancelled | TimedOut
)


# What to do.


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask the model for the next round, after a pause."""

    pause_ms: int = 0


@dataclass(frozen=True, slots=True)
class RunCalls:
    """Make rows of these requests, then run those that run here; of these keys, in this order."""

    requests: tuple[ToolCallRequest, ...]
    keys: tuple[str, ...]


AnswerCode: TypeAlias = Literal["in_doubt", "rejected", "timeout", "delegation_cycle"]


@dataclass(frozen=True, slots=True)
class GoOn:
    """Answer calls with an error, by key; then run the others of the keys, as a new attempt."""

    keys: tuple[str, ...] = ()
    answers: Mapping[str, AnswerCode] = field(default_factory=dict[str, AnswerCode])


@dataclass(frozen=True, slots=True)
class Wait:
    """Stop, and leave the session alone: others answer these calls or decide about them."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class End:
    """Write the end: the reply `text`, or what went wrong."""

    ending: Ending
    text: str = ""
    error: str = ""
    code: str = ""


Command: TypeAlias = AskModel | RunCalls | GoOn | Wait | End | None

TRANSITIONS: frozenset[tuple[Phase, type[Event | Resumed], Phase]] = frozenset(
    {
        ("asking", RoundFinished, "calling"),
        ("asking", RoundFinished, "ended"),
        ("asking", OutputRefused, "asking"),
        ("asking", OutputRefused, "ended"),
        ("asking", RoundFailed, "asking"),
        ("asking", RoundFailed, "ended"),
        ("asking", Cancelled, "ended"),
        ("asking", TimedOut, "ended"),
        ("asking", Resumed, "asking"),
        ("asking", Resumed, "ended"),
        ("calling", CallFinished, "calling"),
        ("calling", CallFinished, "waiting"),
        ("calling", CallFinished, "asking"),
        ("calling", CallDeferred, "calling"),
        ("calling", CallDeferred, "waiting"),
        ("calling", Cancelled, "ended"),
        ("calling", TimedOut, "ended"),
        ("calling", Resumed, "calling"),
        ("calling", Resumed, "waiting"),
        ("calling", Resumed, "ended"),
        ("waiting", Cancelled, "ended"),
        ("waiting", TimedOut, "ended"),
        ("waiting", Resumed, "waiting"),
        ("waiting", Resumed, "calling"),
        ("waiting", Resumed, "asking"),
    }
)
"""Every step of a generation: its phase, what happens, its phase then. Nothing follows `ended`."""


def advance(cycle: Cycle, event: Event, limits: Limits) -> tuple[Cycle, Command]:
    """Return the next state and what to do; events after the end change nothing."""
    if cycle.phase == "ended":
        return cycle, None
    after, command = _advance(cycle, event, limits)
    assert (cycle.phase, type(event), after.phase) in TRANSITIONS, (cycle, event)
    return after, command


def _advance(cycle: Cycle, event: Event, limits: Limits) -> tuple[Cycle, Command]:
    match event:
        case Cancelled() | TimedOut():
            return replace(cycle, phase="ended"), end_of(event)
        case RoundFinished():
            return _finish_round(cycle, event, limits)
        case OutputRefused():
            return _refuse_output(cycle, event, limits)
        case RoundFailed():
            return _fail_round(cycle, event, limits.retry)
        case CallFinished(key):
            # One that was left to others may have been decided while the rest ran.
            left = replace(
                cycle, open_calls=cycle.open_calls - {key}, awaited=cycle.awaited - {key}
            )
            return _after_calls(left)
        case CallDeferred(key):
            return _after_calls(replace(cycle, awaited=cycle.awaited | {key}))
        case _:
            assert_never(event)


def end_of(event: Cancelled | TimedOut) -> End:
    """Return the end that cuts a generation short, wherever it stands."""
    match event:
        case Cancelled(reason):
            return End("cancelled", error=reason)
        case TimedOut(limit_ms):
            return End("failed", error=f"It took over {limit_ms} ms.", code="run_timeout")


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
        repairs=0,
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


def _refuse_output(cycle: Cycle, event: OutputRefused, limits: Limits) -> tuple[Cycle, Command]:
    usage = cycle.usage + event.usage if event.usage else cycle.usage
    if cycle.repairs >= limits.max_repairs:
        end = End("failed", error=event.error, code="invalid_output")
        return replace(cycle, phase="ended", usage=usage), end
    exceeded = _exceeded(cycle.call_count, usage, limits.usage)
    if exceeded:
        end = End("failed", error=exceeded, code="usage_limit")
        return replace(cycle, phase="ended", usage=usage), end
    again = replace(
        cycle, repairs=cycle.repairs + 1, failures=0, attempt=cycle.attempt + 1, usage=usage
    )
    return again, AskModel()


def _fail_round(cycle: Cycle, event: RoundFailed, retry: Retry) -> tuple[Cycle, Command]:
    failures = cycle.failures + 1
    if not event.is_retryable or failures >= retry.max_attempts:
        return replace(cycle, phase="ended"), End("failed", error=event.message, code=event.code)
    pause = retry.pause_ms(failures, asked_ms=event.retry_after_ms, jitter=event.jitter)
    return replace(cycle, failures=failures, attempt=cycle.attempt + 1), AskModel(pause)


def _after_calls(cycle: Cycle) -> tuple[Cycle, Command]:
    """Return what follows once a call is answered, or left to others."""
    if not cycle.open_calls:
        return replace(cycle, phase="asking"), AskModel()
    if cycle.open_calls == cycle.awaited:
        return replace(cycle, phase="waiting"), Wait(tuple(sorted(cycle.awaited)))
    return cycle, None


# Going on from rows.

Standing: TypeAlias = Literal[
    "answered",
    "answered_elsewhere",
    "ready",
    "running",
    "again",
    "rejected",
    "expired",
    "circular",
    "awaited",
]
"""How a call stands by its row.

`answered`: it has its answer. `answered_elsewhere`: it has, and whoever gave it wrote that after
this generation was last written. `ready`: nobody has begun it, and it runs here. `running`: it was
running here. `again`: so it was, and someone decided that it is to run again. `rejected`: someone
decided that it is not to run. `expired`: its time is up. `circular`: who was asked waits for us,
and did before. `awaited`: someone else must answer or
decide.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of any round of a generation, as it was found."""

    key: str
    round: int
    standing: Standing

    @property
    def is_open(self) -> bool:
        """Whether it has no answer yet."""
        return self.standing not in ("answered", "answered_elsewhere")


def resume(
    generation: GenerationRow,
    calls: Sequence[Call],
    in_doubt: Literal["retry", "fail", "park"],
    limits: Limits,
    *,
    is_interrupted: bool = True,
) -> tuple[Cycle, Command]:
    """Return where a generation stands that was begun before, and what to do next.

    Finished rounds and answered calls stay as they are. A round that was not finished is asked
    for again as a new attempt; calls that were running follow `in_doubt`. One that was interrupted
    too often in a row fails. One that waited for others only goes on: neither is its round begun
    anew nor is the end of its process an interruption.

    Args:
        generation: Its row.
        calls: Its calls.
        in_doubt: What becomes of calls that were running.
        limits: What it may use.
        is_interrupted: Whether the process has ended that ran it; else this one goes on.
    """
    assert not generation.is_terminal, generation
    newest = [call for call in calls if call.round == len(generation.rounds) - 1]
    was = _phase_of(newest)
    is_interrupted = is_interrupted and was != "waiting"
    usage = generation.usage
    cycle = Cycle(
        generation.id,
        rounds=tuple(generation.rounds),
        open_calls=frozenset(call.key for call in newest if call.is_open),
        call_count=len(calls),
        attempt=generation.attempt + (was != "waiting"),
        interruptions=generation.interruptions + is_interrupted,
        usage=Usage(usage.input_tokens, usage.output_tokens) if usage else Usage(),
    )
    after, command = _go_on(cycle, newest, in_doubt)
    if is_interrupted and cycle.interruptions >= limits.retry.max_interruptions:
        after, command = replace(cycle, phase="ended"), _give_up(cycle.interruptions)
    assert (was, Resumed, after.phase) in TRANSITIONS, (generation, calls)
    return after, command


def is_suspect(generation: GenerationRow, calls: Sequence[Call], *, is_interrupted: bool) -> bool:
    """Whether the cycle that `resume` would return is a suspect."""
    newest = [call for call in calls if call.round == len(generation.rounds) - 1]
    counts = is_interrupted and _phase_of(newest) != "waiting"
    return generation.interruptions + counts >= ALONE_AFTER


def _phase_of(newest: Sequence[Call]) -> Phase:
    """Return the phase that a generation was in when it was left."""
    standings = {call.standing for call in newest}
    if standings & {"running", "again"}:
        return "calling"
    # What others answered since was waited for; so was what is open and nobody here has begun.
    return "waiting" if standings - {"answered"} else "asking"


def _go_on(
    cycle: Cycle, newest: Sequence[Call], in_doubt: Literal["retry", "fail", "park"]
) -> tuple[Cycle, Command]:
    begin: list[str] = []
    answers: dict[str, AnswerCode] = {}
    awaited: list[str] = []
    for call in newest:
        match call.standing:
            case "answered" | "answered_elsewhere":
                pass
            case "ready" | "again":
                begin.append(call.key)
            case "rejected":
                answers[call.key] = "rejected"
            case "expired":
                answers[call.key] = "timeout"
            case "circular":
                answers[call.key] = "delegation_cycle"
            case "awaited":
                awaited.append(call.key)
            case "running" if in_doubt == "retry":
                begin.append(call.key)
            case "running" if in_doubt == "fail":
                answers[call.key] = "in_doubt"
            case "running":
                awaited.append(call.key)
            case _:
                assert_never(call.standing)
    cycle = replace(cycle, awaited=frozenset(awaited))
    if begin or answers:
        return replace(cycle, phase="calling"), GoOn(tuple(begin), answers)
    return _after_calls(cycle)


def _give_up(interruptions: int) -> End:
    error = (
        f"The agent's process ended {interruptions} times in a row while it worked on this. Look "
        f"for what ends it before you ask again."
    )
    return End("failed", error=error, code="interrupted")
