"""A transaction: writes of one session that become durable together, or not at all.

An insert knows its bytes at once. An update is a patch: if the row changed meanwhile the patch
is made again on the newer row and sent again, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from aidb_ray.errors import ConfigError, ConflictError, KeyMissingError
from aidb_ray.store.changes import Delete, Insert, Mutation, StoredRow, Update
from aidb_ray.store.client import StoreClient
from aidb_ray.store.local import LocalWrites, Write
from aidb_ray.store.rows import RowCodec

logger = logging.getLogger(__name__)

MAX_REMAKES = 5

Condition: TypeAlias = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class NewRow:
    """Insert these bytes."""

    collection: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Patch:
    """Change these fields of the row as it is; `fields` None deletes it.

    Attributes:
        expected_revision: The row must be of this revision, 0 for any.
        when: The row must pass this.
    """

    collection: str
    key: str
    codec: RowCodec[Any]
    fields: Mapping[str, Any] | None
    expected_revision: int = 0
    when: Condition | None = None


Intent: TypeAlias = NewRow | Patch


@dataclass(frozen=True, slots=True)
class MutationRecord:
    """What a transaction does to one row."""

    op: str
    collection: str
    key: str


class Transaction:
    """What a write returns: await it to know that the write is durable.

    The write shows in this process at once. If it is refused it is taken back and awaiting
    raises; if nobody awaits, the failure is logged at ERROR. Cancelling whoever awaits does not
    cancel the write.

    Attributes:
        revision: Revision of the commit, 0 until it is durable.
        is_part: Whether it is committed with others, so that it cannot be awaited by itself.
    """

    __slots__ = (
        "_client",
        "_error",
        "_intents",
        "_shown",
        "_waiters",
        "_was_awaited",
        "_writes",
        "is_done",
        "is_part",
        "revision",
        "session",
    )

    def __init__(
        self,
        session: str,
        intents: Sequence[Intent],
        client: StoreClient,
        writes: LocalWrites,
    ) -> None:
        self.session = session
        self.revision = 0
        self.is_done = False
        self.is_part = False
        self._intents = intents
        self._client = client
        self._writes = writes
        self._shown: list[tuple[Intent, Write]] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._error: BaseException | None = None
        self._was_awaited = False

    @property
    def mutations(self) -> list[MutationRecord]:
        """What the transaction does, row by row."""
        return [MutationRecord(_op(i), i.collection, i.key) for i in self._intents]

    def __await__(self) -> Generator[Any, None, Transaction]:
        if self.is_part:
            raise ConfigError(
                "This write is part of a transaction and durable only at its end; await that.",
                code="in_transaction",
            )
        self._was_awaited = True
        if not self.is_done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            yield from waiter
        if self._error is not None:
            raise self._error
        return self

    @property
    def failed(self) -> bool:
        """Whether it ended without becoming durable."""
        return self._error is not None

    async def finished(self) -> None:
        """Wait until it has ended, however it did."""
        if not self.is_done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def send_inserts(self) -> None:
        """Send a transaction that only inserts: no row need be looked at first."""
        mutations: list[Mutation] = []
        session = self.session
        for intent in self._intents:
            assert isinstance(intent, NewRow)
            mutations.append(Insert(session, intent.collection, intent.key, intent.value))
        # First, since it may refuse: then nothing has been shown.
        sent = self._client.commit(mutations)
        for intent in self._intents:
            assert isinstance(intent, NewRow)
            self.show(intent, intent.value)
        sent.add_done_callback(self._settle_sent)

    async def run(
        self, base: Callable[[Patch], StoredRow | None], earlier: Sequence[Transaction] = ()
    ) -> None:
        """Make and send mutations until the store accepts them or refuses for good.

        `base` gives the row that this process knows, if it does; else the store is asked.
        `earlier` are outstanding writes of the same rows: this one was made on top of them, so
        it waits for them and fails with them.
        """
        try:
            for transaction in earlier:
                await transaction.finished()
                if transaction.failed:
                    raise _rolled_back(self._intents[0])
            self.settle(await self._send_until_settled(base), None)
        except asyncio.CancelledError:
            self.settle(0, asyncio.CancelledError("the event loop closed before the write went"))
            raise
        except Exception as error:  # noqa: BLE001  Whatever it is belongs to whoever awaits.
            self.settle(0, error)

    async def _send_until_settled(self, base: Callable[[Patch], StoredRow | None]) -> int:
        for attempt in range(MAX_REMAKES + 1):
            # What this process knows may be stale; after the first refusal the store is asked.
            known = base if attempt == 0 else None
            mutations = await make_mutations(self._client, self.session, self._intents, known)
            try:
                return await self._client.commit(mutations)
            except ConflictError as error:
                if attempt == MAX_REMAKES or error.code != "conflict":
                    raise
            except KeyMissingError:
                if attempt:
                    raise
        raise AssertionError

    def show(self, intent: Intent, value: bytes | None) -> None:
        """Show one row in this process as it will be."""
        write = self._writes.add(self.session, intent.collection, intent.key, value, self)
        self._shown.append((intent, write))

    def _settle_sent(self, sent: asyncio.Future[int]) -> None:
        if sent.cancelled():
            self.settle(0, asyncio.CancelledError())
        else:
            error = sent.exception()
            self.settle(0 if error else sent.result(), error)

    def settle(self, revision: int, error: BaseException | None) -> None:
        """Record how it ended, settle what is shown, and wake whoever awaits."""
        self.is_done = True
        self.revision = revision
        self._error = error
        writes, session = self._writes, self.session
        for intent, write in self._shown:
            if error is None:
                writes.succeed(session, intent.collection, intent.key, write, revision)
            else:
                writes.fail(session, intent.collection, intent.key, write)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        if error is not None and not self._was_awaited:
            asyncio.get_running_loop().call_soon(self._log_unless_awaited)

    def _log_unless_awaited(self) -> None:
        if self._was_awaited:
            return
        for intent in self._intents:
            logger.error(
                "a write to %s[%r] of session %r failed and nobody awaited it: %s",
                intent.collection,
                intent.key,
                self.session,
                self._error,
            )


async def make_mutations(
    client: StoreClient,
    session: str,
    intents: Sequence[Intent],
    base: Callable[[Patch], StoredRow | None] | None = None,
) -> list[Mutation]:
    """Return the mutations that intents come to on the rows as they are now.

    Later intents see what earlier ones make of a row. `base` gives rows that are known here; the
    store is asked for others.

    Raises:
        KeyMissingError: a patch names a row that is not there.
        ConflictError: a patch's condition or expected revision does not hold.
        ContractError: the patched row does not fit its type.
    """
    known: dict[tuple[str, str], StoredRow | None] = {}
    mutations: list[Mutation] = []
    for intent in intents:
        where = (intent.collection, intent.key)
        if isinstance(intent, NewRow):
            mutations.append(Insert(session, *where, intent.value))
            known[where] = StoredRow(0, intent.value)
            continue
        row = known[where] if where in known else base(intent) if base else None
        if row is None and where not in known:
            found = await client.find(session, *where)
            row = None if found is None else StoredRow(found.revision, found.value)
        if row is None:
            raise KeyMissingError(
                f"{intent.collection}[{intent.key!r}] does not exist. Insert it first.",
                collection=intent.collection,
                key=intent.key,
            )
        mutation = _make(session, intent, row)
        mutations.append(mutation)
        value = mutation.value if isinstance(mutation, Update) else None
        known[where] = None if value is None else StoredRow(row.revision, value)
    return mutations


def _make(session: str, intent: Patch, row: StoredRow) -> Update | Delete:
    expected = intent.expected_revision
    if expected and row.revision != expected:
        raise _conflict(intent, row, f"is of revision {row.revision}, not {expected}")
    if intent.when is not None and not intent.when(msgspec.json.decode(row.value)):
        raise _conflict(intent, row, "does not meet the condition", "condition_failed")
    if intent.fields is None:
        return Delete(session, intent.collection, intent.key, row.revision)
    value = intent.codec.patch(intent.collection, row.value, intent.fields, intent.key)
    return Update(session, intent.collection, intent.key, value, row.revision)


def _op(intent: Intent) -> str:
    match intent:
        case NewRow():
            return "insert"
        case Patch(fields=None):
            return "delete"
        case Patch():
            return "update"


def _rolled_back(intent: Intent) -> ConflictError:
    return ConflictError(
        f"{intent.collection}[{intent.key!r}] was written on top of a write that was refused.",
        code="rolled_back",
        collection=intent.collection,
        key=intent.key,
    )


def _conflict(intent: Patch, row: StoredRow, words: str, code: str | None = None) -> ConflictError:
    return ConflictError(
        f"{intent.collection}[{intent.key!r}] {words}. Look at `current` and decide again.",
        code=code or "revision_mismatch",
        collection=intent.collection,
        key=intent.key,
        current=msgspec.json.decode(row.value),
        revision=row.revision,
    )
