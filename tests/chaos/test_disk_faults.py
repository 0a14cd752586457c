"""Disks that fill up, fail to sync, or lose power at every possible call.

Each checker below is run against the log as it is, and against versions of it with one known
mistake, which it has to catch.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest

from aidb_ray.errors import AidbError, StorageError, StorageFullError
from aidb_ray.store import recovery
from aidb_ray.store.directory import StoreDirectory
from aidb_ray.store.recovery import Recovered
from aidb_ray.store.segments import segment_path
from aidb_ray.store.writer import LiveSegment, LogWriter
from tests.chaos.lives import History
from tests.faults import CallKind, Fault, FaultyFiles, PowerCut
from tests.frame_builders import create, fill, make_frame, open_log, read_back

pytestmark = pytest.mark.chaos

FRAMES: Final = 40
SPACE: Final[frozenset[CallKind]] = frozenset(
    {"create", "write", "allocate", "sync_data", "sync_directory", "rename"}
)
SYNCS: Final[frozenset[CallKind]] = frozenset({"sync_data", "sync_directory"})


class Refilling(FaultyFiles):
    """A disk that stays full for a few calls."""

    def _enter(self, kind: CallKind) -> None:
        if self.hits >= 6:
            self.fault = None
        super()._enter(kind)


def check_full_disk(directory: Path, at: int, *, stays: bool) -> History:
    """Let the disk be full at one call, or from then on for some calls, whoever makes them.

    A refused append is tried again by the same process, and a refused opening by the next.
    """
    history = History(create(directory, FaultyFiles(directory)))
    files = Refilling(history.store, fault=Fault(SPACE, at, errno.ENOSPC, stays))
    rng = Random(at)
    for _ in range(8):
        try:
            history.live(files, rng, FRAMES)
        except StorageFullError:
            assert files.hits  # It could not even be opened.
        except StorageError:
            # The disk was full for a sync, so the process has to end.
            assert not files.synced_again
        else:
            break
    assert len(history.acked) == FRAMES, "writes did not go on when there was space again"
    files.power_cut()
    history.live(FaultyFiles(history.store), rng, FRAMES + 10)
    return history


def check_failed_sync(directory: Path, at: int) -> History:
    """Let one sync fail, lose what it did not write, cut the power, and look what is there."""
    history = History(create(directory, FaultyFiles(directory)))
    files = FaultyFiles(history.store, fault=Fault(SYNCS, at))
    rng = Random(at)
    try:
        history.live(files, rng, FRAMES)
    except StorageError:
        assert files.hits == 1
    assert not files.synced_again, "a sync was asked for again"
    files.power_cut()
    history.live(FaultyFiles(history.store), rng, FRAMES + 10)
    return history


def check_power_cuts(directory: Path, seed: int, lives: int) -> History:
    """Cut the power at random calls of one life after the other."""
    history = History(create(directory, FaultyFiles(directory)))
    rng = Random(seed)
    for _ in range(lives):
        files = FaultyFiles(history.store)
        files.cut_at = rng.randint(1, 60)
        try:
            history.live(files, rng, len(history.acked) + 30)
        except PowerCut:
            files.power_cut(rng)
    history.live(FaultyFiles(history.store), rng, len(history.acked) + 3)
    return history


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for a while"])
def test_a_full_disk_at_any_call_loses_nothing(tmp_path: Path, stays: bool) -> None:  # noqa: FBT001
    refused = 0
    for at in range(1, 201):
        refused += check_full_disk(tmp_path / str(at), at, stays=stays).refused
    assert refused > 50
    print(f"full disk: 200 calls, {refused} appends refused")  # noqa: T201


def test_a_failed_sync_at_any_call_loses_nothing_acknowledged(tmp_path: Path) -> None:
    happened = lost = 0
    for at in range(1, 121):
        history = check_failed_sync(tmp_path / str(at), at)
        happened, lost = happened + history.resolved[0], lost + history.resolved[1]
    assert lost > 20
    print(f"failed syncs: 120 calls, unknown outcomes: {happened} had happened, {lost} not")  # noqa: T201


def test_power_cuts_lose_nothing_acknowledged(tmp_path: Path) -> None:
    torn = torn_bytes = happened = lost = acked = 0
    for seed in range(10):
        history = check_power_cuts(tmp_path / str(seed), seed, lives=50)
        torn, torn_bytes = torn + history.torn_tails, torn_bytes + history.torn_bytes
        happened, lost = happened + history.resolved[0], lost + history.resolved[1]
        acked += len(history.acked)
    assert torn > 10
    assert min(happened, lost) > 10
    print(  # noqa: T201
        f"power cuts: 500, {acked} acknowledged, {torn} torn tails of {torn_bytes} bytes, "
        f"unknown outcomes: {happened} had happened, {lost} not"
    )


def check_torn_write(directory: Path, seed: int) -> None:
    """Tear a long write, let a short one follow after a restart, and restart again."""
    rng = Random(seed)
    store = create(directory, FaultyFiles(directory))
    log = open_log(store, FaultyFiles(store))
    fill(log, 3)
    log.close()
    log = open_log(store, FaultyFiles(store))
    position = log.append(make_frame(4, value_bytes=3000))
    log.abandon()
    path = segment_path(store / "log", position.segment)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(position.offset + rng.randint(1, 3000))
        file.truncate(size)
    log = open_log(store, FaultyFiles(store))
    fill(log, 1)
    log.abandon()
    assert read_back(store, files=FaultyFiles(store)) == [1, 2, 3, 4]


def test_nothing_of_a_torn_write_comes_back(tmp_path: Path) -> None:
    for seed in range(1, 41):
        check_torn_write(tmp_path / str(seed), seed)


# Mistakes that the checkers above must catch.


def ack_before_sync(patch: pytest.MonkeyPatch) -> None:
    def sync(self: LogWriter, fd: int) -> None:
        pass

    patch.setattr(LogWriter, "_sync", sync)


def sync_again(patch: pytest.MonkeyPatch) -> None:
    def sync(self: LogWriter, fd: int) -> None:
        try:
            self._files.sync_data(fd)
        except OSError:
            self._files.sync_data(fd)

    patch.setattr(LogWriter, "_sync", sync)


def sync_again_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """A fresh descriptor of the same file hides the question, but not the answer."""

    def sync(self: LogWriter, fd: int) -> None:
        try:
            self._files.sync_data(fd)
        except OSError:
            path = segment_path(self._directory, self._live.head.number)
            again = self._files.open(path, write=True)
            self._files.sync_data(again)
            self._files.close(again)

    patch.setattr(LogWriter, "_sync", sync)


def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    def sync_directory(self: FaultyFiles, path: Path) -> None:
        pass

    patch.setattr(FaultyFiles, "sync_directory", sync_directory)


def no_directory_sync_on_opening(patch: pytest.MonkeyPatch) -> None:
    """A segment whose name was not synced looks as any other to the next process."""
    remove_drafts, sync = StoreDirectory.remove_drafts, FaultyFiles.sync_directory
    opening: list[None] = []

    def remove_drafts_and_note(self: StoreDirectory) -> None:
        remove_drafts(self)
        opening[:] = [None, None]

    def sync_directory(self: FaultyFiles, path: Path) -> None:
        if opening:
            opening.pop()
        else:
            sync(self, path)

    patch.setattr(StoreDirectory, "remove_drafts", remove_drafts_and_note)
    patch.setattr(FaultyFiles, "sync_directory", sync_directory)


def no_truncate(patch: pytest.MonkeyPatch) -> None:
    def resume(self: LogWriter, recovered: Recovered) -> LiveSegment:
        last = recovered.heads[-1]
        fd = self._files.open(segment_path(self._directory, last.number), write=True)
        return LiveSegment(last, fd, self._files.size(fd), recovered.tail)

    patch.setattr(LogWriter, "_resume", resume)


def no_undo(patch: pytest.MonkeyPatch) -> None:
    def undo(self: LogWriter, error: OSError) -> None:
        live = self._live
        live.tail = live.tail._replace(revision=live.tail.revision + 1)

    patch.setattr(LogWriter, "_undo", undo)


def trust_what_validates(patch: pytest.MonkeyPatch) -> None:
    """Going on after the last frame, though only memory may hold it."""
    judge = recovery._recover_last

    def recover_last(*args: Any) -> Recovered:
        return replace(judge(*args), unproven=None)

    patch.setattr(recovery, "_recover_last", recover_last)


def check_failed_sync_then_restart(directory: Path, at: int) -> None:
    """As `check_failed_sync`, but the process restarts before the power goes.

    The new process still sees the pages that never reached the disk, and must not build on them.
    """
    history = History(create(directory, FaultyFiles(directory)))
    files = FaultyFiles(history.store, fault=Fault(SYNCS, at))
    rng = Random(at)
    with suppress(StorageError):
        history.live(files, rng, FRAMES)
    files.fault = None
    history.live(files, rng, len(history.acked) + 2)
    files.power_cut()
    history.live(FaultyFiles(history.store), rng, FRAMES + 10)


def test_a_restart_after_a_failed_sync_builds_on_nothing_that_was_lost(tmp_path: Path) -> None:
    for at in range(1, 61):
        check_failed_sync_then_restart(tmp_path / str(at), at)


def fails_somewhere(check: Callable[[int], object], cases: int) -> bool:
    """Return whether one of the cases ends in an assertion, or in damage that nobody did."""
    for case in range(1, cases + 1):
        try:
            check(case)
        except (AssertionError, AidbError):
            return True
    return False


@pytest.mark.parametrize(
    ("mistake", "checker"),
    [
        (ack_before_sync, "power"),
        (sync_again, "sync"),
        (sync_again_elsewhere, "sync"),
        (no_directory_sync, "power"),
        (no_truncate, "torn"),
        (no_undo, "full"),
        (trust_what_validates, "restart"),
        (no_directory_sync_on_opening, "restart"),
    ],
)
def test_known_mistakes_are_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None],
    checker: str,
) -> None:
    checkers: dict[str, tuple[Callable[[int], object], int]] = {
        "power": (lambda case: check_power_cuts(tmp_path / str(case), case, lives=50), 10),
        "sync": (lambda case: check_failed_sync(tmp_path / str(case), case), 30),
        "full": (lambda case: check_full_disk(tmp_path / str(case), case, stays=False), 60),
        "torn": (lambda case: check_torn_write(tmp_path / str(case), case), 40),
        "restart": (lambda case: check_failed_sync_then_restart(tmp_path / str(case), case), 60),
    }
    mistake(monkeypatch)

    assert fails_somewhere(*checkers[checker])
