from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.store.changes import BUCKETS
from aidb_ray.store.claims import RunnerEpochs, decode_epochs, shard_ranges

claims = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda ends: ends[0] < ends[1]),
    max_size=12,
)


@given(claims)
def test_a_bucket_is_held_by_the_latest_claim_that_covers_it(made: list[tuple[int, int]]) -> None:
    """Oracle: one epoch a bucket in a plain list."""
    plain = [0] * 41
    holders = RunnerEpochs()
    for epoch, (low, high) in enumerate(made, start=1):
        holders = holders.claim(low, high, epoch)
        plain[low:high] = [epoch] * (high - low)

    assert [holders.epoch_of(bucket) for bucket in range(41)] == plain
    assert decode_epochs(holders.encode()) == holders


@given(st.integers(1, 300))
def test_shards_split_all_buckets_evenly(shards: int) -> None:
    ranges = shard_ranges(shards)

    assert ranges[0][0] == 0
    assert ranges[-1][1] == BUCKETS
    assert all(low[1] == high[0] for low, high in pairwise(ranges))
    sizes = [high - low for low, high in ranges]
    assert max(sizes) - min(sizes) <= 1
