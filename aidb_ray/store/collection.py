"""Collections: what everyone above the store holds.

A `Collection` is a light handle; it pickles, and connects where it arrives. Rows written here
show at once; rows of others are followed from the first read on.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar, cast
from weakref import finalize

import msgspec

from aidb_ray.errors import (
    ConfigError,
    ContractError,
    CoroutineError,
    KeyExistsError,
    KeyMissingError,
    NotReadyError,
)
from aidb_ray.expressions import (
    Expression,
    Fields,
    Migrate,
    Ref,
    SourceRef,
    compile_predicate,
    equalities,
    predicate,
)
from aidb_ray.runtime import check_sendable
from aidb_ray.runtime.garbage import close_with
from aidb_ray.store.changes import CHUNKS, Filter, Insert, StoredRow
from aidb_ray.store.local import LocalWrites, RowEvent, View
from aidb_ray.store.rows import RowCodec, codec_of
from aidb_ray.store.transaction import Intent, Patch, Transaction

if TYPE_CHECKING:
    from aidb_ray.store.client import StoreClient

R = TypeVar("R")
Shown: TypeAlias = "bytes | EllipsisType | None"
"""A row as it will show: its bytes, None when it is gone, `...` when it is not known here."""

MAX_UNREAD_CHANGES = 10_000
MAX_DECODED = 10_000


class Site(Protocol):
    """One partition as this process reaches it."""

    @property
    def client(self) -> StoreClient:
        """Commits to and reads from the partition."""
        ...

    @property
    def writes(self) -> LocalWrites:
        """This process's own writes to it."""
        ...

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine that belongs to the connection: closing waits for it."""
        ...


class Sites(Protocol):
    """The partitions of a database as this process reaches them."""

    async def connected(self) -> None:
        """Connect if that has not happened in this process yet."""
        ...

    def site_of(self, session: str) -> Site:
        """Return the partition of a session."""
        ...

    def sites_of(self, session: str) -> Sequence[Site]:
        """Return the partitions that hold a session, or the sessions of a pattern."""
        ...


@dataclass(frozen=True, slots=True)
class Change(Generic[R]):
    """One row before and after a commit. See `Collection.changes`.

    Attributes:
        before: None for an insert, and when this process did not know the row.
        revision: Revision of the commit.
        is_last: Whether no other change of this commit follows: then the next one is what
            `changes(since=revision)` goes on with.
    """

    op: Literal["insert", "update", "delete"]
    key: str
    before: R | None
    after: R | None
    revision: int
    is_last: bool = True


@dataclass(slots=True)
class Group:
    """Writes that are collected, to be committed together.

    Attributes:
        takes_all: Whether a write to another session is an error; else it goes by itself.
        is_open: Whether writes may still join. Tasks that were started inside may outlive it.
    """

    session: str
    takes_all: bool = True
    is_open: bool = True
    intents: list[Intent] = field(default_factory=list[Intent])
    shown: dict[tuple[str, str], bytes | None] = field(
        default_factory=dict[tuple[str, str], bytes | None]
    )


current_group: ContextVar[Group | None] = ContextVar("aidb_transaction", default=None)


class Subscribed:
    """A running `Collection.subscribe`; `close` ends it."""

    def __init__(self, views: Sequence[View]) -> None:
        self._views = views

    async def ready(self) -> None:
        """Wait until the callback has heard the rows that are there."""
        for view in self._views:
            await view.ready()

    def close(self) -> None:
        """Call the callback no more."""
        for view in self._views:
            view.close()


class Collection(Generic[R]):
    """Rows of one type, found by key. A session ending in `*` reads across sessions.

    Reading methods that do not wait (`get`, `len`, `in`, `values`) see this process's copy, which
    is complete once `ready()` was awaited; rows written here are always seen. The copy ends with
    the last that holds the collection.

    Args:
        row_type: pydantic model, dataclass or TypedDict; None for plain dicts.
        key: Name of the field that identifies a row within session and collection.
        version: See `Database.collection`.
        migrate: See `Database.collection`.
    """

    def __init__(
        self,
        sites: Sites,
        name: str,
        row_type: type[R] | None,
        *,
        key: str = "id",
        session: str | None = None,
        version: int = 1,
        migrate: Migrate | None = None,
    ) -> None:
        self.name = name
        self.session = session
        self.key = key
        self.row_type = row_type
        self._sites = sites
        self._codec: RowCodec[R] = codec_of(row_type, key, version, migrate)
        self._views: list[View] = []
        self._closing: finalize[..., Any] | None = None
        self._decoded: dict[tuple[str, str], tuple[bytes, R]] = {}
        # Rows that are not stored as rows of this version are; None for those that cannot be read.
        self._currents: dict[tuple[str, str], tuple[bytes, bytes | None]] = {}

    def __repr__(self) -> str:
        where = f" of {self.session}" if self.session else ""
        return f"<Collection {self.name!r}{where}>"

    def __reduce__(self) -> tuple[Any, ...]:
        codec = self._codec
        if codec.migrate is not None:
            check_sendable(codec.migrate, f"`migrate` of {self!r}")
        schema = (self.row_type, self.key, self.session, codec.version, codec.migrate)
        return _restore, (self._sites, self.name, *schema)

    # Writing.

    def insert(self, rows: R | Mapping[str, Any] | Sequence[R | Mapping[str, Any]]) -> Transaction:
        """Add one row, or several together. Defaults are filled in before this returns.

        A mapping is held to the row type strictly: no value is converted, but that a time, an
        enum and the like may be given as JSON has them, and no field may be unknown. A type whose
        config speaks of `strict` or `extra` is taken at its word.

        Raises:
            ContractError: a row does not fit its type; nothing was written.
            KeyExistsError: this process knows a row with that key; (when awaited) the store does.
        """
        session, site = self._writable()
        group = self._group(session)
        many = cast("Sequence[R | Mapping[str, Any]]", rows if _is_many(rows) else (rows,))
        if not many:
            raise ContractError("There is no row to insert.", collection=self.name)
        inserts = tuple([self._new_row(session, site, row, group) for row in many])
        if len(inserts) > 1:
            keys = [insert.key for insert in inserts]
            if len(set(keys)) < len(keys):
                raise self._exists(next(key for key in keys if keys.count(key) > 1))
        transaction = Transaction(session, inserts, site.client, site.writes)
        if group is not None:
            self._join(group, transaction, inserts, [insert.value for insert in inserts])
            return transaction
        earlier = [
            owner
            for insert in inserts
            if isinstance(owner := self._owner(session, site, insert.key), Transaction)
        ]
        if earlier or site.writes.unsent:
            transaction.follow(earlier, is_of_shown=True)
            self._run(site, transaction, [insert.value for insert in inserts])
        else:
            transaction.send_inserts(inserts)
        return transaction

    def _new_row(
        self, session: str, site: Site, row: R | Mapping[str, Any], group: Group | None
    ) -> Insert:
        key, value = self._codec.encode(self.name, row)
        if self._shown(session, site, key, group) is not None:
            raise self._exists(key)
        return Insert(session, self.name, key, value)

    def _owner(self, session: str, site: Site, key: str) -> object | None:
        """Return the outstanding transaction that must be durable before a write of this row."""
        return site.writes.latest_owner((session, self.name, key))

    def _exists(self, key: str) -> KeyExistsError:
        return KeyExistsError(
            f"{self.name}[{key!r}] exists already. Update it, or insert another key.",
            collection=self.name,
            key=key,
        )

    def update(
        self,
        key: str,
        changes: Mapping[str, Any] | Callable[[Any], object],
        *,
        when: Callable[[Ref], Expression] | None = None,
        expected_revision: int = 0,
    ) -> Transaction:
        """Change fields of a row.

        The change is made again if the row changed meanwhile, on the newer row, up to 5 times.

        Args:
            key: Which row.
            changes: Values by Python name; or a function that changes a draft of the row, which
                runs once, here: only what it changed travels.
            when: Condition on the row, checked against the row that is replaced.
            expected_revision: The row must be as that revision left it.

        Raises:
            KeyMissingError, ContractError: here, if the row is known here; else when awaited. Also
                if the row as it is cannot be read; see `find`.
            ConflictError: (when awaited) `condition_failed`; `conflict` if the row is not of the
                expected revision, or changed at every try. `current` carries the row.
            CoroutineError: `changes` is a coroutine function, or returned something to await.
        """
        session, site = self._writable()
        group = self._group(session)
        shown = self._shown(session, site, key, group)
        if shown is None:
            self._must_be_possible(session, site, key, group)
        is_of_shown = callable(changes)
        if callable(changes):
            changes = self._run_draft(key, shown, changes)
        fields = self._codec.prepare(self.name, changes, key)
        test = None if when is None else self._condition(when)
        intent = Patch(self.name, key, self._codec, fields, expected_revision, test)
        value: Shown = ...
        if shown is not None:
            value = self._codec.patch(self.name, shown.value, fields, key)
        return self._write(site, session, intent, value, group, is_of_shown=is_of_shown)

    def delete(
        self,
        key: str,
        *,
        when: Callable[[Ref], Expression] | None = None,
        expected_revision: int = 0,
    ) -> Transaction:
        """Remove a row. See `update`."""
        session, site = self._writable()
        group = self._group(session)
        shown = self._shown(session, site, key, group)
        if shown is None:
            self._must_be_possible(session, site, key, group)
        test = None if when is None else self._condition(when)
        intent = Patch(self.name, key, self._codec, None, expected_revision, test)
        return self._write(site, session, intent, ... if shown is None else None, group)

    # Reading.

    async def ready(self) -> None:
        """Wait until this process has a complete copy, which is then kept current."""
        await self._sites.connected()
        for view in self._copy():
            await view.ready()

    def get(self, key: str) -> R | None:
        """Return a row or None.

        Raises:
            NotReadyError: the copy is not complete and the row was not written here.
            ContractError: the row cannot be read; see `find`.
        """
        session, site = self._readable()
        group = self._group(session, is_writing=False)
        if group is not None and (self.name, key) in group.shown:
            row = self._shown(session, site, key, group)
        elif self._is_ready():
            row, _ = self._views[0].look(session, key)
        elif site.writes.knows((session, self.name, key)):
            row, _ = site.writes.look((session, self.name, key), None)
        else:
            self._copy()
            raise self._not_ready()
        if row is None:
            return None
        if self._current((session, key), row.value) is None:
            self._codec.current(row.value, self.name, key)  # It says why.
        return self._decode((session, key), row)

    def __len__(self) -> int:
        return len(self._stored())

    def __bool__(self) -> bool:
        # A handle is not empty because its rows are not here.
        return True

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def values(self) -> list[R]:
        """Return all rows in order of (session, key).

        One that a newer version wrote, or that cannot be migrated, is left out and logged at ERROR.
        """
        return [self._decode(place, row) for place, row in self._stored()]

    def is_synced(self, key: str) -> bool:
        """Whether no write of this process to the row is outstanding."""
        session, site = self._readable()
        return not site.writes.is_outstanding((session, self.name, key))

    async def find(self, key: str) -> R | None:
        """Ask the store for one row; copies nothing.

        Raises:
            ContractError: the row cannot be read: `newer_schema`, a later version of the schema
                wrote it; `migration_failed`; `invalid_row`, another row type wrote it.
        """
        await self._sites.connected()
        session, site = self._readable()
        found = await site.client.find(session, self.name, key)
        return None if found is None else self._codec.decode(found.value, self.name, key)

    async def changes(self, since: int | None = None) -> AsyncIterator[Change[R]]:
        """Yield every change from now on, or after revision `since`, once and in order.

        One to a row that cannot be read (see `find`) is left out and logged at ERROR.

        Raises:
            CompactedError: `since` is older than what the store can still tell; or
                `cursor_mismatch`: a store without a disk was started anew meanwhile.
            ConflictError: `revision_in_future`: there is no such revision yet.
            ContractError: `invalid_cursor`: `since` is no number from 0.
            SlowConsumerError: over 10,000 changes wait unread; `resume` says where to go on.
        """
        from aidb_ray.store.tail import tail_changes

        if since is not None and (type(since) is not int or since < 0):
            raise ContractError(
                f"A revision is 0 or more, not {since!r}.", code="invalid_cursor", loc=("since",)
            )
        await self._sites.connected()
        site = self._sites.site_of(self._one_session())
        codec, name = self._codec, self.name
        told = tail_changes(
            site.client, self.filter(), since, MAX_UNREAD_CHANGES, codec.try_current
        )
        try:
            async for op, change, before, is_last in told:
                yield Change(
                    op,
                    change.key,
                    None if before is None else codec.decode_current(before, name, change.key),
                    None
                    if change.value is None
                    else codec.decode_current(change.value, name, change.key),
                    change.revision,
                    is_last,
                )
        finally:
            await told.aclose()

    def subscribe(
        self,
        callback: Callable[[list[Change[R]]], object],
        *,
        where: Callable[[Ref], Expression] | None = None,
        include_initial_state: bool = False,
    ) -> Subscribed:
        """Call `callback` with a list of changes whenever rows change here, own writes included.

        With `include_initial_state` the first call brings every row as an insert. What the
        callback raises is logged.
        """
        wanted = self.filter()
        test: Callable[[dict[str, Any]], object] | None = None
        if where is not None:
            node = predicate(where, self.fields)
            test = compile_predicate(node)
            if self._codec.migrate is None:
                allowed = tuple((n, tuple(v)) for n, v in sorted(equalities(node).items()))
                wanted = msgspec.structs.replace(wanted, where=allowed)
        views: list[View] = []
        for site in self._sites.sites_of(self._one_session()):
            is_silent = not include_initial_state
            listener = _Listener(self._codec, self.name, test, callback, is_silent=is_silent)
            views.append(View(site.client, site.writes, wanted, listener.hear))
        return Subscribed(views)

    # For the layers above.

    @property
    def fields(self) -> Fields | None:
        """The row type's fields as queries know them."""
        return self._codec.fields

    @property
    def sites(self) -> Sites:
        """The partitions of its database, as this process reaches them."""
        return self._sites

    def as_source(self) -> SourceRef[R]:
        """Return what a query keeps of this collection."""
        codec = self._codec
        return SourceRef(
            self.name,
            self.session,
            self.fields,
            self.row_type,
            self.key,
            codec.version,
            codec.migrate,
        )

    @property
    def site(self) -> Site:
        """The partition that holds the rows of its one session."""
        return self._sites.site_of(self._one_session())

    def in_session(self, session: str) -> Collection[R]:
        """Return the collection of that name in one session."""
        return Collection(
            self._sites,
            self.name,
            self.row_type,
            key=self.key,
            session=session,
            version=self._codec.version,
            migrate=self._codec.migrate,
        )

    def decode_row(self, value: bytes, key: str = "") -> R:
        """Return a stored row as its type."""
        return self._codec.decode(value, self.name, key)

    def fields_in(self, value: bytes, key: str = "") -> dict[str, Any]:
        """Return a stored row's fields by wire name, as rows of this version have them."""
        return msgspec.json.decode(self._codec.current(value, self.name, key))

    def patched(self, value: bytes, patch: Patch) -> bytes:
        """Return a stored row with a patch made."""
        return self._codec.patch(self.name, value, patch.fields or {}, patch.key)

    def patch_of(self, key: str, changes: Mapping[str, Any]) -> Patch:
        """Return the change of a row as an intent, for a commit that someone else makes."""
        return Patch(self.name, key, self._codec, self._codec.prepare(self.name, changes, key))

    def filter(self) -> Filter:
        """Return the filter that all rows of this collection pass."""
        session = self.session
        if session is not None and session.endswith("*"):
            return Filter(self.name, prefix=session[:-1])
        return Filter(self.name, session or "")

    # Inside.

    def _one_session(self) -> str:
        return "" if self.session is None else self.session

    def _writable(self) -> tuple[str, Site]:
        session = self._one_session()
        if session.endswith("*"):
            raise ConfigError(
                f"{self!r} reads across sessions; write through db.session(url) of one.",
                code="session_required",
            )
        if self.name == CHUNKS and self.row_type is not None and session:
            from aidb_ray.contracts import Chunk

            if self.row_type is Chunk:
                raise ConfigError("Chunks are written by stream_to_collection.", code="append_only")
        return session, self._sites.site_of(session)

    def _readable(self) -> tuple[str, Site]:
        session = self._one_session()
        if session.endswith("*"):
            raise ConfigError(
                f"A key names a row of one session; {self!r} has many. Use a query.",
                code="session_required",
            )
        return session, self._sites.site_of(session)

    def _copy(self) -> list[View]:
        if any(view.has_failed for view in self._views):
            # The store could not be read then, and may be back.
            for view in self._views:
                view.close()
            self._views.clear()
        if not self._views:
            wanted = self.filter()
            self._views += [
                View(site.client, site.writes, wanted, _ignore)
                for site in self._sites.sites_of(self._one_session())
            ]
            if self._closing is None:
                self._closing = close_with(self, self._views)
        return self._views

    def _is_ready(self) -> bool:
        return bool(self._views) and all(view.is_ready for view in self._views)

    def _not_ready(self) -> NotReadyError:
        return NotReadyError(f"The rows of {self!r} are not here yet: await ready() first.")

    def _stored(self) -> list[tuple[tuple[str, str], StoredRow]]:
        views = self._copy()
        if not self._is_ready():
            raise self._not_ready()
        found = [each for view in views for each in view.rows()]
        if len(views) > 1:
            found.sort(key=lambda each: each[0])
        return [each for each in found if self._current(each[0], each[1].value) is not None]

    def _current(self, place: tuple[str, str], stored: bytes) -> bytes | None:
        """Return a row as rows of this version are stored; None, and logged once, if that fails."""
        if self._codec.is_current(stored):
            return stored
        known = self._currents.get(place)
        if known is not None and known[0] is stored:
            return known[1]
        current = self._codec.try_current(stored, self.name, place[1])
        if len(self._currents) > MAX_DECODED:
            self._currents.clear()
        self._currents[place] = (stored, current)
        return current

    def _decode(self, place: tuple[str, str], row: StoredRow) -> R:
        known = self._decoded.get(place)
        if known is not None and known[0] is row.value:
            return known[1]
        current = self._current(place, row.value)
        assert current is not None, place
        decoded = self._codec.decode_current(current, self.name, place[1])
        if len(self._decoded) > MAX_DECODED:
            self._decoded.clear()
        self._decoded[place] = (row.value, decoded)
        return decoded

    def _shown(self, session: str, site: Site, key: str, group: Group | None) -> StoredRow | None:
        """Return a row as it shows here, None if it is gone or not known."""
        if group is not None and (self.name, key) in group.shown:
            value = group.shown[self.name, key]
            return None if value is None else StoredRow(0, value)
        if self._views and self._is_ready():
            return self._views[0].look(session, key)[0]
        return site.writes.look((session, self.name, key), None)[0]

    def _must_be_possible(self, session: str, site: Site, key: str, group: Group | None) -> None:
        """Raise if this process knows that the row, which does not show, is not there."""
        is_in_group = group is not None and (self.name, key) in group.shown
        if is_in_group or self._is_ready() or site.writes.knows((session, self.name, key)):
            raise KeyMissingError(
                f"{self.name}[{key!r}] does not exist. Insert it first.",
                collection=self.name,
                key=key,
            )

    def _run_draft(
        self, key: str, shown: StoredRow | None, fn: Callable[[Any], object]
    ) -> dict[str, Any]:
        if inspect.iscoroutinefunction(fn):
            raise CoroutineError("The function that changes a draft is a plain one, not async.")
        if shown is None:
            raise NotReadyError(
                f"{self.name}[{key!r}] is not here yet, so there is no draft to change. Await "
                f"ready() first, or give a mapping.",
            )
        draft = Draft(self._codec.fields_of(shown.value, self.name, key))
        result = fn(draft)
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise CoroutineError("The function that changes a draft is a plain one, not async.")
        return draft.changed()

    def _condition(self, when: Callable[[Ref], Expression]) -> Callable[[Mapping[str, Any]], bool]:
        test = compile_predicate(predicate(when, self.fields))
        return lambda fields: test(cast("dict[str, Any]", fields)) is True

    def _write(
        self,
        site: Site,
        session: str,
        intent: Patch,
        value: Shown,
        group: Group | None,
        *,
        is_of_shown: bool = False,
    ) -> Transaction:
        transaction = Transaction(session, [intent], site.client, site.writes)
        if group is not None:
            self._join(group, transaction, [intent], [value])
            return transaction
        owner = self._owner(session, site, intent.key)
        earlier = [owner] if isinstance(owner, Transaction) else []
        transaction.follow(earlier, is_of_shown=is_of_shown)
        self._run(site, transaction, [value])
        return transaction

    def _run(self, site: Site, transaction: Transaction, values: Sequence[Shown]) -> None:
        transaction.show(values)
        transaction.is_queued = True
        site.writes.unsent += 1
        site.spawn(transaction.run(self._known))

    def _join(
        self,
        group: Group,
        transaction: Transaction,
        intents: Sequence[Intent],
        values: Sequence[Shown],
    ) -> None:
        transaction.is_part = True
        group.intents += intents
        for intent, value in zip(intents, values, strict=True):
            if value is not ...:
                group.shown[self.name, intent.key] = value

    def _group(self, session: str, *, is_writing: bool = True) -> Group | None:
        """Return the group that a write to this session takes part in, if there is one."""
        group = current_group.get()
        if group is None or not group.is_open:
            return None
        if group.session == session:
            return group
        if not group.takes_all or not is_writing:
            return None
        raise ConfigError(
            f"A transaction of {group.session!r} cannot write to {session!r}: only writes of one "
            f"session commit together.",
            code="one_session",
        )

    def _known(self, intent: Patch) -> StoredRow | None:
        session = self._one_session()
        if self._is_ready():
            return self._views[0].durable(session, intent.key)
        site = self._sites.site_of(session)
        return site.writes.durable((session, intent.collection, intent.key), None)


class _Listener(Generic[R]):
    """Turns what a view sees into changes for a callback."""

    def __init__(
        self,
        codec: RowCodec[R],
        collection: str,
        test: Callable[[dict[str, Any]], object] | None,
        callback: Callable[[list[Change[R]]], object],
        *,
        is_silent: bool,
    ) -> None:
        self._codec = codec
        self._collection = collection
        self._test = test
        self._callback = callback
        self._is_silent = is_silent
        self._known: dict[tuple[str, str], StoredRow] = {}

    def hear(self, events: Sequence[RowEvent]) -> None:
        """Tell the callback what changed; the first events are the rows that are there."""
        is_silent, self._is_silent = self._is_silent, False
        told: list[Change[R]] = []
        for event in events:
            change = self._advance(event, is_silent=is_silent)
            if change is not None:
                told.append(change)
        if told:
            self._callback(told)

    def _advance(self, event: RowEvent, *, is_silent: bool) -> Change[R] | None:
        place = (event.session, event.key)
        row = event.row
        if row is not None:
            # One that cannot be read is as good as gone.
            value = self._codec.try_current(row.value, self._collection, event.key)
            row = None if value is None else StoredRow(row.revision, value)
        if row is not None and self._test is not None:
            row = row if self._test(msgspec.json.decode(row.value)) is True else None
        before = self._known.pop(place, None)
        if row is not None:
            self._known[place] = row
        if is_silent or (row is None and before is None):
            return None
        if row is not None and before is not None and row.value == before.value:
            return None
        return Change(
            "insert" if before is None else "delete" if row is None else "update",
            event.key,
            None if before is None else self._decode(event.key, before),
            None if row is None else self._decode(event.key, row),
            row.revision if row is not None else 0,
        )

    def _decode(self, key: str, row: StoredRow) -> R:
        return self._codec.decode_current(row.value, self._collection, key)


class Draft:
    """A copy of a row that a function may change; dicts and lists in it are copies, too."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_before", fields)
        object.__setattr__(self, "_fields", deepcopy(dict(fields)))

    def __getattr__(self, name: str) -> Any:
        fields: dict[str, Any] = object.__getattribute__(self, "_fields")
        if name not in fields:
            raise AttributeError(f"The row has no field {name!r}; it has {', '.join(fields)}.")
        return fields[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, name: str) -> Any:
        fields: dict[str, Any] = object.__getattribute__(self, "_fields")
        return fields[name]

    def __setitem__(self, name: str, value: Any) -> None:
        fields: dict[str, Any] = object.__getattribute__(self, "_fields")
        fields[name] = value

    def changed(self) -> dict[str, Any]:
        """Return the fields that differ from the row."""
        fields: dict[str, Any] = object.__getattribute__(self, "_fields")
        before: Mapping[str, Any] = object.__getattribute__(self, "_before")
        return {n: v for n, v in fields.items() if n not in before or before[n] != v}


def _is_many(rows: object) -> bool:
    return isinstance(rows, (list, tuple))


def _ignore(events: Sequence[RowEvent]) -> None:
    """A copy is looked at, not listened to."""


def _restore(
    sites: Sites,
    name: str,
    row_type: type[Any] | None,
    key: str,
    session: str | None,
    version: int,
    migrate: Migrate | None,
) -> Collection[Any]:
    return Collection(
        sites, name, row_type, key=key, session=session, version=version, migrate=migrate
    )
