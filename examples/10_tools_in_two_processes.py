"""Server tools there, page tools here. Notice that one model is offered both, that each executor
owns one and its credentials (the server's process has a key that this one has not), and that both
watch the same rows without knowing of each other. A real model: `--openai MODEL`.

    $ python -m examples.10_tools_in_two_processes
    searched with the key of the server, in another process
    read from the page, in this process
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from pydantic import BaseModel

import aidb_ray
from aidb_ray import (
    ModelMessage,
    TextAdapter,
    and_,
    chat,
    create_tool_execution_effect,
    declare_tool,
    eq,
    make_durable_tools,
    openai_text,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel


class Asked(BaseModel):
    by: int


search_docs = declare_tool(name="search_docs", description="Search.", input_schema=Asked)
read_page = declare_tool(name="read_page", description="What is selected.", input_schema=Asked)


def place(by: int) -> str:
    return "in this process" if os.getpid() == by else "in another process"


async def search(by: int) -> str:
    return f"searched with the key of {os.environ['DOCS_KEY']}, {place(by)}"


async def read(by: int) -> str:
    return f"read from the page, {place(by)}"


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model: use both tools, then repeat what they say."""
    if heard := [message.content for message in conversation if message.role == "tool"]:
        return "\n".join(heard)
    return [CallTool(name, {"by": os.getpid()}) for name in ("search_docs", "read_page")]


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect() as db:
        calls = db.session("aidb://help/1").tool_calls
        create_tool_execution_effect(
            query=lambda q: q.from_(tc=calls).where(
                lambda tc: and_(eq(tc.status, "pending"), eq(tc.name, "search_docs"))
            ),
            tools=[search_docs],
            implementations={"search_docs": search},
            ray_options={"env": {"DOCS_KEY": "the server"}},
        )
        create_tool_execution_effect(
            query=lambda q: q.from_(tc=calls).where(
                lambda tc: and_(eq(tc.status, "pending"), eq(tc.name, "read_page"))
            ),
            tools=[read_page],
            implementations={"read_page": read},
            placement="here",
        )
        tools = make_durable_tools([search_docs, read_page], calls)
        question = ModelMessage("user", "What is this page about?")
        print(await chat(adapter=adapter, messages=[question], tools=tools, stream=False))


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
