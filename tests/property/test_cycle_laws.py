"""Laws of one generation, for all sequences of what may happen to it, crashes included."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.agents.cycle import (
    AskModel,
    CallFinished,
    Cancelled,
    Command,
    Cycle,
    End,
    Event,
    Limits,
    RoundFailed,
    RoundFinished,
    RunAgain,
    RunCalls,
    advance,
    resume,
)
from aidb_ray.agents.definition import Retry, UsageLimits
from aidb_ray.agents.rows import GenerationRow, ToolCallRow, UsageRow
from aidb_ray.models.base import ToolCallRequest, Usage

RETRY = Retry(max_attempts=3, first_pause_ms=10, longest_pause_ms=40, max_interruptions=5)


@dataclass
class Rows:
    """What was durable: as much of a generation's rows as the laws speak of."""

    rounds: list[str] = field(default_factory=list[str])
    calls: dict[str, ToolCallRow] = field(default_factory=dict[str, ToolCallRow])
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


@dataclass
class World:
    """A generation on its way, a store beside it, and what was seen of both."""

    limits: Limits
    cycle: Cycle = field(default_factory=lambda: Cycle("g"))
    command: Command = field(default_factory=AskModel)
    rows: Rows = field(default_factory=Rows)
    ends: list[End] = field(default_factory=list[End])
    failures: int = 0
    rounds_finished: int = 0
    calls_run: dict[str, int] = field(default_factory=dict[str, int])
    doubts: int = 0
    crashes: int = 0

    def happen(self, event: Event) -> None:
        was_ended = self.cycle.phase == "ended"
        self.cycle, self.command = advance(self.cycle, event, self.limits)
        if was_ended:
            assert self.command is None
            return
        self._store(event)
        self._check()

    def _store(self, event: Event) -> None:
        match event:
            case RoundFailed():
                self.failures += 1
            case RoundFinished():
                self.failures = 0
                self.rounds_finished += 1
            case CallFinished(key):
                done = msgspec.structs.replace(self.rows.calls[key], status="completed")
                self.rows.calls[key] = done
            case Cancelled():
                pass
        match self.command:
            case RunCalls(requests, keys):
                assert len(requests) == len(keys) == len(set(keys))
                assert not self.rows.calls.keys() & set(keys), "a key is used again"
                number = len(self.rows.rounds)
                self.rows.rounds = list(self.cycle.rounds)
                self.rows.interruptions = self.cycle.interruptions
                self.crashes = 0
                self.rows.usage = self.cycle.usage
                for key in keys:
                    self.rows.calls[key] = ToolCallRow(
                        key, "g", "tool", status="executing", round=number
                    )
                    self.calls_run[key] = 1
            case AskModel(pause_ms):
                assert 0 <= pause_ms <= RETRY.longest_pause_ms
            case End():
                self.ends.append(self.command)
            case _:
                pass

    def crash(self) -> None:
        """Forget all but the rows."""
        if self.cycle.phase == "ended":
            return
        before = self.cycle
        self.cycle, self.command = resume(
            self.rows.generation(), list(self.rows.calls.values()), "retry", self.limits
        )
        self.failures = 0
        self.crashes += 1
        if isinstance(self.command, End):
            assert self.crashes == RETRY.max_interruptions
            self.ends.append(self.command)
            return
        assert self.cycle.attempt == self.rows.attempt + 1
        self.rows.attempt = self.cycle.attempt
        self.rows.interruptions = self.cycle.interruptions
        if isinstance(self.command, RunAgain):
            for key in self.command.keys:
                self.calls_run[key] += 1
                self.doubts += 1
        assert self.cycle.rounds == before.rounds
        assert self.cycle.open_calls == before.open_calls
        assert self.cycle.phase == before.phase
        self._check()

    def _check(self) -> None:
        cycle = self.cycle
        assert (cycle.phase == "calling") == bool(cycle.open_calls) or cycle.phase == "ended"
        assert cycle.open_calls <= self.rows.calls.keys()
        assert cycle.call_count == len(self.rows.calls)
        assert len(cycle.rounds) < self.limits.max_rounds
        assert self.failures < RETRY.max_attempts or cycle.phase == "ended"
        assert self.crashes == cycle.interruptions < RETRY.max_interruptions
        cap = self.limits.usage.max_tool_calls
        assert cap is None or len(self.rows.calls) <= cap


USAGES = st.one_of(st.none(), st.builds(Usage, st.integers(0, 9), st.integers(0, 9)))
REQUESTS = st.integers(0, 3).map(
    lambda count: tuple(ToolCallRequest(f"call-{n}", "tool") for n in range(count))
)
ANSWERS = st.builds(RoundFinished, st.sampled_from(["", "word"]), REQUESTS, USAGES)
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
    st.integers(1, 4),
    st.just(RETRY),
    st.builds(UsageLimits, st.none() | st.integers(0, 40), st.none() | st.integers(0, 6)),
)
HAPPENINGS = st.lists(
    st.one_of(ANSWERS, FAILURES, st.just("crash"), st.just("call"), st.just("cancel")),
    max_size=40,
)


@given(LIMITS, HAPPENINGS)
def test_it_ends_once_and_repeats_only_what_was_in_doubt(
    limits: Limits, happenings: list[RoundFinished | RoundFailed | str]
) -> None:
    world = World(limits)
    for happening in happenings:
        phase = world.cycle.phase
        match happening:
            case "crash":
                world.crash()
            case "cancel":
                world.happen(Cancelled("enough"))
            case "call":
                if phase == "calling":
                    world.happen(CallFinished(min(world.cycle.open_calls)))
            case RoundFinished() | RoundFailed() if phase != "calling":
                world.happen(happening)
            case _:
                pass

    assert len(world.ends) == (world.cycle.phase == "ended")
    assert sum(world.calls_run.values()) == len(world.calls_run) + world.doubts
    assert world.rounds_finished <= len(world.rows.rounds) + 1
    for end in world.ends:
        assert end.ending == "completed" or not end.text
        assert (end.ending == "failed") <= bool(end.error and end.code)
