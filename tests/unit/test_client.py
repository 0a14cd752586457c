from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aidb_ray.errors import (
    AidbError,
    CompactedError,
    ContractError,
    KeyExistsError,
    StorageFullError,
    UnavailableError,
)
from aidb_ray.store import client as client_module
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import Append, Filter, Insert
from aidb_ray.store.columns import pack, unpack
from tests.stores import SESSION, Store, insert, open_store, until

ROWS = Filter("rows", SESSION)


async def keys(store: Store) -> list[str]:
    _, rows = await store.client().read(ROWS)
    return [row.key for row in rows]


async def test_commits_made_in_one_turn_go_as_one_call(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        calls = store.calls

        revisions = await asyncio.gather(*[client.commit([insert(str(n))]) for n in range(500)])

        assert store.calls == calls + 1
        assert revisions == list(range(revisions[0], revisions[0] + 500))


async def test_commits_made_during_a_call_go_together_in_the_next(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        store.files.hold_syncs()
        early = client.commit([insert("a")])
        await until(lambda: store.actor._taken)
        calls = store.calls
        late = [client.commit([insert(str(n))]) for n in range(100)]

        store.files.let_syncs_go()
        await asyncio.gather(early, *late)

        assert store.calls == calls + 1


async def test_a_refusal_concerns_only_its_own_commit(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()

        one, two, three = (client.commit([insert(key)]) for key in ("a", "a", "b"))

        assert await three == await one + 1
        with pytest.raises(KeyExistsError) as caught:
            await two
        assert (caught.value.code, caught.value.key) == ("duplicate_key", "a")


async def test_batches_are_bounded_in_commits_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_BATCH_COMMITS", 10)
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        calls = store.calls
        await asyncio.gather(*[client.commit([insert(f"n{n}")]) for n in range(25)])
        assert store.calls == calls + 3

        calls = store.calls
        big = b'{"id":"x"}' + b" " * (400 << 10)
        await asyncio.gather(
            *[client.commit([Insert(SESSION, "rows", f"b{n}", big)]) for n in range(5)]
        )
        assert store.calls == calls + 3


async def test_what_waits_to_be_sent_is_bounded_and_said_to_be_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_QUEUED_COMMITS", 5)
    async with open_store(tmp_path) as store:
        client = store.client()
        sent = [client.commit([insert(str(n))]) for n in range(5)]

        with pytest.raises(UnavailableError) as caught:
            client.commit([insert("x")])

        assert (caught.value.code, caught.value.outcome) == ("overloaded", "not_applied")
        await asyncio.gather(*sent)
        await client.commit([insert("x")])


async def test_a_commit_too_large_is_refused_where_it_is_made(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = [Insert(SESSION, "rows", str(n), b"x" * (2 << 20)) for n in range(17)]

        with pytest.raises(ContractError) as caught:
            store.client().commit(rows)

        assert caught.value.code == "commit_too_large"


async def test_a_lost_answer_is_asked_for_again_and_applies_nothing_twice(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        store.lose_answers = 2

        revision = await client.commit([insert("a")])

        assert store.lose_answers == 0
        assert revision == (await client.status()).revision
        assert await keys(store) == ["a"]


async def test_commits_go_through_a_restart_of_the_store_once(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        store.files.hold_syncs()
        sent = [client.commit([insert(f"k{n}")]) for n in range(10)]
        await until(lambda: store.actor._taken)

        await store.restart()
        revisions = await asyncio.gather(*sent)

        assert revisions == list(range(revisions[0], revisions[0] + 10))
        assert await keys(store) == ["first", *(f"k{n}" for n in range(10))]


async def test_cancelling_who_waits_cancels_no_commit(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])

        async def write(key: str) -> int:
            return await client.commit([insert(key)])

        store.files.hold_syncs()
        sent = asyncio.create_task(write("sent"))
        await until(lambda: store.actor._taken)
        queued, staying = (asyncio.create_task(write(key)) for key in ("queued", "staying"))
        await until(lambda: len(client._queue) == 2)
        sent.cancel()
        queued.cancel()
        store.files.let_syncs_go()
        await staying
        await client.drain()

        assert sent.cancelled()
        assert queued.cancelled()
        assert await keys(store) == ["first", "queued", "sent", "staying"]


async def test_giving_up_says_unknown_and_fences_what_may_still_come(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client(give_up_ms=50)
        await client.commit([insert("first")])
        store.lose_answers = 1_000

        with pytest.raises(UnavailableError) as caught:
            await client.commit([insert("a")])
        assert (caught.value.outcome, caught.value.code) == ("unknown", "unknown_outcome")

        store.lose_answers = 0
        old = client._superseded
        assert old
        await client.commit([insert("b")])
        assert old not in store.actor._tables.clients
        assert "b" in await keys(store)


async def test_giving_up_before_anything_was_sent_says_not_applied(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client(give_up_ms=50)
        await store.kill()

        with pytest.raises(UnavailableError) as caught:
            await client.commit([insert("a")])

        assert caught.value.outcome == "not_applied"
        store.start()


async def test_a_full_disk_is_told_and_later_commits_go_on(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        store.files.free = False
        with pytest.raises(StorageFullError):
            await client.commit([insert("a")])
        store.files.free = True

        await client.commit([insert("b")])

        assert await keys(store) == ["b", "first"]


async def test_a_full_disk_after_a_lost_answer_is_not_taken_for_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call may still be on its way; its batch must not be mistaken for a later one."""
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("first")])
        held: list[bytes] = []
        ask = store.ask_shielded

        async def lose_first(method: Callable[..., Awaitable[Any]], *args: Any) -> Any:
            if method.__name__ == "commit" and not held:
                held.append(args[0])
                store.files.free = False
                raise UnavailableError("lost on the way", outcome="unknown")
            return await ask(method, *args)

        monkeypatch.setattr(store, "ask_shielded", lose_first)
        with pytest.raises(UnavailableError) as caught:
            await client.commit([insert("a")])
        assert caught.value.outcome == "unknown"
        store.files.free = True
        await client.commit([insert("b")])

        with pytest.raises(UnavailableError) as late:
            await store.actor.commit(held[0])
        assert late.value.code == "unknown_client"
        assert await keys(store) == ["b", "first"]


async def test_a_store_that_forgot_the_client_is_told_of_it_again(tmp_path: Path) -> None:
    async with open_store(tmp_path, durability="memory") as store:
        client = store.client()
        await client.commit([insert("a")])
        await store.restart()

        await client.commit([insert("b")])

        assert await keys(store) == ["b"]


async def test_a_store_that_failed_for_good_keeps_nobody_waiting(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([insert("a")])
        store.files.sync_error = 5

        async with asyncio.timeout(5):
            with pytest.raises(UnavailableError) as first:
                await client.commit([insert("b")])
            with pytest.raises(UnavailableError) as second:
                await client.commit([insert("c")])
            with pytest.raises(UnavailableError):
                await client.read(ROWS)

        assert (first.value.outcome, second.value.outcome) == ("unknown", "not_applied")


async def test_closing_waits_for_commits_and_refuses_later_ones(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        sent = client.commit([insert("a")])

        await client.aclose()

        assert sent.done()
        with pytest.raises(UnavailableError) as caught:
            client.commit([insert("b")])
        assert caught.value.code == "closed"


async def test_a_listener_that_fails_keeps_no_other_from_hearing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()

        def fail(revision: int, error: AidbError | None) -> None:
            raise RuntimeError("a mistake")

        client.send([insert("a")], fail)
        await client.commit([insert("b")])

        assert "a mistake" in caplog.text


async def test_chunks_of_several_commits_travel_in_one_set_of_columns(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        sent = [
            client.commit(
                [insert(f"r{n}"), Append(SESSION, f"g{n % 2}", 1, n // 2 * 2, 1, 2)],
                chunks=pack([9, n, n], ["unused", f"é{n}", "x"]),
            )
            for n in range(6)
        ]
        sent.append(client.commit([Append(SESSION, "g0", 1, 6, 0, 0, closes="finished")]))
        await asyncio.gather(*sent)

        page = await client.read_chunks(SESSION, "g0", 1)

        texts = [text for part in page.slices for text in unpack(part.columns)[1]]
        assert texts == ["x", "é2", "x", "é4", "x"]
        assert (page.next_index, page.closes, page.more) == (6, "finished", False)


async def test_reads_of_sessions_made_together_go_as_one_call(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        revision = await client.commit([insert("a"), insert("n", into="notes")])
        calls = store.calls

        one, other = await asyncio.gather(
            client.read_session(SESSION, ("rows", "notes")),
            client.read_session("aidb://none", ("rows",)),
        )

        assert store.calls == calls + 1
        assert one.revision == revision
        assert {name: [row.key for row in rows] for name, rows in one.rows.items()} == {
            "rows": ["a"],
            "notes": ["n"],
        }
        assert other.rows == {"rows": []}


async def test_a_read_that_is_refused_says_so_to_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()

        async def read_sessions(_self: StoreActor, _raw: bytes) -> bytes:
            raise ContractError("no")

        monkeypatch.setattr(StoreActor, "read_sessions", read_sessions)
        reads = [client.read_session(SESSION, ()) for _ in range(2)]

        results = await asyncio.gather(*reads, return_exceptions=True)

        assert [type(result) for result in results] == [ContractError, ContractError]


async def test_changes_between_two_revisions_come_once_and_in_order(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        first = await client.commit([insert("a")])
        revisions = [await client.commit([insert(key), insert(key, into="notes")]) for key in "bcd"]
        last = revisions[-1]

        found = await client.changes_between(ROWS, first, last - 1)

        assert [change.key for change in found] == ["b", "c"]
        store.actor._feed.oldest = first + 1
        with pytest.raises(CompactedError) as caught:
            await client.changes_between(ROWS, first, last)
        assert caught.value.oldest == first + 1


def test_a_loop_that_ends_tells_whoever_waits_what_became_of_the_commits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[AidbError | None] = []

    async def leave() -> None:
        store = Store(tmp_path)
        store.start()
        await store.actor.open()
        client = store.client()
        await client.commit([insert("first")])
        store.files.hold_syncs()
        client.send([insert("a")], lambda _, error: told.append(error))
        await until(lambda: store.actor._taken)
        client.send([insert("b")], lambda _, error: told.append(error))
        store.files.let_syncs_go()

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(leave())

    outcomes = [error.outcome for error in told if isinstance(error, UnavailableError)]
    assert outcomes == ["unknown", "not_applied"]
