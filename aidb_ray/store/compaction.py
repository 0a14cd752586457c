"""Compaction: what remains of a segment once snapshots stand for its rows.

Rows go, chunks stay, each frame under its old position. A file of chunks begins with a HEAD frame
that lists where each frame lay and where it lies now.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Final

import pyarrow as pa

from aidb_ray.errors import CorruptionError
from aidb_ray.store.files import FileSystem, write_all
from aidb_ray.store.frames import (
    HEADER_SIZE,
    FrameHeader,
    FrameKind,
    decode_header,
    encode_frame,
    end_payload,
    frame_size,
    is_intact,
    join_payload,
    joined_size,
    split_payload,
)
from aidb_ray.store.segments import SegmentHead, SegmentReader, SegmentWalk, chunks_path

_INDEX: Final = struct.Struct("<QQ")  # Number of frames, size of the file.
_ENTRY: Final = struct.Struct("<QQ")  # Offset in the segment, offset in this file.
_NO_CHAIN: Final = 0


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


class ChunkIndex:
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


def _chunk_salt(salt: int) -> int:
    # A file of chunks must never pass for the segment of the same number.
    return salt ^ 0xFFFFFFFF
