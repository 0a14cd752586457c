from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from aidb_ray import (
    Agent,
    AgentMessage,
    ConfigError,
    ConflictError,
    Database,
    Generation,
    KeyExistsError,
    KeyMissingError,
    ModelError,
    RunCancelledError,
    UnavailableError,
    connect,
)
from aidb_ray.agents.replies import Replies, ReplyHandle
from aidb_ray.agents.rows import GenerationRow, MessageRow, encode_row
from aidb_ray.contracts import GenerationStatus
from aidb_ray.store.changes import Change
from tests.stores import until

URL = "aidb://echo/1"
SOON_MS = 20_000


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def agent(db: Database) -> Agent:
    """A handle of an agent that does not run: what it would write, the tests write."""
    return Agent(db, "echo", "aidb://echo/*", 1)


def end_of(key: str, status: str = "completed", error: str | None = None) -> Change:
    row = GenerationRow(f"g-{key}", "echo", status, [key], error=error, error_code=error)
    return Change(9, URL, "generations", row.id, encode_row(row))


def reply_to(key: str) -> Change:
    row = MessageRow(
        f"g-{key}:reply",
        "assistant",
        "echo",
        content=f"to {key}",
        created_at="2026-01-01T00:00:00.000000Z",
        processed=True,
        generation_id=f"g-{key}",
        in_reply_to=key,
    )
    return Change(9, URL, "messages", row.id, encode_row(row), is_new=True)


async def written(handle: ReplyHandle) -> None:
    assert handle.sent is not None
    await handle.sent


async def answer(db: Database, key: str, status: str = "completed") -> None:
    """Write what an agent writes when it answers a message."""
    async with db.transaction(URL):
        session = db.session(URL)
        if status == "completed":
            session.messages.insert(
                AgentMessage(
                    id=f"g-{key}:reply",
                    role="assistant",
                    actor_id="echo",
                    content=f"to {key}",
                    processed=True,
                    generation_id=f"g-{key}",
                    in_reply_to=key,
                )
            )
        session.generations.insert(
            Generation(
                id=f"g-{key}", agent="echo", status=GenerationStatus(status), message_ids=[key]
            )
        )
        session.messages.update(key, {"processed": True, "generation_id": f"g-{key}"})


@pytest.mark.parametrize("is_reply_first", [True, False])
async def test_a_reply_settles_whichever_of_its_rows_is_told_first(
    db: Database, agent: Agent, *, is_reply_first: bool
) -> None:
    handle = agent.send("hello", session=URL, message_id="m")
    assert handle.sent is not None
    await handle.sent
    await answer(db, "m")
    replies = agent._listen_in(URL)
    waiting = replies.expect(URL, "m")
    if is_reply_first:
        replies._hear_messages([reply_to("m")])
    replies._hear_ends([end_of("m")])
    if not is_reply_first:
        replies._hear_messages([reply_to("m")])

    assert (await asyncio.wait_for(waiting, 10)).content == "to m"


@pytest.mark.parametrize(
    ("status", "error"), [("failed", ModelError), ("cancelled", RunCancelledError)]
)
async def test_an_end_without_a_reply_is_an_error(
    agent: Agent, status: str, error: type[Exception]
) -> None:
    replies = agent._listen_in(URL)
    waiting = replies.expect(URL, "m")
    replies._hear_ends([end_of("m", status, "why")])
    with pytest.raises(error, match="why"):
        await waiting


async def test_a_generation_that_only_begins_settles_nothing(agent: Agent) -> None:
    replies = agent._listen_in(URL)
    waiting = replies.expect(URL, "m")
    replies._hear_ends([end_of("m", "running")])
    assert not waiting.done()
    replies.close()
    with pytest.raises(UnavailableError):
        await waiting


async def test_a_reply_that_was_there_before_it_was_awaited_is_found(
    db: Database, agent: Agent
) -> None:
    sent = agent.send("hello", session=URL, message_id="m").sent
    assert sent is not None
    await sent
    await answer(db, "m")

    late = Agent(db, "echo", "aidb://echo/*", 1)
    for handle in (
        late.reply_to("m", session=URL),
        late.send("hello", session=URL, message_id="m"),
    ):
        assert (await handle.reply(timeout_ms=SOON_MS)).content == "to m"


@pytest.mark.parametrize(
    ("text", "options"),
    [("again", {}), ("hello", {"actor_id": "other"}), ("hello", {"target_agent": "other"})],
)
async def test_a_message_id_that_another_message_has_is_a_conflict(
    db: Database, agent: Agent, text: str, options: dict[str, Any]
) -> None:
    first = agent.send("hello", session=URL, message_id="m")
    on_its_way = agent.send(text, session=URL, message_id="m", **options)
    await written(first)
    known_here = agent.send(text, session=URL, message_id="m", **options)
    far = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    known_to_the_store = Agent(far, "echo", "aidb://echo/*", 1).send(
        text, session=URL, message_id="m", **options
    )
    await answer(db, "m")
    revision = (await db.status())[0].revision

    for handle in (on_its_way, known_here, known_to_the_store):
        assert handle.sent is not None
        for waiting in (handle.reply(timeout_ms=SOON_MS), handle.sent):
            with pytest.raises(ConflictError) as raised:
                await waiting
            error = raised.value
            assert (error.code, error.collection, error.key) == ("message_differs", "messages", "m")
            assert error.current is not None
            assert error.current["content"] == "hello"
    assert (await first.reply(timeout_ms=SOON_MS)).content == "to m"
    assert (await db.status())[0].revision == revision
    for partition in far.partitions:
        await partition.aclose()


async def test_a_message_that_differs_and_that_nobody_awaits_is_logged(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    await written(agent.send("hello", session=URL, message_id="m"))
    agent.send("again", session=URL, message_id="m")
    await until(lambda: caplog.records)
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert "'m'" in record.getMessage()


async def test_a_message_sent_again_says_as_before_that_it_is_there(
    db: Database, agent: Agent
) -> None:
    await written(agent.send("hello", session=URL, message_id="m"))
    far = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    again = Agent(far, "echo", "aidb://echo/*", 1).send("hello", session=URL, message_id="m")

    with pytest.raises(KeyExistsError):
        await written(again)
    await answer(db, "m")
    assert (await again.reply(timeout_ms=SOON_MS)).content == "to m"
    for partition in far.partitions:
        await partition.aclose()


async def test_there_is_no_reply_to_a_message_that_is_not_there(agent: Agent) -> None:
    with pytest.raises(KeyMissingError):
        await agent.reply_to("nowhere", session=URL).reply(timeout_ms=SOON_MS)


async def test_waiting_has_a_bound_and_the_reply_may_still_come(db: Database, agent: Agent) -> None:
    handle = agent.send("hello", session=URL, message_id="m")
    with pytest.raises(TimeoutError):
        await handle.reply(timeout_ms=1)
    await answer(db, "m")
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "to m"


async def test_ends_that_the_feed_lost_are_looked_up(db: Database, agent: Agent) -> None:
    handle = agent.send("hello", session=URL, message_id="m")
    reading = asyncio.create_task(handle.reply(timeout_ms=SOON_MS))
    await agent._listen_in(URL).ready()
    feed = db.partitions[0].client.feed
    dispatch = feed._dispatch

    def lose(changes: Sequence[Change]) -> None:
        if any(change.key == "g-m" for change in changes):
            feed._generation = "of another store"
        else:
            dispatch(changes)

    feed._dispatch = lose  # type: ignore[method-assign]
    await answer(db, "m")
    assert (await reading).content == "to m"


async def test_an_end_that_is_written_while_a_lost_feed_begins_anew_is_looked_up(
    db: Database, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = agent.send("hello", session=URL, message_id="m")
    reading = asyncio.create_task(handle.reply(timeout_ms=SOON_MS))
    await agent._listen_in(URL).ready()
    feed = db.partitions[0].client.feed
    poll_once = feed._poll_once

    async def answer_between() -> None:
        if feed.cursor < 0:
            # Who was told of the loss too early has looked by then.
            await db.session(URL).messages.find("m")
            await answer(db, "m")
        await poll_once()

    monkeypatch.setattr(feed, "_poll_once", answer_between)
    feed._generation = "of another store"
    note = {"role": "assistant", "actor_id": "echo", "content": "a moment", "processed": True}
    await db.session(URL).messages.insert(note)
    assert (await reading).content == "to m"


async def test_a_message_on_its_way_while_a_lost_feed_begins_anew_is_not_missing(
    db: Database, agent: Agent
) -> None:
    replies = agent._listen_in(URL)
    await replies.ready()
    handle = agent.send("hello", session=URL, message_id="m")

    replies._start_anew([], 0)

    assert not replies._tasks, "nobody looks for it before it is there"
    assert handle.sent is not None
    await handle.sent
    await answer(db, "m")
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "to m"


async def test_a_message_and_its_end_that_a_lost_feed_missed_are_looked_up(
    db: Database, agent: Agent
) -> None:
    replies = agent._listen_in(URL)
    await replies.ready()
    for subscription in replies._subscriptions:
        db.partitions[0].client.feed.unsubscribe(subscription)
    handle = agent.send("hello", session=URL, message_id="m")

    replies._start_anew([], 1_000)

    assert handle.sent is not None
    await handle.sent
    await answer(db, "m")
    assert (await handle.reply(timeout_ms=SOON_MS)).content == "to m"


async def test_who_asks_an_agent_that_is_not_there_is_told(db: Database) -> None:
    nobody = db.agent("nobody")
    for _ in range(2):
        handle = nobody.send("hello", session=URL)
        with pytest.raises(ConfigError, match="nobody"):
            await handle.reply(timeout_ms=SOON_MS)
        with pytest.raises(ConfigError, match="nobody"):
            async for _event in handle:
                pass


async def test_what_nobody_waits_for_is_not_kept_for_ever(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.agents.replies._MAX_REPLIES", 3)
    replies: Replies = agent._listen_in(URL)
    changes: list[Any] = [reply_to(str(number)) for number in range(10)]
    replies._hear_messages(changes)
    assert len(replies._unclaimed) == 3
