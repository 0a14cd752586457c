"""Chunks: a model's stream kept as Arrow batches, and replayed from them.

A generation's chunks are numbered from 0 without gaps. They travel and rest as columns; an object
is made for a chunk only where someone iterates over them.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from aidb_ray.contracts import Chunk
from aidb_ray.errors import (
    ConfigError,
    ConflictError,
    ContractError,
    KeyMissingError,
    UnavailableError,
)
from aidb_ray.store.changes import (
    CHUNKS,
    Append,
    Change,
    ChunkColumns,
    ChunkSlice,
    Filter,
    FoundRow,
    Need,
    Runner,
    decode_slice,
)
from aidb_ray.store.collection import Collection
from aidb_ray.store.columns import EMPTY, cut, pack, unpack

if TYPE_CHECKING:
    import pyarrow as pa
    from ag_ui.core import BaseEvent

    from aidb_ray.store.client import StoreClient
    from aidb_ray.store.collection import Site, Sites

# The place of a name is its code on disk: names are only ever added at the end.
_NAMES = (
    "TEXT_MESSAGE_START",
    "TEXT_MESSAGE_CONTENT",
    "TEXT_MESSAGE_END",
    "TEXT_MESSAGE_CHUNK",
    "TOOL_CALL_START",
    "TOOL_CALL_ARGS",
    "TOOL_CALL_END",
    "TOOL_CALL_CHUNK",
    "TOOL_CALL_RESULT",
    "STATE_SNAPSHOT",
    "STATE_DELTA",
    "MESSAGES_SNAPSHOT",
    "ACTIVITY_SNAPSHOT",
    "ACTIVITY_DELTA",
    "RAW",
    "CUSTOM",
    "RUN_STARTED",
    "RUN_FINISHED",
    "RUN_ERROR",
    "STEP_STARTED",
    "STEP_FINISHED",
    "REASONING_START",
    "REASONING_MESSAGE_START",
    "REASONING_MESSAGE_CONTENT",
    "REASONING_MESSAGE_END",
    "REASONING_MESSAGE_CHUNK",
    "REASONING_END",
    "REASONING_ENCRYPTED_VALUE",
    "SUBAGENT_STARTED",
    "SUBAGENT_FINISHED",
    "SUBAGENT_ERROR",
)
_CODES = {name: code for code, name in enumerate(_NAMES)}
_TEXT_CODE = _CODES["TEXT_MESSAGE_CONTENT"]
_FIRST_OWN_CODE = 200
_MAX_OWN_TYPES = 56

FLUSH_INTERVAL_MS = 50
FLUSH_CHUNKS = 512
MAX_UNREAD_SLICES = 10_000

Ending = Literal["finished", "raised", "cancelled"]


def type_name(code: int, own: Sequence[str]) -> str:
    """Return the name of a chunk's type from its code and its slice's own names."""
    return own[code - _FIRST_OWN_CODE] if code >= _FIRST_OWN_CODE else _NAMES[code]


def restart_marker(attempt: int) -> str:
    """Return the payload of the `CUSTOM` event that begins attempt `attempt`, from 2 on."""
    return msgspec.json.encode({"name": "attempt", "value": attempt}).decode()


class ChunkBuffer:
    """Chunks of one generation that are not written yet. No I/O.

    Attributes:
        attempt: The start of the run that writes them.
    """

    def __init__(self, session: str, generation_id: str, *, next_index: int, attempt: int) -> None:
        self.session = session
        self.generation_id = generation_id
        self.attempt = attempt
        self._taken = next_index
        self._codes: list[int] = []
        self._payloads: list[str] = []
        self._own: list[str] = []

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def next_index(self) -> int:
        """Index that the next chunk gets."""
        return self._taken + len(self._codes)

    def add(self, type_: str, payload: str) -> None:
        """Add one chunk.

        Raises:
            ContractError: `invalid_unicode`: there is half of a surrogate pair in it.
        """
        if not payload.isascii():
            _check_unicode(payload)
        code = _CODES.get(type_)
        self._codes.append(self._own_code(type_) if code is None else code)
        self._payloads.append(payload)

    def add_text(self, text: str) -> None:
        """Add one chunk that is a fragment of text. See `add`."""
        if not text.isascii():
            _check_unicode(text)
        self._codes.append(_TEXT_CODE)
        self._payloads.append(text)

    def begin_attempt(self) -> None:
        """Mark that a new attempt begins here, if it is not the first."""
        if self.attempt > 1:
            self.add("CUSTOM", restart_marker(self.attempt))

    def take(self, ending: Ending | None = None) -> tuple[Append, ChunkColumns] | None:
        """Return what to append, and forget it; None if there is nothing to say."""
        count = len(self._codes)
        if not count and ending is None:
            return None
        append = Append(
            self.session,
            self.generation_id,
            self.attempt,
            self._taken,
            0,
            count,
            tuple(self._own),
            ending or "",
        )
        columns = pack(self._codes, self._payloads) if count else EMPTY
        self._taken += count
        self._codes, self._payloads, self._own = [], [], []
        return append, columns

    def _own_code(self, type_: str) -> int:
        if type_ not in self._own:
            if len(self._own) >= _MAX_OWN_TYPES:
                raise ContractError(
                    f"Over {_MAX_OWN_TYPES} chunk types that AG-UI does not know came within "
                    f"{FLUSH_INTERVAL_MS} ms; put what varies into the content.",
                    code="too_many_types",
                    collection=CHUNKS,
                )
            self._own.append(type_)
        return _FIRST_OWN_CODE + self._own.index(type_)


def _check_unicode(payload: str) -> None:
    try:
        payload.encode()
    except UnicodeEncodeError:
        raise ContractError(
            "A chunk holds half of a surrogate pair.",
            code="invalid_unicode",
            collection=CHUNKS,
        ) from None


class ChunkFlusher:
    """Writes the buffers of all running generations of a process, a commit each, one call together.

    A chunk waits at most `FLUSH_INTERVAL_MS` before it is sent.
    """

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._open: dict[ChunkBuffer, Runner | None] = {}
        self._failed: dict[ChunkBuffer, BaseException] = {}
        self._sent: dict[ChunkBuffer, asyncio.Future[int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self, buffer: ChunkBuffer, runner: Runner | None = None) -> None:
        """Flush a buffer from now on, now and then."""
        self._open[buffer] = runner
        if self._timer is None:
            self._arm()

    def close(self, buffer: ChunkBuffer) -> None:
        """Flush the buffer no more; what it still holds is the caller's.

        Raises:
            AidbError: an earlier flush of it failed: chunks are missing, so nothing may follow.
        """
        self._open.pop(buffer, None)
        self.check(buffer, forget=True)

    def discard(self, buffer: ChunkBuffer) -> None:
        """Flush the buffer no more, whatever became of it."""
        self._open.pop(buffer, None)
        self._sent.pop(buffer, None)
        self._failed.pop(buffer, None)

    def check(self, buffer: ChunkBuffer, *, forget: bool = False) -> None:
        """Raise if an earlier flush of the buffer failed."""
        error = self._failed.pop(buffer, None) if forget else self._failed.get(buffer)
        if error is not None:
            raise error

    def sent(self, buffer: ChunkBuffer) -> asyncio.Future[int] | None:
        """Return the outcome of the newest flush of a buffer that is not discarded."""
        return self._sent.get(buffer)

    def flush(self, buffer: ChunkBuffer) -> None:
        """Send what the buffer holds now."""
        taken = buffer.take()
        if taken is None:
            return
        append, columns = taken
        try:
            runner = self._open.get(buffer)
            sent = self._client.commit(
                [append], chunks=columns, runner=runner, needs=_needs(append, runner)
            )
        except UnavailableError as error:
            self._note(buffer, error)
        else:
            self._sent[buffer] = sent
            sent.add_done_callback(
                lambda sent: self._note(buffer, None if sent.cancelled() else sent.exception())
            )

    def _note(self, buffer: ChunkBuffer, error: BaseException | None) -> None:
        # The first one: later chunks are refused because of it.
        if error is not None and buffer in self._open:
            self._failed.setdefault(buffer, error)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(FLUSH_INTERVAL_MS / 1000, self._flush_all)

    def _flush_all(self) -> None:
        self._timer = None
        for buffer in self._open:
            try:
                self.flush(buffer)
            except Exception as error:  # noqa: BLE001  Its own run hears of it, others go on.
                self._note(buffer, error)
        if self._open:
            self._arm()


def _needs(append: Append, runner: Runner | None) -> tuple[Need, ...]:
    """Return the row that chunks of an agent are of: they must not outlive it."""
    if runner is None:
        return ()
    return (Need(append.session, "generations", append.generation_id),)


class ChunkCollection:
    """The chunks of one session. Written by `stream_to_collection`, read by `replay`."""

    def __init__(self, sites: Sites, session: str) -> None:
        self._sites = sites
        self.session = session

    def __repr__(self) -> str:
        return f"<Chunks of {self.session}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkCollection, (self._sites, self.session)

    @property
    def sites(self) -> Sites:
        """The partitions of its database, as this process reaches them."""
        return self._sites

    @property
    def site(self) -> Site:
        """The partition that holds them."""
        return self._sites.site_of(self.session)

    async def to_arrow(self, generation_id: str) -> pa.Table:
        """Return a generation's stored chunks as a table, without an object a chunk.

        Columns: `generation_id` (dictionary), `index` (int64), `attempt` (int32), `type`
        (dictionary), `content` (string); shape [chunks, 5], in order of `index`.
        """
        slices: list[ChunkSlice] = []
        index = 0
        while True:
            page = await self.site.client.read_chunks(self.session, generation_id, index)
            slices += page.slices
            if not page.more:
                return slices_to_table(generation_id, slices)
            last = page.slices[-1]
            index = last.index + len(last.columns.types)


def slices_to_table(generation_id: str, slices: Sequence[ChunkSlice]) -> pa.Table:
    """Return chunk slices as one table; see `ChunkCollection.to_arrow`."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("generation_id", pa.dictionary(pa.int8(), pa.string())),
            ("index", pa.int64()),
            ("attempt", pa.int32()),
            ("type", pa.dictionary(pa.uint8(), pa.string())),
            ("content", pa.string()),
        ]
    )
    arrow: Any = pa  # Its stubs leave much of what follows unknown.
    own: list[str] = []
    batches: list[pa.RecordBatch] = []
    for part in slices:
        for name in part.types:
            if name not in own:
                own.append(name)
    filler = [""] * (_FIRST_OWN_CODE - len(_NAMES))
    names = arrow.array([*_NAMES, *filler, *own] if own else list(_NAMES))
    ids = arrow.array([generation_id])
    for part in slices:
        count = len(part.columns.types)
        codes = part.columns.types
        if part.types and list(part.types) != own[: len(part.types)]:
            codes = bytes(
                _FIRST_OWN_CODE + own.index(part.types[c - _FIRST_OWN_CODE])
                if c >= _FIRST_OWN_CODE
                else c
                for c in codes
            )
        content = arrow.StringArray.from_buffers(
            count,
            pa.py_buffer(b"\0\0\0\0" + part.columns.ends),
            pa.py_buffer(part.columns.payload),
        )
        types = arrow.UInt8Array.from_buffers(pa.uint8(), count, [None, pa.py_buffer(codes)])
        first = part.index
        batches.append(
            arrow.record_batch(
                [
                    arrow.DictionaryArray.from_arrays(
                        arrow.Int8Array.from_buffers(
                            pa.int8(), count, [None, pa.py_buffer(bytes(count))]
                        ),
                        ids,
                    ),
                    _whole_numbers(first, count),
                    arrow.repeat(arrow.scalar(part.attempt, pa.int32()), count),
                    arrow.DictionaryArray.from_arrays(types, names),
                    content,
                ],
                schema=schema,
            )
        )
    return pa.Table.from_batches(batches, schema=schema)


def _whole_numbers(first: int, count: int) -> Any:
    import pyarrow as pa

    numbers = array("q", range(first, first + count))
    return pa.Int64Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(numbers)])


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


def slice_to_chunks(part: ChunkSlice) -> list[Chunk]:
    """Return the chunks of a slice as rows."""
    generation_id, attempt, own = part.generation_id, part.attempt, part.types
    codes, texts = unpack(part.columns)
    return [
        make_chunk(
            f"{generation_id}:{index}",
            generation_id,
            index,
            attempt,
            own[code - _FIRST_OWN_CODE] if code >= _FIRST_OWN_CODE else _NAMES[code],
            text,
        )
        for index, (code, text) in enumerate(zip(codes, texts, strict=True), part.index)
    ]


_CHUNK_FIELDS = frozenset(Chunk.model_fields)


def make_chunk(
    id_: str, generation_id: str, index: int, attempt: int, type_: str, content: str
) -> Chunk:
    """Return a `Chunk` from values that are known to fit, at a third of validation's cost."""
    chunk = Chunk.__new__(Chunk)
    fill = object.__setattr__
    fill(
        chunk,
        "__dict__",
        {
            "id": id_,
            "generation_id": generation_id,
            "index": index,
            "attempt": attempt,
            "type": type_,
            "content": content,
        },
    )
    fill(chunk, "__pydantic_fields_set__", set(_CHUNK_FIELDS))
    fill(chunk, "__pydantic_extra__", None)
    fill(chunk, "__pydantic_private__", None)
    return chunk


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
                fresh = None if part is gap else _after(part, reader.index)
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


def _after(part: ChunkSlice, index: int) -> ChunkSlice | None:
    """Return what of a slice comes at or after `index`, or None."""
    count = len(part.columns.types)
    skip = index - part.index
    if skip >= count:
        return None
    if skip <= 0:
        return part
    return ChunkSlice(
        part.generation_id,
        part.attempt,
        index,
        cut(part.columns, skip, count - skip),
        part.types,
        part.closes,
    )
