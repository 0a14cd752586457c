"""Calls that a person must allow. Notice that both wait at once and nothing runs meanwhile, that
they are decided in any order, here by a script that could be another process on another day, that
a refusal is an answer like any other, and that a tool may ask back. A real model: `--openai MODEL`.

    $ python -m examples.14_approval
    refund of 20 waits; refund of 900 waits
    asked: Which account?
    cashier: 20 to account 7; no: Too much.
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
    ToolContext,
    and_,
    answer,
    approve,
    create_agent,
    durable_agent,
    eq,
    openai_text,
    reject,
    tool,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel

URL = "aidb://till/1"


@tool(needs_approval=True)
async def refund(amount: int, ctx: ToolContext) -> str:
    """Give money back."""
    account = await ctx.ask("Which account?", int)
    return f"{amount} to account {account}"


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model: try two refunds, then tell what came of them."""
    heard = [message.content for message in conversation if message.role == "tool"]
    if not heard:
        return [CallTool("refund", {"amount": 20}), CallTool("refund", {"amount": 900})]
    return f"{heard[0]}; no: {json.loads(heard[1])['message']}"


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        calls, questions = db.session(URL).tool_calls, db.session(URL).questions
        cashier = create_agent(
            durable_agent(name="cashier", adapter=adapter, tools=[refund], stream_url=URL)
        )
        asked = cashier.send("Refund orders 1 and 2.")
        async with db.live_query(
            lambda q: (
                q.from_(c=calls)
                .where(lambda c: and_(eq(c.status, "pending"), eq(c.approval, "needed")))
                .order_by(lambda c: c.id)
            )
        ) as waiting:
            async for _ in waiting:
                if len(waiting.rows) == 2:
                    break
            small, large = waiting.rows
            print("; ".join(f"refund of {call.args['amount']} waits" for call in waiting.rows))
        await reject(calls, large.id, reason="Too much.")
        await approve(calls, small.id)
        async for delta in db.live_query(
            lambda q: q.from_(a=questions).where(lambda a: eq(a.status, "open"))
        ):
            print(f"asked: {delta.row.question}")
            await answer(questions, delta.row.id, 7)
            break
        print(f"cashier: {(await asked.reply()).content}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
