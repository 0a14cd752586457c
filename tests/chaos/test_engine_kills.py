"""Kill a loaded store at random moments and in the middle of writes; nothing promised may go.

The work is done by `tests.chaos.engine`, in a process of its own that may fork.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.engine import WRONG_STATUS

pytestmark = pytest.mark.chaos


def run_engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos.engine", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=900,
    )


def report_of(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stdout + run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    print(report)  # noqa: T201
    # A clean run proves something only if things went wrong on purpose.
    happened = ("torn_tails", "unknown_outcomes", "batches", "lines_gone")
    assert min(report[name] for name in happened) > 0
    return report


def test_1500_kills_lose_nothing_and_do_nothing_twice() -> None:
    report = report_of(run_engine("--kills", "1500", "--seed", "11"))

    assert report["kills"] >= 1500


def test_kills_among_snapshots_and_compaction_lose_nothing() -> None:
    report_of(run_engine("--kills", "300", "--seed", "12", "--snapshot-bytes", "20000"))


@pytest.mark.parametrize(
    "mistake", ["ack-before-sync", "dedup-outside-log", "deletion-unlogged", "no-truncate"]
)
def test_known_mistakes_are_caught(mistake: str) -> None:
    run = run_engine("--kills", "600", "--seed", "13", "--mistake", mistake)

    assert run.returncode == WRONG_STATUS, run.stdout + run.stderr
