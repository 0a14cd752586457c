"""Chunks at rest: read by position, and kept when compaction drops a segment's rows.

A position stays valid. What compaction leaves of a segment is a file of its chunks, each frame
under its old position; it begins with a HEAD frame that lists where each lay and lies now. Chunks
that no stream refers to are erased from their frame, whose other chunks keep their places in it.
"""

# The stubs of pyarrow leave parts of many overloads unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Final, TypeAlias

import pyarrow as pa

from aidb_ray.errors import CorruptionError
from aidb_ray.store.columns import erase, from_arrow, to_arrow
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
from aidb_ray.store.streams import Span

_INDEX: Final = struct.Struct("<QQ")  # Number of frames, size of the file.
_ENTRY: Final = struct.Struct("<QQ")  # Offset in the segment, offset in this file.
_NO_CHAIN: Final = 0
_CACHE_BYTES: Final = 16 << 20
_CACHED_INDEXES: Final = 8
_FIRST_READ_BYTES: Final = 16 << 10
_NO_CHUNKS: Final = pa.RecordBatch.from_pylist([], schema=CHUNK_SCHEMA)


Erased: TypeAlias = Mapping[int, Sequence[Span]]
"""By the offset of a frame in its segment, its chunks that are not kept."""

_ChunkFrame: TypeAlias = tuple[int, FrameHeader, pa.Buffer]
"""(offset in the segment, header, serialized chunks)"""


def keep_chunks(
    files: FileSystem,
    directory: Path,
    reader: SegmentReader,
    head: SegmentHead,
    end: int,
    erased: Erased,
) -> int:
    """Write the chunks of a segment to a file of their own; durable when it returns.

    Returns how many frames have chunks that are kept; with none there is no file. Holds one frame
    in memory.

    Raises:
        CorruptionError: a frame is damaged. No file was made.
    """

    def frames() -> Iterator[_ChunkFrame]:
        return _without(_frames_of_segment(reader, head, end), erased)

    return _write(files, directory, reader.number, reader.salt, frames)


def erase_chunks(
    files: FileSystem, directory: Path, number: int, salt: int, erased: Erased
) -> None:
    """Write the file of a compacted segment's chunks anew without some; none is left if all go.

    The old file stays until the new one is durable. Does nothing if there is no file.

    Raises:
        CorruptionError: a frame, or the index, is damaged. The old file was left alone.
    """
    path = chunks_path(directory, number)
    try:
        fd = files.open(path)
    except FileNotFoundError:
        return
    try:
        index = _ChunkIndex(files, directory, number, salt)

        def frames() -> Iterator[_ChunkFrame]:
            return _without(_frames_of_file(files, fd, path, number, salt, index), erased)

        kept = _write(files, directory, number, salt, frames)
    finally:
        files.close(fd)
    if not kept:
        files.unlink(path)
        files.sync_directory(directory)


def _write(
    files: FileSystem,
    directory: Path,
    number: int,
    salt: int,
    frames: Callable[[], Iterator[_ChunkFrame]],
) -> int:
    """Write a file of the chunks that `frames` gives, twice the same, and return how many."""
    sizes = [
        (offset, frame_size(joined_size(0, chunks.size)), header)
        for offset, header, chunks in frames()
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
        salt=_chunk_salt(salt),
        segment=number,
        offset=0,
        first_revision=first.first_revision,
        commits=last.next_revision - first.first_revision,
        rows=0,
        epoch=last.epoch,
        committed=last.committed,
        prev_chain=_NO_CHAIN,
    )
    path = chunks_path(directory, number)
    draft = path.with_name(path.name + ".tmp")
    fd = files.open(draft, write=True, create=True)
    try:
        write_all(files, fd, index, 0)
        for at, frame in zip(places, frames(), strict=False):
            write_all(files, fd, _encode_chunks(salt, number, at, *frame), at)
        files.sync_data(fd)
    except (OSError, CorruptionError):
        with suppress(OSError):
            files.unlink(draft)
        raise
    finally:
        files.close(fd)
    files.rename(draft, path)
    files.sync_directory(directory)
    return len(sizes)


def _frames_of_segment(reader: SegmentReader, head: SegmentHead, end: int) -> Iterator[_ChunkFrame]:
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


def _frames_of_file(
    files: FileSystem, fd: int, path: Path, number: int, salt: int, index: _ChunkIndex
) -> Iterator[_ChunkFrame]:
    for offset, lies_at in index.entries():
        header, payload = _read_frame(files, fd, path, Position(number, offset), lies_at, salt)
        yield offset, header, split_payload(payload)[1]


def _without(frames: Iterator[_ChunkFrame], erased: Erased) -> Iterator[_ChunkFrame]:
    """Yield frames as they are without what is erased; those that are empty then not at all."""
    for offset, header, chunks in frames:
        spans = erased.get(offset)
        if not spans:
            yield offset, header, chunks
            continue
        batch = decode_chunks(chunks)
        assert batch is not None
        kept = erase(from_arrow(batch), [(span.start, span.count) for span in spans])
        if kept is not None:
            yield offset, header, to_arrow([kept]).serialize()


def _encode_chunks(
    salt: int, number: int, lies_at: int, offset: int, header: FrameHeader, chunks: pa.Buffer
) -> bytes:
    frame, _ = encode_frame(
        FrameKind.CHUNKS,
        join_payload(b"", chunks),
        salt=salt,
        segment=number,
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


def _read_frame(
    files: FileSystem, fd: int, path: Path, position: Position, lies_at: int, salt: int
) -> tuple[FrameHeader, memoryview]:
    """Return header and payload of the frame that lies at `lies_at`, checked."""
    data = files.read(fd, _FIRST_READ_BYTES, lies_at)
    header = decode_header(data, 0, salt=salt, segment=position.segment, offset=position.offset)
    if header is not None:
        missing = HEADER_SIZE + header.payload_size - len(data)
        if missing > 0:
            data += files.read(fd, missing, lies_at + len(data))
        payload = memoryview(data)[HEADER_SIZE : HEADER_SIZE + header.payload_size]
        if is_intact(payload, header):
            return header, payload
    raise CorruptionError(
        f"{str(path)!r} is damaged at byte {lies_at}. The chunks were not served.",
        file=str(path),
        offset=lies_at,
        first_revision=header.first_revision if header else 0,
        last_revision=header.next_revision - 1 if header else 0,
    )


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

    def entries(self) -> Iterator[tuple[int, int]]:
        """Yield where each frame lay in the segment, and where it lies now."""
        return zip(self._offsets, self._places, strict=True)

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

    def forget(self, number: int) -> None:
        """Forget what was read of a compacted segment: its file is another one."""
        with self._mutex:
            self._indexes.pop(number, None)
            for position in [known for known in self._batches if known.segment == number]:
                self._held -= self._batches.pop(position).nbytes

    def _load(self, position: Position) -> pa.RecordBatch:
        number, offset = position
        path = segment_path(self._directory, number)
        try:
            return self._read_frame(path, position, offset)
        except FileNotFoundError:
            path = chunks_path(self._directory, number)
        with suppress(FileNotFoundError):
            lies_at = self._index(number).find(offset)
            try:
                if lies_at is not None:
                    return self._read_frame(path, position, lies_at)
            except CorruptionError:
                # Another file may have taken its place since the index was read.
                self.forget(number)
                moved_to = self._index(number).find(offset)
                if moved_to is None or moved_to == lies_at:
                    raise
                return self._read_frame(path, position, moved_to)
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
            _, payload = _read_frame(self._files, fd, path, position, lies_at, self._salt)
        finally:
            self._files.close(fd)
        chunks = decode_chunks(split_payload(payload)[1])
        return _NO_CHUNKS if chunks is None else chunks


def _chunk_salt(salt: int) -> int:
    # A file of chunks must never pass for the segment of the same number.
    return salt ^ 0xFFFFFFFF
