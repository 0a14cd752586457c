"""What becomes of a row whose turn comes, and of results that nobody waits for. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from aidb_ray.store.claims import ClaimRecord

InDoubt: TypeAlias = Literal["retry", "fail", "park"]
LateResults: TypeAlias = Literal["discard", "mark"]

ALONE_AFTER = 3
"""From so many lost processes on, a row may be what ends them and is run alone."""

Start: TypeAlias = Literal[
    "run", "reconcile", "fail_in_doubt", "give_up", "reject", "wait", "park", "leave"
]
"""What to do with a row: run it; ask the user's function what became of it; write that it is in
doubt, that it was given up, or that it was rejected; wait until its approval, or a person's word
about a lost attempt, changes it; or leave it alone, for someone else has ended it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a row when its turn comes.

    Attributes:
        record: Its newest claim, None if there was none.
        recorded_at: Revision that wrote the record.
        row_revision: Revision that wrote the row.
        matches: Whether the query finds it.
        status: Its status now.
        approval: What was decided about it, or that something must be.
        is_complete: Whether the user's `is_complete` says so, None without one.
    """

    record: ClaimRecord | None
    recorded_at: int
    row_revision: int
    matches: bool
    status: object
    approval: object = None
    is_complete: bool | None = None

    @property
    def is_orphan(self) -> bool:
        """Whether whoever worked on it last has gone in the middle."""
        return self.record is not None and self.record.state == "orphan"

    @property
    def attempts(self) -> int:
        """How often it was claimed."""
        return 0 if self.record is None else self.record.attempt

    @property
    def is_changed_since(self) -> bool:
        """Whether the row was written after its newest claim had ended."""
        return self.row_revision > self.recorded_at

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what ends its processes."""
        return self.record is not None and self.record.orphaned >= ALONE_AFTER


def decide_start(
    standing: Standing,
    *,
    in_doubt: InDoubt | Literal["reconcile"],
    needs_approval: bool,
    max_interruptions: int,
) -> Start:
    """Return what to do with a row.

    A row that a process left in the middle is still the effect's, although the query need not
    find it any more, as long as it has the status that the process gave it.
    """
    if standing.is_complete or not (standing.matches or _is_as_it_was_left(standing)):
        return "leave"
    record = standing.record
    if record is not None and record.state == "done" and not standing.is_changed_since:
        # It was worked on to the end, and what was written then leaves it in the query.
        return "leave"
    if standing.approval == "rejected":
        return "reject"
    if record is None or record.state != "orphan":
        is_open = needs_approval and standing.approval != "approved"
        return "wait" if is_open or standing.approval == "needed" else "run"
    if record.orphaned >= max_interruptions:
        return "give_up"
    if standing.is_changed_since and (in_doubt == "park" or not _is_as_it_was_left(standing)):
        # Somebody wrote it since: that is their word about the attempt that was lost.
        return "run"
    match in_doubt:
        case "retry":
            return "run"
        case "fail":
            return "fail_in_doubt"
        case "park" | "reconcile":
            return in_doubt


def _is_as_it_was_left(standing: Standing) -> bool:
    return (
        standing.is_orphan
        and standing.record is not None
        and (standing.record.note == standing.status)
    )


def is_ended(
    *,
    status: object,
    note: str,
    matches: bool,
    is_complete: bool | None,
) -> bool:
    """Whether somebody else has ended a row while it was worked on, so that a result comes late.

    `note` is the status that the work has given it.
    """
    if is_complete is not None:
        return is_complete
    return status != note and not matches
