"""Subscriptions of one process to one partition, over one long poll that they share.

A subscription is told the rows of its filter at one revision, then every later change, once and
in order, across restarts of the store. Changes arrive as calls in this event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from uuid import uuid4

from aidb_ray.errors import UnavailableError
from aidb_ray.runtime import ActorRef
from aidb_ray.store import changes as wire
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import (
    Change,
    Changes,
    Filter,
    FoundRow,
    PollRequest,
    ReadRequest,
    bucket_of,
)

logger = logging.getLogger(__name__)

WAIT_MS = 20_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5

OnRows = Callable[[Sequence[FoundRow], int], None]
OnChanges = Callable[[Sequence[Change]], None]


class Subscription:
    """What one reader hears of its filter.

    `on_rows(rows, revision)` comes first, with every row that passes; again, with all of them,
    when the store can no longer tell what was missed. `on_changes(changes)` follows with every
    later change, whole commits, in order; it may bring rows that fail `filter.where`, so look
    again. With `snapshot=False` there is no `on_rows` but after such a loss, with no rows:
    changes begin at the revision that `started` gives. `snapshot` may be a narrower filter than
    the one that is followed: then only its rows come first.
    """

    def __init__(
        self,
        wanted: Filter,
        on_changes: OnChanges,
        on_rows: OnRows | None,
        *,
        snapshot: bool | Filter,
    ) -> None:
        self.filter = wanted
        self.on_changes = on_changes
        self.on_rows = on_rows
        self.snapshot = wanted if snapshot is True else snapshot or None
        self.is_active = False
        self.held: list[Change] | None = [] if self.snapshot else None
        self.loading: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[int] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()

    def hear(self, changes: list[Change]) -> None:
        """Take changes from the feed, or hold them while the rows are still on their way."""
        if self.held is None:
            self.on_changes(changes)
        else:
            self.held.extend(changes)


class FeedReader:
    """Runs the long poll while there are subscriptions.

    Attributes:
        cursor: Revision up to which every active subscription has heard everything.
    """

    def __init__(self, ref: ActorRef[StoreActor]) -> None:
        self._ref = ref
        self._feed_id = uuid4().hex
        self._generation = ""
        self.cursor = -1
        self._subscriptions: dict[Subscription, None] = {}
        self._by_collection: dict[str, list[Subscription]] = {}
        self._by_session: dict[tuple[str, str], list[Subscription]] = {}
        self._filters: tuple[Filter, ...] | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._polling: asyncio.Task[None] | None = None
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._is_parked = False

    def subscribe(
        self,
        wanted: Filter,
        on_changes: OnChanges,
        on_rows: OnRows | None = None,
        *,
        snapshot: bool | Filter = True,
    ) -> Subscription:
        """Begin a subscription; await its `ready` to know that the rows have been told."""
        added = Subscription(wanted, on_changes, on_rows, snapshot=snapshot)
        self._subscriptions[added] = None
        self._filters = None
        if wanted.session is None:
            self._by_collection.setdefault(wanted.collection, []).append(added)
        else:
            place = (wanted.collection, wanted.session)
            self._by_session.setdefault(place, []).append(added)
        if self._polling is None or self._polling.done():
            self._polling = asyncio.get_running_loop().create_task(self._poll_forever())
        else:
            self._nudge()
        return added

    def unsubscribe(self, gone: Subscription) -> None:
        """End a subscription; nothing is told after this returns."""
        if gone not in self._subscriptions:
            return
        del self._subscriptions[gone]
        self._filters = None
        wanted = gone.filter
        if wanted.session is None:
            self._by_collection[wanted.collection].remove(gone)
        else:
            place = (wanted.collection, wanted.session)
            self._by_session[place].remove(gone)
            if not self._by_session[place]:
                del self._by_session[place]
        if gone.loading is not None:
            gone.loading.cancel()
        for future in (gone.started, gone.ready):
            future.cancel()

    async def reached(self, revision: int) -> None:
        """Wait until every change up to `revision` has been told."""
        if self.cursor >= revision:
            return
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((revision, waiting))
        self._nudge()
        await waiting

    async def aclose(self) -> None:
        """End all subscriptions and the poll."""
        for subscription in list(self._subscriptions):
            self.unsubscribe(subscription)
        tasks = [*self._side_tasks, *([self._polling] if self._polling else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._polling = None

    def _nudge(self) -> None:
        # A poll that waits at the store knows neither new filters nor who waits for its cursor.
        if self._is_parked:
            self._is_parked = False
            self._spawn(self._release())

    async def _release(self) -> None:
        try:
            await self._ref.ask(StoreActor.release_poll, self._feed_id)
        except UnavailableError:
            logger.debug("the poll could not be released; it ends by itself")

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
        return task

    async def _poll_forever(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            if not self._subscriptions:
                self._polling = None
                return
            try:
                await self._poll_once()
            except UnavailableError as error:
                # The store restarts, or the call was lost: the cursor makes asking again safe.
                logger.info("the feed is interrupted: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            else:
                pause = _FIRST_PAUSE_S

    async def _poll_once(self) -> None:
        if self.cursor < 0:
            answer = await self._ask(())
            self._generation, self.cursor = answer.generation, answer.through
        if self._filters is None:
            self._filters = tuple({s.filter: None for s in self._subscriptions})
        for subscription in self._subscriptions:
            if not subscription.is_active:
                self._activate(subscription)
        must_hurry = any(revision > self.cursor for revision, _ in self._waiting)
        self._is_parked = not must_hurry
        try:
            answer = await self._ask(self._filters, 0 if must_hurry else WAIT_MS)
        finally:
            self._is_parked = False
        if answer.lost or answer.generation != self._generation:
            self._start_anew(answer)
        elif answer.retry_after_ms:
            await asyncio.sleep(answer.retry_after_ms / 1000)
        else:
            self._dispatch(answer.changes)
            self.cursor = answer.through
        self._tell_waiting()

    async def _ask(self, filters: tuple[Filter, ...], wait_ms: int = 0) -> Changes:
        request = PollRequest(self._feed_id, self._generation, self.cursor, filters, wait_ms)
        return wire.decode_changes(await self._ref.ask(StoreActor.poll, wire.encode(request)))

    def _activate(self, subscription: Subscription) -> None:
        subscription.is_active = True
        if not subscription.started.done():
            subscription.started.set_result(self.cursor)
        if subscription.snapshot:
            subscription.loading = self._spawn(self._load(subscription))
        elif not subscription.ready.done():
            subscription.ready.set_result(None)

    def _start_anew(self, answer: Changes) -> None:
        logger.warning(
            "changes were missed; every subscription starts anew",
            extra={"cursor": self.cursor, "oldest": answer.lost},
        )
        self._generation, self.cursor = answer.generation, -1
        for subscription in self._subscriptions:
            if not subscription.is_active:
                continue
            subscription.is_active = False
            if subscription.loading is not None:
                subscription.loading.cancel()
            if subscription.snapshot:
                subscription.held = []
            elif subscription.on_rows is not None:
                subscription.on_rows([], -1)

    def _dispatch(self, changes: Sequence[Change]) -> None:
        heard: dict[Subscription, list[Change]] = {}
        for change in changes:
            for subscription in self._by_collection.get(change.collection, ()):
                wanted = subscription.filter
                bucket = bucket_of(change.session) if wanted.buckets else 0
                if subscription.is_active and wanted.covers(change.session, bucket):
                    heard.setdefault(subscription, []).append(change)
            if self._by_session:
                place = (change.collection, change.session)
                for subscription in self._by_session.get(place, ()):
                    if subscription.is_active:
                        heard.setdefault(subscription, []).append(change)
        for subscription, told in heard.items():
            try:
                subscription.hear(told)
            except Exception:
                # One reader's mistake must not keep the others from hearing.
                logger.exception("a subscriber failed")

    def _tell_waiting(self) -> None:
        still: list[tuple[int, asyncio.Future[None]]] = []
        for revision, waiting in self._waiting:
            if revision > self.cursor:
                still.append((revision, waiting))
            elif not waiting.done():
                waiting.set_result(None)
        self._waiting = still

    async def _load(self, subscription: Subscription) -> None:
        """Read the rows, then fold in what changed meanwhile, so that they are of one revision."""
        rows: dict[tuple[str, str], FoundRow] = {}
        wanted = subscription.snapshot
        assert wanted is not None
        request = ReadRequest(wanted)
        pause = _FIRST_PAUSE_S
        while True:
            try:
                raw = await self._ref.ask(StoreActor.read, wire.encode(request))
            except UnavailableError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
                continue
            page = wire.decode_page(raw)
            rows.update(((row.session, row.key), row) for row in page.rows)
            if not page.more:
                break
            last = page.rows[-1]
            request = ReadRequest(wanted, after=(last.session, last.key))
        end = max([page.latest, *(row.revision for row in rows.values())])
        await self.reached(end)
        assert subscription.held is not None
        later: list[Change] = []
        for change in subscription.held:
            if change.revision > end:
                later.append(change)
                continue
            where = (change.session, change.key)
            known = rows.get(where)
            if known is not None and known.revision >= change.revision:
                continue
            if change.value is None:
                rows.pop(where, None)
            else:
                rows[where] = FoundRow(change.session, change.key, change.revision, change.value)
        subscription.held = None
        subscription.loading = None
        if subscription.on_rows is not None:
            subscription.on_rows(list(rows.values()), end)
        if not subscription.ready.done():
            subscription.ready.set_result(None)
        if later:
            subscription.on_changes(later)
