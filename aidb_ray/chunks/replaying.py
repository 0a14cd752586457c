"""`replay`: a stream read again from what is stored, and followed while it runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal

from aidb_ray.chunks.collection import ChunkCollection
from aidb_ray.chunks.slices import rest_of, slice_to_chunks
from aidb_ray.contracts import Chunk
from aidb_ray.errors import KeyMissingError
from aidb_ray.store.changes import CHUNKS, Change, ChunkSlice, Filter, FoundRow, decode_slice
from aidb_ray.store.columns import EMPTY

if TYPE_CHECKING:
    from aidb_ray.store.client import StoreClient

MAX_UNREAD_SLICES = 10_000


async def replay(
    chunks: ChunkCollection,
    *,
    generation_id: str,
    after_index: int | None = None,
    follow: bool = True,
    attempts: Literal["all", "last"] = "all",
) -> AsyncIterator[Chunk]:
    """Yield a generation's chunks in order: the stored ones, then live ones; no gap, no repeat.

    Ends at the end of the stream, or with `follow=False` after the stored chunks.

    Args:
        chunks: `session.chunks`.
        generation_id: Whose chunks.
        after_index: Begin after this one.
        follow: Whether to wait for chunks that are still to come.
        attempts: `"last"` leaves out what earlier attempts wrote.

    Raises:
        KeyMissingError: `gone`: the stream was deleted while it was followed.
    """
    begin = 0 if after_index is None else after_index + 1
    async for part in follow_slices(
        chunks, generation_id, begin=begin, follow=follow, last_attempt=attempts == "last"
    ):
        for chunk in slice_to_chunks(part):
            yield chunk


async def follow_slices(
    chunks: ChunkCollection,
    generation_id: str,
    *,
    begin: int = 0,
    follow: bool = True,
    last_attempt: bool = False,
) -> AsyncIterator[ChunkSlice]:
    """Yield a generation's chunks as slices; see `replay`."""
    client = chunks.site.client
    # Stands for slices that were not heard: they lie in the store.
    gap = ChunkSlice(generation_id, 0, 1 << 62, EMPTY)
    inbox: deque[ChunkSlice | None] = deque()
    arrived = asyncio.Event()

    def hear(changes: Sequence[Change]) -> None:
        inbox.extend(
            None if change.value is None else decode_slice(change.value)
            for change in changes
            if change.key == generation_id
        )
        if len(inbox) > MAX_UNREAD_SLICES:
            # Stored chunks can be read again, so what waits may go.
            inbox.clear()
            inbox.append(gap)
        arrived.set()

    def begin_again(_rows: Sequence[FoundRow], _revision: int) -> None:
        inbox.append(gap)
        arrived.set()

    subscription = None
    if follow:
        wanted = Filter(CHUNKS, chunks.session, where=(("generationId", (generation_id,)),))
        subscription = client.feed.subscribe(wanted, hear, begin_again, snapshot=False)
        await asyncio.shield(subscription.started)
    try:
        reader = _Stored(client, chunks.session, generation_id, begin)
        async for part in reader.slices(last_attempt=last_attempt):
            yield part
        while follow and not reader.closes:
            while inbox:
                part = inbox.popleft()
                if part is None:
                    raise KeyMissingError(
                        f"The chunks of {generation_id!r} were deleted.",
                        code="gone",
                        collection=CHUNKS,
                        key=generation_id,
                    )
                if part.index > reader.index:
                    # The feed began later than it should, or dropped some: they are stored.
                    async for stored in reader.slices():
                        yield stored
                fresh = None if part is gap else rest_of(part, reader.index)
                if fresh is not None:
                    reader.index = fresh.index + len(fresh.columns.types)
                    yield fresh
                if part.closes or reader.closes:
                    return
            arrived.clear()
            await arrived.wait()
    finally:
        if subscription is not None:
            client.feed.unsubscribe(subscription)


class _Stored:
    """Reads stored chunks page by page, from where it stopped last time."""

    def __init__(self, client: StoreClient, session: str, generation_id: str, index: int) -> None:
        self._client = client
        self._session = session
        self._generation_id = generation_id
        self.index = index
        self.closes = ""

    async def slices(self, *, last_attempt: bool = False) -> AsyncIterator[ChunkSlice]:
        while True:
            page = await self._client.read_chunks(self._session, self._generation_id, self.index)
            for part in page.slices:
                self.index = part.index + len(part.columns.types)
                if not last_attempt or part.attempt == page.attempt:
                    yield part
            if not page.more:
                self.closes = page.closes
                return
