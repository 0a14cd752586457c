"""How work on a row ends that does not go well: stopped, taken away, or with a wrong callback."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from typing_extensions import TypedDict

from aidb_ray import (
    Collection,
    Database,
    Effect,
    ToolCall,
    ToolContext,
    ToolError,
    approve,
    connect,
    eq,
)
from aidb_ray.contracts import ToolCallStatus
from aidb_ray.store.changes import Claim, Renew
from tests.unit.test_effects import (
    SOON_S,
    URL,
    Door,
    claim_of,
    echo,
    ended,
    leave_in_the_middle,
    lose_claims,
    pending,
    settled,
    start,
    until,
)


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def calls(db: Database) -> Collection[ToolCall]:
    return db.session(URL).tool_calls


@pytest.fixture
async def elsewhere(db: Database) -> AsyncIterator[Collection[ToolCall]]:
    """The same rows as another process has them."""
    database = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield database.session(URL).tool_calls
    for partition in database.partitions:
        await partition.aclose()


async def released(db: Database, key: str) -> None:
    async with asyncio.timeout(SOON_S):
        while (await claim_of(db, key)).state != "done":  # noqa: ASYNC110  It tells no one.
            await asyncio.sleep(0)


# Callbacks.


async def test_a_callback_may_delete_its_row(db: Database, calls: Collection[ToolCall]) -> None:
    door = Door()
    door.open.set()

    def on_complete(row: ToolCall, result: Any) -> None:
        calls.delete(row.id)

    async with start(calls, door, on_complete=on_complete) as effect:
        await calls.insert(pending("a"))
        await settled(effect, lambda status: status.finished == 1)

    assert (door.runs, await calls.find("a")) == ([1], None)


@pytest.mark.parametrize(("other", "code"), [("nobody", "not_found"), ("lock", "condition_failed")])
async def test_a_callback_that_cannot_write_another_row_fails_its_own(
    db: Database, calls: Collection[ToolCall], other: str, code: str
) -> None:
    door = Door()
    door.open.set()
    await calls.insert(pending("lock", name="lock"))

    def on_complete(row: ToolCall, result: Any) -> None:
        calls.update(row.id, {"status": "completed", "result": result})
        calls.update(other, {"agent": "x"}, when=lambda row: eq(row.name, "free"))

    async with start(calls, door, on_complete=on_complete):
        await calls.insert(pending("a"))
        row = await ended(calls, "a")

    assert (row.status, row.error_code, door.runs) == ("failed", code, [1])
    assert (await claim_of(db, "a")).state == "done"


async def test_an_on_executing_that_raises_fails_the_row(
    db: Database, calls: Collection[ToolCall]
) -> None:
    door = Door()

    def on_executing(row: ToolCall) -> None:
        raise ValueError("a mistake")

    async with start(calls, door, on_executing=on_executing):
        await calls.insert(pending("a"))
        row = await ended(calls, "a")

    assert (row.status, row.error_code, door.runs) == ("failed", "callback_failed", [])
    assert (await claim_of(db, "a")).state == "done"


async def test_a_callback_that_hangs_is_stopped(
    calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.effects.writing.CALLBACK_LIMIT_S", 0.05)

    async def on_complete(row: ToolCall, result: Any) -> None:
        await asyncio.Event().wait()

    async with start(calls, echo, on_complete=on_complete):
        await calls.insert(pending("a"))
        row = await ended(calls, "a")

    assert (row.status, row.error_code) == ("failed", "callback_failed")


async def test_a_row_that_a_callback_leaves_at_work_is_told_of(
    calls: Collection[ToolCall], caplog: pytest.LogCaptureFixture
) -> None:
    def on_complete(row: ToolCall, result: Any) -> None:
        return

    async with start(calls, echo, on_complete=on_complete) as effect:
        await calls.insert(pending("a"))
        await settled(effect, lambda status: status.finished == 1)

    assert "left 'a' as 'executing'" in caplog.text


async def test_an_is_complete_that_raises_leaves_the_row_alone_and_others_go_on(
    calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.effects.loop.FAILURE_PAUSE_MS", 0)
    door = Door()
    door.open.set()
    asked: list[str] = []

    def is_complete(row: ToolCall) -> bool:
        if row.agent == "unknown":
            asked.append(row.id)
            raise ValueError(row.agent)
        return False

    async with start(calls, door, is_complete=is_complete) as effect:
        await calls.insert([pending("a", agent="unknown"), pending("b")])
        await ended(calls, "b")
        await calls.insert(pending("c"))
        await ended(calls, "c")
        await settled(effect, lambda status: status.running == 0)
        assert (door.runs, asked) == ([1, 1], ["a"])
        await calls.update("a", {"agent": "known"})
        await ended(calls, "a")


# Stops.


async def in_doubt(calls: Collection[ToolCall], asked: Door, **options: Any) -> tuple[Effect, Door]:
    """Return an effect that asks what became of row `a`, and its tool."""

    async def reconcile(row: ToolCall, ctx: ToolContext) -> None:
        await asked("", ctx)

    await leave_in_the_middle(calls, "a")
    door = Door()
    door.open.set()
    return start(calls, door, on_in_doubt=reconcile, **options), door


async def test_a_cancel_stops_a_reconcile_function(
    db: Database, calls: Collection[ToolCall]
) -> None:
    asked = Door()
    effect, door = await in_doubt(calls, asked)
    async with effect:
        await asyncio.wait_for(asked.began.wait(), SOON_S)
        await calls.update("a", {"status": ToolCallStatus.CANCELLED})
        await settled(effect, lambda status: status.running == 0)

    assert (asked.cancelled, door.runs) == (1, [])
    assert (await claim_of(db, "a")).state == "done"


async def test_closing_stops_a_reconcile_function(
    db: Database, calls: Collection[ToolCall]
) -> None:
    asked = Door()
    effect, _ = await in_doubt(calls, asked)
    async with effect:
        await asyncio.wait_for(asked.began.wait(), SOON_S)

    assert (asked.cancelled, (await claim_of(db, "a")).state) == (1, "orphan")


async def test_a_reconcile_function_has_as_much_time_as_a_call(
    calls: Collection[ToolCall],
) -> None:
    asked = Door()
    effect, door = await in_doubt(calls, asked, timeout_ms=50)
    async with effect:
        row = await ended(calls, "a")

    assert (row.error_code, asked.cancelled, door.runs) == ("in_doubt", 1, [])


async def test_closing_stops_a_callback(db: Database, calls: Collection[ToolCall]) -> None:
    asked = Door()

    async def on_error(row: ToolCall, error: ToolError, ctx: ToolContext) -> None:
        await asked("", ctx)

    await leave_in_the_middle(calls, "a")
    async with start(calls, echo, on_error=on_error, on_in_doubt="fail"):
        await asyncio.wait_for(asked.began.wait(), SOON_S)

    assert (asked.cancelled, (await claim_of(db, "a")).state) == (1, "orphan")


async def test_work_that_takes_no_cancel_keeps_nobody_from_closing(
    calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.effects.loop.ABANDON_S", 0.05)
    began, end = asyncio.Event(), asyncio.Event()

    async def stubborn(text: str) -> str:
        began.set()
        while not end.is_set():
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue
        return text

    effect = start(calls, stubborn, grace_ms=50)
    await calls.insert(pending("a"))
    await began.wait()
    await asyncio.wait_for(effect.aclose(), SOON_S)
    end.set()


async def test_a_cancel_is_heard_that_comes_while_the_claim_is_answered(
    db: Database, calls: Collection[ToolCall], elsewhere: Collection[ToolCall]
) -> None:
    client = db.site_of(URL).client
    deliver, answer, claimed = client._deliver, asyncio.Event(), asyncio.Event()

    async def hold_back(tasks: Any) -> Any:
        answered = await deliver(tasks)
        if any(isinstance(each, Claim) for task in tasks for each in task.commit.mutations):
            claimed.set()
            await answer.wait()
        return answered

    door = Door()
    async with start(calls, door):
        client._deliver = hold_back  # pyright: ignore[reportAttributeAccessIssue]
        await elsewhere.insert(pending("a"))
        await asyncio.wait_for(claimed.wait(), SOON_S)
        await elsewhere.update("a", {"status": ToolCallStatus.CANCELLED})
        heard = await elsewhere.find("a")
        assert heard is not None
        await client.feed.reached((await db.status())[0].revision)
        answer.set()
        await released(db, "a")

    assert door.runs == []


async def test_a_cancel_is_heard_that_the_feed_has_lost(
    db: Database, calls: Collection[ToolCall]
) -> None:
    feed = db.site_of(URL).client.feed
    ask, lost = feed._ask, list[int]()

    async def lossy(*args: Any, **options: Any) -> Any:
        answer = await ask(*args, **options)
        if not lost and any(b'"cancelled"' in (c.value or b"") for c in answer.changes):
            lost.append(1)
            return msgspec.structs.replace(answer, lost=1, changes=[])
        return answer

    feed._ask = lossy  # pyright: ignore[reportAttributeAccessIssue]
    door = Door()
    async with start(calls, door) as effect:
        await calls.insert(pending("a"))
        await door.began.wait()
        await calls.update("a", {"status": ToolCallStatus.CANCELLED})
        await settled(effect, lambda status: status.running == 0)

    assert (lost, door.cancelled) == ([1], 1)


# What was taken away, or put back.


async def test_a_row_that_is_inserted_again_while_its_work_runs_is_run(
    calls: Collection[ToolCall],
) -> None:
    door = Door()
    async with start(calls, door):
        await calls.insert(pending("a", "old"))
        await door.began.wait()
        await calls.delete("a")
        await calls.insert(pending("a", "new"))
        door.open.set()
        row = await ended(calls, "a")

    assert (row.result, len(door.runs)) == ("new", 2)


async def test_a_row_that_is_set_back_while_the_feed_lags_gets_its_result(
    db: Database, calls: Collection[ToolCall], elsewhere: Collection[ToolCall]
) -> None:
    feed = db.site_of(URL).client.feed
    ask, may_tell = feed._ask, asyncio.Event()
    may_tell.set()

    async def late(*args: Any, **options: Any) -> Any:
        answer = await ask(*args, **options)
        await may_tell.wait()
        return answer

    feed._ask = late  # pyright: ignore[reportAttributeAccessIssue]

    async def set_back(text: str) -> str:
        may_tell.clear()
        await elsewhere.update("a", {"status": ToolCallStatus.PENDING})
        # Told only when the end of the work has found the row changed.
        asyncio.get_running_loop().call_later(0.1, may_tell.set)
        return text

    async with start(calls, set_back):
        await calls.insert(pending("a", "x"))
        row = await until(elsewhere, "a", lambda row: row is not None and row.status.is_terminal)

    assert (row.status, row.result, row.attempt) == ("completed", "x", 1)


async def test_closing_while_an_orphan_is_being_claimed_leaves_an_orphan(
    db: Database, calls: Collection[ToolCall]
) -> None:
    await leave_in_the_middle(calls, "a")
    client = db.site_of(URL).client
    commit, claiming = client.commit, asyncio.Event()

    def hear(mutations: Any, **options: Any) -> Any:
        if any(isinstance(each, Claim) for each in mutations):
            claiming.set()
        return commit(mutations, **options)

    client.commit = hear  # pyright: ignore[reportAttributeAccessIssue]
    effect = start(calls, echo)
    await asyncio.wait_for(claiming.wait(), SOON_S)
    await effect.aclose()

    assert (await claim_of(db, "a")).state == "orphan"
    async with start(calls, echo):
        assert (await ended(calls, "a")).status == "completed"


async def test_work_whose_claim_was_lost_is_told_before_it_renews(
    db: Database, calls: Collection[ToolCall]
) -> None:
    door = Door()
    async with start(calls, door, lease_ms=600_000) as effect:
        await calls.insert(pending("a"))
        await door.began.wait()
        await lose_claims(db, effect)
        await settled(effect, lambda status: door.cancelled == 1)


async def test_as_many_plain_functions_run_at_once_as_may(calls: Collection[ToolCall]) -> None:
    all_there = threading.Barrier(24, timeout=SOON_S)

    def meet(text: str) -> None:
        all_there.wait()

    async with start(calls, meet, max_running=24):
        await calls.insert([pending(str(n)) for n in range(24)])
        ends = {(await ended(calls, str(n))).status for n in range(24)}

    assert ends == {"completed"}


@pytest.mark.parametrize("policy", ["park", "fail"])
async def test_a_result_that_comes_after_closing_is_no_word_about_the_row(
    calls: Collection[ToolCall], policy: str
) -> None:
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(text: str, ctx: ToolContext) -> str:
        loop.call_soon_threadsafe(began.set)
        while not ctx.signal.is_aborted:
            time.sleep(0.001)
        return "late"

    async with start(calls, slow, late_results="mark", on_in_doubt=policy):
        await calls.insert(pending("a"))
        await began.wait()
    door = Door()
    async with start(calls, door, late_results="mark", on_in_doubt=policy) as effect:
        if policy == "park":
            await settled(effect, lambda status: status.parked == 1)
        else:
            assert (await ended(calls, "a")).error_code == "in_doubt"

    row = await calls.find("a")
    assert row is not None
    assert (row.late_result, door.runs) == (None, [])


@pytest.mark.parametrize("policy", ["fail", "reconcile"])
async def test_a_change_that_leaves_the_status_is_no_word_about_the_row(
    calls: Collection[ToolCall], policy: str
) -> None:
    await leave_in_the_middle(calls, "a")
    await calls.update("a", {"agent": "someone"})
    door = Door()

    def reconcile(row: ToolCall) -> None:
        raise ToolError("not known", code="in_doubt")

    async with start(calls, door, on_in_doubt=reconcile if policy == "reconcile" else policy):
        assert (await ended(calls, "a")).error_code == "in_doubt"
    assert door.runs == []


# Many rows.


async def test_a_suspect_has_its_turn_beside_a_busy_queue(calls: Collection[ToolCall]) -> None:
    await leave_in_the_middle(calls, "suspect")
    for _ in range(2):
        door = Door()
        async with start(calls, door):
            await asyncio.wait_for(door.began.wait(), SOON_S)
    order: list[str] = []

    async def work(text: str) -> None:
        order.append(text)
        await asyncio.sleep(0)

    await calls.insert([pending(f"r{n}", f"r{n}") for n in range(200)])
    async with start(calls, work):
        await ended(calls, "suspect")

    assert order.index("x") < 50  # So its text is.


async def test_a_suspect_does_not_wait_for_ever_for_what_hangs(
    calls: Collection[ToolCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aidb_ray.effects.loop.ALONE_LIMIT_S", 0.05)
    await leave_in_the_middle(calls, "suspect")
    for _ in range(2):
        door = Door()
        async with start(calls, door):
            await asyncio.wait_for(door.began.wait(), SOON_S)
    hung = Door()

    async def work(text: str, ctx: ToolContext) -> str:
        return await hung(text, ctx) if text == "hangs" else text

    async with start(calls, work, on_in_doubt="park") as effect:
        await settled(effect, lambda status: status.parked == 1)
        await calls.insert(pending("hung", "hangs"))
        await hung.began.wait()
        await approve(calls, "suspect")
        assert (await ended(calls, "suspect")).status == "completed"
        assert hung.cancelled == 0


class Order(TypedDict):
    order_id: str
    id: str
    name: str
    status: str
    args: dict[str, Any]


class Job(TypedDict, total=False):
    id: str
    name: str
    status: str
    args: dict[str, Any]
    not_before: str


async def test_a_row_with_a_wrong_time_keeps_others_from_nothing(db: Database) -> None:
    jobs = db.session(URL).collection("jobs", Job)
    job: Job = {"name": "work", "status": "pending", "args": {}}
    async with start(jobs, echo):
        await jobs.insert(
            [{**job, "id": "a"}, {**job, "id": "b", "not_before": "tomorrow"}, {**job, "id": "c"}]
        )
        for key in ("a", "c"):
            await until(jobs, key, lambda row: row is not None and row["status"] == "completed")

    assert (await jobs.find("b") or {}).get("status") == "pending"


async def test_parked_rows_hear_only_of_themselves(
    db: Database, calls: Collection[ToolCall]
) -> None:
    await leave_in_the_middle(calls, "a", "b")
    await calls.insert(pending("other", name="other"))
    feed = db.site_of(URL).client.feed
    async with start(calls, echo, on_in_doubt="park") as effect:
        await settled(effect, lambda status: status.parked == 2)
        subscribe, begun = feed.subscribe, list[Any]()

        def hear(wanted: Any, *args: Any, **options: Any) -> Any:
            begun.append(wanted)
            return subscribe(wanted, *args, **options)

        feed.subscribe = hear  # pyright: ignore[reportAttributeAccessIssue]
        for n in range(5):
            await calls.update("other", {"agent": str(n)})
        await feed.reached((await db.status())[0].revision)
        assert ((await effect.status())[0].parked, begun) == (2, [])


async def test_rows_with_a_key_of_another_name_can_be_parked(db: Database) -> None:
    orders = db.session(URL).collection("orders", Order, key="order_id")
    order: Order = {"order_id": "a", "id": "-", "name": "work", "status": "pending", "args": {}}
    door = Door()
    async with start(orders, door):
        await orders.insert(order)
        await door.began.wait()
    async with start(orders, echo, on_in_doubt="park") as effect:
        await settled(effect, lambda status: status.parked == 1)
        await orders.update("a", {"args": {"text": "again"}})
        await until(orders, "a", lambda row: row is not None and row["status"] == "completed")


async def test_one_partition_that_does_not_answer_costs_no_lease_in_another() -> None:
    async with connect("local", durability="memory", partitions=2) as db:
        urls = [
            next(
                url
                for n in range(100)
                if db.site_of(url := f"aidb://shop/{n}") is db.partitions[index]
            )
            for index in range(2)
        ]
        door = Door()
        rows = db.collection("tool_calls", ToolCall, session="aidb://shop/*")
        async with start(rows, door, database=db, lease_ms=300) as effect:
            for url in urls:
                await db.session(url).tool_calls.insert(pending("a"))
            await settled(effect, lambda status: status.running == 2)
            silent, healthy = db.partitions[0].client, db.partitions[1].client
            commit, renew = silent.commit, healthy.commit
            never = asyncio.get_running_loop().create_future()
            renewed = asyncio.Event()
            count = 0

            def hold_back(mutations: Any, **options: Any) -> Any:
                is_renewal = any(isinstance(each, Renew) for each in mutations)
                return never if is_renewal else commit(mutations, **options)

            def hear(mutations: Any, **options: Any) -> Any:
                nonlocal count
                count += any(isinstance(each, Renew) for each in mutations)
                if count == 3:
                    renewed.set()
                return renew(mutations, **options)

            silent.commit = hold_back  # pyright: ignore[reportAttributeAccessIssue]
            healthy.commit = hear  # pyright: ignore[reportAttributeAccessIssue]
            await asyncio.wait_for(renewed.wait(), SOON_S)
            never.cancel()
            silent.commit = commit
