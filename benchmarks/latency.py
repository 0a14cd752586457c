"""Milliseconds from `insert()` here to a subscriber in another process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aidb_ray import AgentMessage, Collection
from aidb_ray.store.collection import Change, Subscribed
from benchmarks.harness import Figure, Logged, Rig, counting_log, percentile, sync_figures


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows are inserted, one after the other; the first ones only warm up."""

    rows: int = 2_000
    warm_up: int = 100


FULL = Sizes()
QUICK = Sizes(rows=200, warm_up=20)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure inserts and awaited actor calls in turn, so that both meet the same machine."""
    logged: list[Logged] = []
    heard: list[float] = []
    durable: list[float] = []
    calls: list[float] = []
    async with rig.open() as db:
        messages = db.session("aidb://latency/1").messages
        subscriber = await rig.spawn(Subscriber, messages)
        await subscriber.ask(Subscriber.follow)
        async with counting_log(db, logged):
            for _ in range(sizes.warm_up + sizes.rows):
                began = time.monotonic_ns()
                row = messages.insert({"role": "user", "actor_id": "me", "content": "hello"})
                await row
                durable.append((time.monotonic_ns() - began) / 1e6)
                key = row.mutations[0].key
                heard.append((await subscriber.ask(Subscriber.arrival_of, key) - began) / 1e6)
                began = time.monotonic_ns()
                await subscriber.ask(Subscriber.answer)
                calls.append((time.monotonic_ns() - began) / 1e6)
        await subscriber.stop()
    heard, durable, calls = (times[sizes.warm_up :] for times in (heard, durable, calls))
    call = percentile(calls, 50)
    return [
        Figure(
            "insert_to_subscriber_p50_ms",
            percentile(heard, 50),
            f"insert() here to the callback in another process, {sizes.rows:,} rows in turn",
        ),
        Figure("insert_to_subscriber_p99_ms", percentile(heard, 99), "of the same"),
        Figure("awaited_call_p50_ms", call, "a call of that process that does nothing, between"),
        Figure("awaited_calls", percentile(heard, 50) / call, "the first by the third"),
        Figure("insert_p50_ms", percentile(durable, 50), "insert() until it is durable"),
        *sync_figures(logged, "one row at a time"),
    ]


class Subscriber:
    """Notes when rows reach the process that it runs in."""

    def __init__(self, messages: Collection[AgentMessage]) -> None:
        self._messages = messages
        self._subscribed: Subscribed | None = None
        self._arrivals: dict[str, int] = {}
        self._news = asyncio.Event()

    async def follow(self) -> None:
        """Begin to follow the collection; rows that are there already arrive as well."""
        self._subscribed = self._messages.subscribe(self._hear, include_initial_state=True)

    async def arrival_of(self, key: str) -> int:
        """Return when a row arrived, by the clock that all processes of a machine share (ns)."""
        while key not in self._arrivals:
            self._news.clear()
            await self._news.wait()
        return self._arrivals.pop(key)

    async def answer(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Follow no more."""
        if self._subscribed is not None:
            self._subscribed.close()

    def _hear(self, changes: Sequence[Change[AgentMessage]]) -> None:
        now = time.monotonic_ns()
        for change in changes:
            self._arrivals.setdefault(change.key, now)
        self._news.set()
