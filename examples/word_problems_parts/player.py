"""The model that plays reference solutions, the calculator it calls, and their witnesses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from aidb_ray import ModelMessage, TextAdapter, Tool, ToolContext, ToolError, tool
from aidb_ray.testing import CallTool, Part
from examples.word_problems_parts.numbers import calculate, format_number
from examples.word_problems_parts.problems import Problem, load_problems, tokens_of
from examples.word_problems_parts.witness import Witness

if TYPE_CHECKING:
    from ag_ui.core import Event


@dataclass(frozen=True)
class Player:
    """Plays each problem's reference solution, one calculator call a round.

    It remembers nothing: the conversation says which problem it is and how far it has come. So it
    goes on in another process where the one before was killed.
    """

    data: Path

    def __call__(self, messages: Sequence[ModelMessage]) -> list[Part]:
        problem = _asked(self.data, messages)
        results = [message.content for message in messages if message.role == "tool"]
        text, expression = problem.play(results)
        said: list[Part] = list(tokens_of(text))
        return said if expression is None else [*said, _call(expression)]


@dataclass(frozen=True)
class WitnessedModel:
    """An adapter whose every round is noted before it is asked for."""

    adapter: TextAdapter
    witness: Witness
    data: Path

    def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `TextAdapter.stream`."""
        number = sum(message.role == "assistant" for message in messages)
        self.witness.note(session=_asked(self.data, messages).session, key=str(number))
        return self.adapter.stream(
            messages, tools=tools, system_prompts=system_prompts, output_schema=output_schema
        )


def make_calculator(witness: Witness, *, is_broken: bool) -> Tool:
    """Return the calculator tool; a broken one adds 1 to every result."""

    @tool
    async def calculator(expression: str, context: ToolContext) -> str:
        """Compute an arithmetic expression exactly.

        Args:
            expression: Numbers, + - * / and parentheses, such as "(3+4.5)*2".
        """
        witness.note(
            session=getattr(context.session, "url", ""),
            key=context.idempotency_key,
            expression=expression,
        )
        try:
            return format_number(calculate(expression) + (1 if is_broken else 0))
        except ValueError as error:
            raise ToolError(str(error), code="invalid_expression") from error

    return calculator


def _call(expression: str) -> CallTool:
    return CallTool("calculator", {"expression": expression})


def _asked(data: Path, messages: Sequence[ModelMessage]) -> Problem:
    question = next(message.content for message in messages if message.role == "user")
    return _by_question(data)[question]


@lru_cache(maxsize=1)
def _by_question(data: Path) -> dict[str, Problem]:
    return {problem.question: problem for problem in load_problems(data)}
