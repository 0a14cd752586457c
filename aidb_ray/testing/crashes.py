"""Processes that die at named points, so that tests can look at what is left and what goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from aidb_ray import crash_points as points
from aidb_ray.agents.agent import Agent
from aidb_ray.database import Database
from aidb_ray.effects.effect import Effect
from aidb_ray.errors import ConfigError
from aidb_ray.runtime import ActorRef


def crash_points() -> dict[str, str]:
    """Return the names of the points at which a process can be made to die, and what they mean."""
    return dict(points.CRASH_POINTS)


class Crash:
    """A crash that is to happen."""

    def __init__(self, point: str, deaths: list[Awaitable[object]]) -> None:
        self._point = point
        self._deaths = [asyncio.ensure_future(death) for death in deaths]

    @property
    def has_happened(self) -> bool:
        """Whether it has."""
        return any(death.done() and not death.cancelled() for death in self._deaths)

    async def happened(self, *, within_ms: int = 30_000) -> None:
        """Wait until it has happened.

        Raises:
            AssertionError: the point was not reached in time.
        """
        await asyncio.wait(
            self._deaths, timeout=within_ms / 1000, return_when=asyncio.FIRST_COMPLETED
        )
        if not self.has_happened:
            raise AssertionError(f"{self._point!r} was not reached within {within_ms} ms.")

    async def aclose(self) -> None:
        """Expect it no longer."""
        for death in self._deaths:
            death.cancel()
        await asyncio.wait(self._deaths)


@asynccontextmanager
async def crash_at(
    point: str, *, of: Agent | Effect | Database | None = None, hit: int = 1
) -> AsyncGenerator[Crash]:
    """Let a process die when it reaches a point inside, once; see `crash_points` for the names.

    Of an agent, an effect or a database whose actors are processes of their own, the one that gets
    there first is killed by SIGKILL, and Ray starts another in its place, which is not armed. On
    `"local"` only the actor ends, as its process would: its tasks are cancelled where they are,
    calls get no answer, and nothing that runs in it writes any more, not even in a `finally`. What
    it had sent to a store may still be applied. Nobody starts it again: create the agent or the
    effect once more, and connect once more after a store has died.

    Leaving the context takes back what has not happened.

    Args:
        point: Its name.
        of: Whose processes; without, whatever gets there in this process. That is an actor of a
            `"local"` database, if one does; else this process itself.
        hit: The n-th time it is reached.

    Raises:
        ConfigError: `unknown_crash_point`; `no_process`: it is an effect with `placement="here"`.
    """
    if of is None:
        armed = points.arm(point, hit=hit)
        crash = Crash(point, [armed.died.wait()])
        try:
            yield crash
        finally:
            points.disarm(armed)
            await crash.aclose()
        return
    actors = await _actors_of(of)
    try:
        for actor in actors:
            await actor.arm(point, hit)
        crash = Crash(point, [actor.pinned().until_dead() for actor in actors])
        try:
            yield crash
        finally:
            await crash.aclose()
    finally:
        for actor in actors:
            await actor.disarm()


async def _actors_of(of: Agent | Effect | Database) -> list[ActorRef[Any]]:
    if isinstance(of, Database):
        return [partition.ref for partition in of.partitions]
    actors = await of.actors()
    if not actors:
        raise ConfigError(
            f"{of!r} runs in this process and has no other that could die; leave `of` out.",
            code="no_process",
        )
    return [*actors]
