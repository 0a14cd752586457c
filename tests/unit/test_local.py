from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

from aidb_ray.store import local
from aidb_ray.store.changes import Change, StoredRow
from aidb_ray.store.local import LocalWrites

WHERE = ("aidb://a", "rows", "k")
OWNER = object()


def look(writes: LocalWrites, synced: StoredRow | None = None, told: int = 0) -> bytes | None:
    row, _ = writes.look(WHERE, synced, told)
    return None if row is None else row.value


def is_synced(writes: LocalWrites) -> bool:
    return writes.look(WHERE, None)[1]


def test_the_newest_outstanding_write_shows_and_is_not_synced() -> None:
    writes = LocalWrites()
    first = writes.add(WHERE, b"1", OWNER)
    writes.add(WHERE, b"2", OWNER)

    assert look(writes, StoredRow(9, b"synced")) == b"2"
    assert not is_synced(writes)
    writes.succeed(first, 10)
    assert look(writes) == b"2"
    assert not is_synced(writes)


def test_a_refused_write_uncovers_what_was_there() -> None:
    writes = LocalWrites()
    write = writes.add(WHERE, b"1", OWNER)

    writes.fail(write)

    assert look(writes, StoredRow(9, b"synced")) == b"synced"
    assert is_synced(writes)
    assert not writes.knows(WHERE)


def test_a_durable_write_shows_until_the_feed_has_come_that_far() -> None:
    writes = LocalWrites()
    writes.succeed(writes.add(WHERE, b"1", OWNER), 10)

    assert look(writes, StoredRow(9, b"older"), told=9) == b"1"
    assert look(writes, None, told=9) == b"1"
    assert look(writes, StoredRow(11, b"newer"), told=9) == b"newer"
    # At revision 10 the feed had no such row: another process deleted it, or it does not pass.
    assert look(writes, None, told=10) is None


def test_a_durable_delete_hides_the_row_until_the_feed_tells_of_another() -> None:
    writes = LocalWrites()
    writes.succeed(writes.add(WHERE, None, OWNER), 10)

    assert look(writes, StoredRow(9, b"older"), told=9) is None
    assert look(writes, StoredRow(11, b"again"), told=9) == b"again"


def test_what_the_feed_says_of_a_row_replaces_what_was_written_here() -> None:
    writes = LocalWrites()
    writes.succeed(writes.add(WHERE, b"1", OWNER), 10)

    writes.hear(Change(12, *WHERE, b"2"))
    assert look(writes) == b"2"
    writes.hear(Change(11, *WHERE, b"late"))
    assert look(writes) == b"2"
    writes.hear(Change(13, *WHERE, None))
    assert look(writes) is None


def test_a_million_outstanding_writes_of_one_row_are_settled_or_let_go() -> None:
    """In a process of its own: what this guards against ends the process."""
    program = """
        from aidb_ray.store.local import LocalWrites

        where = ("aidb://a", "rows", "k")
        for is_settled in (False, True):
            writes = LocalWrites()
            added = [writes.add(where, b"1", None) for _ in range(1_000_000)]
            if is_settled:
                for revision, write in enumerate(added):
                    writes.succeed(write, revision)
                assert not writes.is_outstanding(where)
            del added, writes
    """
    subprocess.run([sys.executable, "-c", dedent(program)], check=True, timeout=60)


def test_a_reply_that_comes_late_does_not_go_back() -> None:
    writes = LocalWrites()
    one = writes.add(WHERE, b"1", OWNER)
    other = writes.add(WHERE, b"2", OWNER)
    writes.succeed(other, 11)

    writes.succeed(one, 10)

    assert look(writes) == b"2"


def test_durable_writes_are_kept_up_to_a_number_and_a_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "MAX_OWN_ROWS", 5)
    monkeypatch.setattr(local, "MAX_OWN_BYTES", 1_000)
    writes = LocalWrites()

    def write(key: str, value: bytes) -> None:
        where = ("aidb://a", "rows", key)
        writes.succeed(writes.add(where, value, OWNER), 10)

    for n in range(20):
        write(str(n), b"x")
    assert [writes.knows(("aidb://a", "rows", str(n))) for n in range(14, 20)] == [False] + [
        True
    ] * 5

    write("big", b"x" * 998)
    assert not writes.knows(("aidb://a", "rows", "16"))
    assert writes.knows(("aidb://a", "rows", "big"))

    outstanding = writes.add(("aidb://a", "rows", "out"), b"x" * 5_000, OWNER)
    for n in range(10):
        write(f"m{n}", b"x")
    assert writes.knows(("aidb://a", "rows", "out")), "what is outstanding is never forgotten"
    writes.fail(outstanding)


def test_a_row_that_is_written_again_is_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_OWN_ROWS", 2)
    writes = LocalWrites()
    for revision, key in enumerate(("a", "b", "a", "c"), start=1):
        writes.succeed(writes.add(("aidb://a", "rows", key), b"x", OWNER), revision)

    assert [writes.knows(("aidb://a", "rows", key)) for key in "abc"] == [True, False, True]


def test_the_owner_of_the_newest_outstanding_write_is_known() -> None:
    writes = LocalWrites()
    assert writes.latest_owner(WHERE) is None
    write = writes.add(WHERE, b"1", OWNER)
    assert writes.latest_owner(WHERE) is OWNER
    assert writes.is_outstanding(WHERE)
    writes.succeed(write, 1)
    assert writes.latest_owner(WHERE) is None
    assert not writes.is_outstanding(WHERE)
