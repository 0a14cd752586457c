"""Effects on Ray: what only other processes can show."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Collection,
    Database,
    ToolCall,
    ToolContext,
    connect,
    create_tool_execution_effect,
    declare_tool,
    eq,
    make_durable_tools,
    tool,
)
from aidb_ray.effects.effect import Effect
from aidb_ray.query.builder import Query, QueryRoot
from tests.unit.test_effects import ended

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

URL = "aidb://split/1"
SOON_S = 60


class Nothing(BaseModel):
    pass


server_docs = declare_tool(name="server_docs", description="Look.", input_schema=Nothing)
page_text = declare_tool(name="page_text", description="Look.", input_schema=Nothing)


@tool
async def where() -> int:
    """Return the process."""
    return os.getpid()


@tool
async def die_once(ctx: ToolContext) -> int:
    """End the process the first time."""
    if ctx.attempt == 1:
        os._exit(3)
    return ctx.attempt


async def read_secret() -> dict[str, Any]:
    return {"secret": os.environ.get("DOCS_KEY"), "pid": os.getpid()}


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with connect(data_dir=tmp_path) as database:
        yield database


@pytest.fixture
def calls(db: Database) -> Collection[ToolCall]:
    return db.session(URL).tool_calls


def start(calls: Collection[ToolCall], **options: Any) -> Effect:
    def find_pending(q: QueryRoot) -> Query[Any]:
        return q.from_(tc=calls).where(lambda tc: eq(tc.status, "pending"))

    return create_tool_execution_effect(query=find_pending, **options)


def pending(key: str, name: str) -> dict[str, Any]:
    return {"id": key, "generation_id": "g", "name": name, "args": {}}


async def test_an_executor_is_a_process_of_its_own_found_by_its_name(
    calls: Collection[ToolCall],
) -> None:
    first = start(calls, tools=[where])
    again = start(calls, tools=[where])
    await calls.insert(pending("a", "where"))
    row = await ended(calls, "a")
    [one], [other] = await first.status(), await again.status()

    assert row.result == one.pid == other.pid != os.getpid()
    changed = start(calls, tools=[where], version="2")
    [new] = await changed.status()
    assert new.pid != one.pid
    await changed.aclose()


async def test_a_tool_that_ends_its_process_is_run_again_by_the_next(
    calls: Collection[ToolCall],
) -> None:
    async with start(calls, tools=[die_once], lease_ms=60_000):
        await calls.insert(pending("a", "die_once"))
        async with asyncio.timeout(SOON_S):
            row = await ended(calls, "a")

    # Long before the lease ends: whoever has the actor's name knows that its predecessor is dead.
    assert (row.status, row.result, row.in_doubt) == ("completed", 2, True)


async def test_tools_run_where_their_credentials_are(
    db: Database, calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's tools there, the page's tools here: two processes with different keys."""
    monkeypatch.setenv("DOCS_KEY", "of the page")
    docs, page = make_durable_tools([server_docs, page_text], calls)
    there = start(
        calls,
        tools=[server_docs],
        implementations={"server_docs": read_secret},
        ray_options={"env": {"DOCS_KEY": "of the server"}},
    )
    here = start(
        calls, tools=[page_text], implementations={"page_text": read_secret}, placement="here"
    )
    async with asyncio.timeout(SOON_S):
        from_server, from_page = await asyncio.gather(
            docs.call({}, ToolContext(idempotency_key="1", generation_id="g")),
            page.call({}, ToolContext(idempotency_key="2", generation_id="g")),
        )
    await there.aclose()
    await here.aclose()

    assert from_server["secret"] == "of the server"
    assert from_page == {"secret": "of the page", "pid": os.getpid()}
    assert from_server["pid"] != os.getpid()
