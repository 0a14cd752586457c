from __future__ import annotations

from typing import Literal

import pytest

from aidb_ray.agents.cycle import (
    ALONE_AFTER,
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
    Phase,
    Resumed,
    RoundFailed,
    RoundFinished,
    RunCalls,
    Standing,
    TimedOut,
    Wait,
    advance,
    is_suspect,
    resume,
)
from aidb_ray.agents.cycle import (
    TRANSITIONS as TABLE,
)
from aidb_ray.agents.definition import UsageLimits
from aidb_ray.agents.rows import GenerationRow, UsageRow
from aidb_ray.models.base import ToolCallRequest, Usage
from aidb_ray.retry import Retry

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
        Cycle(
            "g", rounds=("hm",), call_count=2, failures=2, repairs=1, attempt=4, usage=Usage(5, 2)
        ),
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
        "a call that is left to others keeps none of the others from running",
        CALLING,
        CallDeferred("g:0:1"),
        Cycle("g", "calling", ("hm",), CALLING.open_calls, 2, awaited=frozenset({"g:0:1"})),
        None,
    ),
    (
        "when only others' calls are left it waits",
        Cycle("g", "calling", ("hm",), CALLING.open_calls, 2, awaited=frozenset({"g:0:1"})),
        CallFinished("g:0:0"),
        Cycle(
            "g",
            "waiting",
            ("hm",),
            frozenset({"g:0:1"}),
            2,
            awaited=frozenset({"g:0:1"}),
        ),
        Wait(("g:0:1",)),
    ),
    (
        "a round of others' calls only waits at once",
        Cycle("g", "calling", ("hm",), frozenset({"g:0:0"}), 1),
        CallDeferred("g:0:0"),
        Cycle("g", "waiting", ("hm",), frozenset({"g:0:0"}), 1, awaited=frozenset({"g:0:0"})),
        Wait(("g:0:0",)),
    ),
    (
        "a cancel ends it while it waits",
        Cycle("g", "waiting", ("hm",), frozenset({"g:0:0"}), 1, awaited=frozenset({"g:0:0"})),
        Cancelled("enough"),
        Cycle("g", "ended", ("hm",), frozenset({"g:0:0"}), 1, awaited=frozenset({"g:0:0"})),
        End("cancelled", error="enough"),
    ),
    (
        "an answer of the wrong form is asked for again at once, as a new attempt",
        Cycle("g", failures=1, attempt=2),
        OutputRefused("No JSON.", Usage(5, 2)),
        Cycle("g", attempt=3, repairs=1, usage=Usage(5, 2)),
        AskModel(),
    ),
    (
        "after so many it ends",
        Cycle("g", attempt=3, repairs=2),
        OutputRefused("No JSON."),
        Cycle("g", "ended", attempt=3, repairs=2),
        End("failed", error="No JSON.", code="invalid_output"),
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
    (
        "time ends it while the model talks",
        ASKING,
        TimedOut(50),
        ENDED,
        End("failed", error="It took over 50 ms.", code="run_timeout"),
    ),
    (
        "time ends it while tools run",
        CALLING,
        TimedOut(50),
        Cycle("g", "ended", ("hm",), CALLING.open_calls, 2),
        End("failed", error="It took over 50 ms.", code="run_timeout"),
    ),
    (
        "time ends it while it waits",
        Cycle("g", "waiting", ("hm",), frozenset({"g:0:0"}), 1, awaited=frozenset({"g:0:0"})),
        TimedOut(50),
        Cycle("g", "ended", ("hm",), frozenset({"g:0:0"}), 1, awaited=frozenset({"g:0:0"})),
        End("failed", error="It took over 50 ms.", code="run_timeout"),
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


def calls(*standings: Standing, round_: int = 0) -> list[Call]:
    return [Call(f"g:{round_}:{n}", round_, standing) for n, standing in enumerate(standings)]


InDoubt = Literal["retry", "fail", "park"]
CRASHES: list[tuple[str, list[str], list[Call], InDoubt, Phase, Command]] = [
    ("in the first round", [], [], "retry", "asking", AskModel()),
    (
        "after all calls were answered",
        ["one"],
        calls("answered", "answered"),
        "park",
        "asking",
        AskModel(),
    ),
    (
        "while a call ran that may be repeated",
        ["one"],
        calls("answered", "running"),
        "retry",
        "calling",
        GoOn(("g:0:1",)),
    ),
    (
        "while calls ran that may not be repeated",
        ["one", "two"],
        [*calls("answered"), *calls("running", "running", round_=1)],
        "fail",
        "calling",
        GoOn((), {"g:1:0": "in_doubt", "g:1:1": "in_doubt"}),
    ),
    (
        "while a call ran that a person must decide about",
        ["one"],
        calls("running"),
        "park",
        "waiting",
        Wait(("g:0:0",)),
    ),
    (
        "while calls ran of which one is decided",
        ["one"],
        calls("again", "running", "rejected"),
        "park",
        "calling",
        GoOn(("g:0:0",), {"g:0:2": "rejected"}),
    ),
    (
        "while one call ran and others were waited for",
        ["one"],
        calls("awaited", "running"),
        "retry",
        "calling",
        GoOn(("g:0:1",)),
    ),
]


@pytest.mark.parametrize(
    ("rounds", "found", "in_doubt", "phase", "command"),
    [row[1:] for row in CRASHES],
    ids=[row[0] for row in CRASHES],
)
def test_a_crash(
    rounds: list[str], found: list[Call], in_doubt: InDoubt, phase: str, command: Command
) -> None:
    cycle, follows = resume(generation(*rounds, attempt=3), found, in_doubt, LIMITS)

    assert follows == command
    assert cycle.phase == phase
    assert cycle.rounds == tuple(rounds)
    assert cycle.call_count == len(found)
    assert (cycle.attempt, cycle.interruptions) == (4, 1)
    assert cycle.failures == 0
    assert cycle.usage == Usage(5, 2)


WAITS: list[tuple[str, list[Call], Phase, Command]] = [
    ("still", calls("awaited", "answered"), "waiting", Wait(("g:0:0",))),
    ("no more, for all is answered", calls("answered_elsewhere"), "asking", AskModel()),
    ("no more, for one may run", calls("ready", "awaited"), "calling", GoOn(("g:0:0",))),
    (
        "no more, for one may not run",
        calls("awaited", "rejected"),
        "calling",
        GoOn((), {"g:0:1": "rejected"}),
    ),
    ("too long", calls("expired"), "calling", GoOn((), {"g:0:0": "timeout"})),
]


@pytest.mark.parametrize(
    ("found", "phase", "command"), [row[1:] for row in WAITS], ids=[row[0] for row in WAITS]
)
def test_what_waits_is_neither_interrupted_nor_begun_anew(
    found: list[Call], phase: Phase, command: Command
) -> None:
    limits = Limits(retry=Retry(max_interruptions=1))

    cycle, follows = resume(generation("one", attempt=3), found, "retry", limits)

    assert (cycle.phase, follows) == (phase, command)
    assert (cycle.attempt, cycle.interruptions) == (3, 0)


def test_what_was_waited_for_goes_on_waiting_for_the_rest() -> None:
    cycle, _ = resume(generation("one"), calls("ready", "awaited"), "retry", LIMITS)

    cycle, command = advance(cycle, CallFinished("g:0:0"), LIMITS)

    assert (cycle.phase, command) == ("waiting", Wait(("g:0:1",)))


def test_the_table_has_every_transition_and_no_other() -> None:
    """Those of the examples here are those of the table."""
    seen: set[tuple[Phase, type[Event | Resumed], Phase]] = {
        (before.phase, type(event), after.phase)
        for _, before, event, after, _ in TRANSITIONS
        if before.phase != "ended"
    }
    for _, _, found, _, phase, _ in CRASHES:
        was: Phase = "calling" if {"running", "again"} & {c.standing for c in found} else "asking"
        seen.add((was, Resumed, phase))
    seen |= {("waiting", Resumed, phase) for _, _, phase, _ in WAITS}
    # `test_each_process_that_ends_in_a_round_is_counted_and_the_last_fails_it`
    seen |= {("asking", Resumed, "ended"), ("calling", Resumed, "ended")}

    assert seen == TABLE


def test_what_has_ended_is_not_resumed() -> None:
    with pytest.raises(AssertionError):
        resume(GenerationRow("g", "echo", "completed"), [], "retry", LIMITS)


def interrupted(times: int, *rounds: str) -> GenerationRow:
    return GenerationRow("g", "echo", "running", ["m"], list(rounds), interruptions=times)


def test_each_process_that_ends_in_a_round_is_counted_and_the_last_fails_it() -> None:
    limits = Limits(retry=Retry(max_interruptions=3))

    counted, command = resume(interrupted(1), [], "retry", limits)
    ended, end = resume(interrupted(2, "one"), calls("running"), "park", limits)

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
    assert is_suspect(interrupted(times - 1), [], is_interrupted=True) == alone
    assert is_suspect(interrupted(times), [], is_interrupted=False) == alone
    waiting = interrupted(times - 1, "one")
    assert not is_suspect(waiting, calls("awaited"), is_interrupted=True)
    assert Cycle("g", interruptions=times).is_suspect == alone
