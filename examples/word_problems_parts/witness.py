"""Files that say what really happened, written outside every process that may be killed.

A line is in the file before its writer answers, and the kernel keeps it when the writer dies. So
a model round or tool call that was run twice stands there twice, whatever the database says.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
class Interruption:
    """A time in which a process was ended from outside."""

    from_ns: int
    until_ns: int


def find_interruptions(
    events: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]]
) -> list[Interruption]:
    """Find each kill, and each driver that started (`start`) and did not end (`end`).

    Such a driver was itself killed: after the last line before the next start, or its cluster
    would have written on. All arguments come in the order of their times.
    """
    times = [line["at_ns"] for line in lines]
    found: list[Interruption] = []
    is_open = False
    for event in events:
        at_ns = event["at_ns"]
        if event["event"] == "kill":
            found.append(Interruption(event["from_ns"], at_ns))
        elif event["event"] == "start" and is_open:
            before = bisect_left(times, at_ns)
            found.append(Interruption(times[before - 1] if before else at_ns, at_ns))
        is_open = event["event"] != "end"
    return found


@dataclass(frozen=True)
class Repeats:
    """What was done more than once.

    Attributes:
        total: Lines beyond the first of their (session, key).
        unexplained: Those with no interruption between them and the line before.
    """

    total: int
    unexplained: list[str]


def find_repeats(
    lines: Iterable[Mapping[str, Any]], interruptions: Iterable[Interruption]
) -> Repeats:
    """Find lines of equal (session, key); `lines` come in the order of their times."""
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line in lines:
        times[line["session"], line["key"]].append(line["at_ns"])
    known = list(interruptions)
    unexplained = [
        f"{session} {key}"
        for (session, key), seen in times.items()
        for first, again in pairwise(seen)
        if not any(each.from_ns <= again and first <= each.until_ns for each in known)
    ]
    return Repeats(sum(len(seen) - 1 for seen in times.values()), unexplained)
