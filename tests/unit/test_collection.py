"""What a collection shows, and what it tells."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aidb_ray.contracts import AgentMessage, Chunk
from aidb_ray.database import connect
from aidb_ray.errors import (
    CompactedError,
    ConfigError,
    ConflictError,
    ContractError,
    NotReadyError,
    SlowConsumerError,
)
from aidb_ray.expressions import eq
from aidb_ray.store import collection as collection_module
from aidb_ray.store.changes import Filter
from aidb_ray.store.collection import Change, Collection
from tests.stores import Process, insert, open_store, until


async def synced(process: Process) -> None:
    """Wait until the process has heard of everything."""
    client = process.site.client
    await client.feed.reached((await client.status()).revision)


async def test_reading_waits_for_ready_but_rows_written_here_are_always_seen(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        await Process(store).collection("rows").insert({"id": "a"})
        rows = Process(store).collection("rows")

        for read in (lambda: rows.get("a"), lambda: len(rows), rows.values, lambda: "a" in rows):
            with pytest.raises(NotReadyError):
                read()
        await rows.insert({"id": "b"})
        assert rows.get("b") == {"id": "b"}
        assert await rows.find("a") == {"id": "a"}

        await rows.ready()
        assert [row["id"] for row in rows.values()] == ["a", "b"]
        assert rows.get("nothing") is None
        assert bool(rows)


async def test_rows_written_here_are_seen_after_others_followed_them(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        following = process.collection("rows")
        await following.ready()
        await rows.insert({"id": "a", "n": 1})
        await synced(process)

        assert rows.get("a") == {"id": "a", "n": 1}
        await Process(store).collection("rows").update("a", {"n": 2})
        await synced(process)
        assert rows.get("a") == {"id": "a", "n": 2}


async def test_a_row_deleted_elsewhere_does_not_come_back(tmp_path: Path) -> None:
    """Its insert is known here as durable, and the copy begins after its end."""
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store)
        rows = process.collection("rows")
        await rows.insert([{"id": "a", "open": True}, {"id": "b", "open": True}])
        await other.collection("rows").delete("a")
        await other.collection("rows").update("b", {"open": False})

        await rows.ready()
        heard: list[Change[Any]] = []
        subscribed = process.collection("rows").subscribe(
            heard.extend, where=lambda r: eq(r.open, True), include_initial_state=True
        )
        await subscribed.ready()

        assert rows.values() == [{"id": "b", "open": False}]
        assert heard == []


async def test_a_reply_that_the_feed_overtook_brings_nothing_back(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.ready()
        store.lose_answers = 1
        writing = rows.insert({"id": "a"})
        await until(lambda: not store.lose_answers)
        other = Process(store).collection("rows")
        await other.ready()
        await other.delete("a")
        await synced(process)

        await writing

        assert rows.get("a") is None
        assert rows.values() == []


async def test_models_come_back_as_models(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        messages = Process(store).collection("messages", AgentMessage)
        message = AgentMessage(id="m", role="user", actor_id="u", content="hi")

        await messages.insert(message)
        await messages.update("m", {"processed": True})

        expected = message.model_copy(update={"processed": True})
        assert await messages.find("m") == expected
        await messages.ready()
        assert messages.values() == [expected]


async def test_two_handles_of_a_process_see_the_same(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        one, other = process.collection("rows"), process.collection("rows")
        await other.ready()

        one.insert({"id": "a"})

        assert other.get("a") == {"id": "a"}
        assert not other.is_synced("a")


class Heard:
    """What a subscription's callback was told, as short texts."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, changes: list[Change[Any]]) -> None:
        self.calls.append([f"{change.op} {change.key}" for change in changes])

    @property
    def flat(self) -> list[str]:
        return [text for call in self.calls for text in call]


async def test_a_subscription_tells_rows_that_come_change_and_go(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        await other.insert([{"id": "a", "open": True}, {"id": "b", "open": False}])
        heard, silent = Heard(), Heard()
        rows = process.collection("rows")
        first = rows.subscribe(heard, where=lambda r: eq(r.open, True), include_initial_state=True)
        second = rows.subscribe(silent, where=lambda r: eq(r.open, True))
        await first.ready()
        await second.ready()
        assert heard.calls == [["insert a"]]

        await other.insert({"id": "c", "open": True})
        await other.update("a", {"n": 1})
        await other.update("a", {"open": False})
        await other.delete("c")
        await other.update("b", {"n": 1})
        await synced(process)

        assert heard.flat[1:] == ["insert c", "update a", "delete a", "delete c"]
        assert silent.flat == heard.flat[1:]
        first.close()
        await other.update("a", {"open": True})
        await synced(process)
        assert len(heard.flat) == 5


async def test_own_writes_are_told_once_and_taken_back_when_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        heard = Heard()
        subscribed = rows.subscribe(heard)
        await subscribed.ready()
        await rows.insert({"id": "a"})
        await synced(process)
        assert heard.flat == ["insert a"]

        store.files.free = False
        writing = rows.insert({"id": "b"})
        with pytest.raises(Exception, match="No space"):
            await writing
        assert heard.flat == ["insert a", "insert b", "delete b"]
        store.files.free = True


async def test_a_callback_that_fails_does_not_keep_anyone_from_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")

        def fail(changes: list[Change[Any]]) -> None:
            raise RuntimeError("a mistake")

        await rows.subscribe(fail).ready()
        await rows.insert({"id": "a"})
        await synced(process)

        assert "a mistake" in caplog.text


# Changes that can be resumed.


async def take(rows: Collection[Any], count: int, since: int | None = None) -> list[Change[Any]]:
    found: list[Change[Any]] = []
    async with asyncio.timeout(10):
        async for change in rows.changes(since):
            found.append(change)
            if len(found) == count:
                break
    return found


async def test_changes_come_once_in_order_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows, other = (Process(store).collection("rows") for _ in range(2))
        await other.insert({"id": "before"})
        taking = asyncio.create_task(take(rows, 3))
        await until(lambda: store.actor._polls._waiting)
        await other.insert({"id": "a", "n": 1})
        await other.update("a", {"n": 2})
        await other.delete("a")
        first = await taking

        assert [(c.op, c.key, c.before, c.after) for c in first] == [
            ("insert", "a", None, {"id": "a", "n": 1}),
            ("update", "a", {"id": "a", "n": 1}, {"id": "a", "n": 2}),
            ("delete", "a", {"id": "a", "n": 2}, None),
        ]
        await other.insert([{"id": "b"}, {"id": "c"}])
        await store.restart()
        again = await take(rows, 4, since=first[0].revision)
        assert [(c.op, c.key, c.is_last) for c in again] == [
            ("update", "a", True),
            ("delete", "a", True),
            ("insert", "b", False),
            ("insert", "c", True),
        ]
        everything = await take(rows, 6, since=0)
        assert [change.key for change in everything] == ["before", "a", "a", "a", "b", "c"]


async def test_changes_from_now_on_do_not_tell_what_was_before(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.ready()
        await rows.insert({"id": "a"})

        taking = asyncio.create_task(take(process.collection("rows"), 1))
        await synced(process)
        await until(lambda: len(process.site.client.feed._subscriptions) == 2)
        await process.site.client.status()
        await rows.insert({"id": "b"})

        (change,) = await taking
        assert change.key == "b"


@pytest.mark.parametrize(
    ("since", "error", "code"),
    [
        (-5, ContractError, "invalid_cursor"),
        (10**9, ConflictError, "revision_in_future"),
        (0, CompactedError, "compacted"),
    ],
)
async def test_a_cursor_that_cannot_be_served_is_refused(
    tmp_path: Path, since: int, error: type[Exception], code: str
) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a"})
        store.actor._feed.oldest = store.actor._feed.latest

        with pytest.raises(error) as caught:
            await take(rows, 1, since)

        assert getattr(caught.value, "code", None) == code


async def test_a_reader_that_does_not_read_is_dropped_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection_module, "MAX_UNREAD_CHANGES", 10)
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        rows = process.collection("rows")
        await other.insert({"id": "a", "n": 0})
        reading = rows.changes(since=0)
        assert (await anext(reading)).key == "a"
        for n in range(40):
            await other.update("a", {"n": n + 1})
            await synced(process)
        with pytest.raises(SlowConsumerError) as caught:
            async for _ in reading:
                pass

        resumed = await take(rows, 40, since=caught.value.resume)
        numbers = [change.after["n"] for change in resumed if change.after is not None]
        assert numbers == list(range(1, 41))


async def test_a_reader_that_missed_changes_is_told(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        await other.insert({"id": "a"})
        taking = asyncio.create_task(take(process.collection("rows"), 99))
        await until(lambda: process.site.client.feed._is_parked)
        store.refuses_polls = True
        await store.restart()
        revision = await store.client().commit([insert("b")])
        store.actor._feed.oldest = revision
        store.refuses_polls = False

        with pytest.raises(CompactedError):
            await taking


# Handles.


async def test_a_pattern_reads_across_sessions_and_writes_to_none(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        for n in (2, 1):
            await process.collection("rows", session=f"aidb://s/{n}").insert({"id": "a", "n": n})
        await process.collection("rows", session="aidb://t/1").insert({"id": "x"})
        rows = process.collection("rows", session="aidb://s/*")
        await rows.ready()

        assert [row["n"] for row in rows.values()] == [1, 2]
        for use in (lambda: rows.insert({"id": "b"}), lambda: rows.get("a")):
            with pytest.raises(ConfigError) as caught:
                use()
            assert caught.value.code == "session_required"


async def test_chunks_are_not_written_as_rows(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        chunks = Process(store).collection("chunks", Chunk)

        with pytest.raises(ConfigError) as caught:
            chunks.insert(Chunk(id="g:0", generation_id="g", index=0, type="x"))

        assert caught.value.code == "append_only"


async def test_filters_name_what_a_collection_holds(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)

        assert process.collection("rows", session="aidb://a").filter() == Filter("rows", "aidb://a")
        assert process.collection("rows", session="aidb://a*").filter() == Filter(
            "rows", prefix="aidb://a"
        )
        assert repr(process.collection("rows", session="aidb://a")) == (
            "<Collection 'rows' of aidb://a>"
        )


async def test_writes_of_one_process_are_committed_in_the_order_they_were_made(
    tmp_path: Path,
) -> None:
    async with connect("local", data_dir=tmp_path) as db:
        messages = db.session("aidb://s/1").messages
        row = {"role": "user", "actor_id": "me", "content": "?"}
        await messages.insert([{**row, "id": "a"}, {**row, "id": "b"}])
        await messages.ready()

        made = [
            messages.update("a", {"content": "1"}),
            messages.insert({**row, "id": "c"}),
            messages.delete("b"),
            messages.insert({**row, "id": "d"}),
        ]
        for transaction in made:
            await transaction

        revisions = [transaction.revision for transaction in made]
        assert revisions == sorted(revisions)
