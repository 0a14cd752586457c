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
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias
from uuid import uuid4

import msgspec

from aidb_ray import crash_points
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
    MAX_COMMIT_BYTES,
    Batch,
    Changes,
    Committed,
    Refusal,
)
from aidb_ray.store.columns import from_arrow, is_consistent, to_arrow
from aidb_ray.store.expiry import Expirer
from aidb_ray.store.feed import CATCHING_UP_BYTES, TAILING_BYTES, Feed
from aidb_ray.store.plan import NO_PAST, Past, Plan
from aidb_ray.store.polls import Polls
from aidb_ray.store.reader import RowReader
from aidb_ray.store.recall import Recall
from aidb_ray.store.retention import Victim
from aidb_ray.store.streams import spare
from aidb_ray.store.tables import LogColumns, Tables

if TYPE_CHECKING:
    from aidb_ray.store.files import FileSystem
    from aidb_ray.store.log import CommitLog, MemoryLog
    from aidb_ray.store.snapshot_taker import SnapshotTaker

logger = logging.getLogger(__name__)

LOCK_WAIT_MS = 20_000
CLIENT_SILENCE_MS = 15 * 60_000
LEASE_TICK_MS = 200
MAX_QUEUED_BYTES = 256 << 20
MAX_POLL_MS = 60_000
_MAX_DROPPED_CLIENTS = 256
_RECOVERY_SLICE_MS = 20

Log: TypeAlias = "CommitLog | MemoryLog"
Answer: TypeAlias = "Committed | Refusal | tuple[int, int] | int"
State: TypeAlias = Literal["recovering", "serving", "disk_full", "stopping", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a store needs to open.

    Attributes:
        directory: Where the partition's log lies; ignored for `memory`.
        store_uuid: The directory must belong to this store.
        snapshot_bytes: A snapshot starts when the log grew by this much, or by the size of the
            newest snapshot if that is more; recovery replays at most about that.
        max_resident_bytes: While rows weigh more in memory, sessions that rest in the snapshot
            leave it, and a snapshot starts after `snapshot_bytes` whatever the newest one's size.
        partitions: How many partitions the database has.
        in_process: Whether all who use it are of its own process, so that claims of an earlier
            process are nobody's.
    """

    database: str
    partition: int
    durability: Literal["memory", "local"]
    directory: str
    store_uuid: str
    segment_bytes: int = 64 << 20
    reserve_bytes: int = 64 << 20
    snapshot_bytes: int = 64 << 20
    max_resident_bytes: int = 1 << 30
    partitions: int = 1
    in_process: bool = False


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a store is doing.

    Attributes:
        state: `recovering`, `serving`, `disk_full`, `stopping`, `failed` or `stopped`.
        generation: Names this incarnation's history: cursors of another one are refused.
        sessions: How many are in memory.
        torn_bytes: Bytes of an unfinished write that recovery cut off.
        problem: Why it does not serve, if it could not be opened or has failed.
    """

    state: State
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
    directory: str = ""
    partitions: int = 1
    problem: str = ""


class _Arrival:
    """On its way to the disk: a batch, a registration, or what goes because its time is over."""

    __slots__ = ("batch", "outcome", "past", "raw", "supersedes", "victims")

    def __init__(
        self,
        outcome: asyncio.Future[Answer],
        batch: Batch | None = None,
        raw: bytes = b"",
        supersedes: int = 0,
        victims: Sequence[Victim] | None = None,
        past: Past = NO_PAST,
    ) -> None:
        self.outcome = outcome
        self.batch = batch
        self.raw = raw
        self.supersedes = supersedes
        self.victims = victims
        self.past = past

    def plan(self, plan: Plan) -> Answer:
        if self.batch is not None:
            return plan.add_batch(self.batch, self.raw, self.past)
        if self.victims is not None:
            return plan.expire(self.victims)
        return plan.add_client(self.supersedes)

    def answer(self, answer: Answer) -> None:
        if not self.outcome.done():
            self.outcome.set_result(answer)

    def fail(self, error: AidbError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
            # A caller that went away does not read it; that is no reason for a warning.
            self.outcome.exception()


class StoreActor:
    """Single writer of one partition's rows.

    Recovery runs in `start` or at the first call, not in `__init__`: Ray never restarts an actor
    whose constructor raised. `die` is called when the disk can no longer be trusted; the default
    ends the process, and Ray starts a fresh one that recovers from the log.
    """

    def __init__(
        self,
        options: StoreOptions,
        *,
        files: FileSystem | None = None,
        die: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._files = files
        self._die = die or _end_process
        self._clock = clock
        # The clock on the wall is looked at once: it may be set while the store runs.
        self._began_at_ms = (wall() - clock()) * 1000
        self._state: State = "recovering"
        self._problem = ""
        self._opening: asyncio.Task[None] | None = None
        self._flusher: asyncio.Task[None] | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._expirer: Expirer
        self._snapshots: SnapshotTaker | None = None
        self._recall = Recall()
        self._log: Log
        self._tables: Tables
        self._feed: Feed
        self._polls: Polls
        self._reader: RowReader
        self._generation = ""
        self._recovery_ms = 0
        self._arrivals: list[_Arrival] = []
        self._taken: list[_Arrival] = []
        self._queued_bytes = 0
        self._arrived = asyncio.Event()
        # When each client was last heard, the most silent one first.
        self._client_seen: OrderedDict[int, float] = OrderedDict()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="aidb-disk")

    # Opening and closing.

    async def start(self) -> None:
        """Begin to recover. A failure is told to whoever calls, and each call tries again."""
        try:
            await self.open()
        except AidbError as error:
            logger.error("the store cannot be opened: %s", error)  # noqa: TRY400

    async def open(self) -> StoreStatus:
        """Recover if that has not happened yet, and return the status.

        Raises:
            StoreLockedError: another process still has the directory after 20 s.
            StorageError: the directory is missing, foreign or damaged; nothing was changed.
        """
        await self._ready()
        return self._status()

    async def _ready(self) -> None:
        if self._state == "recovering":
            if self._opening is None:
                self._opening = asyncio.get_running_loop().create_task(self._open())
            await asyncio.shield(self._opening)
        if self._state in ("stopping", "stopped", "failed"):
            raise UnavailableError(
                f"The store was not asked: it is {self._state}.{self._problem and ' '}"
                f"{self._problem}",
                outcome="not_applied",
                code="store_ended",
            )

    async def _open(self) -> None:
        began = time.monotonic()
        try:
            self._log = await self._open_log(began)
            try:
                await self._recover()
            except BaseException:
                # Its lock would keep the next try from opening it.
                self._log.close()
                raise
        except BaseException as error:
            self._opening = None
            self._problem = str(error)
            raise
        self._problem = ""
        self._recovery_ms = round((time.monotonic() - began) * 1000)
        self._state = "serving"
        self._flusher = asyncio.get_running_loop().create_task(self._flush_forever())
        if self._options.in_process:
            self._tables.leases.expire_all()
        self._count_leases()
        self._expirer.wake()
        logger.info(
            "store opened",
            extra={"revision": self._tables.revision, "recovery_ms": self._recovery_ms},
        )

    async def _open_log(self, began: float) -> Log:
        from aidb_ray.store.files import FileSystem
        from aidb_ray.store.log import CommitLog, MemoryLog

        options = self._options
        if options.durability == "memory":
            return MemoryLog(
                store_uuid=options.store_uuid,
                database=options.database,
                partition=options.partition,
                partitions=options.partitions,
            )

        def open_log() -> CommitLog:
            return CommitLog.open(
                Path(options.directory),
                self._files or FileSystem(),
                expected_uuid=options.store_uuid,
                segment_bytes=options.segment_bytes,
                reserve_bytes=options.reserve_bytes,
            )

        wait_s = 0.02
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._disk, open_log)
            except StoreLockedError:
                # A killed process may still be ending; its lock goes when it has gone.
                if (time.monotonic() - began) * 1000 > LOCK_WAIT_MS:
                    raise
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, 0.5)

    async def _recover(self) -> None:
        log = self._log
        snapshot = log.snapshot()
        tables = Tables(snapshot.load if snapshot else None)
        tables.revision = snapshot.revision if snapshot else 0
        tables.load_system()
        feed = Feed(tables.revision)
        replayed_bytes = 0
        pause_at = time.monotonic() + _RECOVERY_SLICE_MS / 1000
        for place, frame in log.frames(tables.revision):
            chunks = None if frame.chunks is None else from_arrow(frame.chunks)
            rows = frame.rows
            columns = LogColumns(
                rows.revisions, rows.ops, rows.sessions, rows.collections, rows.keys, rows.values
            )
            entries = list(tables.replay(columns, (place.segment, place.offset), chunks))
            tables.revision = max(tables.revision, frame.first_revision + frame.commits - 1)
            feed.extend(entries, tables.revision)
            replayed_bytes += sum(100 + len(value or b"") for value in rows.values)
            if time.monotonic() > pause_at:
                await asyncio.sleep(0)
                pause_at = time.monotonic() + _RECOVERY_SLICE_MS / 1000
        self._tables, self._feed = tables, feed
        self._polls = Polls(feed)
        self._reader = RowReader(tables, log)
        self._expirer = Expirer(tables, self._reader, self._remove, self._now_ms)
        self._generation = str(uuid4())
        self._client_seen = OrderedDict.fromkeys(tables.clients, self._clock())
        if self._options.durability == "local":
            from aidb_ray.store.log import CommitLog
            from aidb_ray.store.snapshot_taker import SnapshotTaker

            assert isinstance(log, CommitLog)
            # The same rows and revisions, whichever process serves them.
            self._generation = log.store_uuid
            self._snapshots = SnapshotTaker(
                log,
                tables,
                due_bytes=self._options.snapshot_bytes,
                max_resident_bytes=self._options.max_resident_bytes,
                replayed_bytes=replayed_bytes,
            )

    async def stop(self) -> None:
        """Finish what was accepted, then close the log. Calls made meanwhile are refused."""
        if self._opening is not None:
            await asyncio.wait([self._opening])
        was = self._state
        if was in ("stopping", "stopped"):
            return
        self._state = "stopping"
        if was != "recovering":
            if was != "failed":
                while pending := [arrival.outcome for arrival in (*self._taken, *self._arrivals)]:
                    await asyncio.wait(pending)
            await self._close()
        self._state = "stopped"
        self._disk.shutdown(wait=False)

    def die(self) -> None:
        """Let go of everything where it is, as the end of a process does."""
        self._state, self._problem = "failed", "It was killed."
        for task in (self._opening, self._flusher):
            if task is not None:
                task.cancel()
        taking = None if self._snapshots is None else self._snapshots.die()
        if self._flusher is None:
            return
        if taking is None:
            self._abandon_log()
        else:
            # It may be in the middle of a file, in a thread.
            taking.add_done_callback(lambda _: self._abandon_log())

    def _abandon_log(self) -> None:
        # After what the disk does now, which a killed process would also have done or not.
        self._disk.submit(self._log.abandon)
        self._disk.shutdown(wait=False)

    async def _close(self) -> None:
        assert self._flusher is not None
        tasks = [self._flusher, *([] if self._ticker is None else [self._ticker])]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._expirer.aclose()
        self._polls.release_all()
        if self._snapshots is not None:
            await self._snapshots.aclose()
        await asyncio.get_running_loop().run_in_executor(self._disk, self._log.close)

    # Writing.

    async def register(self, supersedes: int = 0) -> tuple[int, int, str]:
        """Register a client: return its id, the last number `supersedes` applied, the generation.

        Batches of the superseded id that are still on their way are refused from now on, so an
        unknown outcome becomes known: applied exactly if its number is at most the returned one.
        """
        await self._ready()
        outcome = await self._enqueue(supersedes=supersedes)
        assert isinstance(outcome, tuple)
        return (*outcome, self._generation)

    async def commit(self, raw: bytes) -> bytes:
        """Apply an encoded `Batch`; returns an encoded `Committed` once it is durable.

        Each commit in it is accepted or refused by itself. A batch sent again is answered as the
        first time, even after a restart. A caller that is cancelled only stops waiting.

        Raises:
            UnavailableError: `unknown_client`: register again. Outcome `unknown`: the disk failed.
            ConflictError: `idempotency_mismatch`: this number was used for another batch.
            StorageFullError: no space; nothing of the batch was kept.
        """
        await self._ready()
        batch = _checked_batch(raw)
        past = await self._recall.past_of(self._log, self._tables, batch.commits)
        if past:
            await self._ready()
        outcome = await self._enqueue(batch, raw, past=past)
        if isinstance(outcome, Refusal):
            raise outcome.to_error()
        return wire.encode(outcome)

    async def recall(self, name: str, revision: int) -> None:
        """Look up what a session was at a revision, for a fork that is about to be asked for.

        The fork finds it, so that nothing its client commits meanwhile waits for the disk.

        Raises:
            StorageError: the disk does not say; CorruptionError: what it says is damaged.
        """
        await self._ready()
        await self._recall.look_up(self._log, self._tables, name, revision)

    async def sweep(self) -> int:
        """Remove now what is older than it is kept, and return how much went.

        The store does so by itself, up to about a sixteenth of that time late.
        """
        await self._ready()
        return await self._expirer.sweep(waits=False)

    async def _remove(self, victims: Sequence[Victim]) -> int:
        outcome = await self._enqueue(victims=victims)
        assert isinstance(outcome, int)
        return outcome

    def _now_ms(self) -> int:
        return round(self._began_at_ms + self._clock() * 1000)

    async def _enqueue(
        self,
        batch: Batch | None = None,
        raw: bytes = b"",
        supersedes: int = 0,
        victims: Sequence[Victim] | None = None,
        past: Past = NO_PAST,
    ) -> Answer:
        if self._queued_bytes > MAX_QUEUED_BYTES:
            raise UnavailableError(
                "The store has 256 MiB of commits waiting; send again later.",
                outcome="not_applied",
                code="overloaded",
            )
        outcome: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._arrivals.append(_Arrival(outcome, batch, raw, supersedes, victims, past))
        self._queued_bytes += len(raw)
        self._arrived.set()
        return await asyncio.shield(outcome)

    async def _flush_forever(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                is_due = self._tables.leases.is_due
                while self._arrivals or is_due:
                    is_due = False
                    await self._flush()
        except asyncio.CancelledError:
            # The loop is closing. What the disk still does, it does to the end.
            self._fail_all("The store's event loop is closing.")
            raise
        except Exception:
            # Whatever this is, rows and log may differ now: stop serving and recover from disk.
            logger.critical("the flusher failed; the store ends", exc_info=True)
            self._give_up("The store met an error of its own.")

    async def _flush(self) -> None:
        taken = self._taken = self._take()
        plan = Plan(self._tables, self._log.epoch)
        plan.mark_time(self._now_ms())
        answers = [arrival.plan(plan) for arrival in taken]
        for client_id in self._silent_clients():
            if client_id not in plan.clients:
                plan.drop_client(client_id)
        plan.end_leases()
        if not plan.is_empty:
            if crash_points.armed:
                await crash_points.reach("store.planned")
            try:
                place = await self._write(plan)
            except StorageFullError as error:
                self._state = "disk_full"
                self._taken = []
                for arrival in taken:
                    arrival.fail(error)
                return
            except StorageError as error:
                logger.critical("the log cannot be written: %s", error)
                self._give_up(str(error))
                return
            if self._state == "disk_full":
                self._state = "serving"
            if crash_points.armed:
                await crash_points.reach("store.logged")
            self._apply(plan, place)
        self._taken = []
        for arrival, answer in zip(taken, answers, strict=True):
            arrival.answer(answer)
        if self._snapshots is not None:
            self._snapshots.consider()

    def _take(self) -> list[_Arrival]:
        # What arrived during the last sync, up to a bound; the rest is the next flush.
        commits = size = taken = 0
        for arrival in self._arrivals:
            commits += len(arrival.batch.commits) if arrival.batch else 1
            size += len(arrival.raw)
            if taken and (commits > MAX_BATCH_COMMITS or size > MAX_BATCH_BYTES):
                size -= len(arrival.raw)
                break
            taken += 1
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

    def _apply(self, plan: Plan, place: tuple[int, int]) -> None:
        entries = self._tables.apply(plan, place)
        if self._options.durability == "memory":
            self._drop_garbage()
        self._tables.evict(self._options.max_resident_bytes)
        self._feed.extend(entries, self._tables.revision)
        self._reader.indexes.hear(entries)
        self._polls.wake(entries)
        self._count_leases()
        self._expirer.wake()
        now = self._clock()
        for client_id, record in plan.clients.items():
            if record is None:
                self._client_seen.pop(client_id, None)
            else:
                self._client_seen[client_id] = now
                self._client_seen.move_to_end(client_id)

    def _drop_garbage(self) -> None:
        """Let the log in memory forget chunks that no stream has any more."""
        tables = self._tables
        garbage = tables.garbage()
        if garbage and tables.has_forks:
            garbage = spare(garbage, tables.runs_in_use(garbage, tables.sessions))
        if garbage:
            tables.forget_garbage(self._log.compact(garbage), tables.revision)

    def _count_leases(self) -> None:
        """Let lease time pass while there is a lease."""
        if self._tables.leases.holders and (self._ticker is None or self._ticker.done()):
            self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        leases = self._tables.leases
        last = self._clock()
        while leases.holders and self._state in ("serving", "disk_full"):
            if leases.is_due:
                self._arrived.set()
            await asyncio.sleep(LEASE_TICK_MS / 1000)
            now = self._clock()
            # Renewals that wait are handled first: the flush that ends a lease plans them before.
            leases.tick((now - last) * 1000)
            last = now

    def _silent_clients(self) -> list[int]:
        """Return clients that were not heard for 15 minutes; they count as gone."""
        now = self._clock()
        found: list[int] = []
        for client_id, seen in self._client_seen.items():
            if (now - seen) * 1000 <= CLIENT_SILENCE_MS or len(found) == _MAX_DROPPED_CLIENTS:
                break
            found.append(client_id)
        return found

    def _give_up(self, problem: str) -> None:
        self._state = "failed"
        self._problem = problem
        self._fail_all(problem)
        self._polls.release_all()
        self._die()

    def _fail_all(self, problem: str) -> None:
        error = UnavailableError(
            f"It is not known whether the commit was applied. {problem} Once the store is open "
            f"again, sending the same batch again tells.",
            outcome="unknown",
            code="unknown_outcome",
        )
        for arrival in (*self._taken, *self._arrivals):
            arrival.fail(error)
        self._taken, self._arrivals, self._queued_bytes = [], [], 0

    # Reading.

    async def read(self, raw: bytes) -> bytes:
        """Return the rows that an encoded `ReadRequest` asks for, as an encoded `RowPage`.

        Rows of one session are read at one revision. A scan over sessions gives way to other
        work, so its rows may be of different revisions, none older than `RowPage.revision`.
        """
        await self._ready()
        page = await self._reader.read(wire.decode_read(raw))
        return wire.encode(msgspec.structs.replace(page, latest=self._tables.revision))

    async def read_sessions(self, raw: bytes) -> bytes:
        """Return what an encoded `SessionsRead` asks for, one `SessionRowsRead` a session."""
        await self._ready()
        return wire.encode(await self._reader.read_sessions(wire.decode_sessions_read(raw)))

    async def read_chunks(self, raw: bytes) -> bytes:
        """Return stored chunks of one generation, as an encoded `ChunkPage`."""
        await self._ready()
        return wire.encode(self._reader.read_chunks(wire.decode_chunk_read(raw)))

    async def sessions(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of sessions that hold rows, ascending, after `after`."""
        await self._ready()
        return await self._reader.sessions(prefix, after, limit)

    async def status(self) -> StoreStatus:
        """Return how the store is doing; answers while it recovers or has failed, too."""
        return self._status()

    def _status(self) -> StoreStatus:
        options = self._options
        status = StoreStatus(
            state=self._state,
            pid=os.getpid(),
            database=options.database,
            partition=options.partition,
            store_uuid=options.store_uuid,
            generation=self._generation,
            revision=0,
            epoch=0,
            sessions=0,
            durability=options.durability,
            directory=options.directory,
            partitions=options.partitions,
            problem=self._problem,
        )
        if self._flusher is None:
            return status
        log, stats = self._log, self._log.stats
        return replace(
            status,
            revision=self._tables.revision,
            epoch=log.epoch,
            sessions=len(self._tables.sessions),
            filesystem=stats.filesystem_type,
            fdatasyncs=stats.fdatasyncs,
            logged_rows=stats.rows,
            logged_bytes=stats.bytes,
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
        feed, polls = self._feed, self._polls
        if request.after < 0:
            return self._changes(feed.latest)
        if request.generation not in ("", self._generation) or request.after > feed.latest:
            return self._changes(0, lost=max(1, feed.latest))
        after, limit = request.after, CATCHING_UP_BYTES
        interest = polls.interest_of(request)
        if after >= feed.oldest and request.wait_ms and not feed.has_news(interest, after):
            if polls.is_full:
                return self._changes(after, retry_after_ms=1_000)
            wait_ms = min(request.wait_ms, MAX_POLL_MS)
            after, limit = await polls.wait(request, interest, wait_ms), TAILING_BYTES
            await self._ready()
        if after < feed.oldest:
            return self._changes(0, lost=max(1, feed.oldest))
        through, found = feed.collect(interest, after, limit)
        return wire.encode(Changes(self._generation, through, feed.latest, found))

    async def release_poll(self, feed_id: str, number: int) -> None:
        """Answer poll `number` of this feed now, or when it comes; its reader wants more."""
        await self._ready()
        self._polls.release(feed_id, number)

    def _changes(self, through: int, *, lost: int = 0, retry_after_ms: int = 0) -> bytes:
        latest = self._feed.latest
        return wire.encode(
            Changes(self._generation, through, latest, [], lost=lost, retry_after_ms=retry_after_ms)
        )

    async def snapshot(self) -> int:
        """Write a snapshot now, or wait for one that is being written; return its revision."""
        await self._ready()
        if self._snapshots is None:
            raise ConfigError("A store in memory has no snapshots.", code="not_durable")
        return await self._snapshots.take()


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
    if len(raw) > 2 * MAX_COMMIT_BYTES:
        raise ContractError(
            f"A batch has up to {2 * MAX_COMMIT_BYTES} bytes, not {len(raw)}.",
            code="payload_too_large",
        )
    if batch.chunks is not None and not is_consistent(batch.chunks):
        raise ContractError("The batch's chunk columns do not fit together.", code="invalid_batch")
    return batch


def _end_process() -> None:
    # 70 is a system error to Ray, which restarts the actor; a clean exit would end it for good.
    os._exit(70)
