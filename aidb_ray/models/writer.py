"""`RoundWriter`: well-formed AG-UI events from what a provider says. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

from ag_ui.core import (
    Event,
    ReasoningEncryptedValueEvent,
    ReasoningEndEvent,
    ReasoningMessageEndEvent,
    ReasoningMessageStartEvent,
    ReasoningStartEvent,
    StepStartedEvent,
    TextMessageEndEvent,
    TextMessageStartEvent,
    ToolCallEndEvent,
    ToolCallStartEvent,
)

from aidb_ray.models.base import Usage
from aidb_ray.models.events import reasoning_content, text_content, tool_call_args
from aidb_ray.models.round import ROUND_STEP, finish_round


class RoundWriter:
    """Opens the round and its blocks when they are first spoken of, and closes what is open.

    Texts and reasoning follow one another; several tool calls may be open at once.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._has_started = False
        self._reasoning_id = ""
        # The id that text was given with, and the one that its block got.
        self._text_given = self._text_id = ""
        self._texts = 0
        self._open_calls: dict[str, None] = {}

    def take(self) -> list[Event]:
        """Return what was written since the last time."""
        events, self._events = self._events, []
        return events

    def text(self, delta: str, message_id: str) -> None:
        """Add to the text `message_id`; a text that was left is taken up under a new id."""
        if message_id != self._text_given:
            self._close_blocks()
            self._text_given = message_id
            self._text_id = f"{message_id}-{self._texts}" if self._texts else message_id
            self._texts += 1
            self._write(TextMessageStartEvent(message_id=self._text_id, role="assistant"))
        self._events.append(text_content(self._text_id, delta))

    def texts(self, deltas: Sequence[str], message_id: str) -> None:
        """Add fragments, one or more, to the text `message_id`."""
        self.text(deltas[0], message_id)
        text_id = self._text_id
        self._events += [text_content(text_id, delta) for delta in deltas[1:]]

    def reasoning(self, delta: str, message_id: str) -> None:
        """Add to the reasoning that is shown."""
        if message_id != self._reasoning_id:
            self._close_blocks()
            self._reasoning_id = message_id
            self._write(ReasoningStartEvent(message_id=message_id))
            self._write(ReasoningMessageStartEvent(message_id=message_id, role="reasoning"))
        self._events.append(reasoning_content(message_id, delta))

    def keep_reasoning(self, message_id: str, opaque: str) -> None:
        """Add reasoning that only its provider can read, to be given back in the next round."""
        self._close_blocks()
        self._write(
            ReasoningEncryptedValueEvent(
                subtype="message", entity_id=message_id, encrypted_value=opaque
            )
        )

    def start_call(self, call_id: str, name: str) -> None:
        """Open a tool call."""
        self._close_blocks()
        self._open_calls[call_id] = None
        self._write(ToolCallStartEvent(tool_call_id=call_id, tool_call_name=name))

    def call_args(self, call_id: str, delta: str) -> None:
        """Add to the arguments of an open call."""
        self._events.append(tool_call_args(call_id, delta))

    def end_call(self, call_id: str) -> None:
        """Close a call; one that is closed stays so."""
        if call_id in self._open_calls:
            del self._open_calls[call_id]
            self._write(ToolCallEndEvent(tool_call_id=call_id))

    def finish(self, reason: str, usage: Usage | None = None) -> None:
        """Close what is open and the round."""
        self._close_blocks()
        for call_id in list(self._open_calls):
            self.end_call(call_id)
        self._write(finish_round(reason, usage))

    def _write(self, event: Event) -> None:
        if not self._has_started:
            self._has_started = True
            self._events.append(StepStartedEvent(step_name=ROUND_STEP))
        self._events.append(event)

    def _close_blocks(self) -> None:
        if self._reasoning_id:
            self._write(ReasoningMessageEndEvent(message_id=self._reasoning_id))
            self._write(ReasoningEndEvent(message_id=self._reasoning_id))
            self._reasoning_id = ""
        if self._text_given:
            self._write(TextMessageEndEvent(message_id=self._text_id))
            self._text_given = ""
