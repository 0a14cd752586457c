"""Tool calls a second through executors that claim them, from insert to the durable end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from aidb_ray import Collection, ToolCall, create_tool_execution_effect, eq, tool
from aidb_ray.store.collection import Change
from benchmarks.harness import Figure, Logged, Rig, counting_log, median_of, sync_figures


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many calls wait, and who runs them.

    Attributes:
        at_once: Calls that run at once in each executor.
    """

    calls: int = 4_000
    at_once: int = 64
    executors: int = 2
    runs: int = 3


FULL = Sizes()
QUICK = Sizes(calls=200, runs=1)


@tool
async def double(n: int) -> int:
    """Return at once, so that what is measured is everything else."""
    return 2 * n


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure one executor, then several that share the rows."""
    logged: list[Logged] = []
    rates: dict[int, float] = {}
    async with rig.open() as db:
        for executors in (1, sizes.executors):
            calls = db.session(f"aidb://effects/{executors}").tool_calls
            effect = create_tool_execution_effect(
                query=lambda q, calls=calls: q.from_(c=calls).where(
                    lambda c: eq(c.status, "pending")
                ),
                tools=[double],
                name=f"double-{executors}",
                max_running=sizes.at_once,
                processes=executors,
            )
            await effect.ready()

            async def run(number: int, calls: Collection[ToolCall] = calls) -> float:
                async with counting_log(db, logged):
                    return await rate(calls, sizes.calls, number)

            rates[executors] = await median_of(sizes.runs, run)
            await effect.aclose()
    words = f"{sizes.calls:,} waiting calls, {sizes.at_once} at once in each"
    return [
        Figure("calls_per_s", rates[1], f"{words}; one executor; median of {sizes.runs} runs"),
        Figure(
            f"calls_per_s_{sizes.executors}",
            rates[sizes.executors],
            f"the same rows shared by {sizes.executors} executors",
        ),
        *sync_figures(logged, "claims, results and their rows"),
    ]


async def rate(calls: Collection[ToolCall], count: int, run: int) -> float:
    """Return calls a second, from the insert of the first to the durable end of the last."""
    ended: set[str] = set()
    all_ended = asyncio.Event()

    def hear(changes: list[Change[ToolCall]]) -> None:
        ended.update(c.key for c in changes if c.after is not None and c.after.status.is_terminal)
        if len(ended) == count:
            all_ended.set()

    subscribed = calls.subscribe(hear, where=lambda c: eq(c.status, "completed"))
    await subscribed.ready()
    began = time.perf_counter()
    await calls.insert(
        [
            {"id": f"{run}-{n}", "generation_id": "g", "name": "double", "args": {"n": n}}
            for n in range(count)
        ]
    )
    await all_ended.wait()
    took = time.perf_counter() - began
    subscribed.close()
    return count / took
