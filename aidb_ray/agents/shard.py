"""One shard of an agent: an actor that runs the sessions of its buckets as coroutines.

It claims its buckets under a new epoch when it starts, so an earlier process that still runs is
refused by the store. It watches its pending rows and runs one generation per session at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray.agents import cycle
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.recorder import SilenceLimit
from aidb_ray.agents.rows import GenerationRow, decode_generation, decode_message, now_ms, time_ms
from aidb_ray.agents.run import Assignment, GenerationRun, Shard
from aidb_ray.agents.session import COLLECTIONS, SessionState
from aidb_ray.chunks import ChunkFlusher
from aidb_ray.contracts import CancelRequest, ToolCallStatus
from aidb_ray.database import Database, Partition, set_current_database
from aidb_ray.effects.pending import PendingWork
from aidb_ray.errors import AidbError, FencedError, UnavailableError
from aidb_ray.models.base import check_here
from aidb_ray.query.live import decoder_of, filter_of, to_changes
from aidb_ray.query.operators import Pipeline
from aidb_ray.store.changes import (
    Change,
    ClaimBuckets,
    Filter,
    FoundRow,
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
LONGEST_FAILURE_PAUSE_MS = 60_000
TURN_PAUSE_MS = 500
AGENT_ENDED = "agent_ended"
"""Code of the error that a shard answers with once it was retired or stopped."""

_DECIDED = tuple(status.value for status in ToolCallStatus if status.is_terminal)
_APPROVALS = ("approved", "rejected")


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """How a shard is doing.

    Attributes:
        pending: Rows that wait, those being answered included; not those whose generation ended.
        running: Sessions at work.
        cycles: Generations that ended since the process began.
        fenced: Whether another runner took over.
        stream_url: The session or pattern that the agent follows, `""` for rows without one.
        shards: How many shards the agent has.
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
    stream_url: str = ""
    shards: int = 1


@dataclass(slots=True)
class _Worker:
    """Who is at work in a session: its task, and the run once its rows are known."""

    task: asyncio.Task[bool]
    run: GenerationRun | None = None


@dataclass(slots=True, eq=False)
class _CancelOrder:
    """A cancel that is being carried out; it covers what was written before `revision`."""

    reason: str
    revision: int
    is_done: bool = False


class AgentActor:
    """Runs one shard of an agent. `__init__` only stores; `start` claims and begins."""

    def __init__(self, database: Database, definition: AgentDefinition, shard: int) -> None:
        self._database = database
        self._definition = definition
        self._shard_index = shard
        self._low, self._high = shard_ranges(definition.shards)[shard]
        self._works: list[_PartitionWork] = []
        self._starting: asyncio.Task[None] | None = None
        self._is_ended = False

    async def start(self) -> None:
        """Claim the buckets, read what is pending, and begin.

        Raises:
            ConfigError: the adapter misses something in this process; nothing was claimed.
            AidbError: the store cannot be reached or refused.
        """
        if self._starting is None:
            set_current_database(self._database)
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except AidbError:
            # The next call tries again: the store may be back by then.
            if self._starting is starting:
                self._starting = None
            raise

    async def _start(self) -> None:
        definition = self._definition
        if definition.adapter is not None:
            check_here(definition.adapter)
        works = self._works
        try:
            for partition in self._database.sites_of(definition.stream_url):
                epoch = await partition.client.commit(
                    [ClaimBuckets(definition.name, self._low, self._high)]
                )
                buckets = (self._low, self._high)
                works.append(_PartitionWork(self._database, partition, definition, buckets, epoch))
            for work in works:
                await work.start()
        except AidbError:
            while works:
                await works.pop().aclose()
            raise

    def _ended(self) -> UnavailableError:
        return UnavailableError(
            f"This process of agent {self._definition.name!r} was ended. Look for the next one.",
            outcome="not_applied",
            code=AGENT_ENDED,
        )

    async def ready(self) -> int:
        """Return the process id once the shard is at work.

        Raises:
            UnavailableError: `agent_ended`: it was retired or stopped.
            AidbError: the store cannot be reached or refused.
        """
        if not self._is_ended:
            try:
                await self.start()
            except asyncio.CancelledError:
                # Either the caller's, or that of a start that was given up.
                if not self._is_ended:
                    raise
        if self._is_ended:
            raise self._ended()
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
            stream_url=self._definition.stream_url,
            shards=self._definition.shards,
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
        self._is_ended = True
        for work in self._works:
            work.is_retired = True
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                for work in self._works:
                    await work.settle()
        except TimeoutError:
            logger.warning("generations still run at replacement; the new runner goes on with them")
        await self.stop()

    async def stop(self) -> None:
        """Stop what runs where it is, and end. Rows stay pending; a later runner goes on."""
        self._is_ended = True
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
            partition.writes,
            ChunkFlusher(partition.client),
            SilenceLimit(definition.idle_timeout_ms),
            Runner(definition.name, epoch),
            {tool.name: tool for tool in definition.tools},
        )
        self.is_retired = False
        self.cycles = 0
        self._fenced: FencedError | None = None
        self._drains = 0
        self._context = copy_context()
        self._states: dict[str, SessionState] = {}
        self._state_bytes = 0
        # Of a `pending_work`: the group of each row and the row, and where a group's rows lie.
        self._pending_rows: dict[tuple[str, str], tuple[str, Any]] = {}
        self._storage: dict[str, str] = {}
        self._runs: dict[str, _Worker] = {}
        self._cancels: dict[str, list[_CancelOrder]] = {}
        self._cancelling: set[str] = set()
        self._parked: set[str] = set()
        # When calls of sessions at work were decided: their rows may have been read before.
        self._decided_at: dict[str, int] = {}
        # The sessions whose rows waited when the process began, until one has been answered.
        self._leftovers: set[str] = set()
        # The one that runs, of those that may be what ends the process.
        self._suspect: GenerationRun | None = None
        # Of a `session=`: open generations of rows that left the query, by what is at work on them.
        self._orphans: dict[str, str] = {}
        self._failures: dict[str, int] = {}
        self._subscriptions: list[Subscription] = []
        self._is_started = False
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_fenced(self) -> bool:
        """Whether another runner took over."""
        return self._fenced is not None

    @property
    def is_open(self) -> bool:
        """Whether pending rows are taken up as they come."""
        reacts = self._definition.autostart or self._drains > 0
        return reacts and not self.is_retired and self._fenced is None

    # Hearing.

    async def start(self) -> None:
        """Follow the pending rows, begin with those that are there, and end what nobody awaits."""
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
        if definition.on_in_doubt == "park":
            self._follow_decisions()
        for subscription in self._subscriptions:
            await asyncio.shield(subscription.ready)
        if self.shard.view is not None:
            await self.shard.view.ready()
        self._is_started = True
        await self._settle_orphans()

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
        self._states.clear()
        self._state_bytes = 0
        entries: list[tuple[str, str, int]] = []
        self._leftovers.update(row.session for row in rows)
        for row in rows:
            due_ms = self._due_ms(row.value)
            if due_ms is not None:
                entries.append((row.session, row.key, due_ms))
        self.queue.replace(entries, now_ms=now_ms())
        self._dispatch()

    def _hear_messages(self, changes: Sequence[Change]) -> None:
        now = now_ms()
        queue, states = self.queue, self._states
        for change in changes:
            session, key, value = change.session, change.key, change.value
            state = states.get(session)
            if state is not None:
                state.put_message(key, change.revision, value)
            due_ms = None if value is None else self._due_ms(value)
            if due_ms is None:
                self._discard(session, key)
            else:
                queue.put(session, key, not_before_ms=due_ms, now_ms=now)
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
        return time_ms(message.not_before)

    def _follow_query(self) -> None:
        query = self._definition.pending_work
        assert query is not None
        self._pipeline: Pipeline[Any] = Pipeline(query, decoder_of=decoder_of)
        (source,) = self._pipeline.inputs
        wanted = filter_of(source)
        if wanted.session is None:
            wanted = msgspec.structs.replace(wanted, buckets=self._buckets)
        self.shard.view = View(
            self._client, self._partition.writes, wanted, self._hear_query, shows_writes=False
        )

    def _hear_query(self, events: Sequence[RowEvent]) -> None:
        (source,) = self._pipeline.inputs
        changes = to_changes([source.name], source.source, events)
        for delta in self._pipeline.advance(changes):
            place = storage, key = delta.key
            known = self._pending_rows.pop(place, None)
            group = None if delta.op == "exit" else self._group_of(delta.row, storage)
            if known is not None and known[0] != group:
                self._discard(known[0], key)
            if group is not None:
                self._pending_rows[place] = (group, delta.row)
                self._storage[group] = storage
                self.queue.put(group, key)
                if not self._is_started:
                    self._leftovers.add(group)
        self._dispatch()

    def _discard(self, session: str, key: str) -> None:
        """Take a row from the queue that waits no more; end what was begun for it and left."""
        self.queue.discard(session, key)
        is_left = session in self._parked or session in self._failures
        if not is_left or self.is_retired or self._fenced is not None:
            return
        self._unpark(session)
        if not self.queue.keys(session) and self.queue.seize(session):
            self._begin(session)

    def _group_of(self, row: Any, storage: str) -> str | None:
        """Return which rows are answered one after the other, and together if several wait."""
        by = self._definition.session
        if by is None:
            return storage
        try:
            group = str(by(row))
        except Exception:
            logger.exception("`session` failed; the row is left alone", extra={"session": storage})
            return None
        # Rows of two sessions are never answered together.
        return group if self._storage.get(group, storage) == storage else f"{group} in {storage}"

    def _see_cancels(self, rows: Sequence[FoundRow], _revision: int) -> None:
        for row in rows:
            self._cancel(row.session, row.value, row.revision)

    def _hear_cancels(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is not None:
                self._cancel(change.session, change.value, change.revision)

    def _cancel(self, storage: str, value: bytes, revision: int) -> None:
        request = CancelRequest.model_validate_json(value)
        is_mine = request.agent == self._definition.name and not request.done
        if is_mine and request.id not in self._cancelling:
            self._cancelling.add(request.id)
            self._spawn(self._carry_out_cancel(storage, request, revision))

    def _follow_decisions(self) -> None:
        calls = self._filter("tool_calls")
        mine = ("agent", (self._definition.name,))
        for decided in (("status", _DECIDED), ("approval", _APPROVALS)):
            self._subscriptions.append(
                self._client.feed.subscribe(
                    msgspec.structs.replace(calls, where=(mine, decided)),
                    self._hear_decisions,
                    self._see_decisions,
                    snapshot=False,
                )
            )

    def _hear_decisions(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.session in self._runs:
                self._decided_at[change.session] = change.revision
            self._unpark(change.session)
        self._dispatch()

    def _see_decisions(self, _rows: Sequence[FoundRow], _revision: int) -> None:
        for session in list(self._parked):
            self._unpark(session)
        self._dispatch()

    def _unpark(self, session: str) -> None:
        if session in self._parked:
            self._parked.discard(session)
            self._forget(session)
            self.queue.wake(session, now_ms=now_ms())

    # Beginning.

    async def _settle_orphans(self) -> None:
        """End what an earlier process began for rows that wait no more."""
        mine = (("agent", (self._definition.name,)), ("status", ("running",)))
        begun = msgspec.structs.replace(self._filter("generations"), where=mine)
        _, rows = await self._client.read(begun)
        for row in rows:
            generation = decode_generation(row.value)
            if self._is_waited_for(row.session, generation) or self._fenced is not None:
                continue
            session = row.session
            if self._definition.session is not None:
                # Of which group its rows were, only they can tell.
                session = generation.id
                self._storage[session] = row.session
                self._orphans[session] = generation.id
            # One that is at work there ends it before anything else.
            if self.queue.seize(session):
                await asyncio.wait([self._begin(session)])
            if self._orphans.pop(session, None) is not None:
                self._forget(session)

    def _is_waited_for(self, storage: str, generation: GenerationRow) -> bool:
        if self._definition.pending_work is None:
            waiting = self.queue.keys(storage)
            return not set(waiting).isdisjoint(generation.message_ids)
        return any((storage, key) in self._pending_rows for key in generation.message_ids)

    # Working.

    def _dispatch(self) -> None:
        self._changed.set()
        if self.is_retired or self._fenced is not None:
            return
        if self.is_open:
            now = now_ms()
            while (session := self.queue.take(now_ms=now)) is not None:
                self._begin(session)
        due_ms = self.queue.next_due_ms()
        if due_ms is not None:
            self._wake_at(due_ms)

    def _wake_at(self, due_ms: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = min(max(due_ms - now_ms(), 1), 60_000) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay, self._dispatch)

    def _begin(self, session: str) -> asyncio.Task[bool]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._work(session), context=self._context.copy())
        self._runs[session] = _Worker(task)
        return task

    async def _work(self, session: str) -> bool:
        """Answer what is pending in one session with one generation; False if it did not go."""
        try:
            await self._run_generation(session)
        except FencedError as error:
            self._stop_when_fenced(error)
        except asyncio.CancelledError:
            self._forget(session)
            raise
        except UnavailableError:
            logger.exception("the store does not answer; the session is tried again")
            self._rest(session)
        except Exception:
            # Something that was not foreseen: the rows stay, others go on.
            logger.exception("a generation could not be run", extra={"session": session})
            self._rest(session)
        else:
            self._failures.pop(session, None)
            return True
        finally:
            del self._runs[session]
            self._decided_at.pop(session, None)
            self.queue.done(session, now_ms=now_ms())
            if not self.queue.keys(session):
                self._storage.pop(session, None)
            self._dispatch()
        return False

    def _rest(self, session: str) -> None:
        """Leave a session alone for a while, the longer the more often it failed."""
        failures = self._failures[session] = self._failures.get(session, 0) + 1
        pause_ms = min(FAILURE_PAUSE_MS << min(failures - 1, 16), LONGEST_FAILURE_PAUSE_MS)
        self.queue.rest(session, until_ms=now_ms() + pause_ms)
        self._forget(session)

    async def _run_generation(self, session: str) -> None:
        storage = self._storage.get(session, session)
        state = await self._state_of(session, storage)
        if any(not self._is_known(key, state) for key in self.queue.keys(session)):
            # The feed tells of messages that are not among the rows: those were read too early.
            self._forget(session)
            state = await self._state_of(session, storage)
        orders = [order for order in self._cancels.get(session, ()) if not order.is_done]
        if orders:
            keys = self._keys_to_cancel(session, storage, state, orders)
            if all(order.is_done for order in orders):
                return
        else:
            keys = self._waiting(session, self.queue.due_keys(session, now_ms=now_ms()), state)
        found = self._open_generation(session, state)
        if found is None and not keys:
            return
        keys = self._keys_to_answer(keys, found, state)
        is_suspect = bool(keys) and not orders and self._is_suspect(found, state)
        if is_suspect and self._suspect is not None and self._suspect.is_suspect:
            # Both may be what ends the process. The other one has its turn until a round is done.
            self.queue.rest(session, until_ms=now_ms() + TURN_PAUSE_MS)
            return
        rows = [self._pending_rows[storage, key][1] for key in keys if self._pending_rows]
        assignment = Assignment(keys, rows, found, session in self._leftovers)
        run = GenerationRun(self.shard, storage, state, assignment)
        if orders:
            run.cancel(orders[0].reason)
        elif is_suspect:
            self._suspect = run
        if not await self._run(session, run, state):
            return
        self.cycles += 1
        self._leftovers.discard(session)
        # Answered: the feed will say so too, but until then they must not be taken again. A row
        # of a `pending_work` that changed meanwhile waits anew.
        taken = dict(zip(keys, rows, strict=True)) if rows else {}
        for key in run.answered:
            if not rows or self._pending_rows.get((storage, key), ("", None))[1] is taken.get(key):
                self.queue.discard(session, key)

    async def _run(self, session: str, run: GenerationRun, state: SessionState) -> bool:
        """Run to the end of the generation; False if the session is parked instead."""
        self._runs[session].run = run
        self.shard.running += 1
        size_before = state.size
        try:
            if await run.run():
                return True
        finally:
            self.shard.running -= 1
            self._bound_states(size_before, state)
            if self._suspect is run:
                self._suspect = None
        if self._decided_at.get(session, 0) > state.revision:
            # Decided after its rows were read: they are read again.
            self._forget(session)
        else:
            self._parked.add(session)
            self.queue.rest(session)
        return False

    def _open_generation(self, session: str, state: SessionState) -> GenerationRow | None:
        """Return the generation that a run of the session goes on with."""
        if self._definition.session is None:
            return state.open_generation()
        orphan = state.generations.get(self._orphans.get(session, ""))
        if orphan is not None:
            return None if orphan.is_terminal else orphan
        return state.open_generation(self.queue.keys(session))

    def _is_suspect(self, found: GenerationRow | None, state: SessionState) -> bool:
        if found is None:
            return False
        is_interrupted = not state.was_written_since(found.id, self.shard.runner.epoch)
        return cycle.is_suspect(found, is_interrupted=is_interrupted)

    def _keys_to_answer(
        self, keys: list[str], found: GenerationRow | None, state: SessionState
    ) -> list[str]:
        """Return what a run answers: of an open generation what is left of its own rows."""
        if found is None:
            return keys
        if self._definition.pending_work is None:
            return [key for key in found.message_ids if state.is_waiting(key)]
        return [] if set(keys).isdisjoint(found.message_ids) else keys

    def _is_known(self, key: str, state: SessionState) -> bool:
        return self._definition.pending_work is not None or key in state.messages

    def _waiting(self, session: str, keys: list[str], state: SessionState) -> list[str]:
        """Return which of the keys wait for an answer, oldest first; forget the others."""
        if self._definition.pending_work is not None:
            return keys
        for key in keys:
            if not state.is_waiting(key):
                self.queue.discard(session, key)
        waiting = [key for key in keys if state.is_waiting(key)]
        return sorted(waiting, key=lambda key: (state.messages[key].message.created_at, key))

    def _keys_to_cancel(
        self, session: str, storage: str, state: SessionState, orders: Sequence[_CancelOrder]
    ) -> list[str]:
        """Return the waiting keys that were written before the newest order.

        If there are none, nor a generation that has not ended, the orders are done. Rows of a
        `pending_work` that only wait cannot be cancelled: they would still match.
        """
        revision = max(order.revision for order in orders)
        all_keys = self.queue.keys(session)
        keys: list[str] = []
        if self._definition.pending_work is None:
            waiting = self._waiting(session, all_keys, state)
            keys = [key for key in waiting if state.messages[key].revision < revision]
        by = self._definition.session
        found = state.open_generation(None if by is None else all_keys)
        if found is not None and not self._is_covered(found.message_ids, storage, state, revision):
            found = None
        if found is None and not keys:
            for order in orders:
                order.is_done = True
        return keys

    def _is_covered(
        self, keys: Sequence[str], storage: str, state: SessionState, revision: int
    ) -> bool:
        """Whether any of the rows was written before `revision`, or none is there any more."""
        if self._definition.pending_work is None:
            known = [state.messages[key].revision for key in keys if key in state.messages]
        else:
            assert self.shard.view is not None
            rows = [self.shard.view.synced.get((storage, key)) for key in keys]
            known = [row.revision for row in rows if row is not None]
        return not known or min(known) < revision

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
        self._state_bytes += state.size
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

    def _stop_when_fenced(self, error: FencedError) -> None:
        if self._fenced is None:
            logger.warning("another runner has taken over: %s", error)
            self._fenced = error
            self._hear_no_more()
            for worker in self._runs.values():
                if worker.task is not asyncio.current_task():
                    worker.task.cancel()

    async def _carry_out_cancel(self, storage: str, request: CancelRequest, revision: int) -> None:
        """Abort what runs and end what waits; then the request is done."""
        sessions = [storage]
        if self._definition.session is not None:
            sessions = [session for session, at in self._storage.items() if at == storage]
        try:
            for session in sessions:
                order = _CancelOrder(request.reason or "cancelled", revision)
                await self._cancel_session(session, order)
            if self._fenced is not None:
                return
            done = request.model_copy(update={"done": True})
            key, value = codec_of(CancelRequest, "id").encode("cancel_requests", done)
            update = Update(storage, "cancel_requests", key, value, 0)
            await self._client.commit([update], runner=self.shard.runner)
        except AidbError as error:
            logger.warning("a cancel request could not be closed: %s", error)
        finally:
            self._cancelling.discard(request.id)

    async def _cancel_session(self, session: str, order: _CancelOrder) -> None:
        """Let the session's worker carry out the order, now or in its next turns."""
        orders = self._cancels.setdefault(session, [])
        orders.append(order)
        try:
            while not order.is_done and self._fenced is None:
                worker = self._runs.get(session)
                if worker is None:
                    seized = self.queue.seize(session)
                    assert seized, session
                    task = self._begin(session)
                else:
                    task = worker.task
                    self._cancel_run(session, worker.run, order)
                await asyncio.wait([task])
                if task.cancelled() or not task.result():
                    await asyncio.sleep(FAILURE_PAUSE_MS / 1000)
        finally:
            orders.remove(order)
            if not orders:
                del self._cancels[session]

    def _cancel_run(self, session: str, run: GenerationRun | None, order: _CancelOrder) -> None:
        # One that still reads its rows looks for orders when it has them.
        state = self._states.get(session)
        storage = self._storage.get(session, session)
        if run is not None and (
            state is None or self._is_covered(run.answered, storage, state, order.revision)
        ):
            run.cancel(order.reason)

    # Waiting.

    async def catch_up(self) -> None:
        """Wait until every change that is durable now has been heard."""
        status = await self._client.status()
        await self._client.feed.reached(status.revision)

    async def run_one(self, session: str | None) -> bool:
        """Run one generation to its end, or wait for one that runs; False if nothing is due."""
        self._raise_if_fenced()
        is_at_work = bool(self._runs) if session is None else session in self._runs
        if not self.is_open and not is_at_work and not self.is_retired:
            taken = self.queue.take(now_ms=now_ms(), only=session)
            if taken is None:
                return False
            task = self._begin(taken)
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.wait([task])
                raise
            self._raise_if_fenced()
            return True
        cycles = self.cycles
        while self._has_work(session):
            self._raise_if_fenced()
            if session is not None and session in self._runs:
                await asyncio.wait([self._runs[session].task])
                return True
            await self._next_change()
            if session is None and self.cycles > cycles:
                return True
        return False

    async def drain(self, session: str | None) -> None:
        """Wait until nothing is due, working on it if that does not happen by itself."""
        opens = session is None
        self._drains += opens
        try:
            self._raise_if_fenced()
            self._dispatch()
            while self._has_work(session):
                if not self.is_open and not self.is_retired:
                    taken = self.queue.take(now_ms=now_ms(), only=session)
                    if taken is not None:
                        self._begin(taken)
                await self._next_change()
                self._raise_if_fenced()
        finally:
            self._drains -= opens

    async def settle(self) -> None:
        """Wait until nothing runs."""
        while self._runs:
            await asyncio.wait([worker.task for worker in self._runs.values()])

    async def interrupt(self) -> None:
        """Stop what runs where it is."""
        tasks = [worker.task for worker in self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _has_work(self, session: str | None) -> bool:
        return self.queue.has_work(session, now_ms=now_ms())

    def _raise_if_fenced(self) -> None:
        if self._fenced is not None:
            raise self._fenced

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def aclose(self) -> None:
        """Stop everything and end."""
        self.is_retired = True
        self._hear_no_more()
        await self.interrupt()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _hear_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for subscription in self._subscriptions:
            self._client.feed.unsubscribe(subscription)
        if self.shard.view is not None:
            self.shard.view.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
