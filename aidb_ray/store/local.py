"""What this process sees of a partition: rows that the feed brought, under its own writes.

A write shows at once and is not synced. When it is durable it counts as a synced row of its
revision; where the feed has come that far, the feed's word counts. When it is refused it goes, and
with it the writes that were made on top of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import msgspec

from aidb_ray.store.changes import Change, Filter, FoundRow, StoredRow, bucket_of
from aidb_ray.store.client import StoreClient
from aidb_ray.store.matching import make_row_test
from aidb_ray.store.subscription import Subscription

logger = logging.getLogger(__name__)

MAX_OWN_ROWS = 10_000
MAX_OWN_BYTES = 16 << 20
"""Durable own writes kept, for collections that this process does not follow."""

Place: TypeAlias = tuple[str, str]
"""(session, key)"""

Where: TypeAlias = tuple[str, str, str]
"""(session, collection, key)"""


class RowEvent(NamedTuple):
    """A row as this process sees it now; `row` is None when it is gone."""

    session: str
    key: str
    row: StoredRow | None
    is_synced: bool


class Write(msgspec.Struct, gc=False, eq=False):
    """One outstanding write of one row; `value` is None for a delete, `owner` its transaction.

    What a write refers to refers back only until it is settled, and all are: the collector need
    not look.
    """

    where: Where
    value: bytes | None
    owner: object


OnEvents: TypeAlias = Callable[[Sequence[RowEvent]], None]


class LocalWrites:
    """The own writes of this process to one partition, and the views that show them.

    Attributes:
        unsent: Transactions whose task has not had its first turn. Tasks get it in the order in
            which they were made, so a write that is sent at once would overtake them.
    """

    def __init__(self) -> None:
        self.unsent = 0
        # Of each row in order, the newest last. No write refers to another: a chain of a million
        # could be neither walked for each that ends nor freed, which recurses in C.
        self._outstanding: dict[Where, dict[Write, None]] = {}
        self._durable: OrderedDict[Where, tuple[int, bytes | None]] = OrderedDict()
        self._durable_bytes = 0
        self._views: dict[tuple[str, str | None], dict[View, None]] = {}

    def add(self, where: Where, value: bytes | None, owner: object) -> Write:
        """Show a write that is on its way."""
        write = Write(where, value, owner)
        self._outstanding.setdefault(where, {})[write] = None
        if self._views:
            self._tell(where)
        return write

    def succeed(self, write: Write, revision: int) -> None:
        """Count a write as durable since `revision`."""
        self._remove(write)
        self._keep(write.where, revision, write.value)
        if self._views:
            self._tell(write.where)

    def fail(self, write: Write) -> None:
        """Take back a write that was refused."""
        self._remove(write)
        self._tell(write.where)

    def delete_session(self, session: str, revision: int) -> None:
        """Count all rows of a session as gone since `revision`."""
        for where in [where for where in self._durable if where[0] == session]:
            self._keep(where, revision, None)
            self._tell(where)

    def hear(self, change: Change) -> None:
        """Take in what the feed says of a row that was written here lately."""
        where = (change.session, change.collection, change.key)
        if where in self._durable:
            self._keep(where, change.revision, change.value)

    def latest_owner(self, where: Where) -> object | None:
        """Return the transaction of the newest outstanding write of a row, if there is one."""
        write = self._newest(where)
        return None if write is None else write.owner

    def is_outstanding(self, where: Where) -> bool:
        """Whether a write of this row is still on its way."""
        return where in self._outstanding

    def look(
        self, where: Where, synced: StoredRow | None, told: int = 0
    ) -> tuple[StoredRow | None, bool]:
        """Return the row that shows, and whether it is synced.

        `synced` is the row as the feed has it at revision `told`: it knows better than durable
        writes up to there.
        """
        base = self.durable(where, synced, told)
        write = self._newest(where)
        if write is None:
            return base, True
        if write.value is None:
            return None, False
        return StoredRow(0 if base is None else base.revision, write.value), False

    def durable(self, where: Where, synced: StoredRow | None, told: int = 0) -> StoredRow | None:
        """Return the newest durable row that this process knows of. See `look`."""
        own = self._durable.get(where)
        if own is None:
            return synced
        revision, value = own
        if revision <= told or (synced is not None and synced.revision >= revision):
            return synced
        return None if value is None else StoredRow(revision, value)

    def knows(self, where: Where) -> bool:
        """Whether this process wrote the row lately, so that it can be read unsynced."""
        return where in self._outstanding or where in self._durable

    def attach(self, view: View) -> None:
        """Tell a view of own writes to its collection from now on."""
        place = (view.filter.collection, view.filter.session)
        self._views.setdefault(place, {})[view] = None

    def detach(self, view: View) -> None:
        """Stop telling a view."""
        place = (view.filter.collection, view.filter.session)
        views = self._views.get(place, {})
        views.pop(view, None)
        if not views:
            self._views.pop(place, None)

    def places(self, wanted: Filter) -> list[Place]:
        """Return (session, key) of own writes in the sessions that a filter covers."""
        is_split = wanted.buckets is not None
        return [
            (session, key)
            for session, collection, key in dict.fromkeys([*self._durable, *self._outstanding])
            if collection == wanted.collection
            and wanted.covers(session, bucket_of(session) if is_split else 0)
        ]

    def show(self, wanted: Filter, rows: Sequence[FoundRow], revision: int) -> list[RowEvent]:
        """Return the rows that a filter found at `revision` as they show under own writes."""
        synced = {(row.session, row.key): StoredRow(row.revision, row.value) for row in rows}
        return [
            RowEvent(
                *place,
                *self.look((place[0], wanted.collection, place[1]), synced.get(place), revision),
            )
            for place in dict.fromkeys([*synced, *self.places(wanted)])
        ]

    def _newest(self, where: Where) -> Write | None:
        writes = self._outstanding.get(where)
        return None if writes is None else next(reversed(writes))

    def _remove(self, write: Write) -> None:
        """Take a write out of those that are outstanding; a write is settled once."""
        writes = self._outstanding[write.where]
        del writes[write]
        if not writes:
            del self._outstanding[write.where]

    def _keep(self, where: Where, revision: int, value: bytes | None) -> None:
        durable = self._durable
        known = durable.get(where)
        if known is not None:
            if known[0] >= revision:
                return
            self._durable_bytes -= len(known[1] or b"")
            durable.move_to_end(where)
        durable[where] = (revision, value)
        self._durable_bytes += len(value or b"")
        while len(durable) > MAX_OWN_ROWS or self._durable_bytes > MAX_OWN_BYTES:
            _, (_, forgotten) = durable.popitem(last=False)
            self._durable_bytes -= len(forgotten or b"")

    def _tell(self, where: Where) -> None:
        session, collection, key = where
        for place in ((collection, session), (collection, None)):
            for view in tuple(self._views.get(place, ())):
                if view.covers(session):
                    view.own_write(session, key)


class View:
    """The rows of one filter as this process sees them, kept current.

    `on_events` hears every row at first, then each that changes. A row that no longer passes
    `filter.where` counts as gone; an own write is shown whether it passes or not, until the feed
    has come that far.
    """

    def __init__(
        self,
        client: StoreClient,
        writes: LocalWrites,
        wanted: Filter,
        on_events: OnEvents,
        *,
        shows_writes: bool = True,
    ) -> None:
        self.filter = wanted
        self.synced: dict[Place, StoredRow] = {}
        self.revision = 0
        self._client = client
        self._writes = writes
        self._on_events = on_events
        self._shows_writes = shows_writes
        self._test = make_row_test(wanted)
        self.subscription: Subscription = client.feed.subscribe(
            wanted, self._on_changes, self._on_rows
        )
        if shows_writes:
            writes.attach(self)

    def covers(self, session: str) -> bool:
        """Whether rows of this session may be in the view."""
        return self.filter.covers(session, bucket_of(session) if self.filter.buckets else 0)

    @property
    def is_ready(self) -> bool:
        """Whether the rows have arrived."""
        ready = self.subscription.ready
        return ready.done() and ready.exception() is None

    @property
    def has_failed(self) -> bool:
        """Whether the rows will not arrive; see `ready`."""
        ready = self.subscription.ready
        return ready.done() and ready.exception() is not None

    async def ready(self) -> None:
        """Wait until the rows have arrived.

        Raises:
            NotReadyError: the view was closed before.
            StorageError: the store cannot be opened.
        """
        await asyncio.shield(self.subscription.ready)

    @property
    def told(self) -> int:
        """Revision up to which the feed has told this view everything."""
        if not self.is_ready or self.subscription.held is not None:
            return self.revision
        return max(self.revision, self._client.feed.cursor)

    def look(self, session: str, key: str) -> tuple[StoredRow | None, bool]:
        """Return one row as it shows, and whether it is synced."""
        synced = self.synced.get((session, key))
        if not self._shows_writes:
            return synced, True
        return self._writes.look((session, self.filter.collection, key), synced, self.told)

    def durable(self, session: str, key: str) -> StoredRow | None:
        """Return the newest durable row that this process knows of."""
        synced = self.synced.get((session, key))
        return self._writes.durable((session, self.filter.collection, key), synced, self.told)

    def rows(self) -> list[tuple[Place, StoredRow]]:
        """Return the rows that show, in order of (session, key)."""
        places = set(self.synced)
        if self._shows_writes:
            places.update(self._writes.places(self.filter))
        found: list[tuple[Place, StoredRow]] = []
        for place in sorted(places):
            row, _ = self.look(*place)
            if row is not None:
                found.append((place, row))
        return found

    def close(self) -> None:
        """Stop following."""
        self._client.feed.unsubscribe(self.subscription)
        if self._shows_writes:
            self._writes.detach(self)

    def own_write(self, session: str, key: str) -> None:
        """Hear that this process wrote a row, or that the write was settled."""
        if self.is_ready:
            try:
                self._on_events([RowEvent(session, key, *self.look(session, key))])
            except Exception:
                # Who listens must not keep others from writing.
                logger.exception("a subscriber failed")

    def _on_rows(self, rows: Sequence[FoundRow], revision: int) -> None:
        before = self.synced
        self.synced = {(row.session, row.key): StoredRow(row.revision, row.value) for row in rows}
        self.revision = revision
        places = dict.fromkeys([*self.synced, *before])
        if self._shows_writes:
            places.update(dict.fromkeys(self._writes.places(self.filter)))
        self._on_events([RowEvent(*place, *self.look(*place)) for place in places])

    def _on_changes(self, changes: Sequence[Change]) -> None:
        changed: dict[Place, None] = {}
        test = self._test
        for change in changes:
            place = (change.session, change.key)
            if change.value is None or (test is not None and not test.accepts(change.value)):
                self.synced.pop(place, None)
            else:
                self.synced[place] = StoredRow(change.revision, change.value)
            if self._shows_writes:
                self._writes.hear(change)
            changed[place] = None
        self.revision = max(self.revision, changes[-1].revision)
        self._on_events([RowEvent(*place, *self.look(*place)) for place in changed])
