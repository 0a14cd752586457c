"""AG-UI events: how fragments are made, and how events become chunk rows and come back.

A chunk row holds an event's type and a payload. Most events of a stream are fragments of a text,
so the payload of a fragment is the fragment itself; the id it belongs to is the id of the last
start event of its kind. Every other payload is the event as JSON without its type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import msgspec
from ag_ui.core import (
    BaseEvent,
    Event,
    EventType,
    ReasoningMessageContentEvent,
    ReasoningMessageEndEvent,
    ReasoningMessageStartEvent,
    TextMessageContentEvent,
    TextMessageEndEvent,
    TextMessageStartEvent,
    ToolCallArgsEvent,
    ToolCallEndEvent,
    ToolCallStartEvent,
)
from pydantic import BaseModel

E = TypeVar("E", bound=BaseEvent)


def _fragment_maker(template: E, id_field: str) -> Callable[[str, str], E]:
    """Return a function of an id and a fragment that builds events like `template`.

    Fragments are made once per token and again at every replay. Filling the slots of a fresh
    instance takes 0.6 us where the validating constructor takes 1.4 us and `model_construct`
    5.8 us (Python 3.11, pydantic 2.14); both values are strings already, so nothing is left
    to validate.
    """
    cls = type(template)
    values = dict(template.__dict__)
    fields_set = {id_field, "delta"}
    new = cls.__new__
    fill = object.__setattr__

    def make(id_: str, delta: str) -> E:
        event = new(cls)
        fields = values.copy()
        fields[id_field] = id_
        fields["delta"] = delta
        fill(event, "__dict__", fields)
        fill(event, "__pydantic_fields_set__", fields_set.copy())
        fill(event, "__pydantic_extra__", {})
        fill(event, "__pydantic_private__", None)
        return event

    return make


text_content = _fragment_maker(TextMessageContentEvent(message_id="", delta=""), "message_id")
reasoning_content = _fragment_maker(
    ReasoningMessageContentEvent(message_id="", delta=""), "message_id"
)
tool_call_args = _fragment_maker(ToolCallArgsEvent(tool_call_id="", delta=""), "tool_call_id")

_TYPES: dict[type[BaseEvent], str] = {
    cls: cast("EventType", cls.model_fields["type"].default).value
    for cls in BaseEvent.__subclasses__()
}
_CLASSES: dict[str, type[BaseEvent]] = {name: cls for cls, name in _TYPES.items()}
# Marks a payload that is JSON although its type is usually bare. Text hardly ever begins with
# it, and a fragment that does is written as JSON.
_JSON_MARK = "\x1e"

# What a start event opens: the types that are bare while it is the last of its kind.
_OPENS: dict[type[BaseEvent], tuple[type[BaseEvent], ...]] = {
    TextMessageStartEvent: (TextMessageContentEvent, TextMessageEndEvent),
    ReasoningMessageStartEvent: (ReasoningMessageContentEvent, ReasoningMessageEndEvent),
    ToolCallStartEvent: (ToolCallArgsEvent, ToolCallEndEvent),
}
_ID_FIELDS: dict[type[BaseEvent], str] = {
    cls: "tool_call_id" if start is ToolCallStartEvent else "message_id"
    for start, opened in _OPENS.items()
    for cls in (start, *opened)
}
_FROM_BARE: dict[type[BaseEvent], Callable[[str, str], Event]] = {
    TextMessageContentEvent: text_content,
    ReasoningMessageContentEvent: reasoning_content,
    ToolCallArgsEvent: tool_call_args,
    TextMessageEndEvent: lambda id_, _: TextMessageEndEvent(message_id=id_),
    ReasoningMessageEndEvent: lambda id_, _: ReasoningMessageEndEvent(message_id=id_),
    ToolCallEndEvent: lambda id_, _: ToolCallEndEvent(tool_call_id=id_),
}


class EventEncoder:
    """Turns the events of one stream, in order, into types and payloads.

    An encoder that takes over in the middle of a stream is safe: until it has seen a start event
    it writes ids out in full.
    """

    def __init__(self) -> None:
        self._open_ids: dict[type[BaseEvent], str] = {}

    def bare_text(self, event: BaseEvent) -> str | None:
        """Return the payload of a fragment of text if that is all there is to say of the event.

        Most events of most streams are such; `encode` comes to the same for them.
        """
        if type(event) is not TextMessageContentEvent:
            return None
        fields = event.__dict__
        delta: str = fields["delta"]
        if (
            fields["message_id"] == self._open_ids.get(TextMessageContentEvent)
            and len(event.__pydantic_fields_set__) == 2
            and delta[:1] != _JSON_MARK
        ):
            return delta
        return None

    def encode(self, event: BaseEvent) -> tuple[str, str]:
        """Return the event's type and its payload."""
        text = self.bare_text(event)
        if text is not None:
            return "TEXT_MESSAGE_CONTENT", text
        cls = type(event)
        fields = event.__dict__
        id_field = _ID_FIELDS.get(cls)
        if id_field is None:
            return _TYPES[cls], _encode_json(event)
        id_: str = fields[id_field]
        if cls in _OPENS:
            for opened in _OPENS[cls]:
                self._open_ids[opened] = id_
            return _TYPES[cls], _encode_json(event)
        # With nothing set but the id (and the fragment), the payload says it all.
        bare: str = fields.get("delta", "")
        if (
            len(event.__pydantic_fields_set__) == ("delta" in fields) + 1
            and id_ == self._open_ids.get(cls)
            and not bare.startswith(_JSON_MARK)
        ):
            return _TYPES[cls], bare
        return _TYPES[cls], _JSON_MARK + _encode_json(event)


class EventDecoder:
    """Turns types and payloads back into events equal to those that were encoded.

    Rows are given in the order of their stream. Rows of bare payload may be left out, so a reader
    that wants only the end of a stream can skip the fragments before it, but not the rest.
    """

    def __init__(self) -> None:
        # By type: how an event of bare payload is made, and the id it belongs to.
        self._open: dict[str, tuple[Callable[[str, str], Event], str]] = {}

    def decode(self, type_: str, payload: str) -> Event:
        """Return the event of one row.

        Raises:
            ValueError: the type is unknown, the payload is not that of such an event, or the
                start event it refers to was not decoded before.
        """
        opened = self._open.get(type_)
        if opened is not None and payload[:1] != _JSON_MARK:
            make, id_ = opened
            return make(id_, payload)
        cls = _CLASSES.get(type_)
        if cls is None:
            raise ValueError(f"{type_!r} is not an AG-UI event type.")
        if cls in _FROM_BARE:
            if payload[:1] != _JSON_MARK:
                raise ValueError(f"A {type_} row came before any start event of its kind.")
            payload = payload[1:]
        event = cls.model_validate_json(payload)
        for bare in _OPENS.get(cls, ()):
            self._open[_TYPES[bare]] = (_FROM_BARE[bare], event.__dict__[_ID_FIELDS[cls]])
        return cast("Event", event)


def _encode_json(event: BaseEvent) -> str:
    # A third of the time of `model_dump_json`, whose wrapping serializer runs Python per event.
    fields = event.__dict__
    values: dict[str, Any] = {
        alias: fields[name]
        for name, alias, is_required in _set_fields(
            type(event), frozenset(event.__pydantic_fields_set__)
        )
        if is_required or fields[name] is not None
    }
    if event.__pydantic_extra__:
        values |= event.__pydantic_extra__
    return msgspec.json.encode(values, enc_hook=_dump_model).decode()


@lru_cache(maxsize=1_024)
def _set_fields(cls: type[BaseEvent], fields_set: frozenset[str]) -> list[tuple[str, str, bool]]:
    """Return name, name in JSON, and whether it is required, of the fields that JSON shows."""
    return [
        (name, field.alias or name, field.is_required())
        for name, field in cls.model_fields.items()
        if name in fields_set and name != "type"
    ]


def _dump_model(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(f"{type(value).__name__} has no JSON form.")
