"""The store as its clients see it: order, durability, failures, restarts."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aidb_ray.errors import (
    ConflictError,
    ContractError,
    StorageFullError,
    StoreLockedError,
    StoreMismatchError,
    UnavailableError,
)
from aidb_ray.store import actor as actor_module
from aidb_ray.store import reader as reader_module
from aidb_ray.store.actor import CLIENT_SILENCE_MS, StoreActor
from aidb_ray.store.changes import (
    Batch,
    Changes,
    Commit,
    Filter,
    FoundRow,
    PollRequest,
    ReadRequest,
    RowPage,
    decode_changes,
    decode_committed,
    decode_page,
    encode,
)
from aidb_ray.store.polls import MAX_POLLS
from tests.stores import SESSION, Store, insert, open_store, row, until

ALL = (Filter("rows"),)


async def read(actor: StoreActor, wanted: Filter = ALL[0], **options: Any) -> RowPage:
    return decode_page(await actor.read(encode(ReadRequest(wanted, **options))))


async def poll(actor: StoreActor, after: int, *, wait_ms: int = 0, **options: Any) -> Changes:
    usual: dict[str, Any] = {"feed_id": "feed", "generation": "", "filters": ALL}
    fields = {**usual, **options}
    return decode_changes(
        await actor.poll(encode(PollRequest(after=after, wait_ms=wait_ms, **fields)))
    )


def batch(client_id: int, seq: int, *keys: str) -> bytes:
    return encode(Batch(client_id, seq, [Commit((insert(key),)) for key in keys]))


async def write(store: Store, *keys: str) -> int:
    """Commit one row a key, as a client of its own; return the last revision."""
    client_id, _, _ = await store.actor.register()
    answer = decode_committed(await store.actor.commit(batch(client_id, 1, *keys)))
    assert answer.refused == []
    return answer.first_revision + len(keys) - 1


async def test_nobody_sees_a_row_before_it_is_durable(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        client_id, _, _ = await actor.register()
        parked = asyncio.create_task(poll(actor, client_id, wait_ms=10_000))
        store.files.hold_syncs()

        writing = asyncio.create_task(actor.commit(batch(client_id, 1, "a")))
        refused = asyncio.create_task(actor.commit(batch(client_id, 9, "z")))
        await until(lambda: store.actor._taken)
        page, told = await read(actor), await poll(actor, client_id)

        assert page.rows == []
        assert told.changes == []
        assert (await actor.status()).revision == client_id
        assert not writing.done()
        assert not refused.done(), "a refusal tells of rows, so it waits as well"
        assert not parked.done()

        store.files.let_syncs_go()
        assert decode_committed(await writing).first_revision == client_id + 1
        with pytest.raises(UnavailableError):
            await refused
        assert [change.key for change in (await parked).changes] == ["a"]


async def test_what_arrives_during_a_sync_shares_the_next_one(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        clients = [(await actor.register())[0] for _ in range(20)]
        store.files.hold_syncs()
        first = asyncio.create_task(actor.commit(batch(clients[0], 1, "0")))
        await until(lambda: store.actor._taken)
        rest = [
            asyncio.create_task(actor.commit(batch(client, 1, f"k{client}")))
            for client in clients[1:]
        ]
        await until(lambda: len(store.actor._arrivals) == len(rest))
        syncs = store.files.syncs

        store.files.let_syncs_go()
        answers = await asyncio.gather(first, *rest)

        assert store.files.syncs == syncs + 2
        revisions = [decode_committed(answer).first_revision for answer in answers]
        assert revisions == list(range(revisions[0], revisions[0] + 20))


async def test_a_flush_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_module, "MAX_BATCH_COMMITS", 8)
    async with open_store(tmp_path) as store:
        actor = store.actor
        clients = [(await actor.register())[0] for _ in range(10)]
        store.files.hold_syncs()
        tasks = [asyncio.create_task(actor.commit(batch(clients[0], 1, "0")))]
        await until(lambda: store.actor._taken)
        for client in clients[1:]:
            keys = [f"{client}-{n}" for n in range(3)]
            tasks.append(asyncio.create_task(actor.commit(batch(client, 1, *keys))))
        await until(lambda: len(store.actor._arrivals) == 9)
        syncs = store.files.syncs

        store.files.let_syncs_go()
        await asyncio.gather(*tasks)

        # 27 commits in batches of three: at most two batches fit into one flush.
        assert store.files.syncs - syncs == 1 + 5


async def test_cancelling_a_caller_cancels_no_commit(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        one, _, _ = await actor.register()
        other, _, _ = await actor.register()
        store.files.hold_syncs()
        leaving = asyncio.create_task(actor.commit(batch(one, 1, "a")))
        staying = asyncio.create_task(actor.commit(batch(other, 1, "b")))
        await until(lambda: store.actor._taken)

        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        store.files.let_syncs_go()
        await staying

        assert [found.key for found in (await read(actor)).rows] == ["a", "b"]


async def test_parked_polls_are_bounded_and_keep_nobody_from_committing(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        parked = [
            asyncio.create_task(poll(store.actor, 0, wait_ms=60_000, feed_id=str(n)))
            for n in range(MAX_POLLS)
        ]
        await until(lambda: store.actor._polls.is_full)

        further = await poll(store.actor, 0, wait_ms=60_000, feed_id="one more")
        assert further.retry_after_ms > 0
        assert further.through == 0

        revision = await write(store, "a")
        answers = await asyncio.gather(*parked)

        assert {answer.through for answer in answers} == {revision}
        assert {answer.changes[0].key for answer in answers} == {"a"}


async def test_a_poll_ends_with_its_time_and_covers_what_concerned_it_not(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        parked = asyncio.create_task(poll(store.actor, 0, wait_ms=60, filters=(Filter("x"),)))

        revision = await write(store, "a")

        answer = await parked
        assert answer.changes == []
        assert answer.through == revision


async def test_a_release_counts_even_if_it_overtakes_its_poll(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        async with asyncio.timeout(5):
            await store.actor.release_poll("feed", 7)
            await poll(store.actor, 0, wait_ms=60_000, number=7)
        waiting = asyncio.create_task(poll(store.actor, 0, wait_ms=60_000, number=8))
        await until(lambda: store.actor._polls._waiting)
        assert not waiting.done()
        await store.actor.release_poll("feed", 8)
        await waiting


async def test_a_poll_with_a_cursor_that_cannot_be_served_is_told_to_start_anew(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        revision = await write(store, "a")

        assert (await poll(store.actor, revision + 10**9)).lost
        assert (await poll(store.actor, 0, generation="another")).lost
        store.actor._feed.oldest = revision
        assert (await poll(store.actor, 0)).lost == revision
        assert not (await poll(store.actor, revision)).lost


async def test_a_batch_sent_again_after_a_restart_is_answered_as_the_first_time(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        client_id, _, _ = await store.actor.register()
        first = decode_committed(await store.actor.commit(batch(client_id, 1, "a", "b", "a")))
        revision = (await store.actor.status()).revision
        await store.restart()

        again = decode_committed(await store.actor.commit(batch(client_id, 1, "a", "b", "a")))

        assert again == first
        assert [at for at, _ in again.refused] == [2]
        assert (await store.actor.status()).revision == revision
        assert len((await poll(store.actor, 0)).changes) == 2
        with pytest.raises(ConflictError) as caught:
            await store.actor.commit(batch(client_id, 1, "other"))
        assert caught.value.code == "idempotency_mismatch"


async def test_a_client_that_is_silent_for_long_is_dropped_and_only_that_one(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        clients = [(await actor.register())[0] for _ in range(3)]
        # The first registered is the one that goes on.
        store.now = CLIENT_SILENCE_MS / 1000
        await actor.commit(batch(clients[0], 1, "a"))
        store.now += 1
        await actor.commit(batch(clients[0], 2, "b"))

        for gone in clients[1:]:
            with pytest.raises(UnavailableError) as caught:
                await actor.commit(batch(gone, 1, "x"))
            assert caught.value.code == "unknown_client"
        await actor.commit(batch(clients[0], 3, "c"))
        assert list(actor._client_seen) == [clients[0]]

        await store.restart()
        with pytest.raises(UnavailableError):
            await store.actor.commit(batch(clients[1], 1, "x"))
        await store.actor.commit(batch(clients[0], 4, "d"))


async def test_batches_of_unknown_clients_leave_no_trace(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        for client_id in range(1000, 1010):
            with pytest.raises(UnavailableError):
                await store.actor.commit(batch(client_id, 1, "x"))

        assert not store.actor._client_seen


async def test_a_failing_sync_makes_the_outcome_unknown_and_ends_the_store(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        client_id, _, _ = await actor.register()
        store.files.sync_error = errno.EIO

        with pytest.raises(UnavailableError) as caught:
            await actor.commit(batch(client_id, 1, "a"))

        assert caught.value.outcome == "unknown"
        assert store.deaths == 1
        assert (await actor.status()).state == "failed"
        with pytest.raises(UnavailableError) as refused:
            await actor.commit(batch(client_id, 1, "a"))
        assert refused.value.outcome == "not_applied"
        store.files.sync_error = 0
        await store.restart()
        # Whether it survived or not, sending it again settles it, once.
        await store.actor.commit(batch(client_id, 1, "a"))
        assert [found.key for found in (await read(store.actor)).rows] == ["a"]


async def test_an_error_of_its_own_ends_the_store_and_leaves_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        client_id, _, _ = await store.actor.register()
        parked = asyncio.create_task(poll(store.actor, client_id, wait_ms=60_000))

        def broken(*_: object) -> None:
            raise RuntimeError("a mistake")

        monkeypatch.setattr(store.actor._tables, "apply", broken)
        with pytest.raises(UnavailableError) as caught:
            await store.actor.commit(batch(client_id, 1, "a"))

        assert caught.value.outcome == "unknown"
        assert store.deaths == 1
        with pytest.raises(UnavailableError):
            await parked


async def test_a_full_disk_refuses_writes_serves_reads_and_heals(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        await write(store, "a")
        client_id, _, _ = await actor.register()
        revision = (await actor.status()).revision
        store.files.free = False

        for _ in range(2):
            with pytest.raises(StorageFullError) as caught:
                await actor.commit(batch(client_id, 1, "b"))
            assert caught.value.code == "storage_full"
        with pytest.raises(StorageFullError):
            await actor.register()

        status = await actor.status()
        assert (status.state, status.revision) == ("disk_full", revision)
        assert [found.key for found in (await read(actor)).rows] == ["a"]
        store.files.free = True
        answer = decode_committed(await actor.commit(batch(client_id, 1, "b")))
        assert answer.first_revision == revision + 1
        assert (await actor.status()).state == "serving"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        encode(Batch(1, 1, [])),
        encode([1, 1, [[[[99, "s", "c", "k"]]]]]),
        encode([1, 1, [[[[1, "s", "c", 5, b""]]]]]),
    ],
)
async def test_a_batch_that_cannot_be_read_is_refused(tmp_path: Path, raw: bytes) -> None:
    async with open_store(tmp_path) as store:
        with pytest.raises(ContractError) as caught:
            await store.actor.commit(raw)

        assert caught.value.code == "invalid_batch"
        assert (await store.actor.status()).revision == 0


async def test_stopping_finishes_what_was_accepted_and_refuses_the_rest(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        actor = store.actor
        clients = [(await actor.register())[0] for _ in range(2)]
        store.files.hold_syncs()
        accepted = [asyncio.create_task(actor.commit(batch(clients[0], 1, "a")))]
        await until(lambda: actor._taken)
        accepted.append(asyncio.create_task(actor.commit(batch(clients[1], 1, "b"))))
        await until(lambda: actor._arrivals)
        parked = asyncio.create_task(poll(actor, clients[1], wait_ms=60_000))
        await until(lambda: actor._polls._waiting)

        stopping = asyncio.create_task(actor.stop())
        await until(lambda: actor._state == "stopping")
        with pytest.raises(UnavailableError) as caught:
            await actor.commit(batch(clients[0], 2, "c"))
        assert (caught.value.code, caught.value.outcome) == ("store_ended", "not_applied")
        assert not stopping.done()
        store.files.let_syncs_go()
        await stopping

        for task in accepted:
            assert decode_committed(await task).refused == []
        assert parked.done()
        assert isinstance(parked.exception(), UnavailableError) or parked.result().changes
        reopened = StoreActor(store.options)
        await reopened.open()
        assert [found.key for found in (await read(reopened)).rows] == ["a", "b"]
        await reopened.stop()


async def test_a_store_that_cannot_be_opened_says_why_and_tries_again_when_asked(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        await write(store, "a")
        await store.kill()
        store.directory.rename(tmp_path / "away")
        store.start()

        for _ in range(2):
            with pytest.raises(StoreMismatchError) as caught:
                await store.actor.commit(batch(1, 1, "b"))
            assert caught.value.code == "store_missing"
        status = await store.actor.status()
        assert status.state == "recovering"
        assert str(store.directory) in status.problem

        (tmp_path / "away").rename(store.directory)
        assert [found.key for found in (await read(store.actor)).rows] == ["a"]


async def test_a_failed_recovery_leaves_the_directory_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        await store.kill()
        store.start()
        with monkeypatch.context() as patch:

            def broken(*_: object) -> None:
                raise StoreMismatchError("a mistake")

            patch.setattr(actor_module, "Tables", broken)
            with pytest.raises(StoreMismatchError):
                await store.actor.open()

        await store.actor.open()


async def test_a_locked_directory_is_named_with_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_module, "LOCK_WAIT_MS", 50)
    async with open_store(tmp_path) as store:
        second = StoreActor(store.options)

        with pytest.raises(StoreLockedError) as caught:
            await second.open()

        assert caught.value.pid > 0
        await second.stop()


async def test_a_lock_that_a_dying_process_still_holds_is_waited_for(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        second = StoreActor(store.options)
        opening = asyncio.create_task(second.open())
        await until(lambda: second._opening is not None)
        await store.kill()

        assert (await opening).state == "serving"
        await second.stop()


async def test_a_store_in_memory_forgets_and_says_so_by_another_generation(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path, durability="memory") as store:
        await write(store, "a")
        before = await poll(store.actor, -1)
        await store.restart()

        after = await poll(store.actor, -1)

        assert (await read(store.actor)).rows == []
        assert after.generation != before.generation
        assert (await poll(store.actor, before.through, generation=before.generation)).lost
        assert (await store.actor.status()).durability == "memory"


# Reading over sessions, memory and snapshots.


async def fill(store: Store, sessions: int, rows: int) -> dict[tuple[str, str], bytes]:
    """Write rows of which every tenth has `v` true; return them by place."""
    client = store.client()
    expected: dict[tuple[str, str], bytes] = {}
    for s in range(sessions):
        name = f"aidb://s/{s:03}"
        values = {f"k{r}": "true" if (s + r) % 10 == 0 else "false" for r in range(rows)}
        await client.commit([insert(key, v, session=name) for key, v in values.items()])
        expected |= {(name, key): row(key, v) for key, v in values.items()}
    return expected


def pairs(rows: list[FoundRow]) -> dict[tuple[str, str], bytes]:
    found = {(each.session, each.key): each.value for each in rows}
    assert len(found) == len(rows), "a row came twice"
    assert list(found) == sorted(found)
    return found


async def read_pages(actor: StoreActor, wanted: Filter, max_bytes: int) -> list[FoundRow]:
    found: list[FoundRow] = []
    after = None
    while True:
        page = await read(actor, wanted, after=after, max_bytes=max_bytes)
        found += page.rows
        if not page.more:
            return found
        after = (page.rows[-1].session, page.rows[-1].key)


@pytest.mark.parametrize("max_bytes", [1, 500, 1 << 20])
async def test_scans_page_by_page_find_rows_in_memory_and_at_rest(
    tmp_path: Path, max_bytes: int
) -> None:
    async with open_store(tmp_path, max_resident_bytes=20_000) as store:
        expected = await fill(store, 40, 5)
        await store.actor.snapshot()
        client = store.client()
        for s in range(0, 40, 7):
            await client.commit([insert("new", "true", session=f"aidb://s/{s:03}")])
            expected[f"aidb://s/{s:03}", "new"] = row("new", "true")
        status = await store.actor.status()
        assert 0 < status.sessions < 40, "some are at rest"
        few = Filter("rows", prefix="aidb://s/00", where=(("v", (True,)),))

        for _ in range(3):  # The third time there is an index.
            assert pairs(await read_pages(store.actor, ALL[0], max_bytes)) == dict(
                sorted(expected.items())
            )
            assert pairs(await read_pages(store.actor, few, max_bytes)) == {
                place: value
                for place, value in sorted(expected.items())
                if place[0].startswith("aidb://s/00") and b"true" in value
            }
        assert store.actor._reader.indexes.find(few) is not None
        assert await store.actor.sessions("aidb://s/", "aidb://s/001", 5) == [
            f"aidb://s/{s:03}" for s in range(2, 7)
        ]


async def test_a_session_that_is_loaded_or_leaves_during_a_scan_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path, max_resident_bytes=1) as store:
        expected = await fill(store, 30, 30)
        await store.actor.snapshot()
        tables = store.actor._tables
        tables.evict(0)
        resident = [f"aidb://s/{s:03}" for s in range(0, 30, 2)]
        for name in resident:
            tables.session(name)

        async def disturb(_self: object) -> None:
            tables.evict(0)
            tables.session("aidb://s/029")

        monkeypatch.setattr(reader_module._Turns, "give_way", disturb)
        found = pairs(await read_pages(store.actor, ALL[0], 1 << 20))

        assert found == expected
        assert not tables.sessions.keys() & resident, "all that were in memory have left"


async def test_rows_outlive_snapshots_compaction_and_restarts(tmp_path: Path) -> None:
    async with open_store(
        tmp_path, segment_bytes=1 << 16, snapshot_bytes=1 << 14, max_resident_bytes=10_000
    ) as store:
        expected: dict[tuple[str, str], bytes] = {}
        client = store.client()
        for turn in range(30):
            for s in range(10):
                name, key = f"aidb://s/{s:03}", f"k{turn}"
                await client.commit([insert(key, str(turn), session=name)])
                expected[name, key] = row(key, str(turn))
            if turn % 10 == 9:
                await store.restart()
        assert store.actor._log.snapshot() is not None, "snapshots are taken by themselves"

        assert pairs(await read_pages(store.actor, ALL[0], 4 << 20)) == dict(
            sorted(expected.items())
        )


async def test_a_snapshot_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path, max_resident_bytes=1) as store:
        expected = await fill(store, 5, 3)
        store.files.free = False
        assert await store.actor.snapshot() == 0
        store.files.free = True

        await store.actor.snapshot()
        await write(store, "x")
        await store.restart()

        found = pairs((await read(store.actor)).rows)
        del found[SESSION, "x"]
        assert found == dict(sorted(expected.items()))


async def test_a_log_that_a_crash_left_long_is_snapshotted_soon_after(tmp_path: Path) -> None:
    async with open_store(tmp_path, snapshot_bytes=1 << 20) as store:
        await write(store, *(f"k{n}" for n in range(2_000)))
        await store.kill()
        store.options = replace(store.options, snapshot_bytes=100_000)
        store.start()
        await store.actor.open()

        await write(store, "x")

        await until(lambda: store.actor._log.snapshot() is not None)


async def test_a_new_session_reads_no_block_of_the_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        await fill(store, 20, 2)
        await store.actor.snapshot()
        await store.restart()
        await until(lambda: store.actor._tables.presence is not None)
        loaded: list[str] = []
        load = store.actor._tables._load
        assert load is not None

        def counting(name: str) -> Any:
            loaded.append(name)
            return load(name)

        monkeypatch.setattr(store.actor._tables, "_load", counting)
        await store.client().commit([insert("a", session="aidb://new/1")])
        assert loaded == []
        await store.client().commit([insert("b", session="aidb://s/003")])
        assert loaded == ["aidb://s/003"]
