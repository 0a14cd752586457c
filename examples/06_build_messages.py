"""What the model reads, made by a function. Notice that the pending rows and the session are at
hand, so the context may come from anywhere, here a style that lies in a collection of its own;
and that rows may be inserted before the agent exists. A real model: `--openai MODEL`.

    $ python -m examples.06_build_messages
    writer: The tide is out. (brief)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import aidb_ray
from aidb_ray import (
    AgentMessage,
    ModelMessage,
    TextAdapter,
    create_agent,
    durable_agent,
    openai_text,
)
from aidb_ray.testing import ScriptedModel

URL = "aidb://writer/1"


def answer(conversation: Sequence[ModelMessage]) -> str:
    """Play the model: repeat the text in the style that it was told."""
    style, text = conversation
    return f"{text.content} ({style.content.removeprefix('Style: ')})"


async def build(pending: list[AgentMessage], ctx: Any) -> list[ModelMessage]:
    """Return a style, then only what waits: no history."""
    style = await ctx.session.collection("style").find("default")
    said = [ModelMessage(m.role, m.content) for m in pending]
    return [ModelMessage("system", f"Style: {style['text']}"), *said]


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        session = db.session(URL)
        await session.collection("style").insert({"id": "default", "text": "brief"})
        await session.messages.insert(
            {
                "id": "first",
                "role": "user",
                "actor_id": "user-42",
                "target_agent": "writer",
                "content": "The tide is out.",
            }
        )
        writer = create_agent(
            durable_agent(name="writer", adapter=adapter, stream_url=URL, build_messages=build)
        )
        reply = await writer.reply_to("first").reply()
        print(f"{reply.actor_id}: {reply.content}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(answer)))
