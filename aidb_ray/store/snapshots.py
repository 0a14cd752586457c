"""Snapshots: all rows on disk, sorted, so that one session can be read alone.

A file is a run of blocks, each an Arrow batch of a few hundred rows sorted by (session,
collection, key), then an index that names the first row, the last session and the checksum of
every block, then a trailer of fixed size. Nothing is parsed before its checksum was verified.

A snapshot is fuzzy: it bears the revision at which writing began, and each row is what it was
when the walk came by. Rows are whole after-images, so replaying all frames after that revision,
in order, gives the same rows as if it had been taken at once.
"""

# The stubs of pyarrow leave parts of many overloads unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import logging
import struct
import weakref
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple, cast

import pyarrow as pa
import pyarrow.compute as pc

from aidb_ray.errors import CorruptionError
from aidb_ray.store.directory import storage_error
from aidb_ray.store.files import FileSystem, write_all
from aidb_ray.store.segments import Position

logger = logging.getLogger(__name__)

SessionRow = tuple[str, str, int, bytes]
"""A row of a session: collection, key, revision that last wrote it, value."""

BLOCK_ROWS: Final = 256
BLOCK_BYTES: Final = 128 << 10
_WRITE_BYTES: Final = 1 << 20
_SCAN_BYTES: Final = 1 << 20
_SLICE_SECONDS: Final = 0.002
_KEPT: Final = 2

_MAGIC: Final = b"aiSN"
_VERSION: Final = 1
_TRAILER: Final = struct.Struct("<4sIQQQQQII")
_CHECKSUM: Final = struct.Struct("<I")
_TRAILER_BYTES: Final = _TRAILER.size + _CHECKSUM.size

_BLOCK_COLUMNS: Final[dict[str, pa.DataType]] = {
    "session": pa.utf8(),
    "collection": pa.utf8(),
    "key": pa.utf8(),
    "revision": pa.int64(),
    "value": pa.binary(),
}
_INDEX_COLUMNS: Final[dict[str, pa.DataType]] = {
    "session": pa.utf8(),
    "collection": pa.utf8(),
    "key": pa.utf8(),
    "last_session": pa.utf8(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "rows": pa.int64(),
    "crc": pa.int64(),
}
_BLOCK_SCHEMA: Final = pa.schema(_BLOCK_COLUMNS)
_INDEX_SCHEMA: Final = pa.schema(_INDEX_COLUMNS)

# The stubs have no place for a plain value, nor for binary columns.
_compute: Any = pc


class _Block(NamedTuple):
    """One line of the index."""

    session: str
    collection: str
    key: str
    last_session: str
    offset: int
    size: int
    rows: int
    crc: int


class _Trailer(NamedTuple):
    magic: bytes
    version: int
    revision: int
    rows: int
    durable_segment: int
    durable_offset: int
    index_offset: int
    index_size: int
    index_crc: int


class Snapshot:
    """The rows of a store at a revision, read from disk as they are asked for.

    May be read by several threads, and stays readable after a newer one replaced it.

    Attributes:
        revision: Frames after it must be replayed over the rows.
        rows: How many there are.
        size: Bytes of the file.
        durable: Up to where the log was durable when the snapshot was finished.
    """

    def __init__(self, files: FileSystem, path: Path, salt: int) -> None:
        """Read the index; raises CorruptionError if it is damaged."""
        self._files = files
        self._seed = zlib.crc32(_MAGIC, salt)
        self.path = path
        self._fd = files.open(path)
        # Its readers may outlast its file name, so it is closed when the last one is gone.
        self._closer = weakref.finalize(self, files.close, self._fd)
        self.size: Final = files.size(self._fd)
        trailer, index = self._read_index()
        self.revision: Final = trailer.revision
        self.rows: Final = trailer.rows
        self.durable: Final = Position(trailer.durable_segment, trailer.durable_offset)
        self._blocks = index
        self._firsts = [block.session for block in index]
        self._lasts = [block.last_session for block in index]

    def load(self, session: str) -> list[SessionRow]:
        """Return all rows of a session, sorted by (collection, key).

        Raises:
            CorruptionError: a block that may hold some is damaged.
        """
        rows: list[SessionRow] = []
        for number in range(bisect_left(self._lasts, session), len(self._blocks)):
            if self._firsts[number] > session:
                break
            batch = self._read_block(number)
            sessions = _column(batch, 0)
            start = bisect_left(sessions, session)
            end = bisect_right(sessions, session, start)
            rows.extend(_session_rows(batch.slice(start, end - start)))
        return rows

    def sessions(self, prefix: str = "") -> Iterator[str]:
        """Yield the sessions whose names begin with `prefix`, sorted."""
        previous: str | None = None
        for number in range(bisect_left(self._lasts, prefix), len(self._blocks)):
            first = self._firsts[number]
            if first > prefix and not first.startswith(prefix):
                return
            # A block within one session needs no reading.
            is_whole = first == self._lasts[number]
            for session in [first] if is_whole else _column(self._read_block(number), 0):
                if session != previous and session.startswith(prefix):
                    yield session
                previous = session

    def scan(
        self, collection: str, contains: bytes | None = None
    ) -> Iterator[tuple[str, str, int, bytes]]:
        """Yield (session, key, revision, value) of a collection's rows in all sessions.

        With `contains`, only rows whose value holds these bytes somewhere.
        """
        for table in self._tables():
            mask = _compute.equal(table.column(1), collection)
            if contains is not None:
                found = _compute.match_substring(table.column(4), contains)
                mask = _compute.and_(mask, found)
            picked = table.filter(mask)
            if picked.num_rows:
                sessions, _, keys, revisions, values = (
                    cast("list[Any]", column.to_pylist()) for column in picked.itercolumns()
                )
                yield from zip(sessions, keys, revisions, values, strict=True)

    def verify(self) -> None:
        """Read every block; raises CorruptionError at the first damaged one."""
        for number in range(len(self._blocks)):
            self.read_raw(number)

    def block(self, number: int) -> _Block | None:
        """Return what the index says of a block, or None behind the last one."""
        return self._blocks[number] if number < len(self._blocks) else None

    def read_raw(self, number: int) -> bytes:
        """Return the checked bytes of a block."""
        block = self._blocks[number]
        data = self._files.read(self._fd, block.size, block.offset)
        self._check(data, number)
        return data

    def read_columns(self, number: int) -> list[list[Any]]:
        """Return the columns of a block: session, collection, key, revision, value."""
        return [_column(self._read_block(number), at) for at in range(len(_BLOCK_COLUMNS))]

    def _read_block(self, number: int) -> pa.RecordBatch:
        return pa.ipc.read_record_batch(pa.py_buffer(self.read_raw(number)), _BLOCK_SCHEMA)

    def _check(self, data: bytes | memoryview, number: int) -> None:
        block = self._blocks[number]
        if len(data) != block.size or zlib.crc32(data, self._seed) != block.crc:
            raise CorruptionError(
                f"Block {number} of {str(self.path)!r} is damaged: sessions {block.session!r} to "
                f"{block.last_session!r}. It was not served.",
                file=str(self.path),
                offset=block.offset,
                last_revision=self.revision,
            )

    def _tables(self) -> Iterator[pa.Table]:
        # Blocks lie one behind the other, so a scan reads many with one call.
        number = 0
        while number < len(self._blocks):
            first = self._blocks[number]
            last = number
            while (block := self.block(last + 1)) and (
                block.offset + block.size - first.offset <= _SCAN_BYTES
            ):
                last += 1
            end = self._blocks[last].offset + self._blocks[last].size
            data = memoryview(self._files.read(self._fd, end - first.offset, first.offset))
            batches: list[pa.RecordBatch] = []
            for at in range(number, last + 1):
                start = self._blocks[at].offset - first.offset
                part = data[start : start + self._blocks[at].size]
                self._check(part, at)
                batches.append(pa.ipc.read_record_batch(pa.py_buffer(part), _BLOCK_SCHEMA))
            yield pa.Table.from_batches(batches, _BLOCK_SCHEMA)
            number = last + 1

    def _read_index(self) -> tuple[_Trailer, list[_Block]]:
        files, fd = self._files, self._fd
        at = max(self.size - _TRAILER_BYTES, 0)
        data = files.read(fd, _TRAILER_BYTES, at)
        if len(data) == _TRAILER_BYTES:
            body = data[: _TRAILER.size]
            trailer = _Trailer._make(_TRAILER.unpack(body))
            if (
                trailer.magic == _MAGIC
                and zlib.crc32(body, self._seed) == _CHECKSUM.unpack(data[_TRAILER.size :])[0]
                and trailer.index_offset + trailer.index_size == at
            ):
                index = files.read(fd, trailer.index_size, trailer.index_offset)
                if zlib.crc32(index, self._seed) == trailer.index_crc:
                    return trailer, _decode_index(index)
        raise CorruptionError(
            f"The index of snapshot {str(self.path)!r} is damaged.",
            file=str(self.path),
            offset=at,
        )


def _column(batch: pa.RecordBatch, at: int) -> list[Any]:
    return cast("list[Any]", batch.column(at).to_pylist())


def _session_rows(batch: pa.RecordBatch) -> Iterator[SessionRow]:
    return zip(*(_column(batch, at) for at in range(1, 5)), strict=True)


def _decode_index(data: bytes) -> list[_Block]:
    batch = pa.ipc.read_record_batch(pa.py_buffer(data), _INDEX_SCHEMA)
    columns = [_column(batch, at) for at in range(len(_INDEX_COLUMNS))]
    return [_Block._make(line) for line in zip(*columns, strict=True)]


def _encode(columns: Sequence[list[Any]], types: dict[str, pa.DataType]) -> bytes:
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types.values(), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, list(types)).serialize().to_pybytes()


def _empty_columns() -> list[list[Any]]:
    return [[] for _ in _BLOCK_COLUMNS]


@dataclass(slots=True)
class _Cursor:
    """A block of the base that was decoded, and how far its rows were taken."""

    columns: list[list[Any]]
    at: int = 0


class SnapshotWriter:
    """Writes a snapshot in slices: the base snapshot with some sessions replaced.

    Nothing counts before `finish` returns. After an error call `abort`.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        revision: int,
        base: Snapshot | None,
        durable: Callable[[], Position],
    ) -> None:
        self._snapshots = snapshots
        self._files = snapshots.files
        self._seed = snapshots.seed
        self._revision = revision
        self._base = base
        self._durable = durable
        self._path = snapshots.path(revision)
        self._draft = self._path.with_name(self._path.name + ".tmp")
        try:
            self._fd = self._files.open(self._draft, write=True, create=True)
        except OSError as error:
            raise storage_error(error, "creating", self._draft) from error
        self._written = 0
        self._buffer = bytearray()
        self._index: list[_Block] = []
        self._pending: list[list[Any]] = _empty_columns()
        self._pending_bytes = 0
        self._next_block = 0
        self._cursor: _Cursor | None = None
        self._pause_at = 0.0

    def merge(self, changed: Iterable[tuple[str, list[SessionRow]]]) -> Iterator[None]:
        """Write all rows, and yield every 2 ms so that the caller can do other things.

        Each session in `changed` is complete and takes the place of what the base holds for it;
        an empty list removes it. Sessions must ascend; rows may come in any order. `changed` is
        consumed as the walk goes on. Blocks of the base that no changed session touches are
        copied as they are.

        Raises:
            CorruptionError: a block of the base is damaged.
            StorageFullError: no space.
            ValueError: the sessions do not ascend.
        """
        self._pause_at = perf_counter() + _SLICE_SECONDS
        previous: str | None = None
        try:
            for session, rows in changed:
                if previous is not None and session <= previous:
                    raise ValueError(f"session {session!r} comes after {previous!r}")
                previous = session
                yield from self._copy_until(session)
                for row in sorted(rows, key=itemgetter(0, 1)):
                    self._add(session, *row)
                    if self._is_due():
                        yield
            yield from self._copy_until(None)
        except OSError as error:
            raise storage_error(error, "writing", self._draft) from error

    def finish(self) -> Snapshot:
        """Make the snapshot durable and the one to start from; blocks on the disk.

        The two latest snapshots are kept.
        """
        files = self._files
        try:
            self._flush_rows()
            lines = [[block[at] for block in self._index] for at in range(len(_INDEX_COLUMNS))]
            index = _encode(lines, _INDEX_COLUMNS)
            durable = self._durable()
            offset = self._written + len(self._buffer)
            trailer = _TRAILER.pack(
                _MAGIC,
                _VERSION,
                self._revision,
                sum(block.rows for block in self._index),
                durable.segment,
                durable.offset,
                offset,
                len(index),
                zlib.crc32(index, self._seed),
            )
            self._buffer += index
            self._buffer += trailer
            self._buffer += _CHECKSUM.pack(zlib.crc32(trailer, self._seed))
            self._flush_buffer()
            files.sync_data(self._fd)
            files.close(self._fd)
            self._fd = -1
            files.rename(self._draft, self._path)
            files.sync_directory(self._path.parent)
        except OSError as error:
            raise storage_error(error, "writing", self._draft) from error
        return self._snapshots.adopt(self._path)

    def abort(self) -> None:
        """Drop what was written. May be repeated, and does nothing after `finish`."""
        if self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1
        with suppress(OSError):  # The next opening removes it.
            self._files.unlink(self._draft)

    def _copy_until(self, session: str | None) -> Iterator[None]:
        """Write the rows of the base before `session`, and skip those of it."""
        while True:
            if self._cursor is not None:
                if not self._take_rows(self._cursor, session):
                    return
                self._cursor = None
            block = self._base.block(self._next_block) if self._base else None
            if block is None or (session is not None and block.session > session):
                return
            if session is not None and block.session == block.last_session == session:
                self._next_block += 1
            elif session is not None and block.last_session >= session:
                self._open_block()
            elif self._is_small(len(self._pending[0]), self._pending_bytes):
                # Copying would leave a tiny block before it, and in time nothing but tiny ones.
                self._absorb_block()
            else:
                self._copy_block(block)
            if self._is_due():
                yield

    def _open_block(self) -> None:
        assert self._base is not None
        self._cursor = _Cursor(self._base.read_columns(self._next_block))
        self._next_block += 1

    def _absorb_block(self) -> None:
        """Write a block of the base together with the few rows before it, as one block or two.

        No row is left over, so the blocks after it can be copied.
        """
        assert self._base is not None
        block = self._base.read_columns(self._next_block)
        self._next_block += 1
        for pending, column in zip(self._pending, block, strict=True):
            pending.extend(column)
        self._pending_bytes += sum(map(len, block[4]))
        rows = len(self._pending[0])
        if rows > BLOCK_ROWS * 3 // 2 or self._pending_bytes > BLOCK_BYTES * 3 // 2:
            rest = [column[rows // 2 :] for column in self._pending]
            self._pending = [column[: rows // 2] for column in self._pending]
            self._flush_rows()
            self._pending = rest
        self._flush_rows()

    @staticmethod
    def _is_small(rows: int, size: int) -> bool:
        return 0 < rows < BLOCK_ROWS // 4 and size < BLOCK_BYTES // 4

    def _copy_block(self, block: _Block) -> None:
        assert self._base is not None
        self._flush_rows()
        data = self._base.read_raw(self._next_block)
        self._index.append(block._replace(offset=self._written + len(self._buffer)))
        self._write(data)
        self._next_block += 1

    def _take_rows(self, cursor: _Cursor, session: str | None) -> bool:
        """Add the rows before `session`, skip those of it, and return whether none is left."""
        sessions = cursor.columns[0]
        end = len(sessions) if session is None else bisect_left(sessions, session, cursor.at)
        for row in zip(*(column[cursor.at : end] for column in cursor.columns), strict=True):
            self._add(*row)
        cursor.at = end if session is None else bisect_right(sessions, session, end)
        return cursor.at == len(sessions)

    def _add(self, session: str, collection: str, key: str, revision: int, value: bytes) -> None:
        sessions, collections, keys, revisions, values = self._pending
        sessions.append(session)
        collections.append(collection)
        keys.append(key)
        revisions.append(revision)
        values.append(value)
        self._pending_bytes += len(value)
        if len(sessions) == BLOCK_ROWS or self._pending_bytes >= BLOCK_BYTES:
            self._flush_rows()

    def _flush_rows(self) -> None:
        sessions, collections, keys, _, _ = self._pending
        if not sessions:
            return
        data = _encode(self._pending, _BLOCK_COLUMNS)
        self._index.append(
            _Block(
                sessions[0],
                collections[0],
                keys[0],
                sessions[-1],
                self._written + len(self._buffer),
                len(data),
                len(sessions),
                zlib.crc32(data, self._seed),
            )
        )
        self._pending = _empty_columns()
        self._pending_bytes = 0
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= _WRITE_BYTES:
            self._flush_buffer()

    def _flush_buffer(self) -> None:
        write_all(self._files, self._fd, bytes(self._buffer), self._written)
        self._written += len(self._buffer)
        self._buffer = bytearray()

    def _is_due(self) -> bool:
        now = perf_counter()
        if now < self._pause_at:
            return False
        self._pause_at = now + _SLICE_SECONDS
        return True


class Snapshots:
    """The snapshots of a store, newest last; at most two are kept."""

    def __init__(self, files: FileSystem, directory: Path, salt: int) -> None:
        """Open those that are there. A damaged one is passed over, loudly, and left alone."""
        self.files = files
        self.seed = zlib.crc32(_MAGIC, salt)
        self._salt = salt
        self._directory = directory
        self._kept: tuple[Snapshot, ...] = ()
        self.damaged: list[CorruptionError] = []
        for name in files.names(directory):
            if name.startswith("snap-") and name.endswith(".snap"):
                try:
                    self._kept = (*self._kept, Snapshot(files, directory / name, salt))
                except CorruptionError as error:
                    self.damaged.append(error)
                    logger.error("%s Falling back to an older one.", error)  # noqa: TRY400

    @property
    def kept(self) -> tuple[Snapshot, ...]:
        """Those that are there, the newest last."""
        return self._kept

    @property
    def latest(self) -> Snapshot | None:
        """The one to start from."""
        return self._kept[-1] if self._kept else None

    @property
    def fallback(self) -> Snapshot | None:
        """The one to start from if the latest should prove damaged."""
        return self._kept[-2] if len(self._kept) > 1 else None

    def path(self, revision: int) -> Path:
        """Return where the snapshot of a revision lies."""
        return self._directory / f"snap-{revision:016x}.snap"

    def begin(self, revision: int, durable: Callable[[], Position]) -> SnapshotWriter:
        """Begin a snapshot at `revision`, based on the latest."""
        latest = self.latest
        if latest is not None and revision < latest.revision:
            raise ValueError(f"there is a snapshot at revision {latest.revision} already")
        return SnapshotWriter(self, revision, latest, durable)

    def adopt(self, path: Path) -> Snapshot:
        """Make the finished snapshot at `path` the latest, and drop those no longer kept."""
        snapshot = Snapshot(self.files, path, self._salt)
        before = (kept for kept in self._kept if kept.revision < snapshot.revision)
        self._kept = (*before, snapshot)[-_KEPT:]
        if len(self._kept) == _KEPT:
            oldest = self._kept[0].path.name
            for name in self.files.names(self._directory):
                if name.startswith("snap-") and name < oldest:
                    with suppress(OSError):  # It is only in the way; tried again next time.
                        self.files.unlink(self._directory / name)
        return snapshot
