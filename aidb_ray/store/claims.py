"""Who may write for whom: runner epochs by bucket. No I/O, no clock, no Ray.

An epoch is the revision of the commit that claimed, so it only grows, and a claim that is
durable fences every earlier holder of those buckets from the next commit on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from aidb_ray.store.changes import BUCKETS


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
