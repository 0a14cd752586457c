"""The chunks of a session, and of a generation as a table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aidb_ray.chunks.buffer import FIRST_OWN_CODE, TYPE_NAMES
from aidb_ray.store.changes import ChunkSlice

if TYPE_CHECKING:
    import pyarrow as pa

    from aidb_ray.store.collection import Site, Sites


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
    filler = [""] * (FIRST_OWN_CODE - len(TYPE_NAMES))
    names = arrow.array([*TYPE_NAMES, *filler, *own] if own else list(TYPE_NAMES))
    ids = arrow.array([generation_id])
    for part in slices:
        count = len(part.columns.types)
        codes = part.columns.types
        if part.types and list(part.types) != own[: len(part.types)]:
            codes = bytes(
                FIRST_OWN_CODE + own.index(part.types[c - FIRST_OWN_CODE])
                if c >= FIRST_OWN_CODE
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
