from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidb_ray.errors import CorruptionError, StorageError, StorageFullError
from aidb_ray.store.files import FileSystem
from aidb_ray.store.segments import Position
from aidb_ray.store.snapshots import BLOCK_ROWS, SessionRow, Snapshot, Snapshots, SnapshotWriter
from tests.faults import Fault, FaultyFiles

Model: TypeAlias = dict[str, list[SessionRow]]

SALT = 77
DURABLE = Position(3, 4096)


def make_session(seed: int, count: int, *, value_bytes: int = 20) -> list[SessionRow]:
    return [
        ("chunks" if at % 3 else "messages", f"k{at:04d}", seed * 1000 + at,
         f'{{"seed":{seed},"at":{at}}}'.ljust(value_bytes).encode())
        for at in range(count)
    ]  # fmt: skip


def write(snapshots: Snapshots, revision: int, changed: Iterable[tuple[str, list[SessionRow]]],
          ) -> Snapshot:  # fmt: skip
    writer = snapshots.begin(revision, lambda: DURABLE)
    for _ in writer.merge(changed):
        pass
    return writer.finish()


def open_snapshots(path: Path, files: FileSystem | None = None) -> Snapshots:
    return Snapshots(files or FileSystem(), path, SALT)


def check(snapshot: Snapshot, model: Model) -> None:
    """Compare every way of reading with the model."""
    alive = {name: sorted(rows) for name, rows in model.items() if rows}
    assert snapshot.rows == sum(len(rows) for rows in alive.values())
    assert list(snapshot.sessions()) == sorted(alive)
    for name in [*alive, "", "absent", "zzz"]:
        assert snapshot.load(name) == alive.get(name, [])
    for collection in ("messages", "chunks"):
        assert list(snapshot.scan(collection)) == [
            (name, key, revision, value)
            for name in sorted(alive)
            for own, key, revision, value in alive[name]
            if own == collection
        ]


def test_all_ways_of_reading_agree(tmp_path: Path) -> None:
    model = {f"s{at:03d}": make_session(at, at * 7 % 90) for at in range(120)}

    snapshot = write(open_snapshots(tmp_path), 5, sorted(model.items()))

    assert (snapshot.revision, snapshot.durable) == (5, DURABLE)
    assert snapshot.size == snapshot.path.stat().st_size
    check(snapshot, model)
    reopened = open_snapshots(tmp_path).latest
    assert reopened is not None
    assert (reopened.revision, reopened.rows, reopened.durable) == (5, snapshot.rows, DURABLE)
    check(reopened, model)


def test_a_session_larger_than_a_block_is_loaded_whole(tmp_path: Path) -> None:
    model = {
        "a": make_session(1, 3),
        "b": make_session(2, 5 * BLOCK_ROWS + 7),
        "c": make_session(3, 2),
    }

    check(write(open_snapshots(tmp_path), 1, sorted(model.items())), model)


def test_an_empty_snapshot_can_be_read(tmp_path: Path) -> None:
    check(write(open_snapshots(tmp_path), 1, []), {})
    check(write(open_snapshots(tmp_path), 2, [("a", [])]), {})


def test_sessions_are_found_by_prefix(tmp_path: Path) -> None:
    names = ["", "a", "ab", "ab/1", "ab/2", "ac", "b", "ä", "日"]
    snapshot = write(
        open_snapshots(tmp_path), 1, [(name, make_session(1, 300)) for name in sorted(names)]
    )

    for prefix in ["", "a", "ab", "ab/", "ab/2", "abc", "b", "z", "ä", "日本"]:
        expected = sorted(name for name in names if name.startswith(prefix))
        assert list(snapshot.sessions(prefix)) == expected


def test_a_scan_finds_values_that_contain_bytes(tmp_path: Path) -> None:
    model = {f"s{at:03d}": make_session(at, 40) for at in range(50)}
    snapshot = write(open_snapshots(tmp_path), 1, sorted(model.items()))

    found = list(snapshot.scan("messages", b'"at":3}'))
    assert [(name, key) for name, key, _, _ in found] == [(name, "k0003") for name in model]
    assert list(snapshot.scan("messages", b"nowhere")) == []
    assert list(snapshot.scan("absent", b'"at":3}')) == []


sessions = st.sampled_from([f"s{at}" for at in range(30)])
changes = st.lists(
    st.dictionaries(sessions, st.integers(0, 150), max_size=12), min_size=1, max_size=6
)


@settings(max_examples=60)
@given(changes)
def test_merging_equals_replacing_sessions(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, int]]
) -> None:
    """Oracle: a dict of sessions."""
    snapshots = open_snapshots(tmp_path_factory.mktemp("snap"))
    model: Model = {}
    for revision, step in enumerate(steps, start=1):
        changed = {
            name: make_session(revision * 100 + at, count)
            for at, (name, count) in enumerate(sorted(step.items()))
        }
        model |= changed
        check(write(snapshots, revision, sorted(changed.items())), model)


def test_rows_may_come_in_any_order(tmp_path: Path) -> None:
    rows = make_session(1, 500)
    random.Random(1).shuffle(rows)

    check(write(open_snapshots(tmp_path), 1, [("a", rows)]), {"a": rows})


def test_sessions_must_ascend(tmp_path: Path) -> None:
    for names in (["b", "a"], ["a", "a"]):
        writer = open_snapshots(tmp_path).begin(1, lambda: DURABLE)
        with pytest.raises(ValueError, match="comes after"):
            list(writer.merge((name, make_session(1, 2)) for name in names))
        writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_untouched_blocks_are_copied_without_being_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {f"s{at:05d}": make_session(at, 50) for at in range(300)}
    snapshots = open_snapshots(tmp_path)
    write(snapshots, 1, sorted(model.items()))
    decoded: list[int] = []
    read = Snapshot.read_columns

    def counting(self: Snapshot, number: int) -> list[list[object]]:
        decoded.append(number)
        return read(self, number)

    monkeypatch.setattr(Snapshot, "read_columns", counting)
    changed = {"s00100": make_session(9, 51), "s00200": []}
    newest = write(snapshots, 2, sorted(changed.items()))
    assert 2 <= len(decoded) <= 6, "of about 60"

    monkeypatch.undo()
    check(newest, model | changed)


def test_many_small_changes_do_not_leave_many_small_blocks(tmp_path: Path) -> None:
    model = {f"s{at:05d}": make_session(at, 8) for at in range(500)}
    snapshots = open_snapshots(tmp_path)
    newest = write(snapshots, 1, sorted(model.items()))
    rng = random.Random(3)
    for revision in range(2, 60):
        name = f"s{rng.randrange(500):05d}"
        model[name] = make_session(revision, 8)
        newest = write(snapshots, revision, [(name, model[name])])
    check(newest, model)

    blocks = 0
    while newest.block(blocks) is not None:
        blocks += 1
    assert blocks <= 2 * newest.rows / BLOCK_ROWS


def test_the_walk_gives_way_every_few_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is a count of readings, 0.1 ms each, so that the machine does not matter."""
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        return readings / 10_000

    monkeypatch.setattr("aidb_ray.store.snapshots.perf_counter", clock)
    writer = open_snapshots(tmp_path).begin(1, lambda: DURABLE)
    turns = [readings for _ in writer.merge([("a", make_session(1, 1000))])]
    writer.abort()

    assert len(turns) > 40
    assert max(b - a for a, b in pairwise(turns)) <= 21


def test_changes_may_arrive_while_the_walk_goes_on(tmp_path: Path) -> None:
    rows = make_session(1, 4 * BLOCK_ROWS)
    late: list[SessionRow] = []
    writer = open_snapshots(tmp_path).begin(1, lambda: DURABLE)

    def changed() -> Iterable[tuple[str, list[SessionRow]]]:
        yield "a", rows
        late.extend(make_session(2, 5))
        yield "b", late

    for _ in writer.merge(changed()):
        pass
    check(writer.finish(), {"a": rows, "b": late})


def test_the_two_latest_are_kept(tmp_path: Path) -> None:
    snapshots = open_snapshots(tmp_path)
    for revision in (1, 5, 9):
        write(snapshots, revision, [("a", make_session(revision, 3))])

    assert len(list(tmp_path.iterdir())) == 2
    for opened in (snapshots, open_snapshots(tmp_path)):
        assert opened.latest is not None
        assert opened.fallback is not None
        assert (opened.fallback.revision, opened.latest.revision) == (5, 9)


def test_a_second_snapshot_at_a_revision_takes_the_place_of_the_first(tmp_path: Path) -> None:
    snapshots = open_snapshots(tmp_path)
    for revision in (1, 5, 5):
        write(snapshots, revision, [("a", make_session(revision, 3))])

    assert len(list(tmp_path.iterdir())) == 2
    assert snapshots.fallback is not None
    assert snapshots.fallback.revision == 1
    with pytest.raises(ValueError, match="revision 5 already"):
        snapshots.begin(4, lambda: DURABLE)


def test_a_snapshot_stays_readable_when_newer_ones_replaced_it(tmp_path: Path) -> None:
    snapshots = open_snapshots(tmp_path)
    first = write(snapshots, 1, [("a", make_session(1, 3))])
    for revision in (2, 3):
        write(snapshots, revision, [("a", make_session(revision, 3))])

    assert not first.path.exists()
    check(first, {"a": make_session(1, 3)})


def test_an_abandoned_snapshot_does_not_count(tmp_path: Path) -> None:
    snapshots = open_snapshots(tmp_path)
    write(snapshots, 1, [("a", make_session(1, 3))])
    writer = snapshots.begin(2, lambda: DURABLE)
    list(writer.merge([("a", [])]))
    writer.abort()
    writer.abort()

    assert len(list(tmp_path.iterdir())) == 1
    latest = open_snapshots(tmp_path).latest
    assert latest is not None
    assert latest.revision == 1


def test_every_damaged_byte_is_seen_and_never_served(tmp_path: Path) -> None:
    model = {f"s{at:02d}": make_session(at, 60) for at in range(12)}
    snapshot = write(open_snapshots(tmp_path), 1, sorted(model.items()))
    content = snapshot.path.read_bytes()
    rng = random.Random(8)
    served = refused = unopened = 0

    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        snapshot.path.write_bytes(damaged)
        opened = open_snapshots(tmp_path)
        if opened.latest is None:
            assert len(opened.damaged) == 1
            unopened += 1
            continue
        with pytest.raises(CorruptionError, match=snapshot.path.name):
            opened.latest.verify()
        with pytest.raises(CorruptionError):
            list(opened.latest.scan("messages"))
        for name, rows in model.items():
            try:
                loaded = opened.latest.load(name)
            except CorruptionError:
                refused += 1
            else:
                served += loaded == sorted(rows)
    assert served + refused + unopened * len(model) == 400 * len(model)
    assert min(served, refused, unopened) > 0


def test_a_cut_snapshot_is_not_opened(tmp_path: Path) -> None:
    model = {"a": make_session(1, 30)}
    snapshot = write(open_snapshots(tmp_path), 1, sorted(model.items()))
    content = snapshot.path.read_bytes()

    for length in range(0, len(content), 5):
        snapshot.path.write_bytes(content[:length])
        assert open_snapshots(tmp_path).latest is None
    snapshot.path.write_bytes(content)
    check_latest = open_snapshots(tmp_path).latest
    assert check_latest is not None
    check(check_latest, model)


def test_a_snapshot_of_another_store_is_not_opened(tmp_path: Path) -> None:
    write(open_snapshots(tmp_path), 1, [("a", make_session(1, 3))])

    assert Snapshots(FileSystem(), tmp_path, SALT + 1).latest is None


@pytest.mark.parametrize("kind", ["create", "write", "sync_data", "rename", "sync_directory"])
def test_a_failing_disk_leaves_the_snapshot_before(tmp_path: Path, kind: str) -> None:
    write(open_snapshots(tmp_path), 1, [("a", make_session(1, 3))])
    files = FaultyFiles(tmp_path)
    snapshots = open_snapshots(tmp_path, files)
    files.fault = Fault(frozenset({kind}), at=1)  # pyright: ignore[reportArgumentType]
    writer: SnapshotWriter | None = None

    with pytest.raises(StorageError):  # noqa: PT012  Where it fails depends on the call.
        writer = snapshots.begin(2, lambda: DURABLE)
        list(writer.merge([("a", make_session(2, 3))]))
        writer.finish()
    if writer is not None:
        writer.abort()
    assert files.hits == 1
    latest = snapshots.latest
    assert latest is not None
    check(latest, {"a": make_session(1, 3)})
    files.power_cut()
    after = open_snapshots(tmp_path).latest
    assert after is not None
    assert after.revision == 1


def test_a_full_disk_is_told_apart(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    files.free = 100_000
    writer = open_snapshots(tmp_path, files).begin(1, lambda: DURABLE)

    with pytest.raises(StorageFullError):  # noqa: PT012  The buffer decides which call it is.
        list(writer.merge([("a", make_session(1, 3000, value_bytes=1000))]))
        writer.finish()
    writer.abort()
    assert files.free == 100_000
    assert list(tmp_path.iterdir()) == []


def test_a_finished_snapshot_survives_a_power_cut(tmp_path: Path) -> None:
    files = FaultyFiles(tmp_path)
    model = {"a": make_session(1, 900), "b": make_session(2, 10)}
    write(open_snapshots(tmp_path, files), 1, sorted(model.items()))

    files.power_cut()

    latest = open_snapshots(tmp_path).latest
    assert latest is not None
    check(latest, model)
