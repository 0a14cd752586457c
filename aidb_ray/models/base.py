"""What a model is given and what it must offer: `ModelMessage`, `TextAdapter`, one round.

A round is one request to a model and its streamed answer. It opens with `STEP_STARTED` and closes
with `STEP_FINISHED`, both named `"round"`; the closing event's `metadata` holds `finishReason` and
`usage`. A run is a loop of rounds and has its own `RUN_STARTED` and `RUN_FINISHED`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray.errors import ConfigError
from aidb_ray.models.tools import Tool

Role = Literal["user", "assistant", "system", "tool"]


class ToolCallRequest(msgspec.Struct, frozen=True):
    """One call the model asked for; `args_json` is its argument text, not yet checked."""

    id: str
    name: str
    args_json: str = "{}"


# A msgspec value, not a dataclass: a round builds one per message of its history, and this costs
# 0.08 us against 0.64 us for a frozen dataclass of the same fields.
class ModelMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of the conversation as a model reads it.

    Attributes:
        tool_calls: Calls that an assistant message asks for, in order.
        tool_call_id: The call that a tool message answers.
        name: Who wrote it, for models that tell several authors of one role apart.
        reasoning: Opaque items by which a provider continues its own reasoning in the next
            round of the same run. They mean nothing to any other provider or model.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCallRequest, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: tuple[str, ...] = ()


class Usage(msgspec.Struct, frozen=True, rename="camel"):
    """Tokens that a round was charged for.

    `input_tokens` and `output_tokens` are totals; the other two are parts of them.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cached_input_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
        )


class TextAdapter(Protocol):
    """A model behind some provider's protocol, as a stream of AG-UI events.

    Implement `stream` as an async generator. An adapter that also has `fingerprint() -> str` is
    told apart from others of its class by that text; see `adapter_fingerprint`. One that also has
    `check() -> None`, a plain function, may raise `ConfigError` there for what is missing in this
    process, such as a key: an agent calls it before it begins, so its messages wait.
    """

    def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Answer `messages` in one round.

        Every message, tool call and reasoning block that starts also ends, and the last event is
        `STEP_FINISHED`; a stream without it is not a finished round. Closing the generator, or
        cancelling the task that awaits it, aborts the request. The tools are only described to
        the model: calling them is the caller's part.

        Raises:
            ModelError: the provider failed. Events that were yielded before stay valid.
        """
        ...


def check_adapter(adapter: object) -> None:
    """Raise if this cannot be an adapter: a class, a model's name, None.

    Raises:
        ConfigError: `invalid_adapter`.
    """
    if isinstance(adapter, type) or not callable(getattr(adapter, "stream", None)):
        raise ConfigError(
            f"{adapter!r} is no model adapter, which has a method `stream`: give openai_text(...), "
            f"or an object that implements TextAdapter.",
            code="invalid_adapter",
        )


def check_here(adapter: TextAdapter) -> None:
    """Have an adapter say whether this process has what it needs; most need nothing.

    Raises:
        ConfigError: something is missing.
    """
    check = getattr(adapter, "check", None)
    if callable(check):
        check()


def stream_round(
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    *,
    tools: Sequence[Tool] = (),
    system_prompts: Sequence[str] = (),
    output_schema: type[BaseModel] | None = None,
) -> AsyncGenerator[Event, None]:
    """Return the adapter's own stream for one round, with nothing between it and the caller.

    Feed the events to a `Round` to learn what the model said and which tools it wants.
    """
    return adapter.stream(
        parse_messages(messages),
        tools=tools,
        system_prompts=system_prompts,
        output_schema=output_schema,
    )


def parse_messages(messages: Iterable[ModelMessage | Mapping[str, Any]]) -> list[ModelMessage]:
    """Return `messages` as values; mappings have the fields of `ModelMessage`.

    Raises:
        ValueError: a mapping has an unknown field, an unknown role or a value of the wrong type.
    """
    return [
        message
        if isinstance(message, ModelMessage)
        else msgspec.convert(message, ModelMessage, from_attributes=False)
        for message in messages
    ]


def adapter_fingerprint(adapter: TextAdapter) -> str:
    """Return a digest that is equal for adapters that ask the same model in the same way.

    An adapter without `fingerprint` counts as equal to every other of its class.
    """
    describe = getattr(adapter, "fingerprint", None)
    kind = type(adapter)
    described = describe() if callable(describe) else ""
    text = f"{kind.__module__}.{kind.__qualname__}:{described}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
