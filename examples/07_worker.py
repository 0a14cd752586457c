"""A worker: one task, one answer, no memory. Notice that its answer is checked, and asked for again
with what was wrong; that a script calls it like a function, many times at once, while its rounds
are rows; and that another agent has it as a tool. A real model: `--openai MODEL`.

    $ python -m examples.07_worker
    summarized: ['salt', 'tides']
    summarized: ['wind', 'waves']
    researcher: It comes to 2 points.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from pydantic import BaseModel

import aidb_ray
from aidb_ray import (
    ModelMessage,
    TextAdapter,
    create_agent,
    create_worker_agent,
    durable_agent,
    openai_text,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel


class Text(BaseModel):
    text: str


class Summary(BaseModel):
    bullets: list[str]


def summarize(conversation: Sequence[ModelMessage]) -> str:
    """Play the worker's model: at first with a mistake, which it is told of."""
    words = conversation[0].content.removeprefix("Summarize:\n\n").split()
    was_told = conversation[-1].content.startswith("The answer must be JSON")
    return Summary(bullets=words).model_dump_json() if was_told else ", ".join(words)


def research(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the researcher's model."""
    last = conversation[-1]
    if last.role == "tool":
        return f"It comes to {len(Summary.model_validate_json(last.content).bullets)} points."
    return CallTool("summarizer", {"text": last.content})


async def main(models: Sequence[TextAdapter]) -> None:
    async with aidb_ray.connect():
        summarizer = create_worker_agent(
            name="summarizer",
            description="Summarize a long text.",
            instructions="Summarize the input in bullet points.",
            adapter=models[0],
            input_schema=Text,
            output_schema=Summary,
            build_messages=lambda given: [ModelMessage("user", f"Summarize:\n\n{given.text}")],
        )
        texts = [Text(text="salt tides"), Text(text="wind waves")]
        for summary in await asyncio.gather(*map(summarizer.run, texts)):
            print(f"summarized: {summary.bullets}")
        researcher = create_agent(
            durable_agent(name="researcher", adapter=models[1], tools=[summarizer])
        )
        asked = researcher.send("moon sun", session="aidb://researcher/1")
        print(f"researcher: {(await asked.reply()).content}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    played = [ScriptedModel(summarize), ScriptedModel(research)]
    asyncio.run(main([openai_text(model)] * 2 if model else played))
