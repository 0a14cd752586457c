from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aidb_ray.agents.drain import DrainLifecycle, run_drain


class Steps:
    """Steps that end as the script says; the last one again and again."""

    def __init__(self, *ends: tuple[bool, int]) -> None:
        self.timeouts: list[int] = []
        self._ends = list(ends)

    async def __call__(self, timeout_ms: int) -> tuple[bool, int]:
        self.timeouts.append(timeout_ms)
        if len(self._ends) > 1:
            return self._ends.pop(0)
        if not self._ends[0][0]:
            # A step that finds no end takes the time it was given.
            await asyncio.sleep(timeout_ms / 1000)
        return self._ends[0]


async def test_it_ends_when_nothing_is_pending() -> None:
    steps = Steps((False, 2), (True, 1))
    result = await run_drain(
        steps, max_duration_ms=60_000, headroom_ms=0, lifecycle=None, build_checkpoint=None
    )
    assert (result.completed, result.cycles) == (True, 3)
    assert len(steps.timeouts) == 2


async def test_it_ends_before_the_deadline_by_the_headroom() -> None:
    steps = Steps((False, 1))
    result = await run_drain(
        steps, max_duration_ms=60, headroom_ms=30, lifecycle=None, build_checkpoint=None
    )
    assert not result.completed
    assert steps.timeouts[0] <= 30
    assert result.duration_ms >= 30


async def test_without_time_nothing_is_begun() -> None:
    steps = Steps((True, 1))
    result = await run_drain(
        steps, max_duration_ms=10, headroom_ms=10, lifecycle=None, build_checkpoint=None
    )
    assert (result.completed, result.cycles, steps.timeouts) == (False, 0, [])


async def test_steps_are_short_enough_for_the_heartbeat() -> None:
    steps = Steps((False, 0), (True, 0))
    beats: list[int] = []

    async def heartbeat() -> None:
        beats.append(1)

    await run_drain(
        steps,
        max_duration_ms=60_000,
        headroom_ms=0,
        lifecycle=DrainLifecycle(heartbeat=heartbeat),
        build_checkpoint=None,
        heartbeat_interval_ms=70,
    )
    assert steps.timeouts == [70, 70]
    assert len(beats) == 2


async def test_checkpoints_follow_cycles_that_ended() -> None:
    steps = Steps((False, 0), (False, 2), (True, 0))
    made: list[Sequence[object]] = []

    async def checkpoint(found: Sequence[object]) -> None:
        made.append(found)

    async def build() -> Sequence[object]:
        return ["cursor"]

    await run_drain(
        steps,
        max_duration_ms=60_000,
        headroom_ms=0,
        lifecycle=DrainLifecycle(checkpoint=checkpoint),
        build_checkpoint=build,
    )
    assert made == [["cursor"]]
