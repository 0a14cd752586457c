"""A script that watches a live query. Notice that it asks once and polls nothing, that each row is
told when it enters the answer and when it leaves it, in order, and that it leaves because an agent
in another process wrote to it. A real model: `--openai MODEL`.

    $ python -m examples.04_live_query
    waits: Where is my parcel?
    waits: Can I return it?
    answered: Where is my parcel?
    answered: Can I return it?
"""

from __future__ import annotations

import asyncio
import sys

import aidb_ray
from aidb_ray import AgentMessage, TextAdapter, create_agent, durable_agent, eq, openai_text
from aidb_ray.testing import ScriptedModel

QUESTIONS = ["Where is my parcel?", "Can I return it?"]
ANSWERS = ["At your door.", "Within a month."]


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect() as db:
        desk = create_agent(durable_agent(name="desk", adapter=adapter, max_running=1))
        messages = db.collection("messages", AgentMessage, session="aidb://desk/*")
        async with db.live_query(
            lambda q: q.from_(m=messages).where(
                lambda m: eq(m.target_agent, desk.name) & eq(m.processed, False)
            )
        ) as waiting:
            for number, question in enumerate(QUESTIONS):
                desk.send(question, session=f"aidb://desk/{number}")
            left = len(QUESTIONS)
            async for delta in waiting:
                verb = {"enter": "waits", "exit": "answered"}[delta.op]
                print(f"{verb}: {delta.row.content}")
                left -= delta.op == "exit"
                if not left:
                    break


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(ANSWERS)))
