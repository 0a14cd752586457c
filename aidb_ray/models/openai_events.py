"""From the stream of an OpenAI-compatible server to AG-UI events. No I/O, no clock.

The payloads are decoded here and not by the SDK, whose stream takes 90 us an event where the whole
adapter takes 15 us (openai 3.54, November 2026): one process serves hundreds of streams.

Sources: https://platform.openai.com/docs/api-reference/chat-streaming,
https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

import msgspec
from ag_ui.core import Event

from aidb_ray.errors import ModelError
from aidb_ray.models.base import Usage
from aidb_ray.models.writer import RoundWriter

T = TypeVar("T")

# Provider's words for a failure, our code for it, and whether trying again can help.
_FAILURES: dict[str, tuple[str, bool]] = {
    "server_error": ("server_error", True),
    "internal_error": ("server_error", True),
    "overloaded_error": ("server_error", True),
    "rate_limit_exceeded": ("rate_limited", True),
    "insufficient_quota": ("insufficient_quota", False),
    "context_length_exceeded": ("context_length_exceeded", False),
}
_STATUSES: dict[int, tuple[str, bool]] = {
    401: ("unauthorized", False),
    403: ("forbidden", False),
    404: ("not_found", False),
    408: ("timeout", True),
    409: ("server_error", True),
    429: ("rate_limited", True),
}


class Translator(Protocol):
    """Turns the payloads of one answer, in order, into the events of one round."""

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete; later payloads are not for us."""
        ...

    def translate(self, payload: bytes) -> list[Event]:
        """Return the events that `payload` stands for.

        Raises:
            ModelError: `malformed` if it is not what the protocol says; or the error that the
                provider reports in it.
        """
        ...

    def end(self) -> list[Event]:
        """Return the events that are left when the server has said all.

        Raises:
            ModelError: `truncated`: it stopped before the answer was complete.
        """
        ...


class _TokenDetails(msgspec.Struct):
    reasoning_tokens: int | None = None
    cached_tokens: int | None = None


class _ChatUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _TokenDetails | None = None
    completion_tokens_details: _TokenDetails | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _CallDelta(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    # Two names that compatible servers use for the reasoning they show.
    reasoning_content: str | None = None
    reasoning: Any = None
    tool_calls: list[_CallDelta] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _ChatChunk(msgspec.Struct):
    id: str | None = None
    choices: list[_Choice] | None = None
    usage: _ChatUsage | None = None
    error: Any = None


class ChatTranslator:
    """`Translator` of Chat Completions chunks; only the first choice counts."""

    def __init__(self) -> None:
        self.is_done = False
        self._writer = RoundWriter()
        self._decoder = msgspec.json.Decoder(_ChatChunk)
        self._id = ""
        self._call_ids: dict[int, str] = {}
        self._calls = 0
        self._finish_reason = ""
        self._usage: Usage | None = None

    def translate(self, payload: bytes) -> list[Event]:
        """See `Translator.translate`."""
        if payload == b"[DONE]":
            self.is_done = True
            return self.end()
        chunk = _decode(self._decoder, payload)
        if chunk.error:
            raise provider_error(chunk.error)
        if chunk.usage is not None:
            self._usage = _chat_usage(chunk.usage)
        self._id = self._id or chunk.id or "message"
        for choice in (chunk.choices or ())[:1]:
            if choice.delta is not None:
                self._add(choice.delta)
            self._finish_reason = choice.finish_reason or self._finish_reason
        return self._writer.take()

    def end(self) -> list[Event]:
        """See `Translator.end`."""
        if not self._finish_reason:
            raise _truncated()
        self._writer.finish(self._finish_reason, self._usage)
        return self._writer.take()

    def _add(self, delta: _Delta) -> None:
        reasoning = delta.reasoning_content or delta.reasoning
        if reasoning and isinstance(reasoning, str):
            self._writer.reasoning(reasoning, f"{self._id}-reasoning")
        if text := delta.content or delta.refusal:
            self._writer.text(text, self._id)
        for call in delta.tool_calls or ():
            self._add_call(call)

    def _add_call(self, call: _CallDelta) -> None:
        call_id = self._call_ids.get(call.index)
        name = call.function.name if call.function is not None else None
        # Some servers give every parallel call the index 0 and tell them apart by id.
        if call_id is None or (name and call.id and call.id != call_id):
            if not name:
                raise ModelError(
                    "A tool call came without a name.", code="malformed", retryable=True
                )
            # Others give no ids at all; `chunk.id` differs between rounds.
            call_id = call.id or f"{self._id}-call-{self._calls}"
            self._calls += 1
            self._call_ids[call.index] = call_id
            self._writer.start_call(call_id, name)
        if call.function is not None and call.function.arguments:
            self._writer.call_args(call_id, call.function.arguments)


class _ResponsesUsage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _TokenDetails | None = None
    output_tokens_details: _TokenDetails | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Response(msgspec.Struct):
    usage: _ResponsesUsage | None = None
    incomplete_details: _Incomplete | None = None
    error: Any = None


class _Item(msgspec.Struct):
    type: str = ""
    id: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    encrypted_content: str | None = None
    summary: Any = None


class _ResponsesEvent(msgspec.Struct):
    type: str = ""
    item_id: str | None = None
    output_index: int = 0
    summary_index: int = 0
    delta: Any = None
    arguments: str | None = None
    item: _Item | None = None
    response: _Response | None = None
    # Of an event of type `error`; some servers nest it.
    code: str | None = None
    message: str | None = None
    error: Any = None


class ResponsesTranslator:
    """`Translator` of Responses events."""

    def __init__(self) -> None:
        self.is_done = False
        self._writer = RoundWriter()
        self._decoder = msgspec.json.Decoder(_ResponsesEvent)
        # By output index: the id of a call, and whether any of its arguments came.
        self._calls: dict[int, tuple[str, bool]] = {}
        self._summary_index = 0

    def translate(self, payload: bytes) -> list[Event]:
        """See `Translator.translate`."""
        if payload == b"[DONE]":
            return []
        event = _decode(self._decoder, payload)
        match event.type:
            case "response.output_text.delta" | "response.refusal.delta":
                self._writer.text(_text(event.delta), self._id_of(event, "message"))
            case "response.function_call_arguments.delta":
                self._add_args(event, _text(event.delta))
            case "response.reasoning_summary_text.delta" | "response.reasoning_text.delta":
                self._add_reasoning(event)
            case "response.output_item.added":
                self._begin_item(event)
            case "response.output_item.done":
                self._end_item(event)
            case "response.completed" | "response.incomplete":
                self._finish(event.response or _Response())
            case "response.failed":
                raise provider_error(event.response and event.response.error)
            case "error":
                raise provider_error(event.error or {"code": event.code, "message": event.message})
            case _:
                pass
        return self._writer.take()

    def end(self) -> list[Event]:
        """See `Translator.end`."""
        raise _truncated()

    def _id_of(self, event: _ResponsesEvent, kind: str) -> str:
        return event.item_id or f"{kind}-{event.output_index}"

    def _add_reasoning(self, event: _ResponsesEvent) -> None:
        text = _text(event.delta)
        if event.summary_index != self._summary_index:
            self._summary_index = event.summary_index
            text = f"\n\n{text}"
        self._writer.reasoning(text, self._id_of(event, "reasoning"))

    def _begin_item(self, event: _ResponsesEvent) -> None:
        item = event.item
        if item is None or item.type != "function_call":
            return
        if not item.name or not (item.call_id or item.id):
            raise ModelError(
                "A tool call came without a name or an id.", code="malformed", retryable=True
            )
        call_id = item.call_id or item.id or ""
        self._calls[event.output_index] = call_id, False
        self._writer.start_call(call_id, item.name)

    def _add_args(self, event: _ResponsesEvent, delta: str) -> None:
        if event.output_index not in self._calls:
            raise ModelError(
                "Arguments came for a tool call that had not begun.",
                code="malformed",
                retryable=True,
            )
        call_id, _ = self._calls[event.output_index]
        self._calls[event.output_index] = call_id, True
        self._writer.call_args(call_id, delta)

    def _end_item(self, event: _ResponsesEvent) -> None:
        item = event.item
        if item is None:
            return
        if item.type == "function_call":
            if event.output_index not in self._calls:
                self._begin_item(event)
            call_id, has_args = self._calls[event.output_index]
            if not has_args and item.arguments:
                self._writer.call_args(call_id, item.arguments)
            self._writer.end_call(call_id)
        elif item.type == "reasoning" and item.encrypted_content:
            kept: dict[str, Any] = {
                "type": "reasoning",
                "id": item.id,
                "summary": item.summary or [],
                "encrypted_content": item.encrypted_content,
            }
            self._writer.keep_reasoning(item.id or "reasoning", msgspec.json.encode(kept).decode())

    def _finish(self, response: _Response) -> None:
        reason = "tool_calls" if self._calls else "stop"
        if response.incomplete_details is not None:
            reason = response.incomplete_details.reason or "incomplete"
            reason = "length" if reason == "max_output_tokens" else reason
        usage = None if response.usage is None else _responses_usage(response.usage)
        self._writer.finish(reason, usage)
        self.is_done = True


def provider_error(error: Any, *, status: int | None = None) -> ModelError:
    """Return the error that a provider reports, in a stream or in place of one."""
    fields: dict[str, Any] = {"message": error}
    if isinstance(error, dict):
        fields = cast("dict[str, Any]", error)
        # Some servers wrap it once more.
        if isinstance(fields.get("error"), dict):
            fields = fields["error"]
    message = fields.get("message") or "The model's server reported an error without a message."
    for word in (fields.get("code"), fields.get("type")):
        if isinstance(word, str) and word in _FAILURES:
            code, retryable = _FAILURES[word]
            return ModelError(str(message), code=code, retryable=retryable, status=status)
        if isinstance(word, int):
            status = status or word
    code, retryable = _failure_of(status)
    return ModelError(str(message), code=code, retryable=retryable, status=status)


def _failure_of(status: int | None) -> tuple[str, bool]:
    if status is None:
        return "provider_error", False
    if status >= 500:
        return "server_error", True
    return _STATUSES.get(status, ("invalid_request", False))


def _decode(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(
            f"The model's server sent an event that cannot be read: {error}",
            code="malformed",
            retryable=True,
        ) from error


def _text(delta: Any) -> str:
    if not isinstance(delta, str):
        raise ModelError("A fragment is not text.", code="malformed", retryable=True)
    return delta


def _truncated() -> ModelError:
    return ModelError(
        "The model's server ended the stream before the answer.", code="truncated", retryable=True
    )


def _chat_usage(usage: _ChatUsage) -> Usage:
    return _usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.completion_tokens_details,
        usage.prompt_tokens_details,
    )


def _responses_usage(usage: _ResponsesUsage) -> Usage:
    return _usage(
        usage.input_tokens,
        usage.output_tokens,
        usage.output_tokens_details,
        usage.input_tokens_details,
    )


def _usage(
    read: int | None,
    written: int | None,
    written_details: _TokenDetails | None,
    read_details: _TokenDetails | None,
) -> Usage:
    return Usage(
        read or 0,
        written or 0,
        (written_details and written_details.reasoning_tokens) or 0,
        (read_details and read_details.cached_tokens) or 0,
    )
