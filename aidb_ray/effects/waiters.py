"""Waiting for rows to change, in the process that wrote them: one subscription for all who wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aidb_ray.errors import AidbError, KeyMissingError
from aidb_ray.store.changes import Change, Filter, FoundRow
from aidb_ray.store.client import StoreClient
from aidb_ray.store.subscription import Subscription

LINGER_S = 5.0
"""How long a subscription outlives the last who waited: the next one may come soon."""

Test = Callable[[bytes], bool]


class RowWaiters:
    """Who waits for rows of one collection of one session."""

    def __init__(self, client: StoreClient, session: str, collection: str) -> None:
        self._client = client
        self._session = session
        self._collection = collection
        self._waiting: dict[str, list[tuple[Test, asyncio.Future[bytes]]]] = {}
        self._subscription: Subscription | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._looking: set[asyncio.Task[None]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits, and nothing is listened to."""
        return self._subscription is None and not self._waiting

    async def until(self, key: str, test: Test, write: Callable[[], Any]) -> bytes:
        """Listen, call and await `write`, and return the row once it passes `test`.

        A change that comes while `write` is on its way is not missed. If `write` says that the row
        was there already, it returns True, and the row is looked up.

        Raises:
            KeyMissingError: the row was deleted.
        """
        found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        entry = (test, found)
        self._waiting.setdefault(key, []).append(entry)
        try:
            await self._listen()
            if await write():
                await self._look(key)
            return await found
        finally:
            entries = self._waiting[key]
            entries.remove(entry)
            if not entries:
                del self._waiting[key]
            self._rest()

    async def _listen(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._subscription is None:
            wanted = Filter(self._collection, self._session)
            self._subscription = self._client.feed.subscribe(
                wanted, self._hear, self._start_anew, snapshot=False
            )
        subscription = self._subscription
        try:
            await asyncio.shield(subscription.started)
        except AidbError:
            # The next one asks again.
            if self._subscription is subscription:
                self._subscription = None
            raise

    def _rest(self) -> None:
        if not self._waiting and self._lingering is None:
            loop = asyncio.get_running_loop()
            self._lingering = loop.call_later(LINGER_S, self._stop_listening)

    def _stop_listening(self) -> None:
        self._lingering = None
        if self._subscription is not None and not self._waiting:
            self._client.feed.unsubscribe(self._subscription)
            self._subscription = None

    def _hear(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key in self._waiting:
                self._tell(change.key, change.value)

    def _start_anew(self, _rows: Sequence[FoundRow], _revision: int) -> None:
        # Changes were missed: whoever waits must look into the store.
        for key in list(self._waiting):
            task = asyncio.get_running_loop().create_task(self._look_or_fail(key))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _look(self, key: str) -> None:
        found = await self._client.find(self._session, self._collection, key)
        if found is not None:
            self._tell(key, found.value)

    async def _look_or_fail(self, key: str) -> None:
        try:
            await self._look(key)
        except AidbError as error:
            for _, found in self._waiting.get(key, []):
                if not found.done():
                    found.set_exception(error)

    def _tell(self, key: str, value: bytes | None) -> None:
        for test, found in self._waiting.get(key, []):
            if found.done():
                continue
            if value is None:
                found.set_exception(
                    KeyMissingError(
                        f"{self._collection}[{key!r}] was deleted while somebody waited for it.",
                        collection=self._collection,
                        key=key,
                    )
                )
                continue
            try:
                passes = test(value)
            except Exception as error:  # noqa: BLE001  Of whoever waits with that test.
                found.set_exception(error)
                continue
            if passes:
                found.set_result(value)


def waiters_of(client: StoreClient, session: str, collection: str) -> RowWaiters:
    """Return who waits for rows of a collection, one for each client, session and collection."""
    of_client: dict[tuple[str, str], RowWaiters] = client.kept.setdefault(RowWaiters, {})
    place = (session, collection)
    found = of_client.get(place)
    if found is None:
        if len(of_client) > 1_000:
            # Nobody listens any more where nobody waits.
            for other in [each for each, waiters in of_client.items() if waiters.is_idle]:
                del of_client[other]
        found = of_client[place] = RowWaiters(client, session, collection)
    return found
