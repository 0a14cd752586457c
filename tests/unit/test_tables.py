from __future__ import annotations

from collections.abc import Sequence

import pytest

from aidb_ray.store.changes import (
    Append,
    Batch,
    ChunkColumns,
    Commit,
    Committed,
    Delete,
    DeleteSession,
    Filter,
    Mutation,
    Update,
    bucket_of,
    encode,
)
from aidb_ray.store.columns import pack
from aidb_ray.store.feed import Interest
from aidb_ray.store.plan import Plan
from aidb_ray.store.presence import NamePresence
from aidb_ray.store.tables import APPEND, PUT, Entry, LogColumns, SessionRow, Tables
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


class Frames:
    """Plans, each applied at its place, and the frames that the log would hold."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.logged: list[tuple[LogColumns, ChunkColumns | None]] = []
        plan = Plan(self.tables, 1)
        self.client, _ = plan.add_client(0)
        self._apply(plan, None)

    def commit(self, *commits: Commit, chunks: ChunkColumns | None = None) -> None:
        plan = Plan(self.tables, 1)
        seq = self.tables.clients[self.client].last_seq + 1
        answer = plan.add_batch(Batch(self.client, seq, list(commits), chunks), b"raw")
        assert isinstance(answer, Committed)
        assert answer.refused == []
        self._apply(plan, chunks)

    def replayed(self, base: Tables, *, after: int = 0) -> list[Entry]:
        """Replay what was logged after the first `after` frames over other tables."""
        found: list[Entry] = []
        for at, (columns, chunks) in enumerate(self.logged):
            if at >= after:
                found += base.replay(columns, place(at), chunks)
        base.revision = self.tables.revision
        return found

    def _apply(self, plan: Plan, chunks: ChunkColumns | None) -> None:
        self.tables.apply(plan, place(len(self.logged)))
        self.logged.append((plan.log, chunks))


def place(frame: int) -> tuple[int, int]:
    """Return where a frame lies: two to a segment."""
    return frame // 2, 64 + 1000 * (frame % 2)


def copy_of(tables: Tables) -> Tables:
    """Return tables that a snapshot of these gives."""
    rows = {name: session.rows() for name, session in tables.sessions.items()}
    copied = Tables(lambda name: rows.get(name, []))
    copied.revision = tables.revision
    copied.load_system()
    return copied


TWO = pack([1, 2], ["x", "y"])


def appended(index: int, *, start: int = 0, count: int = 2, generation_id: str = "g") -> Append:
    return Append(SESSION, generation_id, 1, index, start, count)


def spans(tables: Tables) -> dict[int, list[tuple[int, int, int]]]:
    return {
        segment: sorted((span.offset, span.start, span.count) for span in found)
        for segment, found in tables.garbage().items()
    }


def test_what_a_deleted_session_streamed_is_garbage() -> None:
    frames = Frames()
    frames.commit(Commit((appended(0),)), chunks=TWO)
    frames.commit(Commit((appended(2), appended(0, count=1, generation_id="h"))), chunks=TWO)
    frames.commit(Commit((insert("a"),)))

    frames.commit(Commit((DeleteSession(SESSION),)))

    expected = {0: [(1064, 0, 2)], 1: [(64, 0, 1), (64, 0, 2)]}
    assert spans(frames.tables) == expected
    replayed = Tables()
    frames.replayed(replayed)
    assert spans(replayed) == expected
    assert spans(copy_of(frames.tables)) == expected, "a snapshot keeps it"
    assert replayed.weight == frames.tables.weight

    frames.tables.forget_garbage({0}, frames.tables.revision - 1)
    assert spans(frames.tables) == expected, "it became garbage after that"
    frames.tables.forget_garbage({0}, frames.tables.revision)
    assert spans(frames.tables) == {1: expected[1]}


def test_replaying_a_deletion_over_a_later_snapshot_spares_what_came_after() -> None:
    frames = Frames()
    frames.commit(Commit((insert("a"), appended(0))), chunks=TWO)
    frames.commit(Commit((DeleteSession(SESSION),)))
    frames.commit(Commit((insert("b"), appended(0))), chunks=TWO)
    frames.commit(Commit((appended(2),)), chunks=TWO)

    fuzzy = copy_of(frames.tables)
    frames.replayed(fuzzy, after=2)

    assert fuzzy.session(SESSION).rows() == frames.tables.session(SESSION).rows()
    assert spans(fuzzy) == {0: [(1064, 0, 2)]}


def test_a_reader_is_told_of_each_row_that_went_also_after_a_restart() -> None:
    frames = Frames()
    frames.commit(Commit((insert("a"), insert("b"), appended(0))), chunks=TWO)
    frames.commit(Commit((DeleteSession(SESSION),)))

    for base in (Tables(), copy_of(frames.tables)):
        told = [entry.to_change() for entry in frames.replayed(base, after=2)]
        gone = [(change.collection, change.key, change.value) for change in told]
        assert gone == [("chunks", "g", None), ("rows", "a", None), ("rows", "b", None)]


@pytest.mark.parametrize(
    "change",
    [
        Update(SESSION, "rows", "a", row("a", "2"), 0),
        Delete(SESSION, "rows", "a"),
        DeleteSession(SESSION),
    ],
)
def test_a_reader_hears_that_a_row_left_its_filter_though_the_snapshot_is_newer(
    change: Mutation,
) -> None:
    """What the row was before is in no frame any more, so whoever may have had it is told."""
    frames = Frames()
    frames.commit(Commit((insert("a", "1"),)))
    frames.commit(Commit((change,)))
    base = copy_of(frames.tables)

    entries = frames.replayed(base, after=2)

    interest = Interest([Filter("rows", SESSION, where=(("v", (1,)),))])
    assert [entry.key for entry in entries if interest.wants(entry)] == ["a"]
