"""Disks that fail: errors at a chosen call, short writes, full disks, flipped bits, power cuts.

`FaultyFiles` works on real files and keeps, beside them, a model of what a disk would hold after
a power cut: content that was synced, and names whose directory was synced. A failed sync makes
the pages clean, as Linux does: what was not on disk by then is never going to be.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, TypeAlias

from aidb_ray.store.files import FileSystem

SECTOR = 512

CallKind: TypeAlias = Literal[
    "open",
    "create",
    "read",
    "write",
    "allocate",
    "truncate",
    "sync_data",
    "sync_directory",
    "rename",
    "unlink",
    "lock",
]


@dataclass(frozen=True, slots=True)
class Fault:
    """An error at the `at`-th call (from 1) of `kinds`, and at all later ones if it stays."""

    kinds: frozenset[CallKind]
    at: int
    error: int = errno.EIO
    stays: bool = False


@dataclass(slots=True)
class _Disk:
    """What a file holds on disk, and the writes that are only in memory yet."""

    content: bytearray
    pending: list[tuple[int, bytes] | int] = field(default_factory=list[tuple[int, bytes] | int])
    """Writes as (offset, data), changes of the length as the new length; oldest first."""

    def apply(self, rng: Random | None) -> None:
        """Let all pending writes reach the disk, or with `rng` all, none or any sectors of each."""
        for change in self.pending:
            share = 1.0 if rng is None else rng.choice((0.0, 0.5, 1.0))
            if isinstance(change, int):
                if rng is None or rng.random() < share:
                    del self.content[change:]
                    self.content.extend(bytes(change - len(self.content)))
                continue
            offset, data = change
            end = offset + len(data)
            at = offset
            while at < end:
                stop = min(end, (at // SECTOR + 1) * SECTOR)
                if rng is None or rng.random() < share:
                    self.content.extend(bytes(max(0, stop - len(self.content))))
                    self.content[at:stop] = data[at - offset : stop - offset]
                at = stop
        self.pending.clear()


class PowerCut(BaseException):
    """The power went: no call does anything any more."""


class FaultyFiles(FileSystem):
    """Real files with faults of choice; one instance is one life of the process that uses it.

    Attributes:
        fault: The error to raise, if any.
        calls: How many calls were made of each kind.
        hits: How often a fault was raised.
        short_writes: Whether writes take only half of what they are given.
        free: Bytes left on the disk; None if it is large.
        die_in_write: At this write (from 1), write a part and kill this process.
        cut_at: Before this call that changes the disk (from 1), the power goes.
        synced_again: How often a file was synced whose sync had failed.
        flip_in_read: At this read (from 1), flip one bit of what was read.
    """

    def __init__(self, root: Path, *, fault: Fault | None = None) -> None:
        self.fault = fault
        self.calls: dict[CallKind, int] = {}
        self.hits = 0
        self.short_writes = False
        self.free: int | None = None
        self.die_in_write = 0
        self.flip_in_read = 0
        self.cut_at = 0
        self.synced_again = 0
        self._root = root
        self._matching = 0
        self._changes = 0
        self._distrusted: set[int] = set()
        self._fds: dict[int, _Disk] = {}
        self._live: dict[Path, _Disk] = {}
        for path in root.rglob("*"):
            if path.is_file():
                self._live[path] = _Disk(bytearray(path.read_bytes()))
        self._durable = dict(self._live)
        # Changes of names whose directory was not synced since: (path, what it names now).
        self._renamed: list[list[tuple[Path, _Disk | None]]] = []

    def power_cut(self, rng: Random | None = None) -> None:
        """Leave on the real disk what a power cut would.

        That is exactly what was synced; with `rng`, also any sectors of what was not, and the
        names up to some moment.
        """
        for changes in self._renamed[: rng.randint(0, len(self._renamed)) if rng else 0]:
            self._name(self._durable, changes)
        for path in self._root.rglob("*"):
            if path.is_file():
                path.unlink()
        for path, disk in self._durable.items():
            if rng is not None:
                disk.apply(rng)
            path.write_bytes(disk.content)

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        self._enter("create" if create else "open")
        existed = path in self._live
        fd = super().open(path, write=write, create=create)
        if create:
            if existed:
                self._grow(-len(path.read_bytes()))
                self._live[path].pending.append(0)
            else:
                self._live[path] = _Disk(bytearray())
                self._renamed.append([(path, self._live[path])])
        if path in self._live:
            self._fds[fd] = self._live[path]
        return fd

    def open_lock(self, path: Path) -> int:
        existed = path.exists()
        fd = super().open_lock(path)
        if not existed:
            self._live[path] = _Disk(bytearray())
        self._fds[fd] = self._live[path]
        return fd

    def close(self, fd: int) -> None:
        self._fds.pop(fd, None)
        self._distrusted.discard(fd)
        super().close(fd)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        self._enter("read")
        data = super().read(fd, size, offset)
        if self.calls["read"] == self.flip_in_read and data:
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 4
            return bytes(flipped)
        return data

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._enter("write")
        data = bytes(data)
        if self.calls["write"] == self.die_in_write:
            super().write(fd, data[: _part(data)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.short_writes and len(data) > 1:
            data = data[: len(data) // 2]
        if self.free is not None:
            growth = max(0, offset + len(data) - self.size(fd))
            if growth > self.free:
                data = data[: len(data) - (growth - self.free)]
                growth = self.free
                if not data:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._grow(growth)
        done = super().write(fd, data, offset)
        self._fds[fd].pending.append((offset, data[:done]))
        return done

    def allocate(self, fd: int, offset: int, size: int) -> None:
        self._enter("allocate")
        growth = max(0, offset + size - self.size(fd))
        if self.free is not None and growth > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._grow(growth)
        super().truncate(fd, max(offset + size, self.size(fd)))
        self._fds[fd].pending.append(self.size(fd))

    def truncate(self, fd: int, size: int) -> None:
        self._enter("truncate")
        self._grow(size - self.size(fd))
        super().truncate(fd, size)
        self._fds[fd].pending.append(size)

    def sync_data(self, fd: int) -> None:
        disk = self._fds[fd]
        self.synced_again += fd in self._distrusted
        try:
            self._enter("sync_data")
        except OSError:
            disk.pending.clear()
            self._distrusted.add(fd)
            raise
        disk.apply(None)

    def sync_directory(self, path: Path) -> None:
        self._enter("sync_directory")
        inside = [changes for changes in self._renamed if changes[0][0].parent == path]
        for changes in inside:
            self._name(self._durable, changes)
            self._renamed.remove(changes)

    def rename(self, source: Path, target: Path) -> None:
        self._enter("rename")
        if target in self._live:
            self._grow(-target.stat().st_size)
        super().rename(source, target)
        changes: list[tuple[Path, _Disk | None]] = [(target, self._live[source]), (source, None)]
        self._name(self._live, changes)
        self._renamed.append(changes)

    def unlink(self, path: Path) -> None:
        self._enter("unlink")
        size = path.stat().st_size if path.exists() else 0
        super().unlink(path)
        self._grow(-size)
        self._name(self._live, [(path, None)])
        self._renamed.append([(path, None)])

    def lock(self, fd: int) -> bool:
        self._enter("lock")
        return super().lock(fd)

    def _enter(self, kind: CallKind) -> None:
        self._changes += kind not in ("open", "read", "lock")
        if 0 < self.cut_at <= self._changes:
            raise PowerCut
        self.calls[kind] = self.calls.get(kind, 0) + 1
        fault = self.fault
        if fault is None or kind not in fault.kinds:
            return
        self._matching += 1
        if self._matching == fault.at or (fault.stays and self._matching > fault.at):
            self.hits += 1
            raise OSError(fault.error, os.strerror(fault.error))

    def _grow(self, size: int) -> None:
        if self.free is not None:
            self.free -= size

    @staticmethod
    def _name(names: dict[Path, _Disk], changes: list[tuple[Path, _Disk | None]]) -> None:
        for path, disk in changes:
            if disk is None:
                names.pop(path, None)
            else:
                names[path] = disk


def _part(data: bytes) -> int:
    """Return a length to cut `data` at: anywhere, the same for the same data."""
    return Random(data).randrange(1, len(data))


class UnsyncedFiles(FileSystem):
    """Real files without waiting for the disk, for tests in which nothing crashes."""

    def sync_data(self, fd: int) -> None:
        """Do nothing."""

    def sync_directory(self, path: Path) -> None:
        """Do nothing."""


class ForgetfulFiles(FileSystem):
    """A disk without a cache of the kernel: what was not synced dies with the process.

    So killing a process is also a power cut, at the cost of a kill.

    Attributes:
        die_in_sync: At this sync (from 1), write a part of what was to be synced, then kill this
            process.
    """

    def __init__(self, *, die_in_sync: int = 0) -> None:
        self.die_in_sync = die_in_sync
        self._syncs = 0
        self._pending: dict[int, list[tuple[int, bytes]]] = {}

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._pending.setdefault(fd, []).append((offset, bytes(data)))
        return len(data)

    def sync_data(self, fd: int) -> None:
        self._syncs += 1
        is_last = self._syncs == self.die_in_sync
        for offset, data in self._pending.pop(fd, []):
            part = data[: _part(data)] if is_last else data
            super().write(fd, part, offset)
            if is_last:
                os.kill(os.getpid(), signal.SIGKILL)

    def sync_directory(self, path: Path) -> None:
        """Do nothing: a kill leaves names as they are."""

    def close(self, fd: int) -> None:
        self._pending.pop(fd, None)
        super().close(fd)
