from __future__ import annotations

import pytest

from aidb_ray.store.changes import (
    MAX_ROW_BYTES,
    Append,
    Batch,
    Claim,
    ClaimBuckets,
    Commit,
    Delete,
    DeleteSession,
    Held,
    Insert,
    Mutation,
    Need,
    Refusal,
    Runner,
    Update,
    bucket_of,
)
from aidb_ray.store.columns import pack
from aidb_ray.store.plan import Plan
from aidb_ray.store.tables import PUT, REMOVE_SESSION
from tests.planner import Engine
from tests.stores import SESSION, insert, row


def test_commits_of_a_plan_see_the_earlier_ones_of_it() -> None:
    engine = Engine()

    answer = engine.commit(
        Commit((insert("a"),)),
        Commit((insert("a"),)),
        Commit((Update(SESSION, "rows", "a", row("a", "2"), 2),)),
        Commit((Delete(SESSION, "rows", "a", 3),)),
        Commit((insert("a", "5"),)),
    )

    assert [(at, refusal.reason) for at, refusal in answer.refused] == [(1, "exists")]
    found = engine.tables.get(SESSION, "rows", "a")
    assert found is not None
    assert (found.revision, found.value) == (5, row("a", "5"))


def test_refused_commits_take_no_revision() -> None:
    engine = Engine()
    before = engine.tables.revision

    answer = engine.commit(Commit((insert("a"),)), Commit((insert("a"),)), Commit((insert("b"),)))

    assert answer.first_revision == before + 1
    assert engine.tables.revision == before + 2


def test_a_commit_is_refused_whole() -> None:
    engine = Engine()
    engine.one(insert("a"))

    assert engine.one(insert("b"), insert("a")) is not None

    assert engine.tables.get(SESSION, "rows", "b") is None
    assert engine.one(insert("b")) is None


@pytest.mark.parametrize(
    ("mutation", "reason"),
    [
        (insert("a"), "exists"),
        (Update(SESSION, "rows", "b", b"{}", 0), "missing"),
        (Delete(SESSION, "rows", "b"), "missing"),
        (Update(SESSION, "rows", "a", b"{}", 1), "conflict"),
        (Delete(SESSION, "rows", "a", 1), "conflict"),
        (Insert(SESSION, "rows", "big", b"x" * (MAX_ROW_BYTES + 1)), "too_large"),
        (Insert("~", "clients", "1", b"{}"), "reserved_name"),
        (Insert(SESSION, "~streams", "1", b"{}"), "reserved_name"),
        (Insert(SESSION, "chunks", "1", b"{}"), "reserved_name"),
        (ClaimBuckets("agent", 5, 5), "invalid_buckets"),
        (ClaimBuckets("agent", 0, 4097), "invalid_buckets"),
        (Append(SESSION, "g", 1, -1, 0, 1), "invalid_index"),
        (Append(SESSION, "g", 1, 1, 0, 1), "sequence_gap"),
        (Append(SESSION, "g", 1, 0, 0, 1), "invalid_batch"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(mutation: Mutation, reason: str) -> None:
    engine = Engine()
    engine.one(insert("a"))
    revision = engine.tables.revision

    refusal = engine.one(mutation)

    assert refusal is not None
    assert refusal.reason == reason
    assert engine.tables.revision == revision
    assert engine.last_plan.entries == []


def test_a_row_that_comes_and_goes_in_one_commit_leaves_nothing_but_a_revision() -> None:
    engine = Engine()
    before = engine.tables.revision

    assert engine.one(insert("a"), Delete(SESSION, "rows", "a")) is None

    assert engine.last_plan.entries == []
    assert engine.tables.revision == before + 1


def test_a_conflict_carries_the_row_and_its_revision() -> None:
    engine = Engine()
    engine.one(insert("a", "7"))
    engine.one(Update(SESSION, "rows", "a", row("a", "8"), 2))

    refusal = engine.one(Update(SESSION, "rows", "a", row("a", "9"), 2))

    assert refusal is not None
    assert (refusal.current, refusal.revision) == (row("a", "8"), 3)


def test_a_batch_sent_again_is_answered_as_before_and_changes_nothing() -> None:
    engine = Engine()
    batch = Batch(engine.client_id, 1, [Commit((insert("a"),)), Commit((insert("a"),))])
    first = engine.send(batch)
    revision = engine.tables.revision

    assert engine.send(batch) == first

    assert engine.last_plan.is_empty
    assert engine.tables.revision == revision


def test_a_number_used_for_another_batch_is_refused() -> None:
    engine = Engine()
    engine.send(Batch(engine.client_id, 1, [Commit((insert("a"),))]))

    answer = engine.send(Batch(engine.client_id, 1, [Commit((insert("b"),))]))

    assert isinstance(answer, Refusal)
    assert answer.reason == "idempotency_mismatch"
    assert engine.tables.get(SESSION, "rows", "b") is None


def test_a_batch_that_skips_a_number_is_refused() -> None:
    engine = Engine()

    answer = engine.send(Batch(engine.client_id, 2, [Commit((insert("a"),))]))

    assert isinstance(answer, Refusal)
    assert (answer.reason, answer.expected, answer.got) == ("batch_gap", 1, 2)


def test_an_unknown_client_is_refused_never_applied_afresh() -> None:
    engine = Engine()

    answer = engine.send(Batch(99, 1, [Commit((insert("a"),))]))

    assert isinstance(answer, Refusal)
    assert answer.reason == "unknown_client"
    assert engine.last_plan.is_empty


def test_superseding_a_client_tells_how_far_it_came_and_fences_its_late_batches() -> None:
    engine = Engine()
    old = engine.client_id
    engine.send(Batch(old, 1, [Commit((insert("a"),)), Commit((insert("b"),))]))

    engine.register(supersedes=old)

    assert engine.superseded_last == 2
    late = engine.send(Batch(old, 3, [Commit((insert("c"),))]))
    assert isinstance(late, Refusal)
    assert late.reason == "unknown_client"


def test_a_runner_commits_only_while_it_holds_the_buckets() -> None:
    engine = Engine()
    bucket = bucket_of(SESSION)
    first = engine.commit(Commit((ClaimBuckets("agent", 0, 4096),))).first_revision
    old = Runner("agent", first)
    assert engine.one(insert("a"), runner=old) is None

    second = engine.commit(Commit((ClaimBuckets("agent", bucket, bucket + 1),))).first_revision
    refusal = engine.one(insert("b"), runner=old)

    assert refusal is not None
    assert (refusal.reason, refusal.got, refusal.expected) == ("fenced", first, second)
    assert engine.one(insert("b"), runner=Runner("agent", second)) is None
    assert engine.one(insert("c"), runner=Runner("other", second)) is not None


def test_a_claim_fences_the_later_commits_of_its_own_plan() -> None:
    engine = Engine()
    first = engine.commit(Commit((ClaimBuckets("agent", 0, 4096),))).first_revision

    answer = engine.commit(
        Commit((ClaimBuckets("agent", 0, 4096),)),
        Commit((insert("a"),), Runner("agent", first)),
    )

    assert [refusal.reason for _, refusal in answer.refused] == ["fenced"]


def test_chunks_of_many_batches_share_the_columns_of_a_flush() -> None:
    engine = Engine()
    plan = Plan(engine.tables, 1)
    columns = pack([1, 2], ["x", "y"])
    batch = Batch(engine.client_id, 1, [Commit((Append(SESSION, "g", 1, 0, 0, 2),))], columns)
    plan.add_batch(batch, b"1")
    again = Batch(
        engine.client_id,
        2,
        [Commit((Append(SESSION, "g", 1, 2, 0, 2, closes="finished"),))],
        columns,
    )
    plan.add_batch(again, b"2")

    engine.tables.apply(plan, (3, 4096))

    stream = engine.tables.session(SESSION).streams["g"]
    assert [(run.segment, run.start, run.index, run.count) for run in stream.runs] == [
        (3, 0, 0, 2),
        (3, 2, 2, 2),
    ]
    assert (stream.next_index, stream.closes) == (4, "finished")


def test_a_closed_stream_takes_no_more_chunks() -> None:
    engine = Engine()
    columns = pack([1], ["x"])
    append = Append(SESSION, "g", 1, 0, 0, 1, closes="finished")
    engine.commit(Commit((append,)), chunks=columns)

    answer = engine.commit(Commit((Append(SESSION, "g", 1, 1, 0, 1),)), chunks=columns)

    assert [refusal.reason for _, refusal in answer.refused] == ["stream_closed"]


def appended(generation_id: str, index: int, count: int, *, closes: str = "") -> Append:
    return Append(SESSION, generation_id, 1, index, 0, count, closes=closes)


def test_a_deleted_session_holds_nothing_and_begins_anew() -> None:
    engine = Engine()
    other = insert("a", session="aidb://test/2")
    engine.commit(
        Commit((insert("a"), insert("b", into="others"), other, appended("g", 0, 2))),
        chunks=pack([1, 2], ["x", "y"]),
    )

    assert engine.one(DeleteSession(SESSION)) is None

    session = engine.tables.session(SESSION)
    assert session.rows() == []
    assert engine.tables.get("aidb://test/2", "rows", "a") is not None
    assert [entry.after for entry in engine.last_plan.entries] == [None] * 3
    assert engine.last_plan.log.ops == [REMOVE_SESSION, PUT], "one row, and the client's record"
    assert engine.one(Update(SESSION, "rows", "a", row("a"), 0)) is not None
    assert engine.one(insert("a")) is None


def test_deleting_sees_the_earlier_commits_of_its_plan() -> None:
    engine = Engine()
    columns = pack([1], ["x"])

    answer = engine.commit(
        Commit((insert("a"), appended("g", 0, 1))),
        Commit((DeleteSession(SESSION),)),
        Commit((insert("a"),)),
        Commit((appended("g", 0, 1),)),
        Commit((DeleteSession(SESSION),)),
        Commit((insert("b"),)),
        chunks=columns,
    )

    assert answer.refused == []
    assert [key for _, key, _, _ in engine.tables.session(SESSION).rows()] == ["b"]
    before = engine.tables.session(SESSION).rows()
    engine.restart()
    assert engine.tables.session(SESSION).rows() == before


def test_deleting_a_session_that_holds_nothing_tells_nobody_and_is_noted() -> None:
    engine = Engine()

    for _ in range(2):
        assert engine.one(DeleteSession(SESSION)) is None
        assert engine.last_plan.entries == []
        assert engine.last_plan.log.ops == [REMOVE_SESSION, PUT]


@pytest.mark.parametrize(
    ("mutations", "reason"),
    [
        ((DeleteSession(SESSION), insert("a")), "not_alone"),
        ((insert("a"), DeleteSession(SESSION)), "not_alone"),
        ((DeleteSession("~"),), "reserved_name"),
        ((DeleteSession(""),), "reserved_name"),
    ],
)
def test_deletions_that_cannot_be_are_refused(mutations: tuple[Mutation, ...], reason: str) -> None:
    engine = Engine()
    engine.one(insert("k"))
    before = engine.tables.revision

    refusal = engine.one(*mutations)

    assert refusal is not None
    assert refusal.reason == reason
    assert engine.tables.revision == before
    assert engine.tables.get(SESSION, "rows", "k") is not None


def test_a_late_append_to_a_deleted_stream_is_refused() -> None:
    engine = Engine()
    columns = pack([1], ["x"])
    engine.commit(Commit((appended("g", 0, 1),)), chunks=columns)
    engine.one(DeleteSession(SESSION))

    answer = engine.commit(Commit((appended("g", 1, 1),)), chunks=columns)

    assert [refusal.reason for _, refusal in answer.refused] == ["sequence_gap"]
    assert engine.tables.session(SESSION).rows() == []


@pytest.mark.parametrize(
    ("need", "is_met"),
    [
        (Need(SESSION, "rows", "a"), True),
        (Need(SESSION, "rows", "a", 2), True),
        (Need(SESSION, "rows", "a", 1), False),
        (Need(SESSION, "rows", "b"), False),
        (Need("aidb://test/2", "rows", "a"), False),
    ],
)
def test_a_commit_is_refused_without_what_it_needs(need: Need, *, is_met: bool) -> None:
    engine = Engine()
    engine.one(insert("a"))

    answer = engine.commit(Commit((insert("new"),), needs=(need,)))

    assert [refusal.reason for _, refusal in answer.refused] == ([] if is_met else ["gone"])
    assert (engine.tables.get(SESSION, "rows", "new") is not None) is is_met


def test_what_a_commit_needs_may_come_or_go_in_the_same_plan() -> None:
    engine = Engine()
    need = Need(SESSION, "rows", "a")

    answer = engine.commit(
        Commit((insert("a"),)),
        Commit((insert("b"),), needs=(need,)),
        Commit((DeleteSession(SESSION),)),
        Commit((insert("c"),), needs=(need,)),
        Commit((insert("a"),)),
        Commit((insert("d"),), needs=(Need(SESSION, "rows", "a", 2),)),
    )

    assert [at for at, _ in answer.refused] == [3, 5]


def test_a_fenced_runner_is_told_so_before_what_it_needs() -> None:
    engine = Engine()
    engine.one(ClaimBuckets("writer", 0, 4096))

    answer = engine.commit(
        Commit((insert("b"),), Runner("writer", 1), needs=(Need(SESSION, "rows", "a"),))
    )

    assert [refusal.reason for _, refusal in answer.refused] == ["fenced"]


def test_a_deleted_session_gives_up_its_claims() -> None:
    engine = Engine()
    engine.one(insert("a"))
    engine.one(Claim(SESSION, "rows", "a", "effect", "holder", 1_000))
    token = engine.tables.revision

    assert engine.one(DeleteSession(SESSION)) is None

    assert list(engine.tables.leases.claims_of("holder")) == []
    refusal = engine.one(insert("late"), held=Held(SESSION, "rows", "a", token))
    assert refusal is not None
    assert refusal.reason == "stale_claim"
    engine.restart()
    assert list(engine.tables.leases.claims_of("holder")) == []
    assert engine.one(insert("a")) is None
    assert engine.one(Claim(SESSION, "rows", "a", "effect", "other", 1_000)) is None
