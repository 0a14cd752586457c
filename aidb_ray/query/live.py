"""Live queries: the shell around a `Pipeline`, fed by what this process sees of the rows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from aidb_ray.errors import NotReadyError, SlowConsumerError
from aidb_ray.expressions import SourceRef, equalities
from aidb_ray.query.answer import Decode
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.query.operators import Delta, Input, Pipeline, RowChange
from aidb_ray.store.changes import Filter
from aidb_ray.store.local import RowEvent, View
from aidb_ray.store.rows import RowCodec, codec_of

if TYPE_CHECKING:
    from aidb_ray.store.collection import Sites

R = TypeVar("R")
MAX_UNREAD_DELTAS = 10_000

Question = Callable[[QueryRoot], Query[R]] | Query[R]

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class LiveQuery(Generic[R]):
    """A query whose answer is kept current, own writes included, until it is closed.

    `live.rows` is the newest answer. Each `async for` has a subscription of its own: first an
    `enter` for every row of the answer at its start, then each delta, once and in order.

    What a commit changed in several collections, or several rows of one, is taken in together:
    no answer and no delta shows half of it. Partitions are followed each by itself. Collections
    that are read several times under the same filter and as the same rows are followed once.

    Rows of older versions are migrated before anything is asked of them. One that cannot be, or
    that a newer version wrote, is left out of the answer and logged at ERROR.
    """

    def __init__(self, sites: Sites, question: Question[R]) -> None:
        self.query = build(question)
        self._pipeline = Pipeline(self.query, decoder_of=decoder_of)
        self._arrived: list[RowChange] = []
        self._readers: dict[_Reader[R], None] = {}
        self._is_closed = False
        readers: dict[tuple[Filter, SourceRef[Any]], list[Input]] = {}
        for reader in self._pipeline.inputs:
            readers.setdefault((filter_of(reader), reader.source), []).append(reader)
        self._views = [
            View(
                site.client,
                site.writes,
                wanted,
                partial(self._hear, [one.name for one in inputs], source),
            )
            for (wanted, source), inputs in readers.items()
            for site in sites.sites_of(source.session or "")
        ]

    def __repr__(self) -> str:
        return f"<LiveQuery\n{self.query}>"

    async def __aenter__(self) -> LiveQuery[R]:
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def ready(self) -> None:
        """Wait until the answer is complete."""
        for view in self._views:
            await view.ready()

    @property
    def is_ready(self) -> bool:
        """Whether the answer is complete."""
        return all(view.is_ready for view in self._views)

    @property
    def rows(self) -> list[R]:
        """The answer now, in order.

        Raises:
            NotReadyError: it is not complete yet.
        """
        if not self.is_ready:
            raise NotReadyError("The answer is not complete yet: await live.ready() first.")
        self._take_in()
        return self._pipeline.rows

    @property
    def row(self) -> R | None:
        """The first row of the answer, or None; for `find_one`."""
        return next(iter(self.rows), None)

    def __aiter__(self) -> AsyncIterator[Delta[R]]:
        return self._deltas()

    async def _deltas(self) -> AsyncGenerator[Delta[R], None]:
        await self.ready()
        self._take_in()
        reader: _Reader[R] = _Reader(self._pipeline.enters())
        self._readers[reader] = None
        try:
            while True:
                while (delta := reader.take()) is not None:
                    yield delta
                if self._is_closed:
                    return
                reader.arrived.clear()
                await reader.arrived.wait()
        finally:
            self._readers.pop(reader, None)

    async def aclose(self) -> None:
        """Stop following; every `async for` ends."""
        if self._is_closed:
            return
        self._take_in()
        self._is_closed = True
        for view in self._views:
            view.close()
        for reader in self._readers:
            reader.arrived.set()

    def _hear(
        self, names: Sequence[str], source: SourceRef[Any], events: Sequence[RowEvent]
    ) -> None:
        if not self._arrived:
            # The other views hear of the same commits before the event loop goes on.
            asyncio.get_running_loop().call_soon(self._take_in)
        self._arrived += to_changes(names, source, events)

    def _take_in(self) -> None:
        arrived, self._arrived = self._arrived, []
        if not arrived or self._is_closed:
            return
        deltas = self._pipeline.advance(arrived)
        if deltas:
            for reader in self._readers:
                reader.put(deltas)


class _Reader(Generic[R]):
    """What one `async for` has not read yet, up to a bound."""

    def __init__(self, begin: Sequence[Delta[R]]) -> None:
        self.unread: deque[Delta[R]] = deque(begin)
        self.arrived = asyncio.Event()
        self._is_lost = False
        self._last = 0

    def put(self, deltas: Sequence[Delta[R]]) -> None:
        """Add deltas, or give up if too many wait: the bound keeps the others alive."""
        # What comes together may be more than the bound when nothing else waits.
        if self.unread and len(self.unread) + len(deltas) > MAX_UNREAD_DELTAS:
            self._is_lost = True
            self.unread.clear()
        if not self._is_lost:
            self.unread.extend(deltas)
        self.arrived.set()

    def take(self) -> Delta[R] | None:
        """Return the next delta, None if there is none."""
        if self._is_lost:
            raise SlowConsumerError(
                f"More than {MAX_UNREAD_DELTAS} deltas wait unread; iterate again, which begins "
                f"with the rows as they are.",
                resume=self._last,
            )
        if not self.unread:
            return None
        delta = self.unread.popleft()
        self._last = delta.revision
        return delta


async def run_query(sites: Sites, question: Question[R]) -> list[R] | R | None:
    """Return the answer as it is now, own writes included: a list, or for `find_one` one or None.

    A query that reads several collections sees each partition as one commit left it. Reads of one
    collection in several sessions may see some newer than others.
    """
    query = build(question)
    await sites.connected()
    pipeline = Pipeline(query, decoder_of=decoder_of)
    wanted, *others = pipeline.inputs
    if others:
        async with LiveQuery(sites, query) as live:
            rows = live.rows
    else:
        rows_wanted = filter_of(wanted)
        for site in sites.sites_of(wanted.source.session or ""):
            revision, found = await site.client.read(rows_wanted)
            events = site.writes.show(rows_wanted, found, revision)
            pipeline.advance(to_changes([wanted.name], wanted.source, events))
        rows = pipeline.rows
    return next(iter(rows), None) if query.is_single else rows


def to_changes(
    names: Sequence[str], source: SourceRef[Any], events: Sequence[RowEvent]
) -> list[RowChange]:
    """Return events as a pipeline takes them, for each of the inputs that they are of.

    A row of another version than `source` is migrated; one that cannot be counts as gone.
    """
    try_current = codec_of_source(source).try_current
    changes: list[RowChange] = []
    for session, key, row, is_synced in events:
        value = None if row is None else try_current(row.value, source.name, key)
        fields = None if value is None else _decode(value)
        revision = 0 if row is None else row.revision
        changes += [RowChange(name, (session, key), fields, revision, is_synced) for name in names]
    return changes


def filter_of(wanted: Input) -> Filter:
    """Return what the store needs to know to send no more rows than it must."""
    where: tuple[tuple[str, tuple[str | int | bool, ...]], ...] = ()
    # What the store compares are rows as they are stored, of whichever version.
    if wanted.condition is not None and wanted.source.migrate is None:
        found = equalities(wanted.condition)
        where = tuple((name, tuple(values)) for name, values in sorted(found.items()))
    source = wanted.source
    if source.session is not None and source.session.endswith("*"):
        return Filter(source.name, prefix=source.session[:-1], where=where)
    return Filter(source.name, source.session or "", where=where)


def decoder_of(source: SourceRef[Any]) -> Decode:
    """Return what makes a stored row of a collection what its reader gets."""
    return codec_of_source(source).decode_fields


def codec_of_source(source: SourceRef[Any]) -> RowCodec[Any]:
    """Return the codec of a collection's rows."""
    return codec_of(source.row_type, source.key, source.version, source.migrate)
