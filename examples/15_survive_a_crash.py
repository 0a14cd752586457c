"""An agent whose process is killed. Notice that it is killed for real, in the middle of a tool;
that Ray starts another one which goes on from the rows; that the step which had its result is not
done again, nor is the model's finished round asked for. A real model: `--openai MODEL`.

    $ python -m examples.15_survive_a_crash
    attempt 1: pays, then is killed
    attempt 2: has the receipt of attempt 1
    clerk: The order is paid: receipt of attempt 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from uuid import uuid4

import aidb_ray
from aidb_ray import (
    ModelMessage,
    TextAdapter,
    ToolContext,
    create_agent,
    durable_agent,
    openai_text,
    tool,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel


@tool
async def pay(order: int, ctx: ToolContext) -> str:
    """Pay an order."""
    notes = ctx.session.collection("notes")
    receipt = await ctx.step("pay", lambda: f"receipt of attempt {ctx.attempt}")
    if ctx.attempt == 1:
        await notes.insert({"id": "1", "text": "attempt 1: pays, then is killed"})
        os.kill(os.getpid(), signal.SIGKILL)
    await notes.insert({"id": "2", "text": f"attempt {ctx.attempt}: has the {receipt}"})
    return receipt


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model."""
    last = conversation[-1]
    if last.role == "tool":
        return f"The order is paid: {last.content}."
    return CallTool("pay", {"order": 7})


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect() as db:
        session = db.session(f"aidb://clerk/{uuid4()}")
        clerk = create_agent(durable_agent(name="clerk", adapter=adapter, tools=[pay]))
        reply = await clerk.send("Pay order 7.", session=session).reply()
        notes = session.collection("notes")
        for note in await db.query(lambda q: q.from_(n=notes)):
            print(note["text"])
        print(f"clerk: {reply.content}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
