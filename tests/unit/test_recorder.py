"""Recording streams: what is kept, and what a silence ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any, cast

import pytest
from ag_ui.core import Event

from aidb_ray import ModelError
from aidb_ray.agents import recorder as recorder_module
from aidb_ray.agents.recorder import Recorder, SilenceLimit
from aidb_ray.chunks import ChunkBuffer, ChunkFlusher
from aidb_ray.models.writer import RoundWriter
from tests.stores import until

LIMIT_MS = 20
SOON_MS = 20_000


def said(*texts: str) -> list[Event]:
    writer = RoundWriter()
    writer.texts(texts, "m")
    writer.finish("stop")
    return writer.take()


async def tell(*texts: str) -> AsyncGenerator[Event]:
    for event in said(*texts):
        yield event


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


class Deaf:
    """A stream that ignores being cancelled, until it is let speak."""

    def __init__(self) -> None:
        self.cancels = 0
        self.may_speak = asyncio.Event()
        self.began = asyncio.Event()
        self.is_closed = asyncio.Event()

    async def stream(self) -> AsyncGenerator[Event]:
        self.began.set()
        try:
            while not self.may_speak.is_set():
                try:
                    await self.may_speak.wait()
                except asyncio.CancelledError:
                    self.cancels += 1
            for event in said("late"):
                yield event
        finally:
            self.is_closed.set()


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Deaf:
    monkeypatch.setattr(recorder_module, "CANCEL_PAUSE_MS", 1)
    return Deaf()


async def test_a_silent_stream_that_ignores_being_cancelled_is_left_behind(
    recorder: Recorder, buffer: ChunkBuffer, deaf: Deaf, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError) as raised:
        await recorder.record(deaf.stream())

    assert raised.value.code == "idle_timeout"
    assert deaf.cancels == recorder_module.MAX_CANCELS
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert "stream" in record.getMessage()
    assert "Task" in record.getMessage()

    heard = await recorder.record(tell("on time"))
    kept = buffer.next_index
    deaf.may_speak.set()
    await deaf.is_closed.wait()
    await until(lambda: not recorder_module._left_behind)
    assert heard.text == "on time"
    assert buffer.next_index == kept, "what it says later is not kept"


async def test_whoever_waits_for_a_stream_that_ignores_being_cancelled_may_leave(
    buffer: ChunkBuffer, deaf: Deaf
) -> None:
    recorder = Recorder(buffer, ChunkFlusher(cast("Any", None)), SilenceLimit(None))
    recording = asyncio.create_task(recorder.record(deaf.stream()))
    await until(deaf.began.is_set)
    recording.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recording

    assert deaf.cancels == recorder_module.MAX_CANCELS
    deaf.may_speak.set()
    await until(lambda: not recorder_module._left_behind)


async def test_silence_beside_a_cancellation_is_no_silence(
    recorder: Recorder, deaf: Deaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits is cancelled while the silent stream is being ended."""
    monkeypatch.setattr(recorder_module, "CANCEL_PAUSE_MS", SOON_MS)
    recording = asyncio.create_task(recorder.record(deaf.stream()))
    await until(lambda: deaf.cancels == 1)
    recording.cancel()
    await until(lambda: deaf.cancels == 2)
    deaf.may_speak.set()

    with pytest.raises(asyncio.CancelledError):
        await recording
    assert recording.cancelling() == 1


async def test_without_a_limit_no_silence_is_too_long(buffer: ChunkBuffer) -> None:
    silence = SilenceLimit(None)
    recorder = Recorder(buffer, ChunkFlusher(cast("Any", None)), silence)

    async def stream() -> AsyncGenerator[Event]:
        assert silence._timer is None
        for event in said("at last"):
            yield event

    assert (await recorder.record(stream())).text == "at last"


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
