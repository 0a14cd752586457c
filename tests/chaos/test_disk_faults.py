"""Disks that fill up, fail to sync, or lose power at every possible call.

Each checker below is run against the log as it is, and against versions of it with one known
mistake, which it has to catch.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

import pytest

from aidb_ray.errors import AidbError, StorageError, StorageFullError
from aidb_ray.store import recovery
from aidb_ray.store.files import FileSystem
from aidb_ray.store.writer import LogWriter
from tests.chaos.lives import History
from tests.faults import CallKind, Fault, FaultyFiles, PowerCut
from tests.frame_builders import create

pytestmark = pytest.mark.chaos

FRAMES: Final = 40
SPACE: Final[frozenset[CallKind]] = frozenset(
    {"create", "write", "allocate", "sync_data", "sync_directory", "rename"}
)
SYNCS: Final[frozenset[CallKind]] = frozenset({"sync_data", "sync_directory"})


def check_full_disk(directory: Path, at: int, *, stays: bool) -> History:
    """Let the disk be full at one call, or from then on until some writes were refused."""
    history = History(create(directory))
    files = FaultyFiles(history.store, fault=Fault(SPACE, at, errno.ENOSPC, stays))
    rng = Random(at)
    for opening in range(3):
        try:
            history.live(files, rng, FRAMES)
        except StorageFullError:
            assert files.hits, "refused for no reason"
            if opening == 1:
                files.fault = None
        except StorageError as error:
            # The disk was "full" for a sync: the process ends, and a power cut follows.
            assert error.code == "sync_failed"
            files.power_cut()
            files = FaultyFiles(history.store)
        else:
            break
        if history.refused > 5:
            files.fault = None
    files.power_cut()
    history.live(FileSystem(), rng, FRAMES + 10)
    return history


class RefusedLongEnough(FaultyFiles):
    """A disk with space again after it refused a few calls."""

    def _enter(self, kind: CallKind) -> None:
        if self.hits >= 6:
            self.fault = None
        super()._enter(kind)


def check_failed_sync(directory: Path, at: int) -> History:
    """Let one sync fail, lose what it did not write, cut the power, and look what is there."""
    history = History(create(directory))
    files = FaultyFiles(history.store, fault=Fault(SYNCS, at))
    rng = Random(at)
    try:
        history.live(files, rng, FRAMES)
    except StorageError:
        assert files.hits == 1
    assert not files.synced_again, "a sync was asked for again"
    files.power_cut()
    history.live(FileSystem(), rng, FRAMES + 10)
    return history


def check_power_cuts(directory: Path, seed: int, lives: int) -> History:
    """Cut the power at random calls of one life after the other."""
    history = History(create(directory))
    rng = Random(seed)
    for _ in range(lives):
        files = FaultyFiles(history.store)
        files.cut_at = rng.randint(1, 150)
        try:
            history.live(files, rng, len(history.acked) + 30)
        except PowerCut:
            files.power_cut(rng)
    history.live(FileSystem(), rng, len(history.acked) + 3)
    return history
