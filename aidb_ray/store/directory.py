"""The data directory of one partition: whose it is, who has it open, and where things lie.

META    whose data this is, how often it was opened, how far it is known to be durable
LOCK    held by the process that has it open; never removed
RESERVE space given up when the disk is full, so that recovery and snapshots have room
log/    segments
snap/   snapshots
"""

from __future__ import annotations

import errno
import json
import os
import socket
import weakref
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

from aidb_ray.errors import (
    ConfigError,
    CorruptionError,
    StorageError,
    StorageFullError,
    StoreLockedError,
    StoreMismatchError,
)
from aidb_ray.store.files import FileSystem, is_full, replace_file

FORMAT: Final = 2
_MAX_META_BYTES: Final = 64 << 10
_MAX_OWNER_BYTES: Final = 4 << 10
# Here a lock or a sync may hold on one machine and mean nothing on the next.
_NETWORK_TYPES: Final = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3"}
    | {"smbfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "fuse.blobfuse2"}
    | {"fuse.ceph", "fuse.rclone", "fuse.mount-s3", "fuse.goofys", "fuse.juicefs"}
)


@dataclass(frozen=True, slots=True)
class Meta:
    """What the directory says about itself.

    Attributes:
        epoch: How often it was opened; grows by one with each opening.
        durable_segment: Segment in which the log was known to be durable when META was written.
        durable_offset: Up to which byte of it.
        durable_revision: Last revision up to there.
    """

    store_uuid: str
    database: str
    partition: int
    partitions: int
    epoch: int = 0
    durable_segment: int = 0
    durable_offset: int = 0
    durable_revision: int = 0
    format: int = FORMAT

    @property
    def salt(self) -> int:
        """Start value of every checksum, so that no file of another store passes for ours."""
        return zlib.crc32(f"{self.store_uuid}/{self.partition}".encode())


class StoreDirectory:
    """Paths and META of a data directory.

    Attributes:
        filesystem_type: Where it lies, such as `ext4`; known once it was checked.
    """

    def __init__(self, path: Path, files: FileSystem) -> None:
        self.path = path
        self.files = files
        self.log = path / "log"
        self.snapshots = path / "snap"
        self.filesystem_type = "unknown"
        self._meta = path / "META"

    def check(self) -> None:
        """Refuse a place that cannot be used.

        Raises:
            StoreMismatchError: there is nothing.
            ConfigError: it is a link, no directory, or on a network file system.
        """
        try:
            if not self.files.is_directory(self.path):
                raise ConfigError(
                    f"The data directory {str(self.path)!r} is a link or not a directory. "
                    f"Name the directory itself.",
                    code="data_dir_refused",
                )
        except FileNotFoundError:
            raise StoreMismatchError(
                f"There is no store at {str(self.path)!r}. Opening never creates one: if it was "
                f"moved or its disk is not mounted, bring it back.",
                code="store_missing",
            ) from None
        kind = self.filesystem_type = self.files.filesystem_type(self.path)
        if kind in _NETWORK_TYPES:
            raise ConfigError(
                f"The data directory {str(self.path)!r} is on the network file system {kind!r}, "
                f"whose locks and syncs cannot be relied on. Use a local disk.",
                code="data_dir_refused",
            )

    def read_meta(self) -> Meta:
        """Read META.

        Raises:
            StoreMismatchError: it is missing, or written by a newer version.
            CorruptionError: it is damaged. Data beside it is left alone in either case.
        """
        try:
            fd = self.files.open(self._meta)
        except FileNotFoundError:
            raise StoreMismatchError(
                f"{str(self._meta)!r} is missing, so the data beside it cannot be told from "
                f"another store's. Restore the file; nothing was changed.",
                code="store_missing",
            ) from None
        try:
            data = self.files.read(fd, _MAX_META_BYTES, 0)
        finally:
            self.files.close(fd)
        return _parse_meta(data, self._meta)

    def write_meta(self, meta: Meta) -> None:
        """Replace META; durable when it returns."""
        body = json.dumps(asdict(meta), sort_keys=True).encode()
        replace_file(self.files, self._meta, b"%08x %s\n" % (zlib.crc32(body), body))

    def remove_drafts(self) -> None:
        """Remove what a crash left unfinished: it never got the name under which it counts."""
        for directory in (self.path, self.log, self.snapshots):
            for name in self.files.names(directory):
                if name.endswith(".tmp"):
                    self.files.unlink(directory / name)


def _parse_meta(data: bytes, path: Path) -> Meta:
    body = data[9:-1]
    if data != b"%08x %s\n" % (zlib.crc32(body), body):
        raise CorruptionError(
            f"{str(path)!r} fails its checksum. Restore the file; nothing was changed.",
            file=str(path),
            offset=0,
        )
    fields = cast("dict[str, Any]", json.loads(body))
    if fields["format"] != FORMAT:
        raise StoreMismatchError(
            f"{str(path)!r} has format {fields['format']}, this version reads {FORMAT}. Open it "
            f"with the version that wrote it.",
            code="format_unknown",
        )
    return Meta(**fields)


def create_directory(path: Path, files: FileSystem, meta: Meta) -> StoreDirectory:
    """Make the directories of a new store, durable with their names; META comes last.

    A creation that was interrupted has no META and may be repeated.

    Raises:
        StoreMismatchError: there is a store already.
        ConfigError: the place cannot be used.
    """
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for parent in reversed(missing):
        _make_directory(parent, files)
    directory = StoreDirectory(path, files)
    directory.check()
    if "META" in files.names(path):
        raise StoreMismatchError(
            f"There is a store at {str(path)!r} already. Open it, or name another directory.",
            code="store_exists",
        )
    _make_directory(directory.log, files)
    _make_directory(directory.snapshots, files)
    return directory


def _make_directory(path: Path, files: FileSystem) -> None:
    try:
        files.make_directory(path)
    except FileExistsError:
        return
    files.sync_directory(path.parent)


_held: weakref.WeakSet[DirectoryLock] = weakref.WeakSet()


def _forget_locks_in_child() -> None:
    # A forked child shares the parent's lock for as long as it keeps the descriptor, so a dead
    # parent would look alive. Closing the copy leaves the parent's lock in place.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_forget_locks_in_child)


class DirectoryLock:
    """The right to open a directory, held until released or the process ends, however it ends.

    Children do not inherit it. The file stays: removing it would let two processes lock two
    files of one name.
    """

    def __init__(self, path: Path, files: FileSystem) -> None:
        self._files = files
        self._fd: int | None = files.open_lock(path / "LOCK")
        try:
            self._take(self._fd, path)
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def _take(self, fd: int, path: Path) -> None:
        if not self._files.lock(fd):
            raise self._busy(fd, path)
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with suppress(OSError):  # A full disk must not keep the store from being read.
            self._files.truncate(fd, 0)
            self._files.write(fd, owner, 0)

    def _busy(self, fd: int, path: Path) -> StoreLockedError:
        pid, host = 0, ""
        try:
            owner: Any = json.loads(self._files.read(fd, _MAX_OWNER_BYTES, 0))
            pid, host = int(owner["pid"]), str(owner["host"])
        except (ValueError, KeyError, TypeError):
            pass  # It is about to be written, or a full disk kept it from being written.
        return StoreLockedError(
            f"{str(path)!r} is open in process {pid or 'unknown'} on {host or 'this host'}. Close "
            f"it there first.",
            pid=pid,
            host=host,
        )

    def release(self) -> None:
        """Let another process open the directory."""
        if self._fd is not None:
            self._files.close(self._fd)
            self._fd = None


class SpaceReserve:
    """A file that only takes up space, to be given up when the disk is full."""

    def __init__(self, directory: Path, files: FileSystem, size: int) -> None:
        self._path = directory / "RESERVE"
        self._files = files
        self._size = size

    def restore(self) -> bool:
        """Take the space (again); False if there is not enough."""
        if not self._size:
            return True
        try:
            fd = self._files.open(self._path, write=True, create=False)
        except FileNotFoundError:
            fd = self._files.open(self._path, write=True, create=True)
        try:
            self._files.allocate(fd, 0, self._size)
        except OSError as error:
            if not is_full(error):
                raise
            self._files.truncate(fd, 0)
            return False
        finally:
            self._files.close(fd)
        return True

    def give_up(self) -> bool:
        """Free the space; False if there was none to free."""
        try:
            self._files.unlink(self._path)
        except FileNotFoundError:
            return False
        return True


def storage_error(error: OSError, doing: str, path: Path) -> StorageError:
    """Return the error to raise for `error`, met while `doing` something to `path`."""
    if is_full(error):
        return StorageFullError(
            f"No space while {doing} {str(path)!r}. Nothing of it was kept; free some space."
        )
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return StorageError(f"{name} while {doing} {str(path)!r}: {error.strerror}.", code="io_error")
