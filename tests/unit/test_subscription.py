from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aidb_ray.errors import CompactedError, NotReadyError, StoreMismatchError
from aidb_ray.store.changes import Change, Delete, Filter, FoundRow, Update
from aidb_ray.store.client import StoreClient
from tests.stores import SESSION, Store, insert, open_store, row, until

ROWS = Filter("rows", SESSION)


class Reader:
    """Keeps what a subscription tells, and checks that revisions only grow."""

    def __init__(self, client: StoreClient, wanted: Filter, **options: bool | Filter) -> None:
        self.rows: dict[str, bytes] = {}
        self.told: list[Change] = []
        self.begins: list[int] = []
        self.revision = 0
        self.subscription = client.feed.subscribe(wanted, self.hear, self.see, **options)

    def see(self, rows: Sequence[FoundRow], revision: int) -> None:
        self.begins.append(revision)
        self.revision = revision
        self.rows = {found.key: found.value for found in rows}

    def hear(self, changes: Sequence[Change]) -> None:
        for change in changes:
            assert change.revision >= self.revision
            self.revision = change.revision
            self.told.append(change)
            if change.value is None:
                self.rows.pop(change.key, None)
            else:
                self.rows[change.key] = change.value

    async def ready(self) -> None:
        await self.subscription.ready


async def stored(client: StoreClient, wanted: Filter = ROWS) -> dict[str, bytes]:
    _, rows = await client.read(wanted)
    return {found.key: found.value for found in rows}


async def caught_up(client: StoreClient) -> None:
    await client.feed.reached((await client.status()).revision)


async def test_the_rows_come_first_then_every_change_once_and_in_order(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert("a"), insert("b")])
        reader = Reader(client, ROWS)
        await reader.ready()
        assert reader.rows == await stored(client)
        assert reader.told == []

        last = 0
        for n in range(20):
            last = await writer.commit([insert(f"k{n}")])
        await writer.commit([insert("other", into="notes")])
        await caught_up(client)

        assert [change.key for change in reader.told] == [f"k{n}" for n in range(20)]
        assert reader.told[-1].revision == last
        assert len(reader.begins) == 1


async def test_a_subscription_joins_while_the_poll_waits(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert("a", into="notes")])
        first = Reader(client, ROWS)
        await first.ready()
        await until(lambda: client.feed._is_parked and store.actor._polls._waiting)

        async with asyncio.timeout(5):
            second = Reader(client, Filter("notes", SESSION))
            await second.ready()
            assert list(second.rows) == ["a"]


async def test_nothing_is_missed_across_restarts_of_the_store(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        reader = Reader(client, ROWS)
        await reader.ready()

        for n in range(30):
            await writer.commit([insert(f"k{n:02}")])
            if n % 10 == 5:
                await store.restart()
        await caught_up(client)

        assert [change.key for change in reader.told] == [f"k{n:02}" for n in range(30)]
        assert len(reader.begins) == 1


async def test_falling_behind_starts_anew_with_all_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        reader = Reader(client, ROWS)
        quiet = Reader(client, ROWS, snapshot=False)
        await reader.ready()
        await writer.commit([insert("a"), insert("b")])
        await caught_up(client)
        store.refuses_polls = True
        await store.restart()
        # As if there had been more than the feed keeps.
        revision = await writer.commit([Delete(SESSION, "rows", "a"), insert("c")])
        store.actor._feed.oldest = revision
        assert client.feed.cursor < revision
        store.refuses_polls = False

        await until(lambda: len(reader.begins) == 2)

        assert reader.rows == await stored(client)
        assert sorted(reader.rows) == ["b", "c"]
        assert quiet.begins == [revision]
        await writer.commit([insert("d")])
        await caught_up(client)
        assert reader.rows == await stored(client)
        assert [change.key for change in quiet.told if change.revision > revision] == ["d"]
        assert "starts anew" in caplog.text


async def test_what_is_committed_while_the_feed_begins_anew_is_found_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        looks: list[asyncio.Task[dict[str, bytes]]] = []
        reader = Reader(client, ROWS, snapshot=False)

        def look(_rows: Sequence[FoundRow], _revision: int) -> None:
            looks.append(asyncio.create_task(stored(client)))

        reader.subscription.on_rows = look
        await reader.subscription.started

        async def commit_between() -> None:
            # Who was told too early has looked by then.
            await stored(writer)
            await writer.commit([insert("between")])

        lose_feed(store, client, commit_between, monkeypatch)
        await writer.commit([insert("missed")])
        await until(lambda: looks and client.feed.cursor >= 0)
        await client.feed.reached(await writer.commit([insert("later")]))

        found = await asyncio.gather(*looks)
        assert [sorted(rows) for rows in found] == [["between", "missed"]]
        assert list(reader.rows) == ["later"]


async def test_who_waits_for_a_revision_waits_until_the_rows_are_told_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        reader = Reader(client, ROWS)
        await reader.ready()
        may_read = asyncio.Event()
        ask = store.ask

        async def ask_late(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            if method.__name__ == "read":
                await may_read.wait()
            return await ask(method, *args)

        monkeypatch.setattr(store, "ask", ask_late)
        client.feed._generation = "of another store"
        revision = await writer.commit([insert("missed")])
        await until(lambda: client.feed.cursor >= revision and reader.subscription.loading)
        seen: list[list[str]] = []

        async def reach() -> None:
            await client.feed.reached(revision)
            seen.append(sorted(reader.rows))

        reaching = asyncio.create_task(reach())
        # Who waits for nothing has come to the end by then.
        await client.status()
        may_read.set()
        await reaching

        assert seen == [["missed"]]


def lose_feed(
    store: Store,
    client: StoreClient,
    meanwhile: Callable[[], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make the next change start everything anew, and run `meanwhile` before anyone hears again."""
    ask = store.ask

    async def ask_late(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        if method.__name__ == "poll" and client.feed.cursor < 0:
            await meanwhile()
        return await ask(method, *args)

    monkeypatch.setattr(store, "ask", ask_late)
    client.feed._generation = "of another store"


async def test_who_is_told_of_a_loss_may_end_and_begin_subscriptions(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        first = Reader(client, ROWS, snapshot=False)
        second = Reader(client, ROWS, snapshot=False)
        added: list[Reader] = []

        def replace_both(*_: object) -> None:
            client.feed.unsubscribe(first.subscription)
            client.feed.unsubscribe(second.subscription)
            added.append(Reader(client, ROWS))

        first.subscription.on_rows = replace_both
        await second.subscription.started
        client.feed._generation = "of another store"
        await writer.commit([insert("a")])
        await until(lambda: added)
        async with asyncio.timeout(5):
            await added[0].ready()

        assert list(added[0].rows) == ["a"]
        assert second.begins == []


async def test_another_generation_starts_anew_and_ends_who_waits_for_the_old_one(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path, durability="memory") as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert("a")])
        reader = Reader(client, ROWS)
        await reader.ready()
        waiting = asyncio.create_task(client.feed.reached(10**6))
        await store.restart()

        await until(lambda: len(reader.begins) == 2)

        assert reader.rows == {}
        with pytest.raises(CompactedError):
            await waiting


async def test_changes_without_rows_begin_where_started_says(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        before = await writer.commit([insert("a")])
        reader = Reader(client, ROWS, snapshot=False)

        assert await reader.subscription.started == before
        after = await writer.commit([insert("b")])
        await client.feed.reached(after)

        assert [change.key for change in reader.told] == ["b"]
        assert reader.begins == []


async def test_a_feed_that_rested_begins_at_the_newest_revision(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        first = Reader(client, ROWS, snapshot=False)
        await first.subscription.started
        client.feed.unsubscribe(first.subscription)
        await until(lambda: client.feed.cursor == -1)
        newest = await writer.commit([insert("a")])

        second = Reader(client, ROWS, snapshot=False)

        assert await second.subscription.started == newest


async def test_the_rows_may_be_fewer_than_what_is_followed(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert("a", "true"), insert("b", "false")])
        pending = Filter("rows", SESSION, where=(("v", (False,)),))
        reader = Reader(client, ROWS, snapshot=pending)
        racing = [writer.commit([insert(f"k{n}", "false" if n % 2 else "true")]) for n in range(20)]
        await reader.ready()
        begun = dict(reader.rows)
        await asyncio.gather(*racing)
        await writer.commit([insert("late", "true")])
        await caught_up(client)

        assert "b" in begun
        assert all(b"false" in value for value in begun.values())
        assert "late" in reader.rows
        assert {f"k{n}" for n in range(1, 20, 2)} <= set(reader.rows)


async def test_rows_and_changes_fit_together_while_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert(f"k{n}", session=f"aidb://s/{n}") for n in range(60)])
        monkeypatch.setattr("aidb_ray.store.reader.SLICE_MS", 0)

        async def churn() -> None:
            for n in range(60):
                name = f"aidb://s/{59 - n}"
                await writer.commit(
                    [
                        Update(name, "rows", f"k{59 - n}", row(f"k{59 - n}", "2"), 0),
                        insert(f"new{n}", session=f"aidb://t/{n}"),
                    ]
                )
                if n % 3 == 0:
                    await writer.commit([Delete(name, "rows", f"k{59 - n}")])

        churning = asyncio.create_task(churn())
        readers: list[Reader] = []
        while not churning.done():
            readers.append(Reader(client, Filter("rows")))
            await readers[-1].ready()
        await churning
        await caught_up(client)

        expected = await stored(client, Filter("rows"))
        assert len(readers) > 1
        for reader in readers:
            assert reader.rows == expected


async def test_changes_that_overtake_the_rows_are_told_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        await writer.commit([insert("a"), insert("b")])
        ask = store.ask

        async def read_slowly(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            answer = await ask(method, *args)
            if method.__name__ == "read":
                late = await writer.commit([Delete(SESSION, "rows", "a"), insert("late")])
                await client.feed._passed(late)
            return answer

        monkeypatch.setattr(store, "ask", read_slowly)
        reader = Reader(client, ROWS)
        await reader.ready()

        assert sorted(reader.rows) == ["b", "late"]
        assert [change.key for change in reader.told] == ["a", "late"]


async def test_nothing_is_told_after_unsubscribe(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        one, two = Reader(client, ROWS), Reader(client, ROWS)
        await one.ready()
        await two.ready()
        heard = one.hear

        def hear_and_end(changes: Sequence[Change]) -> None:
            heard(changes)
            client.feed.unsubscribe(two.subscription)

        one.subscription.on_changes = hear_and_end
        await client.feed.reached(await writer.commit([insert("a")]))

        assert [change.key for change in one.told] == ["a"]
        assert two.told == []


async def test_a_subscriber_that_fails_keeps_no_other_from_hearing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()

        def fail(changes: Sequence[Change]) -> None:
            raise RuntimeError("a mistake")

        def fail_at_rows(rows: Sequence[FoundRow], revision: int) -> None:
            raise RuntimeError("another mistake")

        broken = client.feed.subscribe(ROWS, fail, fail_at_rows)
        reader = Reader(client, ROWS)
        await broken.ready
        await reader.ready()
        await client.feed.reached(await writer.commit([insert("a")]))

        assert list(reader.rows) == ["a"]
        assert "a mistake" in caplog.text
        assert "another mistake" in caplog.text


async def test_one_that_ends_before_it_began_says_so(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        subscription = client.feed.subscribe(ROWS, lambda _: None)
        client.feed.unsubscribe(subscription)

        with pytest.raises(NotReadyError):
            await subscription.ready
        with pytest.raises(NotReadyError):
            await subscription.started


async def test_a_store_that_cannot_be_opened_is_told_to_who_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        await store.kill()
        store.directory.rename(tmp_path / "away")
        store.start()
        client = store.client()

        with caplog.at_level(logging.CRITICAL, "aidb_ray"):
            subscription = client.feed.subscribe(ROWS, lambda _: None)
            with pytest.raises(StoreMismatchError):
                await subscription.ready


async def test_who_waits_for_a_revision_that_nobody_follows_waits_for_nothing(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        async with asyncio.timeout(5):
            await client.feed.reached(10**9)


@pytest.mark.parametrize("snapshot", [True, False])
async def test_who_waits_while_the_feed_begins_anew_waits_no_longer_than_needed(
    tmp_path: Path, *, snapshot: bool
) -> None:
    """The cursor begins anew at the very revision: then no later poll brings it there."""
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        reader = Reader(client, ROWS, snapshot=snapshot)
        await reader.subscription.started
        store.refuses_polls = True
        await store.restart()
        revision = await writer.commit([insert("a")])
        # What came before its snapshot a store that starts cannot tell.
        await store.actor.snapshot()
        await store.restart()
        waiting = asyncio.create_task(client.feed.reached(revision))
        store.refuses_polls = False

        await asyncio.wait_for(waiting, 10)
        assert reader.begins
        assert list(reader.rows) == (["a"] if snapshot else [])


async def test_a_commit_reaches_its_reader_whole(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        heard: list[list[str]] = []
        subscription = client.feed.subscribe(
            ROWS, lambda changes: heard.append([change.key for change in changes]), snapshot=False
        )
        await subscription.started

        keys = [f"k{n:04}" for n in range(3_000)]
        revision = await writer.commit([insert(key, '"' + "x" * 50 + '"') for key in keys])
        await client.feed.reached(revision)

        assert heard == [keys]
