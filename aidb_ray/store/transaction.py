"""A transaction: writes of one session that become durable together, or not at all.

An insert knows its bytes at once. An update is a patch: if the row changed meanwhile the patch
is made again on the newer row and sent again, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeAlias

import msgspec

from aidb_ray.errors import ConfigError, ConflictError, KeyMissingError, UnavailableError
from aidb_ray.store.changes import Delete, Insert, Mutation, StoredRow, Update
from aidb_ray.store.client import StoreClient
from aidb_ray.store.local import LocalWrites, Write
from aidb_ray.store.rows import RowCodec
from aidb_ray.store.versions import unstamp

logger = logging.getLogger(__name__)

MAX_REMAKES = 5

Condition: TypeAlias = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class Patch:
    """Change these fields of the row as it is; `fields` None deletes it.

    Attributes:
        fields: Prepared by the codec: values of JSON by stored name.
        expected_revision: The row must be of this revision, 0 for any.
        when: The row must pass this.
    """

    collection: str
    key: str
    codec: RowCodec[Any]
    fields: Mapping[str, Any] | None
    expected_revision: int = 0
    when: Condition | None = None


Intent: TypeAlias = Insert | Patch
Known: TypeAlias = Callable[[Patch], StoredRow | None]
"""Gives the newest durable row that this process knows of, if it does."""


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
        is_done: Whether it has ended, however it did.
        is_part: Whether it is committed with others, so that it cannot be awaited by itself.
        explain: Awaited with the error when someone awaits a write that was refused; it may raise
            one that says more.
        goes_with_earlier: Whether it makes sense only on top of outstanding writes: see `follow`.
    """

    __slots__ = (
        "_client",
        "_dependents",
        "_earlier",
        "_error",
        "_intents",
        "_others",
        "_shown",
        "_waiter",
        "_was_told",
        "_writes",
        "explain",
        "goes_with_earlier",
        "is_done",
        "is_part",
        "is_queued",
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
        self.is_queued = False
        self.goes_with_earlier = False
        self.explain: Callable[[Exception], Awaitable[None]] | None = None
        self._earlier: Sequence[Transaction] = ()
        self._dependents: list[Transaction] = []
        self._intents = intents
        self._client = client
        self._writes = writes
        # One for each intent that shows; a None where one does not.
        self._shown: Sequence[Write | None] = ()
        # Most are awaited once.
        self._waiter: asyncio.Future[None] | None = None
        self._others: Sequence[asyncio.Future[None]] = ()
        self._error: Exception | None = None
        self._was_told = False

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
        if not self.is_done:
            yield from self._wait()
        self._was_told = True
        if self._error is not None:
            if self.explain is not None:
                yield from self.explain(self._error).__await__()
            # One error may have ended many writes: a trace of this one only.
            raise self._error.with_traceback(None)
        return self

    @property
    def failed(self) -> bool:
        """Whether it ended without becoming durable."""
        return self._error is not None

    async def finished(self) -> None:
        """Wait until it has ended, however it did."""
        if not self.is_done:
            await self._wait()

    def _wait(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._waiter is None:
            self._waiter = waiter
        else:
            self._others = [*self._others, waiter]
        return waiter

    def send_inserts(self, inserts: Sequence[Insert]) -> None:
        """Send a transaction that is these inserts only: no row need be looked at first."""
        # First, since it may refuse: then nothing has been shown.
        self._client.send(inserts, self.settle)
        session, add = self.session, self._writes.add
        self._shown = [
            add((session, insert.collection, insert.key), insert.value, self) for insert in inserts
        ]

    def follow(self, earlier: Sequence[Transaction], *, is_of_shown: bool) -> None:
        """Wait in `run` for outstanding writes of the same rows, on top of which this one is made.

        If one of them is refused this one goes with it, when it was made of the value that showed
        (`is_of_shown`) or of a row that was only about to be inserted; so a change of fields goes
        with the insert below, also when other changes lie between. Else it is made again on the
        row as it is.
        """
        self._earlier = earlier
        self.goes_with_earlier = is_of_shown or any(
            below.goes_with_earlier or any(isinstance(each, Insert) for each in below._intents)
            for below in earlier
        )
        if self.goes_with_earlier:
            for below in earlier:
                below._dependents.append(self)

    async def run(self, known: Known) -> None:
        """Make and send mutations until the store accepts them or refuses for good.

        The first try is made on rows as they are `known` here, later ones on the store's.

        Writes of one process to known rows are sent in the order in which they were made: up to
        the sending there is nothing to wait for.
        """
        if self.is_queued:
            self.is_queued = False
            self._writes.unsent -= 1
        try:
            for transaction in self._earlier:
                await transaction.finished()
            if self.is_done:
                return
            self.settle(await self._send_until_settled(known), None)
        except asyncio.CancelledError:
            self.settle(0, _closed())
            raise
        except Exception as error:  # noqa: BLE001  Whatever it is belongs to whoever awaits.
            self.settle(0, error)

    async def _send_until_settled(self, known: Known) -> int:
        for attempt in range(MAX_REMAKES + 1):
            # What is known here may be stale: a refusal counts only on the store's word.
            is_certain = attempt > 0
            try:
                return await self._try(None if is_certain else known)
            except ConflictError as error:
                is_decided = error.code != "conflict" or _is_expected(self._intents, error)
                if attempt == MAX_REMAKES or (is_decided and is_certain):
                    raise
            except KeyMissingError:
                if is_certain:
                    raise
        raise AssertionError

    async def _try(self, known: Known | None) -> int:
        mutations = await make_mutations(self._client, self.session, self._intents, known)
        revision = await self._client.commit(mutations)
        self._take_over(mutations)
        return revision

    def show(self, values: Sequence[bytes | EllipsisType | None]) -> None:
        """Show the rows in this process as they will be; `...` for one that is not known here."""
        session, add = self.session, self._writes.add
        self._shown = [
            None if value is ... else add((session, intent.collection, intent.key), value, self)
            for intent, value in zip(self._intents, values, strict=True)
        ]

    def _take_over(self, mutations: Sequence[Mutation]) -> None:
        """Show what was committed: a patch that was made again made another row than it showed."""
        for write, mutation in zip(self._shown, mutations, strict=False):
            if write is not None:
                write.value = mutation.value if isinstance(mutation, Insert | Update) else None

    def settle(self, revision: int, error: Exception | None) -> None:
        """Record how it ended, settle what is shown, and wake whoever awaits.

        What goes with a refused write goes in the same step: whoever is woken must not build on
        it anew, or one refusal would never end.
        """
        self._settle_one(revision, error)
        refused: list[Transaction] = [self] if error is not None else []
        while refused:
            for dependent in refused.pop()._take_dependents():
                if not dependent.is_done:
                    dependent._settle_one(0, dependent._rolled_back())
                    refused.append(dependent)
        self._dependents = []

    def _take_dependents(self) -> list[Transaction]:
        dependents, self._dependents = self._dependents, []
        return dependents

    def _rolled_back(self) -> ConflictError:
        intent = self._intents[0]
        where = (self.session, intent.collection, intent.key)
        row = self._writes.durable(where, None)
        return ConflictError(
            f"{intent.collection}[{intent.key!r}] was written on top of a write that was refused.",
            code="rolled_back",
            collection=intent.collection,
            key=intent.key,
            current=None if row is None else msgspec.json.decode(unstamp(row.value)[1]),
            revision=0 if row is None else row.revision,
        )

    def _settle_one(self, revision: int, error: Exception | None) -> None:
        self.is_done = True
        self.revision = revision
        self._error = error
        writes = self._writes
        for write in self._shown:
            if write is None:
                continue
            if error is None:
                writes.succeed(write, revision)
            else:
                writes.fail(write)
        self._shown = ()
        # Else each write of a row that is always being written would keep all before it.
        self._earlier = ()
        if self._waiter is not None:
            for waiter in (self._waiter, *self._others):
                if not waiter.done():
                    waiter.set_result(None)
            self._waiter, self._others = None, ()
        if error is not None:
            # Whoever awaits it hears of it in this turn of the loop.
            asyncio.get_running_loop().call_soon(self._log_unless_told)

    def _log_unless_told(self) -> None:
        if self._was_told:
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
    client: StoreClient, session: str, intents: Sequence[Intent], known: Known | None = None
) -> list[Mutation]:
    """Return the mutations that intents come to on the rows as they are now.

    Later intents see what earlier ones make of a row. The store is asked for rows that are not
    `known` here.

    Raises:
        KeyMissingError: a patch names a row that is not there.
        ConflictError: a patch's condition or expected revision does not hold.
        ContractError: the patched row does not fit its type.
    """
    ends: dict[tuple[str, str], StoredRow | None] = {}
    mutations: list[Mutation] = []
    for intent in intents:
        where = (intent.collection, intent.key)
        if isinstance(intent, Insert):
            mutations.append(intent)
            ends[where] = StoredRow(0, intent.value)
            continue
        row = ends[where] if where in ends else known(intent) if known else None
        if row is None and where not in ends:
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
        ends[where] = None if value is None else StoredRow(row.revision, value)
    return mutations


def _make(session: str, intent: Patch, row: StoredRow) -> Update | Delete:
    expected = intent.expected_revision
    if expected and row.revision != expected:
        raise _conflict(intent, row, f"is of revision {row.revision}, not {expected}", "conflict")
    codec, place = intent.codec, (intent.collection, intent.key)
    if intent.when is not None and not intent.when(codec.stored_fields(row.value, *place)):
        raise _conflict(intent, row, "does not meet the condition", "condition_failed")
    if intent.fields is None:
        return Delete(session, intent.collection, intent.key, row.revision)
    value = codec.patch(intent.collection, row.value, intent.fields, intent.key)
    return Update(session, intent.collection, intent.key, value, row.revision)


def _op(intent: Intent) -> str:
    match intent:
        case Insert():
            return "insert"
        case Patch(fields=None):
            return "delete"
        case Patch():
            return "update"


def _is_expected(intents: Sequence[Intent], error: ConflictError) -> bool:
    """Whether a write named the revision that the row had to be of."""
    return any(
        isinstance(intent, Patch)
        and intent.expected_revision != 0
        and (intent.collection, intent.key) == (error.collection, error.key)
        for intent in intents
    )


def _closed() -> UnavailableError:
    return UnavailableError(
        "The event loop closed before the write was known to be durable.",
        outcome="unknown",
        code="unknown_outcome",
    )


def _conflict(intent: Patch, row: StoredRow, words: str, code: str) -> ConflictError:
    return ConflictError(
        f"{intent.collection}[{intent.key!r}] {words}. Look at `current` and decide again.",
        code=code,
        collection=intent.collection,
        key=intent.key,
        current=_shown(intent.codec, row, intent),
        revision=row.revision,
    )


def _shown(codec: RowCodec[Any], row: StoredRow, intent: Patch) -> dict[str, Any]:
    current = codec.try_current(row.value, intent.collection, intent.key)
    return msgspec.json.decode(unstamp(row.value)[1] if current is None else current)
