from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from aidb_ray.errors import (
    CompactedError,
    ConfigError,
    CorruptionError,
    StorageError,
    StorageFullError,
    StoreLockedError,
    StoreMismatchError,
)
from aidb_ray.store.changes import ChunkColumns
from aidb_ray.store.chunk_files import ChunkReader
from aidb_ray.store.columns import ERASED, from_arrow
from aidb_ray.store.files import FileSystem
from aidb_ray.store.frames import Frame
from aidb_ray.store.log import CommitLog, MemoryLog, Position, create_store
from aidb_ray.store.segments import chunks_path, segment_numbers, segment_path
from aidb_ray.store.streams import Span
from tests.faults import CallKind, Fault, FaultyFiles
from tests.frame_builders import (
    STORE_UUID,
    create,
    fill,
    make_chunks,
    make_frame,
    make_rows,
    open_log,
    read_back,
)

HEAD_BYTES = 96


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return create(tmp_path)


def segments(store: Path) -> list[int]:
    return segment_numbers(os.listdir(store / "log"))


def last_segment(store: Path) -> Path:
    return segment_path(store / "log", segments(store)[-1])


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_what_was_appended_comes_back_in_order(store: Path) -> None:
    log = open_log(store)
    frames = [make_frame(1), make_frame(2, 3, chunks=4), make_frame(5, 0), make_frame(5, 2)]
    positions = [log.append(frame) for frame in frames]
    assert log.revision == 6

    assert list(log.frames(0)) == list(zip(positions, frames, strict=True))
    log.close()

    log = open_log(store)
    assert list(log.frames(0)) == list(zip(positions, frames, strict=True))
    assert (log.revision, log.torn_bytes) == (6, 0)
    log.close()


@pytest.mark.parametrize(
    ("after", "first"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (5, 3), (6, 4)]
)
def test_frames_after_a_revision(store: Path, after: int, first: int) -> None:
    """A frame without commits bears the next revision, so it comes after the one before."""
    log = open_log(store)
    frames = [make_frame(1), make_frame(2, 3), make_frame(5, 0), make_frame(5, 2)]
    for frame in frames:
        log.append(frame)

    assert [frame for _, frame in log.frames(after)] == frames[first:]
    log.close()


def test_frames_are_found_across_segments(store: Path) -> None:
    log = open_log(store, segment_bytes=4096)
    fill(log, 60)
    assert len(segments(store)) > 5

    for after in range(61):
        assert [frame.first_revision for _, frame in log.frames(after)] == list(
            range(after + 1, 61)
        )
    log.close()
    assert read_back(store) == list(range(1, 61))


def test_who_reads_while_a_segment_begins_finds_every_frame(store: Path) -> None:
    log = open_log(store, segment_bytes=4096)
    seen: list[list[int]] = []

    class Door:
        """Stands where the segments change, and reads as another thread may."""

        def __enter__(self) -> None:
            self._read()

        def __exit__(self, *_: object) -> None:
            self._read()

        def _read(self) -> None:
            seen.append([frame.first_revision for _, frame in log.frames(0)])

    log._writer._mutex = cast("Any", Door())
    read: list[int] = []
    while len(segments(store)) < 3:
        fill(log, 1)
        assert all(each == read for each in seen), "what was durable before, all of it"
        seen.clear()
        read.append(log.revision)
    log.close()


def test_a_frame_larger_than_a_segment_gets_one_of_its_own(store: Path) -> None:
    log = open_log(store, segment_bytes=4096)
    log.append(make_frame(1))
    log.append(make_frame(2, 3, value_bytes=5000))
    log.append(make_frame(5))
    log.close()

    assert read_back(store) == [1, 2, 3, 4, 5]


def test_a_frame_must_continue_the_log(store: Path) -> None:
    log = open_log(store)
    with pytest.raises(ValueError, match="begin with revision 1, not 2"):
        log.append(make_frame(2))
    log.close()


def test_chunks_are_read_by_position(store: Path) -> None:
    log = open_log(store)
    first, second = log.append(make_frame(1, chunks=10)), log.append(make_frame(2, chunks=900))

    assert log.read_chunks(first, 0, 10) == make_chunks(1, 10)
    assert log.read_chunks(second, 800, 50) == make_chunks(2, 900).slice(800, 50)
    assert log.read_chunks(log.append(make_frame(3)), 0, 5).num_rows == 0
    log.close()


def test_damaged_chunks_are_never_served(store: Path) -> None:
    log = open_log(store)
    position = log.append(make_frame(1, chunks=200))
    fill(log, 1)
    damage(last_segment(store), position.offset + 2000, b"\x01\x02\x03")

    for _ in range(2):
        with pytest.raises(CorruptionError) as caught:
            log.read_chunks(position, 0, 1)
        assert (caught.value.first_revision, caught.value.last_revision) == (1, 1)
    with pytest.raises(CorruptionError):
        log.read_chunks(Position(position.segment, position.offset + 8), 0, 1)
    with pytest.raises(CorruptionError, match="missing"):
        log.read_chunks(Position(99, 88), 0, 1)
    log.close()


def test_each_opening_has_a_greater_epoch(store: Path) -> None:
    for epoch in range(1, 5):
        log = open_log(store)
        assert log.epoch == epoch
        (CommitLog.abandon if epoch % 2 else CommitLog.close)(log)


def test_an_epoch_is_not_used_again_when_meta_comes_from_a_backup(store: Path) -> None:
    meta = (store / "META").read_bytes()
    for epoch in (1, 2, 3):
        log = open_log(store)
        assert log.epoch == epoch
        fill(log, 1)
        log.abandon()
    (store / "META").write_bytes(meta)

    log = open_log(store)
    assert log.epoch == 4
    log.close()


def test_a_frame_that_nothing_proves_durable_is_written_anew(store: Path) -> None:
    log = open_log(store)
    positions = fill(log, 3, chunks=2)
    log.abandon()

    log = open_log(store)
    moved = [position for position, _ in log.frames(0)]
    assert moved == [*positions[:2], Position(1, HEAD_BYTES)]
    # A snapshot may know the old place only if it proves the frame durable; then it stays.
    fill(log, 1)
    log.close()
    assert read_back(store) == [1, 2, 3, 4]
    assert len(segments(store)) == 2


def test_a_closed_log_goes_on_in_place(store: Path) -> None:
    for _ in range(3):
        log = open_log(store)
        fill(log, 2)
        log.close()

    assert segments(store) == [0]
    assert read_back(store) == list(range(1, 7))


def test_a_log_without_new_frames_goes_on_in_place_even_after_a_crash(store: Path) -> None:
    log = open_log(store)
    fill(log, 1)
    for _ in range(4):
        log.abandon()
        log = open_log(store)
    log.close()

    assert segments(store) == [0, 1]


@pytest.mark.parametrize("before", ["closed", "killed"])
@pytest.mark.parametrize("cut", [1, 7, 63, 64, 65, 300, 700, 1500, -15, -1])
def test_a_torn_write_is_cut_and_the_log_goes_on(
    store: Path, before: str, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_log(store)
    fill(log, 3)
    if before == "closed":
        log.close()
        log = open_log(store)
    offset = log.append(make_frame(4, 12)).offset
    end = log._writer.tail.offset
    log.abandon()
    path = last_segment(store)
    with path.open("r+b") as file:
        file.truncate((end if cut < 0 else offset) + cut)
        file.truncate(1 << 16)
    left = len(path.read_bytes()[offset:].rstrip(b"\0"))

    log = open_log(store)
    assert log.torn_bytes == left > 0
    assert log.revision == 3
    assert f"cutting {left} bytes of a torn write" in caplog.text
    fill(log, 2)
    log.close()
    assert read_back(store) == [1, 2, 3, 4, 5]


def test_a_torn_write_may_have_lost_any_sector(store: Path) -> None:
    log = open_log(store)
    fill(log, 2)
    position = log.append(make_frame(3, 30))
    tail = log._writer.tail.offset
    log.abandon()
    path = last_segment(store)
    for start in range(position.offset // 512 * 512 + 512, tail, 512):
        shutil.copytree(store, copy := store.parent / f"lost-{start}")
        damage(segment_path(copy / "log", 0), start, bytes(min(512, tail - start)))
        assert read_back(copy) == [1, 2]
    assert path.exists()


@pytest.mark.parametrize("offset", [0, 4, 16, 40, 60, 63, 70, 200, 500])
def test_a_flipped_bit_in_the_last_frame_is_not_taken_for_a_torn_write(
    store: Path, offset: int
) -> None:
    log = open_log(store)
    position = fill(log, 3)[-1]
    log.abandon()
    path = last_segment(store)
    content = path.read_bytes()
    at = position.offset + offset
    damage(path, at, bytes([content[at] ^ 8]))
    damaged = path.read_bytes()

    with pytest.raises(CorruptionError) as caught:
        open_log(store)
    assert (caught.value.file, caught.value.offset) == (str(path), position.offset)
    assert caught.value.first_revision == 3
    assert path.read_bytes() == damaged, "nothing may be changed"
    damage(path, at, content[at : at + 1])
    assert read_back(store) == [1, 2, 3]


def test_damage_names_the_revisions_between_the_good_frames(store: Path) -> None:
    log = open_log(store)
    positions = fill(log, 2)
    positions.append(log.append(make_frame(3, 4)))
    positions += fill(log, 2)
    log.close()
    damage(last_segment(store), positions[2].offset, bytes(64))

    with pytest.raises(CorruptionError) as caught:
        open_log(store)
    assert (caught.value.offset, caught.value.first_revision, caught.value.last_revision) == (
        positions[2].offset,
        3,
        6,
    )


def test_what_was_durable_on_closing_is_missed(store: Path) -> None:
    """Cut at a frame boundary the log looks whole, but META knows better."""
    log = open_log(store)
    positions = fill(log, 3)
    log.close()
    with last_segment(store).open("r+b") as file:
        file.truncate(positions[-1].offset)

    with pytest.raises(CorruptionError, match="missing") as caught:
        open_log(store)
    assert caught.value.first_revision == 3


@pytest.mark.parametrize("index", [0, 1, 3, -2, -1])
def test_a_missing_segment_is_named(store: Path, index: int) -> None:
    log = open_log(store, segment_bytes=4096)
    fill(log, 40)
    log.abandon()
    missing = segment_path(store / "log", segments(store)[index])
    missing.unlink()

    with pytest.raises(CorruptionError, match=missing.name):
        open_log(store)


def test_no_segment_at_all_is_damage(store: Path) -> None:
    (store / "log" / segment_path(store / "log", 0).name).unlink()

    with pytest.raises(CorruptionError, match="missing"):
        open_log(store)


def test_a_frame_from_before_is_seen_by_its_successor(store: Path) -> None:
    """Each frame alone is valid in that place; only the chain tells."""
    log = open_log(store)
    fill(log, 1)
    log.close()
    shutil.copytree(store, other := store.parent / "other")
    log = open_log(other)
    log.append(Frame(2, 1, make_rows([9])))
    stale = last_segment(other).read_bytes()
    log.close()
    log = open_log(store)
    fill(log, 2)
    start, end = (place.offset for place, _ in log.frames(1))
    log.close()
    damage(last_segment(store), start, stale[start:end])

    with pytest.raises(CorruptionError, match="does not continue"):
        open_log(store)


def test_a_segment_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    create_store(
        other, FileSystem(), store_uuid="another", database="test", partition=0, partitions=1
    )
    shutil.copy(segment_path(other / "log", 0), segment_path(store / "log", 0))

    with pytest.raises(CorruptionError, match="head"):
        open_log(store)


def test_opening_never_creates(tmp_path: Path) -> None:
    with pytest.raises(StoreMismatchError, match="no store") as caught:
        open_log(tmp_path / "absent")
    assert caught.value.code == "store_missing"
    assert not (tmp_path / "absent").exists()


def test_a_store_is_created_once(store: Path) -> None:
    with pytest.raises(StoreMismatchError) as caught:
        create(store.parent)
    assert caught.value.code == "store_exists"


def test_a_creation_that_was_interrupted_may_be_repeated(store: Path) -> None:
    (store / "META").unlink()

    with pytest.raises(StoreMismatchError):
        open_log(store)
    assert create(store.parent) == store
    assert read_back(store) == []


def test_files_are_private(store: Path) -> None:
    log = open_log(store)
    fill(log, 1)
    log.close()

    for path in [store, *store.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_missing_meta_stops_and_touches_nothing(store: Path) -> None:
    log = open_log(store)
    fill(log, 2)
    log.close()
    meta = (store / "META").read_bytes()
    (store / "META").unlink()
    before = sorted(path.name for path in store.rglob("*"))

    with pytest.raises(StoreMismatchError) as caught:
        open_log(store)
    assert caught.value.code == "store_missing"
    assert sorted(path.name for path in store.rglob("*")) == before
    (store / "META").write_bytes(meta)
    assert read_back(store) == [1, 2]


def test_damaged_meta_is_corruption(store: Path) -> None:
    meta = (store / "META").read_bytes()
    for at in range(len(meta)):
        (store / "META").write_bytes(meta[:at] + bytes([meta[at] ^ 1]) + meta[at + 1 :])
        with pytest.raises(CorruptionError):
            open_log(store)
        (store / "META").write_bytes(meta[:at])
        with pytest.raises(CorruptionError):
            open_log(store)


def test_another_store_is_refused(store: Path) -> None:
    with pytest.raises(StoreMismatchError, match=STORE_UUID):
        CommitLog.open(store, FileSystem(), expected_uuid="someone-else")


def test_a_locked_store_names_its_holder(store: Path) -> None:
    log = open_log(store)

    with pytest.raises(StoreLockedError) as caught:
        open_log(store)
    assert caught.value.pid == os.getpid()
    assert caught.value.host
    log.close()
    open_log(store).close()
    assert (store / "LOCK").exists()


def test_a_forked_child_does_not_keep_the_lock(store: Path) -> None:
    log = open_log(store)
    to_child, to_parent = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(to_child[1])
        os.write(to_parent[1], b"!")
        os.read(to_child[0], 1)
        os._exit(0)
    assert os.read(to_parent[0], 1) == b"!"
    try:
        log.abandon()
        open_log(store).close()
    finally:
        for fd in (*to_child, *to_parent):
            os.close(fd)
        os.waitpid(child, 0)


def test_a_link_is_refused(store: Path) -> None:
    link = store.parent / "link"
    link.symlink_to(store)

    with pytest.raises(ConfigError, match="link"):
        open_log(link)


def test_a_network_file_system_is_refused(store: Path) -> None:
    class Remote(FileSystem):
        def filesystem_type(self, path: Path) -> str:
            return "nfs4"

    with pytest.raises(ConfigError, match="nfs4"):
        open_log(store, Remote())


def test_the_file_system_is_named(store: Path) -> None:
    log = open_log(store)
    fill(log, 2, chunks=3)
    stats = log.stats
    log.close()

    assert stats.filesystem_type not in ("", "memory")
    assert (stats.frames, stats.rows) == (2, 2)
    assert stats.fdatasyncs == 3, "one of them for the segment"
    assert stats.bytes > 1000


def test_a_full_disk_keeps_nothing_and_is_got_over(store: Path) -> None:
    files = FaultyFiles(store)
    log = open_log(store, files, segment_bytes=4096)
    fill(log, 2)
    files.free = 0
    tail = log._writer.tail

    refused = 0
    while log.revision < 12:
        try:
            fill(log, 1)
        except StorageFullError:
            refused += 1
            assert [frame.first_revision for _, frame in log.frames(0)] == list(
                range(1, log.revision + 1)
            )
            if refused == 3:
                files.free = 1 << 20
    assert refused == 3
    assert log._writer.tail.segment > tail.segment
    log.close()
    assert read_back(store) == list(range(1, 13))


def test_a_write_that_only_half_fits_is_undone(store: Path) -> None:
    """Where space is not really reserved ahead, the write itself meets the full disk."""

    class Unreserved(FaultyFiles):
        is_full = False

        def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            if self.is_full and len(data) < 150 and any(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(fd, data[: 1 + len(data) // 2], offset)

    files = Unreserved(store)
    log = open_log(store, files)
    fill(log, 2)
    files.is_full = True
    before = last_segment(store).read_bytes()

    with pytest.raises(StorageFullError):
        fill(log, 1)
    assert last_segment(store).read_bytes() == before, "neither a byte nor the length"
    shutil.copytree(store, copy := store.parent / "copy")
    (copy / "LOCK").unlink()
    assert read_back(copy) == [1, 2]
    files.is_full = False
    fill(log, 3)
    log.close()
    assert read_back(store) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("frames", [1, 3, 60])
def test_a_live_segment_that_was_cut_is_named(store: Path, frames: int) -> None:
    """Zeros reserved ahead are missed as much as frames; the head of the segment tells."""
    log = open_log(store)
    ends = [*(place.offset for place in fill(log, frames)), log._writer.tail.offset]
    log.abandon()
    path = last_segment(store)
    good = path.read_bytes()
    assert len(good) == 1 << 16

    for length in (0, HEAD_BYTES - 1, *ends, ends[-1] // 10, ends[-1] + 1, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptionError) as caught:
            open_log(store)
        assert caught.value.file == str(path)
        assert caught.value.offset == (length if length >= HEAD_BYTES else 0)
        assert path.read_bytes() == good[:length], "nothing may be changed"
    path.write_bytes(good)
    assert read_back(store) == list(range(1, frames + 1))


def test_a_segment_keeps_the_size_it_was_made_with(store: Path) -> None:
    """Also when it is opened with another, and when a frame needs more than that."""
    for segment_bytes in (4096, 1 << 14, 2048):
        log = open_log(store, segment_bytes=segment_bytes)
        fill(log, 12)
        log.append(make_frame(log.revision + 1, value_bytes=20_000))
        assert last_segment(store).stat().st_size > 20_000
        fill(log, 1)
        head = log._writer.heads[-1]
        assert last_segment(store).stat().st_size == head.size == segment_bytes
        (CommitLog.close if segment_bytes == 4096 else CommitLog.abandon)(log)
    assert read_back(store) == list(range(1, 43))


def test_short_writes_are_continued(store: Path) -> None:
    files = FaultyFiles(store)
    files.short_writes = True
    log = open_log(store, files)
    fill(log, 5, chunks=20)
    log.close()

    assert read_back(store) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_after_a_failed_sync_the_log_takes_no_more(store: Path, error: int) -> None:
    files = FaultyFiles(store)
    log = open_log(store, files)
    fill(log, 2)
    files.fault = Fault(frozenset({"sync_data"}), at=1, error=error)

    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            fill(log, 1)
        assert caught.value.code == "sync_failed"
    assert files.hits == 1
    assert files.calls["sync_data"] == log.stats.fdatasyncs + 2, "META's, and the failed one"
    assert log.revision == 2
    log.close()
    assert read_back(store) in ([1, 2], [1, 2, 3])


def test_recovery_finds_space_in_the_reserve(store: Path) -> None:
    CommitLog.open(
        store, FileSystem(), expected_uuid=None, segment_bytes=1 << 16, reserve_bytes=1 << 17
    ).close()
    log = open_log(store)
    fill(log, 2)
    log.abandon()
    files = FaultyFiles(store)
    files.free = 0

    log = CommitLog.open(
        store, files, expected_uuid=None, segment_bytes=1 << 16, reserve_bytes=1 << 17
    )
    fill(log, 1)
    log.close()
    assert not (store / "RESERVE").exists() or (store / "RESERVE").stat().st_size == 0
    assert read_back(store) == [1, 2, 3]


def test_a_directory_that_cannot_be_written_says_so(store: Path) -> None:
    files = FaultyFiles(store, fault=Fault(frozenset({"rename"}), at=1, error=errno.EROFS))

    with pytest.raises(StorageError, match="EROFS"):
        open_log(store, files)
    open_log(store).close()


def test_drafts_of_a_crash_are_removed(store: Path) -> None:
    (store / "log" / "seg-0000000000000001.log.tmp").write_bytes(b"half")
    (store / "snap" / "snap-0000000000000001.snap.tmp").write_bytes(b"half")

    assert read_back(store) == []
    assert not list(store.rglob("*.tmp"))


def take_snapshot(log: CommitLog) -> None:
    rows = make_rows(range(1, log.revision + 1))
    writer = log.begin_snapshot(log.revision)
    by_session: dict[str, list[tuple[str, str, int, bytes]]] = {}
    for at, session in enumerate(rows.sessions):
        value = rows.values[at]
        assert value is not None
        line = (rows.collections[at], rows.keys[at], rows.revisions[at], value)
        by_session.setdefault(session, []).append(line)
    for _ in writer.merge(sorted(by_session.items())):
        pass
    writer.finish()


def test_compaction_keeps_what_the_older_snapshot_needs(store: Path) -> None:
    log = open_log(store, segment_bytes=4096)
    fill(log, 30)
    log.compact()
    take_snapshot(log)
    log.compact()
    assert log.oldest_revision() == 0, "one snapshot alone could be damaged"

    fill(log, 30)
    take_snapshot(log)
    log.compact()
    assert 20 < log.oldest_revision() <= 30
    assert [frame.first_revision for _, frame in log.frames(30)] == list(range(31, 61))
    with pytest.raises(CompactedError) as caught:
        list(log.frames(3))
    assert caught.value.oldest == log.oldest_revision()
    log.close()

    log = open_log(store, segment_bytes=4096)
    assert [frame.first_revision for _, frame in log.frames(30)] == list(range(31, 61))
    log.close()


def test_compaction_keeps_chunks_and_their_positions(store: Path) -> None:
    log = open_log(store, segment_bytes=8192)
    positions = fill(log, 40, chunks=9)
    plain = fill(log, 40)
    for _ in range(2):
        take_snapshot(log)
        fill(log, 1)
    log.compact()
    assert segments(store)[0] > plain[-1].segment - 2
    assert chunks_path(store / "log", 0).exists()
    assert not chunks_path(store / "log", plain[-3].segment).exists()

    for _ in range(2):
        for revision, position in enumerate(positions, start=1):
            assert log.read_chunks(position, 0, 9) == make_chunks(revision, 9)
        log.close()
        log = open_log(store, segment_bytes=8192)
    with pytest.raises(CorruptionError):
        log.read_chunks(Position(0, HEAD_BYTES + 8), 0, 9)
    log.close()


def test_damaged_chunk_files_are_never_served(store: Path) -> None:
    log = open_log(store, segment_bytes=8192)
    positions = fill(log, 30, chunks=9)
    for _ in range(2):
        take_snapshot(log)
        fill(log, 1)
    log.compact()
    log.close()
    path = chunks_path(store / "log", 0)
    content = path.read_bytes()
    kept = sum(position.segment == 0 for position in positions)
    asked = served = rounds = 0

    for at in range(0, len(content), 61):
        rounds += 1
        damage(path, at, bytes([content[at] ^ 2]))
        log = open_log(store, segment_bytes=8192)
        for revision, position in enumerate(positions, start=1):
            if position.segment == 0:
                with suppress(CorruptionError):
                    served += log.read_chunks(position, 0, 9) == make_chunks(revision, 9)
                    asked += 1
        log.close()
        damage(path, at, content[at : at + 1])
    assert served == asked
    assert 0 < served <= rounds * (kept - 1)


def test_a_damaged_older_snapshot_stops_compaction(store: Path) -> None:
    log = open_log(store, segment_bytes=4096)
    fill(log, 30)
    take_snapshot(log)
    fill(log, 30)
    take_snapshot(log)
    snapshots = sorted((store / "snap").iterdir())
    damage(snapshots[0], 10, b"\xff\xff\xff")

    with pytest.raises(CorruptionError, match=snapshots[0].name):
        log.compact()
    assert log.oldest_revision() == 0
    assert [frame.first_revision for _, frame in log.frames(0)] == list(range(1, 61))
    log.close()


def test_a_damaged_snapshot_is_passed_over_loudly(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_log(store, segment_bytes=4096)
    for _ in range(3):
        fill(log, 30)
        take_snapshot(log)
        log.compact()
    log.close()
    older, newest = sorted((store / "snap").iterdir())
    damage(newest, newest.stat().st_size - 5, b"\xff")

    with caplog.at_level(logging.ERROR):
        log = open_log(store, segment_bytes=4096)
    assert newest.name in caplog.text
    snapshot = log.snapshot()
    assert snapshot is not None
    assert snapshot.revision == 60
    assert [frame.first_revision for _, frame in log.frames(60)] == list(range(61, 91))
    log.close()

    damage(older, older.stat().st_size - 5, b"\xff")
    with pytest.raises(CorruptionError, match="no snapshot stands for it"):
        open_log(store)


def test_a_log_that_ends_before_its_snapshot_is_damaged(store: Path) -> None:
    log = open_log(store)
    fill(log, 3)
    shutil.copytree(store, copy := store.parent / "copy")
    fill(log, 3)
    take_snapshot(log)
    log.close()
    shutil.copytree(store / "snap", copy / "snap", dirs_exist_ok=True)

    with pytest.raises(CorruptionError):
        open_log(copy)


def test_an_interrupted_compaction_is_done_again(store: Path) -> None:
    files = FaultyFiles(store)
    log = open_log(store, files, segment_bytes=4096)
    positions = fill(log, 30, chunks=3)
    for _ in range(2):
        take_snapshot(log)
        fill(log, 1)
    files.fault = Fault(frozenset({"unlink"}), at=3)
    with pytest.raises(StorageError):
        log.compact()
    log.abandon()

    log = open_log(store, segment_bytes=4096)
    log.compact()
    assert segments(store)[0] >= positions[-1].segment
    for revision, position in enumerate(positions, start=1):
        assert log.read_chunks(position, 0, 3) == make_chunks(revision, 3)
    log.close()


def test_a_log_in_memory_numbers_frames_and_keeps_chunks() -> None:
    log = MemoryLog(store_uuid=STORE_UUID, database="test")
    first = log.append(make_frame(1, 2, chunks=5))
    second = log.append(make_frame(3, chunks=7))

    assert log.revision == log.oldest_revision() == 3
    assert log.read_chunks(first, 1, 2) == make_chunks(1, 5).slice(1, 2)
    assert log.read_chunks(second, 0, 7) == make_chunks(3, 7)
    assert log.snapshot() is None
    assert list(log.frames(3)) == []
    with pytest.raises(CompactedError):
        log.frames(2)
    with pytest.raises(ValueError, match="begin with revision 4"):
        log.append(make_frame(9))
    assert (log.stats.frames, log.stats.rows, log.stats.fdatasyncs) == (2, 3, 0)


def compacted(store: Path, files: FileSystem | None = None) -> tuple[CommitLog, list[Position]]:
    """Return a log whose first segments were compacted, and where its first 30 frames lie."""
    log = open_log(store, files, segment_bytes=8192)
    positions = fill(log, 30, chunks=9)
    for _ in range(2):
        take_snapshot(log)
        fill(log, 1)
    log.compact()
    assert log.oldest_revision() > 20
    return log, [position for position in positions if position.segment <= 1]


def garbage_in(positions: Iterable[Position], start: int, count: int) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = {}
    for segment, offset in positions:
        found.setdefault(segment, []).append(Span(offset, start, count))
    return found


def test_garbage_is_dropped_when_a_segment_is_compacted(store: Path) -> None:
    log = open_log(store, segment_bytes=8192)
    positions = [position for position in fill(log, 40, chunks=9) if position.segment < 2]
    for _ in range(2):
        take_snapshot(log)
        fill(log, 1)
    whole, part = positions[::2], positions[1::2]
    garbage = garbage_in(whole, 0, 9)
    for segment, spans in garbage_in(part, 2, 3).items():
        garbage[segment] += spans

    assert log.compact(garbage) == {0, 1}

    for position in whole:
        with pytest.raises(CorruptionError, match="missing"):
            log.read_chunks(position, 0, 9)
    for position in part:
        revision = 1 + positions.index(position)
        assert log.read_chunks(position, 0, 2) == make_chunks(revision, 9).slice(0, 2)
        assert log.read_chunks(position, 5, 4) == make_chunks(revision, 9).slice(5, 4)
        assert from_arrow(log.read_chunks(position, 2, 3)) == ChunkColumns(
            bytes([ERASED] * 3), bytes(12), b""
        )
    log.close()


def test_garbage_of_a_segment_that_is_not_compacted_yet_waits(store: Path) -> None:
    log = open_log(store, segment_bytes=8192)
    positions = fill(log, 30, chunks=9)

    assert log.compact(garbage_in(positions, 0, 9)) == set()

    assert log.read_chunks(positions[0], 0, 9) == make_chunks(1, 9)
    log.close()


def test_garbage_is_erased_from_what_was_compacted_before(store: Path) -> None:
    log, positions = compacted(store)
    size = chunks_path(store / "log", 0).stat().st_size
    kept = positions[1]
    for position in positions:
        log.read_chunks(position, 0, 9)

    gone = [position for position in positions if position != kept]
    assert log.compact(garbage_in(gone, 0, 9)) == {0, 1}

    assert log.read_chunks(kept, 0, 9) == make_chunks(2, 9)
    for position in gone:
        with pytest.raises(CorruptionError, match="missing"):
            log.read_chunks(position, 0, 9)
    assert chunks_path(store / "log", 0).stat().st_size < size / 2
    assert not chunks_path(store / "log", 1).exists()
    assert log.compact(garbage_in(gone, 0, 9)) == {0, 1}, "done already, and again no harm"
    log.close()
    log = open_log(store, segment_bytes=8192)
    assert log.read_chunks(kept, 0, 9) == make_chunks(2, 9)
    log.close()


def test_a_reader_whose_file_was_replaced_finds_the_chunks_where_they_lie_now(store: Path) -> None:
    log, positions = compacted(store)
    kept = positions[-1]
    reader = ChunkReader(FileSystem(), store / "log", log._meta.salt)
    reader.read(next(position for position in positions if position.segment == kept.segment))

    log.compact(garbage_in(positions[:-1], 0, 9))

    assert reader.read(kept) == make_chunks(len(positions), 9)
    log.close()


@pytest.mark.parametrize("call", ["write", "sync_data", "rename", "sync_directory", "unlink"])
def test_an_interrupted_erasure_leaves_all_chunks_that_are_kept(
    store: Path, call: CallKind
) -> None:
    files = FaultyFiles(store)
    log, positions = compacted(store, files)
    kept = positions[1]
    garbage = garbage_in([position for position in positions if position != kept], 0, 9)
    files.fault = Fault(frozenset({call}), at=1)

    with pytest.raises(StorageError):
        log.compact(garbage)
    log.abandon()

    log = open_log(store, segment_bytes=8192)
    assert log.read_chunks(kept, 0, 9) == make_chunks(2, 9)
    assert log.compact(garbage) == {0, 1}
    assert log.read_chunks(kept, 0, 9) == make_chunks(2, 9)
    assert not chunks_path(store / "log", 1).exists()
    assert not list(store.rglob("*.tmp"))
    log.close()


def test_a_damaged_file_of_chunks_is_not_written_anew(store: Path) -> None:
    log, positions = compacted(store)
    path = chunks_path(store / "log", 0)
    damage(path, path.stat().st_size - 20, b"\xff\xff")
    content = path.read_bytes()

    with pytest.raises(CorruptionError, match=path.name):
        log.compact(garbage_in(positions[:1], 0, 9))

    assert path.read_bytes() == content
    log.close()


def test_a_log_in_memory_forgets_frames_that_are_all_garbage() -> None:
    log = MemoryLog(store_uuid=STORE_UUID, database="test")
    first, second = log.append(make_frame(1, chunks=5)), log.append(make_frame(2, chunks=5))

    assert log.compact(garbage_in([first], 0, 2)) == {0}
    assert log.read_chunks(first, 2, 3) == make_chunks(1, 5).slice(2, 3)
    log.compact(garbage_in([first], 2, 3))

    with pytest.raises(KeyError):
        log.read_chunks(first, 0, 1)
    assert log.read_chunks(second, 0, 5) == make_chunks(2, 5)
