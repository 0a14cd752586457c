"""Disks that fill up, fail to sync, or lose power at every possible call.

Each checker below is run against the log as it is, and against versions of it with one known
mistake, which it has to catch.
"""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random
from typing import Final

import pytest

from aidb_ray.errors import StorageError, StorageFullError
from tests.chaos.lives import History
from tests.faults import CallKind, Fault, FaultyFiles, PowerCut
from tests.frame_builders import create

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
        files.cut_at = rng.randint(1, 120)
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
    assert refused > 100
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
    assert torn > 20
    assert min(happened, lost) > 20
    print(  # noqa: T201
        f"power cuts: 500, {acked} acknowledged, {torn} torn tails of {torn_bytes} bytes, "
        f"unknown outcomes: {happened} had happened, {lost} not"
    )
