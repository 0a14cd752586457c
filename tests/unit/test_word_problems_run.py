from __future__ import annotations

import asyncio
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aidb_ray import UnavailableError
from examples.word_problems import choose_pace, main, parse_options
from examples.word_problems_parts.killer import Killer, choose_victim
from examples.word_problems_parts.place import name_task, open_place
from examples.word_problems_parts.problems import Problem
from examples.word_problems_parts.report import Found, judge, make_table
from examples.word_problems_parts.witness import (
    Death,
    Repeats,
    Witness,
    find_deaths,
    find_repeats,
)

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "problems.jsonl"


def test_lines_of_several_processes_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    program = (
        "from pathlib import Path; from examples.word_problems_parts.witness import Witness\n"
        f"for n in range(200): Witness(Path({str(path)!r})).note(session='s', key=str(n))"
    )

    writers = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]

    lines = Witness(path).read()
    assert len(lines) == 600
    assert len({line["pid"] for line in lines}) == 3
    assert [line["at_ns"] for line in lines] == sorted(line["at_ns"] for line in lines)


def line(at_ns: int, key: str = "k", session: str = "s", pid: int = 1) -> dict[str, Any]:
    return {"at_ns": at_ns, "session": session, "key": key, "pid": pid}


def kill(pid: int, from_ns: int, until_ns: int) -> Death:
    return Death(pid, 0, until_ns, from_ns)


@pytest.mark.parametrize(
    ("deaths", "unexplained"),
    [
        ([], ["s k"]),
        ([kill(1, 15, 16)], []),
        ([kill(1, 8, 10)], []),
        ([kill(1, 20, 22)], []),
        ([kill(1, 5, 25)], []),
        ([kill(1, 5, 9)], ["s k"]),
        ([kill(1, 21, 30)], ["s k"]),
        # Of whoever ran it again, or of a store.
        ([kill(2, 15, 16), kill(3, 15, 16)], ["s k"]),
        ([Death(None, 5, 15, 15)], []),
        ([Death(None, 11, 15, 15)], ["s k"]),
        ([Death(None, 5, 30, 30)], ["s k"]),
    ],
)
def test_a_repeat_needs_the_end_of_the_process_before(
    deaths: list[Death], unexplained: list[str]
) -> None:
    lines = [line(1, "other"), line(10), line(12, session="t"), line(20, pid=2)]

    assert find_repeats(lines, deaths) == Repeats(1, unexplained)


def test_each_repeat_needs_an_end_of_its_own() -> None:
    lines = [line(10), line(20, pid=2), line(30, pid=3)]

    assert find_repeats(lines, [kill(1, 15, 15)]) == Repeats(2, ["s k"])
    assert find_repeats(lines, [kill(1, 15, 15), kill(2, 25, 25)]) == Repeats(2, [])


@pytest.mark.parametrize("proof", [line(12, "1"), line(17, "1", pid=2), line(12, "answer", pid=9)])
def test_what_the_next_step_shows_as_finished_must_not_be_repeated(proof: dict[str, Any]) -> None:
    lines = [line(10, "g:0:0"), line(20, "g:0:0", pid=2)]

    assert find_repeats(lines, [kill(1, 15, 16)], [proof]) == Repeats(1, ["s g:0:0"])


def test_calls_of_one_round_are_in_flight_together() -> None:
    calls = [line(10, "g:0:0"), line(11, "g:0:1"), line(20, "g:0:0", pid=2)]
    calls.append(line(21, "g:0:1", pid=2))

    assert find_repeats(calls, [kill(1, 15, 16)], [line(9, "0")]) == Repeats(2, [])


def worked_steps(sessions: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rounds and calls of sessions at work, one step every 10 ns, by process 1."""
    urls = [str(number) for number in range(sessions)]
    rounds = [line(at + 10, str(n), url) for url in urls for n, at in enumerate((0, 20, 40))]
    calls = [line(at + 20, f"g:{n}:0", url) for url in urls for n, at in enumerate((0, 20))]
    return rounds, calls


def test_kills_all_the_time_explain_no_repeat_of_what_was_finished() -> None:
    rounds, calls = worked_steps(sessions=100)
    events = [event(at, "kill", victim_pid=at % 3, from_ns=at - 1) for at in range(52, 1_000, 2)]
    deaths = find_deaths([event(1, "start"), *events, event(1_000, "end")])
    again = [{**each, "at_ns": 999, "pid": 2} for each in calls]

    found = find_repeats([*calls, *again], deaths, rounds)

    assert (found.total, len(found.unexplained)) == (200, 200)


def test_a_driver_that_died_explains_no_repeat_of_what_was_finished() -> None:
    rounds, calls = worked_steps(sessions=100)
    deaths = find_deaths([event(1, "start"), event(60, "start"), event(90, "end")])
    last = [each for each in rounds if each["key"] == "2"]
    again = [{**each, "at_ns": 70, "pid": 2} for each in [*calls, *last]]

    of_calls = find_repeats([*calls, *again[:200]], deaths, rounds)
    of_rounds = find_repeats([*rounds, *again[200:]], deaths, calls)
    answers = [line(55, "answer", each["session"], pid=9) for each in last[:50]]
    of_answered = find_repeats([*rounds, *again[200:]], deaths, [*calls, *answers])

    assert (of_calls.total, len(of_calls.unexplained)) == (200, 200)
    assert of_rounds == Repeats(100, [])
    assert of_answered.unexplained == [f"{each} 2" for each in range(50)]


def event(at_ns: int, name: str, **more: Any) -> dict[str, Any]:
    return {"at_ns": at_ns, "event": name, **more}


def test_a_kill_lasts_until_the_process_is_gone() -> None:
    killed = event(9, "kill", victim_pid=4, from_ns=7)

    assert find_deaths([event(1, "start"), killed, event(20, "end")]) == [Death(4, 0, 9, 7)]


def test_a_driver_without_end_died_with_its_own_cluster() -> None:
    killed = event(9, "kill", victim_pid=4, from_ns=7)

    died = find_deaths([event(1, "start"), killed, event(30, "start"), event(40, "end")])
    ended = find_deaths([event(1, "start"), event(20, "end"), event(30, "start")])
    twice = find_deaths([event(at, "start", joined=False) for at in (1, 2, 5)])
    joined = find_deaths([event(1, "start", joined=True), event(30, "start")])

    assert died == [Death(4, 0, 9, 7), Death(None, 1, 30, 30)]
    assert ended == joined == []
    assert twice == [Death(None, 1, 2, 2), Death(None, 2, 5, 5)]


@dataclass(frozen=True)
class Process:
    kind: str
    pid: int = 0
    running: int = 0
    serving: bool = True


PROCESSES = [Process("store"), Process("agent", running=3), Process("agent")]


def kill_order(processes: Sequence[Process], kills: int, seed: int) -> list[str]:
    rng, killed = random.Random(seed), list[str]()
    for _ in range(kills):
        victim = choose_victim(processes, killed, rng)
        assert victim is not None
        name = "store" if victim.kind == "store" else "shard at work"
        killed.append(name if victim.kind == "store" or victim.running else "idle shard")
    return killed


@pytest.mark.parametrize("seed", range(20))
def test_stores_and_shards_at_work_take_turns_until_each_was_hit_twice(seed: int) -> None:
    killed = kill_order(PROCESSES, 4, seed)

    assert killed.count("store") == killed.count("shard at work") == 2
    assert all(first != second for first, second in itertools.pairwise(killed[:3]))


def test_after_that_anything_may_be_hit() -> None:
    later = {name for seed in range(20) for name in kill_order(PROCESSES, 8, seed)[4:]}

    assert later == {"store", "shard at work", "idle shard"}


def test_nothing_is_killed_while_what_is_wanted_is_not_there() -> None:
    rng = random.Random(1)

    assert choose_victim([Process("store"), Process("agent")], ["store", "store"], rng) is None
    assert choose_victim([], ["store", "shard at work"] * 2, rng) is None


async def test_the_killer_waits_until_all_serve_and_notes_whom_it_killed(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "events.jsonl")
    sleeper = "import time; time.sleep(60)"
    victim = await asyncio.create_subprocess_exec(sys.executable, "-c", sleeper)
    healthy = [Process("agent", pid=victim.pid, running=1), Process("store", pid=victim.pid)]
    answers: list[list[Process] | Exception] = [
        UnavailableError("starting", outcome="not_applied"),
        [replace(healthy[0], serving=False), healthy[1]],
        healthy,
        healthy,
    ]
    kills_at_each_look: list[int] = []
    looked_again = asyncio.Event()

    async def list_processes() -> list[Process]:
        kills_at_each_look.append(len(witness.read()))
        if not answers:
            looked_again.set()
            return []
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    killing = asyncio.create_task(Killer(list_processes, witness, 0).run())
    await victim.wait()
    await looked_again.wait()
    killing.cancel()

    (noted,) = witness.read()
    assert victim.returncode == -signal.SIGKILL
    assert noted["event"] == "kill"
    assert noted["victim"] in {"store", "shard at work"}
    assert noted["victim_pid"] == victim.pid
    assert noted["from_ns"] <= noted["at_ns"]
    assert kills_at_each_look[:5] == [0, 0, 0, 0, 1]


PROBLEM = Problem(0, "?", "<<1+1=2>>2\n#### 2")


def found(**changes: Any) -> Found:
    session = PROBLEM.session
    usual = Found(
        problems=[PROBLEM],
        replies={session: ["#### 2"]},
        rounds=[line(2, "0", session), line(4, "1", session)],
        calls=[line(3, "c", session)],
        events=[event(1, "start"), event(5, "end")],
        is_scripted=True,
        tokens=7,
        started_ns=1,
        seconds=0.5,
    )
    return replace(usual, **changes)


def test_a_good_run_has_nothing_wrong() -> None:
    report, wrongs = judge(found())

    assert wrongs == []
    assert (report.conversations, report.right, report.replies) == (1, 1, 1)
    assert (report.model_rounds, report.tool_calls) == (2, 1)
    assert (report.repeated_rounds, report.duplicate_tool_calls, report.kills) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"replies": {}}, "aidb://problems/0 has 0 replies"),
        ({"replies": {PROBLEM.session: ["#### 2"] * 2}}, "aidb://problems/0 has 2 replies"),
        ({"replies": {PROBLEM.session: ["#### 2"], "x": ["#### 2"]}}, "x was not asked for"),
        (
            {"calls": [line(3, "c", PROBLEM.session), line(4, "c", PROBLEM.session)]},
            "call aidb://problems/0 c was repeated, not cut off by a kill",
        ),
        (
            {"calls": [line(3, "c", PROBLEM.session), line(4, "d", PROBLEM.session)]},
            "2 different calls were made, not 1",
        ),
        ({"rounds": [line(2, "0", PROBLEM.session)]}, "1 different rounds were made, not 2"),
    ],
)
def test_what_must_not_happen_is_said(changes: Mapping[str, Any], wrong: str) -> None:
    assert judge(found(**changes))[1] == [wrong]


def test_a_repeat_across_a_kill_is_counted_and_not_wrong() -> None:
    killed = event(4, "kill", victim="shard at work", victim_pid=1, from_ns=3)
    twice = [line(3, "c", PROBLEM.session), line(6, "c", PROBLEM.session, pid=2)]
    rounds = [line(2, "0", PROBLEM.session), line(7, "1", PROBLEM.session, pid=2)]
    changes = {"events": [event(1, "start"), killed, event(9, "end")], "calls": twice}

    report, wrongs = judge(found(**changes, rounds=rounds))

    assert wrongs == []
    assert (report.tool_calls, report.duplicate_tool_calls) == (2, 1)
    assert (report.kills, report.kills_of_store, report.kills_of_shards_at_work) == (1, 0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": [line(2, "0", PROBLEM.session), line(4, "1", PROBLEM.session)]},
        {"answers": [line(5, "answer", PROBLEM.session, pid=9)]},
    ],
)
def test_a_repeat_of_a_finished_call_is_wrong_whatever_was_killed(
    changes: Mapping[str, Any],
) -> None:
    killed = event(5, "kill", victim="shard at work", victim_pid=1, from_ns=5)
    calls = [line(3, "c", PROBLEM.session), line(6, "c", PROBLEM.session, pid=2)]
    rounds = [line(2, "0", PROBLEM.session), line(7, "1", PROBLEM.session, pid=2)]
    events = [event(1, "start"), killed, event(9, "end")]

    _, wrongs = judge(found(**{"events": events, "calls": calls, "rounds": rounds, **changes}))

    assert wrongs == ["call aidb://problems/0 c was repeated, not cut off by a kill"]


def test_a_wrong_answer_is_not_right() -> None:
    assert judge(found(replies={PROBLEM.session: ["#### 3"]}))[0].right == 0


def test_the_figures_have_the_names_that_programs_rely_on(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"

    judge(found())[0].write(path)

    names = "conversations right replies model_rounds repeated_rounds tool_calls"
    names += " duplicate_tool_calls kills kills_of_store kills_of_shards_at_work seconds"
    assert " ".join(json.loads(path.read_text())) == names


@pytest.mark.parametrize(
    ("changes", "shown"),
    [({}, "4 rounds/s"), ({"started_ns": 9}, "the model was not called")],
)
def test_the_table_tells_this_run_from_those_before(changes: Mapping[str, Any], shown: str) -> None:
    run = found(**changes)
    console = Console(record=True, width=120, file=io.StringIO())

    console.print(make_table(judge(run)[0], run, Path("/data")))

    assert shown in console.export_text()


def test_the_same_task_finds_its_directory_and_another_is_refused(tmp_path: Path) -> None:
    task = name_task(SHIPPED, "")

    assert open_place(tmp_path, task) == open_place(tmp_path, task)
    with pytest.raises(ValueError, match="holds the task"):
        open_place(tmp_path, name_task(SHIPPED, "broken"))


def test_every_directory_has_a_database_of_its_own(tmp_path: Path) -> None:
    places = [open_place(tmp_path / name, "task") for name in ("a", "b")]

    assert len({place.database for place in places}) == 2
    assert all(re.fullmatch(r"task-[a-z0-9]{8}", place.database) for place in places)


def test_a_directory_may_be_moved(tmp_path: Path) -> None:
    before = open_place(tmp_path / "a", "task")
    before.root.rename(tmp_path / "b")

    assert open_place(tmp_path / "b", "task").database == before.database


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        ([], True),
        (["--kill-every", "2"], False),
        (["--break-calculator"], False),
        (["--address", "auto"], False),
    ],
)
def test_the_same_command_goes_on_and_another_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[str], *, is_same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    places = [parse_options(arguments).open_place() for arguments in ([], other)]

    assert (places[0] == places[1]) == is_same


@pytest.mark.parametrize(
    ("address", "variable", "joins"),
    [
        ([], "", False),
        (["--address", "local"], "", False),
        (["--address", "local"], "host:1", False),
        (["--address", "auto"], "", True),
        ([], "host:1", True),
    ],
)
def test_agents_outlive_a_driver_only_in_a_cluster_that_it_joined(
    monkeypatch: pytest.MonkeyPatch, address: list[str], variable: str, *, joins: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)

    assert parse_options(address).joins_cluster == joins


def test_a_named_directory_goes_on_with_and_without_kills(tmp_path: Path) -> None:
    named = ["--data-dir", str(tmp_path)]
    killing = parse_options([*named, "--kill-every", "2"]).open_place()

    assert parse_options(named).open_place() == killing


@pytest.mark.parametrize(
    ("arguments", "pace"),
    [
        ([], None),
        (["--tokens-per-second", "50"], 50),
        (["--kill-every", "2", "--tokens-per-second", "50"], 50),
        # Two of three at once, 30 tokens in all: 15 a lane, over 8 kills of 2 seconds.
        (["--kill-every", "2", "--concurrency", "2"], 15 / 16),
        (["--kill-every", "2"], 10 / 16),
    ],
)
def test_a_run_that_kills_lasts_for_some_kills(arguments: list[str], pace: float | None) -> None:
    problems = [Problem(index, f"{index}?", "one " * 9 + "ten") for index in range(3)]

    assert choose_pace(parse_options(arguments), problems) == pace


@pytest.mark.parametrize("arguments", [["--data", "none.jsonl"], ["--break-calculator"]])
def test_a_run_that_cannot_be_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    parse_options(["--data-dir", str(tmp_path)]).open_place()

    assert main(["--data-dir", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().out.startswith("word_problems: ")
