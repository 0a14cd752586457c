"""Tools apart from the model. Notice that the chat only writes rows and waits for their ends,
that the executor knows nothing of the chat, and that its callbacks say what the rows become: an
error is one more answer that the model reads. A real model: `--openai MODEL`.

    $ python -m examples.09_durable_tools
    search_database is completed by the warehouse: ['salt', 'salt mill']
    analyze_document is failed by the warehouse: there is no document 7
    The model heard 2 answers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import aidb_ray
from aidb_ray import (
    ModelMessage,
    TextAdapter,
    ToolCall,
    ToolError,
    and_,
    chat,
    create_tool_execution_effect,
    eq,
    make_durable_tools,
    openai_text,
    synced,
    tool,
)
from aidb_ray.testing import CallTool, Reply, ScriptedModel


@tool
async def search_database(query: str) -> list[str]:
    """Find articles."""
    return [query, f"{query} mill"]


@tool
async def analyze_document(doc_id: str) -> str:
    """Summarize a document."""
    raise ToolError(f"there is no document {doc_id}", code="no_document")


def play(conversation: Sequence[ModelMessage]) -> Reply:
    """Play the model: use both tools, then say how many answered."""
    heard = [message for message in conversation if message.role == "tool"]
    if heard:
        return f"The model heard {len(heard)} answers."
    search = CallTool("search_database", {"query": "salt"})
    return [search, CallTool("analyze_document", {"doc_id": "7"})]


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect("local", durability="memory") as db:
        calls = db.session("aidb://shop/1").tool_calls

        def complete(row: ToolCall, result: object) -> None:
            calls.update(row.id, {"status": "completed", "result": result})
            print(f"{row.name} is completed by the warehouse: {result}")

        def fail(row: ToolCall, error: ToolError) -> None:
            calls.update(row.id, {"status": "failed", "error": str(error)})
            print(f"{row.name} is failed by the warehouse: {error}")

        create_tool_execution_effect(
            query=lambda q: q.from_(tc=calls).where(
                lambda tc: and_(eq(tc.status, "pending"), synced(tc))
            ),
            tools=[search_database, analyze_document],
            on_complete=complete,
            on_error=fail,
            max_running=1,
        )
        tools = make_durable_tools([search_database, analyze_document], calls)
        question = ModelMessage("user", "What do we have with salt?")
        print(await chat(adapter=adapter, messages=[question], tools=tools, stream=False))


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel(play)))
