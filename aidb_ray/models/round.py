"""`Round`: what a model said in one round, put together from its events. No I/O, no clock."""

from __future__ import annotations

from typing import Any

import msgspec
from ag_ui.core import (
    BaseEvent,
    ReasoningEncryptedValueEvent,
    ReasoningMessageChunkEvent,
    ReasoningMessageContentEvent,
    RunErrorEvent,
    RunFinishedEvent,
    StepFinishedEvent,
    TextMessageChunkEvent,
    TextMessageContentEvent,
    TokenUsage,
    ToolCallArgsEvent,
    ToolCallChunkEvent,
    ToolCallStartEvent,
)

from aidb_ray.models.base import ModelMessage, ToolCallRequest, Usage

ROUND_STEP = "round"
"""Name of the AG-UI step that a round is."""


def finish_round(reason: str, usage: Usage | None = None) -> StepFinishedEvent:
    """Return the event that closes a round."""
    metadata: dict[str, Any] = {"finishReason": reason}
    if usage is not None:
        metadata["usage"] = msgspec.to_builtins(usage)
    return StepFinishedEvent(step_name=ROUND_STEP, metadata=metadata)


class Round:
    """What has been said so far; the same events in the same order always give the same round.

    Feed it live events or decoded chunks. Events that say nothing about the answer are ignored,
    so a stream that holds more than the round's own events may be fed as it is.

    Attributes:
        is_finished: Whether the closing event was seen. Until then text and calls are partial.
        finish_reason: Why the model stopped: `"stop"`, `"tool_calls"`, `"length"`,
            `"content_filter"` or a provider's own word; `""` until it is known.
        usage: Tokens charged, None if the provider did not say.
        error: Message of the `RUN_ERROR` that ended the stream, if one did.
    """

    def __init__(self) -> None:
        self.is_finished = False
        self.finish_reason = ""
        self.usage: Usage | None = None
        self.error: str | None = None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._encrypted: list[str] = []
        # Name and argument fragments by call id, in the order the calls started.
        self._calls: dict[str, tuple[str, list[str]]] = {}
        self._last_call_id = ""

    def add_text(self, text: str) -> None:
        """Take in a fragment of text, as `add` does with the event that carries it."""
        self._text.append(text)

    def add(self, event: BaseEvent) -> None:
        """Take in the next event.

        Raises:
            ValueError: arguments belong to a tool call that has not started.
        """
        if type(event) is TextMessageContentEvent:
            self._text.append(event.delta)
            return
        match event:
            case ToolCallArgsEvent():
                self._call(event.tool_call_id)[1].append(event.delta)
            case ReasoningMessageContentEvent():
                self._reasoning.append(event.delta)
            case ToolCallStartEvent():
                self._calls[event.tool_call_id] = (event.tool_call_name, [])
            case StepFinishedEvent() if event.step_name == ROUND_STEP:
                self._finish(event.metadata or {})
            case RunFinishedEvent():
                self._finish(event.metadata or {})
                if event.usage and self.usage is None:
                    self.usage = sum((_usage_of(entry) for entry in event.usage), Usage())
            case RunErrorEvent():
                self.error = event.message
            case ReasoningEncryptedValueEvent():
                self._encrypted.append(event.encrypted_value)
            case TextMessageChunkEvent():
                self._text.append(event.delta or "")
            case ReasoningMessageChunkEvent():
                self._reasoning.append(event.delta or "")
            case ToolCallChunkEvent():
                self._add_call_chunk(event)
            case _:
                pass

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """What the model showed of its reasoning so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> list[ToolCallRequest]:
        """The calls the model asks for, in the order they started."""
        return [
            # A model that calls a tool without parameters may send no arguments at all.
            ToolCallRequest(id_, name, "".join(args) or "{}")
            for id_, (name, args) in self._calls.items()
        ]

    def to_message(self) -> ModelMessage:
        """Return the assistant message that continues the conversation."""
        return ModelMessage(
            "assistant",
            self.text,
            tool_calls=tuple(self.tool_calls),
            reasoning=tuple(self._encrypted),
        )

    def _call(self, id_: str) -> tuple[str, list[str]]:
        call = self._calls.get(id_)
        if call is None:
            raise ValueError(f"Arguments of tool call {id_!r} came before its start.")
        return call

    def _add_call_chunk(self, event: ToolCallChunkEvent) -> None:
        if event.tool_call_id is not None and event.tool_call_id not in self._calls:
            self._calls[event.tool_call_id] = (event.tool_call_name or "", [])
        self._last_call_id = event.tool_call_id or self._last_call_id
        self._call(self._last_call_id)[1].append(event.delta or "")

    def _finish(self, metadata: dict[str, Any]) -> None:
        self.is_finished = True
        self.finish_reason = metadata.get("finishReason", self.finish_reason)
        if "usage" in metadata:
            self.usage = msgspec.convert(metadata["usage"], Usage)


def _usage_of(entry: TokenUsage) -> Usage:
    counts = {name: getattr(entry, name) or 0 for name in Usage.__struct_fields__}
    return Usage(**counts)
