"""The changes of one filter as an async iterator that can be resumed by revision."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Literal, TypeAlias

from aidb_ray.errors import CompactedError, ConflictError, SlowConsumerError
from aidb_ray.store.changes import Change, Filter, FoundRow
from aidb_ray.store.client import StoreClient

Told: TypeAlias = tuple[Literal["insert", "update", "delete"], str, bytes | None, bytes | None, int]
"""(op, key, before, after, revision)"""


async def tail_changes(
    client: StoreClient, wanted: Filter, since: int | None, max_unread: int
) -> AsyncIterator[Told]:
    """Yield changes after `since`, or from now on, once and in order.

    `before` is None where the row was last changed before this began.
    """
    inbox: deque[Change] = deque()
    arrived = asyncio.Event()
    lost = False

    def hear(changes: Sequence[Change]) -> None:
        inbox.extend(changes)
        arrived.set()

    def begin_again(_rows: Sequence[FoundRow], _revision: int) -> None:
        nonlocal lost
        lost = True
        arrived.set()

    subscription = client.feed.subscribe(wanted, hear, begin_again, snapshot=False)
    known: dict[tuple[str, str], bytes] = {}
    try:
        started = await asyncio.shield(subscription.started)
        if since is not None and since > started:
            latest = (await client.status()).revision
            if since > latest:
                raise ConflictError(
                    f"Revision {since} does not exist yet; the newest is {latest}.",
                    code="revision_in_future",
                    revision=latest,
                )
        if since is not None and since < started:
            for change in await client.changes_between(wanted, since, started):
                yield _told(change, known)
        last = since if since is not None else started
        while True:
            while inbox:
                if len(inbox) > max_unread:
                    raise SlowConsumerError(
                        f"{len(inbox)} changes wait unread; go on with changes(since={last}).",
                        resume=last,
                    )
                change = inbox.popleft()
                if change.revision <= (since or 0):
                    continue
                last = change.revision
                yield _told(change, known)
            if lost:
                raise CompactedError(
                    f"Changes after revision {last} are not kept any more; read the rows anew.",
                    oldest=max(0, client.feed.cursor),
                )
            arrived.clear()
            await arrived.wait()
    finally:
        client.feed.unsubscribe(subscription)


def _told(change: Change, known: dict[tuple[str, str], bytes]) -> Told:
    place = (change.session, change.key)
    before = known.pop(place, None)
    if change.value is not None:
        known[place] = change.value
        op = "insert" if before is None and change.is_new else "update"
        return op, change.key, before, change.value, change.revision
    return "delete", change.key, before, None, change.revision
