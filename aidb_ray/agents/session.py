"""What an agent knows of one session: its rows, and the conversation a model reads. Pure."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import msgspec

from aidb_ray.agents.definition import History
from aidb_ray.agents.delegation import Delegate, answer_to, reaches
from aidb_ray.agents.rows import (
    GenerationRow,
    MessageRow,
    ToolCallRow,
    decode_call,
    decode_generation,
    decode_message,
)
from aidb_ray.contracts import ToolCallStatus
from aidb_ray.errors import ToolError
from aidb_ray.models.base import ModelMessage, ToolCallRequest
from aidb_ray.models.tools import encode_error, encode_result
from aidb_ray.store.changes import FoundRow

logger = logging.getLogger(__name__)

COLLECTIONS = ("messages", "generations", "tool_calls")


class KnownMessage(msgspec.Struct, gc=False):
    """A message with the revision that wrote it and its stored bytes.

    Attributes:
        is_own: Whether the agent wrote it, to say something.
        is_heard: Whether it is part of the agent's conversation at all. What agents ask one
            another is, for who was asked; for who asks it is a call, told with its round.
        said: What a model reads of it, once that was worked out.
    """

    revision: int
    value: bytes
    message: MessageRow
    is_own: bool
    is_heard: bool
    said: list[ModelMessage] | None = None


_ROW_OVERHEAD = 300
_PLACE = itemgetter(0, 1, 2, 3)


class SessionState:
    """The rows of one session that its agent works with.

    Attributes:
        revision: The rows are as of it; older changes are in already.
        size: Bytes of stored rows, about.
    """

    def __init__(self, agent: str, delegates: Mapping[str, Delegate] | None = None) -> None:
        self._agent = agent
        self._delegates = delegates or {}
        # Changes that come while the rows are on their way; None once they have arrived.
        self._held: list[tuple[str, int, bytes | None]] | None = []
        self.revision = 0
        self.size = 0
        self.messages: dict[str, KnownMessage] = {}
        self.generations: dict[str, GenerationRow] = {}
        self._open: dict[str, GenerationRow] = {}
        # Of open generations that were read and not written since: the revision that wrote them.
        self._read_as_of: dict[str, int] = {}
        # When each generation was answered: its messages come right before its reply.
        self._replied_at: dict[str, str] = {}
        self.calls: dict[str, dict[str, ToolCallRow]] = {}
        # What the agent asked others, by generation and key; and what they replied, by key.
        self._requests: dict[str, dict[str, KnownMessage]] = {}
        self._replies: dict[str, KnownMessage] = {}
        # The revision that wrote each call, where it is known.
        self._call_revisions: dict[str, int] = {}

    def load(self, revision: int, rows: Mapping[str, Iterable[FoundRow]]) -> None:
        """Take in all rows as of `revision`."""
        self.revision = revision
        held, self._held = self._held or [], None
        for row in rows["messages"]:
            self._put_message(row.key, row.revision, row.value)
        for key, changed_at, value in held:
            self.put_message(key, changed_at, value)
        for row in rows["generations"]:
            generation = decode_generation(row.value)
            if generation.agent == self._agent:
                self.put_generation(generation)
                self._read_as_of[generation.id] = row.revision
        for row in rows["tool_calls"]:
            call = decode_call(row.value)
            # Jobs of its tools are rows beside the calls that began them.
            if call.generation_id in self.generations and is_of_round(call):
                self.put_call(call, row.revision)

    def put_message(self, key: str, revision: int, value: bytes | None) -> None:
        """Take in one message as it is since `revision`; None is gone."""
        if self._held is not None:
            self._held.append((key, revision, value))
        elif revision > self.revision:
            self._put_message(key, revision, value)

    def _put_message(self, key: str, revision: int, value: bytes | None) -> None:
        known = self.messages.get(key)
        if known is not None:
            if known.revision >= revision:
                return
            self._drop_message(key, known)
        if value is None:
            return
        try:
            message = decode_message(value)
        except msgspec.DecodeError:
            # Not what agents call a message; one such row must not keep a session from working.
            logger.warning("message %r cannot be read and is left out", key)
            return
        by_agent = message.actor_id == self._agent
        is_request = by_agent and message.request_id == key
        is_answer = (
            message.target_agent == self._agent
            and message.request_id is not None
            and message.in_reply_to == message.request_id
        )
        is_own = by_agent and not is_request and message.error_code is None
        is_heard = is_own or (
            not by_agent and not is_answer and message.target_agent in ("", self._agent)
        )
        known = self.messages[key] = KnownMessage(revision, value, message, is_own, is_heard)
        if is_request:
            self._requests.setdefault(_generation_of(key), {})[key] = known
        elif is_answer:
            self._replies[str(message.request_id)] = known
        elif is_own and message.generation_id is not None:
            self._replied_at[message.generation_id] = message.created_at
        self.size += len(value) + _ROW_OVERHEAD

    def _drop_message(self, key: str, known: KnownMessage) -> None:
        self.size -= len(known.value) + _ROW_OVERHEAD
        del self.messages[key]
        self._requests.get(_generation_of(key), {}).pop(key, None)
        request_id = known.message.request_id
        if request_id is not None and self._replies.get(request_id) is known:
            del self._replies[request_id]

    def put_generation(self, generation: GenerationRow) -> None:
        """Take in a generation as it is now."""
        self.generations[generation.id] = generation
        self._read_as_of.pop(generation.id, None)
        if generation.is_terminal:
            self._open.pop(generation.id, None)
        else:
            self._open[generation.id] = generation

    def put_call(self, call: ToolCallRow, revision: int) -> None:
        """Take in a tool call as it is since `revision`."""
        calls = self.calls.setdefault(call.generation_id, {})
        known = calls.get(call.id)
        self.size += _size_of(call) - (0 if known is None else _size_of(known))
        calls[call.id] = call
        self._call_revisions[call.id] = revision

    def drop_call(self, call: ToolCallRow) -> None:
        """Forget a call that was deleted."""
        if self.calls[call.generation_id].pop(call.id, None) is not None:
            self.size -= _size_of(call)

    def call_revision(self, key: str) -> int:
        """Return the revision that wrote a call."""
        return self._call_revisions[key]

    def calls_of(self, generation_id: str) -> list[ToolCallRow]:
        """Return the calls of a generation in the order they were asked for."""
        return sorted(
            self.calls.get(generation_id, {}).values(),
            key=lambda call: (call.round, _number(call.id)),
        )

    def requests_of(self, generation_id: str) -> list[tuple[MessageRow, KnownMessage | None]]:
        """Return what a generation asked other agents, in order, and their replies."""
        requests = self._requests.get(generation_id, {})
        return [
            (requests[key].message, self._replies.get(key))
            for key in sorted(requests, key=_place_of)
        ]

    def waits(self, before: int | None = None) -> dict[str, set[str]]:
        """Return which agents have asked which others in this session, and not been answered.

        With `before`, only what was asked before that revision.
        """
        waits: dict[str, set[str]] = {}
        for key, known in self.messages.items():
            message = known.message
            if before is not None and known.revision >= before:
                continue
            if message.path and not message.processed and message.request_id == key:
                waits.setdefault(message.actor_id, set()).add(message.target_agent)
        return waits

    def closes_cycle(self, request: MessageRow) -> bool:
        """Whether who is asked waited already, directly or by others, for who asks.

        Who asked last sees that, so that of a circle of requests exactly one is taken back.
        """
        known = self.messages.get(request.id)
        return known is not None and reaches(
            request.target_agent, request.actor_id, self.waits(known.revision)
        )

    def path_of(self, pending: Sequence[str]) -> list[str]:
        """Return who waits for the answer to these messages, the first that delegated first."""
        for key in pending:
            known = self.messages.get(key)
            if known is not None and known.message.path:
                return known.message.path
        return []

    def is_written(
        self, generation_id: str, number: int, requests: Sequence[ToolCallRequest]
    ) -> bool:
        """Whether the calls of a round are those of the requests."""
        written: list[tuple[int, str, str]] = [
            (_number(call.id), call.model_call_id, call.name)
            for call in self.calls_of(generation_id)
            if call.round == number
        ]
        for message, _ in self.requests_of(generation_id):
            if _place_of(message.id)[0] == number:
                # What the provider called it is not kept; what was asked is.
                name, place = message.target_agent, _place_of(message.id)[1]
                is_same = place < len(requests) and self._asks(requests[place], message)
                written.append((place, requests[place].id if is_same else "", name))
        written.sort()
        return [(request.id, request.name) for request in requests] == [
            (call_id, name) for _, call_id, name in written
        ]

    def _asks(self, request: ToolCallRequest, message: MessageRow) -> bool:
        delegate = self._delegates.get(request.name)
        try:
            content = None if delegate is None else delegate.content_of(request.args_json)
        except ToolError:
            return False
        return request.name == message.target_agent and content == message.content

    def open_generation(self, answering: Collection[str] | None = None) -> GenerationRow | None:
        """Return the generation that has not ended, if there is one.

        With `answering`, one that answers any of these keys.
        """
        for generation in self._open.values():
            if answering is None or not set(answering).isdisjoint(generation.message_ids):
                return generation
        return None

    def read_as_of(self, generation_id: str) -> int | None:
        """Return the revision that wrote a generation, None if it was written since it was read."""
        return self._read_as_of.get(generation_id)

    def was_written_since(self, generation_id: str, epoch: int) -> bool:
        """Whether the runner of that epoch has written the generation."""
        return self._read_as_of.get(generation_id, epoch) >= epoch

    def conversation(
        self, pending: Sequence[str], generation_id: str, history: History
    ) -> list[ModelMessage]:
        """Return what the model reads: the past, the messages to answer, this run so far.

        What a reply answered comes right before it, whenever it was written: a message that
        arrives while the agent talks belongs to the next turn.
        """
        waiting = set(pending)
        replied_at = self._replied_at
        placed: list[tuple[str, bool, str, str, KnownMessage]] = []
        for key, known in self.messages.items():
            if known.is_heard and key not in waiting:
                message = known.message
                at = replied_at.get(message.generation_id or "", message.created_at)
                placed.append((at, known.is_own, message.created_at, key, known))
        placed.sort(key=_PLACE)
        past = [self._said(known) for *_, known in placed]
        asked = [
            ModelMessage("user" if m.role == "assistant" else _role(m.role), m.content)
            for m in (self.messages[key].message for key in pending if key in self.messages)
        ]
        kept = _newest_that_fit(past, history.max_tokens, asked)
        return [*kept, *asked, *self.rounds_of(generation_id)]

    def is_waiting(self, key: str) -> bool:
        """Whether a message is there and not answered yet."""
        known = self.messages.get(key)
        return known is not None and not known.message.processed

    def rounds_of(self, generation_id: str) -> list[ModelMessage]:
        """Return the finished rounds of a generation: what was said, and what tools answered."""
        generation = self.generations.get(generation_id)
        if generation is None or not generation.rounds:
            return []
        told: dict[int, list[tuple[int, ToolCallRequest, str]]] = {}
        for call in self.calls_of(generation_id):
            request = ToolCallRequest(
                call.model_call_id or call.id, call.name, args_text(call.args)
            )
            told.setdefault(call.round, []).append((_number(call.id), request, answer_text(call)))
        for message, reply in self.requests_of(generation_id):
            delegate = self._delegates.get(message.target_agent)
            args = message.content if delegate is None else delegate.args_of(message.content)
            answer = answer_to(message, None if reply is None else reply.message, delegate)
            number, place = _place_of(message.id)
            request = ToolCallRequest(message.id, message.target_agent, args)
            told.setdefault(number, []).append((place, request, answer or ""))
        said: list[ModelMessage] = []
        for number, text in enumerate(generation.rounds):
            of_round = sorted(told.get(number, ()), key=itemgetter(0))
            requests = tuple(request for _, request, _ in of_round)
            said.append(ModelMessage("assistant", text, tool_calls=requests))
            said += [
                ModelMessage("tool", answer, tool_call_id=request.id)
                for _, request, answer in of_round
            ]
        return said

    def _said(self, known: KnownMessage) -> list[ModelMessage]:
        if known.said is None:
            message = known.message
            if known.is_own:
                rounds = self.rounds_of(message.generation_id or "")
                known.said = [*rounds, ModelMessage("assistant", message.content)]
            else:
                role = "user" if message.role == "assistant" else _role(message.role)
                known.said = [ModelMessage(role, message.content)]
        return known.said


def _size_of(call: ToolCallRow) -> int:
    # Results are JSON values; what they hold as text is most of what they weigh.
    result: Any = call.result
    return 500 + (len(result) if hasattr(result, "__len__") else 0)


def _role(role: str) -> Any:
    return role


def is_of_round(call: ToolCallRow) -> bool:
    """Whether a row is a call of its generation's model, as an agent writes them."""
    return call.id == f"{call.generation_id}:{call.round}:{_number(call.id)}"


def _number(call_id: str) -> int:
    last = call_id.rpartition(":")[2]
    return int(last) if last.isdigit() else 0


def _place_of(key: str) -> tuple[int, int]:
    """Return round and number of a call by its key."""
    rest, _, number = key.rpartition(":")
    round_ = rest.rpartition(":")[2]
    is_key = round_.isdigit() and number.isdigit()
    return (int(round_), int(number)) if is_key else (-1, -1)


def round_of(key: str) -> int:
    """Return the round of a call by its key."""
    return _place_of(key)[0]


def _generation_of(key: str) -> str:
    return key.rsplit(":", 2)[0]


def args_text(args: Any) -> str:
    """Return a call's arguments as the text that the model wrote."""
    return args if isinstance(args, str) else msgspec.json.encode(args).decode()


def answer_text(call: ToolCallRow) -> str:
    """Return what the model is told about a call."""
    if call.status == ToolCallStatus.COMPLETED:
        return encode_result(call.result)
    code = call.error_code or call.status
    return encode_error(ToolError(call.error or call.status, code=code))


def _newest_that_fit(
    past: list[list[ModelMessage]], max_tokens: int | None, asked: list[ModelMessage]
) -> list[ModelMessage]:
    if max_tokens is None:
        return [message for turn in past for message in turn]
    left = max_tokens - sum(map(_tokens, asked))
    kept: list[list[ModelMessage]] = []
    for turn in reversed(past):
        left -= sum(map(_tokens, turn))
        if left < 0:
            break
        kept.append(turn)
    return [message for turn in reversed(kept) for message in turn]


def _tokens(message: ModelMessage) -> int:
    calls = sum(len(call.args_json) + len(call.name) for call in message.tool_calls)
    return (len(message.content) + calls) // 4 + 4
