"""A session as it was at an earlier revision, put together from snapshots and the log.

A snapshot is fuzzy: it may hold what came after the revision that it bears. So it stands for a
session's past only if the log says that the session did not change from then on until the
snapshot was finished; else an older one must do, or the log from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aidb_ray.errors import CompactedError
from aidb_ray.store.tables import REMOVE_SESSION, LogColumns, SessionRows, Tables

if TYPE_CHECKING:
    from aidb_ray.store.log import CommitLog, Snapshot

_TRIES = 3


def session_at(log: CommitLog, name: str, revision: int) -> SessionRows:
    """Return a session as commit `revision` left it. Blocks on the disk.

    Raises:
        CompactedError: that is not known any more, or the session was deleted since; `oldest` is
            the oldest revision that may be asked for.
    """
    for _ in range(_TRIES):
        kept = log.snapshots()
        try:
            return _session_at(log, kept, name, revision)
        except CompactedError:
            # Compaction may have gone on meanwhile; then newer snapshots tell.
            if log.snapshots() == kept:
                raise
    return _session_at(log, log.snapshots(), name, revision)


def _session_at(log: CommitLog, kept: Sequence[Snapshot], name: str, revision: int) -> SessionRows:
    oldest = 0
    for snapshot in (*reversed(kept), None):
        if snapshot is None and log.oldest_revision() > 0:
            oldest = oldest or log.oldest_revision()
            break
        if snapshot is not None and snapshot.revision > revision:
            oldest = snapshot.revision
            continue
        session, blurred = _fold(log, snapshot, name, revision)
        if not blurred:
            return session
        oldest = blurred
    raise CompactedError(
        f"What {name} was at revision {revision} is not known any more; the oldest that is known "
        f"is revision {oldest}.",
        oldest=oldest,
    )


def _fold(
    log: CommitLog, snapshot: Snapshot | None, name: str, revision: int
) -> tuple[SessionRows, int]:
    """Return a session as of a revision, and the last one that the snapshot mixed into it."""
    tables = Tables(snapshot.load if snapshot else None)
    session = tables.session(name)
    blurred = 0
    for place, rows in log.rows_of(name, snapshot.revision if snapshot else 0):
        for at, op in zip(rows.revisions, rows.ops, strict=True):
            if at > revision and op == REMOVE_SESSION:
                raise CompactedError(
                    f"{name} was deleted in revision {at}; what it was before is gone.", oldest=at
                )
            if at > revision and snapshot is not None and place < snapshot.durable:
                blurred = at
        count = sum(at <= revision for at in rows.revisions)
        columns = LogColumns(
            rows.revisions[:count],
            rows.ops[:count],
            rows.sessions[:count],
            rows.collections[:count],
            rows.keys[:count],
            rows.values[:count],
        )
        for _ in tables.replay(columns, (place.segment, place.offset), None):
            pass
    return session, blurred
