"""Claims of rows: who holds one, how it ends, and what a commit under one is worth."""

from __future__ import annotations

from typing import Any

import pytest

from aidb_ray.errors import ConflictError
from aidb_ray.store.changes import Claim, Delete, Disown, Held, Insert, Release, Renew, Update
from aidb_ray.store.claims import CLAIMS, ClaimRecord, claim_key, decode_claim
from tests.planner import Engine
from tests.stores import SESSION, insert, row

LEASE_MS = 1_000
PLACE = (SESSION, "rows", "a")


def claim(holder: str = "one", **options: Any) -> Claim:
    return Claim(*PLACE, effect="tools", holder=holder, lease_ms=LEASE_MS, **options)


def update(value: str = "2") -> Update:
    return Update(*PLACE, row("a", value), 0)


def held(token: int) -> Held:
    return Held(*PLACE, token)


def record(engine: Engine) -> ClaimRecord:
    stored = engine.tables.get(SESSION, CLAIMS, claim_key("rows", "a"))
    assert stored is not None
    return decode_claim(stored.value)


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    engine.one(insert("a"))
    return engine


def take(engine: Engine, holder: str = "one") -> int:
    """Claim the row and return the token."""
    assert engine.one(claim(holder)) is None
    return engine.tables.revision


def test_a_claimed_row_is_claimed_by_no_one_else(engine: Engine) -> None:
    token = take(engine)

    refusal = engine.one(claim("other"))

    assert refusal is not None
    assert (refusal.reason, refusal.expected) == ("claimed", token)
    assert refusal.to_error().code == "claimed"
    assert record(engine).holder == "one"


def test_of_two_claims_in_one_batch_the_first_wins(engine: Engine) -> None:
    from aidb_ray.store.changes import Commit

    answer = engine.commit(Commit((claim("one"),)), Commit((claim("other"),)))

    assert [index for index, _ in answer.refused] == [1]
    assert record(engine).holder == "one"


def test_a_row_that_is_not_there_or_has_changed_is_not_claimed(engine: Engine) -> None:
    engine.one(update())
    stale = engine.one(claim(base=engine.tables.revision - 1))
    missing = engine.one(Claim(SESSION, "rows", "b", "tools", "one", LEASE_MS))

    assert stale is not None
    assert stale.reason == "conflict"
    assert missing is not None
    assert missing.reason == "missing"


def test_a_commit_under_a_claim_needs_the_current_token(engine: Engine) -> None:
    token = take(engine)
    assert engine.one(update(), held=held(token)) is None

    engine.tick(LEASE_MS)
    revision = engine.tables.revision
    refusal = engine.one(update("3"), held=held(token))

    assert refusal is not None
    assert refusal.reason == "stale_claim"
    assert refusal.to_error().code == "stale_claim"
    assert engine.tables.revision == revision


def test_work_that_is_done_ends_the_claim_with_its_rows_in_one_commit(engine: Engine) -> None:
    token = take(engine)

    assert engine.one(update(), Release(*PLACE, token), held=held(token)) is None

    assert record(engine).state == "done"
    assert record(engine).holder == ""
    assert not engine.tables.leases.claims
    # Again, as someone does who did not hear the answer: nothing happens.
    assert engine.one(Release(*PLACE, token)) is None
    assert engine.one(update(), held=held(token)) is not None


def test_a_claim_that_was_never_made_cannot_be_released(engine: Engine) -> None:
    refusal = engine.one(Release(*PLACE, 7))

    assert refusal is not None
    assert refusal.reason == "stale_claim"


def test_a_lease_ends_late_and_its_claims_are_orphans(engine: Engine) -> None:
    take(engine)
    engine.tick(LEASE_MS - 1)
    assert record(engine).state == "held"

    engine.tick(1)

    assert record(engine).state == "orphan"
    assert record(engine).orphaned == 1
    assert not engine.tables.leases.holders
    token = take(engine, "other")
    assert (record(engine).attempt, record(engine).token) == (2, token)


def test_renewing_keeps_all_claims_of_a_holder(engine: Engine) -> None:
    token = take(engine)
    for _ in range(5):
        engine.tick(LEASE_MS // 2)
        assert engine.one(Renew("one", LEASE_MS)) is None

    assert record(engine).token == token


def test_a_renewal_that_comes_in_the_flush_that_would_end_the_lease_counts(engine: Engine) -> None:
    from aidb_ray.store.changes import Batch, Commit, encode
    from aidb_ray.store.plan import Plan

    take(engine)
    while not engine.tables.leases.expired():
        engine.tables.leases.tick(250)
    plan = Plan(engine.tables, 1)
    batch = Batch(engine.client_id, engine.seq, [Commit((Renew("one", LEASE_MS),))])
    plan.add_batch(batch, encode(batch))
    plan.end_leases()
    engine._apply(plan)

    assert record(engine).state == "held"


def test_a_holder_whose_lease_has_ended_is_told_so(engine: Engine) -> None:
    take(engine)
    engine.tick(LEASE_MS)

    refusal = engine.one(Renew("one", LEASE_MS))

    assert refusal is not None
    assert refusal.to_error().code == "unknown_holder"


def test_a_process_that_knows_its_predecessor_dead_makes_orphans_at_once(engine: Engine) -> None:
    take(engine)

    assert engine.one(Disown("one")) is None

    assert record(engine).state == "orphan"
    assert not engine.tables.leases.holders


def test_a_row_that_is_deleted_takes_its_claim_along(engine: Engine) -> None:
    token = take(engine)
    engine.one(Delete(*PLACE))

    assert engine.tables.get(SESSION, CLAIMS, claim_key("rows", "a")) is None
    assert not engine.tables.leases.claims
    engine.one(insert("a"))
    assert engine.one(update(), held=held(token)) is not None
    take(engine)
    assert record(engine).attempt == 1


def test_a_released_row_may_be_claimed_again(engine: Engine) -> None:
    token = take(engine)
    assert engine.one(Release(*PLACE, token, "free"), held=held(token)) is None

    take(engine, "other")

    assert (record(engine).attempt, record(engine).orphaned) == (2, 0)


def test_whoever_gives_up_leaves_an_orphan(engine: Engine) -> None:
    token = take(engine)
    assert engine.one(Release(*PLACE, token, "orphan"), held=held(token)) is None

    assert (record(engine).state, record(engine).orphaned) == ("orphan", 1)


def test_a_time_that_jumps_ends_no_lease(engine: Engine) -> None:
    take(engine)

    engine.tables.leases.tick(3_600_000)
    engine.tables.leases.tick(-3_600_000)

    assert engine.tables.leases.now_ms == 250


def test_claims_leases_and_their_time_survive_a_restart(engine: Engine) -> None:
    token = take(engine)
    engine.tick(LEASE_MS // 2)
    engine.one(Renew("one", LEASE_MS))
    before = engine.tables.leases

    engine.restart()

    after = engine.tables.leases
    assert (after.holders, after.claims) == (before.holders, before.claims)
    assert after.claims == {"one": {PLACE: token}}
    assert LEASE_MS // 2 <= after.now_ms <= before.now_ms
    engine.tick(LEASE_MS)
    assert record(engine).state == "orphan"


def test_the_time_of_leases_is_logged_while_there_are_any(engine: Engine) -> None:
    """A store that restarts every few seconds must not keep a dead holder's claims for ever."""
    assert engine.one(Claim(*PLACE, "tools", "one", 60_000)) is None
    engine.tick(30_000)

    engine.restart()

    assert engine.tables.leases.now_ms >= 25_000


def test_a_claim_is_a_row_that_can_be_followed(engine: Engine) -> None:
    take(engine)

    (entry,) = engine.last_plan.entries
    assert (entry.collection, entry.key) == (CLAIMS, claim_key("rows", "a"))
    engine.one(Insert(SESSION, "rows", "b", row("b")), held=held(engine.tables.revision))
    # The claim under which it is made is looked at, not written again.
    assert [entry.key for entry in engine.last_plan.entries] == ["b"]


def test_rows_of_the_store_itself_cannot_be_claimed(engine: Engine) -> None:
    for place in (("~", "clients", "1"), (SESSION, CLAIMS, claim_key("rows", "a"))):
        refusal = engine.one(Claim(*place, "tools", "one", LEASE_MS))
        assert refusal is not None
        assert refusal.reason == "reserved_name"


def test_whoever_does_not_know_of_earlier_attempts_is_told(engine: Engine) -> None:
    assert engine.one(claim(attempts=0)) is None
    engine.tick(LEASE_MS)

    refusal = engine.one(claim("other", attempts=0))

    assert refusal is not None
    error = refusal.to_error()
    assert isinstance(error, ConflictError)
    assert error.code == "claim_changed"
    assert error.current is not None
    assert (error.current["state"], error.current["attempt"]) == ("orphan", 1)
    assert engine.one(claim("other", attempts=1)) is None


def test_a_holder_leaves_a_note_for_its_successor(engine: Engine) -> None:
    token = take(engine)
    assert engine.one(update(), claim(note="executing"), held=held(token)) is None

    assert (record(engine).note, record(engine).token, record(engine).attempt) == (
        "executing",
        token,
        1,
    )
    engine.tick(LEASE_MS)
    assert record(engine).note == "executing"
