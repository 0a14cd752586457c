"""Assertions on rows: what passes, what waits, and what a failure says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aidb_ray import AgentMessage, Collection, Database, connect, eq
from aidb_ray.testing import assert_rows, database, eventually
from tests.stores import until

URL = "aidb://echo/1"


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with database() as opened:
        yield opened


@pytest.fixture
async def rows(db: Database) -> Collection[dict[str, Any]]:
    rows = db.session(URL).collection("rows")
    await rows.insert([{"id": "a", "n": 1}, {"id": "b", "n": 2}])
    return rows


async def failure_of(work: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        await work
    return str(raised.value)


async def test_rows_are_compared_by_the_fields_that_are_named(rows: Collection[Any]) -> None:
    found = await assert_rows(rows, [{"n": 2}, {"id": "a"}])

    assert [row["id"] for row in found] == ["a", "b"]


async def test_a_field_may_be_asked_a_question(rows: Collection[Any]) -> None:
    def is_small(n: int) -> bool:
        return n < 2

    def is_large(n: int) -> bool:
        return n > 1

    await assert_rows(rows, [{"n": is_large}, {"n": is_small}])


async def test_a_whole_row_may_be_expected(db: Database) -> None:
    messages = db.session(URL).messages
    hello = AgentMessage(id="m", role="user", actor_id="me", content="Hello.")
    await messages.insert(hello)

    await assert_rows(messages, [hello])
    other = hello.model_copy(update={"content": "Bye."})
    assert "it is another row" in await failure_of(assert_rows(messages, [other]))


async def test_each_expectation_gets_a_row_of_its_own(rows: Collection[Any]) -> None:
    """The first fits both rows, so it must not take the one that the second needs."""
    await assert_rows(rows, [{}, {"id": "a"}])
    await assert_rows(rows, [{}, {"id": "b"}])
    await rows.insert({"id": "c", "n": 1})
    await assert_rows(rows, [{"n": 1}, {}, {"id": "a"}])


async def test_what_is_missing_is_said_with_the_row_that_comes_nearest(
    rows: Collection[Any],
) -> None:
    said = await failure_of(assert_rows(rows, [{"id": "a", "n": 1}, {"id": "b", "n": 3}]))

    assert said.splitlines() == [
        "<Collection 'rows' of aidb://echo/1> has 2 rows; 2 were expected.",
        "Missing: id='b', n=3",
        "    n is 2, not 3",
        "Not expected:",
        "    {'id': 'b', 'n': 2}",
    ]


async def test_a_question_that_is_answered_no_is_named(rows: Collection[Any]) -> None:
    def is_large(n: int) -> bool:
        return n > 9

    said = await failure_of(assert_rows(rows, [{"id": "a"}, {"id": "b", "n": is_large}]))

    assert "Missing: id='b', n=is_large" in said
    assert "n is 2, which is_large refuses" in said


async def test_a_field_that_is_not_there_is_said(rows: Collection[Any]) -> None:
    said = await failure_of(assert_rows(rows, [{"id": "a"}, {"id": "b", "m": 1}]))

    assert "m: there is no such field" in said


async def test_a_row_too_many_is_said(rows: Collection[Any]) -> None:
    said = await failure_of(assert_rows(rows, [{"id": "a"}]))

    assert said.splitlines()[0].endswith("has 2 rows; 1 were expected.")
    assert "Missing" not in said
    assert "{'id': 'b', 'n': 2}" in said


async def test_a_row_too_few_is_said(rows: Collection[Any]) -> None:
    said = await failure_of(assert_rows(rows, [{"id": "a"}, {"id": "b"}, {"id": "c"}]))

    assert "Missing: id='c'" in said
    assert "Not expected" not in said


async def test_long_lists_are_cut(rows: Collection[Any]) -> None:
    await rows.insert([{"id": f"{n:03}"} for n in range(30)])

    said = await failure_of(assert_rows(rows, [{"id": "a"}, {"id": "b"}]))

    assert "and 10 more" in said


async def test_a_query_may_be_asserted(db: Database, rows: Collection[Any]) -> None:
    await assert_rows(lambda q: q.from_(r=rows).where(lambda r: eq(r.n, 2)), [{"id": "b"}])
    said = await failure_of(assert_rows(lambda q: q.from_(r=rows), [], database=db))
    assert said.startswith("The query has 2 rows")


async def test_rows_that_come_later_are_waited_for(rows: Collection[Any]) -> None:
    waiting = asyncio.create_task(
        assert_rows(rows, [{"id": "a"}, {"id": "b", "n": 3}], within_ms=10_000)
    )
    await asyncio.sleep(0)
    assert not waiting.done()

    rows.update("b", {"n": 3})

    assert [row["n"] for row in await waiting] == [1, 3]


async def test_a_wait_has_an_end_and_says_what_there_was(rows: Collection[Any]) -> None:
    said = await failure_of(assert_rows(rows, [{"id": "a"}, {"id": "c"}], within_ms=50))

    assert "did not come to what was waited for within 50 ms." in said
    assert "Missing: id='c'" in said


async def test_a_condition_is_asked_again_whenever_rows_change(rows: Collection[Any]) -> None:
    asked: list[int] = []

    def has_four(found: list[Any]) -> bool:
        asked.append(len(found))
        return len(found) == 4

    waiting = asyncio.create_task(eventually(rows, has_four))
    await until(lambda: asked)
    for key in "cd":
        await rows.insert({"id": key})

    assert len(await waiting) == 4
    # Once for each row that was there or came, and not all the time.
    assert len(asked) <= 6


async def test_a_condition_that_never_holds_shows_the_rows(rows: Collection[Any]) -> None:
    said = await failure_of(eventually(rows, lambda _: False, within_ms=50))

    assert said.splitlines()[1:] == ["    {'id': 'a', 'n': 1}", "    {'id': 'b', 'n': 2}"]


async def test_a_condition_may_assert(rows: Collection[Any]) -> None:
    def check(found: list[Any]) -> bool:
        assert len(found) == 3, "three are needed"
        return True

    assert "three are needed" in await failure_of(eventually(rows, check, within_ms=50))
    rows.insert({"id": "c"})
    assert len(await eventually(rows, check)) == 3


async def test_what_a_condition_raises_is_raised(rows: Collection[Any]) -> None:
    with pytest.raises(KeyError):
        await eventually(rows, lambda found: found[0]["nothing"])


async def test_nothing_is_followed_afterwards(db: Database, rows: Collection[Any]) -> None:
    await assert_rows(rows, [{}, {}])
    await eventually(rows, bool)
    await failure_of(assert_rows(rows, []))
    await failure_of(eventually(rows, lambda _: False, within_ms=1))

    assert not db.partitions[0].client.feed._subscriptions


async def test_a_database_for_a_test_forgets_and_is_the_current_one() -> None:
    async with database() as one:
        await one.collection("rows").insert({"id": "a"})
    async with database(partitions=2) as other:
        await assert_rows(other.collection("rows"), [])
        assert len(other.partitions) == 2
    assert one.is_closed
    assert other.is_closed


async def test_a_database_in_a_directory_remembers(tmp_path: Any) -> None:
    async with database(tmp_path) as one:
        await one.collection("rows").insert({"id": "a"})
    async with connect("local", data_dir=tmp_path) as other:
        await assert_rows(other.collection("rows"), [{"id": "a"}])
