from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from aidb_ray.agents.cycle import (
    ALONE_AFTER,
    AnswerInDoubt,
    AskModel,
    CallFinished,
    Cancelled,
    Command,
    Cycle,
    End,
    Event,
    Limits,
    Park,
    RoundFailed,
    RoundFinished,
    RunAgain,
    RunCalls,
    advance,
    is_suspect,
    resume,
)
from aidb_ray.agents.definition import Retry, UsageLimits
from aidb_ray.agents.rows import GenerationRow, ToolCallRow, UsageRow
from aidb_ray.models.base import ToolCallRequest, Usage

RETRY = Retry(max_attempts=3, first_pause_ms=100, longest_pause_ms=1_000)
LIMITS = Limits(max_rounds=3, retry=RETRY)
ADD = ToolCallRequest("call-1", "add", '{"a": 1}')
SUB = ToolCallRequest("call-2", "sub")

ASKING = Cycle("g")
CALLING = Cycle(
    "g", phase="calling", rounds=("hm",), open_calls=frozenset({"g:0:0", "g:0:1"}), call_count=2
)
ENDED = Cycle("g", phase="ended")
LAST_ROUND = Cycle("g", rounds=("one", "two"))


def failed(code: str = "rate_limit", *, retryable: bool = True, asked_ms: int = 0) -> RoundFailed:
    return RoundFailed("No.", code, retryable, asked_ms, jitter=1.0)


TRANSITIONS: list[tuple[str, Cycle, Event, Cycle, Command]] = [
    (
        "an answer without calls ends it",
        ASKING,
        RoundFinished("Hello.", (), Usage(5, 2)),
        Cycle("g", phase="ended", usage=Usage(5, 2)),
        End("completed", text="Hello."),
    ),
    (
        "calls become rows named for their round",
        ASKING,
        RoundFinished("hm", (ADD, SUB)),
        CALLING,
        RunCalls((ADD, SUB), ("g:0:0", "g:0:1")),
    ),
    (
        "calls of a later round go on in numbering and usage",
        Cycle("g", rounds=("hm",), call_count=2, failures=2, attempt=4, usage=Usage(5, 2)),
        RoundFinished("", (ADD,), Usage(7, 1)),
        Cycle(
            "g",
            phase="calling",
            rounds=("hm", ""),
            open_calls=frozenset({"g:1:0"}),
            call_count=3,
            attempt=4,
            usage=Usage(12, 3),
        ),
        RunCalls((ADD,), ("g:1:0",)),
    ),
    (
        "one answered call of two changes nothing else",
        CALLING,
        CallFinished("g:0:1"),
        Cycle("g", "calling", ("hm",), frozenset({"g:0:0"}), 2),
        None,
    ),
    (
        "the last answered call asks the model again",
        Cycle("g", "calling", ("hm",), frozenset({"g:0:0"}), 2),
        CallFinished("g:0:0"),
        Cycle("g", "asking", ("hm",), frozenset(), 2),
        AskModel(),
    ),
    (
        "the last round must not ask for tools",
        LAST_ROUND,
        RoundFinished("three", (ADD,)),
        Cycle("g", "ended", ("one", "two")),
        End(
            "failed", error="The model still asks for tools after 3 rounds.", code="max_iterations"
        ),
    ),
    (
        "the last round may answer",
        LAST_ROUND,
        RoundFinished("three", ()),
        Cycle("g", "ended", ("one", "two")),
        End("completed", text="three"),
    ),
    (
        "an error that may pass is tried again after a pause, as a new attempt",
        ASKING,
        failed(),
        Cycle("g", attempt=2, failures=1),
        AskModel(pause_ms=100),
    ),
    (
        "the pause doubles",
        Cycle("g", attempt=2, failures=1),
        failed(),
        Cycle("g", attempt=3, failures=2),
        AskModel(pause_ms=200),
    ),
    (
        "a provider that says how long to wait is believed",
        ASKING,
        failed(asked_ms=700),
        Cycle("g", attempt=2, failures=1),
        AskModel(pause_ms=700),
    ),
    (
        "but not for ever",
        ASKING,
        failed(asked_ms=3_600_000),
        Cycle("g", attempt=2, failures=1),
        AskModel(pause_ms=1_000),
    ),
    (
        "the last attempt's error ends it",
        Cycle("g", attempt=3, failures=2),
        failed(),
        Cycle("g", "ended", attempt=3, failures=2),
        End("failed", error="No.", code="rate_limit"),
    ),
    (
        "an error that stays ends it at once",
        ASKING,
        failed("bad_key", retryable=False),
        ENDED,
        End("failed", error="No.", code="bad_key"),
    ),
    (
        "a cancel ends it while the model talks",
        ASKING,
        Cancelled("enough"),
        ENDED,
        End("cancelled", error="enough"),
    ),
    (
        "a cancel ends it while tools run",
        CALLING,
        Cancelled(""),
        Cycle("g", "ended", ("hm",), CALLING.open_calls, 2),
        End("cancelled"),
    ),
    ("nothing follows the end: an answer", ENDED, RoundFinished("Late.", ()), ENDED, None),
    ("nothing follows the end: a failure", ENDED, failed(), ENDED, None),
    ("nothing follows the end: a call", ENDED, CallFinished("g:0:0"), ENDED, None),
    ("nothing follows the end: a cancel", ENDED, Cancelled("late"), ENDED, None),
]


@pytest.mark.parametrize(
    ("before", "event", "after", "command"),
    [row[1:] for row in TRANSITIONS],
    ids=[row[0] for row in TRANSITIONS],
)
def test_transition(before: Cycle, event: Event, after: Cycle, command: Command) -> None:
    assert advance(before, event, LIMITS) == (after, command)


@pytest.mark.parametrize(
    ("cycle", "event"),
    [(CALLING, RoundFinished("", ())), (CALLING, failed()), (ASKING, CallFinished("g:0:0"))],
)
def test_what_cannot_happen_is_an_error(cycle: Cycle, event: Event) -> None:
    with pytest.raises(AssertionError):
        advance(cycle, event, LIMITS)


@pytest.mark.parametrize(
    ("limits", "usage", "ending"),
    [
        (UsageLimits(max_total_tokens=10), Usage(8, 2), None),
        (UsageLimits(max_total_tokens=10), Usage(8, 3), "11 tokens are over the limit of 10."),
        (UsageLimits(max_tool_calls=2), None, None),
        (UsageLimits(max_tool_calls=1), None, "2 tool calls are over the limit of 1."),
    ],
)
def test_going_over_a_limit_fails_before_tools_run(
    limits: UsageLimits, usage: Usage | None, ending: str | None
) -> None:
    cycle, command = advance(ASKING, RoundFinished("hm", (ADD, SUB), usage), Limits(usage=limits))

    if ending is None:
        assert isinstance(command, RunCalls)
    else:
        assert command == End("failed", error=ending, code="usage_limit")
        assert cycle.phase == "ended"


@pytest.mark.parametrize(("failures", "jitter", "pause_ms"), [(1, 0.0, 50), (1, 1.0, 100)])
def test_jitter_halves_the_pause_at_most(failures: int, jitter: float, pause_ms: int) -> None:
    assert RETRY.pause_ms(failures, asked_ms=None, jitter=jitter) == pause_ms


def test_a_pause_has_a_bound_after_any_number_of_failures() -> None:
    assert RETRY.pause_ms(10_000, asked_ms=None, jitter=1.0) == 1_000


# After a crash.


def generation(*rounds: str, attempt: int = 1) -> GenerationRow:
    return GenerationRow(
        "g", "echo", "running", ["m"], list(rounds), attempt, usage=UsageRow(5, 2, 7)
    )


def call(round_: int, number: int, status: str) -> ToolCallRow:
    return ToolCallRow(f"g:{round_}:{number}", "g", "add", status=status, round=round_)


InDoubt = Literal["retry", "fail", "park"]
CRASHES: list[tuple[str, list[str], list[ToolCallRow], InDoubt, str, Command]] = [
    ("in the first round", [], [], "retry", "asking", AskModel()),
    (
        "after all calls were answered",
        ["one"],
        [call(0, 0, "completed"), call(0, 1, "failed"), call(0, 2, "cancelled")],
        "park",
        "asking",
        AskModel(),
    ),
    (
        "while a call ran that may be repeated",
        ["one"],
        [call(0, 0, "completed"), call(0, 1, "executing")],
        "retry",
        "calling",
        RunAgain(("g:0:1",)),
    ),
    (
        "before a call had begun",
        ["one"],
        [call(0, 0, "pending")],
        "retry",
        "calling",
        RunAgain(("g:0:0",)),
    ),
    (
        "while calls ran that may not be repeated",
        ["one", "two"],
        [call(0, 0, "completed"), call(1, 0, "executing"), call(1, 1, "executing")],
        "fail",
        "calling",
        AnswerInDoubt(("g:1:0", "g:1:1")),
    ),
    (
        "while a call ran that a person must decide about",
        ["one"],
        [call(0, 0, "executing")],
        "park",
        "calling",
        Park(("g:0:0",)),
    ),
]


@pytest.mark.parametrize(
    ("rounds", "calls", "in_doubt", "phase", "command"),
    [row[1:] for row in CRASHES],
    ids=[row[0] for row in CRASHES],
)
def test_a_crash(
    rounds: list[str], calls: list[ToolCallRow], in_doubt: InDoubt, phase: str, command: Command
) -> None:
    cycle, found = resume(generation(*rounds, attempt=3), calls, in_doubt, LIMITS)

    assert found == command
    assert cycle.phase == phase
    assert cycle.rounds == tuple(rounds)
    assert cycle.call_count == len(calls)
    assert cycle.attempt == 4
    assert cycle.failures == 0
    assert cycle.usage == Usage(5, 2)


def test_what_has_ended_is_not_resumed() -> None:
    with pytest.raises(AssertionError):
        resume(GenerationRow("g", "echo", "completed"), [], "retry", LIMITS)


def interrupted(times: int) -> GenerationRow:
    return GenerationRow("g", "echo", "running", ["m"], interruptions=times)


def test_each_process_that_ends_in_a_round_is_counted_and_the_last_fails_it() -> None:
    limits = Limits(retry=Retry(max_interruptions=3))

    counted, command = resume(interrupted(1), [], "retry", limits)
    ended, end = resume(interrupted(2), [call(0, 0, "executing")], "park", limits)

    assert (counted.interruptions, command) == (2, AskModel())
    assert ended.phase == "ended"
    assert isinstance(end, End)
    assert (end.ending, end.code) == ("failed", "interrupted")
    assert "3 times in a row" in end.error


def test_going_on_in_the_same_process_counts_nothing() -> None:
    cycle, command = resume(interrupted(2), [], "retry", LIMITS, is_interrupted=False)

    assert (cycle.interruptions, command) == (2, AskModel())


def test_a_finished_round_with_calls_forgets_the_interruptions() -> None:
    cycle, _ = advance(Cycle("g", interruptions=2), RoundFinished("hm", (ADD,)), LIMITS)

    assert cycle.interruptions == 0


@pytest.mark.parametrize(("times", "alone"), [(ALONE_AFTER - 1, False), (ALONE_AFTER, True)])
def test_what_was_interrupted_often_is_suspected(times: int, *, alone: bool) -> None:
    assert is_suspect(interrupted(times - 1), is_interrupted=True) == alone
    assert is_suspect(interrupted(times), is_interrupted=False) == alone
    assert Cycle("g", interruptions=times).is_suspect == alone


def decided(number: int, approval: str | None) -> ToolCallRow:
    return msgspec.structs.replace(call(0, number, "executing"), approval=approval)


@pytest.mark.parametrize(
    ("approvals", "command"),
    [
        (["approved", None], Park(("g:0:1",))),
        (["rejected", "needed"], Park(("g:0:1",))),
        (["approved", "rejected"], RunAgain(("g:0:0",), ("g:0:1",))),
        (["rejected", "rejected"], RunAgain((), ("g:0:0", "g:0:1"))),
    ],
)
def test_nothing_is_done_before_every_call_in_doubt_is_decided(
    approvals: list[str | None], command: Command
) -> None:
    calls = [decided(number, approval) for number, approval in enumerate(approvals)]

    assert resume(generation("one"), calls, "park", LIMITS)[1] == command
