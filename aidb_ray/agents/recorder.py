"""What a generation's streams say, kept as chunks; and when their silence is too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from aidb_ray.chunks import FLUSH_CHUNKS, ChunkBuffer, ChunkFlusher
from aidb_ray.errors import ModelError
from aidb_ray.models.events import EventEncoder
from aidb_ray.models.round import Round

if TYPE_CHECKING:
    from ag_ui.core import Event

_TICKS = 8


class Recorder:
    """Records the streams of one generation."""

    def __init__(self, buffer: ChunkBuffer, flusher: ChunkFlusher, silence: SilenceLimit) -> None:
        self._buffer = buffer
        self._flusher = flusher
        self._silence = silence
        self._encoder = EventEncoder()

    async def record(self, events: AsyncIterator[Event]) -> Round:
        """Keep every event of a stream as a chunk; returns what they add up to.

        Raises:
            ModelError: the stream said that it failed, or nothing for too long.
            AidbError: chunks could not be written.
        """
        heard = Round()
        async with aclosing(cast("AsyncGenerator[Event]", events)) as stream:
            listening = self._silence.begin(self._buffer)
            try:
                await self._take_in(stream, heard)
            except asyncio.CancelledError:
                if listening.was_silent():
                    limit_ms = self._silence.limit_ms
                    words = f"The model was silent for {limit_ms} ms."
                    raise ModelError(words, code="idle_timeout", retryable=True) from None
                raise
            finally:
                self._silence.end(listening)
        if heard.error is not None:
            raise ModelError(heard.error, retryable=True, code="run_error")
        return heard

    async def _take_in(self, stream: AsyncIterator[Event], heard: Round) -> None:
        # Runs once a token. Nearly all are fragments of text, which need no more than two lists.
        encoder, buffer, flusher = self._encoder, self._buffer, self._flusher
        bare_text, hear_text, keep_text = encoder.bare_text, heard.add_text, buffer.add_text
        count = 0
        async for event in stream:
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


class _Listening:
    """One stream that is listened to, by the task that made this."""

    __slots__ = ("_cancelling", "_is_ended", "_quiet_ticks", "_seen", "_task", "buffer")

    def __init__(self, buffer: ChunkBuffer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.buffer = buffer
        self._task = task
        self._cancelling = task.cancelling()
        self._seen = buffer.next_index
        self._quiet_ticks = 0
        self._is_ended = False

    def look(self) -> None:
        """End the stream if nothing was said since the last few looks."""
        if self.buffer.next_index != self._seen:
            self._seen, self._quiet_ticks = self.buffer.next_index, 0
            return
        self._quiet_ticks += 1
        if self._quiet_ticks > _TICKS and not self._is_ended:
            self._is_ended = True
            self._task.cancel()

    def was_silent(self) -> bool:
        """Whether the task was cancelled for silence, and for nothing else."""
        return self.settle() <= self._cancelling

    def settle(self) -> int:
        """Take back the cancellation, if there is one; returns how many others there are."""
        if not self._is_ended:
            return self._cancelling + 1
        self._is_ended = False
        return self._task.uncancel()


class SilenceLimit:
    """Ends streams that say nothing for `limit_ms`, or up to a quarter longer.

    One timer looks at all streams of a process now and then: moving a timeout at every event
    would cost more than the event.
    """

    def __init__(self, limit_ms: int) -> None:
        self.limit_ms = limit_ms
        self._listening: dict[_Listening, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, buffer: ChunkBuffer) -> _Listening:
        """Watch what the current task adds to a buffer; it is cancelled when it adds nothing."""
        listening = _Listening(buffer)
        self._listening[listening] = None
        if self._timer is None:
            self._arm()
        return listening

    def end(self, listening: _Listening) -> None:
        """Watch no longer."""
        del self._listening[listening]
        listening.settle()

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.limit_ms / _TICKS / 1000, self._look)

    def _look(self) -> None:
        self._timer = None
        for listening in self._listening:
            listening.look()
        if self._listening:
            self._arm()
