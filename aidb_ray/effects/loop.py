"""Follows a query, claims the rows that enter it, and works on them, so many at a time.

Several loops may follow one query, in one process or in many: each row is worked on by whoever
has its claim, and what a process leaves in the middle another one takes over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray import crash_points
from aidb_ray.contracts import now_ms, time_ms
from aidb_ray.effects.claimed import rows_of
from aidb_ray.effects.claiming import Claimer, LeaseRenewal, Place
from aidb_ray.effects.definition import EffectDefinition
from aidb_ray.effects.outcomes import Standing, Start, decide_start
from aidb_ray.effects.parked import ParkedRows
from aidb_ray.effects.pending import PendingWork
from aidb_ray.effects.work import RowWork
from aidb_ray.errors import (
    AidbError,
    ConflictError,
    FencedError,
    KeyMissingError,
)
from aidb_ray.query.live import decoder_of, filter_of, to_changes
from aidb_ray.query.operators import Delta, Input, Pipeline, RowChange
from aidb_ray.store.changes import (
    Change,
    Disown,
    Filter,
    FoundRow,
    StoredRow,
)
from aidb_ray.store.claims import CLAIMS, ClaimRecord, decode_claim
from aidb_ray.store.local import RowEvent, View

if TYPE_CHECKING:
    from aidb_ray.database import Database, Partition
    from aidb_ray.store.subscription import Subscription

logger = logging.getLogger(__name__)

FAILURE_PAUSE_MS = 1_000
TURN_PAUSE_MS = 50
MAX_SPREAD = 1_024
UNFOLLOWED_PAUSE_MS = 60_000
ALONE_LIMIT_S = 60.0
ABANDON_S = 1.0


@dataclass(frozen=True, slots=True)
class EffectStatus:
    """How one executor is doing.

    Attributes:
        pending: Rows that wait here, those being worked on included.
        running: Rows being worked on.
        parked: Rows of which a person must say what becomes of them.
        finished: Rows whose end it has written since it began.
        taken_over: Rows of which it took over what others had left in the middle.
    """

    name: str
    holder: str
    pid: int
    pending: int
    running: int
    parked: int
    finished: int
    taken_over: int
    fingerprint: str = ""


class EffectLoop:
    """One executor of an effect, in this event loop.

    Args:
        holder: Names this executor among all there ever are.
        heir_of: How the names of those begin whose process is known to have ended.
    """

    def __init__(
        self, database: Database, definition: EffectDefinition, holder: str, *, heir_of: str = ""
    ) -> None:
        self._database = database
        self._definition = definition
        self._holder = holder
        self._heir_of = heir_of
        self._context = copy_context()
        self._queue: PendingWork[Place, Place] = PendingWork(max_running=definition.max_running)
        self._pipeline: Pipeline[Any] = Pipeline(definition.query, decoder_of=decoder_of)
        self._alias = definition.query.sources[0][0]
        # How many rows of the answer each row is part of: more than one of a query that joins.
        self._matching: dict[Place, int] = {}
        self._arrived: list[RowChange] = []
        self._views: list[View] = []
        self._subscriptions: list[tuple[Partition, Subscription]] = []
        self._rows: dict[Partition, View] = {}
        self._records: dict[Place, tuple[ClaimRecord, int]] = {}
        # Revisions that were written here and that the feed has not told yet.
        self._written: dict[Place, int] = {}
        self._works: dict[Place, RowWork] = {}
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        # Revisions of cancels that were heard while a row was being claimed.
        self._cancelled: dict[Place, int] = {}
        self._parked = ParkedRows(database, definition, self._unpark)
        # As many as may run, and those that do not return keep theirs.
        self._threads = ThreadPoolExecutor(2 * definition.max_running + 4, "aidb-tool")
        self._lonely: Place | None = None
        self._spread = 0
        self._timer: asyncio.TimerHandle | None = None
        self._claimer = Claimer(database, definition, holder)
        self._renewal = LeaseRenewal(database, holder, definition.lease_ms, self._works)
        self._is_closing = False
        self._finished = 0
        self._taken_over = 0

    @property
    def status(self) -> EffectStatus:
        """How it is doing."""
        return EffectStatus(
            name=self._definition.name,
            holder=self._holder,
            pid=os.getpid(),
            pending=len(self._queue),
            running=len(self._works),
            parked=len(self._parked),
            finished=self._finished,
            taken_over=self._taken_over,
            fingerprint=self._definition.fingerprint(),
        )

    # Hearing.

    async def start(self) -> None:
        """Begin to follow the query, and to work."""
        database, session = self._database, self._definition.source.session or ""
        partitions = database.sites_of(session)
        if self._heir_of:
            for partition in partitions:
                await partition.client.commit([Disown(self._heir_of)])
        for wanted in self._pipeline.inputs:
            for partition in database.sites_of(wanted.source.session or ""):
                hear = partial(self._hear, wanted)
                view = self._follow(partition, filter_of(wanted), hear)
                if wanted.name == self._alias:
                    self._rows[partition] = view
        for partition in partitions:
            left = (("effect", (self._definition.name,)), ("state", ("orphan",)))
            orphans = msgspec.structs.replace(self._filter(CLAIMS), where=left)
            self._follow(partition, orphans, self._hear_orphans)
            cancelled = msgspec.structs.replace(
                self._filter(self._definition.source.name), where=(("status", ("cancelled",)),)
            )
            feed = partition.client.feed
            look = partial(self._look_for_cancels, partition, cancelled)
            subscription = feed.subscribe(cancelled, self._hear_cancels, look, snapshot=False)
            self._subscriptions.append((partition, subscription))
        for view in self._views:
            await view.ready()

    def _filter(self, collection: str) -> Filter:
        session = self._definition.source.session or ""
        if session.endswith("*"):
            return Filter(collection, prefix=session[:-1])
        return Filter(collection, session)

    def _follow(self, partition: Partition, wanted: Filter, hear: Any) -> View:
        view = View(partition.client, partition.writes, wanted, hear, shows_writes=False)
        self._views.append(view)
        return view

    def _hear(self, wanted: Input, events: Sequence[RowEvent]) -> None:
        if not self._arrived:
            # What a commit changed in several collections is taken in together.
            asyncio.get_running_loop().call_soon(self._take_in)
        self._arrived += to_changes([wanted.name], wanted.source, events)

    def _take_in(self) -> None:
        arrived, self._arrived = self._arrived, []
        for delta in self._pipeline.advance(arrived):
            place = self._place_of(delta)
            if place is None:
                continue
            count = self._matching.get(place, 0) + {"enter": 1, "update": 0, "exit": -1}[delta.op]
            if count > 0:
                self._matching[place] = count
                try:
                    self._consider(place)
                except (AidbError, ValueError):
                    # One row that cannot be read must not keep the others from being heard.
                    logger.exception("a row cannot be worked on", extra={"key": place[1]})
            else:
                self._matching.pop(place, None)
                self._written.pop(place, None)
                self._discard(place)
        self._dispatch()

    def _place_of(self, delta: Delta[Any]) -> Place | None:
        return delta.key[0] if self._definition.query.is_joined else delta.key

    def _consider(self, place: Place) -> None:
        """Queue a row that the query finds, unless that is old news."""
        row = self._row(place)
        if row is None:
            return
        written = self._written.get(place)
        if written is not None:
            if row.revision <= written:
                return
            del self._written[place]
        fields = self._fields(place, row)
        owns = self._definition.owns
        if owns is not None and not owns(fields):
            return
        not_before: object = fields.get("notBefore", fields.get("not_before"))
        due_ms = time_ms(not_before) if isinstance(not_before, str) else 0
        now = now_ms()
        self._queue.put(place, place, not_before_ms=due_ms, now_ms=now)
        self._queue.wake(place, now_ms=now)

    def _row(self, place: Place) -> StoredRow | None:
        """Return a row that the source's part of the query finds."""
        view = self._rows.get(self._database.site_of(place[0]))
        return None if view is None else view.synced.get(place)

    def _hear_orphans(self, events: Sequence[RowEvent]) -> None:
        collection = self._definition.source.name
        for event in events:
            if event.row is None:
                # Somebody has taken it over, or its row is gone.
                name, _, key = event.key.partition("\0")
                if name == collection:
                    self._records.pop((event.session, key), None)
                continue
            record = decode_claim(event.row.value)
            place = (event.session, record.row)
            if record.collection == collection:
                self._records[place] = (record, event.row.revision)
                self._queue.put(place, place)
                self._take_over(place, record.token)
        self._dispatch()

    def _take_over(self, place: Place, token: int) -> None:
        """Queue what was left in the middle: it is ended before anything is begun."""
        now = now_ms()
        work = self._works.get(place)
        if work is not None and work.token == token:
            # Left by us, who are late: others go first.
            work.stop("fenced", "the claim was lost")
            self._queue.rest(place, until_ms=now + FAILURE_PAUSE_MS)
        else:
            self._queue.wake(place, now_ms=now)
            self._queue.hurry(place)

    def _hear_cancels(self, changes: Sequence[Change]) -> None:
        for change in changes:
            place = (change.session, change.key)
            if place not in self._tasks or change.value is None:
                continue
            rows = rows_of(self._database, self._definition, change.session)
            if rows.fields_in(change.value, change.key).get("status") == "cancelled":
                self._cancel(place, change.revision)

    def _look_for_cancels(
        self, partition: Partition, wanted: Filter, _rows: Sequence[FoundRow], _revision: int
    ) -> None:
        """Look at the rows being worked on: what became of them was not heard."""
        keys = tuple(k for s, k in self._tasks if self._database.site_of(s) is partition)
        if keys:
            where = (*wanted.where, (self._definition.key_name, keys))
            narrowed = msgspec.structs.replace(wanted, where=where)
            partition.spawn(self._find_cancels(partition, narrowed))

    async def _find_cancels(self, partition: Partition, wanted: Filter) -> None:
        try:
            _, rows = await partition.client.read(wanted)
        except AidbError as error:
            logger.warning("cancels may have been missed: %s", error)
            return
        for row in rows:
            if (row.session, row.key) in self._tasks:
                self._cancel((row.session, row.key), row.revision)

    def _cancel(self, place: Place, revision: int) -> None:
        work = self._works.get(place)
        if work is None:
            # It is being claimed; the claim may have come first.
            self._cancelled[place] = revision
        elif revision > work.revision:
            work.stop("ended", "cancelled")

    # Dispatching.

    def _dispatch(self) -> None:
        if self._is_closing:
            return
        now = now_ms()
        while self._lonely is None:
            skip = random.randrange(self._spread + 1)  # noqa: S311  Spreads load, guards nothing.
            place = self._queue.take(now_ms=now, skip=skip)
            if place is None:
                break
            self._begin(place)
        due_ms = self._queue.next_due_ms()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_ms is not None and self._lonely is None and not self._queue.is_full:
            delay = min(max(due_ms - now_ms(), 1), 60_000) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay, self._dispatch)

    def _begin(self, place: Place) -> None:
        loop = asyncio.get_running_loop()
        self._tasks[place] = loop.create_task(
            self._work(place), name=f"the work for {place[1]!r}", context=self._context.copy()
        )

    async def _work(self, place: Place) -> None:
        try:
            await self._turn(place)
        except FencedError as error:
            logger.warning("a row is someone else's now: %s", error)
            self._discard(place)
        except AidbError:
            # The row stays; its claim, if we have it, ends with its lease unless the store is back.
            logger.exception("a row could not be worked on", extra={"key": place[1]})
            self._queue.rest(place, until_ms=now_ms() + FAILURE_PAUSE_MS)
        except Exception:
            # Something that was not foreseen: others go on.
            logger.exception("a row could not be worked on", extra={"key": place[1]})
            self._queue.rest(place, until_ms=now_ms() + FAILURE_PAUSE_MS)
        finally:
            self._works.pop(place, None)
            self._cancelled.pop(place, None)
            del self._tasks[place]
            if self._lonely == place:
                self._lonely = None
            self._queue.done(place, now_ms=now_ms())
            self._dispatch()

    async def _turn(self, place: Place) -> None:
        """Do what is to be done with a row, as far as that is ours to do."""
        row = self._row(place)
        if row is None:
            found = None
            if place in self._records:
                client = self._database.site_of(place[0]).client
                found = await client.find(place[0], self._definition.source.name, place[1])
            if found is None:
                self._forget(place)
                return
            row = StoredRow(found.revision, found.value)
        try:
            standing = self._standing(place, row)
        except Exception:  # A door: `is_complete` is the user's.
            logger.exception("a row cannot be judged", extra={"key": place[1]})
            self._queue.rest(place)  # Until it is written again.
            return
        start = self._decide(place, standing, row)
        match start:
            case "leave":
                self._forget(place)
            case "wait":
                self._queue.rest(place)
            case "park":
                self._park(place, max(standing.recorded_at, row.revision))
            case _:
                if standing.is_suspect and not await self._be_alone(place):
                    return
                await self._take(place, row, standing, start)

    def _standing(self, place: Place, row: StoredRow) -> Standing:
        record, recorded_at = self._records.get(place, (None, 0))
        fields = self._fields(place, row)
        is_complete = self._definition.is_complete
        return Standing(
            record=record,
            recorded_at=recorded_at,
            row_revision=row.revision,
            matches=place in self._matching,
            status=fields.get("status"),
            approval=fields.get("approval"),
            is_complete=None if is_complete is None else is_complete(self._decode(place, row)),
        )

    def _decide(self, place: Place, standing: Standing, row: StoredRow) -> Start:
        definition = self._definition
        doubt, needs = definition.on_in_doubt, definition.needs_approval
        return decide_start(
            standing,
            in_doubt="reconcile" if callable(doubt) else doubt,
            needs_approval=needs is not None and needs(self._fields(place, row)),
            max_interruptions=definition.retry.max_interruptions,
        )

    def _decode(self, place: Place, row: StoredRow) -> Any:
        rows = rows_of(self._database, self._definition, place[0])
        return rows.decode_row(row.value, place[1])

    def _fields(self, place: Place, row: StoredRow) -> dict[str, Any]:
        rows = rows_of(self._database, self._definition, place[0])
        return rows.fields_in(row.value, place[1])

    async def _be_alone(self, place: Place) -> bool:
        """Begin nothing new and wait for what runs; False if another row is alone already.

        Not for ever: what hangs must not keep it from its turn.
        """
        if self._lonely is not None:
            self._queue.rest(place, until_ms=now_ms() + TURN_PAUSE_MS)
            return False
        self._lonely = place
        others = [task for other, task in self._tasks.items() if other != place]
        if others:
            await asyncio.wait(others, timeout=ALONE_LIMIT_S)
        return True

    # Working.

    async def _take(self, place: Place, row: StoredRow, standing: Standing, start: Start) -> None:
        """Claim a row and see it to its end."""
        try:
            claimed = await self._claimer.claim(place, row, standing)
        except ConflictError as error:
            self._yield_to(place, error)
            return
        except KeyMissingError:
            self._forget(place)
            return
        self._spread = self._spread * 3 // 4
        self._records.pop(place, None)
        self._taken_over += standing.is_orphan
        work = self._works[place] = RowWork(
            self._database,
            self._definition,
            claimed,
            matches=lambda: self._matches_since(place, work),
            heartbeat=self._renewal.hurry,
            threads=self._threads,
        )
        if self._cancelled.pop(place, 0) > work.revision:
            work.stop("ended", "cancelled")
        self._renewal.keep_up()
        if crash_points.armed:
            await crash_points.reach("effect.claimed")
        try:
            self._finished += await work.do(start)
            if crash_points.armed:
                await crash_points.reach("effect.recorded")
        finally:
            now = self._row(place)
            if place in self._matching and now is not None and now.revision > work.revision:
                # Written again since, or another row of that key.
                self._queue.put(place, place)
            else:
                if place in self._matching:
                    self._written[place] = work.revision
                self._discard(place)
            if work.thread.is_running:
                # A thread cannot be stopped: its slot stays taken until it returns.
                work.thread.is_given_up = True
                await work.thread.wait()

    def _yield_to(self, place: Place, error: ConflictError) -> None:
        """Leave a row that could not be claimed to whoever has it, or look at it again."""
        now = now_ms()
        match error.code:
            case "claim_changed" if error.current is None:
                self._records.pop(place, None)
            case "claim_changed":
                # Claimed before in a way that we had not heard of. The refusal has the record.
                record = msgspec.convert(error.current, ClaimRecord)
                self._records[place] = (record, error.revision)
            case "claimed":
                self._spread = min(self._spread * 2 + 1, MAX_SPREAD)
                # Whoever has it writes its end, or leaves an orphan; should that not be heard of,
                # it is tried again.
                self._queue.rest(place, until_ms=now + self._definition.lease_ms)
            case _:
                # It has changed, of which the feed will tell.
                self._spread = min(self._spread * 2 + 1, MAX_SPREAD)
                self._queue.rest(place, until_ms=now + FAILURE_PAUSE_MS)

    def _matches_since(self, place: Place, work: RowWork) -> bool:
        """Whether the query finds the row as somebody else has written it."""
        row = self._row(place)
        return place in self._matching and row is not None and row.revision >= work.revision

    def _discard(self, place: Place) -> None:
        # Unless it was taken from us meanwhile, so that it is to be taken over again.
        if place not in self._records:
            self._queue.discard(place, place)

    def _forget(self, place: Place) -> None:
        self._queue.discard(place, place)
        self._records.pop(place, None)

    def _park(self, place: Place, recorded_at: int) -> None:
        """Leave a row until somebody writes it."""
        is_followed = self._parked.add(place, recorded_at)
        self._queue.rest(place, until_ms=None if is_followed else now_ms() + UNFOLLOWED_PAUSE_MS)

    def _unpark(self, place: Place) -> None:
        self._queue.wake(place, now_ms=now_ms())
        self._dispatch()

    # Ending.

    def die(self) -> None:
        """Stop everything where it is, as the end of a process does: no claim is given up."""
        self._is_closing = True
        self._hear_no_more()
        for task in self._tasks.values():
            task.cancel()
        self._renewal.die()

    def _hear_no_more(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._timer is not None:
            self._timer.cancel()
        self._parked.close()
        for view in self._views:
            view.close()
        for partition, subscription in self._subscriptions:
            partition.client.feed.unsubscribe(subscription)

    async def aclose(self) -> None:
        """Stop what runs where it is, for others to take over, and follow nothing any more.

        Waits up to `grace_ms` for tools in threads, and for others that do not end when cancelled.
        """
        self._is_closing = True
        self._hear_no_more()
        for place, task in self._tasks.items():
            work = self._works.get(place)
            if work is None:
                task.cancel()
            else:
                work.stop("closed", "the executor closes")
        if self._tasks:
            grace = self._definition.grace_ms / 1000
            _, running = await asyncio.wait(set(self._tasks.values()), timeout=grace)
            for task in running:
                logger.warning("%s does not return; it is left alone", task.get_name())
                task.cancel()
            if running:
                # Who waits for a thread ends with this; who takes no cancel is left behind.
                await asyncio.wait(running, timeout=ABANDON_S)
        await self._renewal.aclose()
