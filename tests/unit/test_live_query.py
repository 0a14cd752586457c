"""Live queries through a real store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel

from aidb_ray.contracts import AgentMessage
from aidb_ray.errors import NotReadyError, QueryError, SlowConsumerError
from aidb_ray.expressions import eq, synced
from aidb_ray.query import live as live_module
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.query.live import LiveQuery, filter_of, run_query
from aidb_ray.query.operators import Delta, Pipeline
from aidb_ray.store.changes import Insert
from aidb_ray.store.collection import Collection
from tests.stores import SESSION, Process, open_store, until


def open_rows(process: Process) -> LiveQuery[Any]:
    rows = process.collection("rows")
    return LiveQuery(
        process,
        lambda q: q.from_(r=rows).where(lambda r: eq(r.open, True)).order_by(lambda r: r.n),
    )


def encode(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


async def caught_up(process: Process) -> None:
    client = process.site.client
    await client.feed.reached((await client.status()).revision)


async def test_the_answer_follows_own_and_foreign_writes(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        rows = process.collection("rows")
        await other.insert([{"id": "a", "open": True, "n": 2}, {"id": "x", "open": False, "n": 0}])
        async with open_rows(process) as live:
            assert [row["id"] for row in live.rows] == ["a"]

            writing = rows.insert({"id": "b", "open": True, "n": 1})
            assert [row["id"] for row in live.rows] == ["b", "a"]
            await writing
            await other.update("x", {"open": True})
            await other.update("a", {"open": False})
            await caught_up(process)

            assert [row["id"] for row in live.rows] == ["x", "b"]
            assert live.row == {"id": "x", "open": True, "n": 0}


async def test_a_row_written_here_that_stops_passing_elsewhere_leaves(tmp_path: Path) -> None:
    """The store tells of it, for it passed; and tells nothing of later changes."""
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        rows = process.collection("rows")
        async with open_rows(process) as live:
            await rows.insert({"id": "a", "open": True, "n": 1})
            await other.update("a", {"open": False})
            await other.delete("a")
            await caught_up(process)
            assert live.rows == []


async def test_a_refused_write_leaves_the_answer(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        async with open_rows(process) as live:
            store.files.free = False
            writing = rows.insert({"id": "a", "open": True, "n": 1})
            assert len(live.rows) == 1
            with pytest.raises(Exception, match="No space"):
                await writing
            assert live.rows == []
            store.files.free = True


async def test_synced_rows_are_told_from_optimistic_ones(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        query = LiveQuery(process, lambda q: q.from_(r=rows).where(lambda r: synced(r)))
        async with query as live:
            store.files.hold_syncs()
            writing = rows.insert({"id": "a"})
            assert live.rows == []
            store.files.let_syncs_go()
            await writing
            assert live.rows == [{"id": "a"}]


async def test_each_reader_gets_the_rows_then_every_delta(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.insert({"id": "a", "open": True, "n": 1})
        live = open_rows(process)
        told: list[tuple[str, str]] = []

        async def follow() -> None:
            async for delta in live:
                told.append((delta.op, delta.row["id"]))  # noqa: PERF401  It is read meanwhile.

        following = asyncio.create_task(follow())
        await until(lambda: told)
        await rows.insert({"id": "b", "open": True, "n": 2})
        await rows.update("a", {"n": 5})
        await rows.update("b", {"open": False})
        await until(lambda: len(told) == 4)

        assert told == [("enter", "a"), ("enter", "b"), ("update", "a"), ("exit", "b")]
        await live.aclose()
        await following


async def test_a_reader_that_does_not_read_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "MAX_UNREAD_DELTAS", 10)
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.insert({"id": "first", "open": True, "n": -1})
        async with open_rows(process) as live:
            reading = aiter(live)
            assert (await anext(reading)).row["id"] == "first"
            for n in range(30):
                await rows.insert({"id": str(n), "open": True, "n": n})

            with pytest.raises(SlowConsumerError):
                await anext(reading)

            assert len(live.rows) == 31
            again: list[Delta[Any]] = []
            async for delta in live:
                again.append(delta)
                if len(again) == 31:
                    break


class Count(BaseModel):
    id: str
    n: int


async def test_a_row_that_its_type_cannot_hold_is_told_to_readers(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        typed = process.collection("rows", Count)
        live = LiveQuery(process, lambda q: q.from_(r=typed))
        await live.ready()
        reading = aiter(live)
        waiting = asyncio.ensure_future(anext(reading))
        await until(lambda: live._readers)

        await Process(store).collection("rows").insert({"id": "a", "n": "many"})
        delta = await waiting
        with pytest.raises(QueryError):
            _ = delta.row
        with pytest.raises(QueryError):
            _ = live.rows

        await live.aclose()


async def test_reading_too_early_and_from_a_closed_query_is_refused(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        live = open_rows(process)
        with pytest.raises(NotReadyError):
            _ = live.rows

        await live.aclose()

        with pytest.raises(NotReadyError):
            await live.ready()


def tasks_of_users(
    tasks: Collection[Any], users: Collection[Any]
) -> Callable[[QueryRoot], Query[dict[str, Any]]]:
    return lambda q: (
        q.from_(t=tasks)
        .left_join(u=users, on=lambda t, u: eq(t.by, u.id))
        .where(lambda t: eq(t.open, True))
        .select(lambda t, u: {"id": t.id, "name": u.name})
    )


async def test_a_commit_to_several_collections_is_seen_whole(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        other = Process(store).site.client
        query = tasks_of_users(process.collection("tasks"), process.collection("users"))
        async with LiveQuery(process, query) as live:
            told: list[tuple[str, Any]] = []

            async def follow() -> None:
                async for delta in live:
                    told.append((delta.op, delta.row))  # noqa: PERF401  It is read meanwhile.

            following = asyncio.create_task(follow())
            for n in range(5):
                task, user = f"t{n}", f"u{n}"
                await other.commit(
                    [
                        Insert(SESSION, "tasks", task, encode(id=task, by=user, open=True)),
                        Insert(SESSION, "users", user, encode(id=user, name=user.upper())),
                    ]
                )
            await until(lambda: len(told) >= 5)

            assert told == [("enter", {"id": f"t{n}", "name": f"U{n}"}) for n in range(5)]
        await following


async def test_own_writes_to_several_collections_are_seen_at_once(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        tasks, users = process.collection("tasks"), process.collection("users")
        async with LiveQuery(process, tasks_of_users(tasks, users)) as live:
            writing = tasks.insert({"id": "t", "by": "u", "open": True})
            assert live.rows == [{"id": "t", "name": None}]
            await users.insert({"id": "u", "name": "Ann"})
            await writing
            assert live.rows == [{"id": "t", "name": "Ann"}]


async def test_a_collection_that_is_read_twice_is_followed_once(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        rows = process.collection("rows")
        await rows.insert([{"id": "a", "next": "b"}, {"id": "b", "next": "a"}])
        query = LiveQuery(
            process,
            lambda q: (
                q.from_(x=rows)
                .inner_join(y=rows, on=lambda x, y: eq(x.next, y.id))
                .select(lambda x, y: {"x": x.id, "y": y.id})
            ),
        )
        async with query as live:
            assert live.rows == [{"x": "a", "y": "b"}, {"x": "b", "y": "a"}]
            assert len(live._views) == 1
            await Process(store).collection("rows").delete("a")
            await caught_up(process)
            assert live.rows == []


async def test_joins_reach_over_sessions(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        for session, name in (("aidb://s/1", "one"), ("aidb://s/2", "two")):
            await process.collection("notes", session=session).insert({"id": "n", "by": name})
        await process.collection("users").insert([{"id": "one", "name": "I"}])
        notes = process.collection("notes", session="aidb://s/*")
        users = process.collection("users")

        found: Any = await run_query(
            process,
            lambda q: (
                q.from_(n=notes)
                .left_join(u=users, on=lambda n, u: eq(n.by, u.id))
                .select(lambda n, u: {"by": n.by, "name": u.name})
            ),
        )

        assert found == [{"by": "one", "name": "I"}, {"by": "two", "name": None}]


async def test_a_query_over_several_collections_run_once_sees_own_writes(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        tasks, users = process.collection("tasks"), process.collection("users")
        query = tasks_of_users(tasks, users)
        await users.insert({"id": "u", "name": "Ann"})
        store.files.hold_syncs()
        tasks.insert({"id": "t", "by": "u", "open": True})
        await until(lambda: store.actor._taken)

        one = await run_query(process, lambda q: query(q).find_one())

        assert one == {"id": "t", "name": "Ann"}
        store.files.let_syncs_go()


async def test_a_query_run_once_sees_own_writes_and_no_ghosts(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process, other = Process(store), Process(store).collection("rows")
        rows = process.collection("rows")
        await rows.insert([{"id": key, "open": True} for key in "abc"])
        await other.delete("a")
        await other.update("b", {"open": False})
        store.files.hold_syncs()
        rows.insert({"id": "d", "open": True})
        await until(lambda: store.actor._taken)

        def still_open(q: QueryRoot) -> Any:
            return q.from_(r=rows).where(lambda r: eq(r.open, True))

        found: Any = await run_query(process, still_open)
        assert [row["id"] for row in found] == ["c", "d"]
        store.files.let_syncs_go()
        one = await run_query(process, lambda q: still_open(q).find_one())
        none = await run_query(
            process, lambda q: q.from_(r=rows).where(lambda r: eq(r.id, "?")).find_one()
        )
        assert (one, none) == ({"id": "c", "open": True}, None)


async def test_the_store_is_told_which_rows_matter(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        messages = process.collection("messages", AgentMessage, session="aidb://s/*")
        live = LiveQuery(
            process,
            lambda q: q.from_(m=messages).where(
                lambda m: eq(m.target_agent, "writer") & eq(m.processed, False)
            ),
        )

        (source,) = Pipeline(live.query).inputs
        wanted = filter_of(source)

        assert wanted.prefix == "aidb://s/"
        assert wanted.where == (("processed", (False,)), ("targetAgent", ("writer",)))
        await live.aclose()
