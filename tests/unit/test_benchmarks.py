from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from aidb_ray import ConfigError
from aidb_ray.store.files import FileSystem
from benchmarks import __main__ as command
from benchmarks import cancel, chunks, latency, queries, recovery, replay, rows, tools, turns
from benchmarks.harness import (
    Benchmark,
    Figure,
    Logged,
    Rig,
    choose_directory,
    gather_bounded,
    median_of,
    percentile,
)


def values(figures: Sequence[Figure]) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}


def rig_in(directory: Path) -> Rig:
    return Rig(directory, address="local")


def pretend_that_all_is_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def answer(_self: FileSystem, _path: Path) -> str:
        return name

    monkeypatch.setattr(FileSystem, "filesystem_type", answer)


async def test_rows_measures_both_crowds_of_writers_and_both_floors(tmp_path: Path) -> None:
    sizes = rows.Sizes(many_rows=2_000, few_rows=32, runs=1)

    found = values(await rows.measure(rig_in(tmp_path), sizes))

    assert found.keys() == {
        "rows_per_s_2000",
        "rows_per_s_16",
        "client_rows_per_s_2000",
        "plain_loop_rows_per_s",
        "bare_actor_rows_per_s",
        "fdatasyncs",
        "rows_per_sync",
        "rows_per_sync_16",
    }
    assert all(value > 0 for value in found.values())
    # Each of 4 flushes takes half of the rows; the first sync makes room, the next is of a client.
    assert found["rows_per_sync"] == (4 * 1_001 + 1) / 6
    assert found["rows_per_sync_16"] == 17
    assert os.listdir(tmp_path) == []


async def test_queries_measures_each_kind_of_query(tmp_path: Path) -> None:
    sizes = queries.Sizes(tasks=1_000, changes=30, kept=(100, 200))

    found = values(await queries.measure(rig_in(tmp_path), sizes))

    assert {f"{name}_us" for name in queries.QUERIES} < found.keys()
    assert {f"{name}_bytes" for name in queries.QUERIES} < found.keys()
    assert "join_by_user_us" in found
    assert all(value > 0 for value in found.values())


async def test_latency_waits_for_each_row_to_be_heard(tmp_path: Path) -> None:
    found = values(await latency.measure(rig_in(tmp_path), latency.Sizes(rows=10, warm_up=1)))

    assert {"insert_to_subscriber_p50_ms", "awaited_call_p50_ms"} <= found.keys()
    assert 0 < found["insert_to_subscriber_p50_ms"] <= found["insert_to_subscriber_p99_ms"]
    assert found["fdatasyncs"] >= 11


async def test_cancel_waits_for_each_socket_to_be_closed(tmp_path: Path) -> None:
    found = values(await cancel.measure(rig_in(tmp_path), cancel.Sizes(cancels=3, warm_up=1)))

    assert found["cancel_to_close_p50_ms"] > 0
    assert found["awaited_calls"] > 0
    assert found["cancel_written_p50_ms"] > 0
    assert found["cancel_to_close_p50_ms"] <= found["cancel_to_close_p90_ms"]


async def test_turns_measures_conversations(tmp_path: Path) -> None:
    sizes = turns.Sizes(sessions=4, turns=2, crowd=8, crowd_turns=1, single_turns=2, runs=1)

    found = values(await turns.measure(rig_in(tmp_path), sizes))

    assert {"turns_per_s", "turns_per_s_2000", "single_turn_p50_ms"} <= found.keys()
    assert all(value > 0 for value in found.values())


async def test_tools_measures_conversations_in_which_a_tool_is_called(tmp_path: Path) -> None:
    sizes = turns.Sizes(sessions=2, turns=1, crowd=2, crowd_turns=1, single_turns=1, runs=1)

    found = values(await tools.measure(rig_in(tmp_path), sizes))

    assert {"turns_per_s", "turns_per_s_2000", "single_turn_p50_ms"} <= found.keys()
    assert all(value > 0 for value in found.values())


async def test_chunks_measures_their_rate_and_their_bytes(tmp_path: Path) -> None:
    sizes = chunks.Sizes(streams=4, batches=2, streamed_batches=1, runs=1)

    found = values(await chunks.measure(rig_in(tmp_path), sizes))

    assert found["chunks_per_s"] > 0
    assert found["streamed_chunks_per_s"] > 0
    # The text alone takes 5; a log that wrote a row per chunk would take hundreds.
    assert 5 < found["bytes_per_chunk"] < 60


async def test_replay_reads_what_pyarrow_reads(tmp_path: Path) -> None:
    found = values(await replay.measure(rig_in(tmp_path), replay.Sizes(batches=2, runs=1)))

    assert {"chunks_per_s", "pyarrow_chunks_per_s"} <= found.keys()
    assert all(value > 0 for value in found.values())


async def test_recovery_finds_the_last_row_again(tmp_path: Path) -> None:
    sizes = recovery.Sizes(rows=200, sessions=4, trail=20, kills=1)

    found = values(await recovery.measure(rig_in(tmp_path), sizes))

    assert found["rows"] == 220
    assert found["seconds"] > 0


async def test_recovery_notices_a_row_that_is_gone(tmp_path: Path) -> None:
    sizes = recovery.Sizes(rows=100, sessions=2, trail=0)
    async with rig_in(tmp_path).open() as db:
        await recovery.fill(db, sizes, 0, 100, 50)
        await recovery.check_row(db, sizes, 99)

        with pytest.raises(AssertionError, match="row 100 was found 0 times"):
            await recovery.check_row(db, sizes, 100)


async def test_a_measurement_that_fails_leaves_no_directory_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        async with rig_in(tmp_path).open():
            raise RuntimeError

    assert os.listdir(tmp_path) == []


async def test_the_first_run_only_warms_up() -> None:
    runs: list[int] = []

    async def measure(run: int) -> float:
        runs.append(run)
        return [1_000, 3, 1, 2][run]

    assert await median_of(3, measure) == 2
    assert runs == [0, 1, 2, 3]


@pytest.mark.parametrize(("rank", "expected"), [(50, 50), (99, 99), (100, 100), (0.5, 1)])
def test_a_percentile_is_one_of_the_values(rank: float, expected: float) -> None:
    assert percentile(reversed(range(1, 101)), rank) == expected


async def test_no_more_works_than_allowed_run_at_once() -> None:
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await gather_bounded((work() for _ in range(20)), at_once=3)

    assert most == 3


def test_rows_per_sync_counts_what_was_written_between_two_looks() -> None:
    assert Logged.total([Logged(10, 100, 1), Logged(20, 200, 2)]) == Logged(30, 300, 3)
    assert Logged(30, 300, 3).rows_per_sync == 10
    assert Logged(0, 0, 0).rows_per_sync == 0


def test_a_file_system_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_that_all_is_on(monkeypatch, "tmpfs")

    with pytest.raises(ConfigError) as refused:
        choose_directory(tmp_path)

    assert refused.value.code == "no_disk"
    assert command.main(["rows", "--dir", str(tmp_path)]) == 2
    assert "--dir" in capsys.readouterr().out


def test_a_directory_on_a_disk_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_all_is_on(monkeypatch, "ext4")

    assert choose_directory(tmp_path) == tmp_path.resolve()


def test_the_file_has_the_figures_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(rig: Rig, size: int) -> list[Figure]:
        return [Figure("answer", size, "what was asked for")]

    pretend_that_all_is_on(monkeypatch, "ext4")
    monkeypatch.setitem(command.BENCHMARKS, "rows", Benchmark(measure, 42, 4))
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    target = tmp_path / "rows.json"

    assert command.main(["rows", "--json", str(target), "--dir", str(tmp_path)]) == 0

    report = json.loads(target.read_text("utf-8"))
    assert report["name"] == "rows"
    assert report["figures"] == {"answer": 42}
    assert report["machine"]["filesystem"] == "ext4"
    assert "python" in report["versions"]
    assert "RAY_ADDRESS" not in os.environ


def test_quick_takes_the_small_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def measure(rig: Rig, size: int) -> list[Figure]:
        asked.append(size)
        return []

    pretend_that_all_is_on(monkeypatch, "ext4")
    monkeypatch.setitem(command.BENCHMARKS, "rows", Benchmark(measure, 42, 4))

    assert command.main(["rows", "--quick", "--dir", str(tmp_path)]) == 0
    assert asked == [4]


@pytest.mark.parametrize("failing", [None, "turns"])
def test_all_runs_each_in_a_process_of_its_own_until_one_fails(
    failing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run(arguments: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        name, target = arguments[3], Path(arguments[arguments.index("--json") + 1])
        started.append(name)
        target.write_text(json.dumps({"name": name}), "utf-8")
        return subprocess.CompletedProcess(arguments, 3 if name == failing else 0)

    pretend_that_all_is_on(monkeypatch, "ext4")
    monkeypatch.setattr(subprocess, "run", run)
    target = tmp_path / "all.json"

    code = command.main(["all", "--dir", str(tmp_path), "--json", str(target)])

    names = list(command.BENCHMARKS)
    if failing is None:
        assert code == 0
        assert [report["name"] for report in json.loads(target.read_text("utf-8"))] == names
    else:
        assert code == 3
        assert started == names[: names.index(failing) + 1]
        assert not target.exists()


def test_every_figure_that_the_project_promises_has_a_benchmark() -> None:
    assert list(command.BENCHMARKS) == [
        "rows",
        "latency",
        "cancel",
        "turns",
        "tools",
        "effects",
        "chunks",
        "replay",
        "queries",
        "recovery",
    ]
