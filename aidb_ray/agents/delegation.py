"""Other agents as something a model may ask: requests and replies are messages. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from pydantic import BaseModel, ValidationError

from aidb_ray.agents.rows import MessageRow
from aidb_ray.errors import ConfigError, ContractError, ToolError
from aidb_ray.json_values import parse_json
from aidb_ray.models.base import ToolCallRequest
from aidb_ray.models.signatures import Signature
from aidb_ray.models.tools import Tool, describe_mismatch, encode_error, encode_result

MAX_DEPTH = 8
"""How many agents may wait for one another in a row."""

MAX_FAN_OUT = 16
"""How many requests to other agents one round may make."""


class In(BaseModel, extra="forbid"):
    """What an agent is asked, unless its `AgentTool` says otherwise."""

    message: str


class Named(Protocol):
    """What is known of an agent: of a handle, or of a definition."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def stream_url(self) -> str | None:
        """The sessions it works for, None if that is not known."""
        ...

    @property
    def reaches(self) -> frozenset[str]:
        """Names of the agents that it delegates to, and they in turn, as far as known."""
        ...

    @property
    def is_raw(self) -> bool:
        """Whether it answers rows of the user's own, and not messages."""
        ...


@dataclass(frozen=True, slots=True)
class AgentTool:
    """Another agent that a model may ask, under that agent's name.

    Attributes:
        agent: A handle, a definition, or a name. By name it may be created later, and nothing can
            be checked before.
        description: What the model is told about it.
        input_schema: What the model gives; by default `message: str`. The agent reads `message`,
            or the input as JSON if it has other fields.
        output_schema: What the model gets; by default the reply's text. With a single field
            `response: str` that is filled with the text; else the reply must be JSON that fits.
    """

    agent: Named | str
    description: str = ""
    input_schema: type[BaseModel] | None = None
    output_schema: type[BaseModel] | None = None

    def to_delegate(self) -> Delegate:
        """Return what a definition keeps of it.

        Raises:
            ConfigError: `invalid_name`: a model cannot be offered a tool of that name;
                `invalid_option`: the agent answers rows of the user's own, and no messages.
        """
        agent = self.agent
        name = agent if isinstance(agent, str) else agent.name
        if not isinstance(agent, str) and agent.is_raw:
            raise ConfigError(
                f"Agent {name!r} answers rows of its own and no messages; nobody can delegate to "
                f"it.",
                code="invalid_option",
            )
        tool = Tool(
            name=name,
            description=self.description or f"Ask the agent {name}.",
            signature=Signature(name, model=self.input_schema or In),
            function=None,
            output_type=self.output_schema,
        )
        is_known = not isinstance(agent, str)
        return Delegate(
            name,
            tool,
            self.input_schema or In,
            self.output_schema,
            (agent.stream_url or None) if is_known else None,
            agent.reaches if is_known else frozenset(),
        )


@dataclass(frozen=True, slots=True)
class Delegate:
    """An agent that another one may ask.

    Attributes:
        tool: How the model sees it.
        stream_url: The sessions it works for, None if that is not known.
        reaches: See `Named.reaches`.
    """

    name: str
    tool: Tool
    input_schema: type[BaseModel]
    output_schema: type[BaseModel] | None
    stream_url: str | None
    reaches: frozenset[str]

    def fingerprint(self) -> str:
        """Return a digest of what the model sees."""
        return hashlib.blake2b(self.tool.fingerprint().encode(), digest_size=16).hexdigest()

    def content_of(self, args_json: str) -> str:
        """Return the message to the agent.

        Raises:
            ToolError: `invalid_args`: the input does not fit.
        """
        self.tool.parse_args(args_json)
        given = self.input_schema.model_validate_json(args_json, strict=True)
        message: Any = getattr(given, "message", None)
        if self._is_plain and isinstance(message, str):
            return message
        return given.model_dump_json(by_alias=True)

    def args_of(self, content: str) -> str:
        """Return the input that a message was made of, as the model gave it."""
        if not self._is_plain:
            try:
                if isinstance(msgspec.json.decode(content), dict):
                    return content
            except msgspec.DecodeError:
                pass  # Asked under another schema.
        return msgspec.json.encode({"message": content}).decode()

    def result_of(self, content: str) -> str:
        """Return what the model is told of a reply.

        Raises:
            ToolError: `invalid_result`: it does not fit the output schema.
        """
        schema = self.output_schema
        if schema is None:
            return content
        try:
            if list(schema.model_fields) == ["response"]:
                answer = schema.model_validate({"response": content})
            else:
                parse_json(content)
                answer = schema.model_validate_json(content)
        except (ContractError, ValidationError) as error:
            raise ToolError(
                f"The reply of {self.name!r} does not fit: {describe_mismatch(error)}.",
                code="invalid_result",
            ) from error
        return encode_result(answer.model_dump(mode="json", by_alias=True))

    @property
    def _is_plain(self) -> bool:
        return list(self.input_schema.model_fields) == ["message"]


def check_delegates(name: str, stream_url: str, delegates: Iterable[Delegate]) -> None:
    """Check what can be known before anything runs.

    Raises:
        ConfigError: `delegation_cycle`: an agent would wait for itself; `foreign_session`: one
            does not work for the sessions of this one.
    """
    for delegate in delegates:
        if name == delegate.name or name in delegate.reaches:
            raise ConfigError(
                f"Agent {name!r} would wait for itself: it delegates to {delegate.name!r}, which "
                f"delegates to it, directly or by others.",
                code="delegation_cycle",
            )
        if delegate.stream_url is not None and not _covers(delegate.stream_url, stream_url):
            raise ConfigError(
                f"Agent {delegate.name!r} works for {delegate.stream_url!r} and would not hear "
                f"what {name!r} asks in {stream_url!r}. Give it a stream_url that covers both.",
                code="foreign_session",
            )


def _covers(pattern: str, url: str) -> bool:
    return url.startswith(pattern[:-1]) if pattern.endswith("*") else url == pattern


def make_request(
    delegate: Delegate,
    request: ToolCallRequest,
    key: str,
    *,
    generation_id: str,
    agent: str,
    path: Sequence[str],
    number: int,
    waits: Mapping[str, set[str]],
    now: str,
) -> MessageRow:
    """Return the message that asks another agent.

    Args:
        delegate: Who is asked.
        request: What the model wants.
        key: The key of the call, which becomes the message's.
        generation_id: The generation that asks.
        agent: Who asks.
        path: Who waits for the asking generation, the first that delegated first.
        number: Requests that the round has made before.
        waits: For whom others wait in the session.
        now: The time.

    Raises:
        ToolError: `invalid_args`; `delegation_cycle`: who is asked waits for the answer itself;
            `delegation_limit`: too many wait in a row, or are asked at once.
    """
    content = delegate.content_of(request.args_json)
    path = [*path, agent]
    if delegate.name in path or reaches(delegate.name, agent, waits):
        raise ToolError(_circular(delegate.name), code="delegation_cycle")
    if len(path) > MAX_DEPTH:
        raise ToolError(
            f"{MAX_DEPTH} agents wait for one another already; answer without asking further.",
            code="delegation_limit",
        )
    if number >= MAX_FAN_OUT:
        raise ToolError(
            f"At most {MAX_FAN_OUT} requests to agents go at once; ask again for the others.",
            code="delegation_limit",
        )
    return MessageRow(
        key,
        "user",
        agent,
        delegate.name,
        content,
        now,
        generation_id=generation_id,
        request_id=key,
        path=path,
    )


def take_back(request: MessageRow) -> MessageRow:
    """Return a request that is not to be answered, since who is asked waits for who asks."""
    return msgspec.structs.replace(request, processed=True, error_code="delegation_cycle")


def _circular(name: str) -> str:
    return f"{name!r} waits for this answer itself, so it cannot be asked."


def reaches(begin: str, end: str, waits: Mapping[str, set[str]]) -> bool:
    """Whether `begin` waits for `end`, directly or by others."""
    seen: set[str] = set()
    left = [begin]
    while left:
        for name in waits.get(left.pop(), ()):
            if name == end:
                return True
            if name not in seen:
                seen.add(name)
                left.append(name)
    return False


def answer_to(
    request: MessageRow, reply: MessageRow | None, delegate: Delegate | None
) -> str | None:
    """Return what the model is told about a request, None while there is nothing to tell."""
    if reply is None:
        if not request.processed:
            return None
        if request.error_code == "delegation_cycle":
            return encode_error(ToolError(_circular(request.target_agent), code="delegation_cycle"))
        words = f"{request.target_agent!r} has not replied."
        return encode_error(ToolError(words, code="no_reply"))
    if reply.error_code is not None:
        return encode_error(ToolError(reply.content, code=reply.error_code))
    if delegate is None:
        return reply.content
    try:
        return delegate.result_of(reply.content)
    except ToolError as error:
        return encode_error(error)
