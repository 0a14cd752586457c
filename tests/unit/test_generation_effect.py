"""Generation driven by rows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Collection,
    ConfigError,
    Database,
    ToolContext,
    chat,
    connect,
    create_generation_effect,
    eq,
)
from aidb_ray.effects.effect import Effect
from aidb_ray.models.base import ModelMessage
from aidb_ray.testing import ScriptedModel
from tests.unit.test_effects import until

URL = "aidb://texts/1"


class Request(BaseModel):
    id: str
    prompt: str
    status: str = "pending"
    output: Any = None
    error: str | None = None


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def requests(db: Database) -> Collection[Request]:
    return db.session(URL).collection("requests", Request)


def start(requests: Collection[Request], generate: Any, **options: Any) -> Effect:
    return create_generation_effect(
        query=lambda q: q.from_(g=requests).where(lambda g: eq(g.status, "pending")),
        generate=generate,
        placement="here",
        **options,
    )


async def over(requests: Collection[Request], key: str = "a") -> Request:
    ends = ("completed", "failed")
    return await until(requests, key, lambda row: row is not None and row.status in ends)


def prompt_of(row: Request, ctx: ToolContext) -> str:
    return row.prompt


def attempt_of(row: Request, ctx: ToolContext) -> int:
    return ctx.attempt


async def echo(messages: Any) -> str:
    return f"You said {messages[-1].content}."


async def generate_text(row: Request, ctx: ToolContext) -> str:
    messages = [ModelMessage("user", row.prompt)]
    return await chat(adapter=ScriptedModel(echo), messages=messages, stream=False)


def generate_stream(row: Request, ctx: ToolContext) -> Any:
    return chat(adapter=ScriptedModel(echo), messages=[ModelMessage("user", row.prompt)])


@pytest.mark.parametrize("generate", [generate_text, generate_stream])
async def test_a_pending_row_is_generated_for(requests: Collection[Request], generate: Any) -> None:
    async with start(requests, generate):
        await requests.insert({"id": "a", "prompt": "hello"})
        row = await over(requests)

    assert (row.status, row.output) == ("completed", "You said hello.")


async def test_texts_may_be_streamed(requests: Collection[Request]) -> None:
    async def generate(row: Request, ctx: ToolContext) -> AsyncIterator[str]:
        async def words() -> AsyncIterator[str]:
            for word in ("one ", "two"):
                yield word

        return words()

    async with start(requests, generate):
        await requests.insert({"id": "a", "prompt": ""})
        assert (await over(requests)).output == "one two"


async def test_a_plain_function_holds_nobody_up(requests: Collection[Request]) -> None:
    may_return = threading.Event()

    def generate(row: Request, ctx: ToolContext) -> str:
        if row.id == "slow":
            may_return.wait()
        return row.id

    async with start(requests, generate):
        await requests.insert([{"id": "slow", "prompt": ""}, {"id": "a", "prompt": ""}])
        assert (await over(requests)).output == "a"
        may_return.set()
        assert (await over(requests, "slow")).output == "slow"


async def test_a_plain_function_that_ends_its_process_ends_only_its_row(
    requests: Collection[Request],
) -> None:
    def generate(row: Request, ctx: ToolContext) -> str:
        raise SystemExit

    async with start(requests, generate):
        await requests.insert({"id": "a", "prompt": ""})
        assert (await over(requests)).status == "failed"


async def test_the_callback_writes_the_end(requests: Collection[Request]) -> None:
    def end(row: Request, result: str) -> None:
        def change(draft: Any) -> None:
            draft.status = "completed"
            draft.output = [result, row.status]

        requests.update(row.id, change)

    async with start(requests, prompt_of, on_complete=end):
        await requests.insert({"id": "a", "prompt": "x"})
        row = await over(requests)

    assert row.output == ["x", "running"]


async def test_a_model_that_fails_fails_the_row(requests: Collection[Request]) -> None:
    async def generate(row: Request, ctx: ToolContext) -> Any:
        model = ScriptedModel([ValueError("no model")])
        return await chat(adapter=model, messages=[ModelMessage("user", "")], stream=False)

    async with start(requests, generate):
        await requests.insert({"id": "a", "prompt": "x"})
        row = await over(requests)

    assert row.status == "failed"
    assert "no model" in (row.error or "")


async def test_closing_aborts_the_request_and_another_goes_on(
    requests: Collection[Request],
) -> None:
    began, reasons = asyncio.Event(), list[str]()

    async def hang(row: Request, ctx: ToolContext) -> None:
        ctx.signal.add_listener(lambda: reasons.append(ctx.signal.reason))
        began.set()
        await asyncio.Event().wait()

    first = start(requests, hang)
    await requests.insert({"id": "a", "prompt": "x"})
    await began.wait()
    await first.aclose()
    async with start(requests, attempt_of):
        row = await over(requests)

    assert reasons == ["the executor closes"]
    assert row.output == 2


async def test_rows_must_meet_the_contract(db: Database) -> None:
    class Bare(BaseModel):
        id: str

    bare = db.session(URL).collection("bare", Bare)
    with pytest.raises(ConfigError, match="status") as raised:
        create_generation_effect(query=lambda q: q.from_(g=bare), generate=prompt_of)
    assert raised.value.code == "contract"
