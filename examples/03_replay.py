"""A stream read elsewhere. Notice that a handle travels to any Ray task or actor, that a reader
that begins in the middle of a stream gets what is stored and then what comes, without a gap or a
repeat, and that later the stream is there as an Arrow table. A real model: `--openai MODEL`.

    $ python -m examples.03_replay
    written here: Once upon a time a row was inserted, and all who watched it knew.
    read meanwhile in another process: the same
    from chunk 10 on: "inserted, and all who watched it knew."
    as a table: 20 chunks, 5 columns
"""

from __future__ import annotations

import asyncio
import sys
from uuid import uuid4

import ray  # noqa: TID251  What uses the package may use Ray.

import aidb_ray
from aidb_ray import Session, TextAdapter, chat, openai_text, replay, stream_to_collection
from aidb_ray.testing import ScriptedModel

STORY = "Once upon a time a row was inserted, and all who watched it knew."


async def read(session: Session, generation_id: str, after_index: int | None = None) -> str:
    """Return the text of a stream, once it has ended."""
    chunks = replay(session.chunks, generation_id=generation_id, after_index=after_index)
    return "".join([c.content async for c in chunks if c.type == "TEXT_MESSAGE_CONTENT"])


@ray.remote
def read_elsewhere(session: Session, generation_id: str) -> str:
    """Do the same in a process of Ray's."""
    return asyncio.run(read(session, generation_id))


async def main(adapter: TextAdapter) -> None:
    async with aidb_ray.connect() as db:
        session, generation_id = db.session("aidb://stories/1"), uuid4().hex
        reading = read_elsewhere.remote(session, generation_id)
        question = {"role": "user", "content": "Tell me a story in one sentence."}
        events = chat(adapter=adapter, messages=[question])
        await stream_to_collection(events, collection=session.chunks, generation_id=generation_id)
        written, elsewhere = await read(session, generation_id), await reading
        print(f"written here: {written}")
        print(f"read meanwhile in another process: {'the same' if elsewhere == written else '?'}")
        print(f'from chunk 10 on: "{await read(session, generation_id, after_index=9)}"')
        table = await session.chunks.to_arrow(generation_id=generation_id)
        print(f"as a table: {table.num_rows} chunks, {table.num_columns} columns")


if __name__ == "__main__":
    model = sys.argv[2] if sys.argv[1:2] == ["--openai"] else None
    asyncio.run(main(openai_text(model) if model else ScriptedModel([STORY], tokens_per_second=20)))
