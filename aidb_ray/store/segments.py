"""Segments: the files that frames lie in, one after the other, and how they are walked.

A segment begins with a HEAD frame that says where its predecessor ended, so what lies behind
that place is void. It ends with a SEAL frame once it has a successor, so a successor that
vanished is missed. Its file is reserved ahead and reads as zeros where nothing was written. It
has the size that its head names from before it gets its name until its successor is durable, so
a live segment that is shorter was cut.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from aidb_ray.errors import CorruptionError
from aidb_ray.store.files import FileSystem, write_all
from aidb_ray.store.frames import (
    HEADER_SIZE,
    MAGIC,
    MAX_PAYLOAD_BYTES,
    FrameHeader,
    FrameKind,
    decode_header,
    encode_frame,
    end_payload,
    frame_size,
    is_intact,
)

_WINDOW_BYTES: Final = 1 << 20
_HEAD: Final = struct.Struct("<QQQ")
HEAD_BYTES: Final = frame_size(len(end_payload(bytes(_HEAD.size))))
SEAL_BYTES: Final = frame_size(len(end_payload(b"")))


class Position(NamedTuple):
    """Where a frame lies; valid for as long as the frame's chunks are kept."""

    segment: int
    offset: int


class Tail(NamedTuple):
    """The end of a log, and what the next frame has to continue.

    Attributes:
        revision: Last revision before it.
        chain: Chain value of the frame before it.
    """

    segment: int
    offset: int
    revision: int
    chain: int


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """The first frame of a segment.

    Attributes:
        prev_end: Where the segment before ends; 0 for the first one.
        size: How long its file is until it has a successor.
        prev_chain: Chain value of the last frame before this segment.
        next_revision: Revision that its first commit has, or will have.
    """

    number: int
    prev_end: int
    size: int
    prev_chain: int
    next_revision: int
    epoch: int
    chain: int

    @property
    def tail(self) -> Tail:
        """The end of the segment while nothing follows its head."""
        return Tail(self.number, HEAD_BYTES, self.next_revision - 1, self.chain)


def segment_path(directory: Path, number: int) -> Path:
    """Return the path of a segment."""
    return directory / f"seg-{number:016x}.log"


def chunks_path(directory: Path, number: int) -> Path:
    """Return the path of what compaction leaves of a segment."""
    return directory / f"chunks-{number:016x}.log"


def segment_numbers(names: list[str]) -> list[int]:
    """Return the numbers of the segments among file names, ascending."""
    return sorted(
        int(name[4:-4], 16)
        for name in names
        if name.startswith("seg-") and name.endswith(".log") and len(name) == 24
    )


def encode_head(
    number: int, *, prev_end: int, size: int, salt: int, epoch: int, tail: Tail
) -> tuple[bytes, SegmentHead]:
    """Return the first frame of segment `number`, which continues `tail`, and what it says."""
    data, chain = encode_frame(
        FrameKind.HEAD,
        end_payload(_HEAD.pack(number, prev_end, size)),
        salt=salt,
        segment=number,
        offset=0,
        first_revision=tail.revision + 1,
        commits=0,
        rows=0,
        epoch=epoch,
        committed=tail.revision,
        prev_chain=tail.chain,
    )
    return data, SegmentHead(
        number=number,
        prev_end=prev_end,
        size=size,
        prev_chain=tail.chain,
        next_revision=tail.revision + 1,
        epoch=epoch,
        chain=chain,
    )


def encode_seal(successor: SegmentHead, *, salt: int, epoch: int) -> bytes:
    """Return the frame that ends the segment before `successor`."""
    data, _ = encode_frame(
        FrameKind.SEAL,
        end_payload(b""),
        salt=salt,
        segment=successor.number - 1,
        offset=successor.prev_end,
        first_revision=successor.next_revision,
        commits=0,
        rows=0,
        epoch=epoch,
        committed=successor.next_revision - 1,
        prev_chain=successor.prev_chain,
    )
    return data


def create_segment(
    files: FileSystem, directory: Path, number: int, content: bytes, size: int
) -> int:
    """Make segment `number`, durable with its name, and return its descriptor.

    It appears whole, `size` bytes long, or not at all; so it may take the place of one without
    data. It can then be filled without running out of space.
    """
    path = segment_path(directory, number)
    draft = path.with_name(path.name + ".tmp")
    fd = files.open(draft, write=True, create=True)
    try:
        files.allocate(fd, 0, size)
        write_all(files, fd, content, 0)
        files.sync_data(fd)
        files.rename(draft, path)
        _sync_name(files, directory)
    except OSError:
        files.close(fd)
        with suppress(OSError):  # It holds the space that was missing; its name is not ours yet.
            files.unlink(draft)
        raise
    return fd


def _sync_name(files: FileSystem, directory: Path) -> None:
    try:
        files.sync_directory(directory)
    except OSError as error:
        # The name is there already, so not even "disk full" may be undone and tried again.
        raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


class SegmentReader:
    """Reads a segment from front to back through a window, so that small frames cost no call."""

    def __init__(self, files: FileSystem, path: Path, number: int, salt: int) -> None:
        self._files = files
        self._fd = files.open(path)
        self.path = path
        self.number = number
        self.salt = salt
        self.size = files.size(self._fd)
        self._window = b""
        self._view = memoryview(self._window)
        self._start = 0

    def __enter__(self) -> SegmentReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close(self._fd)

    def view(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes at `offset`, fewer at the end of the file."""
        at = offset - self._start
        if at < 0 or at + size > len(self._window):
            self._window = self._files.read(self._fd, max(size, _WINDOW_BYTES), offset)
            self._view = memoryview(self._window)
            self._start, at = offset, 0
        return self._view[at : at + size]

    def header(self, offset: int) -> FrameHeader | None:
        """Return the header at `offset`, or None if there is no valid one."""
        data = self.view(offset, HEADER_SIZE)
        header = decode_header(data, 0, salt=self.salt, segment=self.number, offset=offset)
        if header is None or header.payload_size > MAX_PAYLOAD_BYTES:
            return None
        return header

    def payload(self, offset: int, header: FrameHeader) -> memoryview:
        """Return the payload of the frame at `offset`, unchecked."""
        return self.view(offset + HEADER_SIZE, header.payload_size)

    def data_end(self, start: int) -> int:
        """Return the end of the last byte at or after `start` that is not zero, or `start`."""
        end = start
        for offset, data in self._written(start):
            if content := data.rstrip(b"\0"):
                end = offset + len(content)
        return end

    def find_header(self, start: int) -> tuple[int, FrameHeader] | None:
        """Return the first valid header at or after `start`, and its offset."""
        for offset, data in self._written(start):
            at = data.find(MAGIC)
            while at >= 0:
                if (offset + at) % 8 == 0 and (header := self.header(offset + at)):
                    return offset + at, header
                at = data.find(MAGIC, at + 1)
        return None

    def _written(self, start: int) -> Iterator[tuple[int, bytes]]:
        # Frames begin at multiples of 8, so a window that does too never splits a magic.
        offset = start & ~7
        while offset < self.size:
            found = self._files.next_data(self._fd, offset)
            if found is None:
                return
            offset = max(offset, found & ~7)
            data = self._files.read(self._fd, _WINDOW_BYTES, offset)
            if not data:
                return
            first = max(start - offset, 0)
            yield offset + first, data[first:]
            offset += len(data) & ~7 or len(data)


def read_head(reader: SegmentReader) -> SegmentHead:
    """Read and check the first frame of a segment.

    Raises:
        CorruptionError: it is damaged; a segment only gets its name with a whole head.
    """
    header = reader.header(0)
    if header is not None and header.kind == FrameKind.HEAD:
        payload = reader.payload(0, header)
        if is_intact(payload, header):
            number, prev_end, size = _HEAD.unpack_from(payload)
            if number == reader.number:
                return SegmentHead(
                    number=number,
                    prev_end=prev_end,
                    size=size,
                    prev_chain=header.prev_chain,
                    next_revision=header.first_revision,
                    epoch=header.epoch,
                    chain=header.header_crc,
                )
    raise CorruptionError(
        f"The head of {str(reader.path)!r} is damaged. Nothing was changed.",
        file=str(reader.path),
        offset=0,
    )


class SegmentWalk:
    """Iterates over the data frames of a segment, each with its offset, checking every one.

    Stops at `end`, at a seal, where nothing was written, or at the first frame that is wrong;
    `problem` then says what is wrong with it.

    Attributes:
        tail: What follows the last good frame.
        last: Offset and header of the last good data frame.
        problem: `None`, or what kept the walk from going on.
        broken: The header of the wrong frame, if at least that is right.
        is_sealed: Whether it stopped at a seal.
    """

    def __init__(self, reader: SegmentReader, head: SegmentHead, end: int | None = None) -> None:
        self._reader = reader
        self._end = end
        self._epoch = head.epoch
        self.tail = head.tail
        self.last: tuple[int, FrameHeader] | None = None
        self.problem: str | None = None
        self.broken: FrameHeader | None = None
        self.is_sealed = False

    def __iter__(self) -> Iterator[tuple[int, FrameHeader, memoryview]]:
        reader, number = self._reader, self._reader.number
        _, offset, revision, chain = self.tail
        while self._end is None or offset < self._end:
            header = reader.header(offset)
            if header is None:
                # At the end of a live segment there are only zeros; that is for others to judge.
                self.problem = "its header is damaged"
                return
            if not _continues(header, revision, chain):
                self.problem = "it does not continue the frame before it"
                return
            if header.epoch < self._epoch:
                self.problem = "it comes from an older epoch than the frame before it"
                return
            payload = reader.payload(offset, header)
            if not is_intact(payload, header):
                self.problem = "its payload is damaged"
                self.broken = header
                return
            if header.kind == FrameKind.SEAL:
                self.is_sealed = True
                return
            if header.kind != FrameKind.DATA:
                self.problem = f"frame kind {header.kind} does not belong there"
                return
            at = offset
            offset += frame_size(header.payload_size)
            revision += header.commits
            chain = header.header_crc
            self._epoch = header.epoch
            self.last = at, header
            self.tail = Tail(number, offset, revision, chain)
            yield at, header, payload


def _continues(header: FrameHeader, revision: int, chain: int) -> bool:
    """Return whether a frame was written after the one that ended with `revision` and `chain`."""
    return header.prev_chain == chain and header.first_revision == revision + 1
