"""Subscriptions of one process to one partition, over one long poll that they share.

A subscription is told the rows of its filter at one revision, then every later change, once and
in order, across restarts of the store. Changes arrive as calls in this event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any
from uuid import uuid4

from aidb_ray.errors import AidbError, CompactedError, NotReadyError, UnavailableError
from aidb_ray.runtime import ActorRef, create_detached_task
from aidb_ray.store import changes as wire
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import (
    CHUNKS,
    Change,
    Changes,
    Filter,
    FoundRow,
    PollRequest,
    ReadRequest,
    bucket_of,
)
from aidb_ray.store.matching import make_row_test

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
    again. With `snapshot=False` changes begin at the revision that `started` gives, and `on_rows`
    comes only after such a loss, with no rows: what was missed is in the store by then, and every
    change after its revision will be told. `snapshot` may be a narrower filter than the one that
    is followed: then only its rows come first.

    Attributes:
        started: The revision after which changes are heard; NotReadyError if it ended before.
        ready: Done when the first rows have been told; NotReadyError if it ended before, and a
            StorageError if the store cannot be opened.
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
        assert self.snapshot is None or wanted.collection != CHUNKS, "chunks are no rows"
        self.is_active = False
        self.held: list[Change] | None = [] if self.snapshot else None
        self.loading: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[int] = loop.create_future()
        self.ready: asyncio.Future[None] = loop.create_future()
        # Cleared while rows that must be told first are on their way.
        self.told = asyncio.Event()
        if self.snapshot is None:
            self.told.set()

    def hear(self, changes: list[Change]) -> None:
        """Take changes from the feed, or hold them while the rows are still on their way."""
        if self.held is not None:
            self.held.extend(changes)
            return
        try:
            self.on_changes(changes)
        except Exception:
            # One reader's mistake must not keep the others from hearing.
            logger.exception("a subscriber failed")

    def hear_rows(self, rows: Sequence[FoundRow], revision: int) -> None:
        """Take the rows that come first."""
        if self.on_rows is not None:
            try:
                self.on_rows(rows, revision)
            except Exception:
                logger.exception("a subscriber failed")

    def begin(self, cursor: int) -> None:
        """Hear changes after `cursor` from now on."""
        self.is_active = True
        is_anew = self.started.done()
        if not is_anew:
            self.started.set_result(cursor)
        if self.snapshot is not None:
            return
        if not self.ready.done():
            self.ready.set_result(None)
        if is_anew:
            # Told any earlier, it could look into the store before a commit that nobody hears of.
            self.hear_rows([], cursor)

    def end(self, error: AidbError) -> None:
        """Tell whoever waits that it will not begin."""
        if self.loading is not None:
            self.loading.cancel()
        self.told.set()
        for future in (self.started, self.ready):
            if not future.done():
                future.set_exception(error)
                # Nobody need wait for it.
                future.exception()


class FeedReader:
    """Runs the long poll while there are subscriptions.

    Attributes:
        cursor: Revision up to which every active subscription has heard everything; -1 while
            there is none.
    """

    def __init__(self, ref: ActorRef[StoreActor]) -> None:
        self._ref = ref
        self._feed_id = uuid4().hex
        self._generation = ""
        self.cursor = -1
        self._subscriptions: dict[Subscription, None] = {}
        self._by_collection: dict[str, dict[Subscription, None]] = {}
        self._by_session: dict[tuple[str, str], dict[Subscription, None]] = {}
        self._filters: tuple[Filter, ...] | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._polling: asyncio.Task[None] | None = None
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._is_parked = False
        self._polls = 0

    @property
    def generation(self) -> str:
        """Which history of the store the cursor is of; one without a disk begins others."""
        return self._generation

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
        self._neighbors(wanted)[added] = None
        if self._polling is None or self._polling.done():
            # Shared by all who subscribe here, so in the context of none.
            self._polling = create_detached_task(self._poll_forever())
        else:
            self._nudge()
        return added

    def unsubscribe(self, gone: Subscription) -> None:
        """End a subscription; nothing is told after this returns."""
        if gone not in self._subscriptions:
            return
        del self._subscriptions[gone]
        self._filters = None
        neighbors = self._neighbors(gone.filter)
        del neighbors[gone]
        if not neighbors:
            if gone.filter.session is None:
                del self._by_collection[gone.filter.collection]
            else:
                del self._by_session[gone.filter.collection, gone.filter.session]
        gone.end(NotReadyError("The subscription was closed before it had begun."))
        if not self._subscriptions:
            # The poll that waits ends; the next subscription begins at what is newest then.
            self._nudge()

    def _neighbors(self, wanted: Filter) -> dict[Subscription, None]:
        if wanted.session is None:
            return self._by_collection.setdefault(wanted.collection, {})
        return self._by_session.setdefault((wanted.collection, wanted.session), {})

    async def reached(self, revision: int) -> None:
        """Wait until every change up to `revision` has been told; at once if nobody subscribes.

        Raises:
            CompactedError: the store begins anew and will not come to that revision.
        """
        await self._passed(revision)
        for subscription in list(self._subscriptions):
            await subscription.told.wait()

    async def _passed(self, revision: int) -> None:
        """Wait until changes up to `revision` have come, though some may be held."""
        if self.cursor >= revision or not self._subscriptions:
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
        self.cursor = -1
        self._tell_waiting()

    def _nudge(self) -> None:
        # A poll that waits at the store knows neither new filters nor who waits for its cursor.
        if self._is_parked:
            self._is_parked = False
            self._spawn(self._release())

    async def _release(self) -> None:
        try:
            await self._ref.ask(StoreActor.release_poll, self._feed_id, self._polls)
        except UnavailableError:
            logger.debug("the poll could not be released; it ends by itself")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = create_detached_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
        return task

    async def _poll_forever(self) -> None:
        pause = _FIRST_PAUSE_S
        while self._subscriptions:
            try:
                await self._poll_once()
            except AidbError as error:
                # The store restarts, or the call was lost: the cursor makes asking again safe.
                logger.info("the feed is interrupted: %s", error)
                if not isinstance(error, UnavailableError):
                    self._refuse_waiting(error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            else:
                pause = _FIRST_PAUSE_S
        self._polling = None
        self.cursor = -1
        self._tell_waiting()

    def _refuse_waiting(self, error: AidbError) -> None:
        """End the subscriptions that have not begun: the store cannot serve them."""
        logger.error("the store cannot be followed: %s", error)
        for subscription in list(self._subscriptions):
            if not subscription.ready.done():
                subscription.end(error)
                self.unsubscribe(subscription)

    async def _poll_once(self) -> None:
        if self.cursor < 0:
            answer = await self._ask(())
            self._generation, self.cursor = answer.generation, answer.through
        # One that begins anew is told so, and may end or add others.
        while resting := [one for one in self._subscriptions if not one.is_active]:
            for subscription in resting:
                if subscription in self._subscriptions:
                    self._activate(subscription)
        # The cursor may just have begun where somebody waits for it.
        self._tell_waiting()
        if self._filters is None:
            self._filters = tuple({s.filter: None for s in self._subscriptions})
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
        self._polls += 1
        request = PollRequest(
            self._feed_id, self._generation, self.cursor, filters, wait_ms, self._polls
        )
        return wire.decode_changes(await self._ref.ask(StoreActor.poll, wire.encode(request)))

    def _activate(self, subscription: Subscription) -> None:
        subscription.begin(self.cursor)
        if subscription.snapshot is not None:
            subscription.loading = self._spawn(self._load(subscription))

    def _start_anew(self, answer: Changes) -> None:
        logger.warning(
            "changes were missed; every subscription starts anew",
            extra={"cursor": self.cursor, "oldest": answer.lost},
        )
        if answer.generation != self._generation:
            waiting, self._waiting = self._waiting, []
            for revision, reached in waiting:
                if not reached.done():
                    reached.set_exception(
                        CompactedError(
                            f"The store began anew and will not come to revision {revision}.",
                            oldest=0,
                        )
                    )
        self._generation, self.cursor = answer.generation, -1
        for subscription in list(self._subscriptions):
            if not subscription.is_active:
                continue
            subscription.is_active = False
            if subscription.loading is not None:
                subscription.loading.cancel()
            if subscription.snapshot is not None:
                subscription.held = []
                subscription.told.clear()

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
            # One that heard before it may have ended this one.
            if subscription in self._subscriptions:
                subscription.hear(told)

    def _tell_waiting(self) -> None:
        still: list[tuple[int, asyncio.Future[None]]] = []
        for revision, waiting in self._waiting:
            if revision > self.cursor and self._subscriptions:
                still.append((revision, waiting))
            elif not waiting.done():
                waiting.set_result(None)
        self._waiting = still

    async def _load(self, subscription: Subscription) -> None:
        wanted = subscription.snapshot
        assert wanted is not None
        pause = _FIRST_PAUSE_S
        while True:
            try:
                rows, end = await self._read_rows(wanted)
                break
            except UnavailableError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            except AidbError as error:
                logger.exception("the rows of %s cannot be read", wanted.collection)
                subscription.end(error)
                self.unsubscribe(subscription)
                return
        await self._passed(end)
        held = subscription.held
        assert held is not None
        later = [change for change in held if change.revision > end]
        _fold(rows, wanted, (change for change in held if change.revision <= end))
        subscription.held = None
        subscription.loading = None
        subscription.hear_rows(list(rows.values()), end)
        if not subscription.ready.done():
            subscription.ready.set_result(None)
        if later and subscription in self._subscriptions:
            subscription.hear(later)
        subscription.told.set()

    async def _read_rows(self, wanted: Filter) -> tuple[dict[tuple[str, str], FoundRow], int]:
        """Return the rows of a filter, page by page, and a revision that none of them is after."""
        rows: dict[tuple[str, str], FoundRow] = {}
        request = ReadRequest(wanted)
        while True:
            raw = await self._ref.ask(StoreActor.read, wire.encode(request))
            page = wire.decode_page(raw)
            rows.update(((row.session, row.key), row) for row in page.rows)
            if not page.more:
                end = max([page.latest, *(row.revision for row in rows.values())])
                return rows, end
            last = page.rows[-1]
            request = ReadRequest(wanted, after=(last.session, last.key))


def _fold(rows: dict[tuple[str, str], FoundRow], wanted: Filter, changes: Iterable[Change]) -> None:
    """Bring rows, of which each page was read at another moment, to one revision."""
    test = make_row_test(wanted)
    for change in changes:
        place = (change.session, change.key)
        known = rows.get(place)
        if known is not None and known.revision >= change.revision:
            continue
        value = change.value
        bucket = bucket_of(change.session) if wanted.buckets else 0
        if (
            value is not None
            and wanted.covers(change.session, bucket)
            and (test is None or test.accepts(value))
        ):
            rows[place] = FoundRow(change.session, change.key, change.revision, value)
        else:
            rows.pop(place, None)
