from __future__ import annotations

from collections.abc import Sequence

import pytest

from aidb_ray.store.changes import Append, Batch, Commit, Delete, Update, bucket_of, encode
from aidb_ray.store.columns import pack
from aidb_ray.store.plan import Plan
from aidb_ray.store.presence import NamePresence
from aidb_ray.store.tables import APPEND, PUT, LogColumns, SessionRow, Tables
from tests.stores import SESSION, insert, row


@pytest.mark.parametrize(
    ("session", "bucket"),
    [
        ("", 692),
        ("aidb://support/42", 1405),
        ("aidb://problems/0", 556),
        ("aidb://é/1", 2128),
    ],
)
def test_the_bucket_of_a_session_is_fixed_for_ever(session: str, bucket: int) -> None:
    assert bucket_of(session) == bucket


def test_replaying_the_log_of_a_plan_gives_the_same_tables() -> None:
    tables, replayed = Tables(), Tables()
    columns = pack([1, 2], ["x", "y"])
    plan = Plan(tables, 1)
    client, _ = plan.add_client(0)
    commits = [
        Commit((insert("a"), insert("b"), Append(SESSION, "g", 1, 0, 0, 2))),
        Commit((Update(SESSION, "rows", "a", row("a", "2"), 0), Delete(SESSION, "rows", "b"))),
    ]
    plan.add_batch(Batch(client, 1, commits, columns), b"raw")

    tables.apply(plan, (7, 64))
    list(replayed.replay(plan.log, (7, 64), columns))

    assert replayed.session(SESSION).rows() == tables.session(SESSION).rows()
    assert replayed.clients == tables.clients
    assert replayed.weight == tables.weight


@pytest.mark.parametrize("closes", ["", "finished"])
def test_replaying_over_a_snapshot_that_has_the_chunks_adds_none_twice(closes: str) -> None:
    tables = Tables()
    stored = encode(Append(SESSION, "g", 1, 0, 0, 2, closes=closes))
    frame = LogColumns([1], [APPEND], [SESSION], ["chunks"], ["g"], [stored])
    columns = pack([1, 2], ["x", "y"])

    list(tables.replay(frame, (0, 0), columns))
    list(tables.replay(frame, (0, 0), columns))

    stream = tables.session(SESSION).streams["g"]
    assert len(stream.runs) == 1
    assert (stream.next_index, stream.closes) == (2, closes)


class Rest:
    """A snapshot that counts how often it is looked at."""

    def __init__(self, rows: dict[str, list[SessionRow]]) -> None:
        self.rows = rows
        self.loads = 0

    def load(self, session: str) -> Sequence[SessionRow]:
        self.loads += 1
        return self.rows.get(session, [])


def put(tables: Tables, session: str, revision: int) -> None:
    frame = LogColumns([revision], [PUT], [session], ["rows"], ["a"], [b'{"v":1}' * 10])
    list(tables.replay(frame, (0, 0), None))


def test_a_session_rests_until_it_is_touched() -> None:
    rest = Rest({"aidb://a": [("rows", "k", 3, b"{}")]})
    tables = Tables(rest.load)

    assert tables.get("aidb://a", "rows", "k") is not None
    assert tables.sessions == {}

    tables.session("aidb://a")
    tables.get("aidb://a", "rows", "k")
    assert rest.loads == 2


def test_a_session_that_the_snapshot_cannot_hold_costs_no_look_at_it() -> None:
    rest = Rest({"aidb://old": [("rows", "k", 3, b"{}")]})
    tables = Tables(rest.load)
    tables.presence = NamePresence()
    tables.presence.add("aidb://old")

    tables.session("aidb://new")

    assert rest.loads == 0
    assert tables.get("aidb://old", "rows", "k") is not None


def test_only_sessions_at_rest_leave_memory_and_they_come_back_as_they_were() -> None:
    tables = Tables()
    for at in range(10):
        put(tables, f"aidb://{at}", at + 1)
    stored = {name: rows.rows() for name, rows in tables.sessions.items()}
    tables.evict(0)
    assert len(tables.sessions) == 10

    walked = [f"aidb://{at}" for at in range(9)]
    for name in walked:
        tables.sessions[name].is_dirty = False
        tables.sessions[name].is_resting = False
    tables.evict(0)
    assert len(tables.sessions) == 10, "a walked session leaves only when its snapshot counts"

    tables.rest_in(lambda name: stored[name], walked)
    put(tables, "aidb://3", 11)
    tables.evict(0)

    assert sorted(tables.sessions) == ["aidb://3", "aidb://9"]
    assert tables.weight == sum(rows.weight for rows in tables.sessions.values())
    assert tables.session("aidb://5").rows() == stored["aidb://5"]


def test_sessions_stay_while_memory_suffices() -> None:
    tables = Tables(Rest({}).load)
    for at in range(10):
        tables.session(f"aidb://{at}")
    half = tables.weight // 2

    tables.evict(half)

    assert len(tables.sessions) == 5


def test_the_weight_of_a_session_follows_its_rows() -> None:
    tables = Tables()
    empty = tables.session(SESSION).weight
    frame = LogColumns([1], [PUT], [SESSION], ["rows"], ["a"], [b"x" * 1000])
    list(tables.replay(frame, (0, 0), None))
    full = tables.weight

    list(tables.replay(LogColumns([2], [2], [SESSION], ["rows"], ["a"], [None]), (0, 0), None))

    assert full >= empty + 1000
    assert tables.weight == tables.session(SESSION).weight == empty
