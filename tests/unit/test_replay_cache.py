"""What was taken before is refused for as long as its signature would be good."""

from __future__ import annotations

import pytest

from aidb_ray.errors import WebhookError
from aidb_ray.lifecycle.replays import ReplayCache


def refusal(cache: ReplayCache, key: bytes, now_ms: int) -> str:
    try:
        cache.check(key, now_ms)
    except WebhookError as error:
        return f"{error.status} {error.code}"
    return ""


def test_a_request_is_taken_once_within_the_window() -> None:
    cache = ReplayCache(1_000)

    assert [refusal(cache, b"a", now) for now in (0, 1, 999, 1_000, 1_500)] == [
        "",
        "401 replayed",
        "401 replayed",
        "",
        "401 replayed",
    ]


def test_a_full_cache_refuses_and_forgets_nothing_early() -> None:
    cache = ReplayCache(1_000, max_entries=2)

    assert refusal(cache, b"a", 0) == refusal(cache, b"b", 500) == ""
    assert refusal(cache, b"c", 999) == "503 overloaded"
    assert refusal(cache, b"a", 999) == "401 replayed"
    assert refusal(cache, b"c", 1_000) == ""
    assert len(cache) == 2


def test_a_clock_that_goes_back_brings_nothing_back() -> None:
    cache = ReplayCache(1_000)
    cache.check(b"a", 5_000)

    with pytest.raises(WebhookError):
        cache.check(b"a", 1_000)
    cache.check(b"b", 1_000)
    assert refusal(cache, b"b", 5_900) == "401 replayed"
