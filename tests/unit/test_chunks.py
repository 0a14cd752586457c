from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from ag_ui.core import Event, TextMessageContentEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from aidb_ray import (
    Chunk,
    ConfigError,
    ConflictError,
    ContractError,
    Database,
    UnavailableError,
    connect,
    replay,
    stream_to_collection,
)
from aidb_ray.chunks import (
    ChunkBuffer,
    ChunkCollection,
    ChunkFlusher,
    follow_slices,
    slice_to_chunks,
    slices_to_table,
    type_name,
)
from aidb_ray.models.events import EventDecoder
from aidb_ray.store.changes import ChunkColumns, ChunkSlice
from aidb_ray.store.columns import unpack

URL = "aidb://echo/1"


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def chunks(db: Database) -> ChunkCollection:
    return db.session(URL).chunks


def text(*deltas: str) -> list[Event]:
    return [TextMessageContentEvent(message_id="m", delta=delta) for delta in deltas]


async def stream(events: Sequence[Any], error: BaseException | None = None) -> AsyncGenerator[Any]:
    for event in events:
        yield event
    if error is not None:
        raise error


async def stored(chunks: ChunkCollection, generation_id: str = "g", **options: Any) -> list[Chunk]:
    options = {"follow": False, **options}
    return [chunk async for chunk in replay(chunks, generation_id=generation_id, **options)]


def said(found: Sequence[Chunk]) -> list[str]:
    """Return the text that chunks hold."""
    decode = EventDecoder().decode
    events = [decode(chunk.type, chunk.content) for chunk in found]
    return [event.delta for event in events if isinstance(event, TextMessageContentEvent)]


# Buffers.


def make_buffer(*, next_index: int = 0, attempt: int = 1) -> ChunkBuffer:
    return ChunkBuffer(URL, "g", next_index=next_index, attempt=attempt)


def names_of(types: Sequence[str], columns: ChunkColumns) -> list[tuple[str, str]]:
    codes, texts = unpack(columns)
    return [(type_name(code, types), content) for code, content in zip(codes, texts, strict=True)]


TYPES = st.sampled_from(["TEXT_MESSAGE_CONTENT", "CUSTOM", "my-type", "other", "Ünï"])


@given(st.lists(st.lists(st.tuples(TYPES, st.text(max_size=5)), max_size=5), max_size=5))
def test_what_is_taken_is_what_was_added_at_indexes_without_gaps(
    batches: list[list[tuple[str, str]]],
) -> None:
    buffer = make_buffer(next_index=7)
    index = 7
    for batch in batches:
        for type_, content in batch:
            buffer.add(type_, content)
        assert len(buffer) == len(batch)
        taken = buffer.take()
        if not batch:
            assert taken is None
            continue
        assert taken is not None
        append, columns = taken
        assert (append.index, append.count, append.closes) == (index, len(batch), "")
        assert names_of(append.types, columns) == batch
        index += len(batch)
    assert buffer.next_index == index


def test_an_end_is_said_even_without_chunks() -> None:
    taken = make_buffer(next_index=3).take("finished")
    assert taken is not None
    assert (taken[0].index, taken[0].count, taken[0].closes) == (3, 0, "finished")


@pytest.mark.parametrize(("attempt", "marks"), [(1, 0), (2, 1)])
def test_a_later_attempt_is_marked(attempt: int, marks: int) -> None:
    buffer = make_buffer(attempt=attempt)
    buffer.begin_attempt()
    assert len(buffer) == marks


def test_types_of_one_s_own_have_a_bound() -> None:
    buffer = make_buffer()
    for number in range(56):
        buffer.add(f"own-{number}", "")
    with pytest.raises(ContractError) as raised:
        buffer.add("own-56", "")
    assert raised.value.code == "too_many_types"
    buffer.add("own-3", "")
    buffer.take()
    buffer.add("own-56", "")


# Streams.


async def test_a_stream_is_kept_and_replayed(chunks: ChunkCollection) -> None:
    count = await stream_to_collection(
        stream(text("Hel", "lo")), collection=chunks, generation_id="g"
    )

    assert count == 2
    found = await stored(chunks)
    assert said(found) == ["Hel", "lo"]
    assert [(c.id, c.generation_id, c.index, c.attempt) for c in found] == [
        ("g:0", "g", 0, 1),
        ("g:1", "g", 1, 1),
    ]


async def test_a_stream_that_raises_keeps_what_came_before(chunks: ChunkCollection) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await stream_to_collection(
            stream(text("a"), RuntimeError("broken")), collection=chunks, generation_id="g"
        )
    assert said(await stored(chunks, follow=True)) == ["a"]


async def test_a_stream_that_is_cancelled_keeps_what_came_before(chunks: ChunkCollection) -> None:
    reached, closed = asyncio.Event(), asyncio.Event()

    async def hang() -> AsyncIterator[Event]:
        try:
            yield text("a")[0]
            reached.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    writing = asyncio.create_task(
        stream_to_collection(hang(), collection=chunks, generation_id="g")
    )
    await reached.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert closed.is_set()
    page = await chunks.site.client.read_chunks(URL, "g")
    assert page.closes == "cancelled"
    assert said(await stored(chunks)) == ["a"]


def make_no_chunk(_event: object, _index: int, _generation_id: str) -> dict[str, int]:
    return {"type": 3}


async def test_a_stream_whose_chunks_cannot_be_made_is_ended(chunks: ChunkCollection) -> None:
    closed = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.set()

    with pytest.raises(ContractError):
        await stream_to_collection(
            source(), collection=chunks, generation_id="g", transform=make_no_chunk
        )
    assert closed.is_set()


async def test_after_its_end_a_stream_takes_nothing_and_reads_nothing(
    chunks: ChunkCollection,
) -> None:
    await stream_to_collection(stream(text("a")), collection=chunks, generation_id="g")
    read: list[Event] = []

    async def source() -> AsyncIterator[Event]:
        for event in text("b"):
            read.append(event)
            yield event

    with pytest.raises(ConflictError) as raised:
        await stream_to_collection(source(), collection=chunks, generation_id="g")
    assert raised.value.code == "stream_closed"
    assert not read
    assert said(await stored(chunks)) == ["a"]


async def test_a_stream_that_broke_off_goes_on_after_a_marker(chunks: ChunkCollection) -> None:
    client = chunks.site.client
    buffer = make_buffer()
    buffer.add("TEXT_MESSAGE_CONTENT", "lost end")
    taken = buffer.take()
    assert taken is not None
    await client.commit([taken[0]], chunks=taken[1])

    count = await stream_to_collection(stream(text("b")), collection=chunks, generation_id="g")

    assert count == 3
    found = await stored(chunks)
    assert [(c.index, c.attempt, c.type) for c in found] == [
        (0, 1, "TEXT_MESSAGE_CONTENT"),
        (1, 2, "CUSTOM"),
        (2, 2, "TEXT_MESSAGE_CONTENT"),
    ]
    assert [c.index for c in await stored(chunks, attempts="last")] == [1, 2]


async def test_a_second_writer_is_refused(chunks: ChunkCollection) -> None:
    client = chunks.site.client

    async def source() -> AsyncIterator[Event]:
        yield text("mine")[0]
        other = make_buffer()
        other.add("CUSTOM", "theirs")
        taken = other.take()
        assert taken is not None
        await client.commit([taken[0]], chunks=taken[1])

    with pytest.raises(ConflictError) as raised:
        await stream_to_collection(source(), collection=chunks, generation_id="g")
    assert raised.value.code == "sequence_gap"


async def test_chunks_may_be_of_any_type(chunks: ChunkCollection) -> None:
    await stream_to_collection(
        stream([1, 2]),
        collection=chunks,
        generation_id="g",
        transform=lambda n, index, _: {"type": f"number-{n}", "content": str(index)},
    )
    assert [(c.type, c.content) for c in await stored(chunks)] == [
        ("number-1", "0"),
        ("number-2", "1"),
    ]


class Line(BaseModel):
    id: str
    run: str
    at: int
    said: str


async def test_chunks_may_be_rows_of_one_s_own(db: Database) -> None:
    lines = db.session(URL).collection("lines", Line)
    with pytest.raises(ConfigError):
        await stream_to_collection(stream(["a"]), collection=lines, generation_id="g")
    count = await stream_to_collection(
        stream(["a", "b"]),
        collection=lines,
        generation_id="g",
        transform=lambda said, at, run: Line(id=f"{run}:{at}", run=run, at=at, said=said),
    )
    found = await db.query(lambda q: q.from_(line=lines))
    assert count == 2
    assert sorted(line.id for line in found) == ["g:0", "g:1"]


# Flushing.


async def test_a_flush_that_cannot_be_sent_fails_its_buffer_and_no_other(
    chunks: ChunkCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = chunks.site.client
    flusher = ChunkFlusher(client)
    one, two = make_buffer(), ChunkBuffer(URL, "h", next_index=0, attempt=1)
    flusher.open(one)
    flusher.open(two)
    one.add("CUSTOM", "1")
    two.add("CUSTOM", "2")
    commit = client.commit

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnavailableError("Full.", outcome="not_applied", code="overloaded")

    monkeypatch.setattr(client, "commit", refuse)
    flusher.flush(one)
    monkeypatch.setattr(client, "commit", commit)
    flusher.flush(two)
    sent = flusher.sent(two)
    assert sent is not None
    await sent

    with pytest.raises(UnavailableError):
        flusher.check(one)
    with pytest.raises(UnavailableError):
        flusher.close(one)
    flusher.close(two)
    assert [chunk.content for chunk in await stored(chunks, "h")] == ["2"]


async def test_what_is_held_is_sent_after_a_while(chunks: ChunkCollection) -> None:
    flusher = ChunkFlusher(chunks.site.client)
    buffer = make_buffer()
    flusher.open(buffer)
    reading = asyncio.ensure_future(anext(replay(chunks, generation_id="g")))
    buffer.add("CUSTOM", "a")
    assert (await asyncio.wait_for(reading, 10)).content == "a"
    flusher.discard(buffer)


# Replays.


async def test_a_replay_joins_what_is_stored_and_what_comes(chunks: ChunkCollection) -> None:
    """Readers that begin anywhere, at any time, see the same chunks, once and in order."""
    readers: list[asyncio.Task[list[Chunk]]] = []
    first_read = asyncio.Event()

    async def follow(after: int | None) -> list[Chunk]:
        found: list[Chunk] = []
        async for chunk in replay(chunks, generation_id="g", after_index=after):
            found.append(chunk)
            first_read.set()
        return found

    async def source() -> AsyncIterator[Event]:
        for number in range(1_200):
            if number in (0, 300, 900):
                readers.extend(asyncio.create_task(follow(after)) for after in (None, 599))
            if number == 1_000:
                await first_read.wait()
            yield text(str(number))[0]

    await stream_to_collection(source(), collection=chunks, generation_id="g")

    for reader, begin in zip(readers, [0, 600] * 3, strict=True):
        found = await reader
        assert [chunk.index for chunk in found] == list(range(begin, 1_200))
        if not begin:
            assert said(found) == [str(number) for number in range(1_200)]


async def test_a_replay_of_a_stream_that_has_ended_ends(chunks: ChunkCollection) -> None:
    await stream_to_collection(stream(text("a")), collection=chunks, generation_id="g")
    assert await stored(chunks, follow=True, after_index=10) == []


async def test_a_reader_that_missed_changes_reads_them_from_the_store(
    chunks: ChunkCollection,
) -> None:
    client = chunks.site.client
    buffer = make_buffer()

    async def write(*contents: str, end: bool = False) -> None:
        for content in contents:
            buffer.add("CUSTOM", content)
        taken = buffer.take("finished" if end else None)
        assert taken is not None
        await client.commit([taken[0]], chunks=taken[1])

    slices = follow_slices(chunks, "g")
    await write("0")
    seen = [c.index for c in slice_to_chunks(await anext(slices))]
    client.feed._generation = "of another store"
    await write("1", "2")
    reading = asyncio.ensure_future(anext(slices))
    while len(seen) < 3:
        seen += [c.index for c in slice_to_chunks(await asyncio.wait_for(reading, 10))]
        reading = asyncio.ensure_future(anext(slices))
    await client.feed.reached((await client.status()).revision)
    await write("3")
    seen += [c.index for c in slice_to_chunks(await asyncio.wait_for(reading, 10))]
    await write(end=True)
    async for part in slices:
        seen += [c.index for c in slice_to_chunks(part)]

    assert seen == [0, 1, 2, 3]


# Arrow.


async def test_chunks_as_a_table(chunks: ChunkCollection) -> None:
    await stream_to_collection(
        stream(["a", "b"]),
        collection=chunks,
        generation_id="g",
        transform=lambda said, _index, _id: {"type": f"own-{said}", "content": said},
    )
    table = await chunks.to_arrow("g")
    assert table.to_pylist() == [
        {"generation_id": "g", "index": 0, "attempt": 1, "type": "own-a", "content": "a"},
        {"generation_id": "g", "index": 1, "attempt": 1, "type": "own-b", "content": "b"},
    ]
    assert (await chunks.to_arrow("nothing")).num_rows == 0


@given(st.lists(st.lists(st.tuples(TYPES, st.text(max_size=4)), min_size=1, max_size=4)))
def test_a_table_says_the_same_as_rows(batches: list[list[tuple[str, str]]]) -> None:
    buffer = make_buffer()
    slices: list[ChunkSlice] = []
    for number, batch in enumerate(batches, 1):
        buffer.attempt = number
        for type_, content in batch:
            buffer.add(type_, content)
        taken = buffer.take()
        assert taken is not None
        append, columns = taken
        slices.append(ChunkSlice("g", append.attempt, append.index, columns, append.types))

    table = slices_to_table("g", slices)
    rows = [chunk for part in slices for chunk in slice_to_chunks(part)]

    assert all(after.index == before.index + 1 for before, after in pairwise(rows))
    assert table.to_pylist() == [chunk.model_dump(exclude={"id"}) for chunk in rows]
