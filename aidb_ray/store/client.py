"""One process's way to one partition: coalesces commits, numbers them, shares one feed.

All commits made while a call is in flight go together in the next one. The pump owns the call:
cancelling a caller only stops its waiting.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import msgspec

from aidb_ray import crash_points
from aidb_ray.errors import (
    AidbError,
    CompactedError,
    ConflictError,
    ContractError,
    UnavailableError,
)
from aidb_ray.runtime import ActorRef, create_detached_task
from aidb_ray.store import changes as wire
from aidb_ray.store.actor import StoreActor, StoreStatus
from aidb_ray.store.changes import (
    MAX_BATCH_BYTES,
    MAX_BATCH_COMMITS,
    MAX_COMMIT_BYTES,
    Append,
    Batch,
    Change,
    ChunkColumns,
    ChunkPage,
    ChunkRead,
    Commit,
    Committed,
    Filter,
    FoundRow,
    Held,
    Insert,
    Mutation,
    Need,
    PollRequest,
    ReadRequest,
    RowPage,
    Runner,
    SessionRowsRead,
    SessionsRead,
    Update,
)
from aidb_ray.store.columns import EMPTY
from aidb_ray.store.subscription import FeedReader

logger = logging.getLogger(__name__)

MAX_QUEUED_COMMITS = 200_000
MAX_QUEUED_BYTES = 256 << 20
CALL_TIMEOUT_MS = 30_000
GIVE_UP_MS = 120_000
MAX_READS = 256
_SESSIONS_A_PAGE = 10_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_SMALL_BATCH = 512
"""More are sent in halves: whoever waits for one half works while the other is on its way."""
# Asking again cannot help. A store that restarts says something else than one that has ended.
_FINAL = frozenset({"store_ended", "actor_ended", "unknown_client", "batch_gap"})

R = TypeVar("R")

_BytesMethod: TypeAlias = Callable[[StoreActor, bytes], Awaitable[bytes]]


OnSettled: TypeAlias = Callable[[int, AidbError | None], None]
"""Hears how a commit ended: its revision and None, or 0 and the error."""


class _SessionRead(NamedTuple):
    """A session that someone waits to read."""

    session: str
    collections: tuple[str, ...]
    done: asyncio.Future[SessionRowsRead]


class _Waiting(msgspec.Struct, frozen=True, gc=False):
    """A commit in the queue: what it asks, its chunks, and who hears how it ends."""

    commit: Commit
    chunks: ChunkColumns
    size: int
    on_settled: OnSettled


class StoreClient:
    """Commits to and reads from one partition; belongs to one event loop.

    A commit is sent again until its outcome is known: the store answers a batch that it has
    applied before without applying it again, even after a restart. After `give_up_ms` without an
    answer the callers get `UnavailableError`, outcome `unknown`.

    Attributes:
        kept: What its users keep for as long as there is this client, by what they choose.
    """

    def __init__(self, ref: ActorRef[StoreActor], *, give_up_ms: int = GIVE_UP_MS) -> None:
        self._ref = ref.with_timeout(CALL_TIMEOUT_MS)
        self._give_up_ms = give_up_ms
        self._client_id = 0
        self._superseded = 0
        self._next_seq = 1
        self._queue: deque[_Waiting] = deque()
        self._queued_bytes = 0
        self._is_closed = False
        # Batches whose outcome is known and not told yet; in the order in which they were made.
        self._answered: deque[Callable[[], None]] = deque()
        self._made = 0
        self._settled = 0
        self._draining: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._pumping: asyncio.Task[None] | None = None
        self._reads: deque[_SessionRead] = deque()
        self._reading: asyncio.Task[None] | None = None
        self.feed = FeedReader(self._ref)
        self.kept: dict[Hashable, Any] = {}

    def commit(
        self,
        mutations: Sequence[Mutation],
        *,
        chunks: ChunkColumns = EMPTY,
        runner: Runner | None = None,
        held: Held | None = None,
        needs: tuple[Need, ...] = (),
    ) -> asyncio.Future[int]:
        """Send mutations as one commit; the future gives its revision once it is durable.

        Commits of one client are applied in the order of these calls. `Append.start` counts in
        `chunks`. Nobody need await the future; a failure nobody looks at is logged by the loop.
        Cancelling it does not cancel the commit.

        Raises:
            UnavailableError: not applied: `overloaded`, too much waits to be sent already, or
                `closed`.
            ContractError: `commit_too_large`.
            AidbError: (from the future) the commit was refused, or its outcome is unknown.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        told = partial(_resolve, done)
        self.send(mutations, told, chunks=chunks, runner=runner, held=held, needs=needs)
        return done

    def send(
        self,
        mutations: Sequence[Mutation],
        on_settled: OnSettled,
        *,
        chunks: ChunkColumns = EMPTY,
        runner: Runner | None = None,
        held: Held | None = None,
        needs: tuple[Need, ...] = (),
    ) -> None:
        """Send mutations as one commit; calls `on_settled` once, later. See `commit`."""
        if crash_points.dead:
            crash_points.check_alive()
        size = _size(mutations, chunks)
        if size > MAX_COMMIT_BYTES:
            raise ContractError(
                f"A commit of {size} bytes is too large; {MAX_COMMIT_BYTES} are allowed. Write "
                f"fewer rows together.",
                code="commit_too_large",
            )
        is_full = self._queued_bytes + size > MAX_QUEUED_BYTES
        if is_full or len(self._queue) >= MAX_QUEUED_COMMITS:
            raise UnavailableError(
                f"{len(self._queue)} commits wait to be sent already; await some before making "
                f"more.",
                outcome="not_applied",
                code="overloaded",
            )
        if self._is_closed:
            raise UnavailableError(
                "The connection was closed; connect again.", outcome="not_applied", code="closed"
            )
        commit = Commit(tuple(mutations), runner, held, needs)
        self._queue.append(_Waiting(commit, chunks, size, on_settled))
        self._queued_bytes += size
        self._made += 1
        if self._pumping is None:
            # Shared by all who commit here, so in the context of none.
            self._pumping = create_detached_task(self._pump())

    async def drain(self) -> None:
        """Wait until every commit made so far has its outcome; those made meanwhile may not."""
        if self._settled < self._made:
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._draining.append((self._made, told))
            await told

    async def aclose(self) -> None:
        """Refuse further commits, wait for outstanding ones, then close the feed."""
        self._is_closed = True
        await self.drain()
        await self.feed.aclose()

    # Reading.

    async def find(self, session: str, collection: str, key: str) -> FoundRow | None:
        """Return one row as the store has it now, or None."""
        page = await self._read(ReadRequest(Filter(collection, session), key))
        return page.rows[0] if page.rows else None

    async def read(self, wanted: Filter) -> tuple[int, list[FoundRow]]:
        """Return all matching rows in order of (session, key), and the revision they are as of.

        Rows of several sessions, or of more than 4 MiB, may be newer than that revision.
        """
        first = page = await self._read(ReadRequest(wanted))
        rows = page.rows
        while page.more:
            last = rows[-1]
            page = await self._read(ReadRequest(wanted, after=(last.session, last.key)))
            rows += page.rows
        return first.revision, rows

    async def read_session(self, session: str, collections: tuple[str, ...]) -> SessionRowsRead:
        """Return all rows of some collections of one session, at one revision.

        Reads made while a call is in flight go together in the next one.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[SessionRowsRead] = loop.create_future()
        self._reads.append(_SessionRead(session, collections, done))
        if self._reading is None:
            self._reading = create_detached_task(self._read_queued())
        return await done

    async def _read_queued(self) -> None:
        try:
            # Whoever runs in this turn of the loop may still join the call.
            await asyncio.sleep(0)
            while self._reads:
                taken = [self._reads.popleft() for _ in range(min(MAX_READS, len(self._reads)))]
                await self._read_taken(taken)
        finally:
            self._reading = None
            for read in self._reads:
                read.done.cancel()
            self._reads.clear()

    async def _read_taken(self, taken: list[_SessionRead]) -> None:
        wanted = tuple((read.session, read.collections) for read in taken)
        try:
            raw = await self._ask_again(StoreActor.read_sessions, wire.encode(SessionsRead(wanted)))
            found = wire.decode_sessions(raw)
        except AidbError as error:
            for read in taken:
                if not read.done.done():
                    read.done.set_exception(error)
        except BaseException:
            for read in taken:
                read.done.cancel()
            raise
        else:
            for read, rows in zip(taken, found, strict=True):
                if not read.done.done():
                    read.done.set_result(rows)

    async def changes_between(self, wanted: Filter, after: int, through: int) -> list[Change]:
        """Return the changes of the revisions `after` + 1 to `through`, in order.

        Raises:
            CompactedError: `after` is older than what the store can still tell.
        """
        found: list[Change] = []
        cursor = after
        while cursor < through:
            request = PollRequest("", "", cursor, (wanted,))
            raw = await self._ask_again(StoreActor.poll, wire.encode(request))
            answer = wire.decode_changes(raw)
            if answer.lost:
                raise CompactedError(
                    f"Changes after revision {cursor} are not kept any more; the oldest cursor "
                    f"that can be served is {answer.lost}.",
                    oldest=answer.lost,
                )
            found += [change for change in answer.changes if change.revision <= through]
            cursor = answer.through
        return found

    async def read_chunks(self, session: str, generation_id: str, index: int = 0) -> ChunkPage:
        """Return stored chunks of a generation from `index` on, up to 4 MiB of them."""
        request = wire.encode(ChunkRead(session, generation_id, index))
        return wire.decode_chunk_page(await self._ask_again(StoreActor.read_chunks, request))

    async def sessions(self, prefix: str = "", *, limit: int = 1_000_000) -> list[str]:
        """Return names of sessions that hold rows, ascending."""
        found: list[str] = []
        while len(found) < limit:
            after = found[-1] if found else ""
            page = await self._retry(
                lambda after=after: self._ref.ask(
                    StoreActor.sessions, prefix, after, _SESSIONS_A_PAGE
                )
            )
            found += page
            if len(page) < _SESSIONS_A_PAGE:
                break
        return found[:limit]

    async def recall(self, session: str, revision: int) -> None:
        """Have the store look up what a session was, before it is asked to fork it.

        Raises:
            StorageError: the disk does not say; CorruptionError: what it says is damaged.
        """
        await self._retry(lambda: self._ref.ask(StoreActor.recall, session, revision))

    async def status(self) -> StoreStatus:
        """Return how the store is doing."""
        return await self._ref.ask(StoreActor.status)

    async def _read(self, request: ReadRequest) -> RowPage:
        raw = wire.encode(request)
        return wire.decode_page(await self._ask_again(StoreActor.read, raw))

    async def _ask_again(self, method: _BytesMethod, raw: bytes) -> bytes:
        return await self._retry(lambda: self._ref.ask(method, raw))

    async def _retry(self, ask: Callable[[], Awaitable[R]]) -> R:
        deadline = time.monotonic() + self._give_up_ms / 1000
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await ask()
            except UnavailableError as error:
                # Reading twice does no harm, whatever became of the first call.
                if error.code in _FINAL or time.monotonic() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    # Writing.

    async def _pump(self) -> None:
        taken: list[_Waiting] = []
        try:
            # Whoever runs in this turn of the loop may still join the batch.
            await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            answered = 0
            while self._queue:
                taken = self._take(answered)
                try:
                    answer = await self._deliver(taken)
                except AidbError as error:
                    self._answered.append(partial(self._fail, taken, error))
                else:
                    self._next_seq += len(taken)
                    self._answered.append(partial(self._settle, taken, answer))
                # The next batch goes first: those told here run while it is on its way.
                loop.call_soon(self._tell_answered)
                answered, taken = len(taken), []
        except BaseException:
            # The loop closes, or this has a bug. What is on its way may arrive; what waits here
            # will not.
            self._superseded, self._client_id = self._superseded or self._client_id, 0
            waiting = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self._tell_answered()
            self._fail(taken, _unknown("the event loop closed before the answer came."))
            self._fail(waiting, _unsent())
            raise
        finally:
            self._pumping = None

    def _tell_answered(self) -> None:
        while self._answered:
            self._answered.popleft()()

    def _take(self, answered: int) -> list[_Waiting]:
        """Take what goes together. Who made those just `answered` may make as many again soon."""
        queue = self._queue
        most = min(max(_SMALL_BATCH, (answered + len(queue)) // 2), MAX_BATCH_COMMITS)
        taken: list[_Waiting] = []
        size = 0
        while queue and len(taken) < most:
            if taken and size + queue[0].size > MAX_BATCH_BYTES:
                break
            waiting = queue.popleft()
            size += waiting.size
            taken.append(waiting)
        self._queued_bytes -= size
        return taken

    def _settle(self, taken: list[_Waiting], answer: Committed) -> None:
        revision = answer.first_revision
        refused = dict(answer.refused)
        for index, waiting in enumerate(taken):
            refusal = refused.get(index) if refused else None
            if refusal is None:
                _tell(waiting, revision, None)
                revision += 1
            else:
                _tell(waiting, 0, refusal.to_error())
        self._count_settled(len(taken))

    def _fail(self, taken: list[_Waiting], error: AidbError) -> None:
        for waiting in taken:
            _tell(waiting, 0, error)
        self._count_settled(len(taken))

    def _count_settled(self, count: int) -> None:
        self._settled += count
        while self._draining and self._draining[0][0] <= self._settled:
            _, told = self._draining.popleft()
            if not told.done():
                told.set_result(None)

    async def _deliver(self, taken: list[_Waiting]) -> Committed:
        deadline = time.monotonic() + self._give_up_ms / 1000
        pause = _FIRST_PAUSE_S
        may_be_applied = False
        raw = b""
        while True:
            try:
                if not self._client_id:
                    await self._register()
                raw = raw or self._encode(taken)
                return wire.decode_committed(await self._ref.ask_shielded(StoreActor.commit, raw))
            except AidbError as error:
                if isinstance(error, UnavailableError):
                    if error.code == "unknown_client" and not may_be_applied:
                        # It was silent for long, or the store lives in memory and is a new one.
                        self._client_id, raw = 0, b""
                        continue
                    may_be_applied = may_be_applied or error.outcome == "unknown"
                    is_final = error.code in _FINAL or time.monotonic() + pause > deadline
                else:
                    is_final = True
                if is_final:
                    self._stop_numbering(error, may_be_applied=may_be_applied)
                    if may_be_applied:
                        raise _unknown(str(error)) from error
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _stop_numbering(self, error: AidbError, *, may_be_applied: bool) -> None:
        """Give up the client's id if a later batch could be mistaken for the one that failed.

        Registering anew fences what may still be on its way under the old id.
        """
        if may_be_applied or isinstance(error, ConflictError) or error.code in _FINAL:
            self._superseded = self._superseded or self._client_id
            self._client_id = 0

    async def _register(self) -> None:
        client_id, _, _ = await self._ref.ask_shielded(StoreActor.register, self._superseded)
        self._client_id, self._superseded, self._next_seq = client_id, 0, 1

    def _encode(self, taken: list[_Waiting]) -> bytes:
        commits, chunks = _join(taken)
        return wire.encode(Batch(self._client_id, self._next_seq, commits, chunks))


def _join(taken: list[_Waiting]) -> tuple[list[Commit], ChunkColumns | None]:
    """Return the commits with their chunks joined into one set of columns."""
    if not any(waiting.chunks.types for waiting in taken):
        return [waiting.commit for waiting in taken], None
    commits: list[Commit] = []
    types: list[bytes] = []
    payload: list[bytes] = []
    ends = array("i")
    count = size = 0
    for waiting in taken:
        commit, chunks = waiting.commit, waiting.chunks
        if chunks.types:
            if count:
                moved = tuple(_move(mutation, count) for mutation in commit.mutations)
                commit = msgspec.structs.replace(commit, mutations=moved)
                ends.extend([size + end for end in memoryview(chunks.ends).cast("i")])
            else:
                ends.frombytes(chunks.ends)
            types.append(chunks.types)
            payload.append(chunks.payload)
            count += len(chunks.types)
            size += len(chunks.payload)
        commits.append(commit)
    return commits, ChunkColumns(b"".join(types), ends.tobytes(), b"".join(payload))


def _move(mutation: Mutation, by: int) -> Mutation:
    if isinstance(mutation, Append):
        return msgspec.structs.replace(mutation, start=mutation.start + by)
    return mutation


def _size(mutations: Sequence[Mutation], chunks: ChunkColumns) -> int:
    """Return about how many bytes a commit takes on the wire."""
    size = 96 + len(chunks.payload) + len(chunks.ends)
    for mutation in mutations:
        kind = type(mutation)
        size += 128
        if kind is Insert or kind is Update:
            size += len(cast("Insert | Update", mutation).value)
    return size


def _tell(waiting: _Waiting, revision: int, error: AidbError | None) -> None:
    try:
        waiting.on_settled(revision, error)
    except Exception:
        # One listener's mistake must not keep the others from hearing.
        logger.exception("whoever made a commit failed when told how it ended")


def _resolve(done: asyncio.Future[int], revision: int, error: AidbError | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(revision)
    else:
        done.set_exception(error)


def _unknown(why: str) -> UnavailableError:
    return UnavailableError(
        f"It is not known whether the commit was applied: {why} Read back before sending it again.",
        outcome="unknown",
        code="unknown_outcome",
    )


def _unsent() -> UnavailableError:
    return UnavailableError(
        "The event loop closed before the commit was sent.",
        outcome="not_applied",
        code="not_sent",
    )
