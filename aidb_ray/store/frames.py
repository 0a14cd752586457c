"""Frames: what one flush puts into the log, and its bytes. No I/O, no clock.

A frame is a header of 64 bytes and a payload. The header carries its own checksum, so a length
is never believed before it was checked; the checksum starts from the store, the segment and the
offset, so a frame in a wrong place is as wrong as a damaged one; and it covers the checksum of
the frame before, so a frame that vanished, moved or came back is seen by its successor. The
payload holds Arrow batches and is never parsed before its checksum was verified: Arrow has none.
"""

# The stubs of pyarrow leave parts of many overloads unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc

# The stubs have no place for a plain value.
_compute: Any = pc

FORMAT_VERSION = 1
MAGIC = b"aiFR"
HEADER_SIZE = 64
SECTOR = 512  # The unit in which disks write all or nothing.
MAX_PAYLOAD_BYTES = 256 << 20

CHUNK_SCHEMA = pa.schema([("type", pa.uint8()), ("payload", pa.utf8())])
ROW_SCHEMA = pa.schema(
    [
        ("revision", pa.int64()),
        ("op", pa.uint8()),
        ("session", pa.utf8()),
        ("collection", pa.utf8()),
        ("key", pa.utf8()),
        ("value", pa.binary()),
    ]
)

_CHECKED = struct.Struct("<4sBBHIIQQQIIII")  # All that the header's checksum covers.
_HEADER = struct.Struct("<4sBBHIIQQQIIIII4s")
_PLACE = struct.Struct("<QQ")
_LENGTHS = struct.Struct("<II")
# A write that was cut short leaves zeros behind, so what must come last is not zero.
_HEADER_END = b"head"
_PAYLOAD_END = b"\r\nframe\n"
_ZERO_SECTOR = bytes(SECTOR)


@dataclass(frozen=True, slots=True)
class Rows:
    """Columns of equal length, one entry per mutation or system row, in the order to apply."""

    revisions: list[int]
    ops: list[int]
    sessions: list[str]
    collections: list[str]
    keys: list[str]
    values: list[bytes | None]


@dataclass(frozen=True, slots=True)
class Frame:
    """What one flush makes durable, all of it or nothing.

    Attributes:
        first_revision: Revision of the first commit; the next one to come if there is none.
        commits: How many commits, so revisions `first_revision` up to but not including
            `first_revision + commits`. 0 when only system rows are carried.
        rows: The mutations of all commits, and system rows.
        chunks: Stream chunks of the flush, of `CHUNK_SCHEMA`; rows point into it.
    """

    first_revision: int
    commits: int
    rows: Rows
    chunks: pa.RecordBatch | None = None


class FrameKind(IntEnum):
    """What a frame is for."""

    HEAD = 1  # Begins a segment and says where the one before ended.
    DATA = 2
    SEAL = 3  # Ends a segment: there is a next one.
    CHUNKS = 4  # A frame of a compacted segment: its chunks, at its old place.


class FrameHeader(NamedTuple):
    """The fixed fields of a frame.

    Attributes:
        first_revision: See `Frame`.
        epoch: Which opening of the store wrote it.
        committed: Last revision known to be durable when it was written.
        zero_sectors: How many sectors of the payload are all zeros by right.
        prev_chain: `header_crc` of the frame before.
    """

    magic: bytes
    version: int
    kind: int
    header_size: int
    payload_size: int
    commits: int
    first_revision: int
    epoch: int
    committed: int
    zero_sectors: int
    prev_chain: int
    payload_crc: int
    rows: int
    header_crc: int
    end: bytes

    @property
    def next_revision(self) -> int:
        """Revision that the frame after this one begins with."""
        return self.first_revision + self.commits


def frame_size(payload_size: int) -> int:
    """Return how many bytes a frame with such a payload takes; frames lie on multiples of 8."""
    return (HEADER_SIZE + payload_size + 7) & ~7


def place_seed(salt: int, segment: int, offset: int) -> int:
    """Return the value that the header's checksum starts from, for a frame at this place."""
    return zlib.crc32(_PLACE.pack(segment, offset), salt)


def encode_frame(
    kind: FrameKind,
    payload: bytes,
    *,
    salt: int,
    segment: int,
    offset: int,
    first_revision: int,
    commits: int,
    rows: int,
    epoch: int,
    committed: int,
    prev_chain: int,
    lies_at: int | None = None,
) -> tuple[bytes, int]:
    """Return the bytes of a frame and its chain value, valid in one place only.

    The place is `offset` in `segment`; a compacted frame keeps it and `lies_at` another.
    """
    where = (offset if lies_at is None else lies_at) + HEADER_SIZE
    checked = _CHECKED.pack(
        MAGIC,
        FORMAT_VERSION,
        kind,
        HEADER_SIZE,
        len(payload),
        commits,
        first_revision,
        epoch,
        committed,
        count_zero_sectors(payload, where),
        prev_chain,
        zlib.crc32(payload),
        rows,
    )
    chain = zlib.crc32(checked, place_seed(salt, segment, offset))
    padding = bytes(-len(payload) % 8)
    return b"".join((checked, struct.pack("<I", chain), _HEADER_END, payload, padding)), chain


def decode_header(
    data: bytes | memoryview, at: int, *, salt: int, segment: int, offset: int
) -> FrameHeader | None:
    """Return the header at index `at` of `data`, or None if it is not one for this place."""
    if len(data) - at < HEADER_SIZE:
        return None
    header = FrameHeader._make(_HEADER.unpack_from(data, at))
    if header.magic != MAGIC or header.end != _HEADER_END:
        return None
    if header.header_crc != zlib.crc32(
        data[at : at + _CHECKED.size], place_seed(salt, segment, offset)
    ):
        return None
    return header


def is_intact(payload: bytes | memoryview, header: FrameHeader) -> bool:
    """Return whether the payload is the one that the header was written for."""
    return len(payload) == header.payload_size and zlib.crc32(payload) == header.payload_crc


def count_zero_sectors(payload: bytes | memoryview, offset: int) -> int:
    """Count the disk sectors under a payload at file offset `offset` that hold only zeros.

    A sector that the payload only partly covers counts by its covered part.
    """
    data = bytes(payload)
    first = min(-offset % SECTOR, len(data))
    count = int(first > 0 and data.count(0, 0, first) == first)
    last = first + (len(data) - first) // SECTOR * SECTOR
    if last < len(data):
        count += data.count(0, last) == len(data) - last
    if data.find(_ZERO_SECTOR, first, last) >= 0:
        count += sum(data.startswith(_ZERO_SECTOR, at) for at in range(first, last, SECTOR))
    return count


def is_torn_header(data: bytes | memoryview, offset: int) -> bool:
    """Return whether these 64 bytes look like a header that a crash kept from being written.

    Either its last byte never arrived, or the disk took one of the two sectors it lies across
    and not the other. Flipped bits look like neither.
    """
    header = bytes(data[:HEADER_SIZE]).ljust(HEADER_SIZE, b"\0")
    split = -offset % SECTOR
    parts = (header[:split], header[split:]) if 0 < split < HEADER_SIZE else (header,)
    return header[-1] == 0 or any(not part.strip(b"\0") for part in parts)


def is_torn_payload(data: bytes | memoryview, offset: int, header: FrameHeader) -> bool:
    """Return whether a payload that fails its checksum looks cut short rather than damaged.

    Either its end never arrived, or more of its sectors are all zeros than were when it was
    written: the disk had not taken them yet.
    """
    payload = bytes(data[: header.payload_size]).ljust(header.payload_size, b"\0")
    return payload[-1] == 0 or count_zero_sectors(payload, offset) > header.zero_sectors


def encode_payload(frame: Frame) -> bytes:
    """Return the payload of a data frame.

    Raises:
        ValueError: it has more than 256 MiB, or chunks of another schema.
    """
    rows = frame.rows
    arrays = [
        pa.array(rows.revisions, pa.int64()),
        pa.array(rows.ops, pa.uint8()),
        pa.array(rows.sessions, pa.utf8()),
        pa.array(rows.collections, pa.utf8()),
        pa.array(rows.keys, pa.utf8()),
        pa.array(rows.values, pa.binary()),
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA).serialize()
    chunks: bytes | pa.Buffer = b""
    if frame.chunks is not None:
        if frame.chunks.schema != CHUNK_SCHEMA:
            raise ValueError(f"chunks must have the schema {CHUNK_SCHEMA}")
        chunks = frame.chunks.serialize()
    if joined_size(len(batch), len(chunks)) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame of {len(batch) + len(chunks)} bytes is too large")
    return join_payload(batch, chunks)


def joined_size(rows: int, chunks: int) -> int:
    """Return the size of a payload of two serialized batches of these sizes."""
    return _LENGTHS.size + rows + chunks + len(_PAYLOAD_END)


def join_payload(rows: bytes | pa.Buffer, chunks: bytes | pa.Buffer) -> bytes:
    """Return a payload of two serialized batches, either of which may be empty."""
    return b"".join((_LENGTHS.pack(len(rows), len(chunks)), rows, chunks, _PAYLOAD_END))


def split_payload(payload: bytes | memoryview) -> tuple[pa.Buffer, pa.Buffer]:
    """Return the serialized rows and chunks of a payload, without copying."""
    rows, chunks = _LENGTHS.unpack_from(payload)
    buffer = pa.py_buffer(payload)
    return buffer.slice(_LENGTHS.size, rows), buffer.slice(_LENGTHS.size + rows, chunks)


def end_payload(content: bytes) -> bytes:
    """Return the payload of a frame that is not data: `content` and the mark of its end."""
    return content + _PAYLOAD_END


def decode_rows(batches: Sequence[pa.Buffer], *, session: str | None = None) -> list[Rows]:
    """Decode the rows of several frames together; per frame this is several times cheaper.

    With a `session` only its rows, and no Python objects for others.
    """
    read = [pa.ipc.read_record_batch(batch, ROW_SCHEMA) for batch in batches]
    if session is not None:
        read = [batch.filter(_compute.equal(batch.column(2), session)) for batch in read]
    table = pa.Table.from_batches(read, ROW_SCHEMA)
    revisions, ops, sessions, collections, keys, values = (
        cast("list[object]", column.to_pylist()) for column in table.itercolumns()
    )
    decoded: list[Rows] = []
    start = 0
    for batch in read:
        part = slice(start, start := start + batch.num_rows)
        decoded.append(
            Rows(
                cast("list[int]", revisions[part]),
                cast("list[int]", ops[part]),
                cast("list[str]", sessions[part]),
                cast("list[str]", collections[part]),
                cast("list[str]", keys[part]),
                cast("list[bytes | None]", values[part]),
            )
        )
    return decoded


def decode_chunks(batch: pa.Buffer) -> pa.RecordBatch | None:
    """Return the chunks of a frame, without copying, or None if it has none."""
    return pa.ipc.read_record_batch(batch, CHUNK_SCHEMA) if batch.size else None
