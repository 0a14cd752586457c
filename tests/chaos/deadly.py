"""An agent whose work ends its process, started again until it lives; each life is a fork.

python -m tests.chaos.deadly tool DIRECTORY

Prints how often processes died and how the generation ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from aidb_ray import (
    Agent,
    Database,
    Generation,
    Retry,
    connect,
    create_agent,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.testing import CallTool, Reply, ScriptedModel

MAX_INTERRUPTIONS: Final = 4
MAX_LIVES: Final = 12
DEADLY: Final = ("build_messages", "adapter", "tool", "generate", "on_response")
_RETRY: Final = Retry(max_interruptions=MAX_INTERRUPTIONS)
_SOON_MS: Final = 30_000


def die(*_: object) -> None:
    """End the process without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


@tool
async def end() -> None:
    """End the process."""
    die()


def make_agent(deadly: str) -> Agent:
    """Return an agent that answers, but for `die`."""

    def play(messages: Sequence[ModelMessage]) -> Reply:
        if messages[-1].content == "die" and deadly == "adapter":
            die()
        return CallTool("end") if messages[-1].content == "die" else "Hello."

    def build(pending: list[Any], _: object) -> list[dict[str, str]]:
        if pending[0].content == "die" and deadly == "build_messages":
            die()
        return [{"role": "user", "content": pending[0].content}]

    return create_agent(
        durable_agent(
            name="echo",
            adapter=ScriptedModel(play),
            tools=[end],
            build_messages=build,
            retry=_RETRY,
        )
    )


def make_raw_agent(db: Database, deadly: str) -> Agent:
    """Return an agent over rows."""
    tasks = db.collection("tasks")
    return create_agent(
        name="echo",
        pending_work=lambda q: q.from_(t=tasks).where(lambda t: eq(t.done, False)),
        generate=die if deadly == "generate" else lambda _: "done",
        on_response=die if deadly == "on_response" else None,
        retry=_RETRY,
    )


async def converse(db: Database, deadly: str) -> Generation:
    """Have two messages answered, one of them by death; return how that ended."""
    agent = make_agent(deadly)
    handles = [
        agent.send(text, session=f"aidb://echo/{text}", message_id=text) for text in ("die", "hi")
    ]
    await asyncio.gather(*(h.reply(timeout_ms=_SOON_MS) for h in handles), return_exceptions=True)
    assert (await handles[1].reply(timeout_ms=_SOON_MS)).content == "Hello."
    [found] = await db.query(lambda q: q.from_(g=db.session("aidb://echo/die").generations))
    return found


async def work(db: Database, deadly: str) -> Generation:
    """Have a row answered; return how that ended."""
    agent = make_raw_agent(db, deadly)
    await agent.ready()
    if await db.collection("tasks").find("t") is None:
        await db.collection("tasks").insert({"id": "t", "done": False})
    assert (await agent.drain_until_idle(max_duration_ms=_SOON_MS)).completed
    [found] = await db.query(lambda q: q.from_(g=db.collection("generations", Generation)))
    return found


async def live(deadly: str, directory: Path) -> Generation:
    """Live once; returns only if nothing is deadly any more."""
    async with connect("local", data_dir=directory) as db:
        does = work if deadly in ("generate", "on_response") else converse
        return await does(db, deadly)


def main(deadly: str, directory: Path) -> None:
    """Live until a life ends by itself."""
    assert deadly in DEADLY, deadly
    for deaths in range(MAX_LIVES):
        child = os.fork()
        if child == 0:
            ended = asyncio.run(live(deadly, directory))
            report = {"deaths": deaths, "status": ended.status, "code": ended.error_code}
            print(json.dumps(report), flush=True)  # noqa: T201
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit(f"{MAX_LIVES} processes died")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
