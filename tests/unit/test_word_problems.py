from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import pytest

from aidb_ray import ModelMessage, ToolError, chat
from aidb_ray.testing import CallTool, ScriptedModel
from examples.word_problems_parts.numbers import (
    calculate,
    final_number,
    format_number,
    parse_number,
)
from examples.word_problems_parts.place import open_place
from examples.word_problems_parts.player import Player, WitnessedModel, make_calculator
from examples.word_problems_parts.problems import Problem, load_problems, tokens_of
from examples.word_problems_parts.witness import Repeats, Witness, find_repeats

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "problems.jsonl"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"


@dataclass(frozen=True)
class Figures:
    """What is known of a file of problems, and so what a run over it must come to."""

    path: Path
    problems: int
    marks: int
    without_marks: int
    final_is_last_result: int


FILES = [Figures(SHIPPED, 40, 92, 2, 36)]
if GSM8K.exists():
    FILES.append(Figures(GSM8K, 1_319, 4_282, 18, 1_208))


@pytest.fixture(params=FILES, ids=lambda file: file.path.parent.name)
def file(request: pytest.FixtureRequest) -> Figures:
    figures: Figures = request.param
    return figures


def solve(problem: Problem, *, error: int = 0) -> tuple[str, list[str]]:
    """Play all rounds; return what was said and the results of the calculator."""
    results: list[str] = []
    said: list[str] = []
    while True:
        text, expression = problem.play(results)
        said.append(text)
        if expression is None:
            return "".join(said), results
        results.append(format_number(calculate(expression) + error))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("1,200*3", "3600"),
        (".5+.25", "0.75"),
        ("0.1+0.2", "0.3"),
        ("(1+2)*-3", "-9"),
        ("-(2-5)", "3"),
        ("+8-10", "-2"),
        ("3/4", "0.75"),
        ("10/3", "10/3"),
        ("2-8/3", "-2/3"),
        ("7 * 1.", "7"),
        ("100*100", "10000"),
        ("1/1000000", "0.000001"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert format_number(calculate(expression)) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1+", "2**9", "7//2", "1_000", "1e9", "0x1f", "(1,2)", "1<2", "a", "1 2", "5/(2-2)"),
        *("__import__('os')", "(" * 150, "1+" * 150 + "1", "1\n2"),
    ],
)
def test_the_calculator_refuses_all_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"not|zero"):
        calculate(expression)


@pytest.mark.parametrize("numerator", [0, 1, -1, 7, 40, -125, 10**12 + 1])
@pytest.mark.parametrize("denominator", [1, 2, 3, 4, 6, 25, 80, 10**6])
def test_a_printed_number_reads_as_itself(numerator: int, denominator: int) -> None:
    number = Fraction(numerator, denominator)

    assert parse_number(format_number(number)) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,450,000", Fraction(1_450_000)),
        ("$18", Fraction(18)),
        ("-$2.50", Fraction(-5, 2)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("3/0", None),
        ("eleven", None),
        ("1.2.3", None),
        ("", None),
    ],
)
def test_numbers_are_compared_as_fractions(text: str, number: Fraction | None) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("#### 4", 4),
        ("#### 3\nNo:\n#### 1,200.00", 1_200),
        ("**#### 12.**", 12),
        ("#### .5", Fraction(1, 2)),
        ("It is 4.", None),
        ("#### many", None),
    ],
)
def test_the_last_final_line_counts(reply: str, number: Fraction | None) -> None:
    assert final_number(reply) == number


def test_the_file_is_what_it_is_said_to_be(file: Figures) -> None:
    problems = load_problems(file.path)

    assert len(problems) == file.problems
    assert sum(len(problem.marks) for problem in problems) == file.marks
    assert sum(not problem.marks for problem in problems) == file.without_marks
    assert sum(problem.final_is_last_result for problem in problems) == file.final_is_last_result


def test_the_marks_are_exact(file: Figures) -> None:
    for problem in load_problems(file.path):
        for expression, result in problem.marks:
            assert calculate(expression) == parse_number(result), problem


def test_every_problem_is_solved(file: Figures) -> None:
    problems = load_problems(file.path)

    calls = 0
    for problem in problems:
        said, results = solve(problem)
        calls += len(results)
        assert problem.is_solved_by(said), problem

    assert calls == file.marks


def test_the_solution_is_told_as_it_is_written(file: Figures) -> None:
    for problem in load_problems(file.path):
        said, results = solve(problem)

        told = re.sub(r"<<([^=]*)=[^>]*>>", r"<<\1>>", said.rpartition("#### ")[0])
        written = re.sub(r"<<([^=]*)=[^>]*>>", r"<<\1>>", problem.answer.rpartition("#### ")[0])
        assert told == written
        assert re.findall(r"=([^=<>]*)>>", said) == results


def test_with_a_broken_calculator_answers_that_rest_on_it_are_wrong(file: Figures) -> None:
    problems = load_problems(file.path)

    right = [problem for problem in problems if problem.is_solved_by(solve(problem, error=1)[0])]

    assert len(right) == file.problems - file.final_is_last_result
    assert not any(problem.final_is_last_result for problem in right)


def test_tokens_are_the_text(file: Figures) -> None:
    for problem in load_problems(file.path):
        tokens = tokens_of(problem.answer)

        assert "".join(tokens) == problem.answer
        assert max(map(len, tokens)) < 40


def test_more_results_than_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 marks, not 2"):
        Problem(0, "?", "<<1+1=2>>2\n#### 2").play(["2", "2"])


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([{"question": "?"}], "1 has no question and answer"),
        ([{"question": "?", "answer": "4"}], "1 does not end"),
        ([{"question": "?", "answer": "#### 4"}] * 2, "twice"),
    ],
)
def test_a_file_that_cannot_be_judged_is_refused(
    tmp_path: Path, lines: list[dict[str, str]], complaint: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    with pytest.raises(ValueError, match=complaint):
        load_problems(data)


def conversation(problem: Problem, *results: str) -> list[ModelMessage]:
    messages = [ModelMessage("user", problem.question)]
    for result in results:
        messages += [ModelMessage("assistant"), ModelMessage("tool", result, tool_call_id="c")]
    return messages


async def test_the_player_needs_only_the_conversation() -> None:
    problem = load_problems(SHIPPED)[0]
    player = pickle.loads(pickle.dumps(Player(SHIPPED)))

    first = player(conversation(problem))
    last = player(conversation(problem, "24", "99"))

    assert "".join(first[:-1]) == "After noon it sells 48/2 = "
    assert first[-1] == CallTool("calculator", {"expression": "48/2"})
    assert "".join(last) == "<<48+24=99>>72 rolls.\n#### 99"


async def test_a_whole_file_through_the_tool_loop(file: Figures, tmp_path: Path) -> None:
    place = open_place(tmp_path, "task")
    calculator = make_calculator(place.calls, is_broken=False)
    model = WitnessedModel(ScriptedModel(Player(file.path)), place.rounds, file.path)
    problems = load_problems(file.path)

    right = 0
    for problem in problems:
        reply = await chat(
            adapter=model,
            messages=[ModelMessage("user", problem.question)],
            tools=[calculator],
            stream=False,
        )
        right += problem.is_solved_by(reply)

    rounds, calls = place.rounds.read(), place.calls.read()
    assert right == file.problems
    assert len(calls) == file.marks
    assert len(rounds) == file.marks + file.problems
    assert find_repeats(rounds, ()) == find_repeats(calls, ()) == Repeats(0, [])


async def test_the_calculator_pickles_and_notes_a_call_before_it_answers(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "calls.jsonl")
    calculator = cloudpickle.loads(cloudpickle.dumps(make_calculator(witness, is_broken=True)))

    assert await calculator.call({"expression": "6*7"}) == "43"
    with pytest.raises(ToolError, match="divides by zero"):
        await calculator.call({"expression": "1/0"})

    assert [line["expression"] for line in witness.read()] == ["6*7", "1/0"]


def test_a_round_is_noted_before_it_is_asked_for(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "rounds.jsonl")
    model = WitnessedModel(ScriptedModel(Player(SHIPPED)), witness, SHIPPED)

    model.stream(conversation(load_problems(SHIPPED)[7], "768"))

    assert [(line["session"], line["key"]) for line in witness.read()] == [
        ("aidb://problems/7", "1")
    ]
