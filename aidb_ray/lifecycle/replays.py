"""Requests that were taken before. Pure: the time is an argument."""

from __future__ import annotations

from collections import OrderedDict

from aidb_ray.errors import WebhookError


class ReplayCache:
    """Remembers what it was shown for `window_ms`, up to `max_entries` at once.

    When it is full of what is not over yet, it refuses: forgetting early would let a request be
    taken twice, and whoever sends honestly tries again later.
    """

    def __init__(self, window_ms: int, max_entries: int = 100_000) -> None:
        self._window_ms = window_ms
        self._max_entries = max_entries
        # In order of time, which does not go back here.
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        self._now_ms = 0

    def __len__(self) -> int:
        return len(self._seen)

    def check(self, key: bytes, now_ms: int) -> None:
        """Remember a request.

        Raises:
            WebhookError: `replayed`, 401: it was shown within the window; `overloaded`, 503.
        """
        now = self._now_ms = max(now_ms, self._now_ms)
        while self._seen and next(iter(self._seen.values())) <= now - self._window_ms:
            self._seen.popitem(last=False)
        if key in self._seen:
            raise WebhookError("This request was taken before.", code="replayed", status=401)
        if len(self._seen) >= self._max_entries:
            raise WebhookError(
                "Too many requests came in a short time; send it again later.",
                code="overloaded",
                status=503,
            )
        self._seen[key] = now
