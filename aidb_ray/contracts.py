"""Rows that the runtime itself relies on, and the contracts that other row types may meet.

Rows are frozen pydantic models: snake_case in Python, camelCase on the wire, unknown fields
refused, strict types. Each is encoded to JSON once, where it is written.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer
from pydantic.alias_generators import to_camel

_NAME = re.compile(r"[A-Za-z0-9._~:/-]{1,512}")
MAX_KEY_LENGTH = 1_024


def is_valid_name(name: str) -> bool:
    """Whether `name` may name an agent, a collection or a session.

    One to 512 of the characters that need no escape in a URL; no `..`, no leading `/`.
    """
    return (
        _NAME.fullmatch(name) is not None and ".." not in name and not name.startswith(("/", "__"))
    )


_VARIANTS = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
_ISO_LENGTH = len('"2026-01-31T12:00:00.000000Z"')


def utc_now() -> datetime:
    """Return the time now, aware, in UTC."""
    return datetime.now(UTC)


def now_ms() -> int:
    """Return the time now in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def time_ms(text: str | None) -> int:
    """Return a stored time in milliseconds since 1970, 0 for none."""
    return 0 if text is None else int(datetime.fromisoformat(text).timestamp() * 1000)


def new_id() -> str:
    """Return a fresh random identifier (UUID4)."""
    # As uuid.uuid4 does, in a third of its time: a row has at least one.
    digits = os.urandom(16).hex()
    variant = _VARIANTS[digits[16]]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


def time_text(value: datetime) -> str:
    """Return a time in UTC as rows store it, with six digits of a second.

    Texts of equal width sort as their times do.
    """
    text = msgspec.json.encode(value)
    if len(text) == _ISO_LENGTH and text.endswith(b'Z"'):
        return text[1:-1].decode()
    # A whole second, or a time that was put into the row unchecked.
    return value.isoformat(timespec="microseconds")[:26] + "Z"


def _checked_key(value: str) -> str:
    if not value or len(value) > MAX_KEY_LENGTH or "\0" in value:
        raise ValueError(f"invalid_id: 1 to {MAX_KEY_LENGTH} characters without NUL are allowed")
    return value


Utc = Annotated[
    AwareDatetime,
    Field(strict=False),
    AfterValidator(_to_utc),
    PlainSerializer(time_text, when_used="json"),
]
"""An aware time; stored as `YYYY-MM-DDTHH:MM:SS.ffffffZ`, which sorts as text."""

Key = Annotated[str, AfterValidator(_checked_key)]
"""Identifies a row in its collection: 1 to 1,024 characters without NUL."""


class Row(BaseModel):
    """Base of the default row types. Values never change; writing makes a new row."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        populate_by_name=True,
        allow_inf_nan=False,
    )


class ToolCallStatus(StrEnum):
    """Life of a tool call: pending → executing → one of the three ends."""

    PENDING = "pending"
    EXECUTING = "executing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the row can never change again."""
        return self in (self.COMPLETED, self.FAILED, self.CANCELLED)


class GenerationStatus(StrEnum):
    """Life of a generation: running → one of the three ends."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the row can never change again."""
        return self in (self.COMPLETED, self.FAILED, self.CANCELLED)


class Usage(Row):
    """Tokens that a model counted for one round or one generation."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0


class AgentMessage(Row):
    """One message of a conversation.

    Attributes:
        actor_id: Who wrote it: a user's id or an agent's name.
        target_agent: Name of the agent that should answer, `""` for none.
        processed: Whether that agent has answered it (or the message asks for nothing).
        generation_id: The run that answered it, or that wrote it.
        request_id: Correlates a request between agents with its reply.
        in_reply_to: Id of the newest message that this one answers.
        not_before: The agent leaves the message alone until then.
        path: Agents that wait for the answer to this request, the first that delegated first.
        error_code: Why the request could not be answered, in a reply whose `content` says so.
    """

    id: Key = Field(default_factory=new_id)
    role: Literal["user", "assistant", "system"]
    actor_id: str
    target_agent: str = ""
    content: str
    created_at: Utc = Field(default_factory=utc_now)
    processed: bool = False
    generation_id: str | None = None
    request_id: str | None = None
    in_reply_to: str | None = None
    not_before: Utc | None = None
    path: list[str] = Field(default_factory=list[str])
    error_code: str | None = None


class ToolCall(Row):
    """One request by the model to run a tool.

    Attributes:
        id: `{generation_id}:{round}:{n}` when an agent wrote it.
        model_call_id: The provider's id of the call, which its answer must name.
        attempt: How often the call was started; above 1 after a crash in the middle.
        error: What went wrong, set exactly when `status` is `failed`.
        approval: Whether a person must decide first (`needed`), and what was decided. `approved`
            and `rejected` also decide about a call that was interrupted under
            `on_in_doubt="park"`; running it again sets None.
        reason: What whoever rejected it said.
        in_doubt: Whether a process died while it ran, so that it may have had its effect twice.
        late_result: What came after it had ended, under `late_results="mark"`.
        wakes_agent: Whether its end is told to `agent` by a message; see `make_async_tool`.
    """

    id: Key
    generation_id: str
    name: str
    args: Any = None
    status: ToolCallStatus = Field(default=ToolCallStatus.PENDING, strict=False)
    agent: str = ""
    round: int = 0
    model_call_id: str = ""
    attempt: int = 0
    result: Any = None
    error: str | None = None
    error_code: str | None = None
    approval: Literal["needed", "approved", "rejected"] | None = None
    not_before: Utc | None = None
    created_at: Utc = Field(default_factory=utc_now)
    updated_at: Utc = Field(default_factory=utc_now)
    reason: str | None = None
    in_doubt: bool = False
    late_result: Any = None
    wakes_agent: bool = False


class Generation(Row):
    """One run of the model for pending work, from the first round to the reply.

    Attributes:
        message_ids: The messages that this run answers, oldest first.
        rounds: The text that each finished model round said beside its tool calls.
        attempt: Counts starts of the unfinished round; above 1 after a crash in the middle.
        interruptions: How often in a row its process ended before the round and its tool calls
            were done.
        error: What went wrong, set exactly when `status` is `failed`.
        input_digest: Of what a `durable_chat` was asked: one id stands for one question.
        output: What a `durable_chat` has answered.
    """

    id: Key
    agent: str
    status: GenerationStatus = Field(default=GenerationStatus.PENDING, strict=False)
    message_ids: list[str] = Field(default_factory=list[str])
    rounds: list[str] = Field(default_factory=list[str])
    attempt: int = 1
    interruptions: int = 0
    usage: Usage | None = None
    error: str | None = None
    error_code: str | None = None
    created_at: Utc = Field(default_factory=utc_now)
    updated_at: Utc = Field(default_factory=utc_now)
    input_digest: str | None = None
    output: str | None = None


class Chunk(Row):
    """One event of a generation's stream, as stored.

    Attributes:
        id: `{generation_id}:{index}`.
        index: From 0 without gaps; counts on across attempts.
        attempt: Which start of the run wrote it, from 1.
        type: The AG-UI event type, such as `TEXT_MESSAGE_CONTENT`.
        content: The text of a content event; other events as compact JSON.
    """

    id: Key
    generation_id: str
    index: int = Field(ge=0)
    attempt: int = 1
    type: str
    content: str = ""


class CancelRequest(Row):
    """Asks an agent to stop what it does in this session. A row, so it survives crashes.

    Attributes:
        message_id: Only what answers this message, None for all that was written before.
    """

    id: Key = Field(default_factory=new_id)
    agent: str
    reason: str = ""
    done: bool = False
    created_at: Utc = Field(default_factory=utc_now)
    message_id: str | None = None


class Question(Row):
    """What a tool asks a person or a program while it runs; see `ToolContext.ask`.

    Attributes:
        id: `{owner}:{n}`; the n-th question of one piece of work is the same after a crash.
        owner: Idempotency key of the call, or id of the generation, that asks.
        answer_schema: JSON schema that the answer must fit, None for any.
        answer: The answer; it counts once `status` is `answered`.
    """

    id: Key
    owner: str
    question: str
    agent: str = ""
    answer_schema: dict[str, Any] | None = None
    status: Literal["open", "answered"] = "open"
    answer: Any = None
    created_at: Utc = Field(default_factory=utc_now)
    answered_at: Utc | None = None


class Step(Row):
    """The result of a named step of some work, so that a crash does not repeat it.

    Attributes:
        id: `{owner}:{name}`.
        owner: Idempotency key of the call, or id of the generation, that made it.
    """

    id: Key
    owner: str
    name: str
    result: Any = None
    created_at: Utc = Field(default_factory=utc_now)


@runtime_checkable
class ToolCallContract(Protocol):
    """What a row needs so that an executor can run it."""

    @property
    def id(self) -> str:
        """Identifies the row in its collection."""
        ...

    @property
    def name(self) -> str:
        """Name of the tool."""
        ...

    @property
    def status(self) -> str:
        """Where it stands; which values there are is up to the user."""
        ...

    @property
    def args(self) -> Any:
        """What the tool is given."""
        ...


@runtime_checkable
class GenerationContract(Protocol):
    """What a row needs so that a generation effect can run it."""

    @property
    def id(self) -> str:
        """Identifies the row in its collection."""
        ...

    @property
    def status(self) -> str:
        """Where it stands; which values there are is up to the user."""
        ...


@runtime_checkable
class ChunkContract(Protocol):
    """What a row needs so that a stream can be replayed from it."""

    @property
    def id(self) -> str:
        """Identifies the row in its collection."""
        ...

    @property
    def generation_id(self) -> str:
        """The stream that it is part of."""
        ...

    @property
    def index(self) -> int:
        """Its place in the stream, from 0."""
        ...


DEFAULT_ROW_TYPES: Mapping[str, type[Row]] = {
    "messages": AgentMessage,
    "tool_calls": ToolCall,
    "generations": Generation,
    "cancel_requests": CancelRequest,
    "questions": Question,
    "steps": Step,
}
"""Row types of the collections that every session has, by collection name."""

TERMINAL_STATUSES: Mapping[type[Row], tuple[str, ...]] = {
    ToolCall: tuple(each.value for each in ToolCallStatus if each.is_terminal),
    Generation: tuple(each.value for each in GenerationStatus if each.is_terminal),
}
"""Statuses that a row, once it has one, keeps, by row type."""
