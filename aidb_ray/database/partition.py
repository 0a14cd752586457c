"""The partitions of a database as one process reaches them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from aidb_ray.errors import AidbError
from aidb_ray.runtime import ActorRef
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import Retain
from aidb_ray.store.client import StoreClient
from aidb_ray.store.local import LocalWrites

logger = logging.getLogger(__name__)


class Partition:
    """One partition as this process reaches it.

    Attributes:
        retained: How long rows are kept by collection and session, as far as declared here.
    """

    def __init__(self, ref: ActorRef[StoreActor]) -> None:
        self.ref = ref
        self.client = StoreClient(ref)
        self.writes = LocalWrites()
        self.retained: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that belongs to the connection: closing waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Wait until every write made so far has its outcome; those made meanwhile may not."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.client.drain()

    async def aclose(self) -> None:
        """Wait for outstanding writes and refuse others, then end the feed."""
        await self.drain()
        await self.client.aclose()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def declare_retention(self, collection: str, session: str, retention_ms: int) -> None:
        """Have the store keep rows for so long, in the background, unless it was told before."""
        policy = (collection, session)
        if self.retained.get(policy) != retention_ms:
            self.retained[policy] = retention_ms
            self.spawn(self._declare(collection, session, retention_ms))

    async def _declare(self, collection: str, session: str, retention_ms: int) -> None:
        try:
            await self.client.commit([Retain(collection, session, retention_ms)])
        except AidbError as error:
            # Who asks for the collection again tries again.
            self.retained.pop((collection, session), None)
            logger.error(  # noqa: TRY400
                "rows of %r in %r are kept for ever: their retention could not be declared: %s",
                collection,
                session,
                error,
            )
