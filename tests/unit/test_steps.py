"""Steps and questions of one piece of work: what is done once, asked once, and refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray.contracts import MAX_KEY_LENGTH, Question, Step
from aidb_ray.effects.decisions import answer
from aidb_ray.effects.record import WorkRecord
from aidb_ray.errors import (
    ConflictError,
    ContractError,
    FencedError,
    KeyMissingError,
    ToolError,
)
from aidb_ray.models.tools import MAX_RESULT_BYTES, ToolContext
from aidb_ray.store.changes import ClaimBuckets, Filter, Insert, Mutation, Runner
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Collection
from tests.stores import SESSION, Process, Store, open_store, until

OWNER = "g:0:0"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(tmp_path) as opened:
        yield opened


@pytest.fixture
def client(store: Store) -> StoreClient:
    return store.client()


@pytest.fixture
def questions(store: Store) -> Collection[Question]:
    return Process(store).collection("questions", Question)


@pytest.fixture
def steps(store: Store) -> Collection[Step]:
    return Process(store).collection("steps", Step)


def attempt(client: StoreClient, owner: str = OWNER, **options: Any) -> WorkRecord:
    """Return the record of a fresh attempt, which knows only what is stored."""
    return WorkRecord(client, SESSION, owner, client.commit, agent="echo", **options)


class Counting:
    """A function that counts its runs."""

    def __init__(self, result: Any = None, error: Exception | None = None) -> None:
        self.runs = 0
        self.result = result
        self.error = error

    def __call__(self) -> Any:
        self.runs += 1
        if self.error is not None:
            raise self.error
        return self.result


async def refused(work: Any) -> ToolError:
    with pytest.raises(ToolError) as raised:
        await work
    return raised.value


# Steps.


async def test_a_step_runs_once_over_all_attempts(
    client: StoreClient, steps: Collection[Step]
) -> None:
    work = Counting({"paid": 3})

    first = await attempt(client, is_first=True).step("pay", work)
    second = await attempt(client).step("pay", work)

    assert first == second == {"paid": 3}
    assert work.runs == 1
    stored = await steps.find(f"{OWNER}:pay")
    assert stored is not None
    assert (stored.owner, stored.name, stored.result) == (OWNER, "pay", {"paid": 3})


async def test_a_later_attempt_goes_on_after_the_last_recorded_step(client: StoreClient) -> None:
    before = attempt(client)
    await before.step("one", Counting(1))
    await before.step("two", Counting(2))
    again = attempt(client)
    one, two, three = Counting(10), Counting(20), Counting(30)

    named = {"one": one, "two": two, "three": three}
    found = [await again.step(name, fn) for name, fn in named.items()]

    assert found == [1, 2, 30]
    assert [one.runs, two.runs, three.runs] == [0, 0, 1]


async def test_the_steps_of_two_calls_have_nothing_to_do_with_each_other(
    client: StoreClient,
) -> None:
    mine, other = Counting("mine"), Counting("other")

    await attempt(client, "g:0:1").step("pay", mine)

    assert await attempt(client, "g:0:10").step("pay", other) == "other"
    assert await attempt(client, "g:0:1").step("pay", other) == "mine"
    assert (mine.runs, other.runs) == (1, 1)


async def test_a_coroutine_function_and_what_returns_an_awaitable_are_awaited(
    client: StoreClient,
) -> None:
    record = attempt(client)

    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await record.step("async", work) == 7
    assert await record.step("lambda", lambda: work()) == 7


class Paid(BaseModel):
    amount: int


@pytest.mark.parametrize(
    ("result", "plain"),
    [
        (None, None),
        (Paid(amount=3), {"amount": 3}),
        ((1, 2), [1, 2]),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        ("\x1e\u00e4", "\x1e\u00e4"),
    ],
)
async def test_the_first_attempt_is_given_what_later_ones_are(
    client: StoreClient, result: Any, plain: Any
) -> None:
    first = await attempt(client).step("s", lambda: result)
    later = await attempt(client).step("s", lambda: result)

    assert first == later == plain
    assert type(first) is type(later) is type(plain)


async def test_a_step_is_durable_before_it_returns(store: Store, client: StoreClient) -> None:
    work = Counting(1)
    await attempt(client).step("before", Counting(0))
    store.files.hold_syncs()

    stepping = asyncio.create_task(attempt(client, is_first=True).step("s", work))
    await until(lambda: store.actor._taken)

    assert work.runs == 1
    assert not stepping.done()
    store.files.let_syncs_go()
    assert await stepping == 1


async def test_steps_may_run_side_by_side(client: StoreClient) -> None:
    record = attempt(client)
    both = asyncio.Barrier(2)

    async def work(name: str) -> str:
        await both.wait()
        return name

    found = await asyncio.gather(*(record.step(n, lambda n=n: work(n)) for n in ("a", "b")))

    assert found == ["a", "b"]


async def test_a_name_is_used_once_in_a_call(client: StoreClient) -> None:
    record = attempt(client)
    work = Counting(1)
    await record.step("pay", work)

    assert (await refused(record.step("pay", work))).code == "duplicate_step"
    assert work.runs == 1


async def test_a_name_that_is_running_is_refused(client: StoreClient) -> None:
    record = attempt(client)
    door = asyncio.Event()
    running = asyncio.create_task(record.step("pay", door.wait))
    await asyncio.sleep(0)

    assert (await refused(record.step("pay", Counting()))).code == "duplicate_step"
    door.set()
    assert await running is True


async def test_what_a_step_raises_is_raised_and_it_may_be_tried_again(
    client: StoreClient, steps: Collection[Step]
) -> None:
    record = attempt(client)

    with pytest.raises(RuntimeError, match="declined"):
        await record.step("pay", Counting(error=RuntimeError("declined")))
    assert await steps.find(f"{OWNER}:pay") is None

    assert await record.step("pay", Counting(3)) == 3


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (object(), "not_serializable"),
        (float("nan"), "not_serializable"),
        ("\ud800", "not_serializable"),
        (1 << 70, "not_serializable"),
        (iter([1]), "not_serializable"),
        ("x" * MAX_RESULT_BYTES, "result_too_large"),
    ],
    ids=["object", "nan", "surrogate", "huge int", "iterator", "large"],
)
async def test_a_result_that_cannot_be_kept_is_refused(
    client: StoreClient, steps: Collection[Step], result: Any, code: str
) -> None:
    error = await refused(attempt(client).step("s", lambda: result))

    assert error.code == code
    assert "step 's'" in str(error)
    assert await steps.find(f"{OWNER}:s") is None


async def test_the_largest_result_that_is_allowed_is_kept(client: StoreClient) -> None:
    text = "x" * (MAX_RESULT_BYTES - 2)

    assert await attempt(client).step("s", lambda: text) == text
    assert await attempt(client).step("s", Counting()) == text


@pytest.mark.parametrize(
    "name",
    ["", "a\0b", "\ud800", "x" * (MAX_KEY_LENGTH - len(OWNER))],
    ids=["empty", "nul", "surrogate", "long"],
)
async def test_a_name_that_cannot_be_a_key_is_refused_before_anything_runs(
    client: StoreClient, name: str
) -> None:
    work = Counting()

    assert (await refused(attempt(client).step(name, work))).code == "invalid_step"
    assert work.runs == 0


async def test_the_longest_name_that_is_allowed_is_kept(client: StoreClient) -> None:
    name = "x" * (MAX_KEY_LENGTH - len(OWNER) - 1)

    await attempt(client).step(name, Counting(1))

    assert await attempt(client).step(name, Counting(2)) == 1


async def test_a_coroutine_in_the_place_of_a_function_is_refused_and_closed(
    client: StoreClient,
) -> None:
    async def work() -> None:
        raise AssertionError

    wrong: Any = work()

    # A coroutine that nobody awaits would be a warning, which is an error here.
    assert (await refused(attempt(client).step("s", wrong))).code == "invalid_step"


async def test_a_step_that_is_cancelled_is_not_recorded(
    client: StoreClient, steps: Collection[Step]
) -> None:
    record = attempt(client)
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    stepping = asyncio.create_task(record.step("s", work))
    await started.wait()
    stepping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stepping

    assert await steps.find(f"{OWNER}:s") is None
    assert await attempt(client).step("s", Counting(1)) == 1


async def test_a_step_that_is_cancelled_while_it_is_written_is_recorded(
    store: Store, client: StoreClient
) -> None:
    record = attempt(client, is_first=True)
    await attempt(client).step("before", Counting(0))
    store.files.hold_syncs()
    stepping = asyncio.create_task(record.step("s", Counting(1)))
    await until(lambda: store.actor._taken)

    stepping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stepping
    store.files.let_syncs_go()

    assert await attempt(client).step("s", Counting(2)) == 1


async def test_what_an_earlier_attempt_wrote_late_counts(client: StoreClient) -> None:
    late = attempt(client)
    now = attempt(client, is_first=True)
    work = Counting("now")

    await late.step("s", Counting("late"))

    assert await now.step("s", work) == "late"
    assert work.runs == 1


async def test_who_lost_the_work_records_nothing(
    client: StoreClient, steps: Collection[Step]
) -> None:
    epoch = await client.commit([ClaimBuckets("echo", 0, 4096)])
    await client.commit([ClaimBuckets("echo", 0, 4096)])

    def write(mutations: Sequence[Mutation]) -> asyncio.Future[int]:
        return client.commit(mutations, runner=Runner("echo", epoch))

    record = WorkRecord(client, SESSION, OWNER, write)

    with pytest.raises(FencedError):
        await record.step("s", Counting(1))
    with pytest.raises(FencedError):
        await record.ask("Really?")
    assert await steps.find(f"{OWNER}:s") is None


async def test_what_is_recorded_outlives_the_store(store: Store, client: StoreClient) -> None:
    await attempt(client).step("s", Counting(1))

    await store.restart()

    assert await attempt(client).step("s", Counting(2)) == 1


async def test_without_a_session_nothing_is_kept() -> None:
    context = ToolContext()

    assert (await refused(context.step("s", Counting()))).code == "not_durable"
    assert (await refused(context.ask("Really?"))).code == "not_durable"


# Questions.


async def asked(questions: Collection[Question], key: str) -> Question:
    """Wait until a question is there."""
    found: Question | None = None
    async for change in questions.changes(since=0):
        if change.key == key:
            found = change.after
            break
    assert found is not None
    return found


async def test_an_answer_from_elsewhere_ends_the_wait(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("How much?", int))

    question = await asked(questions, f"{OWNER}:0")
    assert (question.question, question.owner, question.agent) == ("How much?", OWNER, "echo")
    assert question.answer_schema == {"type": "integer"}
    assert not asking.done()
    await answer(questions, question.id, 3)

    assert await asking == 3


async def test_a_question_is_asked_once_and_its_answer_is_found_again(
    client: StoreClient, questions: Collection[Question]
) -> None:
    first = asyncio.create_task(attempt(client).ask("How much?", int))
    await asked(questions, f"{OWNER}:0")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await answer(questions, f"{OWNER}:0", 3)

    assert await attempt(client).ask("How much?", int) == 3
    _, rows = await client.read(Filter("questions", SESSION))
    assert len(rows) == 1


async def test_many_questions_are_open_at_once_and_answered_in_any_order(
    client: StoreClient, questions: Collection[Question]
) -> None:
    record = attempt(client)
    asking = [asyncio.create_task(record.ask(f"Number {n}?")) for n in range(3)]
    for n in range(3):
        assert (await asked(questions, f"{OWNER}:{n}")).question == f"Number {n}?"

    for n in (2, 0, 1):
        await answer(questions, f"{OWNER}:{n}", n)
        assert await asking[n] == n


async def test_an_open_question_outlives_the_store(
    store: Store, client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Really?"))
    await asked(questions, f"{OWNER}:0")

    await store.restart()
    await answer(questions, f"{OWNER}:0", "yes")

    assert await asking == "yes"


async def test_the_type_of_the_answer_is_that_of_the_schema(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Pay?", Paid))
    await asked(questions, f"{OWNER}:0")
    await answer(questions, f"{OWNER}:0", {"amount": 3})

    assert await asking == Paid(amount=3)


async def test_an_answer_that_does_not_fit_is_refused_where_it_is_given(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Pay?", Paid))
    await asked(questions, f"{OWNER}:0")

    with pytest.raises(ContractError) as raised:
        await answer(questions, f"{OWNER}:0", {"amount": "much"})

    assert (raised.value.code, raised.value.loc) == ("invalid_answer", ("answer", "amount"))
    await answer(questions, f"{OWNER}:0", {"amount": 3})
    assert await asking == Paid(amount=3)


async def test_only_the_first_answer_counts(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Really?"))
    await asked(questions, f"{OWNER}:0")
    await answer(questions, f"{OWNER}:0", "yes")

    with pytest.raises(ConflictError) as raised:
        await answer(questions, f"{OWNER}:0", "no")

    assert raised.value.code == "condition_failed"
    assert await asking == "yes"


async def test_a_question_that_nobody_asked_cannot_be_answered(
    questions: Collection[Question],
) -> None:
    with pytest.raises(KeyMissingError):
        await answer(questions, "nobody:0", "yes")


async def test_an_answer_that_was_given_past_the_check_does_not_get_through(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Pay?", Paid))
    await asked(questions, f"{OWNER}:0")

    await questions.update(f"{OWNER}:0", {"status": "answered", "answer": "much"})

    assert (await refused(asking)).code == "invalid_answer"


async def test_a_question_that_is_deleted_is_withdrawn(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Really?"))
    await asked(questions, f"{OWNER}:0")

    await questions.delete(f"{OWNER}:0")

    assert (await refused(asking)).code == "question_withdrawn"


async def test_an_answer_to_another_question_is_not_taken(
    client: StoreClient, questions: Collection[Question]
) -> None:
    first = asyncio.create_task(attempt(client).ask("Delete a?"))
    await asked(questions, f"{OWNER}:0")
    await answer(questions, f"{OWNER}:0", "yes")
    assert await first == "yes"

    assert (await refused(attempt(client).ask("Delete b?"))).code == "question_differs"


async def test_a_question_that_an_earlier_attempt_wrote_late_is_asked_once(
    client: StoreClient, questions: Collection[Question]
) -> None:
    """The row arrives between the look and the write."""
    key = f"{OWNER}:0"
    row = Question(id=key, owner=OWNER, question="Really?", status="answered", answer="yes")

    def write(mutations: Sequence[Mutation]) -> asyncio.Future[int]:
        late = Insert(SESSION, "questions", key, row.model_dump_json(by_alias=True).encode())
        client.commit([late])
        return client.commit(mutations)

    assert await WorkRecord(client, SESSION, OWNER, write).ask("Really?") == "yes"


async def test_nothing_is_followed_once_the_answer_is_here(
    client: StoreClient, questions: Collection[Question]
) -> None:
    asking = asyncio.create_task(attempt(client).ask("Really?"))
    await asked(questions, f"{OWNER}:0")
    await answer(questions, f"{OWNER}:0", None)

    assert await asking is None
    assert not client.feed._subscriptions
