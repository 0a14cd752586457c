"""A chat in the terminal. Notice that nothing here waits for a reply: lines are inserted as rows,
and a live query shows the conversation, whoever writes to it; run it twice at once and each shows
what the other says. Type a line, or an empty one to leave. A real model: `--openai MODEL`.

    $ python -m examples.05_terminal_chat
    user: What do you know of tides?
    assistant: Ask me about What do you know of tides?
    user: Give me a shorter summary.
    assistant: Ask me about Give me a shorter summary.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence

import aidb_ray
from aidb_ray import ModelMessage, TextAdapter, create_agent, durable_agent, eq, openai_text, or_
from aidb_ray.testing import ScriptedModel

SAID = ["What do you know of tides?", "Give me a shorter summary."]


def answer(conversation: Sequence[ModelMessage]) -> str:
    """Play the model."""
    return f"Ask me about {conversation[-1].content}"


def lines() -> Iterator[str]:
    """Yield what a person types, or what one would have."""
    if not sys.stdin.isatty():
        yield from SAID
        return
    while line := input("> "):
        yield line


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local") as db:
        agent = create_agent(
            durable_agent(name="guide", adapter=adapter, stream_url="aidb://tides/1")
        )
        messages = agent.collections.messages
        chat = db.live_query(
            lambda q: (
                q.from_(m=messages)
                .where(lambda m: or_(eq(m.target_agent, agent.name), eq(m.actor_id, agent.name)))
                .order_by(lambda m: m.created_at)
            )
        )
        answered = asyncio.Event()

        async def show() -> None:
            async for delta in chat:
                if delta.op == "enter":
                    print(f"{delta.row.role}: {delta.row.content}")
                    answered.set() if delta.row.actor_id == agent.name else answered.clear()

        showing = asyncio.create_task(show())
        typed = lines()
        while line := await asyncio.to_thread(next, typed, ""):
            message = {"role": "user", "actor_id": "user-42", "content": line}
            messages.insert({**message, "target_agent": agent.name})
            answered.clear()
            await answered.wait()
        await chat.aclose()
        await showing


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(answer)))
