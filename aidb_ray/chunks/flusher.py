"""Sending the chunks of all running generations of a process, now and then, together."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aidb_ray.chunks.buffer import FLUSH_INTERVAL_MS, ChunkBuffer
from aidb_ray.errors import UnavailableError
from aidb_ray.store.changes import Append, Need, Runner

if TYPE_CHECKING:
    from aidb_ray.store.client import StoreClient


class ChunkFlusher:
    """Writes the buffers of all running generations of a process, a commit each, one call together.

    A chunk waits at most `FLUSH_INTERVAL_MS` before it is sent.
    """

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._open: dict[ChunkBuffer, Runner | None] = {}
        self._failed: dict[ChunkBuffer, BaseException] = {}
        self._sent: dict[ChunkBuffer, asyncio.Future[int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def open(self, buffer: ChunkBuffer, runner: Runner | None = None) -> None:
        """Flush a buffer from now on, now and then."""
        self._open[buffer] = runner
        if self._timer is None:
            self._arm()

    def close(self, buffer: ChunkBuffer) -> None:
        """Flush the buffer no more; what it still holds is the caller's.

        Raises:
            AidbError: an earlier flush of it failed: chunks are missing, so nothing may follow.
        """
        self._open.pop(buffer, None)
        self.check(buffer, forget=True)

    def discard(self, buffer: ChunkBuffer) -> None:
        """Flush the buffer no more, whatever became of it."""
        self._open.pop(buffer, None)
        self._sent.pop(buffer, None)
        self._failed.pop(buffer, None)

    def check(self, buffer: ChunkBuffer, *, forget: bool = False) -> None:
        """Raise if an earlier flush of the buffer failed."""
        error = self._failed.pop(buffer, None) if forget else self._failed.get(buffer)
        if error is not None:
            raise error

    def sent(self, buffer: ChunkBuffer) -> asyncio.Future[int] | None:
        """Return the outcome of the newest flush of a buffer that is not discarded."""
        return self._sent.get(buffer)

    def flush(self, buffer: ChunkBuffer) -> None:
        """Send what the buffer holds now."""
        taken = buffer.take()
        if taken is None:
            return
        append, columns = taken
        try:
            runner = self._open.get(buffer)
            sent = self._client.commit(
                [append], chunks=columns, runner=runner, needs=_needs(append, runner)
            )
        except UnavailableError as error:
            self._note(buffer, error)
        else:
            self._sent[buffer] = sent
            sent.add_done_callback(
                lambda sent: self._note(buffer, None if sent.cancelled() else sent.exception())
            )

    def _note(self, buffer: ChunkBuffer, error: BaseException | None) -> None:
        # The first one: later chunks are refused because of it.
        if error is not None and buffer in self._open:
            self._failed.setdefault(buffer, error)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(FLUSH_INTERVAL_MS / 1000, self._flush_all)

    def _flush_all(self) -> None:
        self._timer = None
        for buffer in self._open:
            try:
                self.flush(buffer)
            except Exception as error:  # noqa: BLE001  Its own run hears of it, others go on.
                self._note(buffer, error)
        if self._open:
            self._arm()


def _needs(append: Append, runner: Runner | None) -> tuple[Need, ...]:
    """Return the row that chunks of an agent are of: they must not outlive it."""
    if runner is None:
        return ()
    return (Need(append.session, "generations", append.generation_id),)
