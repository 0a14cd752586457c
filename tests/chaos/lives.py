"""A store's log through many lives: what was acknowledged, and whether it is all there again.

One `History` outlives the processes. Each life opens the log, checks everything, appends, takes
snapshots, compacts, and ends somehow. Rows are told apart by the attempt that wrote them, so a
frame that was refused and one that took its revision later cannot be confused.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from aidb_ray.errors import StorageError, StorageFullError
from aidb_ray.store.files import FileSystem
from aidb_ray.store.frames import Frame, Rows
from aidb_ray.store.log import CommitLog, Position
from aidb_ray.store.snapshots import SessionRow
from tests.frame_builders import make_chunks, open_log

COLLECTION = "messages"
SEGMENT_BYTES = 1 << 14


@dataclass(slots=True)
class History:
    """What the outside world knows of a log.

    Attributes:
        acked: Attempt that was acknowledged for each revision; never changes again.
        unknown: Attempt whose outcome is unknown, by its revision; at most one.
        attempts: How many appends were tried.
        refused: How many of them were refused with nothing kept.
        torn_bytes: What openings cut off.
        resolved: How many unknown outcomes turned out to have happened, and not.
    """

    store: Path
    acked: dict[int, int] = field(default_factory=dict[int, int])
    unknown: dict[int, int] = field(default_factory=dict[int, int])
    attempts: int = 0
    refused: int = 0
    torn_bytes: int = 0
    torn_tails: int = 0
    resolved: list[int] = field(default_factory=lambda: [0, 0])

    def live(self, files: FileSystem, rng: Random, frames: int) -> None:
        """Open, check, append `frames` frames and close; an error of the disk ends it early."""
        log = open_log(self.store, files, segment_bytes=SEGMENT_BYTES)
        try:
            state = State(log)
            self.torn_bytes += log.torn_bytes
            self.torn_tails += log.torn_bytes > 0
            self.check(state)
            while log.revision < frames:
                self._step(log, state, rng)
            log.close()
        finally:
            log.abandon()

    def check(self, state: State) -> None:
        """Assert that all that was acknowledged is there, once, and nothing that was refused."""
        for revision, attempt in self.acked.items():
            assert state.attempts.get(revision) == attempt, f"acknowledged {revision} was lost"
        for revision, attempt in self.unknown.items():
            happened = state.attempts.get(revision) == attempt
            self.resolved[not happened] += 1
            if happened:
                self.acked[revision] = attempt
        self.unknown.clear()
        extra = state.attempts.keys() - self.acked.keys()
        assert not extra, f"{sorted(extra)} were served but never acknowledged"
        assert sorted(state.attempts) == list(range(1, state.log.revision + 1))
        state.check_chunks()

    def _step(self, log: CommitLog, state: State, rng: Random) -> None:
        choice = rng.random()
        if choice < 0.05:
            with suppress(StorageFullError):
                state.take_snapshot()
        elif choice < 0.1:
            with suppress(StorageFullError):
                log.compact()
        else:
            self._append(log, state, rng)

    def _append(self, log: CommitLog, state: State, rng: Random) -> None:
        revision = log.revision + 1
        self.attempts += 1
        attempt = self.attempts
        chunks = rng.choice((0, 0, 7))
        value_bytes = rng.choice((20, 900, 2500))
        frame = make_attempt(revision, attempt, chunks=chunks, value_bytes=value_bytes)
        self.unknown = {revision: attempt}
        try:
            position = log.append(frame)
        except StorageFullError:
            # Nothing of it was kept, so it may not be served, now or later.
            self.unknown.clear()
            self.refused += 1
        else:
            self.unknown.clear()
            self.acked[revision] = attempt
            state.put(position, frame)


def make_attempt(revision: int, attempt: int, *, chunks: int, value_bytes: int) -> Frame:
    """Return a frame of one row that names the attempt, and maybe chunks that do."""
    rows = Rows(
        revisions=[revision],
        ops=[1],
        sessions=[f"s{revision % 5}"],
        collections=[COLLECTION],
        keys=[f"{revision:06d}"],
        values=[f"{attempt} {chunks}".ljust(value_bytes).encode()],
    )
    return Frame(revision, 1, rows, make_chunks(attempt, chunks) if chunks else None)


class State:
    """The rows that a log holds, as a store would recover them."""

    def __init__(self, log: CommitLog) -> None:
        self.log = log
        self.attempts: dict[int, int] = {}
        self._chunks: dict[int, tuple[Position, int]] = {}
        self._changed: set[str] = set()
        snapshot = log.snapshot()
        if snapshot is not None:
            for _, key, _, value in snapshot.scan(COLLECTION):
                self._put(int(key), *map(int, value.split()))
        for position, frame in log.frames(snapshot.revision if snapshot else 0):
            self.put(position, frame)

    def put(self, position: Position, frame: Frame) -> None:
        """Apply a frame."""
        value = frame.rows.values[0]
        assert value is not None
        attempt, chunks = map(int, value.split())
        self._changed.add(frame.rows.sessions[0])
        self._put(frame.rows.revisions[0], attempt, chunks, *position)

    def check_chunks(self) -> None:
        """Assert that the chunks of every frame can be read where they were put."""
        for revision, (position, count) in self._chunks.items():
            expected = make_chunks(self.attempts[revision], count)
            assert self.log.read_chunks(position, 0, count) == expected

    def take_snapshot(self) -> None:
        """Write a snapshot of the sessions that changed since the last one."""
        sessions: dict[str, list[SessionRow]] = {name: [] for name in sorted(self._changed)}
        for revision, attempt in self.attempts.items():
            rows = sessions.get(f"s{revision % 5}")
            if rows is not None:
                position, count = self._chunks.get(revision, (Position(0, 0), 0))
                value = f"{attempt} {count} {position.segment} {position.offset}".encode()
                rows.append((COLLECTION, f"{revision:06d}", revision, value))
        writer = self.log.begin_snapshot(self.log.revision)
        try:
            for _ in writer.merge(sessions.items()):
                pass
            writer.finish()
        except StorageError:
            writer.abort()
            raise
        self._changed.clear()

    def _put(self, revision: int, attempt: int, chunks: int, segment: int, offset: int) -> None:
        assert self.attempts.get(revision, attempt) == attempt, "one revision, two contents"
        self.attempts[revision] = attempt
        if chunks:
            self._chunks[revision] = (Position(segment, offset), chunks)
