"""`stream_to_collection`: a stream written while it runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from aidb_ray.chunks.buffer import FLUSH_CHUNKS, FLUSH_INTERVAL_MS, ChunkBuffer, Ending
from aidb_ray.chunks.collection import ChunkCollection
from aidb_ray.chunks.flusher import ChunkFlusher
from aidb_ray.chunks.slices import slice_to_chunks
from aidb_ray.errors import ConfigError, ConflictError, ContractError
from aidb_ray.store.changes import CHUNKS
from aidb_ray.store.collection import Collection

if TYPE_CHECKING:
    from ag_ui.core import BaseEvent

    from aidb_ray.store.client import StoreClient

Transform = Callable[[Any, int, str], Any]


async def stream_to_collection(
    stream: AsyncIterator[Any],
    *,
    collection: ChunkCollection | Collection[Any],
    generation_id: str,
    transform: Transform | None = None,
) -> int:
    """Write a stream's events as chunks while it runs; return how many the generation has.

    Called again with the id of a generation whose stream broke off, it goes on at the next index
    after a restart marker. The end (finished, raised, cancelled) is stored as well; the stream's
    own error is raised again after what came before it is durable. Nothing is written after the
    end of a stream.

    Args:
        stream: AG-UI events, or anything that `transform` understands.
        collection: `session.chunks`, kept as batches; or a collection of a row type of yours.
        generation_id: Whose stream it is.
        transform: Makes a chunk of (event, index, generation_id): a `Chunk`, or a mapping with
            `type` and `content`; for a collection of yours, one of its rows. An `index` in it is
            taken at its word: a chunk that is there already may come again, and changes nothing.

    Raises:
        ConflictError: `stream_closed`: the generation has ended. `sequence_gap`: another writer,
            or a chunk that `transform` numbers beyond the next. `chunk_conflict`: one that it
            numbers as one that is there, and that differs.
        ContractError: `invalid_index`, or what `transform` returns is no chunk.
    """
    if isinstance(collection, Collection):
        if transform is None:
            raise ConfigError(
                "A collection of your own row type needs `transform` to make its rows.",
                code="transform_required",
            )
        return await _stream_rows(stream, collection, generation_id, transform)
    client = collection.site.client
    found = await client.read_chunks(collection.session, generation_id, 1 << 62)
    if found.closes:
        raise ConflictError(
            f"The chunk stream of {generation_id!r} has ended; start a new generation.",
            code="stream_closed",
            collection=CHUNKS,
            key=generation_id,
        )
    attempt = found.attempt + 1
    buffer = ChunkBuffer(
        collection.session, generation_id, next_index=found.next_index, attempt=attempt
    )
    buffer.begin_attempt()
    flusher = ChunkFlusher(client)
    flusher.open(buffer)
    ending: Ending = "raised"
    put = _event_writer(buffer) if transform is None else _row_writer(buffer, transform)
    try:
        async with _closing(stream):
            async for event in stream:
                if (repeated := put(event)) is not None:
                    await _check_repeated(client, flusher, buffer, repeated)
                if len(buffer) >= FLUSH_CHUNKS:
                    flusher.check(buffer)
                    flusher.flush(buffer)
        ending = "finished"
    except asyncio.CancelledError:
        ending = "cancelled"
        raise
    finally:
        try:
            flusher.close(buffer)
        finally:
            flusher.discard(buffer)
        taken = buffer.take(ending)
        assert taken is not None
        # A cancelled caller stops waiting for it; the commit goes on.
        await client.commit([taken[0]], chunks=taken[1])
    return buffer.next_index


@asynccontextmanager
async def _closing(stream: AsyncIterator[Any]) -> AsyncGenerator[None]:
    """End a stream that is not read to its end, so that its request is aborted."""
    try:
        yield
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


_Repeated = tuple[int, str, str]
"""Index, type and content of a chunk whose index has one already."""


def _event_writer(buffer: ChunkBuffer) -> Callable[[BaseEvent], None]:
    from aidb_ray.models.events import EventEncoder

    encode, add = EventEncoder().encode, buffer.add

    def put(event: BaseEvent) -> None:
        add(*encode(event))

    return put


def _row_writer(buffer: ChunkBuffer, transform: Transform) -> Callable[[Any], _Repeated | None]:
    def put(event: Any) -> _Repeated | None:
        row: Any = transform(event, buffer.next_index, buffer.generation_id)
        named = cast("Mapping[str, Any]", vars(row) if hasattr(row, "__dict__") else row)
        type_, content = named.get("type"), named.get("content", "")
        if not isinstance(type_, str) or not isinstance(content, str):
            raise ContractError(
                f"transform returned {row!r}; a chunk needs texts `type` and `content`.",
                collection=CHUNKS,
                key=f"{buffer.generation_id}:{buffer.next_index}",
            )
        index = _checked_index(named.get("index", buffer.next_index), buffer)
        if index < buffer.next_index:
            return index, type_, content
        buffer.add(type_, content)
        return None

    return put


def _checked_index(index: object, buffer: ChunkBuffer) -> int:
    key, expected = buffer.generation_id, buffer.next_index
    if type(index) is not int or index < 0:
        raise ContractError(
            f"The index of a chunk is a whole number from 0, not {index!r}.",
            code="invalid_index",
            collection=CHUNKS,
            key=key,
            loc=("index",),
        )
    if index > expected:
        raise ConflictError(
            f"Chunk {index} of {key!r} came where chunk {expected} is next.",
            code="sequence_gap",
            collection=CHUNKS,
            key=key,
            expected=expected,
            got=index,
        )
    return index


async def _check_repeated(
    client: StoreClient, flusher: ChunkFlusher, buffer: ChunkBuffer, repeated: _Repeated
) -> None:
    """Raise unless a chunk that came again is the one that is there."""
    index, *came = repeated
    flusher.flush(buffer)
    if (sent := flusher.sent(buffer)) is not None:
        await asyncio.shield(sent)
    page = await client.read_chunks(buffer.session, buffer.generation_id, index)
    there = slice_to_chunks(page.slices[0])[0]
    if came != [there.type, there.content]:
        raise ConflictError(
            f"Chunk {index} of {buffer.generation_id!r} is there already, and is another one.",
            code="chunk_conflict",
            collection=CHUNKS,
            key=buffer.generation_id,
        )


async def _stream_rows(
    stream: AsyncIterator[Any],
    collection: Collection[Any],
    generation_id: str,
    transform: Transform,
) -> int:
    waiting: deque[Any] = deque()
    rows: list[Any] = []
    index = 0
    loop = asyncio.get_running_loop()
    due = loop.time() + FLUSH_INTERVAL_MS / 1000
    try:
        async with _closing(stream):
            async for event in stream:
                rows.append(transform(event, index, generation_id))
                index += 1
                if len(rows) >= FLUSH_CHUNKS or loop.time() >= due:
                    waiting.append(collection.insert(rows))
                    rows = []
                    due = loop.time() + FLUSH_INTERVAL_MS / 1000
                while len(waiting) > 8:
                    await waiting.popleft()
    finally:
        if rows:
            waiting.append(collection.insert(rows))
        for transaction in waiting:
            await transaction
    return index
