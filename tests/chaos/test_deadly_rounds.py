"""Work that ends its process each time fails after a bounded number of processes.

The work is done by `tests.chaos.deadly`, in a process of its own that may fork.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.deadly import DEADLY, MAX_INTERRUPTIONS

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("deadly", DEADLY)
def test_what_ends_its_process_each_time_fails(tmp_path: Path, deadly: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.chaos.deadly", deadly, str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert (report["status"], report["code"]) == ("failed", "interrupted")
    # One may die before anything of the generation was written.
    assert MAX_INTERRUPTIONS <= report["deaths"] <= MAX_INTERRUPTIONS + 1
