"""One shard of an agent: an actor that runs the sessions of its buckets as coroutines.

It claims its buckets under a new epoch when it starts, so an earlier process that still runs is
refused by the store. It watches its pending rows and runs one generation per session at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.run import GenerationRun, Parked, Shard
from aidb_ray.agents.session import COLLECTIONS, SessionState, decode_message
from aidb_ray.chunks import ChunkFlusher
from aidb_ray.contracts import CancelRequest, Generation, GenerationStatus
from aidb_ray.database import Database, Partition, set_current_database
from aidb_ray.effects.pending import PendingWork
from aidb_ray.errors import AidbError, FencedError, UnavailableError
from aidb_ray.query.live import filter_of, to_changes
from aidb_ray.query.operators import Pipeline
from aidb_ray.store.changes import (
    Change,
    ClaimBuckets,
    Filter,
    FoundRow,
    Insert,
    Mutation,
    Runner,
    Update,
)
from aidb_ray.store.claims import shard_ranges
from aidb_ray.store.local import RowEvent, View
from aidb_ray.store.rows import codec_of

if TYPE_CHECKING:
    from aidb_ray.store.subscription import Subscription

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 << 20
FAILURE_PAUSE_MS = 1_000
_decode_fields = msgspec.json.Decoder(dict[str, Any]).decode


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """How a shard is doing.

    Attributes:
        pending: Rows that wait, those being answered included.
        running: Sessions at work.
        cycles: Generations that ended since the process began.
        fenced: Whether another runner took over.
    """

    agent: str
    shard: int
    pid: int
    fingerprint: str
    epoch: int
    pending: int
    running: int
    cycles: int
    fenced: bool = False


class AgentActor:
    """Runs one shard of an agent. `__init__` only stores; `start` claims and begins."""

    def __init__(self, database: Database, definition: AgentDefinition, shard: int) -> None:
        self._database = database
        self._definition = definition
        self._shard_index = shard
        self._low, self._high = shard_ranges(definition.shards)[shard]
        self._works: list[_PartitionWork] = []
        self._starting: asyncio.Task[None] | None = None
        self._is_retiring = False

    async def start(self) -> None:
        """Claim the buckets, read what is pending, and begin.

        Raises:
            AidbError: the store cannot be reached or refused.
        """
        if self._starting is None:
            set_current_database(self._database)
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        definition = self._definition
        source = definition.stream_url
        for partition in self._database.sites_of(source):
            epoch = await partition.client.commit(
                [ClaimBuckets(definition.name, self._low, self._high)]
            )
            work = _PartitionWork(
                self._database, partition, definition, (self._low, self._high), epoch
            )
            self._works.append(work)
        for work in self._works:
            await work.start()

    async def ready(self) -> int:
        """Return the process id once the shard is at work."""
        await self.start()
        return os.getpid()

    async def status(self) -> ShardStatus:
        """Return how the shard is doing."""
        return ShardStatus(
            agent=self._definition.name,
            shard=self._shard_index,
            pid=os.getpid(),
            fingerprint=self._definition.fingerprint(),
            epoch=max((work.shard.runner.epoch for work in self._works), default=0),
            pending=sum(len(work.queue) for work in self._works),
            running=sum(work.queue.running_count for work in self._works),
            cycles=sum(work.cycles for work in self._works),
            fenced=any(work.is_fenced for work in self._works),
        )

    async def run_cycle(self, session: str | None) -> bool:
        """Run one generation, or wait for one that runs already; False if nothing is pending."""
        await self.start()
        for work in self._works:
            await work.catch_up()
            if await work.run_one(session):
                return True
        return False

    async def drain(self, session: str | None, timeout_ms: int) -> tuple[bool, int]:
        """Work until nothing is pending or time is up: (whether it is idle, cycles ended)."""
        await self.start()
        before = sum(work.cycles for work in self._works)
        is_idle = True
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                for work in self._works:
                    await work.catch_up()
                    await work.drain(session)
        except TimeoutError:
            is_idle = False
        return is_idle, sum(work.cycles for work in self._works) - before

    async def abort_drained(self) -> None:
        """Stop what a drain began, if the agent does not work by itself; rows stay pending."""
        if not self._definition.autostart:
            for work in self._works:
                await work.interrupt()

    async def retire(self, timeout_ms: int) -> None:
        """Begin nothing new, wait for what runs, and end."""
        self._is_retiring = True
        for work in self._works:
            work.is_open = False
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                for work in self._works:
                    await work.settle()
        except TimeoutError:
            logger.warning("generations still run at replacement; the new runner goes on with them")
        await self.stop()

    async def stop(self) -> None:
        """Stop what runs where it is, and end. Rows stay pending; a later runner goes on."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        for work in self._works:
            await work.aclose()


class _PartitionWork:
    """A shard's work in one partition."""

    def __init__(
        self,
        database: Database,
        partition: Partition,
        definition: AgentDefinition,
        buckets: tuple[int, int],
        epoch: int,
    ) -> None:
        self._definition = definition
        self._partition = partition
        self._client = partition.client
        self._buckets = buckets
        self.queue: PendingWork[str, str] = PendingWork(max_running=definition.max_running)
        self.shard = Shard(
            definition,
            database,
            partition.client,
            ChunkFlusher(partition.client),
            Runner(definition.name, epoch),
            {tool.name: tool for tool in definition.tools},
        )
        self.is_open = definition.autostart
        self.is_fenced = False
        self.cycles = 0
        self._context = copy_context()
        self._states: dict[str, SessionState] = {}
        self._state_bytes = 0
        self._pending_rows: dict[tuple[str, str], Any] = {}
        self._storage: dict[str, str] = {}
        self._runs: dict[str, tuple[asyncio.Task[None], GenerationRun | None]] = {}
        self._subscriptions: list[Subscription] = []
        self._view: View | None = None
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # Hearing.

    async def start(self) -> None:
        """Follow the pending rows, and begin with those that are there."""
        definition = self._definition
        if definition.pending_work is None:
            self._follow_messages()
        else:
            self._follow_query()
        cancels = self._filter("cancel_requests")
        waiting = msgspec.structs.replace(
            cancels, where=(("agent", (definition.name,)), ("done", (False,)))
        )
        self._subscriptions.append(
            self._client.feed.subscribe(
                cancels, self._hear_cancels, self._see_cancels, snapshot=waiting
            )
        )
        for subscription in self._subscriptions:
            await asyncio.shield(subscription.ready)
        if self._view is not None:
            await self._view.ready()

    def _filter(self, collection: str) -> Filter:
        url = self._definition.stream_url
        if url.endswith("*"):
            return Filter(collection, prefix=url[:-1], buckets=self._buckets)
        return Filter(collection, url)

    def _follow_messages(self) -> None:
        followed = self._filter("messages")
        name = self._definition.name
        pending = msgspec.structs.replace(
            followed, where=(("targetAgent", (name,)), ("processed", (False,)))
        )
        self._subscriptions.append(
            self._client.feed.subscribe(
                followed, self._hear_messages, self._see_messages, snapshot=pending
            )
        )

    def _see_messages(self, rows: Sequence[FoundRow], _revision: int) -> None:
        # The rows as they are now, at first and after a gap: what is cached may be old.
        self._forget_idle_states()
        entries: list[tuple[str, str, int]] = []
        for row in rows:
            due_ms = self._due_ms(row.value)
            if due_ms is not None:
                entries.append((row.session, row.key, due_ms))
        self.queue.replace(entries, now_ms=_now_ms())
        self._dispatch()

    def _hear_messages(self, changes: Sequence[Change]) -> None:
        now_ms = _now_ms()
        queue, states = self.queue, self._states
        for change in changes:
            session, key, value = change.session, change.key, change.value
            state = states.get(session)
            if state is not None:
                state.put_message(key, change.revision, value)
            due_ms = None if value is None else self._due_ms(value)
            if due_ms is None:
                queue.discard(session, key)
            else:
                queue.put(session, key, not_before_ms=due_ms, now_ms=now_ms)
        self._dispatch()

    def _due_ms(self, value: bytes) -> int | None:
        """Return when a message is due, None if it asks nothing of this agent."""
        try:
            message = decode_message(value)
        except msgspec.DecodeError:
            logger.exception("a message cannot be read and is left alone")
            return None
        if message.processed or message.target_agent != self._definition.name:
            return None
        return _time_ms(message.not_before)

    def _follow_query(self) -> None:
        query = self._definition.pending_work
        assert query is not None
        source = query.sources[0][1]
        decode = None
        if source.row_type is not None:
            names = list(source.fields or {})
            key_field = "id" if "id" in names else names[0]
            decode = codec_of(source.row_type, key_field).decode_fields
        self._pipeline: Pipeline[Any] = Pipeline(query, decode=decode)
        wanted = filter_of(query)
        if wanted.session is None:
            wanted = msgspec.structs.replace(wanted, buckets=self._buckets)
        self._view = View(
            self._client, self._partition.writes, wanted, self._hear_query, shows_writes=False
        )

    def _hear_query(self, events: Sequence[RowEvent]) -> None:
        query = self._definition.pending_work
        assert query is not None
        for delta in self._pipeline.advance(to_changes(query.sources[0][0], events)):
            storage, key = delta.key
            place = (storage, key)
            if delta.op == "exit":
                group = self._group_of(delta.row, storage)
                self._pending_rows.pop(place, None)
                self.queue.discard(group, key)
            else:
                group = self._group_of(delta.row, storage)
                self._pending_rows[place] = delta.row
                self._storage[group] = storage
                self.queue.put(group, key)
        self._dispatch()

    def _group_of(self, row: Any, storage: str) -> str:
        by = self._definition.session
        if by is None:
            return storage
        group = by(row)
        return group if isinstance(group, str) else str(group)

    def _see_cancels(self, rows: Sequence[FoundRow], _revision: int) -> None:
        for row in rows:
            self._cancel(row.session, row.value)

    def _hear_cancels(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is not None:
                self._cancel(change.session, change.value)

    def _cancel(self, session: str, value: bytes) -> None:
        request = CancelRequest.model_validate_json(value)
        if request.agent == self._definition.name and not request.done:
            self._spawn(self._carry_out_cancel(session, request))

    # Working.

    def _dispatch(self) -> None:
        self._changed.set()
        if not self.is_open or self.is_fenced:
            return
        now_ms = _now_ms()
        while (session := self.queue.take(now_ms=now_ms)) is not None:
            self._begin(session)
        due_ms = self.queue.next_due_ms()
        if due_ms is not None:
            self._wake_at(due_ms)

    def _wake_at(self, due_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = min(max(due_ms - _now_ms(), 1), 60_000) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay, self._dispatch)

    def _begin(self, session: str) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._work(session), context=self._context.copy())
        self._runs[session] = (task, None)
        return task

    async def _work(self, session: str) -> None:
        """Answer what is pending in one session with one generation."""
        try:
            await self._run_generation(session)
        except FencedError:
            logger.warning("another runner has the session", extra={"session": session})
            self._stop_when_fenced()
        except Parked as parked:
            logger.warning("a session waits for a person: %s", parked, extra={"session": session})
            self.queue.delay(session, until_ms=_now_ms() + (1 << 50))
        except UnavailableError:
            logger.exception("the store does not answer; the session is tried again")
            self.queue.delay(session, until_ms=_now_ms() + FAILURE_PAUSE_MS)
            self._forget(session)
        except Exception:
            # A mistake in the user's functions, or in ours: the rows stay, others go on.
            logger.exception("a generation could not be run", extra={"session": session})
            self.queue.delay(session, until_ms=_now_ms() + FAILURE_PAUSE_MS)
            self._forget(session)
        else:
            self.cycles += 1
        finally:
            self._runs.pop(session, None)
            self.queue.done(session, now_ms=_now_ms())
            self._dispatch()

    async def _run_generation(self, session: str) -> None:
        storage = self._storage.get(session, session)
        state = await self._state_of(session, storage)
        now_ms = _now_ms()
        keys = self.queue.due_keys(session, now_ms=now_ms)
        if self._definition.pending_work is None:
            for gone in [key for key in keys if key not in state.messages]:
                self.queue.discard(session, gone)
                keys.remove(gone)
            keys.sort(key=lambda key: (state.messages[key].message.created_at, key))
            rows: list[Any] = []
        else:
            rows = [self._pending_rows[storage, key] for key in keys]
        if not keys:
            return
        run = GenerationRun(self.shard, storage, state, keys, rows)
        task = asyncio.current_task()
        assert task is not None
        self._runs[session] = (task, run)
        self.shard.running += 1
        size_before = 0 if state.size == 0 else state.size
        try:
            await run.run()
        finally:
            self.shard.running -= 1
            self._bound_states(size_before, state)
        # Answered: the feed will say so too, but until then they must not be taken again.
        for key in keys:
            self.queue.discard(session, key)

    async def _state_of(self, session: str, storage: str) -> SessionState:
        state = self._states.get(session)
        if state is not None:
            self._states[session] = self._states.pop(session)
            return state
        # Known before it is read: what changes meanwhile must not be missed.
        state = self._states[session] = SessionState(self._definition.name)
        try:
            read = await self._client.read_session(storage, COLLECTIONS)
        except BaseException:
            self._forget(session)
            raise
        if self._definition.pending_work is None:
            state.load(read.revision, read.rows)
        else:
            state.load(read.revision, {**read.rows, "messages": []})
        return state

    def _bound_states(self, size_before: int, state: SessionState) -> None:
        self._state_bytes += state.size - size_before
        if self._state_bytes <= CACHE_BYTES:
            return
        # The longest unused first; counted afresh, since forgotten ones were not subtracted.
        self._state_bytes = sum(each.size for each in self._states.values())
        for session in list(self._states):
            if self._state_bytes <= CACHE_BYTES:
                break
            if session not in self._runs:
                self._state_bytes -= self._states.pop(session).size

    def _forget(self, session: str) -> None:
        self._states.pop(session, None)

    def _forget_idle_states(self) -> None:
        for session in list(self._states):
            if session not in self._runs:
                del self._states[session]

    def _stop_when_fenced(self) -> None:
        if not self.is_fenced:
            self.is_fenced = True
            for task, _ in self._runs.values():
                if task is not asyncio.current_task():
                    task.cancel()

    async def _carry_out_cancel(self, session: str, request: CancelRequest) -> None:
        """Abort what runs, or end what is pending; then the request is done."""
        held = self._runs.get(session)
        if held is not None:
            task, run = held
            if run is not None:
                run.signal.abort(request.reason or "cancelled")
                task.cancel()
            await asyncio.wait([task])
        mutations: list[Mutation] = []
        keys = list(self.queue.due_keys(session, now_ms=1 << 60))
        if held is None and keys and self._definition.pending_work is None:
            mutations = await self._cancel_pending(session, keys, request)
        done = request.model_copy(update={"done": True})
        key, value = codec_of(CancelRequest, "id").encode("cancel_requests", done)
        mutations.append(Update(session, "cancel_requests", key, value, 0))
        try:
            await self._client.commit(mutations, runner=self.shard.runner)
        except AidbError as error:
            logger.warning("a cancel request could not be closed: %s", error)

    async def _cancel_pending(
        self, session: str, keys: list[str], request: CancelRequest
    ) -> list[Mutation]:
        """Return the end of a generation that never began, for messages that still wait."""
        generation = Generation(
            id=f"{request.id}:cancelled",
            agent=self._definition.name,
            status=GenerationStatus.CANCELLED,
            message_ids=keys,
            error=request.reason or None,
        )
        key, value = codec_of(Generation, "id").encode("generations", generation)
        mutations: list[Mutation] = [Insert(session, "generations", key, value)]
        read = await self._client.read_session(session, ("messages",))
        for row in read.rows["messages"]:
            if row.key in keys:
                fields = {**_decode_fields(row.value), "processed": True, "generationId": key}
                encoded = msgspec.json.encode(fields)
                mutations.append(Update(session, "messages", row.key, encoded, row.revision))
        return mutations

    # Waiting.

    async def catch_up(self) -> None:
        """Wait until every change that is durable now has been heard."""
        status = await self._client.status()
        await self._client.feed.reached(status.revision)

    async def run_one(self, session: str | None) -> bool:
        """Run one generation to its end, or wait for one that runs."""
        if not self.is_open:
            taken = self.queue.take(now_ms=_now_ms(), only=session)
            if taken is None:
                return False
            await asyncio.wait([self._begin(taken)])
            return True
        cycles = self.cycles
        if not self._has_work(session):
            return False
        while self.cycles == cycles and self._has_work(session):
            await self._next_change()
        return True

    async def drain(self, session: str | None) -> None:
        """Wait until nothing is pending, working on it if that does not happen by itself."""
        was_open = self.is_open
        try:
            if session is None:
                self.is_open = True
                self._dispatch()
            while self._has_work(session):
                if session is not None and not was_open:
                    taken = self.queue.take(now_ms=_now_ms(), only=session)
                    if taken is not None:
                        self._begin(taken)
                await self._next_change()
        finally:
            self.is_open = was_open

    async def settle(self) -> None:
        """Wait until nothing runs."""
        while self._runs:
            await asyncio.wait([task for task, _ in self._runs.values()])

    async def interrupt(self) -> None:
        """Stop what runs where it is."""
        tasks = [task for task, _ in self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _has_work(self, session: str | None) -> bool:
        return not self.queue.is_idle if session is None else self.queue.has_work(session)

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def aclose(self) -> None:
        """Stop everything and end."""
        self.is_open = False
        if self._timer is not None:
            self._timer.cancel()
        for subscription in self._subscriptions:
            self._client.feed.unsubscribe(subscription)
        if self._view is not None:
            self._view.close()
        await self.interrupt()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _time_ms(text: str | None) -> int:
    return 0 if text is None else int(datetime.fromisoformat(text).timestamp() * 1000)
