"""The commit log of one partition: what was acknowledged, on disk, in order.

It stores frames and knows nothing of what rows mean or how many replicas there are. One write
and one sync per frame; whoever sees `append` return may tell others.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa

from aidb_ray.errors import CorruptionError, StorageError, StoreMismatchError
from aidb_ray.store.directory import (
    DirectoryLock,
    Meta,
    SpaceReserve,
    StoreDirectory,
    create_directory,
    opened,
    storage_error,
)
from aidb_ray.store.files import FileSystem, is_full, write_all
from aidb_ray.store.frames import (
    HEADER_SIZE,
    Frame,
    FrameHeader,
    FrameKind,
    Rows,
    decode_chunks,
    decode_header,
    decode_rows,
    encode_frame,
    encode_payload,
    frame_size,
    is_intact,
    split_payload,
)
from aidb_ray.store.recovery import Recovered, first_needed, recover
from aidb_ray.store.segments import (
    FIRST_READ_BYTES,
    HEAD_BYTES,
    SEAL_BYTES,
    Position,
    SegmentHead,
    SegmentReader,
    SegmentWalk,
    Tail,
    create_segment,
    encode_head,
    encode_seal,
    read_head,
    segment_path,
)

__all__ = [
    "CommitLog",
    "Frame",
    "LogStats",
    "MemoryLog",
    "Position",
    "Rows",
    "create_store",
]

logger = logging.getLogger(__name__)

_GROUP_FRAMES: Final = 256
_GROUP_BYTES: Final = 4 << 20
_CACHE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class LogStats:
    """Counts since the log was opened.

    Attributes:
        bytes: Written to segments, frame headers included.
        filesystem_type: Where the directory is, such as `ext4`; `memory` for a `MemoryLog`.
    """

    fdatasyncs: int = 0
    frames: int = 0
    rows: int = 0
    bytes: int = 0
    filesystem_type: str = "memory"


def create_store(
    directory: Path,
    files: FileSystem,
    *,
    store_uuid: str,
    database: str,
    partition: int,
    partitions: int,
) -> None:
    """Make the directory of an empty store, durable when it returns.

    Raises:
        StoreMismatchError: there is a store already.
        ConfigError: the place is a link, or on a network file system.
        StorageFullError: no space; what was begun is no store and may be begun again.
    """
    meta = Meta(store_uuid, database, partition, partitions)
    try:
        home = create_directory(directory, files, meta)
        nothing = Tail(0, 0, 0, meta.salt)
        head = encode_head(0, prev_end=0, salt=meta.salt, epoch=0, tail=nothing)
        files.close(create_segment(files, home.log, 0, head, 0))
        # META makes it a store, so it comes last.
        home.write_meta(meta)
    except OSError as error:
        raise storage_error(error, "creating", directory) from error


class CommitLog:
    """The durable log of one partition, held by one process at a time.

    Every method blocks on the disk. `append` is called by one thread at a time; reading may go
    on in others meanwhile.

    Attributes:
        torn_bytes: What opening cut from the end: a write that a crash had torn.
        revision: Last revision that is durable.
    """

    def __init__(
        self,
        home: StoreDirectory,
        lock: DirectoryLock,
        meta: Meta,
        *,
        segment_bytes: int,
        reserve: SpaceReserve,
        filesystem_type: str,
    ) -> None:
        self._home = home
        self._files = home.files
        self._lock = lock
        self._meta = meta
        self._salt = meta.salt
        self._segment_bytes = segment_bytes
        self._reserve = reserve
        self._heads: tuple[SegmentHead, ...] = ()
        self._tail = Tail(0, 0, 0, 0)
        self._fd = -1
        self._allocated = 0
        self._next: tuple[SegmentHead, int] | None = None
        self._failure: StorageError | None = None
        self._cache = ChunkCache(_CACHE_BYTES)
        self._stats = LogStats(filesystem_type=filesystem_type)
        self.torn_bytes = 0

    @classmethod
    def open(
        cls,
        directory: Path,
        files: FileSystem,
        *,
        expected_uuid: str | None,
        segment_bytes: int = 64 << 20,
        reserve_bytes: int = 64 << 20,
    ) -> CommitLog:
        """Take the lock, check what is there and make the end of the log safe to write after.

        Never creates a store and never removes a byte that was acknowledged.

        Raises:
            StoreLockedError: another process has it open; waiting is the caller's business.
            StoreMismatchError: there is no store, or it is another one.
            CorruptionError: damage, with its place and revisions; nothing was changed.
            StorageFullError: no space to make the end safe.
            ConfigError: the place is a link, or on a network file system.
        """
        home = StoreDirectory(directory, files)
        try:
            filesystem_type = home.check()
            lock = DirectoryLock(directory, files)
        except OSError as error:
            raise storage_error(error, "opening", directory) from error
        try:
            meta = home.read_meta()
            if expected_uuid is not None and meta.store_uuid != expected_uuid:
                raise StoreMismatchError(
                    f"{str(directory)!r} holds store {meta.store_uuid}, not {expected_uuid}. Name "
                    f"the right directory; nothing was changed."
                )
            log = cls(
                home,
                lock,
                meta,
                segment_bytes=segment_bytes,
                reserve=SpaceReserve(directory, files, reserve_bytes),
                filesystem_type=filesystem_type,
            )
            log._recover()
        except OSError as error:
            lock.release()
            raise storage_error(error, "opening", directory) from error
        except BaseException:
            lock.release()
            raise
        return log

    @property
    def store_uuid(self) -> str:
        """Identity of the store, given when it was created."""
        return self._meta.store_uuid

    @property
    def database(self) -> str:
        """Name of the database that the partition belongs to."""
        return self._meta.database

    @property
    def partition(self) -> int:
        """Number of this partition, from 0."""
        return self._meta.partition

    @property
    def partitions(self) -> int:
        """How many partitions the database has."""
        return self._meta.partitions

    @property
    def epoch(self) -> int:
        """How often the store was opened, this time included; durable."""
        return self._meta.epoch

    @property
    def revision(self) -> int:
        """Last revision that is durable."""
        return self._tail.revision

    @property
    def stats(self) -> LogStats:
        """Counts since the log was opened."""
        return self._stats

    def oldest_revision(self) -> int:
        """Return the smallest `after` that `frames` can serve."""
        head = self._heads[0]
        return head.next_revision if head.number > 0 else 0

    def append(self, frame: Frame) -> Position:
        """Add a frame and return where it lies; durable when it returns.

        Raises:
            StorageFullError: no space. Nothing of the frame was kept; try again later.
            StorageError: `sync_failed`: whether the frame will survive is unknown, and the log
                takes no more. The process must exit and open the store again.
        """
        if self._failure is not None:
            raise self._failure
        if frame.first_revision != self._tail.revision + 1:
            raise ValueError(
                f"a frame must begin with revision {self._tail.revision + 1}, "
                f"not {frame.first_revision}"
            )
        payload = encode_payload(frame)
        size = frame_size(len(payload))
        try:
            self._make_room(size)
            position = Position(self._tail.segment, self._tail.offset)
            data, chain = encode_frame(
                FrameKind.DATA,
                payload,
                salt=self._salt,
                segment=position.segment,
                offset=position.offset,
                first_revision=frame.first_revision,
                commits=frame.commits,
                rows=len(frame.rows.ops),
                epoch=self._meta.epoch,
                committed=self._tail.revision,
                prev_chain=self._tail.chain,
            )
            self._write(data, position.offset)
            self._sync()
        except OSError as error:
            raise self._undo(error) from error
        self._tail = Tail(
            position.segment,
            position.offset + size,
            frame.first_revision + frame.commits - 1,
            chain,
        )
        stats = self._stats
        self._stats = replace(
            stats, frames=stats.frames + 1, rows=stats.rows + len(frame.rows.ops)
        )
        return position

    def frames(self, after: int) -> Iterator[tuple[Position, Frame]]:
        """Yield every frame that has a commit after revision `after`, in order.

        Frames without commits come along if they were written after it. What is appended
        meanwhile does not.

        Raises:
            ValueError: `after` is older than `oldest_revision()`.
            CorruptionError: a frame is damaged; the ones before it were yielded.
        """
        if after < self.oldest_revision():
            raise ValueError(f"frames after {after} were compacted")
        tail, heads = self._tail, self._heads
        start = first_needed(heads, after)
        ends = [head.prev_end for head in heads[start + 1 :]] + [tail.offset]
        for head, end in zip(heads[start:], ends, strict=True):
            yield from self._segment_frames(head, end, after)

    def read_chunks(self, position: Position, start: int, count: int) -> pa.RecordBatch:
        """Return chunks `start` up to `start + count` of the frame at `position`.

        Shares memory with the whole frame's chunks.

        Raises:
            CorruptionError: the frame is damaged or missing.
        """
        chunks = self._cache.find(position)
        if chunks is None:
            chunks = self._load_chunks(position)
            self._cache.add(position, chunks)
        return chunks.slice(start, count)

    def close(self) -> None:
        """Note that all is durable, and let other processes open the store."""
        if self._fd < 0:
            return
        try:
            if self._failure is None:
                self._note_durable(self._meta.epoch)
        except OSError:
            # Only the next opening has more to check.
            logger.warning("META was not updated on closing", extra={"path": str(self._home.path)})
        finally:
            self._files.close(self._fd)
            if self._next is not None:
                self._files.close(self._next[1])
            self._fd, self._next = -1, None
            self._lock.release()

    def _recover(self) -> None:
        home, meta = self._home, self._meta
        self._remove_drafts()
        recovered = recover(
            self._files,
            home.log,
            self._salt,
            after=0,
            watermark=Position(meta.durable_segment, meta.durable_offset),
        )
        if recovered.tail.revision < meta.durable_revision:
            raise CorruptionError(
                f"The log in {str(home.path)!r} ends at revision {recovered.tail.revision}, but "
                f"{meta.durable_revision} was durable. Restore it; nothing was changed.",
                file=str(home.log),
                offset=0,
                first_revision=recovered.tail.revision + 1,
                last_revision=meta.durable_revision,
            )
        self._meta = replace(meta, epoch=max(meta.epoch, recovered.heads[-1].epoch) + 1)
        self._heads = recovered.heads
        try:
            self._continue(recovered)
            self._note_durable(self._meta.epoch)
            self._reserve.restore()
        except BaseException:
            if self._fd >= 0:
                self._files.close(self._fd)
                self._fd = -1
            raise

    def _remove_drafts(self) -> None:
        # What a crash left unfinished. It never had the name under which it would count.
        for directory in (self._home.log, self._home.snapshots):
            for name in self._files.names(directory):
                if name.endswith(".tmp"):
                    self._files.unlink(directory / name)

    def _continue(self, recovered: Recovered) -> None:
        """Open the end of the log for writing.

        A frame that is not proven to be on disk is written once more, to a new file: after a
        failed sync the kernel may hold its pages as clean, and never write them.
        """
        unproven = recovered.unproven
        self._tail = recovered.tail
        if unproven is None and not recovered.torn_bytes:
            self._fd = self._files.open(
                segment_path(self._home.log, self._tail.segment), write=True
            )
            self._allocated = self._files.size(self._fd)
            if not recovered.is_sealed:
                self._seal(self._heads[-2], self._heads[-1])
            return
        if recovered.torn_bytes:
            self.torn_bytes = recovered.torn_bytes
            logger.warning(
                "cut %d bytes of a torn write from the end of the log",
                recovered.torn_bytes,
                extra={"path": str(self._home.path), "revision": recovered.tail.revision},
            )
        before = recovered.tail if unproven is None else unproven.before
        number = before.segment + 1
        content = encode_head(
            number, prev_end=before.offset, salt=self._salt, epoch=self.epoch, tail=before
        )
        if unproven is not None:
            content += self._encode_again(unproven.header, unproven.payload, number, content)
        try:
            fd = self._create_segment(number, content)
        except OSError as error:
            if not is_full(error) or not self._reserve.give_up():
                raise
            fd = self._create_segment(number, content)
        head = self._adopt(fd, number)
        self._seal(self._heads[-1], head)
        self._heads = (*self._heads, head)
        if recovered.heads[-1].number > 0 and not recovered.is_sealed:
            self._seal(recovered.heads[-2], recovered.heads[-1])

    def _encode_again(
        self, header: FrameHeader, payload: bytes, number: int, head: bytes
    ) -> bytes:
        chain = decode_header(head, 0, salt=self._salt, segment=number, offset=0)
        assert chain is not None
        data, _ = encode_frame(
            FrameKind.DATA,
            payload,
            salt=self._salt,
            segment=number,
            offset=len(head),
            first_revision=header.first_revision,
            commits=header.commits,
            rows=header.rows,
            epoch=self.epoch,
            committed=header.committed,
            prev_chain=chain.header_crc,
        )
        return data
