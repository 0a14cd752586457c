"""The commit log of one partition: what was acknowledged, on disk, in order.

It stores frames and knows nothing of what rows mean or how many replicas there are. One write
and one sync per frame; whoever sees `append` return may tell others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import pyarrow as pa

from aidb_ray.errors import CompactedError, CorruptionError, StoreMismatchError
from aidb_ray.store.chunk_files import ChunkReader, erase_chunks, keep_chunks
from aidb_ray.store.directory import (
    DirectoryLock,
    Meta,
    SpaceReserve,
    StoreDirectory,
    create_directory,
    storage_error,
)
from aidb_ray.store.files import FileSystem, is_full
from aidb_ray.store.frames import (
    CHUNK_SCHEMA,
    Frame,
    FrameHeader,
    Rows,
    decode_chunks,
    decode_rows,
    encode_payload,
    split_payload,
)
from aidb_ray.store.memory import LogStats, MemoryLog
from aidb_ray.store.recovery import Recovered, first_needed, recover
from aidb_ray.store.segments import (
    HEAD_BYTES,
    Position,
    SegmentHead,
    SegmentReader,
    SegmentWalk,
    Tail,
    create_segment,
    encode_head,
    segment_path,
)
from aidb_ray.store.snapshots import Snapshot, Snapshots, SnapshotWriter
from aidb_ray.store.streams import NO_GARBAGE, Garbage, Span
from aidb_ray.store.writer import LogWriter

__all__ = [
    "CHUNK_SCHEMA",
    "CommitLog",
    "Frame",
    "LogStats",
    "MemoryLog",
    "Position",
    "Rows",
    "Snapshot",
    "SnapshotWriter",
    "create_store",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_Raw: TypeAlias = tuple[Position, FrameHeader, memoryview]
"""A frame that was read and checked, but not decoded: place, header, payload."""

_GROUP_FRAMES: Final = 256
_GROUP_BYTES: Final = 4 << 20


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
        head, _ = encode_head(0, prev_end=0, size=HEAD_BYTES, salt=meta.salt, epoch=0, tail=nothing)
        files.close(create_segment(files, home.log, 0, head, HEAD_BYTES))
        # META makes it a store, so it comes last.
        home.write_meta(meta)
    except OSError as error:
        raise storage_error(error, "creating", directory) from error


class CommitLog:
    """The durable log of one partition, held by one process at a time.

    Every method blocks on the disk. `append` is called by one thread at a time; others may read
    meanwhile.

    Attributes:
        torn_bytes: What opening cut from the end: a write that a crash had torn.
    """

    def __init__(
        self,
        home: StoreDirectory,
        lock: DirectoryLock,
        meta: Meta,
        writer: LogWriter,
        snapshots: Snapshots,
        *,
        torn_bytes: int,
    ) -> None:
        self._home = home
        self._files = home.files
        self._lock: DirectoryLock | None = lock
        self._meta = meta
        self._writer = writer
        self._snapshots = snapshots
        self._chunks = ChunkReader(home.files, home.log, meta.salt)
        self._stats = LogStats(filesystem_type=home.filesystem_type)
        self.torn_bytes = torn_bytes

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
        """Take the lock, check what is there, and make the end of the log safe to write after.

        Never creates a store and never removes a byte that was acknowledged.

        Raises:
            StoreLockedError: another process has it open; waiting is the caller's business.
            StoreMismatchError: there is no store, or it is another one.
            CorruptionError: damage, with its place and revisions; nothing was changed.
            StorageFullError: no space to make the end safe.
            StorageError: the disk failed.
            ConfigError: the place is a link, or on a network file system.
        """
        home = StoreDirectory(directory, files)
        lock: DirectoryLock | None = None
        try:
            home.check()
            lock = DirectoryLock(directory, files)
            meta = home.read_meta()
            _check_identity(meta, expected_uuid, directory)
            reserve = SpaceReserve(directory, files, reserve_bytes)
            return cls._recover(home, lock, meta, segment_bytes, reserve)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise storage_error(error, "opening", directory) from error
            raise

    @classmethod
    def _recover(
        cls,
        home: StoreDirectory,
        lock: DirectoryLock,
        meta: Meta,
        segment_bytes: int,
        reserve: SpaceReserve,
    ) -> CommitLog:
        home.remove_drafts()
        # A life before may have failed at this, and still sees names that are not on disk.
        for directory in (home.log, home.snapshots):
            home.files.sync_directory(directory)
        snapshots = Snapshots(home.files, home.snapshots, meta.salt)
        latest = snapshots.latest
        watermark = Position(meta.durable_segment, meta.durable_offset)
        recovered = recover(
            home.files,
            home.log,
            meta.salt,
            after=latest.revision if latest else 0,
            watermark=max(watermark, latest.durable) if latest else watermark,
        )
        _check_revision(home, recovered, meta, latest)
        if recovered.torn_bytes:
            logger.warning(
                "cutting %d bytes of a torn write from the end of the log",
                recovered.torn_bytes,
                extra={"path": str(home.path), "revision": recovered.tail.revision},
            )
        epoch = max(meta.epoch, recovered.heads[-1].epoch) + 1

        def resume() -> LogWriter:
            return LogWriter(
                home.files,
                home.log,
                recovered,
                salt=meta.salt,
                epoch=epoch,
                segment_bytes=segment_bytes,
            )

        try:
            writer = resume()
        except OSError as error:
            if not is_full(error) or not reserve.give_up():
                raise
            writer = resume()
        try:
            log = cls(
                home,
                lock,
                replace(meta, epoch=epoch),
                writer,
                snapshots,
                torn_bytes=recovered.torn_bytes,
            )
            log._note_durable()
            if not reserve.restore():
                logger.warning("no space for the reserve", extra={"path": str(home.path)})
        except BaseException:
            writer.close()
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
        return self._writer.tail.revision

    @property
    def stats(self) -> LogStats:
        """Counts since the log was opened."""
        writer = self._writer
        return replace(self._stats, fdatasyncs=writer.syncs, bytes=writer.bytes)

    def oldest_revision(self) -> int:
        """Return the smallest `after` that `frames` can serve."""
        head = self._writer.heads[0]
        return head.next_revision if head.number > 0 else 0

    def append(self, frame: Frame) -> Position:
        """Add a frame and return where it lies; durable when it returns.

        Raises:
            StorageFullError: no space. Nothing of the frame was kept; try again later.
            StorageError: `sync_failed`: whether the frame survives is unknown, and the log takes
                no more. The process must exit and open the store again.
        """
        if frame.first_revision != self.revision + 1:
            raise ValueError(
                f"a frame must begin with revision {self.revision + 1}, not {frame.first_revision}"
            )
        rows = len(frame.rows.ops)
        position = self._writer.append(encode_payload(frame), commits=frame.commits, rows=rows)
        stats = self._stats
        self._stats = replace(stats, frames=stats.frames + 1, rows=stats.rows + rows)
        return position

    def frames(self, after: int) -> Iterator[tuple[Position, Frame]]:
        """Yield every frame that has a commit after revision `after`, in order.

        Frames without commits come along if they were written after it. Frames appended
        meanwhile do not.

        Raises:
            CompactedError: `after` is older than `oldest_revision()`, now or by the time the
                frames would be read.
            CorruptionError: a frame is damaged; those before it were yielded.
        """
        yield from self._read(after, _decode_group)

    def _read(self, after: int, decode: Callable[[list[_Raw]], Iterator[T]]) -> Iterator[T]:
        if after < self.oldest_revision():
            raise self._compacted(after)
        # The tail first, see `LogWriter.heads`.
        tail = self._writer.tail
        heads = tuple(head for head in self._writer.heads if head.number <= tail.segment)
        start = first_needed(heads, after)
        ends = [*(head.prev_end for head in heads[start + 1 :]), tail.offset]
        for head, end in zip(heads[start:], ends, strict=True):
            yield from self._read_segment(head, end, after, decode)

    def rows_of(self, session: str, after: int) -> Iterator[tuple[Position, Rows]]:
        """Yield the rows of one session in every frame that `frames` would yield."""
        yield from self._read(after, partial(_decode_session, session=session))

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots that are kept, the newest last."""
        return self._snapshots.kept

    def read_chunks(self, position: Position, start: int, count: int) -> pa.RecordBatch:
        """Return chunks `start` up to `start + count` of the frame at `position`.

        They share memory with all chunks of the frame. May be called by any thread.

        Raises:
            CorruptionError: the frame is damaged or missing.
        """
        return self._chunks.read(position).slice(start, count)

    def snapshot(self) -> Snapshot | None:
        """Return the snapshot to start from, if there is one; replay `frames` after it."""
        return self._snapshots.latest

    def begin_snapshot(self, revision: int) -> SnapshotWriter:
        """Begin a snapshot that `frames(revision)` can be replayed over.

        `revision` is the current one: rows are written as they are when the walk reaches them.

        Raises:
            StorageFullError: no space.
        """
        return self._snapshots.begin(revision, self._durable_position)

    def compact(self, garbage: Garbage = NO_GARBAGE) -> set[int]:
        """Drop the rows of segments that both kept snapshots stand for; keep their chunks.

        Chunks that are `garbage` are kept neither in these nor in those that were compacted
        before; returns the segments that have none of theirs any more.

        Blocks for long. Does nothing before there are two snapshots, and checks every block of
        the older one first. An interruption leaves all that was there, or less to do next time.

        Raises:
            CorruptionError: a snapshot or a segment is damaged; it was left alone.
            StorageFullError: no space for the chunks.
        """
        older = self._snapshots.fallback
        if older is None:
            return set()
        try:
            first = first_needed(self._writer.heads, older.revision)
            if first:
                older.verify()
            oldest = self._writer.heads[0].number
            for head, successor in pairwise(self._writer.heads[: first + 1]):
                self._compact_segment(head, successor.prev_end, garbage)
            for number in [at for at, spans in garbage.items() if spans and at < oldest]:
                erased = _by_offset(garbage[number])
                erase_chunks(self._files, self._home.log, number, self._meta.salt, erased)
                self._chunks.forget(number)
        except OSError as error:
            raise storage_error(error, "compacting", self._home.log) from error
        return {number for number in garbage if number < self._writer.heads[0].number}

    def close(self) -> None:
        """Note that all is durable, and let other processes open the store. May be repeated."""
        if self._lock is None:
            return
        try:
            if not self._writer.has_failed:
                self._note_durable()
        except OSError:
            # Nothing is lost: the next opening checks more and knows less.
            logger.warning("META was not updated", extra={"path": str(self._home.path)})
        finally:
            self._writer.close()
            self._lock.release()
            self._lock = None

    def abandon(self) -> None:
        """Let go of the files as the end of a process does: nothing is noted, the lock is free."""
        if self._lock is not None:
            self._writer.close()
            self._lock.release()
            self._lock = None

    def _compact_segment(self, head: SegmentHead, end: int, garbage: Garbage) -> None:
        path = segment_path(self._home.log, head.number)
        erased = _by_offset(garbage.get(head.number, ()))
        with SegmentReader(self._files, path, head.number, self._meta.salt) as reader:
            keep_chunks(self._files, self._home.log, reader, head, end, erased)
        # Readers look for the segment first, then for its chunks: no moment has neither.
        self._writer.drop_oldest()
        self._files.unlink(path)
        self._files.sync_directory(self._home.log)
        self._chunks.forget(head.number)

    def _durable_position(self) -> Position:
        tail = self._writer.tail
        return Position(tail.segment, tail.offset)

    def _note_durable(self) -> None:
        tail = self._writer.tail
        self._meta = replace(
            self._meta,
            durable_segment=tail.segment,
            durable_offset=tail.offset,
            durable_revision=tail.revision,
        )
        self._home.write_meta(self._meta)

    def _read_segment(
        self,
        head: SegmentHead,
        end: int,
        after: int,
        decode: Callable[[list[_Raw]], Iterator[T]],
    ) -> Iterator[T]:
        path = segment_path(self._home.log, head.number)
        try:
            reader = SegmentReader(self._files, path, head.number, self._meta.salt)
        except FileNotFoundError:
            raise self._compacted(after) from None
        group: list[_Raw] = []
        held = 0
        with reader:
            walk = SegmentWalk(reader, head, end)
            for offset, header, payload in walk:
                if header.first_revision <= after and header.next_revision <= after + 1:
                    continue
                group.append((Position(head.number, offset), header, payload))
                held += len(payload)
                if len(group) == _GROUP_FRAMES or held >= _GROUP_BYTES:
                    yield from decode(group)
                    group, held = [], 0
        yield from decode(group)
        if walk.tail.offset != end:
            raise CorruptionError(
                f"{str(path)!r} is damaged at byte {walk.tail.offset}: {walk.problem}.",
                file=str(path),
                offset=walk.tail.offset,
                first_revision=walk.tail.revision + 1,
            )

    def _compacted(self, after: int) -> CompactedError:
        oldest = self.oldest_revision()
        return CompactedError(
            f"Changes after revision {after} are no longer kept; the oldest are after {oldest}. "
            f"Start from a snapshot.",
            oldest=oldest,
        )


def _by_offset(spans: Iterable[Span]) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = {}
    for span in spans:
        found.setdefault(span.offset, []).append(span)
    return found


def _check_revision(
    home: StoreDirectory, recovered: Recovered, meta: Meta, latest: Snapshot | None
) -> None:
    known = max(meta.durable_revision, latest.revision if latest else 0)
    last = recovered.tail.revision
    if last < known:
        raise CorruptionError(
            f"The log in {str(home.log)!r} ends at revision {last}, but {known} was durable. "
            f"Restore it; nothing was changed.",
            file=str(home.log),
            offset=0,
            first_revision=last + 1,
            last_revision=known,
        )


def _check_identity(meta: Meta, expected_uuid: str | None, directory: Path) -> None:
    if expected_uuid is not None and meta.store_uuid != expected_uuid:
        raise StoreMismatchError(
            f"{str(directory)!r} holds store {meta.store_uuid}, not {expected_uuid}. Name the "
            f"right directory; nothing was changed."
        )


def _decode_session(group: list[_Raw], *, session: str) -> Iterator[tuple[Position, Rows]]:
    parts = [split_payload(payload)[0] for _, _, payload in group]
    for (position, _, _), rows in zip(group, decode_rows(parts, session=session), strict=True):
        if rows.revisions:
            yield position, rows


def _decode_group(group: list[_Raw]) -> Iterator[tuple[Position, Frame]]:
    # Decoding the rows of many small frames at once is several times cheaper than one by one.
    parts = [split_payload(payload) for _, _, payload in group]
    rows = decode_rows([part[0] for part in parts])
    for (position, header, _), part, columns in zip(group, parts, rows, strict=True):
        yield (
            position,
            Frame(header.first_revision, header.commits, columns, decode_chunks(part[1])),
        )
