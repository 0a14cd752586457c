"""Chunks a second written durably, and the bytes that each takes on the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from itertools import cycle, islice

from ag_ui.core import Event, TextMessageStartEvent

from aidb_ray import Database, stream_to_collection
from aidb_ray.chunks import ChunkBuffer
from aidb_ray.models.events import text_content
from benchmarks.harness import Figure, Logged, Rig, counting_log, median_of, sync_figures

BATCH = 512
WORDS = ("the ", "quick ", "brown ", "fox ", "jumps ", "over ", "a ", "lazy ", "dog ", "again ")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many generations are written at once, and how long each is, in batches of 512 chunks.

    Attributes:
        batches: Of a generation whose chunks come as batches.
        streamed_batches: Of a generation whose chunks come one by one.
    """

    streams: int = 64
    batches: int = 20
    streamed_batches: int = 4
    runs: int = 5


FULL = Sizes()
QUICK = Sizes(batches=4, streamed_batches=1, runs=1)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure chunks that come in batches, and chunks that come event by event."""
    logged: list[Logged] = []
    async with rig.open() as db:
        batched = await median_of(sizes.runs, lambda run: batch_rate(db, sizes, run, logged))
        streamed = await median_of(sizes.runs, lambda run: stream_rate(db, sizes, run))
    chunks = (sizes.runs + 1) * sizes.streams * sizes.batches * BATCH
    text = sum(len(word) for word in WORDS) / len(WORDS)
    at_once = f"{sizes.streams} generations at once"
    return [
        Figure(
            "chunks_per_s",
            batched,
            f"durable, in batches of {BATCH}, {at_once}; median of {sizes.runs} runs",
        ),
        Figure(
            "bytes_per_chunk",
            Logged.total(logged).bytes / chunks,
            f"on the disk, of which {text:g} are the text; in those batches",
        ),
        Figure(
            "streamed_chunks_per_s",
            streamed,
            f"durable, an event at a time through stream_to_collection, {at_once}; median",
        ),
        *sync_figures(logged, "chunks in batches"),
    ]


async def batch_rate(db: Database, sizes: Sizes, run: int, logged: list[Logged]) -> float:
    """Return chunks a second of generations that each wait until a batch is durable."""
    client = db.partitions[0].client
    words = list(islice(cycle(WORDS), BATCH))

    async def write(stream: int) -> None:
        buffer = ChunkBuffer(f"aidb://chunks/{stream}", f"batched-{run}", next_index=0, attempt=1)
        for _ in range(sizes.batches):
            for word in words:
                buffer.add("TEXT_MESSAGE_CONTENT", word)
            taken = buffer.take()
            assert taken is not None
            await client.commit([taken[0]], chunks=taken[1])

    async with counting_log(db, logged):
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for stream in range(sizes.streams):
                tasks.create_task(write(stream))
        return sizes.streams * sizes.batches * BATCH / (time.perf_counter() - began)


async def stream_rate(db: Database, sizes: Sizes, run: int) -> float:
    """Return chunks a second of streams whose events come as fast as they are taken."""
    events = sizes.streamed_batches * BATCH

    async def write(stream: int) -> None:
        chunks = db.session(f"aidb://chunks/{stream}").chunks
        await stream_to_collection(
            speak(events), collection=chunks, generation_id=f"streamed-{run}"
        )

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for stream in range(sizes.streams):
            tasks.create_task(write(stream))
    return sizes.streams * events / (time.perf_counter() - began)


async def speak(events: int) -> AsyncGenerator[Event, None]:
    """Yield a reply of that many events."""
    yield TextMessageStartEvent(message_id="message", role="assistant")
    for word in islice(cycle(WORDS), events - 1):
        yield text_content("message", word)
