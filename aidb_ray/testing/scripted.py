"""A model that says what it is told to."""

from __future__ import annotations

import inspect
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import msgspec
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray.errors import ModelError
from aidb_ray.models.base import ModelMessage, Usage
from aidb_ray.models.tools import Tool
from aidb_ray.models.writer import RoundWriter
from aidb_ray.testing.clocks import Clock, LoopClock


@dataclass(frozen=True, slots=True)
class Say:
    """Text of the answer, streamed word by word."""

    text: str


@dataclass(frozen=True, slots=True)
class Think:
    """Reasoning that is shown before the answer, streamed word by word."""

    text: str


@dataclass(frozen=True, slots=True)
class CallTool:
    """A tool call; `args` may be text, to send arguments that are not even JSON."""

    name: str
    args: Mapping[str, Any] | str = field(default_factory=dict[str, Any])
    id: str | None = None


_WORD = re.compile(r"\S+\s*|\s+")

Part: TypeAlias = str | Say | Think | CallTool | Exception
Reply: TypeAlias = Part | Sequence[Part]
Player: TypeAlias = Callable[[Sequence[ModelMessage]], Reply | Awaitable[Reply]]


class ScriptedModel:
    """A `TextAdapter` that says what it is told to, at once and always in the same words.

    A reply is text, a part, or a list of parts. Text is streamed word by word; a list of plain
    strings is streamed string by string. `CallTool` parts of one reply are parallel calls. An
    exception as a part is raised at its place. Ids of messages and calls count from the length
    of the conversation, so they are the same whenever the same conversation is played. Usage
    counts a token per message read and per part written.

    Args:
        script: A list, of which each round takes the next reply, whoever asks; or a function of
            the conversation, plain or async, which needs no memory and so plays on after a crash
            and for many sessions at once.
        tokens_per_second: How fast fragments come; None is as fast as they are read.
        fail_at: `3` fails the fourth round asked of this object, before its first event;
            `(3, 5)` fails it in place of its sixth event. The error is a retryable `ModelError`
            with code `scripted_failure`. A round that fails takes no reply from the list, so
            asking again gets the answer.
        clock: What `tokens_per_second` is measured by.

    It pickles when `script` does, and counts afresh in the other process.
    """

    def __init__(
        self,
        script: Sequence[Reply] | Player,
        *,
        tokens_per_second: float | None = None,
        fail_at: int | tuple[int, int] | None = None,
        clock: Clock | None = None,
    ) -> None:
        if isinstance(script, str):
            raise TypeError("The script is a list of replies; put the text into a list.")
        if tokens_per_second is not None and tokens_per_second <= 0:
            raise ValueError(f"tokens_per_second is {tokens_per_second}; it must be positive.")
        self._script = script
        self._interval_ms = 0.0 if tokens_per_second is None else 1_000 / tokens_per_second
        self._fail_at = (fail_at, 0) if isinstance(fail_at, int) else fail_at
        self._clock = clock or LoopClock()
        self._rounds_asked = 0
        self._replies_taken = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounds_asked": 0, "_replies_taken": 0}

    @property
    def rounds_asked(self) -> int:
        """How many rounds were asked of this object, failed ones included."""
        return self._rounds_asked

    async def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `TextAdapter.stream`; only `messages` matters to a script."""
        fails_at = self._next_failure()
        if fails_at == 0:
            raise _scripted_failure()
        reply = await self._choose_reply(messages, is_taken=fails_at is None)
        events, error = _play(reply, len(messages))
        interval_ms = self._interval_ms
        if fails_at is not None:
            error = _scripted_failure() if fails_at < len(events) else error
            events = events[:fails_at]
        for event in events:
            if interval_ms and hasattr(event, "delta"):
                await self._clock.sleep_ms(interval_ms)
            yield event
        if error is not None:
            raise error

    def _next_failure(self) -> int | None:
        asked = self._rounds_asked
        self._rounds_asked += 1
        if self._fail_at is None or self._fail_at[0] != asked:
            return None
        return self._fail_at[1]

    async def _choose_reply(self, messages: Sequence[ModelMessage], *, is_taken: bool) -> Reply:
        if callable(self._script):
            reply = self._script(messages)
            return await reply if inspect.isawaitable(reply) else reply
        if self._replies_taken == len(self._script):
            raise ModelError(
                f"The script has {len(self._script)} replies and one more was asked for.",
                code="script_ended",
                retryable=False,
            )
        reply = self._script[self._replies_taken]
        self._replies_taken += is_taken
        return reply


def _scripted_failure() -> ModelError:
    return ModelError("The script says to fail here.", code="scripted_failure", retryable=True)


def _play(reply: Reply, position: int) -> tuple[list[Event], Exception | None]:
    """Return the events of one round of a conversation of `position` messages.

    If a part is an exception, those before it, and the exception.
    """
    parts: Sequence[Part]
    if isinstance(reply, str):
        parts = [Say(reply)]
    elif isinstance(reply, Say | Think | CallTool | Exception):
        parts = [reply]
    else:
        parts = reply
    writer = RoundWriter()
    text_id, reasoning_id = f"message-{position}", f"reasoning-{position}"
    written = calls = 0
    if set(map(type, parts)) == {str}:
        # Once a token, in benchmarks.
        writer.texts(cast("Sequence[str]", parts), text_id)
        written, parts = len(parts), ()
    for part in parts:
        written += 1
        match part:
            case str():
                writer.text(part, text_id)
            case Say(text):
                words: list[str] = _WORD.findall(text)
                if words:
                    writer.texts(words, text_id)
            case Think(text):
                for word in _WORD.findall(text):
                    writer.reasoning(word, reasoning_id)
            case CallTool(name, args, id_):
                call_id = id_ or f"call-{position}-{calls}"
                calls += 1
                writer.start_call(call_id, name)
                args_json = args if isinstance(args, str) else msgspec.json.encode(args).decode()
                writer.call_args(call_id, args_json)
                writer.end_call(call_id)
            case Exception():
                return writer.take(), part
    writer.finish("tool_calls" if calls else "stop", Usage(position, written))
    return writer.take(), None
