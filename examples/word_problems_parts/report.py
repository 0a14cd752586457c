"""What a run came to: the figures, whether they are as they must be, and how they are shown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from examples.word_problems_parts.problems import Problem
from examples.word_problems_parts.witness import find_deaths, find_repeats


@dataclass(frozen=True)
class Report:
    """The figures of all work done in one directory, by this driver and those before it.

    Attributes:
        model_rounds: Rounds that were asked of the model, repeated ones included.
        tool_calls: Times that the calculator was called, repeated ones included.
        seconds: From the moment everything serves to the last reply, of this driver alone.
    """

    conversations: int
    right: int
    replies: int
    model_rounds: int
    repeated_rounds: int
    tool_calls: int
    duplicate_tool_calls: int
    kills: int
    kills_of_store: int
    kills_of_shards_at_work: int
    seconds: float

    def write(self, path: Path) -> None:
        """Write the figures as a JSON object."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Found:
    """What is to be judged after a run.

    Attributes:
        replies: The text of every reply row, by session or else by what it answers.
        rounds, calls, events, answers: Lines of the witnesses, of all drivers.
        is_scripted: Whether the model played the references, one call for each mark.
        tokens: Tokens that the model streamed in finished rounds.
        started_ns: When this driver began; earlier lines are of other drivers.
    """

    problems: Sequence[Problem]
    replies: Mapping[str, Sequence[str]]
    rounds: Sequence[Mapping[str, Any]]
    calls: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    is_scripted: bool
    tokens: int
    started_ns: int
    seconds: float
    answers: Sequence[Mapping[str, Any]] = ()


def judge(found: Found) -> tuple[Report, list[str]]:
    """Return the figures, and in words what must not have happened."""
    deaths = find_deaths(found.events)
    rounds = find_repeats(found.rounds, deaths, [*found.calls, *found.answers])
    calls = find_repeats(found.calls, deaths, [*found.rounds, *found.answers])
    victims = Counter(event["victim"] for event in found.events if event["event"] == "kill")
    sessions = {problem.session for problem in found.problems}
    counts = {each: len(found.replies.get(each, ())) for each in sessions | found.replies.keys()}
    report = Report(
        conversations=len(found.problems),
        right=sum(
            problem.is_solved_by(found.replies[problem.session][-1])
            for problem in found.problems
            if counts[problem.session]
        ),
        replies=sum(counts.values()),
        model_rounds=len(found.rounds),
        repeated_rounds=rounds.total,
        tool_calls=len(found.calls),
        duplicate_tool_calls=calls.total,
        kills=victims.total(),
        kills_of_store=victims["store"],
        kills_of_shards_at_work=victims["shard at work"],
        seconds=round(found.seconds, 3),
    )
    wrongs = [f"{session} has {n} replies" for session, n in sorted(counts.items()) if n != 1]
    wrongs += [f"{session} was not asked for" for session in sorted(counts.keys() - sessions)]
    wrongs += [f"round {each} was repeated, not cut off by a kill" for each in rounds.unexplained]
    wrongs += [f"call {each} was repeated, not cut off by a kill" for each in calls.unexplained]
    if found.is_scripted:
        marks = sum(len(problem.marks) for problem in found.problems)
        wrongs += _differs("calls", len(found.calls) - calls.total, marks)
        wrongs += _differs("rounds", len(found.rounds) - rounds.total, marks + len(sessions))
    return report, wrongs


def make_table(report: Report, found: Found, data_dir: Path) -> Table:
    """Lay the figures out for people."""
    rounds_now = sum(line["at_ns"] >= found.started_ns for line in found.rounds)
    calls_now = sum(line["at_ns"] >= found.started_ns for line in found.calls)
    table = Table(title="Word problems", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")

    def add(name: str, figure: str, note: str = "") -> None:
        table.add_row(name, figure, note)

    add("conversations", f"{report.conversations:,}", f"{report.replies:,} replies")
    add("right", f"{report.right:,}", f"{report.right / max(1, report.conversations):.1%}")
    add("model rounds", f"{report.model_rounds:,}", _done_now(rounds_now, report.repeated_rounds))
    add("tool calls", f"{report.tool_calls:,}", _done_now(calls_now, report.duplicate_tool_calls))
    add("tokens", f"{found.tokens:,}")
    add("seconds", f"{report.seconds:,.2f}", _rates(rounds_now, calls_now, report.seconds))
    if report.kills:
        add(
            "kills",
            f"{report.kills:,}",
            f"{report.kills_of_store} of the store, "
            f"{report.kills_of_shards_at_work} of shards at work",
        )
    table.add_section()
    table.add_row("data", "", str(data_dir))
    return table


def _differs(what: str, seen: int, expected: int) -> list[str]:
    return [] if seen == expected else [f"{seen:,} different {what} were made, not {expected:,}"]


def _done_now(now: int, repeated: int) -> str:
    return f"{now:,} by this run, {repeated:,} repeated"


def _rates(rounds: int, calls: int, seconds: float) -> str:
    if not rounds:
        return "all was done before; the model was not called"
    return f"{rounds / seconds:,.0f} rounds/s, {calls / seconds:,.0f} calls/s"
