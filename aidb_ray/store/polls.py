"""Readers that wait for news at the store: each holds one call until there is some."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from aidb_ray.store.changes import PollRequest
from aidb_ray.store.feed import Feed, Interest, News
from aidb_ray.store.tables import Entry

MAX_POLLS = 2_000


@dataclass(slots=True)
class _Poll:
    """A reader that waits, and how far it is known that there is nothing for it."""

    interest: Interest
    after: int
    news: asyncio.Future[None]


class Polls:
    """At most 2,000 waiting readers, and the arranged filters of as many."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._waiting: dict[str, _Poll] = {}
        self._interests: OrderedDict[str, Interest] = OrderedDict()
        # The newest poll of each feed that was released, perhaps before it came.
        self._released: OrderedDict[str, int] = OrderedDict()

    @property
    def is_full(self) -> bool:
        """Whether no further reader may wait."""
        return len(self._waiting) >= MAX_POLLS

    def interest_of(self, request: PollRequest) -> Interest:
        """Return the reader's filters, arranged once and not at every poll."""
        known = self._interests.get(request.feed_id)
        if known is None or known.filters != request.filters:
            known = self._interests[request.feed_id] = Interest(request.filters)
            if len(self._interests) > MAX_POLLS:
                self._interests.popitem(last=False)
        return known

    async def wait(self, request: PollRequest, interest: Interest, wait_ms: int) -> int:
        """Wait until there is news for a reader, or its time is up, or it is released.

        There was none up to now; returns the cursor up to which that still holds.
        """
        feed_id = request.feed_id
        poll = _Poll(interest, self._feed.latest, asyncio.get_running_loop().create_future())
        if self._released.get(feed_id, 0) >= request.number > 0:
            return poll.after
        # A feed waits once: its earlier call was lost on the way, or its reader asks anew.
        self._let_go(feed_id)
        self._waiting[feed_id] = poll
        try:
            async with asyncio.timeout(wait_ms / 1000):
                await poll.news
        except TimeoutError:
            pass
        finally:
            if self._waiting.get(feed_id) is poll:
                del self._waiting[feed_id]
        return poll.after

    def wake(self, entries: Sequence[Entry]) -> None:
        """Wake the readers whom changes concern that were just added to the feed."""
        if not self._waiting:
            return
        news = News(entries)
        latest = self._feed.latest
        for poll in self._waiting.values():
            if poll.news.done():
                continue
            if news.concerns(poll.interest):
                poll.news.set_result(None)
            else:
                poll.after = latest

    def release(self, feed_id: str, number: int) -> None:
        """Let a reader go at once, or as soon as it comes with its poll `number`."""
        self._released[feed_id] = number
        if len(self._released) > MAX_POLLS:
            self._released.popitem(last=False)
        self._let_go(feed_id)

    def release_all(self) -> None:
        """Let every reader go."""
        for feed_id in self._waiting:
            self._let_go(feed_id)

    def _let_go(self, feed_id: str) -> None:
        poll = self._waiting.get(feed_id)
        if poll is not None and not poll.news.done():
            poll.news.set_result(None)
