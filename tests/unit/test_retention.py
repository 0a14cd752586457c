"""Rows are kept as long as asked for, and go then: never early, a little late, whoever runs."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.chunks import replay, stream_to_collection
from aidb_ray.contracts import Chunk
from aidb_ray.database import Database, connect
from aidb_ray.errors import ConfigError, KeyMissingError, StorageFullError
from aidb_ray.store import retention as module
from aidb_ray.store.actor import StoreActor
from aidb_ray.store.changes import (
    Append,
    Change,
    Claim,
    Commit,
    DeleteSession,
    Filter,
    Mutation,
    Release,
    Retain,
    StoredRow,
    Update,
)
from aidb_ray.store.claims import CLAIMS, ClaimRecord, claim_key
from aidb_ray.store.columns import pack
from aidb_ray.store.expiry import MAX_VICTIMS
from aidb_ray.store.retention import Retention, Victim
from aidb_ray.store.streams import Stream
from aidb_ray.store.tables import SessionRows
from aidb_ray.store.under_way import has_ended, is_over
from tests.planner import Engine
from tests.stores import SESSION, Store, insert, open_store, row, until

MINUTE = 60_000
DAY = 24 * 60 * MINUTE


# When revisions were written.


@given(
    st.lists(st.tuples(st.integers(0, 5 * MINUTE), st.integers(0, 3)), min_size=1, max_size=200),
    st.sampled_from([1_000, 20_000, MINUTE, 30 * MINUTE, DAY]),
    st.integers(0, 20 * MINUTE),
)
def test_nothing_is_over_early_and_all_is_in_time(
    steps: list[tuple[int, int]], keep_ms: int, wait_ms: int
) -> None:
    """Each step lets time pass, notes it, and commits some revisions. Oracle: when each was."""
    retention = Retention()
    retention.put_policy("rows", SESSION, keep_ms)
    written: list[int] = []
    noted: list[int] = []
    now_ms = 0
    for passed_ms, commits in steps:
        now_ms += passed_ms
        note(retention, len(written), now_ms)
        noted.append(now_ms)
        written += [now_ms] * commits
    now_ms += wait_ms
    note(retention, len(written), now_ms)
    noted.append(now_ms)

    last = retention.last_expired(keep_ms, now_ms)

    assert all(at <= now_ms - keep_ms for at in written[:last])
    for at in written[last:]:
        # When it was noted at the latest, and how many marks were thinned out since.
        following = next((each for each in noted if each >= at + retention.pause_ms), now_ms)
        late_ms = (following - at) + max(retention.pause_ms, (now_ms - at) // 32)
        assert at > now_ms - keep_ms - late_ms


def note(retention: Retention, revision: int, now_ms: int) -> None:
    for at, at_ms in list(retention.new_marks(revision, now_ms)):
        retention.put_mark(at, at_ms)


def test_few_marks_tell_of_a_long_time() -> None:
    retention = Retention()
    retention.put_policy("rows", SESSION, 30 * DAY)
    for hour_quarter in range(60 * 24 * 4):
        note(retention, hour_quarter + 1, 15 * hour_quarter * MINUTE)

    assert len(retention.marks) < 500
    last = retention.last_expired(30 * DAY, 60 * DAY)
    assert 29 * 24 * 4 < last <= 30 * 24 * 4 + 1
    assert retention.last_expired(30 * DAY, 20 * DAY) == 0


def test_time_never_goes_back() -> None:
    retention = Retention()
    retention.put_policy("rows", SESSION, MINUTE)
    note(retention, 1, 10 * MINUTE)

    note(retention, 2, 5 * MINUTE)

    assert retention.marks == [(1, 10 * MINUTE)]
    assert retention.now_ms(5 * MINUTE) == 10 * MINUTE
    assert retention.last_expired(MINUTE, 5 * MINUTE) == 0


def test_nothing_is_noted_while_everything_is_kept_for_ever() -> None:
    retention = Retention()
    note(retention, 5, MINUTE)
    assert retention.marks == []

    retention.put_policy("rows", SESSION, MINUTE)
    note(retention, 6, MINUTE)
    assert retention.marks == [(6, MINUTE)]
    retention.put_policy("rows", SESSION, None)
    note(retention, 7, 3 * MINUTE)
    assert retention.marks == []


@pytest.mark.parametrize(
    ("session", "pattern"),
    [
        ("aidb://a/1", "aidb://a/1"),
        ("aidb://a/2", "aidb://a/*"),
        ("aidb://b/1", "aidb://*"),
    ],
)
def test_the_policy_that_says_most_governs(session: str, pattern: str) -> None:
    retention = Retention()
    patterns = ("aidb://*", "aidb://a/*", "aidb://a/1")
    for each in patterns:
        retention.put_policy("rows", each, MINUTE)
    retention.put_policy("others", session, MINUTE)

    governing = [p for p in patterns if retention.is_governed_by("rows", session, p)]

    assert governing == [pattern]


# What is under way.


def session_of(
    rows: dict[tuple[str, str], dict[str, Any]], streams: dict[str, str] | None = None
) -> SessionRows:
    session = SessionRows(SESSION)
    for (collection, key), fields in rows.items():
        session.put(collection, key, StoredRow(1, msgspec.json.encode({"id": key, **fields})))
    for generation_id, closes in (streams or {}).items():
        session.streams[generation_id] = Stream(1, 1, closes)
    return session


RUNNING = {("generations", "g"): {"status": "running"}}
ENDED = {("generations", "g"): {"status": "completed"}}
DELEGATED = {("messages", "g:0:0"): {"generationId": "g", "requestId": "g:0:0", "processed": True}}


@pytest.mark.parametrize(
    ("collection", "fields", "others", "over"),
    [
        ("messages", {"processed": True, "targetAgent": "a"}, {}, True),
        ("messages", {"processed": False, "targetAgent": "a"}, {}, False),
        ("messages", {"processed": False, "targetAgent": ""}, {}, True),
        ("messages", {"processed": True, "requestId": "g:0:0"}, DELEGATED | RUNNING, False),
        ("messages", {"processed": True, "requestId": "g:0:0"}, DELEGATED | ENDED, True),
        ("messages", {"processed": True, "requestId": "g:0:0"}, {}, True),
        ("generations", {"status": "running"}, {}, False),
        ("generations", {"status": "pending"}, {}, False),
        ("generations", {"status": "completed"}, {}, True),
        ("generations", {"status": "strange"}, {}, False),
        ("tool_calls", {"status": "completed", "generationId": "g"}, RUNNING, False),
        ("tool_calls", {"status": "completed", "generationId": "g"}, ENDED, True),
        ("tool_calls", {"status": "failed", "generationId": "g"}, {}, True),
        ("tool_calls", {"status": "executing", "generationId": "g"}, ENDED, False),
        ("tool_calls", {"status": "pending"}, {}, False),
        ("cancel_requests", {"done": False}, {}, False),
        ("cancel_requests", {"done": True}, {}, True),
        ("questions", {"status": "open"}, RUNNING, False),
        ("questions", {"status": "answered"}, {("tool_calls", "c"): {"status": "pending"}}, False),
        ("steps", {}, ENDED, True),
        ("rows", {"status": "running"}, RUNNING, True),
    ],
)
def test_rows_that_something_needs_are_not_over(
    collection: str,
    fields: dict[str, Any],
    others: dict[tuple[str, str], dict[str, Any]],
    *,
    over: bool,
) -> None:
    session = session_of({(collection, "k"): fields} | others)
    value = session.collections[collection]["k"].value

    assert is_over(collection, "k", value, session) is over


@pytest.mark.parametrize(
    ("state", "over"), [("held", False), ("orphan", False), ("done", True), ("free", True)]
)
def test_a_row_that_is_worked_on_is_not_over(state: Any, *, over: bool) -> None:
    session = session_of({("rows", "k"): {}})
    claim = ClaimRecord("rows", "k", state=state)
    session.put(CLAIMS, claim_key("rows", "k"), StoredRow(1, claim.encode()))

    assert is_over("rows", "k", b"{}", session) is over
    assert is_over("steps", "s", b"{}", session) is over


@pytest.mark.parametrize(
    ("rows", "streams", "ended"),
    [
        ({}, {}, True),
        (ENDED, {"g": "finished"}, True),
        (RUNNING, {"g": "finished"}, False),
        (ENDED, {"g": ""}, False),
        ({}, {"g": ""}, False),
    ],
)
def test_a_generation_goes_on_while_its_row_or_its_stream_does(
    rows: Any, streams: dict[str, str], *, ended: bool
) -> None:
    assert has_ended("g", session_of(rows, streams)) is ended


# Removing.


def test_what_changed_or_was_claimed_meanwhile_stays() -> None:
    engine = Engine()
    for key in "abcd":
        engine.one(insert(key))
    revisions = {key: at for at, key in enumerate("abcd", 2)}
    engine.commit(
        Commit((Append(SESSION, "g", 1, 0, 0, 1, closes="finished"),)), chunks=pack([1], ["x"])
    )
    engine.one(Claim(SESSION, "rows", "b", "effect", "holder", 1_000))
    engine.one(Claim(SESSION, "rows", "d", "effect", "holder", 1_000))
    token = engine.tables.revision
    engine.one(Release(SESSION, "rows", "d", token))
    victims = [Victim(SESSION, "rows", key, at) for key, at in revisions.items()]
    victims[0] = victims[0]._replace(revision=1)
    streams = [Victim(SESSION, "chunks", "g", 6), Victim(SESSION, "chunks", "h", 6)]
    before = engine.tables.revision

    removed = engine.expire([*victims, Victim(SESSION, "rows", "gone", 3), *streams])

    assert removed == 3
    assert engine.tables.revision == before + 1, "one commit"
    session = engine.tables.session(SESSION)
    assert sorted(session.collections["rows"]) == ["a", "b"]
    assert list(session.collections[CLAIMS]) == [claim_key("rows", "b")]
    assert session.streams == {}
    rows = session.rows()
    engine.restart()
    assert engine.tables.session(SESSION).rows() == rows
    assert engine.expire(victims) == 0
    assert engine.tables.revision == before + 1


def test_a_stream_that_was_begun_anew_stays() -> None:
    engine = Engine()
    append = Append(SESSION, "g", 1, 0, 0, 1, closes="finished")
    engine.commit(Commit((append,)), chunks=pack([1], ["x"]))
    old = Victim(SESSION, "chunks", "g", engine.tables.revision)
    engine.one(DeleteSession(SESSION))
    engine.commit(Commit((append,)), chunks=pack([1], ["y"]))
    new = old._replace(revision=engine.tables.revision)

    assert engine.expire([old]) == 0
    assert engine.expire([new]) == 1


def test_a_policy_is_kept_with_the_rows_and_may_be_ended() -> None:
    engine = Engine()
    engine.one(Retain("rows", "aidb://*", 5_000))
    engine.one(Retain("rows", SESSION, 7_000))

    engine.restart()
    assert engine.tables.retention.policies == {
        ("rows", "aidb://*"): 5_000,
        ("rows", SESSION): 7_000,
    }
    engine.one(Retain("rows", "aidb://*", 0))
    engine.restart()
    assert engine.tables.retention.policies == {("rows", SESSION): 7_000}


@pytest.mark.parametrize("policy", [Retain("rows", SESSION, -1), Retain("~claims", SESSION, 5)])
def test_policies_that_make_no_sense_are_refused(policy: Retain) -> None:
    refusal = Engine().one(policy)

    assert refusal is not None
    assert refusal.reason == "invalid_retention"


# Through a store, whose clock is moved.


async def pass_minutes(store: Store, minutes: int) -> None:
    """Let time pass, which the store notes while it does."""
    for _ in range(6 * minutes):
        store.now += 10
        await store.actor._remove(())


async def keys(store: Store, session: str = SESSION, collection: str = "rows") -> list[str]:
    _, rows = await store.client().read(Filter(collection, session))
    return [row.key for row in rows]


async def commit(store: Store, *mutations: Mutation) -> None:
    await store.client().commit(mutations)


async def test_rows_go_when_their_time_is_over_and_readers_hear(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", "aidb://*", 10 * MINUTE), insert("a"), insert("b"))
        heard: list[Change] = []
        watcher = store.client()
        subscription = watcher.feed.subscribe(Filter("rows", SESSION), heard.extend)
        await subscription.ready
        await pass_minutes(store, 5)
        await commit(store, insert("c"), insert("a", into="others"))
        await pass_minutes(store, 4)
        assert await store.actor.sweep() == 0
        await pass_minutes(store, 2)

        assert await store.actor.sweep() == 2

        assert await keys(store) == ["c"]
        assert await keys(store, collection="others") == ["a"]
        await until(lambda: len(heard) == 3)
        assert [(change.key, change.value) for change in heard[1:]] == [("a", None), ("b", None)]
        assert await store.actor.sweep() == 0
        await pass_minutes(store, 10)
        assert await store.actor.sweep() == 1


async def test_an_update_begins_the_time_anew(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", SESSION, 10 * MINUTE), insert("a"), insert("b"))
        await pass_minutes(store, 9)
        await commit(store, Update(SESSION, "rows", "a", row("a", "2"), 0))
        await pass_minutes(store, 9)

        await store.actor.sweep()

        assert await keys(store) == ["a"]


async def test_times_and_policies_survive_restarts_and_snapshots(tmp_path: Path) -> None:
    async with open_store(tmp_path, max_resident_bytes=1) as store:
        await commit(store, Retain("rows", "aidb://*", 10 * MINUTE))
        for n in range(5):
            await commit(store, insert("a", session=f"aidb://s/{n}"))
            await pass_minutes(store, 2)
            await (store.actor.snapshot() if n % 2 else store.restart())
        await pass_minutes(store, 1)
        await store.restart()
        # What is left rests on disk: the policy looks there, too.
        await store.actor.snapshot()
        await commit(store, insert("wake", session="aidb://other"))
        assert "aidb://s/0" not in store.actor._tables.sessions

        await store.actor.sweep()

        left = [n for n in range(5) if await keys(store, f"aidb://s/{n}")]
        assert left == [1, 2, 3, 4]
        await pass_minutes(store, 20)
        assert await store.actor.sweep() == 5
        await store.restart()
        assert not [n for n in range(5) if await keys(store, f"aidb://s/{n}")]


async def test_a_clock_that_goes_back_removes_nothing_early(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", SESSION, 10 * MINUTE), insert("a"))
        await pass_minutes(store, 1)
        store.wall -= 3_600
        await store.restart()
        await commit(store, insert("b"))
        await pass_minutes(store, 30)
        assert await store.actor.sweep() == 0, "an hour is to be made up for"

        await pass_minutes(store, 80)
        assert await store.actor.sweep() == 2


async def test_a_clock_that_is_set_while_the_store_runs_is_not_believed(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", SESSION, 10 * MINUTE), insert("a"))
        await pass_minutes(store, 1)
        store.wall += 86_400
        await pass_minutes(store, 1)

        assert await store.actor.sweep() == 0


async def test_many_rows_go_in_bounded_commits(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        client = store.client()
        await client.commit([Retain("rows", "aidb://*", MINUTE)])
        for n in range(5):
            await client.commit(
                [insert(f"k{at}", session=f"aidb://s/{n}") for at in range(MAX_VICTIMS // 2)]
            )
        await pass_minutes(store, 2)
        before = (await client.status()).revision

        assert await store.actor.sweep() == 5 * MAX_VICTIMS // 2

        latest = (await client.status()).revision
        changes = await client.changes_between(Filter("rows"), before, latest)
        sizes = [sum(c.revision == at for c in changes) for at in range(before + 1, latest + 1)]
        assert [size for size in sizes if size] == [MAX_VICTIMS, MAX_VICTIMS, MAX_VICTIMS // 2]


async def test_a_policy_that_says_more_takes_a_session_out(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        kept = "aidb://test/kept"
        await commit(store, Retain("rows", "aidb://*", MINUTE), Retain("rows", kept, DAY))
        await commit(store, insert("a"), insert("a", session=kept))
        await pass_minutes(store, 5)

        await store.actor.sweep()

        assert (await keys(store), await keys(store, kept)) == ([], ["a"])


async def test_a_full_disk_leaves_rows_for_later(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", SESSION, MINUTE), insert("a"))
        await pass_minutes(store, 5)
        store.files.free = False
        with pytest.raises(StorageFullError):
            await store.actor.sweep()
        assert await keys(store) == ["a"]
        store.files.free = True

        assert await store.actor.sweep() == 1


async def test_the_store_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_PAUSE_MS", 1)
    monkeypatch.setattr(module, "_SHARE", 1_000)
    async with open_store(tmp_path) as store:
        await commit(store, Retain("rows", SESSION, 1_000), insert("a"))
        await pass_minutes(store, 1)
        await until(lambda: not store.actor._tables.session(SESSION).collections["rows"])

        await commit(store, insert("b"))
        await pass_minutes(store, 1)
        await store.restart()
        await until(lambda: not store.actor._tables.session(SESSION).collections["rows"])


# Streams, and the database's side.


async def stream(db: Database, generation_id: str, *, ends: bool = True) -> None:
    async def words() -> AsyncGenerator[dict[str, str]]:
        yield {"type": "word", "content": "one"}
        if not ends:
            raise ConnectionResetError

    try:
        await stream_to_collection(
            words(),
            collection=db.session(SESSION).chunks,
            generation_id=generation_id,
            transform=lambda event, _index, _generation_id: event,
        )
    except ConnectionResetError:
        assert not ends


async def stored(db: Database, generation_id: str) -> Sequence[Chunk]:
    chunks = db.session(SESSION).chunks
    return [chunk async for chunk in replay(chunks, generation_id=generation_id, follow=False)]


async def test_streams_go_when_they_have_ended(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = Database("test", [store.ref], data_dir=str(store.directory), cluster=None)
        await db.retain("chunks", 10 * MINUTE)
        await stream(db, "ended")
        await stream(db, "running")
        await db.session(SESSION).generations.insert(
            {"id": "running", "agent": "a", "status": "running"}
        )
        open_append = Append(SESSION, "open", 1, 0, 0, 1)
        await store.client().commit([open_append], chunks=pack([1], ["x"]))
        await pass_minutes(store, 5)
        await stream(db, "young")
        await pass_minutes(store, 6)

        assert await store.actor.sweep() == 1

        assert await stored(db, "ended") == []
        for generation_id in ("running", "open", "young"):
            assert await stored(db, generation_id)
        assert store.actor._tables.garbage()
        await store.restart()
        assert await stored(db, "ended") == []
        assert await stored(db, "young")

        await db.session(SESSION).generations.update("running", {"status": "completed"})
        await pass_minutes(store, 11)
        assert await store.actor.sweep() == 2
        for partition in db.partitions:
            await partition.aclose()


async def test_streams_at_rest_go_as_well(tmp_path: Path) -> None:
    async with open_store(tmp_path, max_resident_bytes=1) as store:
        db = Database("test", [store.ref], data_dir=str(store.directory), cluster=None)
        await db.retain("chunks", 10 * MINUTE)
        await stream(db, "g")
        await store.actor.snapshot()
        await pass_minutes(store, 11)
        assert SESSION not in store.actor._tables.sessions

        assert await store.actor.sweep() == 1

        assert await stored(db, "g") == []
        for partition in db.partitions:
            await partition.aclose()


async def test_a_collection_declares_how_long_its_rows_are_kept() -> None:
    async with connect("local", durability="memory") as db:
        session = db.session(SESSION)
        rows = session.collection("rows", retention_ms=5_000)
        assert session.collection("rows", retention_ms=5_000) is rows
        db.collection("settings", retention_ms=7_000)
        db.collection("rows", session="aidb://logs/*", retention_ms=9_000)
        await db.partitions[0].drain()

        policies = policies_of(db)
        assert policies == {
            ("rows", SESSION): 5_000,
            ("settings", ""): 7_000,
            ("rows", "aidb://logs/*"): 9_000,
        }
        revision = (await db.status())[0].revision
        session.collection("rows", retention_ms=5_000)
        await db.partitions[0].drain()
        assert (await db.status())[0].revision == revision, "it was said before"

        await db.retain("rows", None, session=SESSION)
        assert ("rows", SESSION) not in policies_of(db)
        session.collection("rows", retention_ms=5_000)
        await db.partitions[0].drain()
        assert policies_of(db)["rows", SESSION] == 5_000
        await db.retain("settings", None, session=None)
        assert ("settings", "") not in policies_of(db)


def policies_of(db: Database) -> dict[tuple[str, str], int]:
    ref: Any = db._refs[0]
    actor: StoreActor = ref._host.actor
    return dict(actor._tables.retention.policies)


@pytest.mark.parametrize("retention_ms", [0, 999, -5, True, "5000", 1e6])
async def test_times_that_make_no_sense_are_refused(retention_ms: Any) -> None:
    async with connect("local", durability="memory") as db:
        with pytest.raises(ConfigError) as caught:
            db.collection("rows", retention_ms=retention_ms)
        with pytest.raises(ConfigError):
            await db.retain("rows", retention_ms)

        assert caught.value.code == "invalid_retention"
        with pytest.raises(ConfigError):
            await db.retain("~claims", 5_000)


async def test_a_retention_that_cannot_be_declared_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        db = Database("test", [store.ref], data_dir=str(store.directory), cluster=None)
        store.files.free = False
        db.collection("rows", retention_ms=5_000)
        await db.partitions[0].drain()

        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        store.files.free = True
        db.collection("rows", retention_ms=5_000)
        await db.partitions[0].drain()
        assert store.actor._tables.retention.policies == {("rows", ""): 5_000}
        for partition in db.partitions:
            await partition.aclose()


async def test_whoever_updates_a_row_that_has_gone_is_told(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        db = Database("test", [store.ref], data_dir=str(store.directory), cluster=None)
        rows = db.session(SESSION).collection("rows", retention_ms=MINUTE)
        await rows.insert({"id": "a"})
        await pass_minutes(store, 5)
        await store.actor.sweep()

        with pytest.raises(KeyMissingError):
            await rows.update("a", {"n": 1})
        for partition in db.partitions:
            await partition.aclose()
