"""Files that say what really happened, written outside every process that may be killed.

A line is in the file before its writer answers, and the kernel keeps it when the writer dies. So
a model round or tool call that was run twice stands there twice, whatever the database says.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Witness:
    """An append-only file of JSON lines that any number of processes write."""

    path: Path

    def note(self, **fields: str | int) -> None:
        """Add a line. Times are of the machine's monotonic clock, which all processes share."""
        line = json.dumps({"at_ns": time.monotonic_ns(), "pid": os.getpid(), **fields})
        # One write to a file opened with O_APPEND is never mixed with another's.
        os.write(_descriptor(self.path), line.encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all lines in the order of their times."""
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8") as lines:
            return sorted(map(json.loads, lines), key=lambda line: line["at_ns"])


@lru_cache(maxsize=64)
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


@dataclass(frozen=True)
class Death:
    """The end of a process, or of all processes of a driver's own cluster.

    Attributes:
        pid: The process; None for all that noted something in the time.
        since_ns, until_ns: What it noted in this time is what it noted before it ended.
        from_ns: What it left undone may be done again from then on.
    """

    pid: int | None
    since_ns: int
    until_ns: int
    from_ns: int

    def lies_between(self, first: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
        """Whether the process that noted `first` had ended before `again` was noted."""
        return (
            self.pid in (None, first["pid"])
            and self.since_ns <= first["at_ns"] <= self.until_ns
            and self.from_ns <= again["at_ns"]
        )


def find_deaths(events: Iterable[Mapping[str, Any]]) -> list[Death]:
    """Find each kill, and each driver that started and did not end, in the order of their times.

    Such a driver was itself killed. Its own cluster died with it, before the next driver started;
    one that it had joined did not.
    """
    found: list[Death] = []
    open_since_ns: int | None = None
    for event in events:
        at_ns = event["at_ns"]
        if event["event"] == "kill":
            found.append(Death(event["victim_pid"], 0, at_ns, event["from_ns"]))
            continue
        if event["event"] == "start" and open_since_ns is not None:
            found.append(Death(None, open_since_ns, at_ns, at_ns))
        is_open = event["event"] == "start" and not event.get("joined")
        open_since_ns = at_ns if is_open else None
    return found


@dataclass(frozen=True)
class Repeats:
    """What was done more than once.

    Attributes:
        total: Lines beyond the first of their (session, key).
        unexplained: Those whose line before was not cut off by the end of its process.
    """

    total: int
    unexplained: list[str]


def find_repeats(
    lines: Iterable[Mapping[str, Any]],
    deaths: Iterable[Death],
    others: Iterable[Mapping[str, Any]] = (),
) -> Repeats:
    """Find lines of equal (session, key).

    One is explained if the process that noted the line before had ended, and that step was still
    in flight. It was not if the session's next step stands between: an agent takes a step only
    when the one before is durable, and waits for a store that is away. So the death of a store
    explains nothing. `others` are lines of further steps, such as the other witness's.
    """
    repeatable = list(lines)
    known = list(deaths)
    steps: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for line in (*repeatable, *others):
        steps[line["session"]].append((line["at_ns"], _step(line["key"])))
    before: dict[tuple[str, str], Mapping[str, Any]] = {}
    total = 0
    unexplained: list[str] = []
    for again in sorted(repeatable, key=lambda line: line["at_ns"]):
        session, key = again["session"], again["key"]
        first = before.get((session, key))
        before[session, key] = again
        if first is None:
            continue
        total += 1
        was_finished = any(
            first["at_ns"] < at_ns < again["at_ns"] and step != _step(key)
            for at_ns, step in steps[session]
        )
        if was_finished or not any(death.lies_between(first, again) for death in known):
            unexplained.append(f"{session} {key}")
    return Repeats(total, unexplained)


def _step(key: str) -> str:
    """Return what is equal for calls of one round (`generation:round:n`): they run at once."""
    return key.rpartition(":")[0] or key
