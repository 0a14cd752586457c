"""The live end of a log: appends frames, one write and one sync each, and rolls segments."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from aidb_ray.errors import StorageError
from aidb_ray.store.directory import storage_error
from aidb_ray.store.files import FileSystem, is_full, write_all
from aidb_ray.store.frames import FrameKind, encode_frame, frame_size
from aidb_ray.store.recovery import Recovered, UnprovenFrame
from aidb_ray.store.segments import (
    HEAD_BYTES,
    SEAL_BYTES,
    Position,
    SegmentHead,
    Tail,
    create_segment,
    encode_head,
    encode_seal,
    segment_path,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LiveSegment:
    """A segment open for writing.

    Attributes:
        allocated: How long the file is; so many bytes cannot run out of space.
        writing: How many bytes after `tail` a write may have left that was not finished.
    """

    head: SegmentHead
    fd: int
    allocated: int
    tail: Tail
    writing: int = 0


class LogWriter:
    """Writes after the end that recovery found. Used by one thread at a time.

    A full disk leaves it as it was. Any other failure of a write or a sync ends it: what the
    disk holds is then unknown, and asking the kernel again would get a false yes.

    Attributes:
        heads: All segments, oldest first; the last is the one being written. Whoever reads
            `tail` first, in whatever thread, finds its segment here, and perhaps one after it.
        tail: Where the next frame goes; all before it is durable.
        syncs: How many data syncs were made.
        bytes: How many bytes of frames were made durable.
    """

    def __init__(
        self,
        files: FileSystem,
        directory: Path,
        recovered: Recovered,
        *,
        salt: int,
        epoch: int,
        segment_bytes: int,
    ) -> None:
        self._files = files
        self._directory = directory
        self._salt = salt
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        self._failure: StorageError | None = None
        # A successor that was made while the disk was too full to seal its predecessor.
        self._next: LiveSegment | None = None
        self._mutex = Lock()
        self.syncs = 0
        self.bytes = 0
        self.heads = recovered.heads
        self._live = self._resume(recovered)
        if self._live.head is not self.heads[-1]:
            self.heads = (*self.heads, self._live.head)

    @property
    def tail(self) -> Tail:
        """Where the next frame goes; all before it is durable."""
        return self._live.tail

    @property
    def has_failed(self) -> bool:
        """Whether it takes no more frames."""
        return self._failure is not None

    def append(self, payload: bytes, *, commits: int, rows: int) -> Position:
        """Write a data frame after the tail; durable when it returns. See `CommitLog.append`."""
        if self._failure is not None:
            raise self._failure
        try:
            live = self._make_room(frame_size(len(payload)))
            segment, offset, revision, chain = live.tail
            data, chain = encode_frame(
                FrameKind.DATA,
                payload,
                salt=self._salt,
                segment=segment,
                offset=offset,
                first_revision=revision + 1,
                commits=commits,
                rows=rows,
                epoch=self._epoch,
                committed=revision,
                prev_chain=chain,
            )
            live.writing = len(data)
            write_all(self._files, live.fd, data, offset)
            self._sync(live.fd)
            live.writing = 0
        except OSError as error:
            self._undo(error)
            raise storage_error(error, "appending to", self._path(self._live.head)) from error
        live.tail = Tail(segment, offset + len(data), revision + commits, chain)
        self.bytes += len(data)
        return Position(segment, offset)

    def drop_oldest(self) -> None:
        """Forget the oldest segment, which compaction replaced. May be called by any thread."""
        with self._mutex:
            self.heads = self.heads[1:]

    def close(self) -> None:
        """Close the files."""
        for live in (self._live, self._next):
            if live is not None:
                self._files.close(live.fd)

    def _resume(self, recovered: Recovered) -> LiveSegment:
        """Open the end of the log.

        A frame that is not proven to be on disk is written once more, to a new file: after a
        failed sync the kernel may hold its pages as clean and never write them. A torn write is
        cut off the same way, by a successor that says where its predecessor ends.
        """
        last, unproven = recovered.heads[-1], recovered.unproven
        for head, successor in recovered.unsealed:
            logger.warning("sealing segment %d again", head.number)
            self._seal_file(head, successor)
        if unproven is None and not recovered.torn_bytes:
            fd = self._files.open(self._path(last), write=True)
            return LiveSegment(last, fd, self._files.size(fd), recovered.tail)
        before = recovered.tail if unproven is None else unproven.before
        live = self._create_segment(before, self._segment_bytes, unproven)
        try:
            self._seal_file(last, live.head)
        except OSError:
            self._files.close(live.fd)
            raise
        return live

    def _make_room(self, size: int) -> LiveSegment:
        """Return a segment that takes `size` more bytes, and a seal, without running out."""
        live = self._live
        needed = live.tail.offset + size + SEAL_BYTES
        limit = min(live.allocated, self._segment_bytes)
        if self._next is None and needed > limit and live.tail.offset > HEAD_BYTES:
            self._next = self._create_segment(live.tail, HEAD_BYTES + size + SEAL_BYTES)
        if self._next is not None:
            self._seal(live.fd, self._next.head)
            self._files.close(live.fd)
            live, self._next = self._next, None
            # First: who reads in another thread must find the segment that `tail` is in.
            with self._mutex:
                self.heads = (*self.heads, live.head)
            self._live = live
            needed = live.tail.offset + size + SEAL_BYTES
        return live if needed <= live.allocated else self._replace(needed)

    def _replace(self, size: int) -> LiveSegment:
        """Make the live segment, which holds only its head, anew with at least `size` bytes.

        It never grows in place: the size that its head names would no longer be its size.
        """
        old = self._live
        head = old.head
        before = Tail(head.number - 1, head.prev_end, head.next_revision - 1, head.prev_chain)
        live = self._create_segment(before, size)
        self._files.close(old.fd)
        with self._mutex:
            self.heads = (*self.heads[:-1], live.head)
        self._live = live
        return live

    def _create_segment(
        self, before: Tail, room: int, carried: UnprovenFrame | None = None
    ) -> LiveSegment:
        number = before.segment + 1
        carried_bytes = 0 if carried is None else frame_size(len(carried.payload))
        size = max(self._segment_bytes, room, HEAD_BYTES + carried_bytes + SEAL_BYTES)
        content, head = encode_head(
            number,
            prev_end=before.offset,
            size=size,
            salt=self._salt,
            epoch=self._epoch,
            tail=before,
        )
        tail = head.tail
        if carried is not None:
            data, chain = encode_frame(
                FrameKind.DATA,
                carried.payload,
                salt=self._salt,
                segment=number,
                offset=tail.offset,
                first_revision=carried.header.first_revision,
                commits=carried.header.commits,
                rows=carried.header.rows,
                epoch=self._epoch,
                committed=carried.header.committed,
                prev_chain=tail.chain,
            )
            content += data
            revision = carried.header.next_revision - 1
            tail = Tail(number, len(content), revision, chain)
        fd = create_segment(self._files, self._directory, number, content, size)
        self.syncs += 1
        return LiveSegment(head, fd, size, tail)

    def _seal_file(self, head: SegmentHead, successor: SegmentHead) -> None:
        fd = self._files.open(self._path(head), write=True)
        try:
            self._seal(fd, successor)
        finally:
            self._files.close(fd)

    def _seal(self, fd: int, successor: SegmentHead) -> None:
        """End a segment where its successor, which is durable, says that it ends."""
        end = successor.prev_end
        seal = encode_seal(successor, salt=self._salt, epoch=self._epoch)
        self._files.truncate(fd, end)
        write_all(self._files, fd, seal, end)
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        try:
            self._files.sync_data(fd)
        except OSError as error:
            # Even "disk full" says here that written pages were lost.
            raise self._fail(error) from error
        self.syncs += 1

    def _undo(self, error: OSError) -> None:
        """Leave nothing of a write that did not fit; give up for good if that cannot be known.

        What arrived is overwritten, not cut off: a live segment keeps its size.
        """
        live = self._live
        if not is_full(error):
            raise self._fail(error) from error
        if not live.writing:
            return
        try:
            offset = live.tail.offset
            arrived = self._files.read(live.fd, live.writing, offset).rstrip(b"\0")
            if arrived:
                write_all(self._files, live.fd, bytes(len(arrived)), offset)
        except OSError as second:
            raise self._fail(second) from error
        if arrived:
            self._sync(live.fd)
        live.writing = 0

    def _fail(self, error: OSError) -> StorageError:
        self._failure = StorageError(
            f"Writing the log in {str(self._directory)!r} failed ({error.strerror}). Whether the "
            f"last batch survives is unknown; exit and open the store again.",
            code="sync_failed",
        )
        return self._failure

    def _path(self, head: SegmentHead) -> Path:
        return segment_path(self._directory, head.number)
