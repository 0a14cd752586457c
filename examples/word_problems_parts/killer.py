"""Kills processes of the database while it works, and keeps count."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from aidb_ray import UnavailableError
from examples.word_problems_parts.witness import Witness

LOOK_EVERY_MS = 50
DEATH_TIMEOUT_MS = 5_000
WANTED_OF_EACH = 2


class Process(Protocol):
    """What the killer needs to know of a process; `Database.processes` returns such."""

    @property
    def kind(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def serving(self) -> bool: ...


def choose_victim(
    processes: Sequence[Process], killed: Sequence[str], rng: random.Random
) -> Process | None:
    """Return the process to kill next, None if none of the wanted kind is there now.

    Stores and agent shards at work take turns until each was hit twice; after that any process
    may be next. `killed` is what was hit so far: `store`, `shard at work` or `idle shard`.
    """
    by_name: dict[str, list[Process]] = {"store": [], "shard at work": []}
    for process in processes:
        by_name.setdefault(describe_victim(process), []).append(process)
    missing = [name for name in ("store", "shard at work") if killed.count(name) < WANTED_OF_EACH]
    if len(missing) == 2 and killed:
        missing.remove(killed[-1])
    candidates = by_name[rng.choice(missing)] if missing else list(processes)
    return rng.choice(candidates) if candidates else None


def describe_victim(process: Process) -> str:
    """Return what kind of kill this would be."""
    if process.kind == "store":
        return "store"
    return "shard at work" if process.running else "idle shard"


class Killer:
    """Sends SIGKILL to a random process, each time `every_s` after all serve again."""

    def __init__(
        self,
        list_processes: Callable[[], Awaitable[Sequence[Process]]],
        witness: Witness,
        every_s: float,
    ) -> None:
        self._list_processes = list_processes
        self._witness = witness
        self._every_s = every_s
        self._rng = random.Random()  # noqa: S311  Chance, not secrecy.
        self._killed: list[str] = []

    async def run(self) -> None:
        """Kill until cancelled."""
        while True:
            while not await self._serving():
                await _pause()
            await asyncio.sleep(self._every_s)
            while (victim := choose_victim(await self._serving(), self._killed, self._rng)) is None:
                await _pause()
            await self._kill(victim)

    async def _serving(self) -> Sequence[Process]:
        """Return all processes, or none while one of them does not serve."""
        try:
            processes = await self._list_processes()
        except UnavailableError:
            return ()
        serving = all(process.serving and _is_alive(process.pid) for process in processes)
        return processes if serving else ()

    async def _kill(self, victim: Process) -> None:
        name = describe_victim(victim)
        self._killed.append(name)
        from_ns = time.monotonic_ns()
        os.kill(victim.pid, signal.SIGKILL)
        deadline_ns = from_ns + DEATH_TIMEOUT_MS * 1_000_000
        # Nothing tells us but looking.
        while _is_alive(victim.pid) and time.monotonic_ns() < deadline_ns:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        self._witness.note(event="kill", victim=name, victim_pid=victim.pid, from_ns=from_ns)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _pause() -> None:
    await asyncio.sleep(LOOK_EVERY_MS / 1_000)
