"""Several processes that do the same at the same time, as replicas of a deployment do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from aidb_ray.runtime import ActorOptions, ActorRef, spawn

R = TypeVar("R")

PROCESSES = 4
TASKS = 4
SOON_MS = 120_000


class Starter:
    """One of the processes."""

    async def ready(self) -> int:
        """Return its id, once it is there."""
        return os.getpid()

    async def run(self, start: Callable[[int], Awaitable[Any]], numbers: list[int]) -> list[Any]:
        """Call `start` with each number, at once; raises the first error there is."""
        return await asyncio.gather(*(start(number) for number in numbers))


class Starters:
    """`PROCESSES` processes of `TASKS` tasks each."""

    def __init__(self, processes: list[ActorRef[Starter]]) -> None:
        self._processes = processes

    async def run(self, start: Callable[[int], Awaitable[R]]) -> list[R]:
        """Call `start(number)` in every task of every process at once; numbers count from 0."""
        found = await asyncio.gather(
            *(
                process.ask(Starter.run, start, [*range(at * TASKS, (at + 1) * TASKS)])
                for at, process in enumerate(self._processes)
            )
        )
        return [one for of_process in found for one in of_process]


@asynccontextmanager
async def starting() -> AsyncGenerator[Starters]:
    """Give processes that are ready to start."""
    options = ActorOptions(timeout_ms=SOON_MS, max_restarts=0)
    processes: list[ActorRef[Starter]] = [await spawn(Starter, options) for _ in range(PROCESSES)]
    try:
        pids = await asyncio.gather(*(process.ask(Starter.ready) for process in processes))
        assert len({os.getpid(), *pids}) == PROCESSES + 1
        yield Starters(processes)
    finally:
        await asyncio.gather(*(process.stop() for process in processes))
