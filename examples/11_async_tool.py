"""A tool that takes its time. Notice that the model has a job's handle at once and answers with it,
and that the end of the job is a message in the same commit as its result, so it wakes the agent,
even after a crash. A real model: `--openai MODEL`.

    $ python -m examples.11_async_tool
    you: Paint me a lighthouse.
    studio: I have begun: queued.
    studio: Here it is: lighthouse.png
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

import aidb_ray
from aidb_ray import (
    ModelMessage,
    TextAdapter,
    create_agent,
    create_tool_execution_effect,
    durable_agent,
    eq,
    make_async_tool,
    openai_text,
    tool,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel

URL = "aidb://studio/1"


@tool
async def paint(subject: str) -> str:
    """Paint a picture."""
    await asyncio.sleep(0.5)
    return f"{subject}.png"


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model: paint, say that it has begun, and later show the picture."""
    last = conversation[-1]
    if last.role == "tool":
        return f"I have begun: {json.loads(last.content)['status']}."
    if "result" in last.content:
        return f"Here it is: {json.loads(last.content)['result']}"
    return CallTool("paint", {"subject": "lighthouse"})


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        calls, messages = db.session(URL).tool_calls, db.session(URL).messages
        job = make_async_tool(
            paint,
            calls,
            get_immediate_result=lambda row: {"job_id": row.id, "status": "queued"},
            wake_agent=True,
        )
        studio = create_agent(
            durable_agent(name="studio", adapter=adapter, tools=[job], stream_url=URL)
        )
        create_tool_execution_effect(
            query=lambda q: q.from_(tc=calls).where(lambda tc: eq(tc.status, "pending")),
            tools=[paint],
        )
        said = db.live_query(lambda q: q.from_(m=messages).order_by(lambda m: m.created_at))
        studio.send("Paint me a lighthouse.", actor_id="you")
        async for delta in said:
            if delta.op == "enter" and delta.row.actor_id in ("you", "studio"):
                print(f"{delta.row.actor_id}: {delta.row.content}")
                if "Here it is" in delta.row.content:
                    break


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
