"""What executors promise, shown in one process, on a store that forgets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Collection,
    ConfigError,
    Database,
    Effect,
    EffectStatus,
    Happened,
    QueryError,
    Retry,
    ToolCall,
    ToolContext,
    ToolError,
    and_,
    answer,
    approve,
    connect,
    create_tool_execution_effect,
    declare_tool,
    eq,
    reject,
    synced,
    tool,
)
from aidb_ray.contracts import ToolCallStatus, utc_now
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.store.changes import Disown, Filter
from aidb_ray.store.claims import CLAIMS, ClaimRecord, Leases, decode_claim
from aidb_ray.store.collection import Change

URL = "aidb://shop/1"
SOON_S = 20


class Args(BaseModel):
    text: str = ""


work = declare_tool(name="work", description="Do it.", input_schema=Args)
approved_work = declare_tool(
    name="work", description="Do it.", input_schema=Args, needs_approval=True
)


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def calls(db: Database) -> Collection[ToolCall]:
    return db.session(URL).tool_calls


@pytest.fixture
async def other(db: Database) -> AsyncIterator[Database]:
    """A second connection to the same store, as another process has."""
    elsewhere = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    yield elsewhere
    for effect in list(elsewhere._effects):
        await effect.disconnect()
    for partition in elsewhere.partitions:
        await partition.aclose()


def start(
    calls: Collection[Any],
    function: Callable[..., Any] | None = None,
    *,
    query: Callable[[QueryRoot], Query[Any]] | None = None,
    **options: Any,
) -> Effect:
    def find_pending(q: QueryRoot) -> Query[Any]:
        return q.from_(tc=calls).where(lambda tc: and_(eq(tc.status, "pending"), synced(tc)))

    given: dict[str, Any] = {
        "query": query or find_pending,
        "tools": [work],
        "placement": "here",
    }
    if function is not None:
        given["implementations"] = {"work": function}
    return create_tool_execution_effect(**{**given, **options})


def pending(key: str, text: str = "", **fields: Any) -> dict[str, Any]:
    row = {"id": key, "generation_id": "g", "name": "work", "args": {"text": text}}
    return {**row, **fields}


async def until(rows: Collection[Any], key: str, test: Callable[[Any], bool]) -> Any:
    """Return a row once it passes."""
    found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def hear(changes: list[Change[Any]]) -> None:
        for change in changes:
            if change.key == key and not found.done() and test(change.after):
                found.set_result(change.after)

    subscribed = rows.subscribe(hear, include_initial_state=True)
    try:
        async with asyncio.timeout(SOON_S):
            return await found
    finally:
        subscribed.close()


async def ended(rows: Collection[Any], key: str) -> Any:
    return await until(rows, key, lambda row: row is not None and row.status.is_terminal)


async def executing(rows: Collection[Any], key: str) -> Any:
    return await until(rows, key, lambda row: row is not None and row.status == "executing")


async def claim_of(db: Database, key: str) -> ClaimRecord:
    _, rows = await db.site_of(URL).client.read(Filter(CLAIMS, URL))
    (record,) = [record for row in rows if (record := decode_claim(row.value)).row == key]
    return record


async def lose_claims(db: Database, effect: Effect) -> None:
    """End the lease of an executor, as the store does when its process has been killed."""
    for status in await effect.status():
        await db.site_of(URL).client.commit([Disown(status.holder)])


async def settled(effect: Effect, test: Callable[[EffectStatus], bool]) -> EffectStatus:
    """Return the status once it passes."""
    async with asyncio.timeout(SOON_S):
        while not test(status := (await effect.status())[0]):  # noqa: ASYNC110  It tells no one.
            await asyncio.sleep(0)
    return status


class Door:
    """Work that waits until it is let go, and counts."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.open = asyncio.Event()
        self.runs: list[int] = []
        self.cancelled = 0

    async def __call__(self, text: str, ctx: ToolContext) -> str:
        self.runs.append(ctx.attempt)
        self.began.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return text


async def echo(text: str) -> str:
    return text


@dataclass
class Returning:
    """A plain function, which runs in a thread, that returns this or raises that."""

    result: Any
    error: BaseException | None = None

    def __call__(self, text: str) -> Any:
        if self.error is not None:
            raise self.error
        return self.result


# Running.


async def test_pending_rows_are_run_and_ended(db: Database, calls: Collection[ToolCall]) -> None:
    await calls.insert(pending("before", "one"))
    async with start(calls, echo) as effect:
        await calls.insert(pending("after", "two"))
        first, second = await ended(calls, "before"), await ended(calls, "after")
        status = await settled(effect, lambda status: status.running == 0)

    assert (first.status, first.result, first.attempt) == ("completed", "one", 1)
    assert (second.status, second.result) == ("completed", "two")
    assert (status.finished, status.running, status.pending) == (2, 0, 0)
    record = await claim_of(db, "after")
    assert (record.state, record.attempt, record.orphaned) == ("done", 1, 0)


async def test_the_context_names_the_call(calls: Collection[ToolCall]) -> None:
    async def tell(text: str, ctx: ToolContext) -> list[Any]:
        return [ctx.idempotency_key, ctx.attempt, ctx.session.url, ctx.generation_id]

    await calls.insert(pending("a"))
    async with start(calls, tell):
        row = await ended(calls, "a")

    assert row.result == [f"{URL}/tool_calls/a", 1, URL, "g"]


@pytest.mark.parametrize(
    ("function", "args", "code"),
    [
        (Returning(None, ZeroDivisionError()), {}, "tool_error"),
        (Returning(None, SystemExit(3)), {}, "tool_crashed"),
        (Returning("x" * (2 << 20)), {}, "result_too_large"),
        (Returning(object()), {}, "not_serializable"),
        (echo, {"text": 5}, "invalid_args"),
        (echo, "no json", "invalid_args"),
    ],
)
async def test_a_tool_that_fails_leaves_a_clear_row_and_a_living_executor(
    calls: Collection[ToolCall], function: Any, args: Any, code: str
) -> None:
    await calls.insert(pending("bad", args=args))
    async with start(calls, function):
        row = await ended(calls, "bad")
        assert (row.status, row.error_code) == ("failed", code)
        assert row.error
        await calls.insert(pending("next", args={"text": 5}))
        assert (await ended(calls, "next")).error_code == "invalid_args"


async def test_rows_of_other_tools_are_left_to_others(calls: Collection[ToolCall]) -> None:
    await calls.insert(pending("theirs", name="another"))
    async with start(calls, echo):
        await calls.insert(pending("ours"))
        await ended(calls, "ours")

    theirs = await calls.find("theirs")
    assert theirs is not None
    assert theirs.status == "pending"


async def test_a_row_waits_for_its_time(calls: Collection[ToolCall]) -> None:
    later = utc_now() + timedelta(milliseconds=300)
    await calls.insert(pending("later", not_before=later))
    async with start(calls, echo):
        row = await ended(calls, "later")

    assert row.updated_at >= later


async def test_no_more_rows_run_at_once_than_may(calls: Collection[ToolCall]) -> None:
    running, most = 0, 0

    async def count(text: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await calls.insert([pending(str(n)) for n in range(30)])
    async with start(calls, count, max_running=3):
        for n in range(30):
            await ended(calls, str(n))

    assert 1 <= most <= 3


async def test_a_tool_that_raises_is_tried_again(calls: Collection[ToolCall]) -> None:
    tries: list[int] = []

    async def flaky(text: str, ctx: ToolContext) -> str:
        tries.append(ctx.attempt)
        if len(tries) < 3:
            raise OSError("not now")
        return await ctx.step("paid", lambda: "paid once")

    await calls.insert(pending("a"))
    retry = Retry(max_attempts=3, first_pause_ms=1, longest_pause_ms=1)
    async with start(calls, flaky, retry=retry):
        row = await ended(calls, "a")

    assert (row.status, row.result, tries) == ("completed", "paid once", [1, 2, 3])


async def test_what_a_tool_says_itself_is_not_tried_again(calls: Collection[ToolCall]) -> None:
    tries = 0

    async def refuse(text: str) -> None:
        nonlocal tries
        tries += 1
        raise ToolError("no such customer", code="no_customer")

    await calls.insert(pending("a"))
    async with start(calls, refuse, retry=Retry(max_attempts=5, first_pause_ms=1)):
        row = await ended(calls, "a")

    assert (row.error_code, tries) == ("no_customer", 1)


# Callbacks and rows of one's own.


@dataclass
class Job:
    id: str
    name: str
    args: dict[str, Any]
    status: str = "new"
    outcome: str | None = None


async def test_rows_and_statuses_may_be_the_users(db: Database) -> None:
    jobs = db.session(URL).collection("jobs", Job)
    audit = db.session(URL).collection("audit")

    def begin(job: Job) -> None:
        jobs.update(job.id, {"status": "busy"})

    def end(job: Job, result: Any) -> None:
        jobs.update(job.id, {"status": "ready", "outcome": result})
        audit.insert({"id": job.id, "saw": job.status})

    await jobs.insert({"id": "a", "name": "work", "args": {"text": "x"}})
    revisions: dict[str, int] = {}

    def note(changes: list[Change[Any]]) -> None:
        revisions.update({change.op + change.key: change.revision for change in changes})

    jobs.subscribe(note)
    audit.subscribe(note)
    async with start(
        jobs,
        echo,
        query=lambda q: q.from_(j=jobs).where(lambda j: eq(j.status, "new")),
        on_executing=begin,
        on_complete=end,
    ):
        job = await until(jobs, "a", lambda job: job.status == "ready")
        await until(audit, "a", lambda row: row is not None)

    assert job.outcome == "x"
    # The callback's writes are one commit, and were made on the row as `on_executing` left it.
    assert revisions["inserta"] == revisions["updatea"]
    found = await audit.find("a")
    assert found is not None
    assert found["saw"] == "busy"


async def test_a_callback_that_raises_fails_the_row(calls: Collection[ToolCall]) -> None:
    def broken(row: ToolCall, result: Any) -> None:
        calls.update(row.id, {"status": "completed"})
        raise KeyError("oops")

    await calls.insert(pending("a"))
    async with start(calls, echo, on_complete=broken):
        row = await ended(calls, "a")

    assert (row.status, row.error_code) == ("failed", "callback_failed")


async def test_callbacks_may_take_the_context(calls: Collection[ToolCall]) -> None:
    def end(row: ToolCall, result: Any, ctx: ToolContext) -> None:
        ctx.session.tool_calls.update(row.id, {"status": "completed", "result": ctx.attempt})

    await calls.insert(pending("a"))
    async with start(calls, echo, on_complete=end):
        assert (await ended(calls, "a")).result == 1


async def test_a_row_that_goes_on_matching_is_not_run_again(
    calls: Collection[ToolCall],
) -> None:
    runs = 0

    async def count(text: str) -> None:
        nonlocal runs
        runs += 1

    await calls.insert(pending("a"))

    def say_nothing(*_: Any) -> None:
        return None

    options: dict[str, Any] = {"on_executing": say_nothing, "on_complete": say_nothing}

    def find_all(q: QueryRoot) -> Query[Any]:
        return q.from_(tc=calls)

    async with start(calls, count, query=find_all, **options) as effect:
        await settled(effect, lambda status: status.finished == 1)
        await calls.update("a", {"args": {"text": "again"}})
        await settled(effect, lambda status: status.finished == 2)
    async with start(calls, count, query=find_all, **options) as effect:
        await calls.insert(pending("b"))
        await settled(effect, lambda status: status.finished == 1)
    assert runs == 3


async def test_a_query_may_join(db: Database, calls: Collection[ToolCall]) -> None:
    users = db.session(URL).collection("users")
    await users.insert([{"id": "ann", "vip": True}, {"id": "bob", "vip": False}])
    await calls.insert([pending("for-ann", agent="ann"), pending("for-bob", agent="bob")])

    def query(q: QueryRoot) -> Query[Any]:
        joined = q.from_(tc=calls).inner_join(u=users, on=lambda tc, u: eq(tc.agent, u.id))
        return joined.where(lambda tc, u: and_(eq(tc.status, "pending"), eq(u.vip, True)))

    async with start(calls, echo, query=query):
        await ended(calls, "for-ann")
        await users.update("bob", {"vip": True})
        await ended(calls, "for-bob")


# Sharing.


async def test_executors_share_a_queue_and_each_row_is_run_once(
    db: Database, other: Database, calls: Collection[ToolCall]
) -> None:
    runs: dict[str, list[str]] = {"one": [], "two": []}

    def runner(name: str) -> Callable[..., Any]:
        async def run(text: str) -> None:
            runs[name].append(text)
            await asyncio.sleep(0)

        return run

    await calls.insert([pending(str(n), str(n)) for n in range(200)])
    first = start(calls, runner("one"))
    second = start(other.session(URL).tool_calls, runner("two"), database=other)
    for n in range(200):
        await ended(calls, str(n))
    await first.aclose()
    await second.aclose()

    assert sorted(map(int, runs["one"] + runs["two"])) == list(range(200))
    assert runs["one"]
    assert runs["two"]


async def test_what_a_lost_process_left_is_taken_over_and_written_once(
    db: Database, other: Database, calls: Collection[ToolCall]
) -> None:
    first, second = Door(), Door()
    lost = start(calls, first)
    await calls.insert(pending("a", "x"))
    await executing(calls, "a")
    await first.began.wait()
    heir = start(other.session(URL).tool_calls, second, database=other)
    await heir.ready()

    await lose_claims(db, lost)
    await asyncio.wait_for(second.began.wait(), SOON_S)
    first.open.set()
    second.open.set()
    row = await ended(calls, "a")

    assert (row.status, row.attempt, row.in_doubt) == ("completed", 2, True)
    record = await claim_of(db, "a")
    assert (record.state, record.attempt, record.orphaned) == ("done", 2, 1)
    await lost.aclose()
    [status] = await heir.status()
    assert (status.finished, status.taken_over) == (1, 1)


async def test_an_executor_that_lost_its_lease_stops_what_it_runs_and_goes_on(
    db: Database, calls: Collection[ToolCall]
) -> None:
    door = Door()
    async with start(calls, door, lease_ms=600) as effect:
        await calls.insert(pending("a", "x"))
        await door.began.wait()
        door.began.clear()
        await lose_claims(db, effect)

        await asyncio.wait_for(door.began.wait(), SOON_S)
        door.open.set()
        row = await ended(calls, "a")

    assert (row.result, row.attempt, door.runs, door.cancelled) == ("x", 2, [1, 2], 1)


async def test_a_lease_is_renewed_while_work_lasts(
    db: Database, calls: Collection[ToolCall]
) -> None:
    door = Door()
    store: Any = db._refs[0]
    leases: Leases = store._host.actor._tables.leases
    async with start(calls, door, lease_ms=400) as effect:
        await calls.insert(pending("a"))
        await door.began.wait()
        await settled(effect, lambda _: leases.now_ms > 1_200)
        assert (await claim_of(db, "a")).state == "held"
        door.open.set()
        await ended(calls, "a")

    assert door.runs == [1]


async def test_closing_leaves_rows_for_others(db: Database, calls: Collection[ToolCall]) -> None:
    door = Door()
    effect = start(calls, door)
    await calls.insert(pending("a", "x"))
    await door.began.wait()

    await effect.aclose()

    assert (door.cancelled, (await claim_of(db, "a")).state) == (1, "orphan")
    async with start(calls, echo):
        row = await ended(calls, "a")
    assert (row.result, row.attempt) == ("x", 2)


async def test_what_a_process_left_is_found_on_the_disk(tmp_path: Path) -> None:
    """A whole process ends in the middle: the next one has its directory, and so its claims."""
    async with connect("local", data_dir=tmp_path) as db:
        calls = db.session(URL).tool_calls
        effect = start(calls, Door(), lease_ms=60_000)
        await calls.insert(pending("a", "x"))
        await executing(calls, "a")
        partition = db.partitions[0]
        # Nothing of the executor's end reaches the disk any more, as if it had been killed.
        partition.client._is_closed = True
        await effect.aclose()
    async with connect("local", data_dir=tmp_path) as db:
        calls = db.session(URL).tool_calls
        async with start(calls, echo):
            row = await ended(calls, "a")

    assert (row.result, row.attempt, row.in_doubt) == ("x", 2, True)


async def test_closing_while_a_row_is_being_claimed_gives_it_back(
    db: Database, calls: Collection[ToolCall]
) -> None:
    await calls.insert([pending(str(n)) for n in range(50)])
    for _ in range(3):
        effect = start(calls, Door(), max_running=50)
        await effect.ready()
        # Its claims are on their way.
        await effect.aclose()
    async with start(calls, echo, lease_ms=60_000):
        for n in range(50):
            row = await ended(calls, str(n))
            assert (row.status, row.in_doubt) == ("completed", False)


# Names and definitions.


async def test_an_effect_made_again_here_is_the_one_that_runs(calls: Collection[ToolCall]) -> None:
    door, other = Door(), Door()
    one = start(calls, door, placement="actor")
    await calls.insert(pending("a", "x"))
    await door.began.wait()
    two = start(calls, other, placement="actor")
    await two.ready()

    assert await one.actors() == await two.actors()
    door.open.set()
    assert (await ended(calls, "a")).result == "x"
    assert (door.runs, other.runs) == ([1], [])
    await two.aclose()


async def test_an_effect_of_another_definition_takes_over_here(
    calls: Collection[ToolCall],
) -> None:
    door = Door()
    one = start(calls, door, placement="actor")
    await calls.insert(pending("a", "x"))
    await door.began.wait()
    two = start(calls, echo, placement="actor", version="2")
    row = await ended(calls, "a")

    assert (row.result, row.attempt, door.cancelled) == ("x", 2, 1)
    await calls.insert([pending(str(n)) for n in range(20)])
    for n in range(20):
        await ended(calls, str(n))
    assert door.runs == [1]
    await one.aclose()
    await calls.insert(pending("b", "y"))
    assert (await ended(calls, "b")).result == "y"
    await two.aclose()


async def nothing(*_: Any) -> None:
    return None


CHANGES: list[dict[str, Any]] = [
    {"name": "other"},
    {"tools": [approved_work]},
    {"on_complete": nothing},
    {"on_executing": nothing},
    {"on_error": nothing},
    {"is_complete": bool},
    {"max_running": 1},
    {"lease_ms": 1_000},
    {"timeout_ms": 1_000},
    {"retry": Retry(max_attempts=2)},
    {"late_results": "mark"},
    {"on_in_doubt": "park"},
    {"processes": 2},
    {"version": "2"},
    {"ray_options": {"num_cpus": 2}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change))
async def test_the_fingerprint_tells_apart_what_works_otherwise(
    calls: Collection[ToolCall], change: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"name": "work", "placement": "actor"}
    one, two = start(calls, echo, **given), start(calls, echo, **{**given, **change})

    assert one._definition.fingerprint() != two._definition.fingerprint()


async def test_an_effect_of_many_tools_has_a_name(calls: Collection[ToolCall]) -> None:
    names = [f"a_tool_with_quite_a_long_name_{n}" for n in range(40)]
    tools = [declare_tool(name=n, description="", input_schema=Args) for n in names]
    effect = start(calls, tools=tools, implementations=dict.fromkeys(names, echo))

    await effect.ready()
    assert len(effect.name) < 100


# In doubt.


async def leave_in_the_middle(calls: Collection[ToolCall], *keys: str) -> None:
    async with start(calls, Door()) as effect:
        await calls.insert([pending(key, "x") for key in keys])
        await settled(effect, lambda status: status.running == len(keys))
        for key in keys:
            await executing(calls, key)


async def test_in_doubt_may_fail(calls: Collection[ToolCall]) -> None:
    await leave_in_the_middle(calls, "a")
    door = Door()
    async with start(calls, door, on_in_doubt="fail"):
        row = await ended(calls, "a")

    assert (row.status, row.error_code, door.runs) == ("failed", "in_doubt", [])


async def test_in_doubt_may_wait_for_a_person(calls: Collection[ToolCall]) -> None:
    await leave_in_the_middle(calls, "yes", "no", "done")
    async with start(calls, echo, on_in_doubt="park") as effect:
        await calls.insert(pending("another"))
        await ended(calls, "another")
        await settled(effect, lambda status: status.parked == 3)
        await reject(calls, "no", reason="It was sent.")
        await approve(calls, "yes")
        await calls.update("done", {"status": ToolCallStatus.COMPLETED, "result": "by hand"})
        no, yes, done = [await ended(calls, key) for key in ("no", "yes", "done")]
        await settled(effect, lambda status: status.pending == 0)

    assert (no.status, no.error_code, no.error) == ("failed", "rejected", "It was sent.")
    assert (yes.status, yes.result) == ("completed", "x")
    assert (done.status, done.result) == ("completed", "by hand")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Happened("as before"), ("completed", "as before", None)),
        (None, ("completed", "x", None)),
        ("what", ("failed", None, "in_doubt")),
        (ToolError("gone", code="lost"), ("failed", None, "lost")),
        (ValueError("unforeseen"), ("failed", None, "in_doubt")),
    ],
)
async def test_in_doubt_may_be_found_out(
    calls: Collection[ToolCall], said: Any, expected: tuple[Any, ...]
) -> None:
    await leave_in_the_middle(calls, "a")
    asked: list[str] = []

    async def reconcile(row: ToolCall, ctx: ToolContext) -> Any:
        asked.append(ctx.idempotency_key)
        if isinstance(said, Exception):
            raise said
        return said

    async with start(calls, echo, on_in_doubt=reconcile):
        row = await ended(calls, "a")

    assert (row.status, row.result, row.error_code) == expected
    assert asked == [f"{URL}/tool_calls/a"]


async def test_a_row_that_ends_its_processes_fails_in_the_end(
    db: Database, calls: Collection[ToolCall]
) -> None:
    door = Door()
    async with start(calls, door, lease_ms=300, retry=Retry(max_interruptions=4)) as effect:
        await calls.insert(pending("deadly"))
        for _ in range(4):
            await asyncio.wait_for(door.began.wait(), SOON_S)
            door.began.clear()
            await lose_claims(db, effect)
        row = await ended(calls, "deadly")

    assert (row.error_code, door.runs) == ("tool_crashed", [1, 2, 3, 4])


async def test_steps_and_questions_survive_the_process(
    db: Database, calls: Collection[ToolCall]
) -> None:
    effects: list[str] = []

    async def order(text: str, ctx: ToolContext) -> str:
        paid = await ctx.step("pay", lambda: effects.append("paid") or "receipt")
        size = await ctx.ask("Which size?", int)
        return f"{paid}, size {size}"

    questions = db.session(URL).questions
    key = f"{URL}/tool_calls/a:0"
    first = start(calls, order)
    await calls.insert(pending("a"))
    asked = await until(questions, key, lambda row: row is not None)
    await first.aclose()
    async with start(calls, order):
        with pytest.raises(Exception, match="does not fit"):
            await answer(questions, key, "large")
        await answer(questions, key, 42)
        row = await ended(calls, "a")

    assert (asked.question, asked.answer_schema) == ("Which size?", {"type": "integer"})
    assert (row.result, effects) == ("receipt, size 42", ["paid"])


# Approval.


@tool(needs_approval=True)
async def refund(text: str) -> str:
    """Give money back."""
    return f"refunded {text}"


async def test_calls_wait_for_approval_in_any_order(calls: Collection[ToolCall]) -> None:
    rows = [pending(key, key, name="refund", approval="needed") for key in "abc"]
    await calls.insert(rows)
    await calls.insert(pending("unmarked", "d", name="refund"))
    async with start(calls, tools=[refund]):
        await approve(calls, "c")
        assert (await ended(calls, "c")).result == "refunded c"
        await reject(calls, "a", reason="Too much.")
        rejected = await ended(calls, "a")
        still = await calls.find("b")
        unmarked = await calls.find("unmarked")

    assert (rejected.status, rejected.error_code, rejected.error) == (
        "failed",
        "rejected",
        "Too much.",
    )
    assert still is not None
    assert still.status == "pending"
    assert unmarked is not None
    assert unmarked.status == "pending"


# Stopping.


async def test_a_call_that_takes_too_long_fails_and_its_late_result_is_dropped(
    calls: Collection[ToolCall],
) -> None:
    door = Door()
    async with start(calls, door, timeout_ms=50):
        await calls.insert(pending("a"))
        row = await ended(calls, "a")

    assert (row.status, row.error_code, door.cancelled) == ("failed", "timeout", 1)


@pytest.mark.parametrize("policy", ["discard", "mark"])
async def test_what_a_thread_returns_too_late_follows_the_policy(
    calls: Collection[ToolCall], policy: str
) -> None:
    may_return = threading.Event()
    returned: list[bool] = []

    def slow(text: str, ctx: ToolContext) -> str:
        may_return.wait()
        returned.append(ctx.signal.is_aborted)
        return "late"

    async with start(calls, slow, timeout_ms=50, max_running=1, late_results=policy) as effect:
        await calls.insert(pending("a"))
        row = await ended(calls, "a")
        await calls.insert(pending("b"))
        # Its slot stays taken, since nobody can stop the thread.
        assert (await effect.status())[0].running == 1
        may_return.set()
        await ended(calls, "b")
        if policy == "mark":
            row = await until(calls, "a", lambda row: row.late_result is not None)
            assert row.late_result == "late"

    found = await calls.find("a")
    assert found is not None
    assert (row.status, row.error_code, found.result) == ("failed", "timeout", None)
    assert found.late_result == ("late" if policy == "mark" else None)
    assert returned[0]


async def test_cancelling_a_row_stops_its_work(db: Database, calls: Collection[ToolCall]) -> None:
    door = Door()
    async with start(calls, door) as effect:
        await calls.insert(pending("a"))
        await door.began.wait()
        await calls.update("a", {"status": ToolCallStatus.CANCELLED})
        await settled(effect, lambda status: door.cancelled == 1 and status.running == 0)

    row = await calls.find("a")
    assert row is not None
    assert (row.status, (await claim_of(db, "a")).state) == ("cancelled", "done")


@pytest.mark.parametrize("policy", ["discard", "mark"])
async def test_a_result_for_a_row_that_has_ended_meanwhile_is_late(
    calls: Collection[ToolCall], policy: str
) -> None:
    async def end_it(text: str, ctx: ToolContext) -> str:
        await calls.update(
            "a", {"status": ToolCallStatus.FAILED, "error": "by hand", "error_code": "by_hand"}
        )
        return "late"

    async with start(calls, end_it, late_results=policy) as effect:
        await calls.insert(pending("a"))
        await ended(calls, "a")
        await settled(effect, lambda status: status.running == 0)
        if policy == "mark":
            await until(calls, "a", lambda row: row.late_result == "late")
        [status] = await effect.status()

    row = await calls.find("a")
    assert row is not None
    assert (row.error_code, row.result, status.finished) == ("by_hand", None, 0)


async def test_a_row_that_changes_while_it_runs_keeps_that_change(
    calls: Collection[ToolCall],
) -> None:
    async def rename(text: str) -> str:
        await calls.update("a", {"agent": "someone"})
        return "done"

    async with start(calls, rename):
        await calls.insert(pending("a"))
        row = await ended(calls, "a")

    assert (row.agent, row.result, row.status) == ("someone", "done", "completed")


async def test_a_row_that_is_deleted_while_it_runs_is_forgotten(
    calls: Collection[ToolCall],
) -> None:
    door = Door()
    async with start(calls, door) as effect:
        await calls.insert(pending("a"))
        await door.began.wait()
        await calls.delete("a")
        door.open.set()
        await settled(effect, lambda status: status.running == 0)

    assert await calls.find("a") is None


# Mistakes.


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"implementations": {}}, "missing_implementation"),
        ({"implementations": {"work": echo, "wrok": echo}}, "missing_implementation"),
        ({"tools": [], "implementations": {}}, "missing_implementation"),
        ({"tools": [work, work]}, "duplicate_tool"),
        ({"max_running": 0}, "invalid_bound"),
        ({"lease_ms": 0}, "invalid_bound"),
        ({"timeout_ms": 0}, "invalid_bound"),
        ({"late_results": "keep"}, "invalid_option"),
        ({"on_in_doubt": "guess"}, "invalid_option"),
        ({"placement": "there"}, "invalid_option"),
        ({"processes": 2}, "invalid_option"),
        ({"name": "a/b"}, "invalid_name"),
    ],
)
async def test_a_wrong_definition_is_refused_at_once(
    calls: Collection[ToolCall], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        start(calls, echo, **options)
    assert raised.value.code == code


async def test_rows_must_meet_the_contract(db: Database) -> None:
    class Note(BaseModel):
        id: str
        status: str

    notes = db.session(URL).collection("notes", Note)
    with pytest.raises(ConfigError, match="name, args") as raised:
        start(notes, echo, query=lambda q: q.from_(n=notes))
    assert raised.value.code == "contract"


async def test_an_effect_works_on_whole_rows(calls: Collection[ToolCall]) -> None:
    with pytest.raises(QueryError):
        start(calls, echo, query=lambda q: q.from_(c=calls).select(lambda c: {"id": c.id}))
