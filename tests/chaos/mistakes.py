"""Known mistakes of a store, to be made on purpose: a checker that misses them checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from aidb_ray.store.changes import StoredRow
from aidb_ray.store.log import CommitLog
from aidb_ray.store.plan import Plan
from aidb_ray.store.recovery import Recovered
from aidb_ray.store.segments import segment_path
from aidb_ray.store.tables import REMOVE_SESSION, ClientRecord, Entry, Tables
from aidb_ray.store.writer import LiveSegment, LogWriter


def ack_before_sync() -> None:
    """Answer when the bytes are with the kernel, not on the disk."""

    def sync(self: LogWriter, fd: int) -> None:
        self.syncs += 1

    LogWriter._sync = sync


def no_truncate() -> None:
    """Write over a torn tail instead of cutting it off."""

    def resume(self: LogWriter, recovered: Recovered) -> LiveSegment:
        last = recovered.heads[-1]
        fd = self._files.open(segment_path(self._directory, last.number), write=True)
        return LiveSegment(last, fd, self._files.size(fd), recovered.tail)

    LogWriter._resume = resume


def dedup_outside_log() -> None:
    """Keep what each client sent last in a file of its own, written after the log."""
    set_client, apply, replay = Plan._set_client, Tables.apply, Tables._replay_system
    open_log = CommitLog.open.__func__
    records: dict[str, ClientRecord] = {}
    paths: list[Path] = []

    def open_and_load(
        cls: type[CommitLog], directory: Path, *args: Any, **kwargs: Any
    ) -> CommitLog:
        paths[:] = [directory / "clients"]
        records.clear()
        if paths[0].exists():
            kept = msgspec.msgpack.decode(paths[0].read_bytes(), type=dict[str, ClientRecord])
            records.update(kept)
        return open_log(cls, directory, *args, **kwargs)

    def set_unlogged(self: Plan, client_id: int, record: ClientRecord) -> None:
        if record.last_seq == 0:
            set_client(self, client_id, record)
        else:
            self.clients[client_id] = record

    def apply_then_remember(self: Tables, plan: Plan, place: tuple[int, int]) -> list[Entry]:
        entries = apply(self, plan, place)
        records.update({str(key): record for key, record in plan.clients.items() if record})
        draft = paths[0].with_suffix(".new")
        draft.write_bytes(msgspec.msgpack.encode(records))
        draft.replace(paths[0])
        return entries

    def replay_and_recall(
        self: Tables,
        collection: str,
        key: str,
        before: StoredRow | None,
        after: StoredRow | None,
    ) -> None:
        replay(self, collection, key, before, after)
        if key in records:
            self.clients[int(key)] = records[key]

    CommitLog.open = classmethod(open_and_load)  # pyright: ignore[reportAttributeAccessIssue]
    Plan._set_client = set_unlogged
    Tables.apply = apply_then_remember
    Tables._replay_system = replay_and_recall


def deletion_unlogged() -> None:
    """Delete sessions in memory, and let the log know nothing of it."""
    write = Plan._write

    def write_but_deletions(
        self: Plan,
        revision: int,
        op: int,
        session: str,
        collection: str,
        key: str,
        value: bytes | None,
    ) -> None:
        if op != REMOVE_SESSION:
            write(self, revision, op, session, collection, key, value)

    Plan._write = write_but_deletions


BY_NAME: Final[dict[str, Callable[[], None]]] = {
    "ack-before-sync": ack_before_sync,
    "dedup-outside-log": dedup_outside_log,
    "deletion-unlogged": deletion_unlogged,
    "no-truncate": no_truncate,
}
