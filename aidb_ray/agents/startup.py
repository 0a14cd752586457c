"""Finding, starting and replacing the shards of an agent, whoever else does so at the same time.

A name has one actor on a cluster, so of many that start the same agent one creates each shard and
the others find it. What one looked at may be replaced by the next moment; whoever ends an actor
therefore ends the one it looked at and no other of its name, and looks again at what came of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.shard import AGENT_ENDED, AgentActor, ShardStatus
from aidb_ray.database import Database
from aidb_ray.errors import ConfigError, UnavailableError
from aidb_ray.runtime import ActorOptions, ActorRef, LocalRef, check_sendable, find, spawn

logger = logging.getLogger(__name__)

OnChange: TypeAlias = Literal["replace", "attach", "error"]
Shards: TypeAlias = "list[ActorRef[AgentActor]]"

RETIRE_MS = 60_000
START_MS = 120_000
RESTART_MS = 30_000
"""How long a shard that does not answer may take to come back, before it is replaced."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


async def start_shards(
    database: Database, definition: AgentDefinition, on_change: OnChange
) -> Shards:
    """Return the shards of the agent once all are at work: what runs, or what `definition` says.

    Raises:
        ConfigError: `agent_exists`: it runs with another definition, and `on_change` is `"error"`;
            or `definition` cannot start, see `AgentActor.check`: then what runs goes on.
        UnavailableError: it did not come to work within 2 minutes.
        AidbError: a shard could not start.
    """
    async with _turn(database, definition.name):
        return await _Start(database, definition, on_change).run()


async def find_shards(database: Database, name: str) -> tuple[Shards, ShardStatus]:
    """Return the shards of an agent that runs already, and the status of the first.

    Raises:
        ConfigError: `agent_missing`.
        UnavailableError: it did not answer, or not all shards were there, within 2 minutes.
    """
    patience = _Patience(START_MS)
    while True:
        first = await _find(database, name, 0)
        status = None if first is None else await _status(first)
        if first is None or (status is None and database.is_local):
            raise ConfigError(
                f"No agent {name!r} runs in database {database.name!r}.", code="agent_missing"
            )
        if status is not None:
            shards = await _find_all(database, name, status.shards)
            if shards is not None:
                return shards, status
        await patience.pause(name)


class _Start:
    """One start of an agent."""

    def __init__(
        self, database: Database, definition: AgentDefinition, on_change: OnChange
    ) -> None:
        self._database = database
        self._definition = definition
        self._on_change = on_change
        self._fingerprint = definition.fingerprint()
        self._patience = _Patience(START_MS)
        self._silence = _Patience(RESTART_MS)

    async def run(self) -> Shards:
        """Look at what is there and do what is needed, until the agent is at work."""
        while True:
            shards = await self._step()
            if shards is not None:
                return shards
            await self._patience.pause(self._definition.name)

    async def _step(self) -> Shards | None:
        """Return the shards if they are at work; None if it is to be looked again."""
        database, definition = self._database, self._definition
        running = await self._find_some()
        if running:
            status = await _status(running[0])
            if status is None:
                if not self._is_given_up():
                    return None
                await self._end(running)
            elif status.fenced:
                # Another one took over and has gone: nobody works any more.
                await self._end(running)
            elif status.fingerprint != self._fingerprint:
                if self._on_change == "attach":
                    found = await _find_all(database, definition.name, status.shards)
                    return found if found is not None and await self._is_at_work(found) else None
                if self._on_change == "error":
                    raise ConfigError(
                        f"Agent {definition.name!r} runs with another definition. Create it with "
                        f"on_change='replace', or attach to it with db.agent({definition.name!r}).",
                        code="agent_exists",
                    )
                await self._check(running)
                await self._end(running)
        shards = [
            await _find_or_start(database, definition, index) for index in range(definition.shards)
        ]
        if database.is_local:
            database.local_shards[definition.name] = shards
        try:
            if not await self._is_at_work(shards):
                return None
        except ConfigError:
            # Shards that cannot work would be found, and attached to, by whoever tries again.
            await self._stop(shards)
            raise
        # Someone with another definition may have been faster; then that one is looked at.
        statuses = [await _status(ref) for ref in shards]
        is_mine = all(each and each.fingerprint == self._fingerprint for each in statuses)
        return shards if is_mine else None

    async def _check(self, running: Shards) -> None:
        """Raise if the definition could not start where these shards run, as far as they can tell.

        Raises:
            ConfigError: it cannot be sent, or its adapter misses something there.
        """
        definition = self._definition
        if not self._database.is_local:
            check_sendable(definition, f"The definition of agent {definition.name!r}")
        answers = await asyncio.gather(
            *(ref.ask(AgentActor.check, definition) for ref in running), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, ConfigError):
                raise answer
            if answer is not None:
                # It may run code that does not know the new definition, or have just been ended.
                logger.info("a shard cannot tell whether the next one could start: %s", answer)

    def _is_given_up(self) -> bool:
        """Whether a shard that does not answer is not waited for any longer."""
        # Ray starts its process anew; here nobody does.
        is_long = self._silence.is_over and self._on_change == "replace"
        return self._database.is_local or is_long

    async def _is_at_work(self, shards: Shards) -> bool:
        """Wait until the shards are at work; False if one of them was ended meanwhile."""
        left_ms = self._patience.left_ms
        try:
            await asyncio.gather(
                *(ref.with_timeout(left_ms).ask(AgentActor.ready) for ref in shards)
            )
        except UnavailableError as error:
            # If all of them still answer, they tell of the store.
            if error.code == AGENT_ENDED or None in [await _status(ref) for ref in shards]:
                return False
            raise
        return True

    async def _find_some(self) -> Shards:
        """Return the shards that are there, each as it is now: not one that takes its name."""
        found: Shards = []
        while True:
            ref = await _find(self._database, self._definition.name, len(found))
            if ref is None:
                return found
            found.append(ref.pinned())

    async def _end(self, running: Sequence[ActorRef[AgentActor]]) -> None:
        """Let rounds in flight finish, and end these shards."""
        await asyncio.gather(
            *(
                ref.with_timeout(RETIRE_MS + 10_000).ask(AgentActor.retire, RETIRE_MS)
                for ref in running
            ),
            return_exceptions=True,
        )
        await self._stop(running)

    async def _stop(self, shards: Sequence[ActorRef[AgentActor]]) -> None:
        await asyncio.gather(*(ref.with_timeout(RETIRE_MS).stop() for ref in shards))
        self._database.local_shards.pop(self._definition.name, None)


class _Patience:
    """How long something may still take, with pauses that grow."""

    def __init__(self, limit_ms: int) -> None:
        self._now = asyncio.get_running_loop().time
        self._ends_at = self._now() + limit_ms / 1000
        self._pause = _FIRST_PAUSE_S

    @property
    def left_ms(self) -> int:
        """How much time is left, 1 at least."""
        return max(1, round((self._ends_at - self._now()) * 1000))

    @property
    def is_over(self) -> bool:
        """Whether no time is left."""
        return self._now() >= self._ends_at

    async def pause(self, name: str) -> None:
        """Wait a little.

        Raises:
            UnavailableError: no time is left.
        """
        if self.is_over:
            raise UnavailableError(
                f"Agent {name!r} did not come to work within {START_MS} ms. Try again later.",
                outcome="not_applied",
            )
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)


@asynccontextmanager
async def _turn(database: Database, name: str) -> AsyncGenerator[None]:
    """Be the only one that starts an agent in this process; on Ray names see to that."""
    if not database.is_local:
        yield
        return
    async with database.local_turns.setdefault(name, asyncio.Lock()):
        yield


async def _status(ref: ActorRef[AgentActor]) -> ShardStatus | None:
    """Return how a shard is doing, None if it does not answer."""
    try:
        return await ref.ask(AgentActor.status)
    except UnavailableError as error:
        logger.info("a shard does not answer: %s", error)
        return None


async def _find(database: Database, name: str, index: int) -> ActorRef[AgentActor] | None:
    if database.is_local:
        shards: Shards = database.local_shards.get(name, [])
        return shards[index] if index < len(shards) else None
    return await find(AgentActor, _actor_name(database, name, index))


async def _find_all(database: Database, name: str, count: int) -> Shards | None:
    """Return all shards; None if one is not there: whoever starts them is not done yet."""
    found = [await _find(database, name, index) for index in range(count)]
    there = [ref for ref in found if ref is not None]
    return there if len(there) == count else None


async def _find_or_start(
    database: Database, definition: AgentDefinition, index: int
) -> ActorRef[AgentActor]:
    if database.is_local:
        found = await _find(database, definition.name, index)
        return found or LocalRef(AgentActor(database, definition, index))
    owned = database.cluster is not None and database.cluster.owned
    options = ActorOptions(
        name=_actor_name(database, definition.name, index),
        detached=not owned,
        **dict(definition.ray_options),
    )
    return await spawn(AgentActor, options, database, definition, index)


def _actor_name(database: Database, name: str, index: int) -> str:
    return f"aidb/{database.name}/agent/{name}/{index}"
