"""Generation without an agent. Notice that a pending row is all that asks for it, that executors
share the rows and each is generated for once, and that `ctx` names the attempt and hears of a
cancel. A real model: `--openai MODEL`.

    $ python -m examples.12_generation_effect
    haiku: Write a haiku. Certainly.
    limerick: Write a limerick. Certainly.
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
    ToolContext,
    chat,
    create_generation_effect,
    eq,
    openai_text,
)
from aidb_ray.testing import ScriptedModel


class Request(BaseModel):
    id: str
    prompt: str
    status: str = "pending"
    output: str = ""


def answer(conversation: Sequence[ModelMessage]) -> str:
    """Play the model."""
    return f"{conversation[-1].content} Certainly."


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        generations = db.session("aidb://poems/1").collection("requests", Request)

        async def generate(row: Request, ctx: ToolContext) -> str:
            messages = [ModelMessage("user", row.prompt)]
            return await chat(adapter=adapter, messages=messages, stream=False)

        def complete(row: Request, result: str) -> None:
            generations.update(row.id, {"status": "completed", "output": result})

        create_generation_effect(
            query=lambda q: q.from_(g=generations).where(lambda g: eq(g.status, "pending")),
            generate=generate,
            on_complete=complete,
            processes=2,
        )
        done = db.live_query(
            lambda q: q.from_(g=generations).where(lambda g: eq(g.status, "completed"))
        )
        kinds = ["haiku", "limerick"]
        generations.insert([Request(id=kind, prompt=f"Write a {kind}.") for kind in kinds])
        async for _ in done:
            if len(done.rows) == len(kinds):
                break
        for row in done.rows:
            print(f"{row.id}: {row.output}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(answer)))
