"""Taking rows, and keeping them while they are worked on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from aidb_ray.effects.claimed import ClaimedRow, rows_of
from aidb_ray.effects.definition import EffectDefinition
from aidb_ray.effects.outcomes import Standing
from aidb_ray.effects.statuses import StatusWrites
from aidb_ray.effects.work import RowWork
from aidb_ray.errors import AidbError, FencedError
from aidb_ray.store.changes import Claim, Held, Mutation, Release, Renew, StoredRow, Update

if TYPE_CHECKING:
    from aidb_ray.database import Database, Partition

logger = logging.getLogger(__name__)

Place: TypeAlias = tuple[str, str]
"""(session, key) of a row"""


class Claimer:
    """Claims rows of an effect for one executor."""

    def __init__(self, database: Database, definition: EffectDefinition, holder: str) -> None:
        self._database = database
        self._definition = definition
        self._holder = holder

    async def claim(self, place: Place, row: StoredRow, standing: Standing) -> ClaimedRow:
        """Claim a row, and say in the same commit that it is being worked on.

        Raises:
            ConflictError: somebody else has it, or it is not as we know it.
            KeyMissingError: it is gone.
        """
        definition = self._definition
        session, key = place
        name = definition.source.name
        mutations: list[Mutation] = []
        value, note = row.value, str(standing.status)
        attempt = standing.attempts + 1
        if definition.on_executing is None:
            rows = rows_of(self._database, definition, session)
            writes = StatusWrites(rows, definition.statuses)
            changes = writes.executing(attempt, is_in_doubt=standing.is_orphan)
            patch = rows.patch_of(key, changes)
            value = rows.patched(row.value, patch)
            note = definition.statuses[0]
            mutations.append(Update(session, name, key, value, row.revision))
        claim = Claim(
            session,
            name,
            key,
            definition.name,
            self._holder,
            definition.lease_ms,
            base=row.revision,
            attempts=standing.attempts,
            note=note,
        )
        client = self._database.site_of(session).client
        sent = client.commit([claim, *mutations])
        try:
            token = await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            if sent.exception() is None:
                await self._give_back(
                    place,
                    row,
                    sent.result(),
                    "orphan" if standing.is_orphan else "free",
                    is_changed=bool(mutations),
                )
            raise
        stored = StoredRow(token, value) if mutations else row
        return ClaimedRow(session, name, key, token, attempt, stored, note, standing.is_orphan)

    async def _give_back(
        self,
        place: Place,
        row: StoredRow,
        token: int,
        state: Literal["free", "orphan"],
        *,
        is_changed: bool,
    ) -> None:
        """Leave a row that was claimed as it was: nothing of it has run."""
        where = (place[0], self._definition.source.name, place[1])
        back: list[Mutation] = [Release(*where, token, state)]
        if is_changed:
            back.append(Update(*where, row.value, token))
        try:
            await self._database.site_of(place[0]).client.commit(back, held=Held(*where, token))
        except AidbError as error:
            logger.warning("a claim could not be given back, its lease will end: %s", error)


class LeaseRenewal:
    """Extends the lease of one executor while it works, and tells its works if it was lost."""

    def __init__(
        self, database: Database, holder: str, lease_ms: int, works: Mapping[Place, RowWork]
    ) -> None:
        self._database = database
        self._holder = holder
        self._lease_ms = lease_ms
        self._works = works
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._now = asyncio.Event()
        self._asking: dict[Partition, asyncio.Task[None]] = {}

    def hurry(self) -> None:
        """Renew soon. Threads may call it, too."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._now.set)

    def keep_up(self) -> None:
        """Renew from now on, three times a lease, until there is no work."""
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._renew())

    def die(self) -> None:
        """Renew no more, as of now."""
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """Renew no more."""
        tasks = [*self._asking.values(), *([] if self._task is None else [self._task])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _renew(self) -> None:
        while self._works:
            try:
                async with asyncio.timeout(self._lease_ms / 3000):
                    await self._now.wait()
            except TimeoutError:
                pass
            self._now.clear()
            for partition in {self._database.site_of(session) for session, _ in self._works}:
                # One that does not answer must not keep the others from being asked.
                if partition not in self._asking:
                    asking = self._loop.create_task(self._renew_in(partition))
                    self._asking[partition] = asking
                    asking.add_done_callback(lambda _, gone=partition: self._asking.pop(gone))

    async def _renew_in(self, partition: Partition) -> None:
        try:
            await partition.client.commit([Renew(self._holder, self._lease_ms)])
        except FencedError:
            logger.warning("the lease of %s has ended; what ran here is dropped", self._holder)
            for (session, _), work in list(self._works.items()):
                if self._database.site_of(session) is partition:
                    work.stop("fenced", "the claim was lost")
        except AidbError as error:
            logger.warning("a lease could not be renewed: %s", error)
