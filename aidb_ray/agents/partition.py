"""The work of one shard of an agent in one partition: which sessions run, rest and wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray.agents import cycle
from aidb_ray.agents.assignment import Assignment, Shard
from aidb_ray.agents.calls import are_asking, is_deferred, standings
from aidb_ray.agents.cancels import CancelOrder, CancelOrders
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.ending import is_gone
from aidb_ray.agents.groups import RowGroups
from aidb_ray.agents.parking import Parking
from aidb_ray.agents.recorder import SilenceLimit
from aidb_ray.agents.rows import (
    GenerationRow,
    MessageRow,
    decode_generation,
    decode_message,
    now_ms,
    time_ms,
)
from aidb_ray.agents.run import GenerationRun
from aidb_ray.agents.session import SessionState
from aidb_ray.agents.states import StateCache
from aidb_ray.chunks import ChunkFlusher
from aidb_ray.contracts import CancelRequest, ToolCallStatus
from aidb_ray.database import Database, Partition
from aidb_ray.effects.pending import PendingWork
from aidb_ray.errors import AidbError, FencedError, UnavailableError
from aidb_ray.store.changes import Change, Filter, FoundRow, Runner, Update
from aidb_ray.store.local import RowEvent, View
from aidb_ray.store.rows import codec_of

if TYPE_CHECKING:
    from aidb_ray.store.subscription import Subscription

logger = logging.getLogger(__name__)

FAILURE_PAUSE_MS = 1_000
LONGEST_FAILURE_PAUSE_MS = 60_000
TURN_PAUSE_MS = 500
_DECIDED = tuple(status.value for status in ToolCallStatus if status.is_terminal)
_APPROVALS = ("approved", "rejected")


@dataclass(slots=True)
class _Worker:
    """Who is at work in a session: its task, and the run once its rows are known."""

    task: asyncio.Task[bool]
    run: GenerationRun | None = None

    def interrupt(self) -> None:
        """Stop it where it is; the generation goes on later, here or elsewhere."""
        if self.run is not None:
            self.run.leave()
        self.task.cancel()


@dataclass(slots=True)
class SuspectTurn:
    """Who has the turn of those that may be what ends the process; one at a time."""

    run: GenerationRun | None = None

    @property
    def is_taken(self) -> bool:
        """Whether a suspect runs, and has not finished a round yet."""
        return self.run is not None and self.run.is_suspect


class PartitionWork:
    """A shard's work in one partition."""

    def __init__(
        self,
        database: Database,
        partition: Partition,
        definition: AgentDefinition,
        buckets: tuple[int, int],
        runner: Runner,
        suspects: SuspectTurn,
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
            runner,
        )
        self.is_retired = False
        self.cycles = 0
        self._fenced: FencedError | None = None
        self._drains = 0
        self._context = copy_context()
        self._states = StateCache(
            self._client,
            lambda: SessionState(definition.name, self.shard.delegates),
            has_messages=not definition.is_raw,
        )
        self._groups = RowGroups(definition.pending_work, definition.session)
        self._runs: dict[str, _Worker] = {}
        self._cancels = CancelOrders()
        self._parking = Parking()
        # The sessions whose rows waited when the process began, until one has been answered.
        self._leftovers: set[str] = set()
        self._suspects = suspects
        # Of a `session=`: open generations of rows that left the query, by what is at work on them.
        self._orphans: dict[str, str] = {}
        # Of a `session=`: the generation that each group which was left alone had begun.
        self._begun: dict[str, str] = {}
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
        self._follow_calls()
        await self._heard_rows()
        self._is_started = True
        await self._settle_orphans()

    async def _heard_rows(self) -> None:
        """Wait until the rows that were there at the start have been heard."""
        for subscription in self._subscriptions:
            await asyncio.shield(subscription.ready)
        if self.shard.view is not None:
            await self.shard.view.ready()

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

    def _see_messages(self, rows: Sequence[FoundRow], revision: int) -> None:
        # The rows as they are now, at first and after a gap: what is cached may be old.
        self._states.clear()
        entries: list[tuple[str, str, int]] = []
        self._leftovers.update(row.session for row in rows)
        for row in rows:
            message = _parse_message(row.value)
            due_ms = None if message is None else self._due_ms(message)
            if due_ms is not None:
                entries.append((row.session, row.key, due_ms))
        self.queue.replace(entries, now_ms=now_ms())
        self._see_calls((), revision)

    def _hear_messages(self, changes: Sequence[Change]) -> None:
        now = now_ms()
        queue, states, delegates = self.queue, self._states, self.shard.delegates
        for change in changes:
            session, key, value = change.session, change.key, change.value
            state = states.find(session)
            if state is not None:
                state.put_message(key, change.revision, value)
                if value is None:
                    self._hear_deleted(session, state)
            message = None if value is None else _parse_message(value)
            if delegates and message is not None and self._is_reply_to_us(message):
                self._hear_for(session, change.revision)
            due_ms = None if message is None else self._due_ms(message)
            if due_ms is None:
                self._discard(session, key)
            else:
                queue.put(session, key, not_before_ms=due_ms, now_ms=now)
        self._dispatch()

    def _hear_deleted(self, session: str, state: SessionState) -> None:
        """Take in that a message is gone, and perhaps the session: then what is known is old."""
        worker = self._runs.get(session)
        if worker is None:
            self._states.forget(session)
            return
        run = worker.run
        if run is not None and run.answered and state.messages.keys().isdisjoint(run.answered):
            self._spawn(self._stop_if_gone(session, run))

    async def _stop_if_gone(self, session: str, run: GenerationRun) -> None:
        """Abort a run whose session was deleted: it may be waiting for a model for long."""
        if not run.generation_id:
            return  # It begins with a commit that needs the messages.
        try:
            found = await self._client.find(session, "generations", run.generation_id)
        except AidbError:
            # Its next commit is refused in any case.
            logger.debug("it is not known whether %s was deleted", session)
        else:
            worker = self._runs.get(session)
            if found is None and worker is not None and worker.run is run:
                run.cancel("deleted")

    def _due_ms(self, message: MessageRow) -> int | None:
        """Return when a message is due, None if it asks nothing of this agent."""
        if message.processed or message.target_agent != self._definition.name:
            return None
        return time_ms(message.not_before)

    def _is_reply_to_us(self, message: MessageRow) -> bool:
        return message.request_id is not None and message.target_agent == self._definition.name

    def _follow_query(self) -> None:
        wanted = self._groups.wanted
        if wanted.session is None:
            wanted = msgspec.structs.replace(wanted, buckets=self._buckets)
        self.shard.view = View(
            self._client, self._partition.writes, wanted, self._hear_query, shows_writes=False
        )

    def _hear_query(self, events: Sequence[RowEvent]) -> None:
        gone = {event.key for event in events if event.row is None}
        for key, left, joined in self._groups.advance(events):
            if left is not None and left != joined:
                self._discard(left, key)
                if key in gone and left not in self._runs:
                    # Perhaps with its session: then what is known is old.
                    self._states.forget(left)
            if joined is not None:
                self.queue.put(joined, key)
                if not self._is_started:
                    self._leftovers.add(joined)
        self._dispatch()

    def _discard(self, session: str, key: str) -> None:
        """Take a row from the queue that waits no more; end what was begun for it and left."""
        is_left = session in self._parking or session in self._failures
        ends = is_left and not self.is_retired and self._fenced is None
        ends = ends and key in self.queue.keys(session)
        self.queue.discard(session, key)
        if not ends:
            return
        self._unpark(session)
        if not self.queue.keys(session) and self.queue.seize(session):
            if session in self._begun:
                self._orphans[session] = self._begun[session]
            self._begin(session)

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
        if is_mine and self._cancels.begin(request.id):
            self._spawn(self._carry_out_cancel(storage, request, revision))

    def _follow_calls(self) -> None:
        """Follow calls that others answer or decide about, if there may be any."""
        definition = self._definition
        mine = ("agent", (definition.name,))
        decided: list[tuple[tuple[str, tuple[str, ...]], ...]] = []
        if definition.on_in_doubt == "park":
            decided = [(("status", _DECIDED),), (("approval", _APPROVALS),)]
        else:
            deferred = [tool for tool in definition.tools if is_deferred(tool)]
            elsewhere = tuple(tool.name for tool in deferred if tool.runs_elsewhere)
            asking = tuple(tool.name for tool in deferred if tool.needs_approval)
            if elsewhere:
                decided.append((("name", elsewhere), ("status", _DECIDED)))
            if asking:
                decided.append((("name", asking), ("approval", _APPROVALS)))
        calls = self._filter("tool_calls")
        for where in decided:
            self._subscriptions.append(
                self._client.feed.subscribe(
                    msgspec.structs.replace(calls, where=(mine, *where)),
                    self._hear_calls,
                    self._see_calls,
                    snapshot=False,
                )
            )

    def _hear_calls(self, changes: Sequence[Change]) -> None:
        for change in changes:
            # Of a `session=`, which group waits for it only its rows can tell.
            for session in self._groups.of(change.session):
                self._hear_for(session, change.revision)
        self._dispatch()

    def _see_calls(self, _rows: Sequence[FoundRow], revision: int) -> None:
        for session in [*self._runs, *self._parking.sessions]:
            self._hear_for(session, revision)
        self._dispatch()

    def _hear_for(self, session: str, revision: int) -> None:
        """Have a session look at its rows again, now or when its run would leave it waiting."""
        worker = self._runs.get(session)
        if worker is not None:
            self._parking.hear(session, revision)
            if worker.run is not None:
                worker.run.hear()
        self._unpark(session)

    def _unpark(self, session: str) -> None:
        if self._parking.leave(session):
            self.queue.wake(session, now_ms=now_ms())

    # Beginning.

    async def _settle_orphans(self) -> None:
        """End what an earlier process began for rows that wait no more."""
        mine = (("agent", (self._definition.name,)), ("status", ("running",)))
        begun = msgspec.structs.replace(self._filter("generations"), where=mine)
        _, rows = await self._client.read(begun)
        for row in rows:
            if row.revision >= self.shard.runner.epoch:
                continue  # It is at work here.
            generation = decode_generation(row.value)
            if self._is_waited_for(row.session, generation) or self._fenced is not None:
                continue
            session = row.session
            if self._definition.session is not None:
                # Of which group its rows were, only they can tell.
                session = generation.id
                self._groups.add(session, row.session)
                self._orphans[session] = generation.id
            # One that is at work there ends it before anything else.
            if self.queue.seize(session):
                await asyncio.wait([self._begin(session)])
            if self._orphans.pop(session, None) is not None:
                self._states.forget(session)

    def _is_waited_for(self, storage: str, generation: GenerationRow) -> bool:
        if not self._definition.is_raw:
            waiting = self.queue.keys(storage)
            return not set(waiting).isdisjoint(generation.message_ids)
        return any(self._groups.row(storage, key) is not None for key in generation.message_ids)

    # Working.

    def _dispatch(self) -> None:
        self._changed.set()
        if self.is_retired or self._fenced is not None:
            return
        if self.is_open:
            now = now_ms()
            for session in self._parking.due(now):
                self._unpark(session)
            while (session := self.queue.take(now_ms=now)) is not None:
                self._begin(session)
        due = [self.queue.next_due_ms(), self._parking.next_due_ms()]
        due_ms = min((each for each in due if each is not None), default=None)
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
            self._states.forget(session)
            raise
        except UnavailableError:
            logger.exception("the store does not answer; the session is tried again")
            self._rest(session)
        except Exception as error:
            if is_gone(error):
                logger.info("what was worked on is gone: %s", error, extra={"session": session})
                self._states.forget(session)
            else:
                # Something that was not foreseen: the rows stay, others go on.
                logger.exception("a generation could not be run", extra={"session": session})
                self._rest(session)
        else:
            self._failures.pop(session, None)
            return True
        finally:
            del self._runs[session]
            self._parking.forget(session)
            self.queue.done(session, now_ms=now_ms())
            if not self.queue.keys(session):
                self._groups.forget(session)
                self._begun.pop(session, None)
                self._orphans.pop(session, None)
            self._dispatch()
        return False

    def _rest(self, session: str) -> None:
        """Leave a session alone for a while, the longer the more often it failed."""
        failures = self._failures[session] = self._failures.get(session, 0) + 1
        pause_ms = min(FAILURE_PAUSE_MS << min(failures - 1, 16), LONGEST_FAILURE_PAUSE_MS)
        self.queue.rest(session, until_ms=now_ms() + pause_ms)
        self._states.forget(session)

    async def _run_generation(self, session: str) -> None:
        storage = self._groups.storage_of(session)
        state = await self._states.get(session, storage)
        if any(not self._is_known(key, state) for key in self.queue.keys(session)):
            # The feed tells of messages that are not among the rows: those were read too early.
            self._states.forget(session)
            state = await self._states.get(session, storage)
        found = self._open_generation(session, state)
        is_interrupted = await self._is_interrupted(found, state, storage)
        orders = self._cancels.open(session)
        if orders:
            keys, found = self._to_cancel(session, storage, state, found, orders)
            if not keys and found is None:
                return
        else:
            due = self.queue.due_keys(session, now_ms=now_ms())
            keys = self._together(self._waiting(session, due, state), state)
        if found is None and not keys:
            return
        keys = self._keys_to_answer(keys, found, state)
        is_suspect = False
        if found is not None and keys and not orders:
            calls = standings(state, found, self._definition)
            is_suspect = cycle.is_suspect(found, calls, is_interrupted=is_interrupted)
        if is_suspect and self._suspects.is_taken:
            # Both may be what ends the process. The other one has its turn until a round is done.
            self.queue.rest(session, until_ms=now_ms() + TURN_PAUSE_MS)
            return
        rows = [self._groups.row(storage, key) for key in keys] if self._definition.is_raw else []
        is_leftover = session in self._leftovers
        run = GenerationRun(
            self.shard,
            Assignment(storage, state, keys, rows, found, is_leftover, is_interrupted),
        )
        if orders:
            run.cancel(orders[0].reason)
        elif is_suspect:
            self._suspects.run = run
        if not await self._run(session, run, state):
            return
        self.cycles += 1
        self._leftovers.discard(session)
        # Answered: the feed will say so too, but until then they must not be taken again. A row
        # of a `pending_work` that changed meanwhile waits anew.
        taken = dict(zip(keys, rows, strict=True)) if rows else {}
        for key in run.answered:
            if not rows or self._groups.row(storage, key) is taken.get(key):
                self.queue.discard(session, key)

    async def _run(self, session: str, run: GenerationRun, state: SessionState) -> bool:
        """Run to the end of the generation; False if the session waits for others instead."""
        self._runs[session].run = run
        self.shard.running += 1
        size_before = state.size
        try:
            outcome = await run.run()
        finally:
            self.shard.running -= 1
            self._states.bound(state.size - size_before, self._runs)
            if self._suspects.run is run:
                self._suspects.run = None
            if self._definition.session is not None and run.generation_id:
                self._begun[session] = run.generation_id
        if outcome == "ended":
            self._begun.pop(session, None)
            return True
        # Its rows are read again when it goes on, be it at once.
        self._states.forget(session)
        if outcome != "changed" and not self._parking.has_heard(session, state.revision):
            self._parking.park(session, outcome)
            self.queue.rest(session)
        return False

    async def _is_interrupted(
        self, found: GenerationRow | None, state: SessionState, storage: str
    ) -> bool:
        """Whether a process ended at work on the generation, and not while it only waited."""
        if found is None or state.was_written_since(found.id, self.shard.runner.epoch):
            return False
        calls = standings(state, found, self._definition)
        running = [call.key for call in calls if call.standing == "running"]
        return not running or not await are_asking(self._client, storage, running)

    def _open_generation(self, session: str, state: SessionState) -> GenerationRow | None:
        """Return the generation that a run of the session goes on with."""
        if self._definition.session is None:
            return state.open_generation()
        orphan = state.generations.get(self._orphans.get(session, ""))
        if orphan is not None:
            return None if orphan.is_terminal else orphan
        return state.open_generation(self.queue.keys(session))

    def _keys_to_answer(
        self, keys: list[str], found: GenerationRow | None, state: SessionState
    ) -> list[str]:
        """Return what a run answers: of an open generation what is left of its own rows."""
        if found is None:
            return keys
        if not self._definition.is_raw:
            return [key for key in found.message_ids if state.is_waiting(key)]
        return [] if set(keys).isdisjoint(found.message_ids) else keys

    def _is_known(self, key: str, state: SessionState) -> bool:
        return self._definition.is_raw or key in state.messages

    def _waiting(self, session: str, keys: list[str], state: SessionState) -> list[str]:
        """Return which of the keys wait for an answer, oldest first; forget the others."""
        if self._definition.is_raw:
            return keys
        for key in keys:
            if not state.is_waiting(key):
                self.queue.discard(session, key)
        waiting = [key for key in keys if state.is_waiting(key)]
        return sorted(waiting, key=lambda key: (state.messages[key].message.created_at, key))

    def _together(self, keys: list[str], state: SessionState) -> list[str]:
        """Return which of the waiting keys, oldest first, are answered next.

        A request is answered by itself, so that its reply is the answer to it and nothing else.
        """
        if self._definition.is_raw:
            return keys
        alone = [key for key in keys if state.messages[key].message.request_id is not None]
        if alone and alone[0] == keys[0]:
            return keys[:1]
        return [key for key in keys if key not in alone] if alone else keys

    def _to_cancel(
        self,
        session: str,
        storage: str,
        state: SessionState,
        found: GenerationRow | None,
        orders: Sequence[CancelOrder],
    ) -> tuple[list[str], GenerationRow | None]:
        """Return the generation that the orders cover, or the waiting keys that they do.

        If there are neither, the orders are done. Rows of a `pending_work` that only wait cannot
        be cancelled: they would still match.
        """
        if found is not None and self._covers(orders, found.message_ids, storage, state):
            return self._keys_to_answer(self.queue.keys(session), found, state), found
        keys: list[str] = []
        if not self._definition.is_raw:
            keys = [
                key
                for key in self._waiting(session, self.queue.keys(session), state)
                if self._covers(orders, [key], storage, state)
            ]
        if not keys:
            for order in orders:
                order.is_done = True
        return self._together(keys, state), None

    def _covers(
        self, orders: Sequence[CancelOrder], keys: Sequence[str], storage: str, state: SessionState
    ) -> bool:
        """Whether any of the orders covers any of the rows."""
        if self._definition.is_raw:
            assert self.shard.view is not None
            rows = [self.shard.view.synced.get((storage, key)) for key in keys]
            written = [row.revision for row in rows if row is not None]
        else:
            written = [state.messages[key].revision for key in keys if key in state.messages]
        return any(order.covers(keys, written) for order in orders)

    def _stop_when_fenced(self, error: FencedError) -> None:
        if self._fenced is None:
            logger.warning("another runner has taken over: %s", error)
            self._fenced = error
            self._hear_no_more()
            for worker in self._runs.values():
                if worker.task is not asyncio.current_task():
                    worker.interrupt()

    async def _carry_out_cancel(self, storage: str, request: CancelRequest, revision: int) -> None:
        """Abort what runs and end what waits; then the request is done."""
        try:
            # What was not heard yet would not be cancelled.
            await self._heard_rows()
            for session in self._groups.of(storage):
                order = CancelOrder(request.reason or "cancelled", revision, request.message_id)
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
            self._cancels.end(request.id)

    async def _cancel_session(self, session: str, order: CancelOrder) -> None:
        """Let the session's worker carry out the order, now or in its next turns."""
        self._cancels.add(session, order)
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
            self._cancels.remove(session, order)

    def _cancel_run(self, session: str, run: GenerationRun | None, order: CancelOrder) -> None:
        # One that still reads its rows looks for orders when it has them.
        state = self._states.find(session)
        storage = self._groups.storage_of(session)
        if run is not None and (
            state is None or self._covers([order], run.answered, storage, state)
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
            worker = self._runs[taken]
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                worker.interrupt()
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
        workers = list(self._runs.values())
        for worker in workers:
            worker.interrupt()
        await asyncio.gather(*(worker.task for worker in workers), return_exceptions=True)

    def _has_work(self, session: str | None) -> bool:
        return self.queue.has_work(session, now_ms=now_ms()) or self._parking.is_work(session)

    def has_pending(self, session: str) -> bool:
        """Whether rows of a session, or of a group of rows, wait or are being answered."""
        groups = [session, *self._groups.of(session)]
        return any(self.queue.keys(group) for group in groups)

    def _raise_if_fenced(self) -> None:
        if self._fenced is not None:
            raise self._fenced

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def die(self) -> None:
        """Stop everything where it is, as the end of its process does."""
        self.is_retired = True
        self._hear_no_more()
        for task in (*(worker.task for worker in self._runs.values()), *self._tasks):
            task.cancel()

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


def _parse_message(value: bytes) -> MessageRow | None:
    try:
        return decode_message(value)
    except msgspec.DecodeError:
        logger.exception("a message cannot be read and is left alone")
        return None
