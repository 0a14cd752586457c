"""Writes as callers see them: shown at once, durable when awaited, taken back when refused."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aidb_ray.contracts import Generation, ToolCall
from aidb_ray.errors import (
    ConfigError,
    ConflictError,
    ContractError,
    KeyExistsError,
    KeyMissingError,
    NotReadyError,
)
from aidb_ray.expressions import eq
from aidb_ray.store.transaction import MAX_REMAKES
from tests.stores import Process, Store, open_store, until


async def test_a_write_shows_at_once_and_is_synced_when_durable(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.ready()
        store.files.hold_syncs()

        writing = rows.insert({"id": "a", "n": 1})

        assert rows.get("a") == {"id": "a", "n": 1}
        assert "a" in rows
        assert len(rows) == 1
        assert not rows.is_synced("a")
        await until(lambda: store.actor._taken)
        assert not rows.is_synced("a")
        assert writing.revision == 0
        store.files.let_syncs_go()
        assert await writing is writing
        assert rows.is_synced("a")
        assert writing.revision > 0
        assert [(m.op, m.collection, m.key) for m in writing.mutations] == [("insert", "rows", "a")]


async def test_a_refused_write_is_taken_back_and_raises_where_it_is_awaited(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        other = Process(store).collection("rows")
        await other.insert({"id": "a", "n": 1})
        rows = Process(store).collection("rows")

        writing = rows.insert({"id": "a", "n": 2})
        assert rows.get("a") == {"id": "a", "n": 2}
        with pytest.raises(KeyExistsError):
            await writing
        with pytest.raises(KeyExistsError):
            await writing
        await rows.ready()

        assert rows.get("a") == {"id": "a", "n": 1}
        assert rows.is_synced("a")


async def test_each_who_awaits_a_refused_write_gets_a_trace_of_its_own(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await Process(store).collection("rows").insert({"id": "a"})
        writing = Process(store).collection("rows").insert({"id": "a"})

        depths: list[int] = []
        for _ in range(3):
            with pytest.raises(KeyExistsError) as raised:
                await writing
            depths.append(len(raised.traceback))

        assert len(set(depths)) == 1


async def test_what_was_written_on_top_of_a_refused_write_goes_with_it(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        await Process(store).collection("rows").insert({"id": "a", "n": 1})
        rows = Process(store).collection("rows")
        first = rows.insert({"id": "a", "n": 2})
        second = rows.update("a", {"n": 3})
        third = rows.update("a", {"m": 4})
        assert rows.get("a") == {"id": "a", "n": 3, "m": 4}

        results = await asyncio.gather(*map(finish, (first, second, third)))

        assert isinstance(results[0], KeyExistsError)
        assert [getattr(result, "code", None) for result in results[1:]] == ["rolled_back"] * 2
        assert await rows.find("a") == {"id": "a", "n": 1}


async def test_fields_changed_on_top_of_a_refused_change_are_changed_in_the_row_as_it_is(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a", "n": 1})
        first = rows.update("a", {"n": 2}, when=lambda r: eq(r.n, 5))
        second = rows.update("a", {"m": 3})
        third = rows.update("a", {"k": 4}, when=lambda r: eq(r.m, 3))

        results = await asyncio.gather(*map(finish, (first, second, third)))

        assert [getattr(result, "code", None) for result in results] == [
            "condition_failed",
            None,
            None,
        ]
        assert await rows.find("a") == {"id": "a", "n": 1, "m": 3, "k": 4}


async def test_a_change_that_was_made_again_is_what_the_next_one_is_made_on(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        rows, others = (Process(store).collection("rows") for _ in range(2))
        await rows.insert({"id": "a", "n": 1})
        await others.update("a", {"m": 2})

        # This process does not follow the rows, and knows nothing of the change.
        await rows.update("a", {"n": 3})
        assert rows.get("a") == {"id": "a", "n": 3, "m": 2}
        await rows.update("a", {"k": 4})

        assert await rows.find("a") == {"id": "a", "n": 3, "m": 2, "k": 4}


async def test_a_draft_of_a_refused_change_goes_with_it_and_tells_the_row_as_it_is(
    tmp_path: Path,
) -> None:
    def add_one(draft: Any) -> None:
        draft["n"] += 1

    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a", "n": 1})
        first = rows.update("a", {"n": 10}, when=lambda r: eq(r.n, 5))
        second = rows.update("a", add_one)
        assert rows.get("a") == {"id": "a", "n": 11}

        results = await asyncio.gather(*map(finish, (first, second)))

        assert isinstance(results[1], ConflictError)
        assert (results[1].code, results[1].current) == ("rolled_back", {"id": "a", "n": 1})
        assert rows.get("a") == await rows.find("a") == {"id": "a", "n": 1}


async def test_a_write_that_has_ended_keeps_none_of_those_before_it(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        made = [rows.insert({"id": "a"}), *(rows.update("a", {"n": n}) for n in range(5))]
        assert all(later._earlier == [sooner] for sooner, later in pairwise(made))

        await asyncio.gather(*map(finish, made))

        assert not any(each._earlier or each._dependents for each in made)


async def test_writers_that_build_on_each_other_get_over_a_refusal(tmp_path: Path) -> None:
    def add_one(draft: Any) -> None:
        draft["n"] += 1

    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a", "n": 0})
        refusals = 0

        async def count_to(number: int) -> None:
            nonlocal refusals
            done = 0
            while done < number:
                refusal = await finish(rows.update("a", add_one))
                done += refusal is None
                refusals += refusal is not None

        async def refused() -> None:
            await finish(rows.update("a", {"n": -1}, when=lambda r: eq(r.n, -5)))

        counting = [count_to(20) for _ in range(8)]
        async with asyncio.timeout(20):
            await asyncio.gather(*counting[:4], refused(), *counting[4:])

        assert await rows.find("a") == {"id": "a", "n": 160}
        assert 0 < refusals < 50


async def finish(writing: Any) -> Exception | None:
    try:
        await writing
    except Exception as error:  # noqa: BLE001  The error is what the test looks at.
        return error
    return None


async def test_a_failure_that_nobody_awaits_is_logged_with_collection_and_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        await Process(store).collection("rows").insert({"id": "a"})
        rows = process.collection("rows")

        rows.insert({"id": "a"})
        await until(lambda: failures(caplog))

        (record,) = failures(caplog)
        assert "rows['a']" in record.getMessage()
        assert "exists already" in record.getMessage()


def failures(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.ERROR]


async def test_a_failure_that_is_awaited_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        await Process(store).collection("rows").insert([{"id": "a"}, {"id": "later"}])
        rows = Process(store).collection("rows")

        with pytest.raises(KeyExistsError):
            await rows.insert({"id": "a"})
        rows.insert({"id": "later"})
        await until(lambda: failures(caplog))

        (record,) = failures(caplog)
        assert "rows['later']" in record.getMessage()


async def test_a_failure_is_logged_if_whoever_awaited_it_has_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(tmp_path) as store:
        process = Process(store)
        await Process(store).collection("rows").insert({"id": "a"})
        rows = process.collection("rows")
        begun = asyncio.Event()

        async def wait() -> None:
            begun.set()
            await finish(rows.insert({"id": "a"}))

        waiting = asyncio.create_task(wait())
        await begun.wait()
        waiting.cancel()
        await until(lambda: "nobody awaited it" in caplog.text)
        assert waiting.cancelled()


def test_a_loop_that_ends_logs_each_outstanding_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> None:
        store = Store(tmp_path)
        store.start()
        await store.actor.open()
        rows = Process(store).collection("rows")
        await rows.insert({"id": "old", "n": 1})
        store.files.hold_syncs()
        rows.insert({"id": "new"})
        rows.update("old", {"n": 2})
        await until(lambda: store.actor._taken)
        store.files.let_syncs_go()

    asyncio.run(leave())

    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    for key in ("new", "old"):
        assert any(f"rows['{key}']" in message for message in errors)


async def test_an_update_made_on_a_stale_row_is_made_again(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        one, other = (Process(store).collection("rows") for _ in range(2))
        await one.insert({"id": "a", "n": 1, "m": 1})
        await other.ready()
        await one.update("a", {"n": 2})

        # `other` has not heard of it yet, or has: both must end the same.
        await other.update("a", {"m": 9})

        assert await one.find("a") == {"id": "a", "n": 2, "m": 9}


async def test_an_update_is_made_again_a_bounded_number_of_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        one, process = Process(store).collection("rows"), Process(store)
        rows = process.collection("rows")
        await one.insert({"id": "a", "n": 0, "m": 0})
        client = process.site.client
        find, finds = client.find, 0

        async def find_and_disturb(*where: str) -> Any:
            nonlocal finds
            finds += 1
            found = await find(*where)
            await one.update("a", {"n": finds})
            return found

        monkeypatch.setattr(client, "find", find_and_disturb)
        with pytest.raises(ConflictError) as caught:
            await rows.update("a", {"m": 1})

        assert finds == MAX_REMAKES + 1
        assert caught.value.code == "conflict"
        assert caught.value.current == {"id": "a", "n": finds, "m": 0}


async def test_compare_and_set_is_judged_by_the_row_that_is_replaced(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        one, other = (Process(store).collection("rows") for _ in range(2))
        await one.insert({"id": "a", "state": "pending"})

        results = await asyncio.gather(
            *[
                finish(rows.update("a", {"state": who}, when=lambda r: eq(r.state, "pending")))
                for who, rows in (("one", one), ("other", other))
            ]
        )

        (refused,) = [result for result in results if result is not None]
        assert isinstance(refused, ConflictError)
        assert refused.code == "condition_failed"
        winner = await one.find("a")
        assert refused.current == winner
        assert winner is not None
        assert winner["state"] in ("one", "other")


async def test_a_condition_that_only_a_stale_copy_fails_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(tmp_path) as store:
        one, process = Process(store).collection("rows"), Process(store)
        other = process.collection("rows")
        await other.insert({"id": "a", "n": 1})
        newest = await one.update("a", {"n": 2})

        # `other` does not follow the collection, so it knows nothing of the second write.
        await other.update("a", {"m": 1}, when=lambda r: eq(r.n, 2))
        with pytest.raises(ConflictError):
            await other.update("a", {"m": 2}, expected_revision=newest.revision)
        current = await one.update("a", {"n": 3})
        await other.update("a", {"m": 3}, expected_revision=current.revision)

        assert await one.find("a") == {"id": "a", "n": 3, "m": 3}


async def test_an_expected_revision_that_is_stale_is_a_conflict(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        first = await rows.insert({"id": "a", "n": 1})
        second = await rows.update("a", {"n": 2}, expected_revision=first.revision)
        newest = (await store.actor.status()).revision

        for write in (
            lambda: rows.update("a", {"n": 3}, expected_revision=first.revision),
            lambda: rows.delete("a", expected_revision=first.revision),
        ):
            with pytest.raises(ConflictError) as caught:
                await write()
            assert caught.value.code == "conflict"
            assert caught.value.revision == second.revision
            assert caught.value.current == {"id": "a", "n": 2}

        assert (await store.actor.status()).revision == newest
        assert rows.get("a") == {"id": "a", "n": 2}


async def test_a_missing_row_cannot_be_updated_or_deleted(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        for write in (lambda: rows.update("a", {"n": 1}), lambda: rows.delete("a")):
            with pytest.raises(KeyMissingError) as caught:
                await write()
            assert caught.value.code == "not_found"
        await rows.ready()

        # Now it is known, so nothing is sent.
        with pytest.raises(KeyMissingError):
            rows.update("a", {"n": 1})
        with pytest.raises(KeyMissingError):
            rows.delete("a")
        rows.insert({"id": "a"})
        await rows.delete("a")
        with pytest.raises(KeyMissingError):
            rows.update("a", {"n": 1})


async def test_a_key_cannot_change(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a"})

        with pytest.raises(ContractError) as caught:
            rows.update("a", {"id": "b"})

        assert caught.value.code == "immutable_key"
        assert rows.get("a") == {"id": "a"}


@pytest.mark.parametrize("row_type", [ToolCall, Generation])
async def test_a_terminal_status_never_changes_again(
    tmp_path: Path, row_type: type[ToolCall] | type[Generation]
) -> None:
    row = {"generation_id": "g", "name": "search"} if row_type is ToolCall else {"agent": "a"}
    async with open_store(tmp_path) as store:
        near = Process(store).collection("work", row_type)
        far = Process(store).collection("work", row_type)
        for status in ("completed", "failed", "cancelled"):
            await near.insert({"id": status, "status": "pending", **row})
            await far.ready()
            await near.update(status, {"status": status})
            revision = (await store.actor.status()).revision

            for known in (near, far):
                # One is told here; the other has an older row, and hears of it from the store.
                with pytest.raises(ContractError) as raised:
                    await known.update(status, {"status": "pending"})
                refusal = raised.value
                assert (refusal.code, refusal.loc) == ("illegal_transition", ("status",))
            assert (await store.actor.status()).revision == revision
            found = await near.find(status)
            assert found is not None
            assert found.status == status
            await near.update(status, {"status": status, "error_code": "late"})


@pytest.mark.parametrize("collection", ["tool_calls", "generations"])
async def test_a_terminal_status_stays_also_for_who_leaves_the_type_out(
    tmp_path: Path, collection: str
) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection(collection)
        await rows.insert({"id": "a", "status": "cancelled", "generationId": "g", "name": "x"})
        revision = (await store.actor.status()).revision
        with pytest.raises(ContractError) as raised:
            await rows.update("a", {"status": "pending"})

        assert raised.value.code == "illegal_transition"
        assert (await store.actor.status()).revision == revision
        await rows.update("a", {"note": "kept"})
        others = Process(store).collection("jobs")
        await others.insert({"id": "a", "status": "completed"})
        await others.update("a", {"status": "pending"})


async def test_a_call_that_is_tried_again_goes_back_to_pending(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        calls = Process(store).collection("tool_calls", ToolCall)
        await calls.insert({"id": "c", "generation_id": "g", "name": "search"})

        for status in ("executing", "pending", "executing", "failed"):
            await calls.update("c", {"status": status})


async def test_writes_of_one_row_go_in_their_order(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        rows.insert({"id": "a", "n": 0})
        writes = [rows.update("a", lambda row: row.__setitem__("n", row.n + 1)) for _ in range(10)]
        writes += [rows.delete("a"), rows.insert({"id": "a", "n": 100})]
        writes.append(rows.update("a", {"m": 1}))

        await asyncio.gather(*map(finish, writes))

        assert all(not write.failed for write in writes)
        assert await rows.find("a") == {"id": "a", "n": 100, "m": 1}


async def test_what_a_caller_does_to_its_values_later_has_no_effect(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a", "tags": []})
        tags, captured = ["x"], []

        writing = rows.update("a", {"tags": tags})
        tags.append("y")
        await writing
        assert await rows.find("a") == {"id": "a", "tags": ["x"]}

        def change(row: Any) -> None:
            row.tags.append("z")
            captured.append(row.tags)

        writing = rows.update("a", change)
        captured[0].append("late")
        await writing
        assert await rows.find("a") == {"id": "a", "tags": ["x", "z"]}


async def test_a_draft_function_runs_once_and_only_what_it_changed_travels(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        one, other = (Process(store).collection("rows") for _ in range(2))
        await one.insert({"id": "a", "n": 1, "deep": {"x": [1]}, "m": 0})
        runs = 0

        def change(row: Any) -> None:
            nonlocal runs
            runs += 1
            row.deep["x"].append(2)
            row["n"] = row["n"]

        await other.ready()
        await one.update("a", {"n": 7, "m": 7})
        await other.update("a", change)

        assert runs == 1
        assert await one.find("a") == {"id": "a", "n": 7, "deep": {"x": [1, 2]}, "m": 7}


async def test_draft_functions_that_cannot_work_are_refused_and_write_nothing(
    tmp_path: Path,
) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        with pytest.raises(NotReadyError):
            rows.update("a", lambda row: None)
        await rows.insert({"id": "a", "n": 1})
        revision = (await store.actor.status()).revision

        async def wait(row: Any) -> None:
            row.n = 2

        def give_coroutine(row: Any) -> Any:
            return wait(row)

        def fail(row: Any) -> None:
            row.n = 3
            raise RuntimeError("a mistake")

        for change in (wait, give_coroutine):
            with pytest.raises(TypeError):
                rows.update("a", change)
        with pytest.raises(RuntimeError):
            rows.update("a", fail)
        with pytest.raises(AttributeError):
            rows.update("a", lambda row: row.nonsense)

        assert rows.get("a") == {"id": "a", "n": 1}
        assert (await store.actor.status()).revision == revision


async def test_many_rows_are_inserted_together_or_not_at_all(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        writing = await rows.insert([{"id": str(n)} for n in range(3)])
        assert [m.key for m in writing.mutations] == ["0", "1", "2"]
        await rows.delete("1")

        other = Process(store).collection("rows")
        with pytest.raises(KeyExistsError):
            await other.insert([{"id": "1"}, {"id": "2"}])
        with pytest.raises(KeyExistsError):
            rows.insert([{"id": "5"}, {"id": "5"}])
        with pytest.raises(ContractError):
            rows.insert([{"id": "6"}, {"n": 1}])
        with pytest.raises(ContractError):
            rows.insert([])

        await rows.ready()
        assert [row["id"] for row in rows.values()] == ["0", "2"]


async def test_a_write_that_is_part_of_a_group_cannot_be_awaited(tmp_path: Path) -> None:
    from aidb_ray.store.collection import Group, current_group
    from tests.stores import SESSION

    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        token = current_group.set(Group(SESSION))
        try:
            writing = rows.insert({"id": "a"})
            with pytest.raises(ConfigError) as caught:
                await writing
        finally:
            current_group.reset(token)

        assert caught.value.code == "in_transaction"
