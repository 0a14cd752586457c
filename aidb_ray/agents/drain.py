"""Draining: work until nothing is pending, within a deadline, telling someone how far it got."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

HEARTBEAT_INTERVAL_MS = 5_000


@dataclass(frozen=True, slots=True)
class DrainLifecycle:
    """What a drain calls, in the caller's process, while it works.

    Attributes:
        heartbeat: Called every few seconds.
        checkpoint: Called with what `build_checkpoint` returns, after cycles have ended.
    """

    heartbeat: Callable[[], Awaitable[Any]] | None = None
    checkpoint: Callable[[Sequence[Any]], Awaitable[Any]] | None = None


@dataclass(frozen=True, slots=True)
class DrainResult:
    """How a drain ended.

    Attributes:
        completed: Whether nothing is pending any more, see `Agent.has_pending_work`; else time
            was up. Generations may have failed.
        cycles: Generations that ended meanwhile, also those that failed or were cancelled.
        duration_ms: How long it took.
    """

    completed: bool
    cycles: int
    duration_ms: int


async def run_drain(
    step: Callable[[int], Awaitable[tuple[bool, int]]],
    *,
    max_duration_ms: int,
    headroom_ms: int,
    lifecycle: DrainLifecycle | None,
    build_checkpoint: Callable[[], Awaitable[Sequence[Any]]] | None,
    heartbeat_interval_ms: int = HEARTBEAT_INTERVAL_MS,
) -> DrainResult:
    """Call `step(timeout_ms)`, which says (is idle, cycles ended), until idle or time is up."""
    begun = time.monotonic()
    deadline = begun + max(max_duration_ms - headroom_ms, 0) / 1000
    lifecycle = lifecycle or DrainLifecycle()
    cycles = 0
    is_idle = False
    while not is_idle:
        left_ms = round((deadline - time.monotonic()) * 1000)
        if left_ms <= 0:
            break
        is_idle, ended = await step(min(left_ms, heartbeat_interval_ms))
        cycles += ended
        if lifecycle.heartbeat is not None:
            await lifecycle.heartbeat()
        if ended and lifecycle.checkpoint is not None and build_checkpoint is not None:
            await lifecycle.checkpoint(await build_checkpoint())
    return DrainResult(is_idle, cycles, round((time.monotonic() - begun) * 1000))
