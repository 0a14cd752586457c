"""A log that remembers nothing longer than its process: for tests, trials and batch jobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from aidb_ray.errors import CompactedError
from aidb_ray.store.frames import Frame
from aidb_ray.store.segments import Position
from aidb_ray.store.streams import NO_GARBAGE, Garbage


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


class MemoryLog:
    """A log that forgets everything when its process ends. Same calls as `CommitLog`.

    It keeps chunks, for they are read by position, and no rows: whoever appends has applied them.
    """

    def __init__(
        self, *, store_uuid: str, database: str, partition: int = 0, partitions: int = 1
    ) -> None:
        self.store_uuid: Final = store_uuid
        self.database: Final = database
        self.partition: Final = partition
        self.partitions: Final = partitions
        self.epoch: Final = 1
        self.torn_bytes: Final = 0
        self._revision = 0
        self._frames = 0
        self._rows = 0
        self._chunks: dict[int, pa.RecordBatch] = {}
        # How many chunks are no garbage, of frames that have some.
        self._left: dict[int, int] = {}

    @property
    def revision(self) -> int:
        """Last revision that was appended."""
        return self._revision

    @property
    def stats(self) -> LogStats:
        """See `CommitLog.stats`."""
        return LogStats(frames=self._frames, rows=self._rows)

    def snapshot(self) -> None:
        """Return None: there is never anything to load."""

    def oldest_revision(self) -> int:
        """Return the current revision: no older frame is kept."""
        return self._revision

    def append(self, frame: Frame) -> Position:
        """Number a frame and keep its chunks; nothing becomes durable."""
        if frame.first_revision != self._revision + 1:
            raise ValueError(
                f"a frame must begin with revision {self._revision + 1}, not {frame.first_revision}"
            )
        position = Position(0, self._frames)
        if frame.chunks is not None:
            self._chunks[position.offset] = frame.chunks
        self._frames += 1
        self._rows += len(frame.rows.ops)
        self._revision += frame.commits
        return position

    def frames(self, after: int) -> Iterator[tuple[Position, Frame]]:
        """Yield nothing: no frame is kept. Raises CompactedError as `CommitLog.frames` does."""
        if after < self._revision:
            raise CompactedError(
                f"Changes after revision {after} are not kept in memory. Start from a snapshot.",
                oldest=self._revision,
            )
        return iter(())

    def read_chunks(self, position: Position, start: int, count: int) -> pa.RecordBatch:
        """See `CommitLog.read_chunks`."""
        return self._chunks[position.offset].slice(start, count)

    def compact(self, garbage: Garbage = NO_GARBAGE) -> set[int]:
        """Forget the frames of which all chunks are garbage. See `CommitLog.compact`."""
        for spans in garbage.values():
            for span in spans:
                batch = self._chunks.get(span.offset)
                if batch is None:
                    continue
                left = self._left.get(span.offset, batch.num_rows) - span.count
                self._left[span.offset] = left
                if left == 0:
                    del self._chunks[span.offset], self._left[span.offset]
        return set(garbage)

    def close(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()

    def abandon(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()
