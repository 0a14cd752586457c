"""Who may write for whom: runner epochs by bucket, and claims of rows. No I/O, no clock, no Ray.

An epoch, or the token of a row's claim, is the revision of the commit that claimed, so it only
grows, and a claim that is durable fences every earlier holder from the next commit on.

A claim of a row is a record beside it, in the same session. It lasts as long as the lease of its
holder. Leases are counted in the store's own time, which stands still while the store does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import msgspec

from aidb_ray.store.changes import BUCKETS

CLAIMS = "~claims"
"""Collection of a session that holds the claims of its rows; followed like any other."""

MAX_TICK_MS = 250
LOG_TICKS_MS = 5_000

Place: TypeAlias = tuple[str, str, str]
"""(session, collection, key) of a claimed row"""


@dataclass(frozen=True, slots=True)
class RunnerEpochs:
    """The holders of one agent's buckets: ranges `(low, high, epoch)`, ascending, no overlap."""

    ranges: tuple[tuple[int, int, int], ...] = ()

    def epoch_of(self, bucket: int) -> int:
        """Return the epoch that holds the bucket, 0 if no one does."""
        for low, high, epoch in self.ranges:
            if low <= bucket < high:
                return epoch
        return 0

    def claim(self, low: int, high: int, epoch: int) -> RunnerEpochs:
        """Return the holders after `epoch` took the buckets `low` (incl.) to `high` (excl.)."""
        assert 0 <= low < high <= BUCKETS, (low, high)
        kept: list[tuple[int, int, int]] = [(low, high, epoch)]
        for other_low, other_high, other in self.ranges:
            if other_low < low:
                kept.append((other_low, min(other_high, low), other))
            if other_high > high:
                kept.append((max(other_low, high), other_high, other))
        return RunnerEpochs(tuple(sorted(kept)))

    def encode(self) -> bytes:
        """Return the ranges as JSON."""
        return msgspec.json.encode(self.ranges)


def decode_epochs(value: bytes) -> RunnerEpochs:
    """Return what `RunnerEpochs.encode` encoded."""
    return RunnerEpochs(msgspec.json.decode(value, type=tuple[tuple[int, int, int], ...]))


def shard_ranges(shards: int) -> Sequence[tuple[int, int]]:
    """Split all buckets into `shards` ranges that differ in size by one at most."""
    edges = [round(BUCKETS * index / shards) for index in range(shards + 1)]
    return list(pairwise(edges))


class ClaimRecord(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What is kept beside a row that was claimed, until the row is deleted.

    Attributes:
        token: Revision of the newest claim.
        attempt: How often the row was claimed.
        state: `held`; `done` once released for good; `free` to be claimed when the row says so;
            `orphan`: its holder has gone, and the work may have been done or not.
        orphaned: How often its holder went in the middle.
        note: What the holder left for whoever takes over.
    """

    collection: str
    row: str
    effect: str = ""
    holder: str = ""
    token: int = 0
    attempt: int = 0
    state: Literal["held", "done", "free", "orphan"] = "free"
    orphaned: int = 0
    note: str = ""

    def encode(self) -> bytes:
        """Return the record as a row's JSON."""
        return _encode(self)


_encode = msgspec.json.Encoder().encode
decode_claim = msgspec.json.Decoder(ClaimRecord).decode


def claim_key(collection: str, key: str) -> str:
    """Return the key of a row's claim in `CLAIMS`."""
    # No name and no key has a NUL in it.
    return f"{collection}\0{key}"


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """How long a holder keeps its claims, in the store's lease time."""

    renewed_at_ms: int
    lease_ms: int

    @property
    def ends_at_ms(self) -> int:
        """When it ends."""
        return self.renewed_at_ms + self.lease_ms


class Leases:
    """Holders with their leases and claims, and the time by which leases are counted.

    That time moves by at most `MAX_TICK_MS` at a time, so a process that was stopped and goes on
    does not find all leases ended; after a restart it goes on where it was last logged. So a lease
    ends late, never early.
    """

    def __init__(self) -> None:
        self.now_ms = 0
        self.logged_ms = 0
        self.holders: dict[str, Lease] = {}
        self.claims: dict[str, dict[Place, int]] = {}

    def tick(self, elapsed_ms: float) -> None:
        """Let time pass."""
        self.now_ms += round(min(max(elapsed_ms, 0), MAX_TICK_MS))

    def resume_at(self, now_ms: int) -> None:
        """Take up the time at which something was logged; it never goes back."""
        self.now_ms = max(self.now_ms, now_ms)
        self.logged_ms = self.now_ms

    def expired(self) -> list[str]:
        """Return the holders whose lease has ended."""
        return [name for name, lease in self.holders.items() if lease.ends_at_ms <= self.now_ms]

    @property
    def is_due(self) -> bool:
        """Whether something is to be written: the end of a lease, or how late it is."""
        return bool(self.holders) and (
            self.now_ms - self.logged_ms >= LOG_TICKS_MS or bool(self.expired())
        )

    def expire_all(self) -> None:
        """End every lease: the holders were of a process that has gone."""
        self.holders = {name: Lease(0, 0) for name in self.holders}

    def claims_of(self, holder: str) -> Iterable[tuple[Place, int]]:
        """Return the rows that a holder has claimed, with their tokens."""
        return self.claims.get(holder, {}).items()

    def put_holder(self, holder: str, lease: Lease | None) -> None:
        """Begin, extend or end a lease."""
        if lease is None:
            self.holders.pop(holder, None)
        else:
            self.holders[holder] = lease
            self.resume_at(lease.renewed_at_ms)

    def put_claim(self, place: Place, before: str | None, held: tuple[str, int] | None) -> None:
        """Count a row as claimed by (holder, token), or by no one; `before` held it so far."""
        if before is not None:
            of_holder = self.claims.get(before, {})
            of_holder.pop(place, None)
            if not of_holder:
                self.claims.pop(before, None)
        if held is not None:
            holder, token = held
            self.claims.setdefault(holder, {})[place] = token
