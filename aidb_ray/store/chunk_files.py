"""Chunks at rest: read by position, and kept when compaction drops a segment's rows.

A position stays valid. What compaction leaves of a segment is a file of its chunks, each frame
under its old position; it begins with a HEAD frame that lists where each lay and lies now.
"""

# The stubs of pyarrow leave parts of many overloads unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Final

import pyarrow as pa

from aidb_ray.errors import CorruptionError
from aidb_ray.store.files import FileSystem, write_all
from aidb_ray.store.frames import (
    CHUNK_SCHEMA,
    HEADER_SIZE,
    FrameHeader,
    FrameKind,
    decode_chunks,
    decode_header,
    encode_frame,
    end_payload,
    frame_size,
    is_intact,
    join_payload,
    joined_size,
    split_payload,
)
from aidb_ray.store.segments import (
    Position,
    SegmentHead,
    SegmentReader,
    SegmentWalk,
    chunks_path,
    segment_path,
)

_INDEX: Final = struct.Struct("<QQ")  # Number of frames, size of the file.
_ENTRY: Final = struct.Struct("<QQ")  # Offset in the segment, offset in this file.
_NO_CHAIN: Final = 0
_CACHE_BYTES: Final = 16 << 20
_CACHED_INDEXES: Final = 8
_FIRST_READ_BYTES: Final = 16 << 10
_NO_CHUNKS: Final = pa.RecordBatch.from_pylist([], schema=CHUNK_SCHEMA)


def keep_chunks(
    files: FileSystem, directory: Path, reader: SegmentReader, head: SegmentHead, end: int
) -> int:
    """Write the chunks of a segment to a file of their own; durable when it returns.

    Returns how many frames have chunks; with none there is no file. Holds one frame in memory.

    Raises:
        CorruptionError: a frame is damaged. No file was made.
    """
    sizes = [
        (offset, frame_size(joined_size(0, chunks.size)), header)
        for offset, header, chunks in _chunk_frames(reader, head, end)
    ]
    if not sizes:
        return 0
    index_size = frame_size(len(end_payload(bytes(_INDEX.size + _ENTRY.size * len(sizes)))))
    places = list(accumulate((size for _, size, _ in sizes), initial=index_size))
    first, last = sizes[0][2], sizes[-1][2]
    index, _ = encode_frame(
        FrameKind.HEAD,
        end_payload(
            _INDEX.pack(len(sizes), places[-1])
            + b"".join(_ENTRY.pack(line[0], at) for line, at in zip(sizes, places, strict=False))
        ),
        salt=_chunk_salt(reader.salt),
        segment=reader.number,
        offset=0,
        first_revision=first.first_revision,
        commits=last.next_revision - first.first_revision,
        rows=0,
        epoch=last.epoch,
        committed=last.committed,
        prev_chain=_NO_CHAIN,
    )
    path = chunks_path(directory, reader.number)
    draft = path.with_name(path.name + ".tmp")
    fd = files.open(draft, write=True, create=True)
    try:
        write_all(files, fd, index, 0)
        for at, frame in zip(places, _chunk_frames(reader, head, end), strict=False):
            write_all(files, fd, _encode_chunks(reader, at, *frame), at)
        files.sync_data(fd)
    except OSError:
        with suppress(OSError):
            files.unlink(draft)
        raise
    finally:
        files.close(fd)
    files.rename(draft, path)
    files.sync_directory(directory)
    return len(sizes)


def _chunk_frames(
    reader: SegmentReader, head: SegmentHead, end: int
) -> Iterator[tuple[int, FrameHeader, pa.Buffer]]:
    walk = SegmentWalk(reader, head, end)
    for offset, header, payload in walk:
        chunks = split_payload(payload)[1]
        if chunks.size:
            yield offset, header, chunks
    if walk.tail.offset != end:
        raise CorruptionError(
            f"{str(reader.path)!r} is damaged at byte {walk.tail.offset}: {walk.problem}. It was "
            f"not compacted.",
            file=str(reader.path),
            offset=walk.tail.offset,
            first_revision=walk.tail.revision + 1,
        )


def _encode_chunks(
    reader: SegmentReader, lies_at: int, offset: int, header: FrameHeader, chunks: pa.Buffer
) -> bytes:
    frame, _ = encode_frame(
        FrameKind.CHUNKS,
        join_payload(b"", chunks),
        salt=reader.salt,
        segment=reader.number,
        offset=offset,
        first_revision=header.first_revision,
        commits=header.commits,
        rows=0,
        epoch=header.epoch,
        committed=header.committed,
        prev_chain=_NO_CHAIN,
        lies_at=lies_at,
    )
    return frame


class _ChunkIndex:
    """Where the frames of a compacted segment lie in its file of chunks."""

    def __init__(self, files: FileSystem, directory: Path, number: int, salt: int) -> None:
        """Read the index; raises CorruptionError if it is damaged."""
        path = chunks_path(directory, number)
        fd = files.open(path)
        try:
            data = files.read(fd, HEADER_SIZE, 0)
            header = decode_header(data, 0, salt=_chunk_salt(salt), segment=number, offset=0)
            payload = b""
            if header is not None:
                payload = files.read(fd, header.payload_size, HEADER_SIZE)
        finally:
            files.close(fd)
        if header is None or not is_intact(payload, header):
            raise CorruptionError(
                f"The index of {str(path)!r} is damaged.", file=str(path), offset=0
            )
        count, _ = _INDEX.unpack_from(payload)
        end = _INDEX.size + count * _ENTRY.size
        entries = list(_ENTRY.iter_unpack(payload[_INDEX.size : end]))
        self._offsets = [entry[0] for entry in entries]
        self._places = [entry[1] for entry in entries]

    def find(self, offset: int) -> int | None:
        """Return where the frame that lay at `offset` lies now."""
        at = bisect_left(self._offsets, offset)
        if at < len(self._offsets) and self._offsets[at] == offset:
            return self._places[at]
        return None


class ChunkReader:
    """Reads the chunks of a frame, wherever compaction has put them. May be used by any thread.

    Keeps the batches read last, up to 16 MiB. What comes from disk is checked every time.
    """

    def __init__(self, files: FileSystem, directory: Path, salt: int) -> None:
        self._files = files
        self._directory = directory
        self._salt = salt
        self._mutex = Lock()
        self._batches: OrderedDict[Position, pa.RecordBatch] = OrderedDict()
        self._held = 0
        self._indexes: OrderedDict[int, _ChunkIndex] = OrderedDict()

    def read(self, position: Position) -> pa.RecordBatch:
        """Return all chunks of the frame at `position`; see `CommitLog.read_chunks`."""
        with self._mutex:
            batch = self._batches.get(position)
            if batch is not None:
                self._batches.move_to_end(position)
                return batch
        batch = self._load(position)
        with self._mutex:
            if position not in self._batches:
                self._batches[position] = batch
                self._held += batch.nbytes
                while self._held > _CACHE_BYTES and len(self._batches) > 1:
                    self._held -= self._batches.popitem(last=False)[1].nbytes
        return batch

    def _load(self, position: Position) -> pa.RecordBatch:
        number, offset = position
        path = segment_path(self._directory, number)
        try:
            return self._read_frame(path, position, offset)
        except FileNotFoundError:
            path = chunks_path(self._directory, number)
        try:
            lies_at = self._index(number).find(offset)
            if lies_at is not None:
                return self._read_frame(path, position, lies_at)
        except FileNotFoundError:
            pass
        raise CorruptionError(
            f"The chunks at byte {offset} of segment {number} are missing from {str(path)!r}.",
            file=str(path),
            offset=offset,
        )

    def _index(self, number: int) -> _ChunkIndex:
        with self._mutex:
            index = self._indexes.get(number)
        if index is None:
            index = _ChunkIndex(self._files, self._directory, number, self._salt)
            with self._mutex:
                self._indexes[number] = index
                while len(self._indexes) > _CACHED_INDEXES:
                    self._indexes.popitem(last=False)
        return index

    def _read_frame(self, path: Path, position: Position, lies_at: int) -> pa.RecordBatch:
        fd = self._files.open(path)
        try:
            data = self._files.read(fd, _FIRST_READ_BYTES, lies_at)
            header = decode_header(
                data, 0, salt=self._salt, segment=position.segment, offset=position.offset
            )
            if header is not None:
                missing = HEADER_SIZE + header.payload_size - len(data)
                if missing > 0:
                    data += self._files.read(fd, missing, lies_at + len(data))
                payload = memoryview(data)[HEADER_SIZE : HEADER_SIZE + header.payload_size]
                if is_intact(payload, header):
                    chunks = decode_chunks(split_payload(payload)[1])
                    return _NO_CHUNKS if chunks is None else chunks
        finally:
            self._files.close(fd)
        raise CorruptionError(
            f"{str(path)!r} is damaged at byte {lies_at}. The chunks were not served.",
            file=str(path),
            offset=lies_at,
            first_revision=header.first_revision if header else 0,
            last_revision=header.next_revision - 1 if header else 0,
        )


def _chunk_salt(salt: int) -> int:
    # A file of chunks must never pass for the segment of the same number.
    return salt ^ 0xFFFFFFFF
