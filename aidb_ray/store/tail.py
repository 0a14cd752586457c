"""The changes of one filter as an async iterator that can be resumed by revision."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from aidb_ray.errors import CompactedError, ConflictError, SlowConsumerError
from aidb_ray.store.changes import Change, Filter, FoundRow
from aidb_ray.store.client import StoreClient

MAX_REMEMBERED_ROWS = 10_000

Told: TypeAlias = tuple[Literal["insert", "update", "delete"], Change, bytes | None, bool]
"""(op, change, row before, whether no other change of its commit follows)"""

Read: TypeAlias = Callable[[bytes, str, str], bytes | None]
"""Makes of a stored row, collection and key the row to tell of, None if there is none."""


async def tail_changes(
    client: StoreClient, wanted: Filter, since: int | None, max_unread: int, read: Read
) -> AsyncGenerator[Told, None]:
    """Yield changes after `since`, or from now on, once and in order.

    The row before is None where it was last changed before this began, or long ago. Rows are told
    as `read` returns them, and changes to those of which it returns None are not told.
    """
    inbox = _Inbox(max_unread)
    before = _RowsBefore()
    subscription = client.feed.subscribe(wanted, inbox.hear, inbox.lose, snapshot=False)
    try:
        started = await asyncio.shield(subscription.started)
        generation = client.feed.generation
        newest = max(started, (await client.status()).revision)
        if since is not None and since > newest:
            raise ConflictError(
                f"Revision {since} does not exist yet; the newest is {newest}.",
                code="revision_in_future",
                revision=newest,
            )
        # The feed may be behind; what it has yet to tell is older than "from now on".
        inbox.last = newest if since is None else since
        if since is not None and since < started:
            missed = await client.changes_between(wanted, since, started)
            for change, is_last in _marked(missed, read):
                yield *before.advance(change), is_last
            inbox.last = started
        while True:
            while commit := inbox.take_commit():
                for change, is_last in _marked(commit, read):
                    yield *before.advance(change), is_last
                inbox.last = commit[0].revision
            inbox.check_lost(client.feed.cursor, is_anew=client.feed.generation != generation)
            inbox.arrived.clear()
            await inbox.arrived.wait()
    finally:
        client.feed.unsubscribe(subscription)


def _marked(changes: Sequence[Change], read: Read) -> Iterator[tuple[Change, bool]]:
    """Yield changes as they are told, with whether each is the last of its commit."""
    told = [change for each in changes if (change := _told(each, read)) is not None]
    for at, change in enumerate(told):
        is_end = at + 1 == len(told)
        yield change, is_end or told[at + 1].revision != change.revision


def _told(change: Change, read: Read) -> Change | None:
    if change.value is None:
        return change
    value = read(change.value, change.collection, change.key)
    if value is change.value or value is None:
        return None if value is None else change
    return msgspec.structs.replace(change, value=value)


class _Inbox:
    """Changes that were heard and not read yet; bounded.

    Attributes:
        last: Every change up to this revision was read, or is not wanted.
    """

    def __init__(self, max_unread: int) -> None:
        self.last = -1
        self.arrived = asyncio.Event()
        self._unread: deque[Change] = deque()
        self._max_unread = max_unread
        self._is_too_slow = False
        self._is_lost = False

    def hear(self, changes: Sequence[Change]) -> None:
        """Take whole commits from the feed."""
        if self._is_lost:
            # Behind a gap: told now, they would move `last` past what was missed.
            return
        # A commit may be larger than the bound; then it must be the only one.
        if self._unread and len(self._unread) + len(changes) > self._max_unread:
            self._is_too_slow = True
            self._unread.clear()
        if not self._is_too_slow:
            self._unread.extend(changes)
        self.arrived.set()

    def lose(self, _rows: Sequence[FoundRow], _revision: int) -> None:
        """Hear that changes were missed."""
        self._is_lost = True
        self.arrived.set()

    def take_commit(self) -> list[Change]:
        """Return the changes of the next commit, none if there is none."""
        if self._is_too_slow:
            raise SlowConsumerError(
                f"Over {self._max_unread} changes wait unread; go on with "
                f"changes(since={self.last}).",
                resume=self.last,
            )
        unread = self._unread
        while unread and unread[0].revision <= self.last:
            unread.popleft()
        taken: list[Change] = []
        while unread and (not taken or unread[0].revision == taken[0].revision):
            taken.append(unread.popleft())
        return taken

    def check_lost(self, oldest: int, *, is_anew: bool) -> None:
        """Raise if changes were missed, or, if the store began anew, will never come."""
        if self._is_lost and is_anew:
            raise CompactedError(
                f"The store began anew, and revision {self.last} is of rows that are gone; read "
                f"the rows anew.",
                oldest=max(0, oldest),
                code="cursor_mismatch",
            )
        if self._is_lost:
            raise CompactedError(
                f"Changes after revision {self.last} are not kept any more; read the rows anew.",
                oldest=max(0, oldest),
            )


class _RowsBefore:
    """What rows were before their next change, for as many as fit."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def advance(
        self, change: Change
    ) -> tuple[Literal["insert", "update", "delete"], Change, bytes | None]:
        place = (change.session, change.key)
        before = self._rows.pop(place, None)
        if change.value is None:
            return "delete", change, before
        self._rows[place] = change.value
        if len(self._rows) > MAX_REMEMBERED_ROWS:
            self._rows.popitem(last=False)
        return ("insert" if change.is_new else "update"), change, before
