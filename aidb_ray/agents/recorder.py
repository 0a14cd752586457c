"""What a generation's streams say, kept as chunks; and when their silence is too long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from aidb_ray.chunks import FLUSH_CHUNKS, ChunkBuffer, ChunkFlusher
from aidb_ray.errors import ModelError
from aidb_ray.models.events import EventEncoder
from aidb_ray.models.round import Round

if TYPE_CHECKING:
    from ag_ui.core import Event

logger = logging.getLogger(__name__)

_TICKS = 8
MAX_CANCELS = 5
CANCEL_PAUSE_MS = 1_000
"""How often a stream that shall end is cancelled, and how long it may take each time."""


class Recorder:
    """Records the streams of one generation."""

    def __init__(self, buffer: ChunkBuffer, flusher: ChunkFlusher, silence: SilenceLimit) -> None:
        self._buffer = buffer
        self._flusher = flusher
        self._silence = silence
        self._encoder = EventEncoder()

    async def record(self, events: AsyncIterator[Event]) -> Round:
        """Keep every event of a stream as a chunk; returns what they add up to.

        Silence, and cancelling whoever waits, cancel the stream until it ends, for up to 5 s. One
        that ignores even that is left behind: it is logged, and nothing it says is kept.

        Raises:
            ModelError: the stream said that it failed, or nothing for too long.
            AidbError: chunks could not be written.
        """
        heard = Round()
        listening = self._silence.begin(self._buffer)
        # A task of its own, or a stream that does not end could not be left behind.
        stream = asyncio.create_task(self._take_in(events, heard, listening))
        stream.add_done_callback(listening.stop)
        is_silent = False
        try:
            await listening.over
            is_silent = not stream.done()
        finally:
            self._silence.end(listening)
            await _end(stream, listening)
        if is_silent and (not stream.done() or stream.cancelled()):
            words = f"The model was silent for {self._silence.limit_ms} ms."
            raise ModelError(words, code="idle_timeout", retryable=True)
        stream.result()
        if heard.error is not None:
            raise ModelError(heard.error, retryable=True, code="run_error")
        return heard

    async def _take_in(
        self, events: AsyncIterator[Event], heard: Round, listening: _Listening
    ) -> None:
        # Runs once a token. Nearly all are fragments of text, which need no more than two lists.
        encoder, buffer, flusher = self._encoder, self._buffer, self._flusher
        bare_text, hear_text, keep_text = encoder.bare_text, heard.add_text, buffer.add_text
        count = 0
        async with aclosing(cast("AsyncGenerator[Event]", events)) as stream:
            async for event in stream:
                if listening.is_left_behind:
                    return
                text = bare_text(event)
                if text is None:
                    heard.add(event)
                    buffer.add(*encoder.encode(event))
                else:
                    hear_text(text)
                    keep_text(text)
                count += 1
                if count >= FLUSH_CHUNKS:
                    count = 0
                    flusher.check(buffer)
                    flusher.flush(buffer)


async def _end(stream: asyncio.Task[None], listening: _Listening) -> None:
    """Cancel a stream until it has ended, or leave it behind; does nothing if it has.

    Whoever waits may be cancelled, and again: it is told so afterwards.
    """
    cancelled: asyncio.CancelledError | None = None
    for _ in range(MAX_CANCELS):
        if stream.done():
            break
        stream.cancel()
        try:
            await asyncio.wait([stream], timeout=CANCEL_PAUSE_MS / 1000)
        except asyncio.CancelledError as error:
            cancelled = error
    if not stream.done():
        listening.is_left_behind = True
        _left_behind.add(stream)
        stream.add_done_callback(_note_end)
        logger.error("a model's stream ignores that it is cancelled and is left behind: %r", stream)
    elif not stream.cancelled():
        # If nobody is told, it must not be "never retrieved".
        stream.exception()
    if cancelled is not None:
        raise cancelled


_left_behind: set[asyncio.Task[None]] = set()


def _note_end(stream: asyncio.Task[None]) -> None:
    _left_behind.discard(stream)
    error = None if stream.cancelled() else stream.exception()
    logger.warning("a stream that was left behind has ended: %r", error)


class _Listening:
    """One stream that is listened to.

    Attributes:
        over: Done when it has ended, or was silent for too long.
        is_left_behind: Whether nobody listens to it any more, though it goes on.
    """

    __slots__ = ("_quiet_ticks", "_seen", "buffer", "is_left_behind", "over")

    def __init__(self, buffer: ChunkBuffer) -> None:
        self.buffer = buffer
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_left_behind = False
        self._seen = buffer.next_index
        self._quiet_ticks = 0

    def look(self) -> None:
        """Stop listening if nothing was said since the last few looks."""
        if self.buffer.next_index != self._seen:
            self._seen, self._quiet_ticks = self.buffer.next_index, 0
            return
        self._quiet_ticks += 1
        if self._quiet_ticks > _TICKS:
            self.stop()

    def stop(self, _: object = None) -> None:
        """Listen no more."""
        if not self.over.done():
            self.over.set_result(None)


class SilenceLimit:
    """Tells of streams that say nothing for `limit_ms`, or up to a quarter longer; None is never.

    One timer looks at all streams of a process now and then: moving a timeout at every event
    would cost more than the event.
    """

    def __init__(self, limit_ms: int | None) -> None:
        self.limit_ms = limit_ms
        self._listening: dict[_Listening, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, buffer: ChunkBuffer) -> _Listening:
        """Watch what is added to a buffer."""
        listening = _Listening(buffer)
        self._listening[listening] = None
        if self._timer is None:
            self._arm()
        return listening

    def end(self, listening: _Listening) -> None:
        """Watch no longer."""
        del self._listening[listening]

    def _arm(self) -> None:
        if self.limit_ms is None:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.limit_ms / _TICKS / 1000, self._look)

    def _look(self) -> None:
        self._timer = None
        for listening in self._listening:
            listening.look()
        if self._listening:
            self._arm()
