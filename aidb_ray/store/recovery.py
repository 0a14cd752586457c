"""Recovery: what of a log may be believed when it is opened. Reads only; decides, changes nothing.

The rule: damage is never taken for "was not written". The end of the log is cut only where it
looks as a crash leaves the last write: zeros stand where bytes of it should be, nothing follows,
and the file is as long as it was made. A shorter file was cut by something else.

The limit: zeros that something else wrote over the last frames, up to the end of the file, or
over a sector of the last one, read as never written: a crash leaves the same bytes, and no second
sync per commit is spent on telling them apart. They are found if they begin before what is known
to be durable from elsewhere: the end of the segment before, the newest snapshot, and META, which
notes it at each opening and each clean closing. After that they lose the frames that they touch.
The cut is logged if something of the first of these is left; at a frame's boundary nothing is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from aidb_ray.errors import CorruptionError
from aidb_ray.store.files import FileSystem
from aidb_ray.store.frames import (
    HEADER_SIZE,
    FrameHeader,
    FrameKind,
    frame_size,
    is_intact,
    is_torn_header,
    is_torn_payload,
)
from aidb_ray.store.segments import (
    Position,
    SegmentHead,
    SegmentReader,
    SegmentWalk,
    Tail,
    read_head,
    segment_numbers,
    segment_path,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a log holds.

    Attributes:
        heads: All segments, oldest first.
        tail: Where the log goes on, in the last segment.
        unproven: The last frame, if nothing shows that it had reached the disk. It validates,
            but may so far be in memory only, so it has to be written anew before it is served.
        torn_bytes: How many bytes of a torn write lie behind the last good frame.
        unsealed: Segments that have a successor but no valid seal, each with it.
    """

    heads: tuple[SegmentHead, ...]
    tail: Tail
    unproven: UnprovenFrame | None
    torn_bytes: int
    unsealed: tuple[tuple[SegmentHead, SegmentHead], ...]


@dataclass(frozen=True, slots=True)
class UnprovenFrame:
    """A frame to be written anew: its header, its payload, and what it continues."""

    header: FrameHeader
    payload: bytes
    before: Tail


def read_heads(files: FileSystem, directory: Path, salt: int) -> tuple[SegmentHead, ...]:
    """Read the heads of all segments, which must be numbered without a gap."""
    numbers = segment_numbers(files.names(directory))
    if not numbers:
        raise CorruptionError(
            f"All segments are missing from {str(directory)!r}. Restore them; nothing was changed.",
            file=str(directory),
            offset=0,
            first_revision=1,
        )
    heads: list[SegmentHead] = []
    for number in range(numbers[0], numbers[-1] + 1):
        path = segment_path(directory, number)
        try:
            with SegmentReader(files, path, number, salt) as reader:
                heads.append(read_head(reader))
        except FileNotFoundError:
            raise CorruptionError(
                f"Segment {str(path)!r} is missing. Restore it; nothing was changed.",
                file=str(path),
                offset=0,
                first_revision=heads[-1].next_revision,
            ) from None
    return tuple(heads)


def first_needed(heads: tuple[SegmentHead, ...], after: int) -> int:
    """Return the index of the segment that holds the first frame after revision `after`.

    A frame without commits bears the number of the next one, so a segment is not needed only if
    its successor begins at or below `after`.
    """
    return max((at for at, head in enumerate(heads) if head.next_revision <= after), default=0)


def recover(
    files: FileSystem, directory: Path, salt: int, *, after: int, watermark: Position
) -> Recovered:
    """Check all frames after revision `after` and find the end of the log.

    `after` is the revision of the snapshot that stands for what came before, 0 if there is none;
    `watermark` is up to where the log is known from elsewhere to have been durable.

    Raises:
        CorruptionError: bytes are damaged or missing that a crash cannot account for.
    """
    heads = read_heads(files, directory, salt)
    if heads[0].number > 0 and heads[0].next_revision > after:
        path = segment_path(directory, heads[0].number - 1)
        raise CorruptionError(
            f"Segment {str(path)!r} is missing, and no snapshot stands for it. Restore it; nothing "
            f"was changed.",
            file=str(path),
            offset=0,
            first_revision=after + 1,
            last_revision=heads[0].next_revision - 1,
        )
    # A crash may come between a segment's birth and its predecessor's seal. That, or damage to a
    # seal, loses nothing: the successor says where the segment ends.
    unsealed = tuple(
        pair
        for pair in pairwise(heads[first_needed(heads, after) :])
        if not _check_closed(files, directory, salt, *pair)
    )
    return _recover_last(files, directory, salt, heads, watermark, unsealed)


def _check_closed(
    files: FileSystem, directory: Path, salt: int, head: SegmentHead, successor: SegmentHead
) -> bool:
    """Check all frames of a segment that has a successor; return whether it is sealed."""
    path = segment_path(directory, head.number)
    with SegmentReader(files, path, head.number, salt) as reader:
        walk = SegmentWalk(reader, head, successor.prev_end)
        for _ in walk:
            pass
        seal = reader.header(successor.prev_end)
        is_sealed = (
            seal is not None
            and seal.kind == FrameKind.SEAL
            and is_intact(reader.payload(successor.prev_end, seal), seal)
        )
    tail = walk.tail
    expected = (successor.prev_end, successor.next_revision - 1, successor.prev_chain)
    if (tail.offset, tail.revision, tail.chain) != expected:
        raise CorruptionError(
            f"{str(path)!r} is damaged at byte {tail.offset}: "
            f"{walk.problem or 'it does not end where the next segment begins'}. Revisions "
            f"{tail.revision + 1} to {successor.next_revision - 1} may be affected. Nothing was "
            f"changed.",
            file=str(path),
            offset=tail.offset,
            first_revision=tail.revision + 1,
            last_revision=successor.next_revision - 1,
        )
    return is_sealed


def _recover_last(
    files: FileSystem,
    directory: Path,
    salt: int,
    heads: tuple[SegmentHead, ...],
    watermark: Position,
    unsealed: tuple[tuple[SegmentHead, SegmentHead], ...],
) -> Recovered:
    head = heads[-1]
    path = segment_path(directory, head.number)
    before = after = head.tail
    payload = memoryview(b"")
    with SegmentReader(files, path, head.number, salt) as reader:
        walk = SegmentWalk(reader, head)
        for _, _, data in walk:
            before, after, payload = after, walk.tail, data
        torn_bytes = _judge_end(reader, walk, watermark)
        if not walk.is_sealed:
            _check_size(reader, head, walk.tail)
    if walk.is_sealed or watermark.segment > head.number:
        missing = segment_path(directory, head.number + 1)
        raise CorruptionError(
            f"Segment {str(missing)!r} is missing: the log is known to go on after "
            f"{str(path)!r}. Restore it; nothing was changed.",
            file=str(missing),
            offset=0,
            first_revision=walk.tail.revision + 1,
        )
    unproven = None
    if walk.last is not None and Position(head.number, walk.tail.offset) > watermark:
        unproven = UnprovenFrame(walk.last[1], bytes(payload), before)
    return Recovered(
        heads=heads,
        tail=walk.tail,
        unproven=unproven,
        torn_bytes=torn_bytes,
        unsealed=unsealed,
    )


def _judge_end(reader: SegmentReader, walk: SegmentWalk, watermark: Position) -> int:
    """Return how many torn bytes end the segment; raise if anything else is wrong with it."""
    if walk.is_sealed:
        return 0
    offset = walk.tail.offset
    data_end = reader.data_end(offset)
    is_below = Position(reader.number, offset) < watermark
    if data_end == offset and not is_below:
        return 0
    later = reader.find_header(offset + 8)
    if not is_below and later is None and _is_torn(reader, walk, data_end):
        return data_end - offset
    if later is None:
        last_revision = walk.broken.next_revision - 1 if walk.broken else 0
    else:
        last_revision = later[1].first_revision - 1
    problem = walk.problem if data_end > offset else "it is missing"
    raise CorruptionError(
        f"{str(reader.path)!r} is damaged at byte {offset}: {problem}. Revisions from "
        f"{walk.tail.revision + 1} to {last_revision or 'the last'} may be affected. Nothing was "
        f"changed.",
        file=str(reader.path),
        offset=offset,
        first_revision=walk.tail.revision + 1,
        last_revision=last_revision,
    )


def _check_size(reader: SegmentReader, head: SegmentHead, tail: Tail) -> None:
    """Check that nothing was cut off the end of a live segment, which no crash of ours does."""
    if reader.size < head.size:
        raise CorruptionError(
            f"{str(reader.path)!r} is damaged at byte {reader.size}: it ends there, and was "
            f"{head.size} bytes long. Revisions from {tail.revision + 1} to the last may be "
            f"affected. Nothing was changed.",
            file=str(reader.path),
            offset=reader.size,
            first_revision=tail.revision + 1,
        )


def _is_torn(reader: SegmentReader, walk: SegmentWalk, data_end: int) -> bool:
    """Return whether the frame after the last good one is what a crash leaves of a write."""
    offset = walk.tail.offset
    if reader.header(offset) is None:
        return is_torn_header(reader.view(offset, HEADER_SIZE), offset)
    header = walk.broken
    if header is None or data_end > offset + frame_size(header.payload_size):
        # A write that something follows was finished.
        return False
    return is_torn_payload(reader.payload(offset, header), offset + HEADER_SIZE, header)
