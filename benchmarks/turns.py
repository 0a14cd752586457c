"""Durable turns a second: user row in, streamed reply, reply row out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from aidb_ray import ModelMessage, Tool, create_agent, durable_agent
from aidb_ray.testing import Player, ScriptedModel
from benchmarks.bare import Ask, bare_pipeline
from benchmarks.harness import (
    Figure,
    Logged,
    Rig,
    counting_log,
    gather_bounded,
    median_of,
    percentile,
    sync_figures,
)

AT_ONCE = 64
TOKENS = 20
QUESTION = "hello " * 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many conversations are held, and how many turns each has.

    Attributes:
        crowd: Conversations that are held all at once.
        crowd_turns: Turns of each of them.
        single_turns: Turns of a conversation that is held alone.
    """

    sessions: int = 200
    turns: int = 10
    crowd: int = 2_000
    crowd_turns: int = 3
    single_turns: int = 100
    runs: int = 3


FULL = Sizes()
QUICK = Sizes(sessions=64, turns=3, crowd_turns=1, single_turns=20, runs=1)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure turns of a model that answers at once, in 20 tokens."""
    return await measure_turns(rig, sizes, speak, "a reply of 20 tokens")


def speak(_conversation: Sequence[ModelMessage]) -> list[str]:
    """Answer anything in 20 tokens."""
    return ["ok "] * TOKENS


async def measure_turns(
    rig: Rig, sizes: Sizes, script: Player, turn: str, *, tools: Sequence[Tool] = ()
) -> list[Figure]:
    """Measure turns with a scripted model; `turn` says in words what one of them is."""
    logged: list[Logged] = []
    crowd_logged: list[Logged] = []
    async with rig.open() as db:
        agent = create_agent(
            durable_agent(
                name="answerer",
                adapter=ScriptedModel(script),
                tools=tools,
                stream_url="aidb://turns/*",
                max_running=sizes.crowd,
            )
        )
        await agent.ready()

        async def ask(session: str, text: str) -> str:
            return (await agent.send(text, session=session).reply()).content

        async def some(run: int) -> float:
            async with counting_log(db, logged):
                return await some_rate(ask, sizes, run)

        async def many(run: int) -> float:
            async with counting_log(db, crowd_logged):
                return await crowd_rate(ask, sizes, run)

        per_s = await median_of(sizes.runs, some)
        crowd_per_s = await median_of(sizes.runs, many)
        took: list[float] = []
        await converse(ask, "aidb://turns/single", sizes.single_turns, took)
        async with bare_pipeline(rig, ["ok "] * TOKENS) as bare:
            bare_per_s = await median_of(sizes.runs, lambda run: some_rate(bare, sizes, run))
            bare_crowd_per_s = await median_of(sizes.runs, lambda run: crowd_rate(bare, sizes, run))
    some_turns = f"{sizes.sessions} sessions, {AT_ONCE} at once, {sizes.turns} turns each"
    return [
        Figure("turns_per_s", per_s, f"{turn}; {some_turns}; median of {sizes.runs} runs"),
        Figure(
            "turns_per_s_2000",
            crowd_per_s,
            f"{sizes.crowd:,} sessions, all at once, {sizes.crowd_turns} turns each; median",
        ),
        Figure(
            "single_turn_p50_ms",
            percentile(took, 50) * 1_000,
            f"send() to reply(), {sizes.single_turns} turns of one session, nothing beside it",
        ),
        Figure(
            "bare_turns_per_s",
            bare_per_s,
            f"a pipeline on Ray that only batches and syncs, without tools; {AT_ONCE} at once",
        ),
        Figure("bare_turns_per_s_2000", bare_crowd_per_s, f"the same, {sizes.crowd:,} at once"),
        *sync_figures(logged, f"{AT_ONCE} at once"),
        Figure(
            "rows_per_sync_2000",
            Logged.total(crowd_logged).rows_per_sync,
            f"logged rows a sync, {sizes.crowd:,} at once",
        ),
    ]


async def some_rate(ask: Ask, sizes: Sizes, run: int) -> float:
    """Return turns a second of many conversations of which a few are held at once."""
    return await turn_rate(ask, f"some-{run}", sizes.sessions, sizes.turns, AT_ONCE)


async def crowd_rate(ask: Ask, sizes: Sizes, run: int) -> float:
    """Return turns a second of conversations that are all held at once."""
    return await turn_rate(ask, f"many-{run}", sizes.crowd, sizes.crowd_turns, sizes.crowd)


async def turn_rate(ask: Ask, name: str, sessions: int, turns: int, at_once: int) -> float:
    """Return turns a second of so many conversations, each one new."""
    began = time.perf_counter()
    await gather_bounded(
        (converse(ask, f"aidb://turns/{name}/{n}", turns, []) for n in range(sessions)), at_once
    )
    return sessions * turns / (time.perf_counter() - began)


async def converse(ask: Ask, session: str, turns: int, took: list[float]) -> None:
    """Ask so many questions, each after the last was answered; adds the seconds to `took`."""
    for _ in range(turns):
        began = time.perf_counter()
        reply = await ask(session, QUESTION)
        took.append(time.perf_counter() - began)
        if len(reply.split()) != TOKENS:
            raise AssertionError(f"the reply is not what the model said: {reply!r}")
