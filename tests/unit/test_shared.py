"""Collections as a database hands them out: one for all who ask, and its copy ends with it."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aidb_ray import AgentMessage, Database, NotReadyError, StorageError, connect
from aidb_ray.store import shared
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.subscription import Subscription
from tests.stores import until

URL = "aidb://a/1"


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


def followed(db: Database) -> dict[Subscription, None]:
    return db.partitions[0].client.feed._subscriptions


async def test_who_asks_for_the_same_collection_gets_the_same(db: Database) -> None:
    session = db.session(URL)
    assert session.messages is session.messages
    assert session.messages is db.session(URL).messages
    assert session.messages is db.collection("messages", AgentMessage, session=URL)

    rows = db.collection("rows")
    others = [
        db.collection("others"),
        db.collection("rows", AgentMessage),
        db.collection("rows", key="name"),
        db.collection("rows", session=URL),
    ]
    assert all(other is not rows for other in others)
    assert db.collection("rows") is rows


async def test_the_rows_that_one_waited_for_are_there_for_the_next(db: Database) -> None:
    await db.session(URL).messages.insert({"role": "user", "actor_id": "u", "content": "hi"})

    await db.session(URL).messages.ready()
    await db.session(URL).messages.ready()

    assert [row.content for row in db.session(URL).messages.values()] == ["hi"]
    assert len(followed(db)) == 1


async def test_copies_are_kept_of_the_last_that_were_asked_for_and_of_those_that_are_held(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "MAX_RECENT", 3)
    held = db.session("aidb://a/held").messages
    await held.ready()
    often = weakref.ref(db.session("aidb://a/often").messages)
    for number in range(10):
        await db.session("aidb://a/often").messages.ready()
        await db.session(f"aidb://a/{number}").messages.ready()
    gc.collect()

    assert often() is db.session("aidb://a/often").messages
    await until(lambda: len(followed(db)) <= 4)
    sessions = {subscription.filter.session for subscription in followed(db)}
    assert sessions == {"aidb://a/held", "aidb://a/often", "aidb://a/8", "aidb://a/9"}
    assert db.session("aidb://a/held").messages is held
    with pytest.raises(NotReadyError):
        len(db.session("aidb://a/0").messages)


async def test_rows_that_could_not_be_read_are_asked_for_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: object) -> bytes:
        raise StorageError("The disk is away.")

    rows = db.collection("rows")
    with monkeypatch.context() as patch:
        patch.setattr(StoreActor, "read", read)
        with pytest.raises(StorageError, match="away"):
            await rows.ready()

    await db.collection("rows").ready()
    assert len(rows) == 0
    assert len(followed(db)) == 1


def test_event_loops_have_collections_of_their_own(tmp_path: Path) -> None:
    """A copy belongs to the event loop that follows the rows."""

    async def open_here() -> Database:
        return await connect("local", data_dir=tmp_path, durability="memory")

    async def ask() -> object:
        return db.collection("rows")

    with asyncio.Runner() as first, asyncio.Runner() as second:
        db = first.run(open_here())
        one, other = first.run(ask()), second.run(ask())
        assert one is not other
        assert first.run(ask()) is one
        assert db.collection("rows") is not one, "outside of any"
        first.run(db.aclose())
