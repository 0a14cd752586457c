from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import pickle
import sys
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aidb_ray
from aidb_ray.contracts import AgentMessage
from aidb_ray.database import (
    Database,
    Partition,
    connect,
    current_database,
    set_current_database,
)
from aidb_ray.database.connecting import Connecting
from aidb_ray.database.stores import Plan, create_or_identify
from aidb_ray.errors import (
    ConfigError,
    KeyExistsError,
    NotReadyError,
    StoreLockedError,
    StoreMismatchError,
    UnavailableError,
)
from aidb_ray.expressions import eq
from aidb_ray.store import actor as actor_module
from aidb_ray.store.directory import DirectoryLock
from tests.stores import SESSION, insert, until

HELLO = {"role": "user", "actor_id": "u", "content": "hi"}


def connect_here(directory: Path, **options: Any) -> Connecting:
    small = {"segment_bytes": 1 << 20, "reserve_bytes": 0}
    return connect("local", data_dir=directory, store_options=small, **options)


async def test_rows_are_there_again_when_the_database_is_opened_again(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        await db.session("aidb://support/42").messages.insert({"id": "m", **HELLO})

    db = await connect_here(tmp_path)
    messages = db.session("aidb://support/42").messages
    found = await messages.find("m")
    assert found is not None
    assert found.content == "hi"
    assert [session.url for session in await db.sessions()] == ["aidb://support/42"]
    await db.aclose()


async def test_leaving_waits_for_outstanding_writes(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        rows = db.collection("rows")
        for n in range(100):
            rows.insert({"id": str(n)})
        rows.update("5", {"n": 1})

    async with connect_here(tmp_path) as db:
        # This process does not know the row, so the store must be asked for it first.
        db.collection("rows").update("6", {"n": 1})

    async with connect_here(tmp_path) as db:
        rows = db.collection("rows")
        await rows.ready()
        assert len(rows) == 100
        assert rows.get("5") == {"id": "5", "n": 1}
        assert rows.get("6") == {"id": "6", "n": 1}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"database": ""}, "invalid_name"),
        ({"database": "../x"}, "invalid_name"),
        ({"database": "a/b"}, "invalid_name"),
        ({"partitions": 0}, "invalid_partitions"),
        ({"partitions": 4097}, "invalid_partitions"),
        ({"replicas": 3}, "invalid_replicas"),
        ({"durability": "quorum"}, "invalid_durability"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        connect("local", data_dir=tmp_path / "data", **options)

    assert caught.value.code == code
    assert not (tmp_path / "data").exists()


async def test_the_number_of_partitions_is_fixed(tmp_path: Path) -> None:
    async with connect_here(tmp_path, partitions=2):
        pass

    with pytest.raises(ConfigError) as caught:
        await connect_here(tmp_path, partitions=3)

    assert caught.value.code == "partitions_differ"


async def test_a_directory_that_lost_its_meta_is_not_made_afresh(tmp_path: Path) -> None:
    async with connect_here(tmp_path):
        pass
    (tmp_path / "default" / "p0" / "META").unlink()

    with pytest.raises(StoreMismatchError) as caught:
        await connect_here(tmp_path)

    assert caught.value.code == "store_missing"


async def test_a_partition_of_another_store_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        async with connect_here(tmp_path / name, partitions=2):
            pass
    foreign = tmp_path / "other" / "default" / "p1"
    own = tmp_path / "one" / "default" / "p1"
    own.rename(tmp_path / "away")
    foreign.rename(own)

    with pytest.raises(StoreMismatchError):
        await connect_here(tmp_path / "one", partitions=2)
    # What was opened before that is closed again.
    own.rename(tmp_path / "foreign")
    (tmp_path / "away").rename(own)
    async with connect_here(tmp_path / "one", partitions=2):
        pass


@pytest.mark.parametrize("linked", ["data", "data/default"])
async def test_a_link_is_refused(tmp_path: Path, linked: str) -> None:
    async with connect_here(tmp_path / "data"):
        pass
    place = tmp_path / linked
    place.rename(tmp_path / "real")
    place.symlink_to(tmp_path / "real")

    with pytest.raises(ConfigError) as caught:
        await connect_here(tmp_path / "data")

    assert caught.value.code == "data_dir_refused"


async def test_a_place_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(ConfigError) as caught:
        await connect_here(tmp_path / "file")

    assert caught.value.code == "data_dir_refused"


HOLDER = """
import asyncio, os, sys
import aidb_ray

async def main():
    async with aidb_ray.connect("local", data_dir=sys.argv[1]):
        print(os.getpid(), flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


async def test_a_directory_that_another_process_has_open_is_named_with_its_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_module, "LOCK_WAIT_MS", 50)
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOLDER,
        str(tmp_path),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(aidb_ray.__file__).parent.parent,
    )
    try:
        assert holder.stdout is not None
        pid = int(await holder.stdout.readline())
        with pytest.raises(StoreLockedError) as caught:
            await connect_here(tmp_path)
        assert caught.value.pid == pid
    finally:
        await holder.communicate(b"")

    async with connect_here(tmp_path):
        pass


async def test_a_directory_that_this_process_has_open_is_refused_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(10), connect_here(tmp_path):
        for spelling in (tmp_path, tmp_path / "elsewhere" / ".."):
            with pytest.raises(StoreLockedError, match="in this process already") as caught:
                await connect_here(spelling)
            assert caught.value.pid == os.getpid()
        # Not the same rows: other databases, and those in memory.
        async with connect_here(tmp_path, database="other"):
            pass
        async with connect_here(tmp_path, durability="memory"):
            pass


async def test_of_two_that_open_a_directory_at_once_one_is_refused_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        opened = await asyncio.gather(
            connect_here(tmp_path),
            connect_here(tmp_path / "elsewhere" / ".."),
            connect_here(tmp_path, database="other"),
            return_exceptions=True,
        )

    first, second, other = opened
    assert isinstance(first, Database)
    assert isinstance(other, Database)
    assert isinstance(second, StoreLockedError)
    assert second.pid == os.getpid()
    await first.aclose()
    await other.aclose()
    async with connect_here(tmp_path):
        pass


async def test_a_directory_that_could_not_be_opened_may_be_tried_again(tmp_path: Path) -> None:
    async with connect_here(tmp_path):
        pass
    with pytest.raises(ConfigError):
        await connect_here(tmp_path, partitions=2)
    async with connect_here(tmp_path):
        pass


async def test_a_connect_that_nobody_awaits_warns_as_a_coroutine_does(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"connect\(\.\.\.\)' was never awaited"):
        connect_here(tmp_path)
    assert not os.listdir(tmp_path)


async def test_a_connect_that_was_awaited_or_entered_or_refused_does_not_warn(
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with connect_here(tmp_path):
            with pytest.raises(StoreLockedError):
                await connect_here(tmp_path)
        await (await connect_here(tmp_path)).aclose()
        await (await asyncio.wait_for(connect_here(tmp_path), 10)).aclose()
        await (await asyncio.create_task(connect_here(tmp_path))).aclose()
        never_begun = asyncio.create_task(connect_here(tmp_path))
        never_begun.cancel()
        await asyncio.wait([never_begun])
        with pytest.raises(ConfigError):
            connect("local", database="")
        gc.collect()
    assert not caught


async def test_what_connect_returns_says_that_it_must_be_awaited(tmp_path: Path) -> None:
    connecting: Any = connect_here(tmp_path)
    with pytest.raises(AttributeError, match=r"no 'session' .* await connect"):
        connecting.session("aidb://a")
    assert not hasattr(connecting, "aclose")
    await (await connecting).aclose()


async def test_a_directory_that_this_process_still_closes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[Path] = []
    refuse = DirectoryLock._busy

    def count(lock: DirectoryLock, fd: int, path: Path) -> StoreLockedError:
        refusals.append(path)
        return refuse(lock, fd, path)

    monkeypatch.setattr(DirectoryLock, "_busy", count)
    db = await connect_here(tmp_path)
    is_written = asyncio.Event()

    async def write() -> None:
        await is_written.wait()
        await db.partitions[0].client.commit([insert("late")])

    db.partitions[0].spawn(write())
    closing = asyncio.create_task(db.aclose())
    await until(lambda: db.is_closed)
    connecting = asyncio.create_task(_connect(tmp_path))
    await until(lambda: refusals)
    is_written.set()
    await closing
    async with await connecting as again:
        assert await again.collection("rows", session=SESSION).find("late") is not None


async def test_drivers_that_create_a_database_at_once_share_it(tmp_path: Path) -> None:
    plan = Plan("local", tmp_path, "default", 2, "local", {})

    uuids = await asyncio.gather(
        *[asyncio.to_thread(create_or_identify, plan, tmp_path / "default") for _ in range(4)]
    )

    assert len(set(uuids)) == 1
    assert os.listdir(tmp_path) == ["default"]


# The default database.


async def test_the_default_database_is_the_latest_open_of_the_loop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        current_database()
    assert caught.value.code == "not_connected"

    async with connect_here(tmp_path / "one") as one:
        assert current_database() is one
        # Whichever task connects: it is of the loop.
        other = await asyncio.create_task(_connect(tmp_path / "other"))
        assert current_database() is other
        await other.aclose()
        assert current_database() is one
    with pytest.raises(ConfigError):
        current_database()


async def _connect(directory: Path) -> Database:
    return await connect_here(directory)


async def test_code_of_an_agent_has_a_default_of_its_own(tmp_path: Path) -> None:
    async with connect_here(tmp_path / "one") as one, connect_here(tmp_path / "other") as other:

        async def agent() -> Database:
            set_current_database(one)
            return current_database()

        assert await asyncio.create_task(agent()) is one
        assert current_database() is other


# Handles.


async def test_handles_of_a_local_database_refuse_to_be_sent(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        for handle in (db, db.session("aidb://a"), db.collection("rows")):
            with pytest.raises(ConfigError) as caught:
                pickle.dumps(handle)
            assert caught.value.code == "local_only"


USES: list[Callable[[Database], object]] = [
    lambda db: db.session("support/42"),
    lambda db: db.session("aidb://a b"),
    lambda db: db.session("aidb://../x"),
    lambda db: db.collection("../../etc/passwd"),
    lambda db: db.collection(""),
    lambda db: db.collection("rows", session="x"),
]


@pytest.mark.parametrize("use", USES)
async def test_names_that_cannot_be_are_refused(
    tmp_path: Path, use: Callable[[Database], object]
) -> None:
    async with connect_here(tmp_path, durability="memory") as db:
        with pytest.raises(ConfigError) as caught:
            use(db)
        assert caught.value.code == "invalid_name"


async def test_a_closed_database_refuses_what_comes_later(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        rows = db.collection("rows")
        await rows.ready()

    with pytest.raises(ConfigError) as caught:
        rows.insert({"id": "a"})
    assert caught.value.code == "not_connected"
    with pytest.raises(ConfigError):
        await rows.find("a")
    await db.aclose()


async def test_two_sessions_are_equal_if_url_and_database_are(tmp_path: Path) -> None:
    async with connect_here(tmp_path / "1") as one, connect_here(tmp_path / "2") as other:
        assert one.session("aidb://a") == one.session("aidb://a")
        assert one.session("aidb://a") != other.session("aidb://a")
        assert one.session("aidb://a") != one.session("aidb://b")
        assert len({one.session("aidb://a"), one.session("aidb://a")}) == 1


async def test_what_fails_while_closing_does_not_keep_the_rest_from_closing(
    tmp_path: Path,
) -> None:
    db = await connect_here(tmp_path)

    class Broken:
        name = "broken"

        async def aclose(self) -> None:
            raise RuntimeError("a mistake")

    db.keep_agent(Broken())  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError):
        await db.aclose()

    # The directory is free again.
    async with connect_here(tmp_path):
        pass


async def test_a_store_in_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    async with connect_here(tmp_path / "data", durability="memory") as db:
        await db.collection("rows").insert({"id": "a"})
        (status,) = await db.status()
        assert status.durability == "memory"

    assert not (tmp_path / "data").exists()


async def test_a_store_that_failed_keeps_nobody_from_leaving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncio.timeout(20):
        async with connect_here(tmp_path) as db:
            rows = db.collection("rows")
            await rows.insert({"id": "a"})
            monkeypatch.setattr("aidb_ray.store.files.FileSystem.sync_data", _refuse, raising=True)
            with caplog.at_level(logging.CRITICAL), pytest.raises(UnavailableError) as caught:
                await rows.insert({"id": "b"})
            assert caught.value.outcome == "unknown"
            monkeypatch.undo()

    async with connect_here(tmp_path) as db:
        found = await db.collection("rows").find("a")
        assert found == {"id": "a"}


def _refuse(*_: object) -> None:
    raise OSError(5, "Input/output error")


# Transactions.


@asynccontextmanager
async def connect_elsewhere(db: Database) -> AsyncGenerator[Database]:
    """Give a second connection to the same stores, as another process has."""
    other = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield other
    for partition in other.partitions:
        await partition.aclose()


async def test_a_transaction_writes_all_or_nothing(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        session = db.session("aidb://a")
        rows, notes = session.collection("rows"), session.collection("notes")
        await rows.insert({"id": "old", "n": 1})

        async with db.transaction(session) as tx:
            rows.insert({"id": "a", "n": 1})
            rows.update("a", {"n": 2})
            rows.update("old", {"n": 2})
            notes.insert({"id": "n"})
            assert rows.get("a") == {"id": "a", "n": 2}
            assert "n" in notes
        assert tx.revision > 0
        assert await tx is tx
        assert [(m.op, m.key) for m in tx.mutations] == [
            ("insert", "a"),
            ("update", "a"),
            ("update", "old"),
            ("insert", "n"),
        ]

        async def write_and_fail() -> None:
            async with db.transaction("aidb://a"):
                rows.insert({"id": "b"})
                rows.delete("old")
                raise RuntimeError("a mistake")

        with pytest.raises(RuntimeError):
            await write_and_fail()
        async with connect_elsewhere(db) as other:

            async def write_what_exists() -> None:
                async with other.transaction("aidb://a"):
                    other.session("aidb://a").collection("notes").insert({"id": "m"})
                    other.session("aidb://a").collection("rows").insert({"id": "a"})

            with pytest.raises(KeyExistsError):
                await write_what_exists()

        await rows.ready()
        await notes.ready()
        assert [row["id"] for row in rows.values()] == ["a", "old"]
        assert [row["id"] for row in notes.values()] == ["n"]
        (status,) = await db.status()
        # The other connection registered; nothing else happened.
        assert status.revision == tx.revision + 1


async def test_a_transaction_is_one_commit_for_who_follows(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        rows = db.session("aidb://a").collection("rows")
        heard: list[list[str]] = []
        partition = Partition(db.partitions[0].ref)
        subscription = partition.client.feed.subscribe(
            rows.filter(), lambda changes: heard.append([c.key for c in changes]), snapshot=False
        )
        await subscription.started

        async with db.transaction("aidb://a") as tx:
            for n in range(5):
                rows.insert({"id": str(n)})
        await partition.client.feed.reached(tx.revision)

        assert heard == [["0", "1", "2", "3", "4"]]
        await partition.aclose()


async def test_a_transaction_waits_for_what_it_was_made_on(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        rows = db.session("aidb://a").collection("rows")
        rows.insert({"id": "a", "n": 1})

        async with db.transaction("aidb://a"):
            rows.update("a", {"n": 2})
            rows.insert({"id": "b"})

        assert await rows.find("a") == {"id": "a", "n": 2}


async def test_a_transaction_takes_no_part_in_other_sessions_or_transactions(
    tmp_path: Path,
) -> None:
    async with connect_here(tmp_path) as db:
        other = db.session("aidb://b").collection("rows")
        rows = db.session("aidb://a").collection("rows")
        async with db.transaction("aidb://a") as tx:
            with pytest.raises(ConfigError) as caught:
                other.insert({"id": "x"})
            assert caught.value.code == "one_session"
            with pytest.raises(ConfigError) as nested:
                async with db.transaction("aidb://a"):
                    pass
            assert nested.value.code == "nested_transaction"
            with pytest.raises(ConfigError):
                await tx
            with pytest.raises(ConfigError) as early:
                await rows.insert({"id": "a"})
            assert early.value.code == "in_transaction"
        assert await rows.find("a") == {"id": "a"}
        assert await other.find("x") is None


async def test_a_task_that_outlives_its_transaction_writes_by_itself(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        rows = db.session("aidb://a").collection("rows")
        may_write = asyncio.Event()

        async def later() -> None:
            await may_write.wait()
            await rows.insert({"id": "late"})

        async with db.transaction("aidb://a"):
            task = asyncio.create_task(later())
        may_write.set()
        await task

        assert await rows.find("late") == {"id": "late"}


async def test_an_empty_transaction_commits_nothing(tmp_path: Path) -> None:
    async with connect_here(tmp_path) as db:
        async with db.transaction("aidb://a") as tx:
            pass

        assert tx.is_done
        assert (await db.status())[0].revision == 0


# Several partitions.


async def test_partitions_hold_sessions_apart_and_patterns_read_them_all(tmp_path: Path) -> None:
    async with connect_here(tmp_path, partitions=4) as db:
        names = [f"aidb://s/{n}" for n in range(20)]
        for name in names:
            await db.session(name).messages.insert({"id": "m", **HELLO, "actor_id": name})
        await db.collection("settings").insert({"id": "x"})
        revisions = [status.revision for status in await db.status()]
        assert sum(revision > 0 for revision in revisions) == 4

        everyone = db.collection("messages", AgentMessage, session="aidb://s/*")
        with pytest.raises(NotReadyError):
            everyone.values()
        await everyone.ready()
        assert [m.actor_id for m in everyone.values()] == sorted(names)
        found = await db.query(
            lambda q: q.from_(m=everyone).where(lambda m: eq(m.actor_id, "aidb://s/7"))
        )
        assert len(found) == 1
        heard: list[str] = []
        subscribed = everyone.subscribe(lambda changes: heard.extend(c.op for c in changes))
        await subscribed.ready()
        async with db.live_query(lambda q: q.from_(m=everyone)) as live:
            await db.session("aidb://s/99").messages.insert({"id": "n", **HELLO})
            assert len(live.rows) == 21
        assert heard == ["insert"]
        assert [session.url for session in await db.sessions("aidb://s/1")] == sorted(
            name for name in names if name.startswith("aidb://s/1")
        )
        with pytest.raises(ConfigError) as caught:
            await anext(everyone.changes())
        assert caught.value.code == "spans_partitions"

    async with connect_here(tmp_path, partitions=4) as db:
        for name in names:
            assert await db.session(name).messages.find("m") is not None


async def test_meta_names_the_partitions(tmp_path: Path) -> None:
    async with connect_here(tmp_path, partitions=3) as db:
        assert {status.partitions for status in await db.status()} == {3}
        assert [status.partition for status in await db.status()] == [0, 1, 2]

    text = (tmp_path / "default" / "p2" / "META").read_text()
    assert json.loads(text[text.index("{") :])["partitions"] == 3


async def test_waiting_for_writes_does_not_wait_for_those_made_meanwhile(tmp_path: Path) -> None:
    async with connect("local", data_dir=tmp_path) as database:
        rows = database.session("aidb://a/1").collection("rows")
        await rows.insert({"id": "a", "n": 0})

        async def write_on() -> None:
            while True:
                await rows.update("a", {"n": 1})

        writers = [asyncio.create_task(write_on()) for _ in range(3)]
        await rows.update("a", {"n": 2})
        async with asyncio.timeout(10):
            await database.partitions[0].drain()
            await database.aclose()
        for writer in writers:
            with pytest.raises(UnavailableError, match="closed"):
                await asyncio.wait_for(writer, 10)
