"""Executors that are killed lose nothing, end nothing twice, and leave nothing stuck.

`python -m tests.chaos.executors` does the same for longer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from aidb_ray import ToolCall, connect
from tests.chaos.executors import LEASE_MS, SLACK_MS, Ledger, judge, run

pytestmark = pytest.mark.chaos
KEY = "aidb://chaos/1/tool_calls/call-0"


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
async def test_killed_executors_lose_nothing_and_end_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    async with connect(data_dir=tmp_path / "data") as db:
        report = await run(
            db,
            tmp_path / "ledger",
            calls=300,
            processes=3,
            every_s=1.5,
            max_kills=8,
            max_running=4,
            ms=(50, 500),
            seed=7,
        )

    assert report.wrong == []
    assert report.completed == 300
    assert report.kills >= 2
    assert report.held >= 2


def call(name: str = "send", status: str = "completed", **fields: object) -> ToolCall:
    given = {"id": "call-0", "generation_id": "g", "name": name, "status": status, "attempt": 2}
    given |= fields
    return ToolCall.model_validate(given)


def ledger_of(directory: Path, *lines: tuple[str, int, int, float]) -> Ledger:
    """Return a ledger with lines of (what, attempt, pid, time)."""
    ledger = Ledger(directory)
    text = "".join(f'["{what}","{KEY}",{attempt},{pid},{at}]\n' for what, attempt, pid, at in lines)
    ledger.path.write_text(text, "utf-8")
    return ledger


FIRST = (("start", 1, 7, 0.0), ("effect", 1, 7, 0.0))
AGAIN = (("start", 2, 8, 1.0), ("effect", 2, 8, 1.0), ("end", 2, 8, 2.0))


@pytest.mark.parametrize(
    ("row", "ends", "lines", "killed", "words"),
    [
        (call(status="failed", error="x"), 1, FIRST, {}, "is failed"),
        (call(), 2, FIRST, {}, "after 2 ends"),
        (call("pay", in_doubt=True), 1, (*FIRST, *AGAIN), {7: 0.5}, "had its effect 2 times"),
        (call(), 1, (*FIRST, *AGAIN), {7: 0.5}, "is not marked"),
        (call(in_doubt=True), 1, (*FIRST, *AGAIN), {}, "not in flight at a kill"),
        (
            call(in_doubt=True),
            1,
            (*FIRST, ("start", 2, 8, 0.5 + (LEASE_MS + SLACK_MS) / 1000 + 0.1)),
            {7: 0.5},
            "was stuck",
        ),
    ],
)
def test_known_mistakes_are_caught(
    tmp_path: Path,
    row: ToolCall,
    ends: int,
    lines: tuple[tuple[str, int, int, float], ...],
    killed: dict[int, float],
    words: str,
) -> None:
    report = judge([row], Counter({"call-0": ends}), killed, ledger_of(tmp_path, *lines))

    assert any(words in wrong for wrong in report.wrong), report.wrong


def test_what_is_right_is_not_called_wrong(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, *FIRST, *AGAIN)
    report = judge([call(in_doubt=True)], Counter({"call-0": 1}), {7: 0.5}, ledger)

    assert report.wrong == []
    assert (report.kills, report.held, report.twice, report.longest_ms) == (1, 1, 1, 500)
