"""Rows at one revision: what commits became once the log held them.

No clock, no asyncio, no Ray. `Plan` decides and changes nothing; `Tables.apply` makes it so. Rows
stay encoded. A session is loaded from the snapshot when it is touched, and may leave memory again
while the snapshot holds it as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from aidb_ray.store.changes import (
    CHUNKS,
    Append,
    Change,
    ChunkColumns,
    ChunkSlice,
    Committed,
    StoredRow,
    bucket_of,
    encode,
)
from aidb_ray.store.claims import CLAIMS, Lease, Leases, Place, RunnerEpochs, decode_epochs
from aidb_ray.store.columns import EMPTY, cut
from aidb_ray.store.presence import NamePresence
from aidb_ray.store.retention import Retention
from aidb_ray.store.streams import (
    Garbage,
    Run,
    Stream,
    decode_stream,
    garbage_of,
    runs_in,
    segment_of,
    spans_by_segment,
)

if TYPE_CHECKING:
    from aidb_ray.store.plan import Plan

PUT, REMOVE, APPEND = 1, 2, 3
SHARE = 4
"""A stream of a session that was forked; the value is all of it, a `Stream`."""
REMOVE_SESSION = 5
"""All that a session held; the value is a `Removed`, for readers are told of each row."""
REMOVE_STREAM = 6
SYSTEM = "~"
"""The session of the store's own rows: clients, runner epochs, leases and what is claimed."""
CLIENTS, EPOCHS, HOLDERS, LEASES = "clients", "epochs", "holders", "leases"
POLICIES, TIMES = "policies", "times"
FORKS = "forks"
"""A row of the system session, there if chunks of streams may be shared."""
GARBAGE = "garbage"
"""Rows of the system session that name chunks which no stream refers to any more."""
STREAMS = "~streams"

_ROW_WEIGHT, _SESSION_WEIGHT, _RUN_WEIGHT = 200, 800, 200
_MAX_STEPS = 4_096
_REMEMBERED_DELETIONS = 10_000

SessionRow: TypeAlias = tuple[str, str, int, bytes]
"""A row as a snapshot keeps it: (collection, key, revision, value)."""

Where: TypeAlias = tuple[str, str, str]
"""(session, collection, key)"""

Load: TypeAlias = Callable[[str], Sequence[SessionRow]]


class Removed(msgspec.Struct, frozen=True, array_like=True):
    """What a session held when it was deleted: keys by collection, and generations with chunks."""

    rows: dict[str, list[str]]
    streams: list[str]


class SessionRows:
    """What one session holds: rows by collection and key, chunk streams by generation.

    Attributes:
        is_dirty: Whether it changed since a snapshot last came by.
        is_resting: Whether the snapshot that counts holds it, as it was when that came by.
        weight: About how many bytes it takes in memory.
    """

    __slots__ = ("bucket", "collections", "is_dirty", "is_resting", "name", "streams", "weight")

    def __init__(self, name: str) -> None:
        self.name = name
        self.bucket = bucket_of(name)
        self.collections: dict[str, dict[str, StoredRow]] = {}
        self.streams: dict[str, Stream] = {}
        self.is_dirty = False
        self.is_resting = True
        self.weight = _SESSION_WEIGHT

    def copy(self) -> SessionRows:
        """Return the session as it is now, whatever becomes of this one."""
        copied = SessionRows(self.name)
        copied.collections = {name: dict(rows) for name, rows in self.collections.items()}
        copied.streams = {
            key: Stream(one.revision, one.next_index, one.closes, list(one.runs))
            for key, one in self.streams.items()
        }
        return copied

    def put(self, collection: str, key: str, row: StoredRow | None) -> StoredRow | None:
        """Replace a row, or remove it, and return what was there."""
        rows = self.collections.get(collection)
        if rows is None:
            if row is None:
                return None
            rows = self.collections[collection] = {}
        if row is None:
            before = rows.pop(key, None)
        else:
            before = rows.get(key)
            rows[key] = row
            self.weight += len(row.value) + _ROW_WEIGHT
        if before is not None:
            self.weight -= len(before.value) + _ROW_WEIGHT
        return before

    def append(self, revision: int, wanted: Append, start: int, place: tuple[int, int]) -> None:
        """Add chunks to a stream. See `Stream.extend`."""
        stream = self.streams.setdefault(wanted.generation_id, Stream())
        if stream.extend(revision, wanted, start, place):
            self.weight += _RUN_WEIGHT

    def put_stream(self, generation_id: str, stream: Stream) -> None:
        """Make a stream what it is here."""
        self.drop_stream(generation_id)
        self.streams[generation_id] = stream
        self.weight += _RUN_WEIGHT * len(stream.runs)

    def drop_stream(self, generation_id: str) -> Stream | None:
        """Remove a stream, and return it if it was there."""
        stream = self.streams.pop(generation_id, None)
        if stream is not None:
            self.weight -= _RUN_WEIGHT * len(stream.runs)
        return stream

    def rows(self) -> list[SessionRow]:
        """Return every row in order of (collection, key), streams among them."""
        found = [
            (collection, key, row.revision, row.value)
            for collection, rows in self.collections.items()
            for key, row in rows.items()
        ]
        found += [
            (STREAMS, generation_id, stream.revision, encode(stream))
            for generation_id, stream in self.streams.items()
        ]
        found.sort(key=_place)
        return found


def _place(row: SessionRow) -> tuple[str, str]:
    return row[0], row[1]


class ClientRecord(msgspec.Struct, frozen=True, array_like=True):
    """The newest batch of a client: enough to answer it again without applying it again."""

    first_seq: int = 1
    last_seq: int = 0
    checksum: int = 0
    outcome: Committed = Committed(0, 0)


class Appended(NamedTuple):
    """Chunks as they arrived: `wanted.start` counts in `columns`, `start` in the flush's chunks."""

    wanted: Append
    columns: ChunkColumns
    start: int


class Entry:
    """One row before and after a commit, as the feed passes it on.

    Of a stream, whose collection is `chunks`, it has what was appended, or all of it if it is a
    shared one; without either, it was removed.

    Attributes:
        is_blind: Whether `before` may not be what it was: it came from a snapshot that is newer.
    """

    __slots__ = (
        "after",
        "append",
        "before",
        "collection",
        "home",
        "is_blind",
        "key",
        "revision",
        "stream",
    )

    def __init__(
        self,
        revision: int,
        home: SessionRows,
        collection: str,
        key: str,
        before: StoredRow | None,
        after: StoredRow | None,
        append: Appended | None = None,
        *,
        stream: Stream | None = None,
        is_blind: bool = False,
    ) -> None:
        self.revision = revision
        self.home = home
        self.collection = collection
        self.key = key
        self.before = before
        self.after = after
        self.append = append
        self.stream = stream
        self.is_blind = is_blind

    def to_change(self) -> Change:
        """Return the change as readers get it."""
        if self.stream is not None:
            value = encode(_end_of(self.key, self.stream))
        elif self.append is None:
            value = None if self.after is None else self.after.value
        else:
            wanted, columns, _ = self.append
            part = cut(columns, wanted.start, wanted.count)
            value = encode(
                ChunkSlice(
                    wanted.generation_id,
                    wanted.attempt,
                    wanted.index,
                    part,
                    wanted.types,
                    wanted.closes,
                )
            )
        is_new = self.before is None
        return Change(self.revision, self.home.name, self.collection, self.key, value, is_new)


def _end_of(generation_id: str, stream: Stream) -> ChunkSlice:
    """Return a slice without chunks, by which a reader knows that there are some to be read."""
    attempt = stream.runs[-1].attempt if stream.runs else 0
    return ChunkSlice(generation_id, attempt, stream.next_index, EMPTY, closes=stream.closes)


def _replayed(
    revision: int,
    home: SessionRows,
    collection: str,
    key: str,
    before: StoredRow | None,
    after: StoredRow | None,
) -> Entry:
    is_blind = before is None or before.revision >= revision
    return Entry(revision, home, collection, key, before, after, is_blind=is_blind)


decode_number = msgspec.msgpack.Decoder(int).decode
_decode_held = msgspec.msgpack.Decoder(tuple[str, int]).decode
_decode_lease = msgspec.msgpack.Decoder(Lease).decode


class RowEnd:
    """A row as a commit found it and as it leaves it."""

    __slots__ = ("after", "before", "home")

    def __init__(
        self, home: SessionRows, row: StoredRow | None, after: StoredRow | None = None
    ) -> None:
        self.home = home
        self.before = row
        self.after = after or row


class LogColumns(NamedTuple):
    """The rows of one flush as columns for the log."""

    revisions: list[int]
    ops: list[int]
    sessions: list[str]
    collections: list[str]
    keys: list[str]
    values: list[bytes | None]


class Tables:
    """Rows of one partition at `revision`, the clients' newest batches and the runner epochs.

    Attributes:
        presence: Sessions that the snapshot may hold; None if that is not known (yet).
        weight: About how many bytes all sessions take in memory.
    """

    def __init__(self, load: Load | None = None) -> None:
        self.revision = 0
        self.clients: dict[int, ClientRecord] = {}
        self.epochs: dict[str, RunnerEpochs] = {}
        self.leases = Leases()
        self.retention = Retention()
        self.sessions: dict[str, SessionRows] = {}
        self.presence: NamePresence | None = None
        self.weight = 0
        self._load = load
        # The newest deletions, for what was read of sessions shortly before.
        self._deleted: dict[str, int] = {}
        # Names in the order in which they may leave. A name stands here exactly once.
        self._queue: deque[str] = deque()

    def session(self, name: str) -> SessionRows:
        """Return a session's rows, loading them first if they rest in the snapshot."""
        found = self.sessions.get(name)
        if found is None:
            found = self.sessions[name] = self._loaded(name)
            self.weight += found.weight
            self._queue.append(name)
        return found

    def peek(self, name: str) -> SessionRows:
        """Return a session's rows for reading; does not keep a session that had to be loaded."""
        return self.sessions.get(name) or self._loaded(name)

    def _loaded(self, name: str) -> SessionRows:
        session = SessionRows(name)
        if self._load is None or not (self.presence is None or self.presence.may_contain(name)):
            return session
        for collection, key, revision, value in self._load(name):
            if collection == STREAMS:
                session.put_stream(key, decode_stream(value))
            else:
                session.put(collection, key, StoredRow(revision, value))
        return session

    def get(self, session: str, collection: str, key: str) -> StoredRow | None:
        """Return a row, or None."""
        return self.peek(session).collections.get(collection, {}).get(key)

    def load_system(self) -> None:
        """Read what the system session holds back into the values that it stands for."""
        for collection, rows in self.session(SYSTEM).collections.items():
            for key, row in rows.items():
                self._replay_system(collection, key, None, row)

    def rest_in(self, load: Load, walked: Iterable[str]) -> None:
        """Load from a newer snapshot from now on, for which the sessions in `walked` were read."""
        self._load = load
        for name in walked:
            session = self.sessions.get(name)
            if session is not None:
                session.is_resting = True
            if self.presence is not None:
                self.presence.add(name)

    def evict(self, max_weight: int) -> None:
        """Let sessions leave that rest in the snapshot, oldest first, while all weigh more.

        Takes a bounded number of steps. No plan may be outstanding: it holds on to sessions.
        """
        for _ in range(min(_MAX_STEPS, len(self._queue))):
            if self.weight <= max_weight:
                return
            name = self._queue.popleft()
            session = self.sessions[name]
            if session.is_dirty or not session.is_resting or name == SYSTEM:
                self._queue.append(name)
            else:
                del self.sessions[name]
                self.weight -= session.weight

    def replay(
        self, columns: LogColumns, place: tuple[int, int], chunks: ChunkColumns | None
    ) -> Iterator[Entry]:
        """Apply a frame of the log again; yields what the feed may still be asked for.

        Safe over a snapshot that already has some of it: rows are whole after-images and frames
        come in order.
        """
        for revision, op, name, collection, key, value in zip(*columns, strict=True):
            session = self.session(name)
            session.is_dirty = True
            weight = session.weight
            if op == APPEND:
                assert value is not None
                wanted = msgspec.msgpack.decode(value, type=Append)
                session.append(revision, wanted, wanted.start, place)
                append = Appended(wanted, chunks or EMPTY, wanted.start)
                yield Entry(revision, session, CHUNKS, key, None, None, append)
            elif op == SHARE:
                assert value is not None
                stream = decode_stream(value)
                session.put_stream(key, stream)
                yield Entry(revision, session, CHUNKS, key, None, None, stream=stream)
            elif op == REMOVE_SESSION:
                assert value is not None
                removed = msgspec.msgpack.decode(value, type=Removed)
                yield from self._replay_removal(revision, session, removed, place)
            elif op == REMOVE_STREAM:
                self._drop_stream(revision, session, key, before=place)
                yield Entry(revision, session, CHUNKS, key, None, None)
            else:
                after = None if op == REMOVE else StoredRow(revision, value or b"")
                before = session.put(collection, key, after)
                if name == SYSTEM:
                    self._replay_system(collection, key, before, after)
                else:
                    yield _replayed(revision, session, collection, key, before, after)
            self.weight += session.weight - weight

    def _replay_removal(
        self, revision: int, session: SessionRows, removed: Removed, place: tuple[int, int]
    ) -> Iterator[Entry]:
        for generation_id in removed.streams:
            self._drop_stream(revision, session, generation_id, before=place)
            yield Entry(revision, session, CHUNKS, generation_id, None, None)
        for collection, keys in removed.rows.items():
            for key in keys:
                before = session.put(collection, key, None)
                yield _replayed(revision, session, collection, key, before, None)

    @property
    def has_forks(self) -> bool:
        """Whether chunks of a stream may belong to other streams, too."""
        return bool(self.session(SYSTEM).collections.get(FORKS))

    def deleted_since(self, session: str, revision: int) -> int:
        """Return when a session was deleted after `revision`, 0 if that is not known of it."""
        deleted_at = self._deleted.get(session, 0)
        return deleted_at if deleted_at > revision else 0

    def _note_deletion(self, session: str, revision: int) -> None:
        self._deleted.pop(session, None)
        self._deleted[session] = revision
        while len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.pop(next(iter(self._deleted)))

    def _drop_stream(
        self,
        revision: int,
        session: SessionRows,
        generation_id: str,
        *,
        before: tuple[int, int] | None = None,
    ) -> None:
        """Remove a stream; what it leaves behind is garbage, as far as it lies `before` a frame.

        What lies in that frame or behind it may belong to a stream that was begun anew.
        """
        stream = session.drop_stream(generation_id)
        if stream is None:
            return
        runs: Iterable[Run] = stream.runs
        if before is not None:
            runs = (run for run in runs if run.place < before)
        system = self.session(SYSTEM)
        weight = system.weight
        for key, value in garbage_of(runs, revision, session.name, generation_id):
            system.is_dirty = True
            system.put(GARBAGE, key, StoredRow(revision, value))
        self.weight += system.weight - weight

    def garbage(self) -> Garbage:
        """Return the chunks that no stream refers to any more, by segment."""
        rows = self.session(SYSTEM).collections.get(GARBAGE, {})
        return spans_by_segment((key, row.value) for key, row in rows.items())

    def runs_in_use(self, garbage: Garbage, sessions: Iterable[str]) -> list[Run]:
        """Return runs of streams in memory that lie in segments with garbage."""
        return [
            run
            for name in sessions
            for stream in self.sessions[name].streams.values()
            for run in runs_in(stream, garbage)
        ]

    def forget_garbage(self, segments: Collection[int], revision: int) -> None:
        """Forget what was garbage at `revision` in segments that have none of it any more.

        The log does not hear of it: what is remembered once more is dropped once more.
        """
        system = self.session(SYSTEM)
        rows = system.collections.get(GARBAGE, {})
        weight = system.weight
        for key, row in list(rows.items()):
            if row.revision <= revision and segment_of(key) in segments:
                system.is_dirty = True
                system.put(GARBAGE, key, None)
        self.weight += system.weight - weight

    def _replay_system(
        self, collection: str, key: str, before: StoredRow | None, after: StoredRow | None
    ) -> None:
        if collection == CLIENTS:
            if after is None:
                self.clients.pop(int(key), None)
            else:
                self.clients[int(key)] = msgspec.msgpack.decode(after.value, type=ClientRecord)
        elif collection == EPOCHS:
            if after is not None:
                self.epochs[key] = decode_epochs(after.value)
        else:
            self._put_of_system(collection, key, before, after)

    def _put_of_system(
        self, collection: str, key: str, before: StoredRow | None, after: StoredRow | None
    ) -> None:
        if collection == CLAIMS:
            session, name, row = key.split("\0")
            place: Place = (session, name, row)
            held = None if after is None else _decode_held(after.value)
            self.leases.put_claim(place, before and _decode_held(before.value)[0], held)
        elif collection == HOLDERS:
            self.leases.put_holder(key, after and _decode_lease(after.value))
        elif collection == LEASES and after is not None:
            self.leases.resume_at(decode_number(after.value))
        elif collection == POLICIES:
            name, session = key.split("\0")
            self.retention.put_policy(name, session, after and decode_number(after.value))
        elif collection == TIMES:
            self.retention.put_mark(int(key, 16), after and decode_number(after.value))

    def apply(self, plan: Plan, place: tuple[int, int]) -> list[Entry]:
        """Make a plan so, once the log holds it at `place`; returns its changes in order."""
        added = 0
        for entry in plan.entries:
            session = entry.home
            session.is_dirty = True
            weight = session.weight
            if entry.append is not None:
                wanted, _, start = entry.append
                session.append(entry.revision, wanted, start, place)
            elif entry.stream is not None:
                session.put_stream(entry.key, entry.stream)
            elif entry.collection == CHUNKS:
                self._drop_stream(entry.revision, session, entry.key)
            else:
                session.put(entry.collection, entry.key, entry.after)
            added += session.weight - weight
        for name, revision in plan.deleted.items():
            self._note_deletion(name, revision)
        system = self.session(SYSTEM)
        weight = system.weight
        for collection, key, row in plan.system:
            system.is_dirty = True
            before = system.put(collection, key, row)
            if collection not in (CLIENTS, EPOCHS):
                self._put_of_system(collection, key, before, row)
        self.weight += added + system.weight - weight
        for client_id, record in plan.clients.items():
            if record is None:
                self.clients.pop(client_id, None)
            else:
                self.clients[client_id] = record
        self.epochs.update(plan.epochs)
        self.revision = plan.revision
        return plan.entries
