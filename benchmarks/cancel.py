"""Milliseconds from `agent.cancel()` here until the model's server sees its socket closed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from aidb_ray import Agent, RunCancelledError, Tool, create_agent, durable_agent, openai_text
from aidb_ray.runtime import ActorRef
from benchmarks.harness import Figure, Rig, percentile
from benchmarks.model_server import ModelServer

REPLY_TIMEOUT_MS = 60_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many runs are cancelled, one after the other; the first ones only warm up."""

    cancels: int = 50
    warm_up: int = 5


FULL = Sizes()
QUICK = Sizes(cancels=10, warm_up=2)


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Cancel streams and await actor calls in turn, so that both meet the same machine."""
    closing: list[float] = []
    written: list[float] = []
    calls: list[float] = []
    async with rig.open():
        server = await rig.spawn(ModelServer)
        port = await server.ask(ModelServer.listen)
        agent = make_agent(port)
        await agent.ready()
        for number in range(sizes.warm_up + sizes.cancels):
            name = f"stream {number}"
            until_closed, until_written = await cancel_one(agent, server, name)
            closing.append(until_closed)
            written.append(until_written)
            began = time.monotonic_ns()
            await server.ask(ModelServer.answer)
            calls.append((time.monotonic_ns() - began) / 1e6)
        await server.stop()
    closing, written, calls = (times[sizes.warm_up :] for times in (closing, written, calls))
    close, call = percentile(closing, 50), percentile(calls, 50)
    return [
        Figure(
            "cancel_to_close_p50_ms",
            close,
            f"cancel() here to the closed socket in the server's process, {sizes.cancels} in turn",
        ),
        Figure("cancel_to_close_p90_ms", percentile(closing, 90), "of the same"),
        Figure("awaited_call_p50_ms", call, "a call of that process that does nothing, between"),
        Figure("awaited_calls", close / call, "the first by the third; it should be 3 at most"),
        Figure("cancel_written_p50_ms", percentile(written, 50), "cancel() until it is durable"),
    ]


def make_agent(port: int, tools: Sequence[Tool] = ()) -> Agent:
    """Return an agent whose model is the server at that port."""
    url = f"http://127.0.0.1:{port}/v1"
    adapter = openai_text("endless", api="chat", base_url=url)
    return create_agent(durable_agent(name="talker", adapter=adapter, tools=tools))


async def cancel_one(agent: Agent, server: ActorRef[ModelServer], name: str) -> tuple[float, float]:
    """Begin a stream and cancel it; return how long it took to be closed, and to be written."""
    session = f"aidb://talker/{name.replace(' ', '-')}"
    asked = agent.send(name, session=session)
    await server.ask(ModelServer.begun, name)
    began = time.monotonic_ns()
    await agent.cancel(session=session)
    written = time.monotonic_ns()
    closed = await server.ask(ModelServer.closed_at, name)
    try:
        await asked.reply(timeout_ms=REPLY_TIMEOUT_MS)
    except RunCancelledError:
        return (closed - began) / 1e6, (written - began) / 1e6
    raise AssertionError(f"{name!r} was answered although it was cancelled")
