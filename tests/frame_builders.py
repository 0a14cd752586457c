"""Frames to put into a log, and what a reader should find there again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from aidb_ray.store.files import FileSystem
from aidb_ray.store.frames import CHUNK_SCHEMA, Frame, Rows
from aidb_ray.store.log import CommitLog, Position, create_store

STORE_UUID = "5f0c9a2e-store"


def make_rows(revisions: Iterable[int], *, value_bytes: int = 40) -> Rows:
    """Return one row per revision, told apart by its value."""
    numbers = list(revisions)
    return Rows(
        revisions=numbers,
        ops=[1] * len(numbers),
        sessions=[f"aidb://support/{number % 7}" for number in numbers],
        collections=["messages"] * len(numbers),
        keys=[f"m-{number}" for number in numbers],
        values=[f'{{"n":{number}}}'.ljust(value_bytes, " ").encode() for number in numbers],
    )


def make_frame(first: int, commits: int = 1, *, chunks: int = 0, value_bytes: int = 40) -> Frame:
    """Return a frame of `commits` commits of one row each, and maybe chunks."""
    batch = make_chunks(first, chunks) if chunks else None
    return Frame(first, commits, make_rows(range(first, first + commits), value_bytes=value_bytes),
                 batch)  # fmt: skip


def make_chunks(seed: int, count: int) -> pa.RecordBatch:
    """Return chunks whose text names `seed` and their index."""
    return pa.RecordBatch.from_pylist(
        [{"type": at % 9, "payload": f"{seed}:{at}"} for at in range(count)], schema=CHUNK_SCHEMA
    )


def create(directory: Path, files: FileSystem | None = None) -> Path:
    """Create an empty store in `directory` and return where."""
    path = directory / "store"
    create_store(
        path,
        files or FileSystem(),
        store_uuid=STORE_UUID,
        database="test",
        partition=0,
        partitions=1,
    )
    return path


def open_log(
    path: Path, files: FileSystem | None = None, *, segment_bytes: int = 1 << 16
) -> CommitLog:
    """Open a store with small segments and no reserve."""
    return CommitLog.open(
        path,
        files or FileSystem(),
        expected_uuid=STORE_UUID,
        segment_bytes=segment_bytes,
        reserve_bytes=0,
    )


def fill(log: CommitLog, count: int, *, chunks: int = 0, value_bytes: int = 40) -> list[Position]:
    """Append `count` frames of one commit each and return where they lie."""
    return [
        log.append(make_frame(log.revision + 1, chunks=chunks, value_bytes=value_bytes))
        for _ in range(count)
    ]


def read_back(path: Path, after: int = 0, files: FileSystem | None = None) -> list[int]:
    """Open a store, check every row against its revision, and return the revisions served."""
    log = open_log(path, files)
    try:
        revisions: list[int] = []
        for position, frame in log.frames(after):
            expected = make_rows(frame.rows.revisions, value_bytes=len(frame.rows.values[0] or b""))
            assert frame.rows == expected
            assert frame.rows.revisions == list(
                range(frame.first_revision, frame.first_revision + frame.commits)
            )
            if frame.chunks is not None:
                chunks = log.read_chunks(position, 0, frame.chunks.num_rows)
                assert chunks == make_chunks(frame.first_revision, frame.chunks.num_rows)
            revisions.extend(frame.rows.revisions)
        assert log.revision == (revisions[-1] if revisions else after)
    finally:
        log.close()
    return revisions
