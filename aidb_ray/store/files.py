"""The one door to the disk: every call that the log, the snapshots and META make.

A test replaces it to make the disk fail. Nothing here retries, and nothing hides an error.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

# A disk quota, a file size limit and a full disk call for one reaction: undo, tell, try later.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_full(error: OSError) -> bool:
    """Return whether `error` means that there is no space, rather than a broken disk."""
    return error.errno in _FULL


class FileSystem:
    """The calls of the operating system that durable storage needs.

    Descriptors are plain integers. Files are created private to the user, never follow a
    symbolic link, and are not inherited by programs that this process starts.
    """

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        """Open a file and return its descriptor; `create` makes it, or empties what is there."""
        flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDWR if write else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | os.O_TRUNC
        return os.open(path, flags, 0o600)

    def open_lock(self, path: Path) -> int:
        """Open a lock file for reading and writing, made if absent, never emptied."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def size(self, fd: int) -> int:
        """Return the length of the file in bytes."""
        return os.fstat(fd).st_size

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Return up to `size` bytes at `offset`; fewer only at the end of the file."""
        data = os.pread(fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        got = len(data)
        while got < size and (data := os.pread(fd, size - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset` and return how many bytes were taken, which may be fewer."""
        return os.pwrite(fd, data, offset)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Reserve space for `size` bytes at `offset`, which read as zeros until written.

        Where the system cannot reserve, the file is only made longer.
        """
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, offset, size)
        elif self.size(fd) < offset + size:
            os.ftruncate(fd, offset + size)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file, or extend it with zeros, to `size` bytes."""
        os.ftruncate(fd, size)

    def next_data(self, fd: int, offset: int) -> int | None:
        """Return where bytes other than a hole may begin at or after `offset`, if anywhere."""
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno == errno.EINVAL:  # Not every file system knows its holes.
                return offset
            raise

    def sync_data(self, fd: int) -> None:
        """Make what was written to the file survive a power cut.

        After an error nothing may be assumed about it, and the call must not be repeated: the
        kernel may have marked the lost pages clean.
        """
        if sys.platform == "darwin":  # Its fsync leaves the data in the cache of the drive.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Make files created, renamed and removed in `path` so survive a power cut."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`, at once."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Create a private directory; `FileExistsError` if there is something."""
        os.mkdir(path, 0o700)

    def names(self, path: Path) -> list[str]:
        """Return the sorted names in a directory."""
        return sorted(os.listdir(path))

    def is_directory(self, path: Path) -> bool:
        """Return whether `path` is a directory and not a link to one."""
        return stat.S_ISDIR(os.lstat(path).st_mode)

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file; False if another process has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def filesystem_type(self, path: Path) -> str:
        """Return the name of the file system that holds `path`, such as `ext4`, or `unknown`."""
        try:
            mounts = Path("/proc/self/mounts").read_text("utf-8", "surrogateescape")
        except OSError:
            return "unknown"
        where = os.path.realpath(path)
        best, name = "", "unknown"
        for line in mounts.splitlines():
            mount, kind = line.split(" ")[1:3]
            mount = mount.replace("\\040", " ").rstrip("/") + "/"
            # Of two mounts on one place the later one is seen.
            if (where + "/").startswith(mount) and len(mount) >= len(best):
                best, name = mount, kind
        return name


def write_all(files: FileSystem, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`, however many calls it takes."""
    done = files.write(fd, data, offset)
    if done == len(data):
        return
    rest = memoryview(data)[done:]
    offset += done
    while len(rest):
        done = files.write(fd, rest, offset)
        if done == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = rest[done:]
        offset += done


def replace_file(files: FileSystem, path: Path, data: bytes) -> None:
    """Give `path` the content `data`, so that a crash leaves the old content or the new.

    Durable when it returns.
    """
    draft = path.with_name(path.name + ".tmp")
    fd = files.open(draft, write=True, create=True)
    try:
        write_all(files, fd, data, 0)
        files.sync_data(fd)
    finally:
        files.close(fd)
    files.rename(draft, path)
    files.sync_directory(path.parent)
