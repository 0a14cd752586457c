"""Rows at one revision: plan commits against them, then apply what became durable.

No I/O, no clock, no asyncio, no Ray. `Plan` decides and changes nothing; `Tables.apply` makes it
so once the log holds it. Rows stay encoded; a session is loaded from the snapshot when touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from aidb_ray.store.changes import (
    CHUNKS,
    MAX_ROW_BYTES,
    Append,
    Batch,
    Change,
    ChunkColumns,
    ChunkSlice,
    ClaimBuckets,
    Commit,
    Committed,
    Delete,
    Insert,
    Mutation,
    Refusal,
    Runner,
    StoredRow,
    Update,
    bucket_of,
    encode,
)
from aidb_ray.store.claims import RunnerEpochs, decode_epochs
from aidb_ray.store.columns import EMPTY, cut

PUT, REMOVE, APPEND = 1, 2, 3
SYSTEM = "~"
"""The session that holds the store's own rows: clients and runner epochs."""
CLIENTS, EPOCHS, STREAMS = "clients", "epochs", "~streams"

SessionRow = tuple[str, str, int, bytes]
"""A row as a snapshot keeps it: (collection, key, revision, value)."""


class Run(NamedTuple):
    """Where consecutive chunks of one stream rest: frame, place in its chunk batch, indexes."""

    segment: int
    offset: int
    start: int
    count: int
    index: int
    attempt: int
    types: tuple[str, ...]


class Stream(msgspec.Struct, array_like=True):
    """The stored chunks of one generation."""

    revision: int = 0
    next_index: int = 0
    closes: str = ""
    runs: list[Run] = []


class SessionRows:
    """What one session holds: rows by collection and key, chunk streams by generation."""

    __slots__ = ("bucket", "collections", "is_dirty", "streams")

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        self.collections: dict[str, dict[str, StoredRow]] = {}
        self.streams: dict[str, Stream] = {}
        self.is_dirty = False

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
    """One row before and after a commit, as the feed passes it on."""

    __slots__ = (
        "after",
        "append",
        "before",
        "bucket",
        "collection",
        "fields",
        "key",
        "revision",
        "session",
    )

    def __init__(
        self,
        revision: int,
        session: str,
        bucket: int,
        collection: str,
        key: str,
        before: StoredRow | None,
        after: StoredRow | None,
        append: Appended | None = None,
    ) -> None:
        self.revision = revision
        self.session = session
        self.bucket = bucket
        self.collection = collection
        self.key = key
        self.before = before
        self.after = after
        self.append = append
        self.fields: tuple[dict[str, Any] | None, dict[str, Any] | None] | None = None

    def to_change(self) -> Change:
        """Return the change as readers get it."""
        if self.append is None:
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
        return Change(self.revision, self.session, self.collection, self.key, value, is_new)


class LogColumns(NamedTuple):
    """The rows of one flush as columns for the log."""

    revisions: list[int]
    ops: list[int]
    sessions: list[str]
    collections: list[str]
    keys: list[str]
    values: list[bytes | None]


class Tables:
    """Rows of one partition at `revision`, the clients' newest batches and the runner epochs."""

    def __init__(self, load: Callable[[str], Sequence[SessionRow]] | None = None) -> None:
        self.revision = 0
        self.clients: dict[int, ClientRecord] = {}
        self.epochs: dict[str, RunnerEpochs] = {}
        self.sessions: dict[str, SessionRows] = {}
        self._load = load

    def session(self, name: str) -> SessionRows:
        """Return a session's rows, loading them first if they rest in the snapshot."""
        found = self.sessions.get(name)
        if found is None:
            found = self.sessions[name] = self._loaded(name)
        return found

    def peek(self, name: str) -> SessionRows:
        """Return a session's rows for reading, without keeping a session that has none."""
        return self.sessions.get(name) or self._loaded(name)

    def _loaded(self, name: str) -> SessionRows:
        session = SessionRows(bucket_of(name))
        if self._load is not None:
            for collection, key, revision, value in self._load(name):
                _put(session, collection, key, StoredRow(revision, value))
        return session

    def get(self, session: str, collection: str, key: str) -> StoredRow | None:
        """Return a row, or None."""
        return self.peek(session).collections.get(collection, {}).get(key)

    def load_system(self) -> None:
        """Read clients and epochs back from the system session."""
        system = self.session(SYSTEM).collections
        for key, row in system.get(CLIENTS, {}).items():
            self.clients[int(key)] = msgspec.msgpack.decode(row.value, type=ClientRecord)
        for agent, row in system.get(EPOCHS, {}).items():
            self.epochs[agent] = decode_epochs(row.value)

    def rest_in(self, load: Callable[[str], Sequence[SessionRow]], keep: int) -> None:
        """Load from a newer snapshot from now on; sessions it has leave memory above `keep`."""
        self._load = load
        excess = len(self.sessions) - keep
        if excess > 0:
            clean = [name for name, rows in self.sessions.items() if not rows.is_dirty]
            for name in clean[:excess]:
                if name != SYSTEM:
                    del self.sessions[name]

    def replay(
        self, columns: LogColumns, place: tuple[int, int], chunks: ChunkColumns
    ) -> Iterator[Entry]:
        """Apply a frame of the log again; yields what the feed may still be asked for.

        Safe over a snapshot that already has some of it: rows are whole after-images and frames
        come in order.
        """
        for revision, op, name, collection, key, value in zip(*columns, strict=True):
            session = self.session(name)
            session.is_dirty = True
            self.revision = max(self.revision, revision)
            if op == APPEND:
                assert value is not None
                wanted = msgspec.msgpack.decode(value, type=Append)
                stream = session.streams.setdefault(key, Stream())
                if wanted.index >= stream.next_index or wanted.closes:
                    _extend(stream, revision, wanted, wanted.start, place)
                append = Appended(wanted, chunks or EMPTY, wanted.start)
                yield Entry(revision, name, session.bucket, CHUNKS, key, None, None, append)
                continue
            rows = session.collections.setdefault(collection, {})
            before = rows.get(key)
            after = None if op == REMOVE else StoredRow(revision, value or b"")
            if after is None:
                rows.pop(key, None)
            else:
                rows[key] = after
            if name == SYSTEM:
                self._replay_system(collection, key, after)
            else:
                yield Entry(revision, name, session.bucket, collection, key, before, after)

    def _replay_system(self, collection: str, key: str, after: StoredRow | None) -> None:
        if collection == CLIENTS:
            if after is None:
                self.clients.pop(int(key), None)
            else:
                self.clients[int(key)] = msgspec.msgpack.decode(after.value, type=ClientRecord)
        elif after is not None:
            self.epochs[key] = decode_epochs(after.value)

    def apply(self, plan: Plan, place: tuple[int, int]) -> list[Entry]:
        """Make a plan so, once the log holds it at `place`; returns its changes in order."""
        for entry in plan.entries:
            session = self.session(entry.session)
            session.is_dirty = True
            if entry.append is not None:
                stream = session.streams.setdefault(entry.key, Stream())
                wanted, _, start = entry.append
                _extend(stream, entry.revision, wanted, start, place)
            elif entry.after is None:
                session.collections[entry.collection].pop(entry.key, None)
            else:
                rows = session.collections.get(entry.collection)
                if rows is None:
                    rows = session.collections[entry.collection] = {}
                rows[entry.key] = entry.after
        system = self.session(SYSTEM)
        for collection, key, row in plan.system:
            system.is_dirty = True
            rows = system.collections.setdefault(collection, {})
            if row is None:
                rows.pop(key, None)
            else:
                rows[key] = row
        self.clients = plan.clients_after(self.clients)
        self.epochs.update(plan.epochs)
        self.revision = plan.revision
        return plan.entries


def _put(session: SessionRows, collection: str, key: str, row: StoredRow) -> None:
    if collection == STREAMS:
        session.streams[key] = msgspec.msgpack.decode(row.value, type=Stream)
    else:
        session.collections.setdefault(collection, {})[key] = row


def _extend(
    stream: Stream, revision: int, wanted: Append, start: int, place: tuple[int, int]
) -> None:
    if wanted.count:
        run = Run(*place, start, wanted.count, wanted.index, wanted.attempt, wanted.types)
        stream.runs.append(run)
        stream.next_index = wanted.index + wanted.count
    stream.closes = wanted.closes or stream.closes
    stream.revision = revision


class Plan:
    """The commits of one flush, worked out against the rows as they are and each other.

    Nothing in `tables` changes. Each commit is accepted whole, with the next revision, or refused
    whole; what it saw were the applied rows plus the earlier accepted commits of this plan.
    """

    def __init__(self, tables: Tables, epoch: int) -> None:
        self._tables = tables
        self._epoch = epoch
        self._overlay: dict[tuple[str, str, str], StoredRow | None] = {}
        self._streams: dict[tuple[str, str], tuple[int, str]] = {}
        self._clients: dict[int, ClientRecord | None] = {}
        self.first_revision = tables.revision + 1
        self.revision = tables.revision
        self.entries: list[Entry] = []
        self.system: list[tuple[str, str, StoredRow | None]] = []
        self.epochs: dict[str, RunnerEpochs] = {}
        self.chunks: list[ChunkColumns] = []
        self._chunk_count = 0
        self.log = LogColumns([], [], [], [], [], [])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write: every batch in it had been answered before."""
        return not self.log.revisions

    def clients_after(self, clients: dict[int, ClientRecord]) -> dict[int, ClientRecord]:
        """Return the clients' records as they are after this plan."""
        for client_id, record in self._clients.items():
            if record is None:
                clients.pop(client_id, None)
            else:
                clients[client_id] = record
        return clients

    def add_client(self, supersedes: int) -> tuple[int, int]:
        """Register a client: return its id, and the last number that `supersedes` applied (or 0).

        Late batches of the superseded id are refused from then on.
        """
        self.revision += 1
        known = self._client(supersedes)
        if known is not None:
            self.drop_client(supersedes)
        self._set_client(self.revision, ClientRecord())
        return self.revision, known.last_seq if known else 0

    def drop_client(self, client_id: int) -> None:
        """Forget a client; its batches are refused from then on."""
        self._clients[client_id] = None
        self._write(self.revision, REMOVE, SYSTEM, CLIENTS, str(client_id), None)
        self.system.append((CLIENTS, str(client_id), None))

    def add_batch(self, batch: Batch, raw: bytes) -> Committed | Refusal:
        """Plan a client's batch, or answer it as before if it is one that was applied already."""
        record = self._client(batch.client_id)
        if record is None:
            return Refusal("unknown_client")
        checksum = crc32(raw)
        if batch.first_seq == record.first_seq and record.last_seq >= batch.first_seq:
            if checksum != record.checksum:
                return Refusal("idempotency_mismatch")
            return record.outcome
        if batch.first_seq != record.last_seq + 1:
            return Refusal("batch_gap", expected=record.last_seq + 1, got=batch.first_seq)
        chunks = batch.chunks or EMPTY
        first = self.revision + 1
        refused: list[tuple[int, Refusal]] = []
        for index, commit in enumerate(batch.commits):
            refusal = self._add_commit(commit, chunks)
            if refusal is not None:
                refused.append((index, refusal))
        if chunks.types:
            self.chunks.append(chunks)
            self._chunk_count += len(chunks.types)
        outcome = Committed(first, self._epoch, refused)
        last_seq = batch.first_seq + len(batch.commits) - 1
        record = ClientRecord(batch.first_seq, last_seq, checksum, outcome)
        self._set_client(batch.client_id, record)
        return outcome

    def _client(self, client_id: int) -> ClientRecord | None:
        if client_id in self._clients:
            return self._clients[client_id]
        return self._tables.clients.get(client_id)

    def _set_client(self, client_id: int, record: ClientRecord) -> None:
        self._clients[client_id] = record
        value = encode(record)
        self._write(self.revision, PUT, SYSTEM, CLIENTS, str(client_id), value)
        self.system.append((CLIENTS, str(client_id), StoredRow(self.revision, value)))

    def _add_commit(self, commit: Commit, chunks: ChunkColumns) -> Refusal | None:
        revision = self.revision + 1
        ends: dict[tuple[str, str, str], StoredRow | None] = {}
        streams: dict[tuple[str, str], tuple[int, str]] = {}
        claims: list[ClaimBuckets] = []
        runner = commit.runner
        for mutation in commit.mutations:
            if isinstance(mutation, ClaimBuckets):
                claims.append(mutation)
                continue
            refusal = None if runner is None else self._fence(runner, mutation.session)
            if refusal is None:
                if isinstance(mutation, Append):
                    refusal = self._plan_append(mutation, chunks, streams)
                else:
                    refusal = self._plan_row(mutation, revision, ends)
            if refusal is not None:
                return refusal
        self.revision = revision
        self._accept(commit.mutations, revision, ends, chunks)
        self._overlay.update(ends)
        self._streams.update(streams)
        for claim in claims:
            self._claim(claim, revision)
        return None

    def _plan_row(
        self,
        mutation: Insert | Update | Delete,
        revision: int,
        ends: dict[tuple[str, str, str], StoredRow | None],
    ) -> Refusal | None:
        where = (mutation.session, mutation.collection, mutation.key)
        row = ends[where] if where in ends else self._row(where)
        if isinstance(mutation, Insert):
            if row is not None:
                return Refusal("exists", mutation.collection, mutation.key)
        elif row is None:
            return Refusal("missing", mutation.collection, mutation.key)
        elif mutation.base not in (row.revision, 0) and row.revision != revision:
            return Refusal("conflict", mutation.collection, mutation.key, row.value, row.revision)
        if isinstance(mutation, Delete):
            ends[where] = None
            return None
        if len(mutation.value) > MAX_ROW_BYTES:
            return Refusal(
                "too_large",
                mutation.collection,
                mutation.key,
                expected=MAX_ROW_BYTES,
                got=len(mutation.value),
            )
        ends[where] = StoredRow(revision, mutation.value)
        return None

    def _row(self, where: tuple[str, str, str]) -> StoredRow | None:
        if where in self._overlay:
            return self._overlay[where]
        session, collection, key = where
        rows = self._tables.session(session).collections.get(collection)
        return None if rows is None else rows.get(key)

    def _plan_append(
        self,
        wanted: Append,
        chunks: ChunkColumns,
        streams: dict[tuple[str, str], tuple[int, str]],
    ) -> Refusal | None:
        where = (wanted.session, wanted.generation_id)
        state = streams.get(where) or self._streams.get(where)
        if state is None:
            stream = self._tables.session(wanted.session).streams.get(wanted.generation_id)
            state = (stream.next_index, stream.closes) if stream else (0, "")
        next_index, closes = state
        if closes:
            return Refusal("stream_closed", CHUNKS, wanted.generation_id)
        if wanted.index != next_index:
            return Refusal(
                "sequence_gap",
                CHUNKS,
                wanted.generation_id,
                expected=next_index,
                got=wanted.index,
            )
        if wanted.start < 0 or wanted.count < 0 or wanted.start + wanted.count > len(chunks.types):
            return Refusal("invalid_batch", CHUNKS, wanted.generation_id)
        streams[where] = (next_index + wanted.count, wanted.closes)
        return None

    def _fence(self, runner: Runner, session: str) -> Refusal | None:
        holders = self.epochs.get(runner.agent) or self._tables.epochs.get(runner.agent)
        bucket = self._tables.session(session).bucket
        current = holders.epoch_of(bucket) if holders else 0
        if current == runner.epoch:
            return None
        resource = f"{runner.agent} in {session}"
        return Refusal("fenced", key=resource, expected=current, got=runner.epoch)

    def _accept(
        self,
        mutations: Sequence[Mutation],
        revision: int,
        ends: dict[tuple[str, str, str], StoredRow | None],
        chunks: ChunkColumns,
    ) -> None:
        for mutation in mutations:
            if isinstance(mutation, Append):
                name, generation_id = mutation.session, mutation.generation_id
                bucket = self._tables.session(name).bucket
                start = self._chunk_count + mutation.start
                stored = encode(msgspec.structs.replace(mutation, start=start))
                append = Appended(mutation, chunks, start)
                self._write(revision, APPEND, name, CHUNKS, generation_id, stored)
                self.entries.append(
                    Entry(revision, name, bucket, CHUNKS, generation_id, None, None, append)
                )
        for where, after in ends.items():
            session, collection, key = where
            before = self._row(where)
            if before is None and after is None:
                continue
            bucket = self._tables.session(session).bucket
            self._write(
                revision,
                REMOVE if after is None else PUT,
                session,
                collection,
                key,
                None if after is None else after.value,
            )
            self.entries.append(Entry(revision, session, bucket, collection, key, before, after))

    def _claim(self, claim: ClaimBuckets, revision: int) -> None:
        holders = (
            self.epochs.get(claim.agent) or self._tables.epochs.get(claim.agent) or RunnerEpochs()
        )
        self.epochs[claim.agent] = holders = holders.claim(claim.low, claim.high, revision)
        value = holders.encode()
        self._write(revision, PUT, SYSTEM, EPOCHS, claim.agent, value)
        self.system.append((EPOCHS, claim.agent, StoredRow(revision, value)))

    def _write(
        self,
        revision: int,
        op: int,
        session: str,
        collection: str,
        key: str,
        value: bytes | None,
    ) -> None:
        log = self.log
        log.revisions.append(revision)
        log.ops.append(op)
        log.sessions.append(session)
        log.collections.append(collection)
        log.keys.append(key)
        log.values.append(value)
