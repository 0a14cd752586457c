"""One partition of a database: the single writer of its rows.

It decides nothing itself: `Plan` decides, `CommitLog` remembers, `Feed` tells. One flusher task
plans, writes, syncs and applies; nothing else plans. Only the sync is awaited, in a thread, so
reads and polls see applied rows only, and every answer, refusals included, waits for the sync.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias
from uuid import uuid4

import msgspec

from aidb_ray.errors import (
    AidbError,
    ConfigError,
    ContractError,
    StorageError,
    StorageFullError,
    StoreLockedError,
    UnavailableError,
)
from aidb_ray.store import changes as wire
from aidb_ray.store.changes import (
    MAX_BATCH_BYTES,
    MAX_BATCH_COMMITS,
    Batch,
    ChunkColumns,
    ChunkPage,
    ChunkSlice,
    Committed,
    Filter,
    FoundRow,
    PollRequest,
    ReadRequest,
    Refusal,
    RowPage,
    SessionRowsRead,
)
from aidb_ray.store.columns import from_arrow, is_consistent, to_arrow
from aidb_ray.store.feed import CATCHING_UP_BYTES, TAILING_BYTES, Feed, Interest
from aidb_ray.store.tables import SYSTEM, LogColumns, Plan, Run, SessionRow, Tables

if TYPE_CHECKING:
    from aidb_ray.store.files import FileSystem
    from aidb_ray.store.log import CommitLog, MemoryLog

logger = logging.getLogger(__name__)

LOCK_WAIT_MS = 20_000
CLIENT_SILENCE_MS = 15 * 60_000
MAX_POLLS = 2_000
MAX_QUEUED_BYTES = 256 << 20
SLICE_MS = 5
"""Longest piece of work between two turns of the event loop."""

Log: TypeAlias = "CommitLog | MemoryLog"


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a store needs to open.

    Attributes:
        directory: Where the partition's log lies; ignored for `memory`.
        store_uuid: The directory must belong to this store.
        snapshot_bytes: A snapshot starts when the log grew by this much, or by the size of the
            newest snapshot if that is more; recovery replays at most about that.
        max_resident_sessions: Above it, sessions that rest in the snapshot leave memory.
    """

    database: str
    partition: int
    durability: Literal["memory", "local"]
    directory: str
    store_uuid: str
    segment_bytes: int = 64 << 20
    reserve_bytes: int = 64 << 20
    snapshot_bytes: int = 64 << 20
    max_resident_sessions: int = 200_000


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a store is doing.

    Attributes:
        state: `recovering`, `serving`, `disk_full` or `failed`.
        generation: Names this incarnation's history: cursors of another one are refused.
        torn_bytes: Bytes of an unfinished write that recovery cut off.
    """

    state: str
    pid: int
    database: str
    partition: int
    store_uuid: str
    generation: str
    revision: int
    epoch: int
    sessions: int
    durability: str
    filesystem: str = ""
    fdatasyncs: int = 0
    logged_rows: int = 0
    logged_bytes: int = 0
    torn_bytes: int = 0
    recovery_ms: int = 0


class _Arrival:
    """A batch, or a registration, on its way to the disk."""

    __slots__ = ("batch", "outcome", "raw", "supersedes")

    def __init__(
        self,
        outcome: asyncio.Future[Committed | Refusal | tuple[int, int]],
        batch: Batch | None,
        raw: bytes,
        supersedes: int = 0,
    ) -> None:
        self.outcome = outcome
        self.batch = batch
        self.raw = raw
        self.supersedes = supersedes


@dataclass(slots=True)
class _Poll:
    """A reader that waits for news."""

    interest: Interest
    after: int
    news: asyncio.Future[None]


@dataclass(slots=True)
class _Interests:
    """Arranged filters by feed, so that a reader's filters are arranged once, not every poll."""

    by_feed: dict[str, Interest] = field(default_factory=dict[str, Interest])

    def of(self, request: PollRequest) -> Interest:
        known = self.by_feed.get(request.feed_id)
        if known is None or known.filters != request.filters:
            if len(self.by_feed) >= MAX_POLLS:
                self.by_feed.pop(next(iter(self.by_feed)))
            known = self.by_feed[request.feed_id] = Interest(request.filters)
        return known


class StoreActor:
    """Single writer of one partition's rows.

    Recovery runs at the first call, not in `__init__`: Ray never restarts an actor whose
    constructor raised. `die` is called when the disk can no longer be trusted; the default ends
    the process, and Ray starts a fresh one that recovers from the log.
    """

    def __init__(
        self,
        options: StoreOptions,
        *,
        files: FileSystem | None = None,
        die: Callable[[], None] | None = None,
    ) -> None:
        self._options = options
        self._files = files
        self._die = die or _end_process
        self._opening: asyncio.Task[None] | None = None
        self._state = "recovering"
        self._log: Log
        self._tables: Tables
        self._feed: Feed
        self._generation = ""
        self._recovery_ms = 0
        self._arrivals: list[_Arrival] = []
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        self._polls: dict[str, _Poll] = {}
        self._interests = _Interests()
        self._client_seen: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged_at_snapshot = 0
        self._snapshot_bytes = 0
        self._snapshot: asyncio.Task[None] | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="aidb-disk")

    # Opening and closing.

    async def start(self) -> StoreStatus:
        """Recover if that has not happened yet, and return the status.

        Raises:
            StoreLockedError: another process still has the directory after 20 s.
            StorageError: the directory is missing, foreign or damaged; nothing was changed.
        """
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        try:
            await asyncio.shield(self._opening)
        except AidbError:
            # The next call tries again: an operator may have mended the directory.
            if self._opening.done():
                self._opening = None
            raise
        return self._status()

    async def _open(self) -> None:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        self._log = await self._open_log(loop, began)
        snapshot = self._log.snapshot()
        tables = Tables(snapshot.load if snapshot else None)
        tables.revision = snapshot.revision if snapshot else 0
        tables.load_system()
        feed = Feed(tables.revision)
        for place, frame in self._log.frames(tables.revision):
            chunks = None if frame.chunks is None else from_arrow(frame.chunks)
            rows = frame.rows
            columns = LogColumns(
                rows.revisions, rows.ops, rows.sessions, rows.collections, rows.keys, rows.values
            )
            entries = list(tables.replay(columns, (place.segment, place.offset), chunks))
            feed.extend(entries, tables.revision)
        self._tables, self._feed = tables, feed
        durable = self._options.durability == "local"
        self._generation = self._log.store_uuid if durable else str(uuid4())
        now = time.monotonic()
        self._client_seen = dict.fromkeys(tables.clients, now)
        self._recovery_ms = round((now - began) * 1000)
        self._state = "serving"
        task = loop.create_task(self._flush_forever())
        self._tasks.add(task)
        logger.info(
            "store opened",
            extra={"revision": tables.revision, "recovery_ms": self._recovery_ms},
        )

    async def _open_log(self, loop: asyncio.AbstractEventLoop, began: float) -> Log:
        from aidb_ray.store.files import FileSystem
        from aidb_ray.store.log import CommitLog, MemoryLog

        options = self._options
        if options.durability == "memory":
            return MemoryLog(
                store_uuid=options.store_uuid,
                database=options.database,
                partition=options.partition,
            )
        files = self._files or FileSystem()
        wait_s = 0.02
        while True:
            try:
                return await loop.run_in_executor(
                    self._disk,
                    lambda: CommitLog.open(
                        Path(options.directory),
                        files,
                        expected_uuid=options.store_uuid,
                        segment_bytes=options.segment_bytes,
                        reserve_bytes=options.reserve_bytes,
                    ),
                )
            except StoreLockedError:
                # A killed process may still be ending; its lock goes when it has gone.
                if (time.monotonic() - began) * 1000 > LOCK_WAIT_MS:
                    raise
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, 0.5)

    async def _ready(self) -> None:
        if self._state == "recovering":
            await self.start()
        if self._state == "failed":
            raise UnavailableError("The store has failed and is ending.", outcome="not_applied")

    async def stop(self) -> None:
        """Finish what was accepted, then close the log. Calls made later are refused."""
        if self._opening is None:
            return
        await asyncio.wait([self._opening])
        while self._arrivals and self._state != "failed":
            waiting = [arrival.outcome for arrival in self._arrivals]
            await asyncio.wait(waiting)
        self._state = "failed"
        tasks = [*self._tasks, *([self._snapshot] if self._snapshot else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for poll in self._polls.values():
            if not poll.news.done():
                poll.news.set_result(None)
        loop = asyncio.get_running_loop()
        if self._opening.exception() is None:
            await loop.run_in_executor(self._disk, self._log.close)
        self._disk.shutdown(wait=False)

    # Writing.

    async def register(self, supersedes: int = 0) -> tuple[int, int, str]:
        """Register a client: return its id, the last number `supersedes` applied, the generation.

        Batches of the superseded id that are still on their way are refused from now on, so an
        unknown outcome becomes known: applied exactly if its number is at most the returned one.
        """
        await self._ready()
        outcome = await self._enqueue(None, b"", supersedes)
        assert isinstance(outcome, tuple)
        return (*outcome, self._generation)

    async def commit(self, raw: bytes) -> bytes:
        """Apply an encoded `Batch`; returns an encoded `Committed` once it is durable.

        Each commit in it is accepted or refused by itself. A batch sent again is answered as the
        first time, even after a restart. A caller that is cancelled only stops waiting.

        Raises:
            UnavailableError: `unknown_client`: register again. Outcome `unknown`: the disk failed.
            StorageFullError: no space; nothing of the batch was kept.
        """
        await self._ready()
        batch = _checked_batch(raw)
        outcome = await self._enqueue(batch, raw, 0)
        if isinstance(outcome, Refusal):
            raise outcome.to_error()
        return wire.encode(outcome)

    async def _enqueue(
        self, batch: Batch | None, raw: bytes, supersedes: int
    ) -> Committed | Refusal | tuple[int, int]:
        if self._queued_bytes > MAX_QUEUED_BYTES:
            raise UnavailableError(
                "The store has 256 MiB of commits waiting; send again later.",
                outcome="not_applied",
                code="overloaded",
            )
        outcome: asyncio.Future[Committed | Refusal | tuple[int, int]]
        outcome = asyncio.get_running_loop().create_future()
        self._arrivals.append(_Arrival(outcome, batch, raw, supersedes))
        self._queued_bytes += len(raw)
        self._arrived.set()
        return await asyncio.shield(outcome)

    async def _flush_forever(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while self._arrivals:
                    await self._flush()
        except asyncio.CancelledError:
            raise
        except BaseException:
            # Whatever this is, rows and log may differ now: stop serving and recover from disk.
            logger.critical("the flusher failed; the store ends", exc_info=True)
            self._fail([])

    async def _flush(self) -> None:
        taken = self._take()
        plan = Plan(self._tables, self._log.epoch)
        now = time.monotonic()
        answers: list[Committed | Refusal | tuple[int, int]] = []
        for arrival in taken:
            if arrival.batch is None:
                client_id, last_seq = plan.add_client(arrival.supersedes)
                self._client_seen[client_id] = now
                answers.append((client_id, last_seq))
            else:
                self._client_seen[arrival.batch.client_id] = now
                answers.append(plan.add_batch(arrival.batch, arrival.raw))
        self._drop_silent_clients(plan, now)
        if not plan.is_empty:
            try:
                place = await self._write(plan)
            except StorageFullError as error:
                self._state = "disk_full"
                _answer_all(taken, error)
                return
            except StorageError as error:
                logger.critical("the log cannot be written: %s", error)
                self._fail(taken)
                return
            self._state = "serving"
            entries = self._tables.apply(plan, place)
            self._feed.extend(entries, self._tables.revision)
            self._wake_polls()
        for arrival, answer in zip(taken, answers, strict=True):
            if not arrival.outcome.done():
                arrival.outcome.set_result(answer)
        self._consider_snapshot()

    def _take(self) -> list[_Arrival]:
        # What arrived during the last sync, up to a bound; the rest is the next flush.
        commits = size = taken = 0
        for arrival in self._arrivals:
            if taken and (commits >= MAX_BATCH_COMMITS or size >= MAX_BATCH_BYTES):
                break
            taken += 1
            commits += len(arrival.batch.commits) if arrival.batch else 1
            size += len(arrival.raw)
        batch, self._arrivals = self._arrivals[:taken], self._arrivals[taken:]
        self._queued_bytes -= size
        return batch

    async def _write(self, plan: Plan) -> tuple[int, int]:
        from aidb_ray.store.log import Frame, Rows

        frame = Frame(
            first_revision=plan.first_revision,
            commits=plan.revision - plan.first_revision + 1,
            rows=Rows(*plan.log),
            chunks=to_arrow(plan.chunks) if plan.chunks else None,
        )
        loop = asyncio.get_running_loop()
        position = await loop.run_in_executor(self._disk, self._log.append, frame)
        return position.segment, position.offset

    def _drop_silent_clients(self, plan: Plan, now: float) -> None:
        if len(self._client_seen) < 2:
            return
        oldest, seen = next(iter(self._client_seen.items()))
        if (now - seen) * 1000 > CLIENT_SILENCE_MS:
            del self._client_seen[oldest]
            if oldest in self._tables.clients:
                plan.drop_client(oldest)

    def _fail(self, taken: list[_Arrival]) -> None:
        self._state = "failed"
        error = UnavailableError(
            "The log could not be written. The commit may be on the disk or not; "
            "the store restarts and the client finds out.",
            outcome="unknown",
        )
        _answer_all([*taken, *self._arrivals], error)
        self._arrivals = []
        self._die()

    # Reading.

    async def read(self, raw: bytes) -> bytes:
        """Return the rows that an encoded `ReadRequest` asks for, as an encoded `RowPage`.

        Rows of one session are read at one revision. A scan over sessions gives way to other
        work, so its rows may be of different revisions, none older than `RowPage.revision`.
        """
        await self._ready()
        request = wire.decode_read(raw)
        wanted = request.filter
        if wanted.session is not None:
            if request.key is not None:
                row = self._tables.get(wanted.session, wanted.collection, request.key)
                found = (
                    FoundRow(wanted.session, request.key, row.revision, row.value) if row else None
                )
                page = RowPage(self._tables.revision, [found] if found else [])
            else:
                page = self._read_session(request, wanted.session)
        else:
            page = await self._scan(request)
        return wire.encode(msgspec.structs.replace(page, latest=self._tables.revision))

    def _read_session(self, request: ReadRequest, session: str) -> RowPage:
        wanted = request.filter
        rows = self._tables.peek(session).collections.get(wanted.collection, {})
        after = request.after[1] if request.after else ""
        found: list[FoundRow] = []
        size = 0
        for key in sorted(rows):
            if key <= after and request.after:
                continue
            row = rows[key]
            if wanted.where and not wanted.accepts(msgspec.json.decode(row.value)):
                continue
            if size > request.max_bytes:
                return RowPage(self._tables.revision, found, more=True)
            found.append(FoundRow(session, key, row.revision, row.value))
            size += len(row.value) + 64
        return RowPage(self._tables.revision, found)

    async def _scan(self, request: ReadRequest) -> RowPage:
        revision = self._tables.revision
        found: list[FoundRow] = []
        size = 0
        async for row in self._matches(request.filter, request.after):
            if size > request.max_bytes:
                return RowPage(revision, found, more=True)
            found.append(row)
            size += len(row.value) + 64
        return RowPage(revision, found)

    async def _matches(
        self, wanted: Filter, after: tuple[str, str] | None
    ) -> AsyncIterator[FoundRow]:
        """Yield matching rows of all sessions in order of (session, key)."""
        deadline = time.monotonic() + SLICE_MS / 1000
        probe = _probe(wanted)
        for index, row in enumerate(
            merge(self._resident(wanted, after), self._resting(wanted, after, probe))
        ):
            if index % 64 == 0 and time.monotonic() > deadline:
                await asyncio.sleep(0)
                deadline = time.monotonic() + SLICE_MS / 1000
            session, key, revision, value = row
            if value is None:
                continue
            if probe is not None and probe not in value:
                continue
            if wanted.where and not wanted.accepts(msgspec.json.decode(value)):
                continue
            yield FoundRow(session, key, revision, value)

    def _resident(
        self, wanted: Filter, after: tuple[str, str] | None
    ) -> Iterator[tuple[str, str, int, bytes | None]]:
        names = sorted(
            name
            for name in self._tables.sessions
            if name != SYSTEM and (after is None or name >= after[0])
        )
        for name in names:
            session = self._tables.peek(name)
            if not wanted.covers(name, session.bucket):
                continue
            rows = session.collections.get(wanted.collection)
            # A session without a match still takes a turn, so that the scan gives way.
            yield name, "", 0, None
            if rows:
                for key in sorted(rows):
                    if after is None or (name, key) > after:
                        row = rows.get(key)
                        if row is not None:
                            yield name, key, row.revision, row.value

    def _resting(
        self, wanted: Filter, after: tuple[str, str] | None, probe: bytes | None
    ) -> Iterator[tuple[str, str, int, bytes | None]]:
        snapshot = self._log.snapshot()
        if snapshot is None:
            return
        for session, key, revision, value in snapshot.scan(wanted.collection, probe):
            if after is not None and (session, key) <= after:
                continue
            if session in self._tables.sessions:
                continue
            if wanted.covers(session, wire.bucket_of(session)):
                yield session, key, revision, value

    async def read_sessions(self, raw: bytes) -> bytes:
        """Return what an encoded `SessionsRead` asks for, one `SessionRowsRead` a session."""
        await self._ready()
        answer: list[SessionRowsRead] = []
        for name, collections in wire.decode_sessions_read(raw).sessions:
            session = self._tables.peek(name)
            rows = {
                collection: [
                    FoundRow(name, key, row.revision, row.value)
                    for key, row in session.collections.get(collection, {}).items()
                ]
                for collection in collections
            }
            streams = {key: (s.next_index, s.closes) for key, s in session.streams.items()}
            answer.append(SessionRowsRead(self._tables.revision, rows, streams))
        return wire.encode(answer)

    async def read_chunks(self, raw: bytes) -> bytes:
        """Return stored chunks of one generation, as an encoded `ChunkPage`."""
        await self._ready()
        request = wire.decode_chunk_read(raw)
        stream = self._tables.peek(request.session).streams.get(request.generation_id)
        if stream is None:
            return wire.encode(ChunkPage(self._tables.revision, [], 0))
        revision, next_index, closes = self._tables.revision, stream.next_index, stream.closes
        slices: list[ChunkSlice] = []
        size = 0
        more = False
        for run in list(stream.runs):
            if run.index + run.count <= request.index:
                continue
            if size > request.max_bytes:
                more = True
                break
            part = self._load_run(request.generation_id, run, max(0, request.index - run.index))
            slices.append(part)
            size += len(part.columns.payload) + 5 * len(part.columns.types)
        attempt = stream.runs[-1].attempt if stream.runs else 0
        return wire.encode(ChunkPage(revision, slices, next_index, closes, more, attempt))

    def _load_run(self, generation_id: str, run: Run, skip: int) -> ChunkSlice:
        from aidb_ray.store.log import Position

        place = Position(run.segment, run.offset)
        batch = self._log.read_chunks(place, run.start + skip, run.count - skip)
        columns: ChunkColumns = from_arrow(batch)
        return ChunkSlice(generation_id, run.attempt, run.index + skip, columns, run.types)

    async def sessions(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of sessions that hold rows, ascending, after `after`."""
        await self._ready()
        names = {
            name
            for name, session in self._tables.sessions.items()
            if name != SYSTEM and name.startswith(prefix) and any(session.collections.values())
        }
        snapshot = self._log.snapshot()
        if snapshot is not None:
            names.update(
                name
                for name in snapshot.sessions(prefix)
                if name != SYSTEM and name not in self._tables.sessions
            )
        return sorted(name for name in names if name and name > after)[:limit]

    async def status(self) -> StoreStatus:
        """Return how the store is doing; answers while it recovers or has failed, too."""
        return self._status()

    def _status(self) -> StoreStatus:
        options = self._options
        if self._state == "recovering":
            return StoreStatus(
                self._state, os.getpid(), options.database, options.partition, options.store_uuid,
                "", 0, 0, 0, options.durability,
            )  # fmt: skip
        log = self._log
        return StoreStatus(
            state=self._state,
            pid=os.getpid(),
            database=options.database,
            partition=options.partition,
            store_uuid=log.store_uuid,
            generation=self._generation,
            revision=self._tables.revision,
            epoch=log.epoch,
            sessions=len(self._tables.sessions),
            durability=options.durability,
            filesystem=log.stats.filesystem_type,
            fdatasyncs=log.stats.fdatasyncs,
            logged_rows=log.stats.rows,
            logged_bytes=log.stats.bytes,
            torn_bytes=log.torn_bytes,
            recovery_ms=self._recovery_ms,
        )

    # Telling.

    async def poll(self, raw: bytes) -> bytes:
        """Return the changes an encoded `PollRequest` asks for, as encoded `Changes`.

        Waits up to `wait_ms` if there are none. The answer covers every revision up to
        `through`, even when it is empty.
        """
        await self._ready()
        request = wire.decode_poll(raw)
        feed = self._feed
        if request.after < 0:
            return self._changes(feed.latest)
        if request.generation not in ("", self._generation) or request.after > feed.latest:
            return self._changes(0, lost=max(1, feed.latest))
        if request.after < feed.oldest:
            return self._changes(0, lost=max(1, feed.oldest))
        interest = self._interests.of(request)
        limit = CATCHING_UP_BYTES
        after = request.after
        if request.wait_ms and not feed.has_news(interest, after):
            if len(self._polls) >= MAX_POLLS:
                return self._changes(after, retry_after_ms=1_000)
            limit = TAILING_BYTES
            after = await self._park(request, interest)
            if self._state == "failed":
                raise UnavailableError("The store is ending.", outcome="not_applied")
        through, found = feed.collect(interest, after, limit)
        return wire.encode(wire.Changes(self._generation, through, feed.latest, found))

    async def _park(self, request: PollRequest, interest: Interest) -> int:
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        poll = _Poll(interest, self._feed.latest, news)
        self.release(request.feed_id)
        self._polls[request.feed_id] = poll
        try:
            async with asyncio.timeout(request.wait_ms / 1000):
                await news
        except TimeoutError:
            poll.after = self._feed.latest
        finally:
            if self._polls.get(request.feed_id) is poll:
                del self._polls[request.feed_id]
        return poll.after

    def _wake_polls(self) -> None:
        feed = self._feed
        for poll in self._polls.values():
            if poll.news.done():
                continue
            if feed.has_news(poll.interest, poll.after):
                poll.news.set_result(None)
            else:
                poll.after = feed.latest

    async def release_poll(self, feed_id: str) -> None:
        """Answer the waiting poll of this feed now; its reader wants to ask for more."""
        self.release(feed_id)

    def release(self, feed_id: str) -> None:
        """See `release_poll`."""
        poll = self._polls.get(feed_id)
        if poll is not None and not poll.news.done():
            poll.news.set_result(None)

    def _changes(self, through: int, *, lost: int = 0, retry_after_ms: int = 0) -> bytes:
        return wire.encode(
            wire.Changes(
                self._generation,
                through,
                self._feed.latest,
                [],
                lost=lost,
                retry_after_ms=retry_after_ms,
            )
        )

    # Snapshots.

    def _consider_snapshot(self) -> None:
        grown = self._log.stats.bytes - self._logged_at_snapshot
        due = max(self._options.snapshot_bytes, self._snapshot_bytes)
        if self._options.durability == "local" and grown > due and self._snapshot is None:
            self._logged_at_snapshot = self._log.stats.bytes
            self._snapshot = asyncio.create_task(self._take_snapshot())

    async def snapshot(self) -> int:
        """Write a snapshot now and return its revision."""
        await self._ready()
        if self._options.durability != "local":
            raise ConfigError("A store in memory has no snapshots.", code="not_durable")
        if self._snapshot is None:
            self._snapshot = asyncio.create_task(self._take_snapshot())
        await asyncio.shield(self._snapshot)
        snapshot = self._log.snapshot()
        return snapshot.revision if snapshot else 0

    async def _take_snapshot(self) -> None:
        from aidb_ray.store.log import CommitLog

        log = self._log
        assert isinstance(log, CommitLog)
        loop = asyncio.get_running_loop()
        writer = log.begin_snapshot(self._tables.revision)
        walked: list[str] = []
        try:
            for _ in writer.merge(self._dirty_sessions(walked)):
                await asyncio.sleep(0)
            await loop.run_in_executor(None, writer.finish)
        except BaseException as error:
            writer.abort()
            # The rows are still only in the log: they must go into the next snapshot.
            for name in walked:
                self._tables.session(name).is_dirty = True
            if isinstance(error, asyncio.CancelledError):
                raise
            logger.exception("a snapshot failed; the log goes on")
            return
        finally:
            self._snapshot = None
        newest = log.snapshot()
        assert newest is not None
        self._snapshot_bytes = newest.size
        self._tables.rest_in(newest.load, self._options.max_resident_sessions)
        try:
            await loop.run_in_executor(None, log.compact)
        except StorageError:
            logger.exception("compaction failed; the log keeps its segments")

    def _dirty_sessions(self, walked: list[str]) -> Iterator[tuple[str, list[SessionRow]]]:
        names = sorted(name for name, rows in self._tables.sessions.items() if rows.is_dirty)
        for name in names:
            session = self._tables.sessions[name]
            session.is_dirty = False
            walked.append(name)
            yield name, session.rows()


def _checked_batch(raw: bytes) -> Batch:
    try:
        batch = wire.decode_batch(raw)
    except msgspec.MsgspecError as error:
        raise ContractError(f"The batch cannot be read: {error}", code="invalid_batch") from error
    if len(batch.commits) > MAX_BATCH_COMMITS or not batch.commits:
        raise ContractError(
            f"A batch holds 1 to {MAX_BATCH_COMMITS} commits, not {len(batch.commits)}.",
            code="invalid_batch",
        )
    if batch.chunks is not None and not is_consistent(batch.chunks):
        raise ContractError("The batch's chunk columns do not fit together.", code="invalid_batch")
    return batch


def _answer_all(arrivals: list[_Arrival], error: AidbError) -> None:
    for arrival in arrivals:
        if not arrival.outcome.done():
            arrival.outcome.set_exception(error)
            # A caller that went away does not read it; that is no reason for a warning.
            arrival.outcome.exception()


def _probe(wanted: Filter) -> bytes | None:
    """Return bytes that every matching row contains: rows are encoded without spaces."""
    for name, allowed in wanted.where:
        if len(allowed) == 1 and isinstance(allowed[0], str | bool):
            return msgspec.json.encode(name) + b":" + msgspec.json.encode(allowed[0])
    return None


def _end_process() -> None:
    # 70 is a system error to Ray, which restarts the actor; a clean exit would end it for good.
    os._exit(70)
