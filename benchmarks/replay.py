"""Chunks a second read back, beside what plain pyarrow reads from a file of the same batches."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import pyarrow as pa

from aidb_ray import Chunk, Database, replay
from aidb_ray.chunks import ChunkBuffer, make_chunk, type_name
from aidb_ray.store.columns import to_arrow
from benchmarks.chunks import BATCH, WORDS
from benchmarks.harness import Figure, Logged, Rig, counting_log, median_of, sync_figures

SESSION, GENERATION = "aidb://replay/1", "generation-1"
TYPE = "TEXT_MESSAGE_CONTENT"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many batches of 512 chunks the generation has."""

    batches: int = 1_000
    runs: int = 5


FULL = Sizes()
QUICK = Sizes(batches=100, runs=1)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure reading one long generation: as row objects, and as a table."""
    logged: list[Logged] = []
    async with rig.open() as db, rig.scratch() as home:
        path = home / "chunks.arrow"
        async with counting_log(db, logged):
            await write(db, sizes, path)
        total = sizes.batches * BATCH
        objects = await median_of(sizes.runs, lambda _: replay_rate(db, total))
        table = await median_of(sizes.runs, lambda _: table_rate(db, total))
        plain = await median_of(
            sizes.runs, lambda _: asyncio.to_thread(pyarrow_objects_rate, path, total)
        )
        plain_table = await median_of(
            sizes.runs, lambda _: asyncio.to_thread(pyarrow_table_rate, path, total)
        )
    return [
        Figure(
            "chunks_per_s",
            objects,
            f"Chunk objects through replay(), of {total:,} chunks; median of {sizes.runs} runs",
        ),
        Figure(
            "pyarrow_chunks_per_s",
            plain,
            f"equal Chunk objects from a mapped IPC file of the same {BATCH}-row batches",
        ),
        Figure("share_of_pyarrow", objects / plain, "the first by the second"),
        Figure("table_chunks_per_s", table, "a table of 5 columns through to_arrow()"),
        Figure(
            "pyarrow_table_chunks_per_s",
            plain_table,
            "a table of the 2 stored columns from that file, its bytes read once",
        ),
        *sync_figures(logged, "while the chunks were written, a batch at a time"),
    ]


async def write(db: Database, sizes: Sizes, path: Path) -> None:
    """Write one generation to the store and to a plain file, in equal batches."""
    client = db.partitions[0].client
    buffer = ChunkBuffer(SESSION, GENERATION, next_index=0, attempt=1)
    with pa.OSFile(str(path), "wb") as sink:
        writer: pa.ipc.RecordBatchFileWriter | None = None
        for n in range(sizes.batches):
            for word in islice(cycle(WORDS), BATCH):
                buffer.add(TYPE, word)
            taken = buffer.take("finished" if n + 1 == sizes.batches else None)
            assert taken is not None
            await client.commit([taken[0]], chunks=taken[1])
            batch = to_arrow([taken[1]])
            if writer is None:
                writer = pa.ipc.new_file(sink, batch.schema)
            writer.write(batch)  # pyright: ignore[reportUnknownMemberType]
        assert writer is not None
        writer.close()


async def replay_rate(db: Database, total: int) -> float:
    """Return chunks a second through `replay`."""
    chunks = db.session(SESSION).chunks
    began = time.perf_counter()
    found = [chunk async for chunk in replay(chunks, generation_id=GENERATION)]
    seconds = time.perf_counter() - began
    check(found, total)
    return total / seconds


async def table_rate(db: Database, total: int) -> float:
    """Return chunks a second through `to_arrow`."""
    chunks = db.session(SESSION).chunks
    began = time.perf_counter()
    table = await chunks.to_arrow(generation_id=GENERATION)
    seconds = time.perf_counter() - began
    check_count(table.num_rows, total)
    return total / seconds


def pyarrow_objects_rate(path: Path, total: int) -> float:
    """Return chunks a second when pyarrow reads a file and rows are made of its columns."""
    began = time.perf_counter()
    found: list[Chunk] = []
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for n in range(reader.num_record_batches):
            batch = reader.get_batch(n)
            codes = cast("list[int]", batch.column(0).to_pylist())
            contents = cast("list[str]", batch.column(1).to_pylist())
            for index, (code, content) in enumerate(zip(codes, contents, strict=True), len(found)):
                id_, type_ = f"{GENERATION}:{index}", type_name(code, ())
                found.append(make_chunk(id_, GENERATION, index, 1, type_, content))
    seconds = time.perf_counter() - began
    check(found, total)
    return total / seconds


def pyarrow_table_rate(path: Path, total: int) -> float:
    """Return chunks a second when pyarrow reads a file into memory as a table."""
    began = time.perf_counter()
    with pa.OSFile(str(path), "rb") as source:
        table = pa.ipc.open_file(source).read_all()
    seconds = time.perf_counter() - began
    check_count(table.num_rows, total)
    return total / seconds


def check(found: list[Chunk], total: int) -> None:
    """Raise unless these are all chunks, in order."""
    check_count(len(found), total)
    last = found[-1]
    expected = WORDS[(total - 1) % BATCH % len(WORDS)]
    if (last.index, last.type, last.content) != (total - 1, TYPE, expected):
        raise AssertionError(f"the last chunk is not what was written: {last!r}")


def check_count(found: int, total: int) -> None:
    """Raise unless as many chunks were found as were written."""
    if found != total:
        raise AssertionError(f"{found} chunks of {total} were found")
