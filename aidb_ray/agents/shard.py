"""One shard of an agent: an actor that runs the sessions of its buckets as coroutines.

It claims its buckets under a new epoch when it starts, so an earlier process that still runs is
refused by the store. It watches its pending rows and runs one generation per session at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

from aidb_ray import crash_points
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.partition import PartitionWork, SuspectTurn
from aidb_ray.database import Database, set_current_database
from aidb_ray.errors import AidbError, UnavailableError
from aidb_ray.models.base import check_here
from aidb_ray.store.changes import ClaimBuckets, Runner
from aidb_ray.store.claims import shard_ranges

logger = logging.getLogger(__name__)

AGENT_ENDED = "agent_ended"
"""Code of the error that a shard answers with once it was retired or stopped."""


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """How a shard is doing.

    Attributes:
        pending: Rows that wait, those being answered included; not those whose generation ended.
        running: Sessions at work.
        cycles: Generations that ended since the process began.
        fenced: Whether another runner took over.
        stream_url: The session or pattern that the agent follows, `""` for rows without one.
        shards: How many shards the agent has.
        is_raw: Whether it answers rows of the user's own, and not messages.
        reaches: Names of the agents that it delegates to, and they in turn, as far as known.
    """

    agent: str
    shard: int
    pid: int
    fingerprint: str
    epoch: int
    pending: int
    running: int
    cycles: int
    fenced: bool = False
    stream_url: str = ""
    shards: int = 1
    is_raw: bool = False
    reaches: frozenset[str] = frozenset()


class AgentActor:
    """Runs one shard of an agent. `__init__` only stores; `start` claims and begins."""

    def __init__(self, database: Database, definition: AgentDefinition, shard: int) -> None:
        self._database = database
        self._definition = definition
        self._shard_index = shard
        self._low, self._high = shard_ranges(definition.shards)[shard]
        self._works: list[PartitionWork] = []
        # One for all partitions: what ends the process ends the work of each.
        self._suspects = SuspectTurn()
        self._starting: asyncio.Task[None] | None = None
        self._is_ended = False

    async def start(self) -> None:
        """Claim the buckets, read what is pending, and begin.

        Raises:
            ConfigError: the adapter misses something in this process; nothing was claimed.
            AidbError: the store cannot be reached or refused.
        """
        if self._starting is None:
            set_current_database(self._database)
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except AidbError:
            # The next call tries again: the store may be back by then.
            if self._starting is starting:
                self._starting = None
            raise

    async def _start(self) -> None:
        definition = self._definition
        if definition.adapter is not None:
            check_here(definition.adapter)
        works = self._works
        try:
            for partition in self._database.sites_of(definition.stream_url):
                epoch = await partition.client.commit(
                    [ClaimBuckets(definition.name, self._low, self._high)]
                )
                buckets = (self._low, self._high)
                runner = Runner(definition.name, epoch)
                works.append(
                    PartitionWork(
                        self._database, partition, definition, buckets, runner, self._suspects
                    )
                )
            if crash_points.armed:
                await crash_points.reach("agent.claimed")
            for work in works:
                await work.start()
        except AidbError:
            while works:
                await works.pop().aclose()
            raise

    def _ended(self) -> UnavailableError:
        return UnavailableError(
            f"This process of agent {self._definition.name!r} was ended. Look for the next one.",
            outcome="not_applied",
            code=AGENT_ENDED,
        )

    async def ready(self) -> int:
        """Return the process id once the shard is at work.

        Raises:
            UnavailableError: `agent_ended`: it was retired or stopped.
            AidbError: the store cannot be reached or refused.
        """
        if not self._is_ended:
            try:
                await self.start()
            except asyncio.CancelledError:
                # Either the caller's, or that of a start that was given up.
                if not self._is_ended:
                    raise
        if self._is_ended:
            raise self._ended()
        return os.getpid()

    async def check(self, definition: AgentDefinition) -> None:
        """Say whether a definition that shall replace this one could start in such a process.

        Of a process with other `ray_options`, nothing can be told here.

        Raises:
            ConfigError: its adapter misses something, such as its key (`missing_api_key`).
        """
        is_alike = dict(definition.ray_options) == dict(self._definition.ray_options)
        if definition.adapter is not None and is_alike:
            check_here(definition.adapter)

    async def status(self) -> ShardStatus:
        """Return how the shard is doing."""
        return ShardStatus(
            agent=self._definition.name,
            shard=self._shard_index,
            pid=os.getpid(),
            fingerprint=self._definition.fingerprint(),
            epoch=max((work.shard.runner.epoch for work in self._works), default=0),
            pending=sum(len(work.queue) for work in self._works),
            running=sum(work.queue.running_count for work in self._works),
            cycles=sum(work.cycles for work in self._works),
            fenced=any(work.is_fenced for work in self._works),
            stream_url=self._definition.stream_url,
            shards=self._definition.shards,
            is_raw=self._definition.is_raw,
            reaches=self._definition.reaches,
        )

    async def run_cycle(self, session: str | None) -> bool:
        """Run one generation, or wait for one that runs already; False if nothing is pending."""
        await self.start()
        for work in self._works:
            await work.catch_up()
            if await work.run_one(session):
                return True
        return False

    async def drain(self, session: str | None, timeout_ms: int) -> tuple[bool, int]:
        """Work until nothing is pending or time is up: (whether it is idle, cycles ended)."""
        await self.start()
        before = sum(work.cycles for work in self._works)
        is_idle = True
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                for work in self._works:
                    await work.catch_up()
                    await work.drain(session)
        except TimeoutError:
            is_idle = False
        return is_idle, sum(work.cycles for work in self._works) - before

    async def has_pending(self, session: str) -> bool:
        """Whether rows of a session, or of a group of rows, wait or are being answered."""
        await self.start()
        for work in self._works:
            await work.catch_up()
            if work.has_pending(session):
                return True
        return False

    async def abort_drained(self) -> None:
        """Stop what a drain began, if the agent does not work by itself; rows stay pending."""
        if not self._definition.autostart:
            for work in self._works:
                await work.interrupt()

    async def retire(self, timeout_ms: int) -> None:
        """Begin nothing new, wait for what runs, and end."""
        self._is_ended = True
        for work in self._works:
            work.is_retired = True
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                for work in self._works:
                    await work.settle()
        except TimeoutError:
            logger.warning("generations still run at replacement; the new runner goes on with them")
        await self.stop()

    def die(self) -> None:
        """Stop everything where it is, as the end of its process does."""
        self._is_ended = True
        if self._starting is not None:
            self._starting.cancel()
        for work in self._works:
            work.die()

    async def stop(self) -> None:
        """Stop what runs where it is, and end. Rows stay pending; a later runner goes on."""
        self._is_ended = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        for work in self._works:
            await work.aclose()
