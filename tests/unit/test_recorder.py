"""Recording streams: what is kept, and what a silence ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, cast

import pytest
from ag_ui.core import Event

from aidb_ray import ModelError
from aidb_ray.agents.recorder import Recorder, SilenceLimit
from aidb_ray.chunks import ChunkBuffer, ChunkFlusher
from aidb_ray.models.writer import RoundWriter

LIMIT_MS = 20


def said(*texts: str) -> list[Event]:
    writer = RoundWriter()
    writer.texts(texts, "m")
    writer.finish("stop")
    return writer.take()


@pytest.fixture
def buffer() -> ChunkBuffer:
    return ChunkBuffer("aidb://a", "g", next_index=0, attempt=1)


@pytest.fixture
def recorder(buffer: ChunkBuffer) -> Recorder:
    # Nothing here is long enough to be flushed.
    flusher = ChunkFlusher(cast("Any", None))
    return Recorder(buffer, flusher, SilenceLimit(LIMIT_MS))


async def test_every_event_is_kept_and_added_up(recorder: Recorder, buffer: ChunkBuffer) -> None:
    events = said("one ", "two", "\x1ethree")

    async def stream() -> AsyncGenerator[Event]:
        for event in events:
            yield event

    heard = await recorder.record(stream())

    assert heard.text == "one two\x1ethree"
    assert heard.is_finished
    assert buffer.next_index == len(events)


async def test_a_stream_that_falls_silent_is_ended(recorder: Recorder, buffer: ChunkBuffer) -> None:
    closed = asyncio.Event()

    async def stream() -> AsyncGenerator[Event]:
        try:
            yield said("one")[0]
            await asyncio.Event().wait()
        finally:
            closed.set()

    with pytest.raises(ModelError, match="silent") as raised:
        await recorder.record(stream())

    assert (raised.value.code, raised.value.retryable) == ("idle_timeout", True)
    assert buffer.next_index == 1, "what came before is kept"
    assert closed.is_set()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_stream_that_goes_on_is_never_silent(recorder: Recorder) -> None:
    async def stream() -> AsyncGenerator[Event]:
        for event in said(*["word "] * 10):
            await asyncio.sleep(LIMIT_MS / 4 / 1000)
            yield event

    assert (await recorder.record(stream())).is_finished


async def test_a_cancellation_is_not_taken_for_silence(recorder: Recorder) -> None:
    began = asyncio.Event()

    async def stream() -> AsyncGenerator[Event]:
        began.set()
        await asyncio.Event().wait()
        yield said("never")[0]

    recording = asyncio.create_task(recorder.record(stream()))
    await began.wait()
    recording.cancel()

    with pytest.raises(asyncio.CancelledError):
        await recording


async def test_a_model_that_ends_well_when_it_is_cancelled_is_heard(recorder: Recorder) -> None:
    class Stubborn:
        """Says all it has when it is told to stop."""

        def __init__(self) -> None:
            self._events = iter(said("late"))
            self._was_told = False

        def __aiter__(self) -> AsyncIterator[Event]:
            return self

        async def __anext__(self) -> Event:
            if not self._was_told:
                self._was_told = True
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
            event = next(self._events, None)
            if event is None:
                raise StopAsyncIteration
            return event

        async def aclose(self) -> None:
            """It has nothing to close."""

    heard = await recorder.record(cast("Any", Stubborn()))

    assert heard.text == "late"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
