"""An agent over rows of your own. Notice that its work is whatever a query finds, here tickets of
no team; that nobody calls it, for tickets are just inserted; and that what `on_response` writes is
durable together with the end of the run, or not at all. A real model: `--openai MODEL`.

    $ python -m examples.02_custom_schema
    billing: The invoice is wrong.
    support: The app crashes when I log in.
    billing: Where is the invoice?
"""

from __future__ import annotations

import asyncio
import sys
from uuid import uuid4

from pydantic import BaseModel

import aidb_ray
from aidb_ray import ModelMessage, TextAdapter, chat, create_agent, is_null, openai_text
from aidb_ray.testing import ScriptedModel

TEXTS = ["The invoice is wrong.", "The app crashes when I log in.", "Where is the invoice?"]
RULE = "Which team looks after each line, billing or support? Answer a word for each."
ANSWER = "billing support billing"


class Ticket(BaseModel):
    id: str
    text: str
    team: str | None = None


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect() as db:
        tickets = db.session(f"aidb://tickets/{uuid4()}").collection("tickets", Ticket)

        def assign(reply: str, pending: list[Ticket]) -> None:
            for ticket, team in zip(pending, reply.split(), strict=True):
                tickets.update(ticket.id, {"team": team})

        router = create_agent(
            name="router",
            pending_work=lambda q: q.from_(t=tickets).where(lambda t: is_null(t.team)),
            build_messages=lambda pending, _: [
                ModelMessage("user", "\n".join([RULE, *(ticket.text for ticket in pending)]))
            ],
            generate=lambda ctx: chat(adapter=adapter, messages=ctx.messages, stream=False),
            on_response=assign,
        )
        tickets.insert([Ticket(id=str(n), text=text) for n, text in enumerate(TEXTS)])
        await router.drain_until_idle()
        for ticket in await db.query(lambda q: q.from_(t=tickets)):
            print(f"{ticket.team}: {ticket.text}")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel([ANSWER])))
