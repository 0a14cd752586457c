"""What this process sees of a partition: rows that the feed brought, under its own writes.

A write shows at once and is not synced; when it is durable it counts as a synced row of its
revision until the feed brings that revision or a later one; when it is refused it goes, and with
it the writes that were made on top of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from aidb_ray.store.changes import Change, Filter, FoundRow, StoredRow, bucket_of
from aidb_ray.store.client import StoreClient
from aidb_ray.store.subscription import Subscription

_decode = msgspec.json.Decoder(dict[str, Any]).decode

MAX_OWN_ROWS = 10_000
"""Durable own writes kept for collections that this process does not follow."""

Place: TypeAlias = tuple[str, str]
"""(session, key)"""


class RowEvent(NamedTuple):
    """A row as this process sees it now; `row` is None when it is gone."""

    session: str
    key: str
    row: StoredRow | None
    is_synced: bool


class Write:
    """One outstanding write of one row; `value` is None for a delete, `owner` its transaction."""

    __slots__ = ("owner", "value")

    def __init__(self, value: bytes | None, owner: object) -> None:
        self.value = value
        self.owner = owner


class _Own:
    """This process's writes of one row: outstanding ones, oldest first, and the newest durable."""

    __slots__ = ("durable", "outstanding")

    def __init__(self) -> None:
        self.outstanding: list[Write] = []
        self.durable: tuple[int, bytes | None] | None = None


OnEvents: TypeAlias = Callable[[Sequence[RowEvent]], None]


class LocalWrites:
    """The own writes of this process to one partition, and the views that show them."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str], _Own] = {}
        self._durable: dict[tuple[str, str, str], None] = {}
        self._views: dict[str, list[View]] = {}

    def add(
        self, session: str, collection: str, key: str, value: bytes | None, owner: object
    ) -> Write:
        """Show a write that is on its way."""
        where = (session, collection, key)
        own = self._rows.get(where)
        if own is None:
            own = self._rows[where] = _Own()
        write = Write(value, owner)
        own.outstanding.append(write)
        self._tell(where)
        return write

    def succeed(self, session: str, collection: str, key: str, write: Write, revision: int) -> None:
        """Count a write as durable since `revision`."""
        where = (session, collection, key)
        own = self._rows[where]
        own.outstanding.remove(write)
        if own.durable is None or own.durable[0] < revision:
            own.durable = (revision, write.value)
            self._durable.pop(where, None)
            self._durable[where] = None
            if len(self._durable) > MAX_OWN_ROWS:
                self._forget(next(iter(self._durable)))
        self._tell(where)

    def fail(self, session: str, collection: str, key: str, write: Write) -> None:
        """Take back a write that was refused."""
        where = (session, collection, key)
        own = self._rows[where]
        own.outstanding.remove(write)
        if not own.outstanding and own.durable is None:
            del self._rows[where]
        self._tell(where)

    def latest_owner(self, session: str, collection: str, key: str) -> object | None:
        """Return the transaction of the newest outstanding write of a row, if there is one."""
        own = self._rows.get((session, collection, key))
        return own.outstanding[-1].owner if own is not None and own.outstanding else None

    def is_outstanding(self, session: str, collection: str, key: str) -> bool:
        """Whether a write of this row is still on its way."""
        own = self._rows.get((session, collection, key))
        return own is not None and bool(own.outstanding)

    def look(
        self, session: str, collection: str, key: str, synced: StoredRow | None
    ) -> tuple[StoredRow | None, bool]:
        """Return the row that shows, given the one the feed brought, and whether it is synced."""
        own = self._rows.get((session, collection, key))
        if own is None:
            return synced, True
        if own.outstanding:
            value = own.outstanding[-1].value
            base = max(synced.revision if synced else 0, own.durable[0] if own.durable else 0)
            return (None if value is None else StoredRow(base, value)), False
        return _newer(own, synced), True

    def durable(
        self, session: str, collection: str, key: str, synced: StoredRow | None
    ) -> StoredRow | None:
        """Return the newest durable row that this process knows of."""
        own = self._rows.get((session, collection, key))
        return synced if own is None else _newer(own, synced)

    def knows(self, session: str, collection: str, key: str) -> bool:
        """Whether this process wrote the row lately, so that it can be read unsynced."""
        return (session, collection, key) in self._rows

    def keys(self, session: str, collection: str) -> list[str]:
        """Return keys of rows of one collection that this process wrote lately."""
        return [k for s, c, k in self._rows if s == session and c == collection]

    def settle(self, session: str, collection: str, key: str, revision: int) -> None:
        """Forget a durable write that the feed has caught up with."""
        where = (session, collection, key)
        own = self._rows.get(where)
        if own is not None and own.durable is not None and own.durable[0] <= revision:
            self._forget(where)

    def attach(self, view: View) -> None:
        """Tell a view of own writes to its collection from now on."""
        self._views.setdefault(view.filter.collection, []).append(view)

    def detach(self, view: View) -> None:
        """Stop telling a view."""
        self._views[view.filter.collection].remove(view)

    def of_view(self, view: View) -> list[tuple[str, str]]:
        """Return (session, key) of own writes that a view covers."""
        collection = view.filter.collection
        return [(s, k) for s, c, k in self._rows if c == collection and view.covers(s)]

    def _forget(self, where: tuple[str, str, str]) -> None:
        self._durable.pop(where, None)
        own = self._rows.get(where)
        if own is not None:
            own.durable = None
            if not own.outstanding:
                del self._rows[where]

    def _tell(self, where: tuple[str, str, str]) -> None:
        session, collection, key = where
        for view in self._views.get(collection, ()):
            if view.covers(session):
                view.own_write(session, key)


def _newer(own: _Own, synced: StoredRow | None) -> StoredRow | None:
    if own.durable is None:
        return synced
    revision, value = own.durable
    if synced is not None and synced.revision >= revision:
        return synced
    return None if value is None else StoredRow(revision, value)


class View:
    """The rows of one filter as this process sees them, kept current.

    `on_events` hears every row at first, then each that changes. A row that no longer passes
    `filter.where` counts as gone; own writes are shown whether they pass or not.
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
        self._client = client
        self._writes = writes
        self._on_events = on_events
        self._shows_writes = shows_writes
        self.revision = 0
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
        return ready.done() and not ready.cancelled()

    async def ready(self) -> None:
        """Wait until the rows have arrived."""
        ready = self.subscription.ready
        if not ready.done():
            await asyncio.shield(ready)

    def look(self, session: str, key: str) -> tuple[StoredRow | None, bool]:
        """Return one row as it shows, and whether it is synced."""
        synced = self.synced.get((session, key))
        if not self._shows_writes:
            return synced, True
        return self._writes.look(session, self.filter.collection, key, synced)

    def close(self) -> None:
        """Stop following."""
        self._client.feed.unsubscribe(self.subscription)
        if self._shows_writes:
            self._writes.detach(self)

    def own_write(self, session: str, key: str) -> None:
        """Hear that this process wrote a row, or that the write was settled."""
        if self.is_ready:
            self._on_events([RowEvent(session, key, *self.look(session, key))])

    def _on_rows(self, rows: Sequence[FoundRow], revision: int) -> None:
        gone = self.synced.keys() - {(row.session, row.key) for row in rows}
        self.synced = {(row.session, row.key): StoredRow(row.revision, row.value) for row in rows}
        self.revision = revision
        places = dict.fromkeys([*gone, *self.synced])
        if self._shows_writes:
            places.update(dict.fromkeys(self._writes.of_view(self)))
        self._on_events([RowEvent(*place, *self.look(*place)) for place in places])

    def _on_changes(self, changes: Sequence[Change]) -> None:
        collection = self.filter.collection
        changed: dict[Place, None] = {}
        accepts = self.filter.accepts if self.filter.where else None
        for change in changes:
            place = (change.session, change.key)
            if change.value is None or (accepts and not accepts(_decode(change.value))):
                self.synced.pop(place, None)
            else:
                self.synced[place] = StoredRow(change.revision, change.value)
            if self._shows_writes:
                self._writes.settle(change.session, collection, change.key, change.revision)
            changed[place] = None
        if changes:
            self.revision = changes[-1].revision
        self._on_events([RowEvent(*place, *self.look(*place)) for place in changed])
