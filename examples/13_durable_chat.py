"""A chat that goes on. Notice that it is a call like any other, without an agent; that the second
call with the same `generation_id` asks neither model nor tool, since all is in the rows; and that
the same id with another question is refused. A real model: `--openai MODEL`.

    $ python -m examples.13_durable_chat
    double runs
    It is 42.
    It is 42.
    generation_differs
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import aidb_ray
from aidb_ray import ConflictError, ModelMessage, TextAdapter, durable_chat, openai_text, tool
from aidb_ray.testing import CallTool, Reply, ScriptedModel


@tool
async def double(n: int) -> int:
    """Double a number."""
    print("double runs")
    return 2 * n


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model."""
    last = conversation[-1]
    return f"It is {last.content}." if last.role == "tool" else CallTool("double", {"n": 21})


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        session = db.session("aidb://sums/1")

        async def ask(question: str) -> str:
            return await durable_chat(
                adapter=adapter,
                messages=[ModelMessage("user", question)],
                tools=[double],
                tool_calls=session.tool_calls,
                chunks=session.chunks,
                generation_id="first",
            )

        for _ in range(2):
            print(await ask("What is twice 21?"))
        try:
            await ask("What is twice 22?")
        except ConflictError as error:
            print(error.code)


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
