"""Word problems in GSM8K's form, and the script that plays their reference solutions.

A line of the file is `{"question": ..., "answer": ...}`. The answer marks each calculation as
`<<48/2=24>>` and ends in a line `#### N`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from examples.word_problems_parts.numbers import final_number, parse_number

_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_TOKEN = re.compile(r"\s*(?:[\w.]+|[^\w\s]+)|\s+")


@dataclass(frozen=True)
class Problem:
    """One line of the file; `index` counts from 0."""

    index: int
    question: str
    answer: str

    @property
    def session(self) -> str:
        """The conversation in which this problem is solved."""
        return f"aidb://problems/{self.index}"

    @property
    def question_id(self) -> str:
        """Id of the message that asks it, the same however often it is asked."""
        return f"question-{self.index}"

    @cached_property
    def marks(self) -> list[tuple[str, str]]:
        """The calculations, as (expression, result)."""
        return _MARK.findall(self.answer)

    @cached_property
    def final_is_last_result(self) -> bool:
        """Whether the last calculation gives the answer."""
        return bool(self.marks) and parse_number(self.marks[-1][1]) == final_number(self.answer)

    @cached_property
    def _texts(self) -> list[str]:
        return _MARK.split(self.answer)[::3]

    def play(self, results: Sequence[str]) -> tuple[str, str | None]:
        """Return what the model says after these calculator results, and what it asks next.

        The result stands where the reference has its own, in the mark and, if the last mark gives
        the answer, in the final line. The expression is None in the last round.

        Raises:
            ValueError: more results than the solution has marks.
        """
        done = len(results)
        if done > len(self.marks):
            raise ValueError(f"{self.session} has {len(self.marks)} marks, not {done}.")
        text = self._texts[done]
        if done:
            text = f"<<{self.marks[done - 1][0]}={results[-1]}>>{text}"
        if done < len(self.marks):
            return text, self.marks[done][0]
        if self.final_is_last_result:
            text = f"{text.rpartition('####')[0]}#### {results[-1]}"
        return text, None

    def is_solved_by(self, reply: str) -> bool:
        """Whether the final number of `reply` is that of the reference."""
        return final_number(reply) == final_number(self.answer)


def load_problems(path: Path) -> list[Problem]:
    """Read problems from a JSONL file.

    Raises:
        ValueError: a line is not a problem, or a question stands there twice.
    """
    problems = list(_read(path))
    if len({problem.question for problem in problems}) < len(problems):
        raise ValueError(f"{path} asks a question twice; the model could not tell them apart.")
    return problems


def _read(path: Path) -> Iterator[Problem]:
    with path.open(encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            match json.loads(line):
                case {"question": str(question), "answer": str(answer)}:
                    problem = Problem(index, question, answer)
                case _:
                    raise ValueError(f"{path}:{index + 1} has no question and answer.")
            if final_number(answer) is None:
                raise ValueError(f"{path}:{index + 1} does not end in '#### number'.")
            yield problem


def tokens_of(text: str) -> list[str]:
    """Split text as a model would stream it: words and signs, each with the space before it."""
    return _TOKEN.findall(text)
