"""What stored chunks tell of a round that its rows do not: its end, or how far it came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ag_ui.core import (
    BaseEvent,
    CustomEvent,
    StepStartedEvent,
    TextMessageEndEvent,
    TextMessageStartEvent,
)

from aidb_ray.chunks import ChunkBuffer, ChunkCollection, follow_slices, slice_to_chunks
from aidb_ray.models.events import EventDecoder, EventEncoder, text_content
from aidb_ray.models.round import Round

if TYPE_CHECKING:
    from collections.abc import Iterable


async def read_newest_round(chunks: ChunkCollection, generation_id: str) -> Round:
    """Return the newest round of a generation, as far as its chunks are stored."""
    decode = EventDecoder().decode
    heard = Round()
    async for part in follow_slices(chunks, generation_id, follow=False):
        events = (decode(chunk.type, chunk.content) for chunk in slice_to_chunks(part))
        heard = hear_newest(heard, events)
    return heard


def hear_newest(heard: Round, events: Iterable[BaseEvent]) -> Round:
    """Take in the next events of a generation's stream; a new round or attempt begins afresh.

    What a new attempt took over comes between its marker and its round, and is part of that.
    """
    for event in events:
        is_marker = isinstance(event, CustomEvent) and event.name == "attempt"
        if is_marker or (heard.is_finished and isinstance(event, StepStartedEvent)):
            heard = Round()
        heard.add(event)
    return heard


def put_taken_over(buffer: ChunkBuffer, text: str) -> None:
    """Let the new attempt begin with what the one before had said, as one message."""
    message_id = f"attempt-{buffer.attempt}"
    encode = EventEncoder().encode
    for event in (
        TextMessageStartEvent(message_id=message_id, role="assistant"),
        text_content(message_id, text),
        TextMessageEndEvent(message_id=message_id),
    ):
        buffer.add(*encode(event))
