"""The commits of one flush, worked out before anything is written. Changes nothing. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias, cast
from zlib import crc32

import msgspec

from aidb_ray.store.changes import (
    BUCKETS,
    CHUNKS,
    MAX_FORK_BYTES,
    MAX_ROW_BYTES,
    Append,
    Batch,
    ChunkColumns,
    Claim,
    ClaimBuckets,
    Commit,
    Committed,
    Delete,
    DeleteSession,
    Disown,
    Fork,
    Insert,
    Mutation,
    Refusal,
    Release,
    Renew,
    Retain,
    Runner,
    StoredRow,
    Update,
    encode,
)
from aidb_ray.store.claim_plan import Claiming, ClaimPlan, Ends
from aidb_ray.store.claims import CLAIMS, LOG_TICKS_MS, RunnerEpochs
from aidb_ray.store.columns import EMPTY
from aidb_ray.store.forks import fork_rows
from aidb_ray.store.retention import Victim
from aidb_ray.store.streams import Stream
from aidb_ray.store.tables import (
    APPEND,
    CLIENTS,
    EPOCHS,
    FORKS,
    LEASES,
    POLICIES,
    PUT,
    REMOVE,
    REMOVE_SESSION,
    REMOVE_STREAM,
    SHARE,
    SYSTEM,
    TIMES,
    Appended,
    ClientRecord,
    Entry,
    LogColumns,
    Removed,
    RowEnd,
    SessionRows,
    Tables,
    Where,
)

Past: TypeAlias = Mapping[tuple[str, int], SessionRows | Refusal]
"""By session and revision, what it was then, or why that is not known."""

NO_PAST: Past = {}

_UNKNOWN = StoredRow(-1, b"")
_NO_STREAM = (0, "")
_OF_NO_SESSION = frozenset({ClaimBuckets, Renew, Disown, Retain})


class Plan:
    """The commits of one flush, worked out against the rows as they are and each other.

    Each commit is accepted whole, with the next revision, or refused whole; what it saw were the
    applied rows plus the earlier accepted commits of this plan. Refused commits take no revision.

    Attributes:
        first_revision: Revision of the first accepted commit, if there is one.
        revision: Revision of the last accepted commit.
        entries: What changed, in order; to be applied once `log` and `chunks` are durable.
        system: Changes of the store's own rows, as (collection, key, row).
        clients: Changed records of clients; None where one was dropped.
        deleted: Sessions that were deleted whole, and when.
    """

    def __init__(self, tables: Tables, epoch: int) -> None:
        self._tables = tables
        self._epoch = epoch
        self._overlay: dict[Where, StoredRow | None] = {}
        self._streams: dict[tuple[str, str], tuple[int, str]] = {}
        self._past: Past = {}
        self.deleted: dict[str, int] = {}
        self._claims = ClaimPlan(tables, self._look, self._put_system)
        self._chunk_count = 0
        self.first_revision = tables.revision + 1
        self.revision = tables.revision
        self.entries: list[Entry] = []
        self.system: list[tuple[str, str, StoredRow | None]] = []
        self.clients: dict[int, ClientRecord | None] = {}
        self.epochs: dict[str, RunnerEpochs] = {}
        self.chunks: list[ChunkColumns] = []
        self.log = LogColumns([], [], [], [], [], [])

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write: every batch in it had been answered before."""
        return not self.log.revisions

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
        self.clients[client_id] = None
        self._put_system(self.revision, CLIENTS, str(client_id), None)

    def add_batch(self, batch: Batch, raw: bytes, past: Past = NO_PAST) -> Committed | Refusal:
        """Plan a client's batch, or answer it as before if it is one that was applied already.

        `past` has sessions as forks of the batch need them, or why they cannot be had.
        """
        self._past = past
        record = self._client(batch.client_id)
        if record is None:
            return Refusal("unknown_client")
        checksum = crc32(raw)
        if batch.first_seq == record.first_seq and record.last_seq >= batch.first_seq:
            if checksum != record.checksum:
                return Refusal("idempotency_mismatch", key=f"{batch.client_id}:{batch.first_seq}")
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
        self._set_client(
            batch.client_id, ClientRecord(batch.first_seq, last_seq, checksum, outcome)
        )
        return outcome

    def end_leases(self) -> None:
        """End the leases whose time is over, unless they were renewed in this plan."""
        leases = self._tables.leases
        ends, claiming = self._claims.disown_expired(self.revision + 1)
        if claiming.disowned:
            self.revision += 1
            self._accept_rows(self.revision, ends)
            self._claims.accept(self.revision, claiming)
        if leases.holders and leases.now_ms - leases.logged_ms >= LOG_TICKS_MS:
            self._put_system(self.revision, LEASES, "now", encode(leases.now_ms))

    def expire(self, victims: Sequence[Victim]) -> int:
        """Remove rows and streams whose time is over, if they are as they were; return how many."""
        revision = self.revision + 1
        ends: Ends = {}
        claiming = Claiming()
        streams: list[Victim] = []
        removed = 0
        for victim in victims:
            where = (victim.session, victim.collection, victim.key)
            if victim.collection == CHUNKS:
                streams += [victim] if self._is_as_it_was(victim) else []
                continue
            end = self._look(where)
            if end.after is None or end.after.revision != victim.revision:
                continue
            if self._claims.is_worked_on(where, ends):
                continue
            end.after = None
            ends[where] = end
            self._claims.forget(Delete(*where), ends, claiming)
            removed += 1
        if not removed and not streams:
            return 0
        self.revision = revision
        self._accept_rows(revision, ends)
        self._claims.accept(revision, claiming)
        for name, _, generation_id, _ in streams:
            self._streams[name, generation_id] = _NO_STREAM
            self._write(revision, REMOVE_STREAM, name, CHUNKS, generation_id, None)
            home = self._tables.session(name)
            self.entries.append(Entry(revision, home, CHUNKS, generation_id, None, None))
        return removed + len(streams)

    def _is_as_it_was(self, victim: Victim) -> bool:
        stream = self._tables.session(victim.session).streams.get(victim.key)
        is_untouched = (victim.session, victim.key) not in self._streams
        return is_untouched and stream is not None and stream.revision == victim.revision

    def mark_time(self, now_ms: int) -> None:
        """Note when the revisions so far were written, if rows are kept for a while only."""
        tables = self._tables
        for at, at_ms in list(tables.retention.new_marks(tables.revision, now_ms)):
            value = None if at_ms is None else encode(at_ms)
            self._put_system(self.revision, TIMES, f"{at:016x}", value)

    def _client(self, client_id: int) -> ClientRecord | None:
        if client_id in self.clients:
            return self.clients[client_id]
        return self._tables.clients.get(client_id)

    def _set_client(self, client_id: int, record: ClientRecord) -> None:
        self.clients[client_id] = record
        self._put_system(self.revision, CLIENTS, str(client_id), encode(record))

    def _add_commit(self, commit: Commit, chunks: ChunkColumns) -> Refusal | None:
        revision = self.revision + 1
        ends: Ends = {}
        streams: dict[tuple[str, str], tuple[int, str]] = {}
        claims: list[ClaimBuckets] = []
        policies: list[Retain] = []
        runner, held = commit.runner, commit.held
        claiming: Claiming | None = None
        if held is not None:
            claiming = Claiming(held.token)
            refusal = self._claims.check_held(held, ends)
            if refusal is not None:
                return refusal
        if commit.needs and (refusal := self._check_needs(commit)) is not None:
            return refusal
        for mutation in commit.mutations:
            kind = type(mutation)
            refusal = None
            if runner is not None and kind not in _OF_NO_SESSION:
                refusal = self._fence(runner, cast("Insert", mutation).session)
            if refusal is not None:
                return refusal
            # Most are inserts and updates, and of those there are many.
            if kind is Insert or kind is Update:
                refusal = self._plan_row(cast("Insert | Update", mutation), revision, ends)
            elif isinstance(mutation, Delete):
                refusal = self._plan_row(mutation, revision, ends)
                if refusal is None:
                    claiming = claiming or Claiming()
                    self._claims.forget(mutation, ends, claiming)
            elif isinstance(mutation, Append):
                refusal = self._plan_append(mutation, chunks, streams)
            elif isinstance(mutation, DeleteSession):
                return self._delete_session(mutation.session, revision, commit)
            elif isinstance(mutation, Fork):
                return self._fork(mutation, revision, commit)
            elif isinstance(mutation, Retain):
                if mutation.keep_ms < 0 or mutation.collection.startswith("~"):
                    return Refusal("invalid_retention")
                policies.append(mutation)
            elif isinstance(mutation, ClaimBuckets):
                if not 0 <= mutation.low < mutation.high <= BUCKETS:
                    return Refusal("invalid_buckets")
                claims.append(mutation)
            else:
                claiming = claiming or Claiming()
                of_claims = cast("Claim | Release | Renew | Disown", mutation)
                refusal = self._claims.plan(of_claims, revision, ends, claiming)
            if refusal is not None:
                return refusal
        self.revision = revision
        if streams:
            self._accept_appends(commit.mutations, revision, chunks)
            self._streams.update(streams)
        self._accept_rows(revision, ends)
        for claim in claims:
            self._claim(claim, revision)
        for policy in policies:
            value = encode(policy.keep_ms) if policy.keep_ms else None
            key = f"{policy.collection}\0{policy.session}"
            self._put_system(revision, POLICIES, key, value)
        if claiming is not None:
            self._claims.accept(revision, claiming)
        return None

    def _plan_row(
        self, mutation: Insert | Update | Delete, revision: int, ends: Ends
    ) -> Refusal | None:
        where = (mutation.session, mutation.collection, mutation.key)
        end = ends.get(where)
        if end is None:
            if where[0] == SYSTEM or where[1] == CHUNKS or where[1].startswith("~"):
                return Refusal("reserved_name", mutation.collection, mutation.key)
            end = ends[where] = self._look(where)
        row = end.after
        if isinstance(mutation, Insert):
            if row is not None:
                return Refusal("exists", mutation.collection, mutation.key)
        elif row is None:
            return Refusal("missing", mutation.collection, mutation.key)
        elif mutation.base not in (row.revision, 0) and row.revision != revision:
            return Refusal("conflict", mutation.collection, mutation.key, row.value, row.revision)
        if isinstance(mutation, Delete):
            end.after = None
            return None
        value = mutation.value
        if len(value) > MAX_ROW_BYTES:
            got = len(value)
            return Refusal(
                "too_large", mutation.collection, mutation.key, expected=MAX_ROW_BYTES, got=got
            )
        end.after = StoredRow(revision, value)
        return None

    def _look(self, where: Where) -> RowEnd:
        session, collection, key = where
        home = self._tables.session(session)
        row = self._overlay.get(where, _UNKNOWN)
        if row is _UNKNOWN:
            rows = home.collections.get(collection)
            row = None if rows is None else rows.get(key)
        return RowEnd(home, row)

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
            state = (stream.next_index, stream.closes) if stream else _NO_STREAM
        next_index, closes = state
        if wanted.index < 0:
            return Refusal("invalid_index", CHUNKS, wanted.generation_id, got=wanted.index)
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

    def _put_system(self, revision: int, collection: str, key: str, value: bytes | None) -> None:
        row = None if value is None else StoredRow(revision, value)
        self._write(revision, REMOVE if row is None else PUT, SYSTEM, collection, key, value)
        self.system.append((collection, key, row))

    def _check_needs(self, commit: Commit) -> Refusal | None:
        for need in commit.needs:
            if commit.runner is not None:
                refusal = self._fence(commit.runner, need.session)
                if refusal is not None:
                    return refusal
            row = self._look((need.session, need.collection, need.key)).after
            if row is None or need.base not in (row.revision, 0):
                return Refusal("gone", need.collection, need.key)
        return None

    def _delete_session(self, name: str, revision: int, commit: Commit) -> Refusal | None:
        if len(commit.mutations) > 1:
            return Refusal("not_alone")
        if name in ("", SYSTEM):
            return Refusal("reserved_name")
        self.revision = self.deleted[name] = revision
        home = self._tables.session(name)
        rows, streams = self._rows_of(home), self._streams_of(home)
        # Noted even if it holds nothing now: no fork may bring back what it held before.
        removed = Removed({}, streams)
        for generation_id in streams:
            self._streams[name, generation_id] = _NO_STREAM
            self.entries.append(Entry(revision, home, CHUNKS, generation_id, None, None))
        for where, row in rows.items():
            _, collection, key = where
            self._overlay[where] = None
            self.entries.append(Entry(revision, home, collection, key, row, None))
            removed.rows.setdefault(collection, []).append(key)
        self._write(revision, REMOVE_SESSION, name, "", "", encode(removed))
        claims = [row.value for (_, collection, _), row in rows.items() if collection == CLAIMS]
        self._claims.forget_session(name, revision, claims)
        return None

    def _fork(self, fork: Fork, revision: int, commit: Commit) -> Refusal | None:
        if len(commit.mutations) > 1:
            return Refusal("not_alone")
        if {fork.session, fork.source} & {"", SYSTEM}:
            return Refusal("reserved_name")
        home, source = self._tables.session(fork.session), self._tables.session(fork.source)
        if self._rows_of(home) or self._streams_of(home):
            return Refusal("session_exists", key=fork.session)
        session = self._as_of(source, fork.at)
        if isinstance(session, Refusal):
            return session
        rows = list(fork_rows(_shared_rows(session, source)))
        size = sum(len(value) for _, _, value in rows)
        if size > MAX_FORK_BYTES:
            return Refusal("session_too_large", key=fork.source, expected=MAX_FORK_BYTES, got=size)
        self.revision = revision
        self._accept_rows(
            revision,
            {
                (home.name, collection, key): RowEnd(home, None, StoredRow(revision, value))
                for collection, key, value in rows
            },
        )
        for generation_id, stream in session.streams.items():
            now = source.streams.get(generation_id)
            is_gone = self._streams.get((source.name, generation_id)) == _NO_STREAM
            if now is None or is_gone or now.runs[: len(stream.runs)] != stream.runs:
                # Removed since, and perhaps begun anew.
                continue
            # Whoever was writing it does not write here.
            closes = stream.closes or "cancelled"
            shared = Stream(revision, stream.next_index, closes, list(stream.runs))
            self._streams[home.name, generation_id] = (shared.next_index, closes)
            self._write(revision, SHARE, home.name, CHUNKS, generation_id, encode(shared))
            entry = Entry(revision, home, CHUNKS, generation_id, None, None, stream=shared)
            self.entries.append(entry)
        self._put_system(revision, FORKS, "any", b"")
        return None

    def _as_of(self, source: SessionRows, at: int) -> SessionRows | Refusal:
        """Return a session as an applied revision left it, or why that cannot be told.

        Commits of this plan do not count, for where chunks of theirs will lie is not known yet.
        """
        tables = self._tables
        if at > tables.revision:
            return Refusal("revision_in_future", expected=tables.revision, got=at)
        is_now = at < 0 or at == tables.revision
        deleted_at = self.deleted.get(source.name, 0)
        if not is_now:
            deleted_at = deleted_at or tables.deleted_since(source.name, at)
        if deleted_at and at < 0:
            return SessionRows(source.name)
        if deleted_at:
            return Refusal("compacted", key=source.name, expected=deleted_at, got=at)
        if is_now:
            return source
        # Asked for when it was still to come, it was not looked up.
        unknown = Refusal("revision_in_future", expected=at - 1, got=at)
        return self._past.get((source.name, at), unknown)

    def _rows_of(self, home: SessionRows) -> dict[Where, StoredRow]:
        """Return all rows of a session as the earlier commits of this plan leave them."""
        found: dict[Where, StoredRow | None] = {
            (home.name, collection, key): row
            for collection, rows in home.collections.items()
            for key, row in rows.items()
        }
        found.update((where, row) for where, row in self._overlay.items() if where[0] == home.name)
        return {where: row for where, row in found.items() if row is not None}

    def _streams_of(self, home: SessionRows) -> list[str]:
        """Return the generations of a session with chunks, those of this plan included."""
        ids = dict.fromkeys(home.streams)
        ids.update((key, None) for name, key in self._streams if name == home.name)
        return [key for key in ids if self._streams.get((home.name, key)) != _NO_STREAM]

    def _accept_appends(
        self, mutations: Sequence[Mutation], revision: int, chunks: ChunkColumns
    ) -> None:
        for mutation in mutations:
            if not isinstance(mutation, Append):
                continue
            home = self._tables.session(mutation.session)
            key = mutation.generation_id
            start = self._chunk_count + mutation.start
            stored = encode(msgspec.structs.replace(mutation, start=start))
            self._write(revision, APPEND, home.name, CHUNKS, key, stored)
            append = Appended(mutation, chunks, start)
            self.entries.append(Entry(revision, home, CHUNKS, key, None, None, append))

    def _accept_rows(self, revision: int, ends: Ends) -> None:
        for where, end in ends.items():
            before, after = end.before, end.after
            if before is after:
                continue
            _, collection, key = where
            home = end.home
            value = None if after is None else after.value
            op = REMOVE if after is None else PUT
            self._write(revision, op, home.name, collection, key, value)
            self._overlay[where] = after
            self.entries.append(Entry(revision, home, collection, key, before, after))

    def _claim(self, claim: ClaimBuckets, revision: int) -> None:
        holders = (
            self.epochs.get(claim.agent) or self._tables.epochs.get(claim.agent) or RunnerEpochs()
        )
        self.epochs[claim.agent] = holders = holders.claim(claim.low, claim.high, revision)
        self._put_system(revision, EPOCHS, claim.agent, holders.encode())

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


def _shared_rows(past: SessionRows, now: SessionRows) -> Iterator[tuple[str, str, StoredRow]]:
    """Yield the rows of a session as it was, the very rows where they are still the same."""
    for collection, rows in past.collections.items():
        current = now.collections.get(collection, {})
        for key, row in rows.items():
            same = current.get(key)
            is_same = same is not None and same.revision == row.revision
            yield collection, key, same if same is not None and is_same else row
