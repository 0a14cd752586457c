"""Laws of one generation, for all sequences of what may happen to it, crashes included."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from aidb_ray.agents.cycle import (
    AskModel,
    Call,
    CallDeferred,
    CallFinished,
    Cancelled,
    Command,
    Cycle,
    End,
    Event,
    GoOn,
    Limits,
    OutputRefused,
    RoundFailed,
    RoundFinished,
    RunCalls,
    Standing,
    TimedOut,
    Wait,
    advance,
    resume,
)
from aidb_ray.agents.definition import UsageLimits
from aidb_ray.agents.rows import GenerationRow, UsageRow
from aidb_ray.models.base import ToolCallRequest, Usage
from aidb_ray.retry import Retry

RETRY = Retry(max_attempts=3, first_pause_ms=10, longest_pause_ms=40, max_interruptions=5)

CallState = Literal[
    "running", "done", "elsewhere", "done elsewhere", "needed", "approved", "rejected"
]
STANDINGS: dict[CallState, Standing] = {
    "running": "running",
    "done": "answered",
    "elsewhere": "awaited",
    "done elsewhere": "answered_elsewhere",
    "needed": "awaited",
    "approved": "ready",
    "rejected": "rejected",
}
BEGINNINGS: dict[str, CallState] = {"here": "running", "elsewhere": "elsewhere", "ask": "needed"}


@dataclass
class Rows:
    """What was durable: as much of a generation's rows as the laws speak of."""

    rounds: list[str] = field(default_factory=list[str])
    calls: dict[str, CallState] = field(default_factory=dict[str, CallState])
    attempt: int = 1
    interruptions: int = 0
    usage: Usage = field(default_factory=Usage)

    def generation(self) -> GenerationRow:
        usage = UsageRow(self.usage.input_tokens, self.usage.output_tokens, 0)
        return GenerationRow(
            "g",
            "echo",
            rounds=list(self.rounds),
            attempt=self.attempt,
            interruptions=self.interruptions,
            usage=usage,
        )

    def found(self) -> list[Call]:
        return [
            Call(key, int(key.split(":")[1]), STANDINGS[state]) for key, state in self.calls.items()
        ]


@dataclass
class World:
    """A generation on its way, a store beside it, and what was seen of both."""

    limits: Limits
    cycle: Cycle = field(default_factory=lambda: Cycle("g"))
    command: Command = field(default_factory=AskModel)
    rows: Rows = field(default_factory=Rows)
    ends: list[End] = field(default_factory=list[End])
    failures: int = 0
    refusals: int = 0
    rounds_finished: int = 0
    begun: Counter[str] = field(default_factory=Counter[str])
    doubts: Counter[str] = field(default_factory=Counter[str])
    crashes: int = 0

    def happen(self, event: Event) -> None:
        was_ended = self.cycle.phase == "ended"
        self.cycle, self.command = advance(self.cycle, event, self.limits)
        if was_ended:
            assert self.command is None
            return
        self._store(event)
        self._check()
        self._look_again()

    def _store(self, event: Event) -> None:
        match event:
            case RoundFailed():
                self.failures += 1
            case OutputRefused():
                self.refusals += 1
                self.failures = 0
            case RoundFinished():
                self.failures = self.refusals = 0
                self.rounds_finished += 1
            case CallFinished(key):
                self.rows.calls[key] = "done"
            case CallDeferred() | Cancelled() | TimedOut():
                pass
        match self.command:
            case RunCalls(requests, keys):
                assert len(requests) == len(keys) == len(set(keys))
                assert not self.rows.calls.keys() & set(keys), "a key is used again"
                self._write_generation()
                for request, key in zip(requests, keys, strict=True):
                    self.rows.calls[key] = BEGINNINGS[request.name]
                    self.begun[key] += request.name == "here"
            case AskModel(pause_ms):
                assert 0 <= pause_ms <= RETRY.longest_pause_ms
            case End():
                self.ends.append(self.command)
            case _:
                pass

    def _write_generation(self) -> None:
        self.rows.rounds = list(self.cycle.rounds)
        self.rows.usage = self.cycle.usage
        self.rows.attempt = max(self.rows.attempt, self.cycle.attempt)
        self.rows.interruptions = self.crashes = self.cycle.interruptions

    def call(self) -> None:
        """Something becomes of one call of a round that was just written."""
        key = min(self.cycle.open_calls - self.cycle.awaited)
        deferred = self.rows.calls[key] not in ("running", "done")
        self.happen(CallDeferred(key) if deferred else CallFinished(key))

    def decide(self, decision: str) -> None:
        """Someone else answers a call, or decides about one."""
        for key, state in self.rows.calls.items():
            if state == "elsewhere" and decision == "answer":
                self.rows.calls[key] = "done elsewhere"
                break
            if state == "needed" and decision != "answer":
                self.rows.calls[key] = "approved" if decision == "approve" else "rejected"
                break
        self._look_again()

    def _look_again(self) -> None:
        """Go on with what waits once one of its rows has changed."""
        if self.cycle.phase == "waiting" and any(
            self.rows.calls[key] not in ("elsewhere", "needed") for key in self.cycle.awaited
        ):
            self._resume(is_interrupted=False)

    def crash(self) -> None:
        """Forget all but the rows."""
        if self.cycle.phase == "ended":
            return
        was_at_work = self.cycle.phase == "asking" or "running" in self.rows.calls.values()
        self.failures = self.refusals = 0
        self.crashes += was_at_work
        self._resume(is_interrupted=True, is_new_attempt=was_at_work)

    def _resume(self, *, is_interrupted: bool, is_new_attempt: bool = False) -> None:
        before, attempt = self.cycle, self.rows.attempt
        self.cycle, self.command = resume(
            self.rows.generation(),
            self.rows.found(),
            "retry",
            self.limits,
            is_interrupted=is_interrupted,
        )
        if isinstance(self.command, End):
            assert is_interrupted
            assert self.crashes == RETRY.max_interruptions
            self.ends.append(self.command)
            return
        assert self.cycle.rounds == before.rounds
        assert self.cycle.attempt == attempt + is_new_attempt
        if isinstance(self.command, Wait):
            self._check()
            return
        # Going on is written, with what is begun.
        self.rows.attempt = self.cycle.attempt
        self.rows.interruptions = self.cycle.interruptions
        for key, state in self.rows.calls.items():
            if state == "done elsewhere":
                self.rows.calls[key] = "done"
        if isinstance(self.command, GoOn):
            command = self.command
            for key in command.keys:
                assert self.rows.calls[key] in ("running", "approved")
                self.doubts[key] += self.rows.calls[key] == "running"
                self.rows.calls[key] = "running"
                self.begun[key] += 1
            self._check()
            for key in command.answers:
                self.happen(CallFinished(key))
        self._check()

    def _check(self) -> None:
        cycle = self.cycle
        here = cycle.open_calls - cycle.awaited
        assert cycle.awaited <= cycle.open_calls <= self.rows.calls.keys()
        if cycle.phase != "ended":
            assert (cycle.phase == "calling") == bool(here)
            assert (cycle.phase == "waiting") == (bool(cycle.awaited) and not here)
        assert cycle.call_count == len(self.rows.calls)
        assert len(cycle.rounds) < self.limits.max_rounds
        assert self.failures < RETRY.max_attempts or cycle.phase == "ended"
        assert self.refusals <= self.limits.max_repairs or cycle.phase == "ended"
        assert self.crashes == cycle.interruptions < RETRY.max_interruptions
        cap = self.limits.usage.max_tool_calls
        assert cap is None or len(self.rows.calls) <= cap


USAGES = st.one_of(st.none(), st.builds(Usage, st.integers(0, 9), st.integers(0, 9)))
NAMES = st.sampled_from(["here", "here", "elsewhere", "ask"])
REQUESTS = st.one_of(
    st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=3), st.just([])
).map(lambda names: tuple(ToolCallRequest(f"call-{n}", name) for n, name in enumerate(names)))
ANSWERS = st.builds(RoundFinished, st.sampled_from(["", "word"]), REQUESTS, USAGES)
REFUSALS = st.builds(OutputRefused, st.just("No JSON."), USAGES)
FAILURES = st.builds(
    RoundFailed,
    st.just("No."),
    st.just("code"),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 1_000)),
    st.floats(0, 1),
)
LIMITS = st.builds(
    Limits,
    st.integers(1, 5),
    st.just(RETRY),
    st.builds(UsageLimits, st.none() | st.integers(0, 40), st.none() | st.integers(0, 6)),
    st.integers(0, 2),
)
# Most of the time it goes on, whatever that is where it stands; or it would rarely wait.
HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(["go"] * 9 + ["crash"] * 3 + ["fail", "refuse", "decide", "stop"]),
        ANSWERS,
        FAILURES,
        REFUSALS,
        st.sampled_from(["answer", "approve", "reject"]),
        st.sampled_from([Cancelled("enough"), TimedOut(50)]),
    ),
    max_size=30,
)


@settings(max_examples=300)
@given(LIMITS, HAPPENINGS)
def test_it_ends_once_and_repeats_only_what_was_in_doubt(
    limits: Limits,
    happenings: list[
        tuple[str, RoundFinished, RoundFailed, OutputRefused, str, Cancelled | TimedOut]
    ],
) -> None:
    world = World(limits)
    for kind, finished, failed, refused, decision, stopped in happenings:
        match kind, world.cycle.phase:
            case "crash", _:
                world.crash()
            case "stop", _:
                world.happen(stopped)
            case "go", "calling":
                world.call()
            case "go" | "decide", "calling" | "waiting":
                world.decide(decision)
            case "go", _:
                world.happen(finished)
            case "fail", "asking" | "ended":
                world.happen(failed)
            case "refuse", "asking" | "ended":
                world.happen(refused)
            case _:
                pass

    assert len(world.ends) == (world.cycle.phase == "ended")
    assert all(count == 1 + world.doubts[key] for key, count in world.begun.items() if count)
    asked = {key for key, state in world.rows.calls.items() if state in ("needed", "rejected")}
    assert not any(world.begun[key] for key in asked), "it ran before it was approved"
    assert world.rounds_finished <= len(world.rows.rounds) + 1
    for end in world.ends:
        assert end.ending == "completed" or not end.text
        assert (end.ending == "failed") <= bool(end.error and end.code)
