"""A chat that streams. Notice that each word is shown while the reply is still being written,
that nobody passes the history along, since the session keeps it, and that a second run goes on
where this one ends: the rows stay in `.aidb`. A real model: `--openai MODEL`.

    $ python -m examples.01_chat
    you: What is six times seven?
    bot: It is forty-two.
    you: Why do you say so?
    bot: Because you asked: What is six times seven?
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from ag_ui.core import TextMessageContentEvent

import aidb_ray
from aidb_ray import ModelMessage, TextAdapter, create_agent, durable_agent, openai_text
from aidb_ray.testing import ScriptedModel

QUESTIONS = ["What is six times seven?", "Why do you say so?"]


def answer(conversation: Sequence[ModelMessage]) -> str:
    """Play the model: answer the last message, knowing those before."""
    asked = [message.content for message in conversation if message.role == "user"]
    return "It is forty-two." if asked[-1] == QUESTIONS[0] else f"Because you asked: {asked[-2]}"


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect():
        bot = create_agent(
            durable_agent(
                name="bot",
                instructions="Answer in one short sentence.",
                adapter=adapter,
                stream_url="aidb://chat/1",
            )
        )
        for question in QUESTIONS:
            print(f"you: {question}\nbot: ", end="")
            async for event in bot.send(question):
                if isinstance(event, TextMessageContentEvent):
                    print(event.delta, end="", flush=True)
            print()


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(answer, tokens_per_second=20)))
