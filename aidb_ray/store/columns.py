"""Chunk columns: cut and join them as buffers, or as Arrow without copying a chunk.

Chunks travel and rest as two columns (type code, payload). Nothing here makes an object a chunk.
"""

# The stubs of pyarrow leave parts of many overloads unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from aidb_ray.store.changes import ChunkColumns

if TYPE_CHECKING:
    import pyarrow as pa

# The buffers are little endian, as Arrow's are; so is every machine that Ray runs on.
assert sys.byteorder == "little"

EMPTY = ChunkColumns(b"", b"", b"")
ERASED = 199
"""Code of a chunk of which only the place is left. No chunk type has it."""


def chunk_count(columns: ChunkColumns) -> int:
    """Return how many chunks the columns hold."""
    return len(columns.types)


def is_consistent(columns: ChunkColumns) -> bool:
    """Whether the three buffers fit together, so that cutting them cannot read outside."""
    if len(columns.ends) != 4 * len(columns.types):
        return False
    previous = 0
    for end in memoryview(columns.ends).cast("i"):
        if end < previous:
            return False
        previous = end
    return previous == len(columns.payload)


def cut(columns: ChunkColumns, start: int, count: int) -> ChunkColumns:
    """Return chunks `start` to `start + count` as columns of their own."""
    if start == 0 and count == len(columns.types):
        return columns
    ends = memoryview(columns.ends).cast("i")
    begin = ends[start - 1] if start else 0
    stop = ends[start + count - 1] if count else begin
    moved = array("i", [end - begin for end in ends[start : start + count]])
    return ChunkColumns(
        columns.types[start : start + count], moved.tobytes(), columns.payload[begin:stop]
    )


def erase(columns: ChunkColumns, spans: Iterable[tuple[int, int]]) -> ChunkColumns | None:
    """Return columns without the chunks of `spans` (start, count), whose places stay.

    None if no chunk is left.
    """
    types = bytearray(columns.types)
    for start, count in spans:
        assert 0 <= start <= start + count <= len(types), (start, count, len(types))
        types[start : start + count] = bytes([ERASED]) * count
    if types.count(ERASED) == len(types):
        return None
    ends = array("i")
    kept: list[bytes] = []
    size = begin = 0
    for code, end in zip(types, memoryview(columns.ends).cast("i"), strict=True):
        if code != ERASED:
            kept.append(columns.payload[begin:end])
            size += end - begin
        ends.append(size)
        begin = end
    return ChunkColumns(bytes(types), ends.tobytes(), b"".join(kept))


def pack(types: Sequence[int], payloads: Sequence[str]) -> ChunkColumns:
    """Return columns of shape [len(types)] from type codes and payload texts."""
    encoded = [payload.encode() for payload in payloads]
    ends = array("i")
    end = 0
    for payload in encoded:
        end += len(payload)
        ends.append(end)
    return ChunkColumns(bytes(types), ends.tobytes(), b"".join(encoded))


def unpack(columns: ChunkColumns) -> tuple[bytes, list[str]]:
    """Return type codes and payload texts."""
    payload = columns.payload
    texts: list[str] = []
    begin = 0
    for end in memoryview(columns.ends).cast("i"):
        texts.append(payload[begin:end].decode())
        begin = end
    return columns.types, texts


def to_arrow(parts: Sequence[ChunkColumns]) -> pa.RecordBatch:
    """Join columns into one record batch of shape [sum of chunks, 2]; copies bytes, no chunks."""
    import pyarrow as pa

    from aidb_ray.store.frames import CHUNK_SCHEMA

    types: list[pa.Array[Any]] = []
    payloads: list[pa.Array[Any]] = []
    for part in parts:
        count = len(part.types)
        types.append(
            pa.UInt8Array.from_buffers(pa.uint8(), count, [None, pa.py_buffer(part.types)])
        )
        offsets = pa.py_buffer(b"\0\0\0\0" + part.ends)
        payloads.append(pa.StringArray.from_buffers(count, offsets, pa.py_buffer(part.payload)))
    if len(parts) == 1:
        return pa.record_batch([types[0], payloads[0]], schema=CHUNK_SCHEMA)
    return pa.record_batch(
        [pa.concat_arrays(types), pa.concat_arrays(payloads)], schema=CHUNK_SCHEMA
    )


def from_arrow(batch: pa.RecordBatch) -> ChunkColumns:
    """Return the columns of a record batch, or of a slice of one."""
    count = batch.num_rows
    if count == 0:
        return EMPTY
    types = cast("pa.Array[Any]", batch.column(0))
    payload = cast("pa.Array[Any]", batch.column(1))
    codes = types.buffers()[1]
    offsets, data = payload.buffers()[1:]
    assert codes is not None
    assert offsets is not None
    first = payload.offset
    ends = memoryview(offsets).cast("b").cast("i")[first : first + count + 1]
    begin, stop = ends[0], ends[count]
    moved = (
        ends[1:].tobytes() if begin == 0 else array("i", [e - begin for e in ends[1:]]).tobytes()
    )
    text = b"" if data is None else bytes(memoryview(data)[begin:stop])
    return ChunkColumns(bytes(memoryview(codes)[types.offset : types.offset + count]), moved, text)
