"""A planner that asks a researcher, then a writer. Notice that all three share a session and are
processes of their own; that each request and each answer is a message row, so any of them may die
in between; and that who asked whom is in the rows. A real model: `--openai MODEL`.

    $ python -m examples.08_agents_together
    user-42 to planner: Write a short brief on lithium supply risks in 2026.
    planner to researcher: {"message":"lithium supply","depth":"deep"}
    researcher to planner: Two mines closed.
    planner to writer: Two mines closed.
    writer to planner: In 2026 supply is thin: Two mines closed.
    planner to user-42: In 2026 supply is thin: Two mines closed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel

import aidb_ray
from aidb_ray import AgentTool, ModelMessage, TextAdapter, create_agent, durable_agent, openai_text
from aidb_ray.testing import CallTool, Reply, ScriptedModel

QUESTION = "Write a short brief on lithium supply risks in 2026."


class Topic(BaseModel):
    message: str
    depth: Literal["quick", "deep"] = "deep"


def plan(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the planner: facts first, then prose."""
    heard = [message.content for message in conversation if message.role == "tool"]
    if not heard:
        return CallTool("researcher", {"message": "lithium supply", "depth": "deep"})
    return CallTool("writer", {"message": heard[0]}) if len(heard) == 1 else heard[1]


def write(conversation: Sequence[ModelMessage]) -> str:
    """Play the writer."""
    return f"In 2026 supply is thin: {conversation[-1].content}"


async def main(models: Sequence[TextAdapter]) -> None:
    async with aidb_ray.connect() as db:
        url = f"aidb://briefs/{uuid4()}"
        researcher, writer = (
            create_agent(durable_agent(name=name, adapter=model, stream_url=url))
            for name, model in zip(("researcher", "writer"), models[1:], strict=True)
        )
        planner = create_agent(
            durable_agent(
                name="planner",
                instructions="Call researcher for facts, then writer for the final text.",
                adapter=models[0],
                stream_url=url,
                agents=[
                    AgentTool(researcher, "Research a topic.", input_schema=Topic),
                    AgentTool(writer, "Turn notes into prose."),
                ],
            )
        )
        await planner.send(QUESTION, actor_id="user-42").reply()
        messages = db.session(url).messages
        for said in await db.query(lambda q: q.from_(m=messages).order_by(lambda m: m.created_at)):
            print(f"{said.actor_id} to {said.target_agent}: {said.content}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    played = [ScriptedModel(plan), ScriptedModel(["Two mines closed."]), ScriptedModel(write)]
    asyncio.run(main([openai_text(model)] * 3 if model else played))
