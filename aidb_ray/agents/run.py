"""One generation, run: asks the model, runs tools, and writes each step as one commit.

`cycle` decides; this does what it says. What a model round or a tool call came to is durable
before the next one begins.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import msgspec
from pydantic import BaseModel

from aidb_ray.agents import cycle as machine
from aidb_ray.agents.cycle import Cycle, End, Limits, RoundFailed, RoundFinished
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.session import SessionState, args_text
from aidb_ray.chunks import FLUSH_CHUNKS, ChunkBuffer, ChunkFlusher
from aidb_ray.contracts import (
    AgentMessage,
    Generation,
    GenerationStatus,
    ToolCall,
    ToolCallStatus,
    Usage,
    utc_now,
)
from aidb_ray.errors import ConflictError, FencedError, ModelError, ToolError
from aidb_ray.models.base import ModelMessage, TextAdapter, parse_messages, stream_round
from aidb_ray.models.base import Usage as ModelUsage
from aidb_ray.models.chat import parse_output, unknown_tool
from aidb_ray.models.events import EventEncoder
from aidb_ray.models.round import Round
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import Tool, ToolContext
from aidb_ray.store.changes import Append, Insert, Mutation, Runner, Update
from aidb_ray.store.collection import Group, current_group
from aidb_ray.store.columns import EMPTY
from aidb_ray.store.rows import codec_of
from aidb_ray.store.transaction import MAX_REMAKES, Intent, make_mutations

if TYPE_CHECKING:
    from ag_ui.core import Event

    from aidb_ray.database import Database, Session
    from aidb_ray.store.changes import ChunkColumns
    from aidb_ray.store.client import StoreClient

logger = logging.getLogger(__name__)

MAX_RUNNING_TOOLS = 16

_message_codec = codec_of(AgentMessage, "id")
_generation_codec = codec_of(Generation, "id")
_call_codec = codec_of(ToolCall, "id")


class Parked(Exception):  # noqa: N818  Not an error: it says what becomes of the session.
    """The session waits for a person to decide about tool calls."""


@dataclass(slots=True)
class Shard:
    """What all runs of one shard share."""

    definition: AgentDefinition
    database: Database
    client: StoreClient
    flusher: ChunkFlusher
    runner: Runner
    tools: Mapping[str, Tool]
    running: int = 0
    on_known: Callable[[str, str, str, int, bytes], None] = field(
        default=lambda *_: None, repr=False
    )


@dataclass(frozen=True, slots=True)
class GenerateContext:
    """What `generate` and `build_messages` are given.

    Attributes:
        messages: The conversation for the model.
        pending: The rows to answer.
        signal: Fires when the run should stop.
    """

    session: Session
    pending: list[Any]
    messages: list[ModelMessage]
    tools: tuple[Tool, ...]
    adapter: TextAdapter | None
    signal: Signal
    generation_id: str
    attempt: int


class GenerationRun:
    """Runs one generation of one session, from where its rows say it stands."""

    def __init__(
        self,
        shard: Shard,
        session: str,
        state: SessionState,
        pending: Sequence[str],
        pending_rows: Sequence[Any],
    ) -> None:
        self._shard = shard
        self._definition = shard.definition
        self._session = session
        self._state = state
        self._pending = list(pending)
        self._pending_rows = list(pending_rows)
        self._cycle: Cycle
        self._generation: Generation
        self._buffer: ChunkBuffer
        self._encoder = EventEncoder()
        self._reply: Any = None
        self.signal = Signal()
        limits = self._definition
        self._limits = Limits(limits.max_iterations, limits.retry, limits.usage_limits)

    async def run(self) -> None:
        """Run until the generation has ended.

        Cancelled with `signal` aborted first, it writes that it was cancelled; cancelled without,
        it stops where it is, and a later run goes on from the rows.

        Raises:
            FencedError: another runner has the session.
            Parked: a person must decide first.
        """
        command = await self._begin()
        try:
            async with asyncio.timeout(_seconds(self._definition.run_timeout_ms)):
                await self._follow(command)
        except asyncio.CancelledError:
            if not self.signal.is_aborted:
                raise
            await self._end(End("cancelled", error=self.signal.reason))
        except TimeoutError:
            self.signal.abort("run timeout")
            limit = self._definition.run_timeout_ms
            await self._end(End("failed", error=f"It took over {limit} ms.", code="run_timeout"))
        finally:
            self._shard.flusher.discard(self._buffer)

    async def _begin(self) -> machine.Command:
        shard, state = self._shard, self._state
        found = state.open_generation()
        if found is None:
            # The id tells the session's runs apart and says where it belongs in any log.
            generation = Generation(
                id=_new_generation_id(),
                agent=self._definition.name,
                status=GenerationStatus.RUNNING,
                message_ids=self._pending,
            )
            self._cycle = Cycle(generation.id)
            command: machine.Command = machine.AskModel()
            next_index = 0
            mutation: Mutation = self._insert("generations", _generation_codec, generation)
        else:
            self._pending = [key for key in found.message_ids if self._is_here(key)]
            calls = state.calls_of(found.id)
            self._cycle, command = machine.resume(found, calls, self._definition.on_in_doubt)
            page = await shard.client.read_chunks(self._session, found.id, 1 << 62)
            next_index = page.next_index
            generation = found.model_copy(
                update={"attempt": self._cycle.attempt, "updated_at": utc_now()}
            )
            mutation = self._update("generations", _generation_codec, generation)
        self._keep(generation)
        self._buffer = ChunkBuffer(
            self._session, generation.id, next_index=next_index, attempt=self._cycle.attempt
        )
        self._buffer.begin_attempt()
        shard.flusher.open(self._buffer, shard.runner)
        # The model may be called before this is durable: commits of one client keep their order,
        # so if this one is refused, so is what follows.
        started = self._commit([mutation])
        started.add_done_callback(_retrieve)
        return command

    def _is_here(self, key: str) -> bool:
        return self._definition.pending_work is not None or key in self._state.messages

    async def _follow(self, command: machine.Command) -> None:
        while True:
            match command:
                case machine.AskModel(pause_ms):
                    if pause_ms:
                        await asyncio.sleep(pause_ms / 1000)
                    event = await self._ask()
                case machine.RunCalls(requests, keys):
                    event = await self._run_calls(await self._write_calls(requests, keys))
                case machine.RunAgain(keys):
                    event = await self._run_calls(await self._write_again(keys))
                case machine.AnswerInDoubt(keys):
                    event = await self._answer_in_doubt(keys)
                case machine.Park(keys):
                    raise Parked(f"{', '.join(keys)} were running when the process died")
                case End():
                    await self._end(command)
                    return
                case None:
                    raise AssertionError(self._cycle)
            self._cycle, command = machine.advance(self._cycle, event, self._limits)

    # The model.

    async def _ask(self) -> machine.Event:
        buffer = self._buffer
        if buffer.attempt != self._cycle.attempt:
            buffer.attempt = self._cycle.attempt
            buffer.begin_attempt()
        try:
            if self._definition.generate is not None:
                return await self._generate()
            return await self._stream_round()
        except ModelError as error:
            return RoundFailed(
                str(error),
                error.code,
                error.retryable,
                error.retry_after_ms,
                random.random(),  # noqa: S311  Jitter, no secret.
            )
        except TimeoutError:
            limit = self._definition.idle_timeout_ms
            return RoundFailed(
                f"The model was silent for {limit} ms.", "idle_timeout", is_retryable=True
            )

    async def _stream_round(self) -> machine.Event:
        definition = self._definition
        assert definition.adapter is not None
        messages = await self._messages()
        events = stream_round(
            definition.adapter,
            messages,
            tools=definition.tools,
            system_prompts=(definition.instructions,) if definition.instructions else (),
            output_schema=definition.output_schema,
        )
        heard = await self._record(events)
        if heard.error is not None:
            raise ModelError(heard.error, retryable=True, code="run_error")
        if not heard.is_finished:
            raise ModelError("The model's stream broke off.", retryable=True, code="truncated")
        if definition.output_schema is not None and not heard.tool_calls:
            parse_output(heard.text, definition.output_schema)
        return RoundFinished(heard.text, tuple(heard.tool_calls), heard.usage)

    async def _messages(self) -> list[ModelMessage]:
        definition = self._definition
        generation_id = self._generation.id
        if definition.build_messages is None:
            return self._state.conversation(self._pending, generation_id, definition.history)
        context = self._context([])
        built = definition.build_messages(self._rows_to_answer(), context)
        if inspect.isawaitable(built):
            built = await built
        return [*parse_messages(built), *self._state.rounds_of(generation_id)]

    def _rows_to_answer(self) -> list[Any]:
        if self._definition.pending_work is not None:
            return self._pending_rows
        messages = self._state.messages
        return [_message_codec.decode(messages[key].value) for key in self._pending]

    def _context(self, messages: list[ModelMessage]) -> GenerateContext:
        from aidb_ray.database import Session

        return GenerateContext(
            Session(self._shard.database, self._session),
            self._rows_to_answer(),
            messages,
            self._definition.tools,
            self._definition.adapter,
            self.signal,
            self._generation.id,
            self._cycle.attempt,
        )

    async def _record(self, events: AsyncIterator[Event]) -> Round:
        """Keep every event of a stream as a chunk; returns what they add up to."""
        heard = Round()
        buffer, flusher = self._buffer, self._shard.flusher
        encode = self._encoder.encode
        take_in, add = heard.add, buffer.add
        idle_s = self._definition.idle_timeout_ms / 1000
        now = asyncio.get_running_loop().time
        async with (
            aclosing(cast("Any", events)) as open_events,
            asyncio.timeout(idle_s) as silence,
        ):
            # Moving the timeout costs more than an event does, so it moves now and then.
            next_move = now() + idle_s / 8
            async for event in open_events:
                take_in(event)
                add(*encode(event))
                if len(buffer) >= FLUSH_CHUNKS:
                    flusher.check(buffer)
                    flusher.flush(buffer)
                if now() > next_move:
                    silence.reschedule(now() + idle_s)
                    next_move = now() + idle_s / 8
        return heard

    async def _generate(self) -> machine.Event:
        definition = self._definition
        assert definition.generate is not None
        messages: list[ModelMessage] = []
        if definition.build_messages is not None or definition.pending_work is None:
            messages = await self._messages()
        async with asyncio.timeout(_seconds(definition.run_timeout_ms)):
            result = definition.generate(self._context(messages))
            if inspect.isawaitable(result):
                result = await result
        usage: ModelUsage | None = None
        if hasattr(result, "__aiter__"):
            heard = await self._record(_as_events(result))
            result, usage = heard.text, heard.usage
        self._reply = result
        text = result if isinstance(result, str) else _as_text(result)
        return RoundFinished(text, (), usage)

    # Tool calls.

    async def _write_calls(self, requests: Sequence[Any], keys: Sequence[str]) -> list[ToolCall]:
        now = utc_now()
        number = self._cycle.round
        calls = [
            ToolCall(
                id=key,
                generation_id=self._generation.id,
                name=request.name,
                args=_parse_args(request.args_json),
                status=ToolCallStatus.EXECUTING,
                agent=self._definition.name,
                round=number,
                model_call_id=request.id,
                attempt=1,
                created_at=now,
                updated_at=now,
            )
            for request, key in zip(requests, keys, strict=True)
        ]
        generation = self._generation.model_copy(
            update={
                "rounds": list(self._cycle.rounds),
                "usage": _to_usage(self._cycle.usage),
                "updated_at": now,
            }
        )
        mutations = [self._insert("tool_calls", _call_codec, call) for call in calls]
        mutations.append(self._update("generations", _generation_codec, generation))
        await self._commit_with_chunks(mutations)
        self._keep(generation)
        for call in calls:
            self._state.put_call(call)
        return calls

    async def _write_again(self, keys: Sequence[str]) -> list[ToolCall]:
        known = self._state.calls[self._generation.id]
        calls = [
            known[key].model_copy(
                update={
                    "status": ToolCallStatus.EXECUTING,
                    "attempt": known[key].attempt + 1,
                    "updated_at": utc_now(),
                }
            )
            for key in keys
        ]
        # Durable before the tool runs, or the attempts could not be counted.
        await self._commit([self._update("tool_calls", _call_codec, call) for call in calls])
        for call in calls:
            self._state.put_call(call)
        return calls

    async def _answer_in_doubt(self, keys: Sequence[str]) -> machine.Event:
        known = self._state.calls[self._generation.id]
        error = ToolError(
            "The process died while the tool ran; it may have had its effect or not.",
            code="in_doubt",
        )
        event: machine.Event | None = None
        for key in keys:
            await self._finish_call(known[key], None, error)
            event = self._note_call(event, key)
        assert event is not None
        return event

    async def _run_calls(self, calls: Sequence[ToolCall]) -> machine.Event:
        if len(calls) == 1:
            await self._run_call(calls[0])
            return machine.CallFinished(calls[0].id)
        slots = asyncio.Semaphore(MAX_RUNNING_TOOLS)

        async def run(call: ToolCall) -> None:
            async with slots:
                await self._run_call(call)

        try:
            async with asyncio.TaskGroup() as running:
                for call in calls:
                    running.create_task(run(call))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        event: machine.Event | None = None
        for call in calls:
            event = self._note_call(event, call.id)
        assert event is not None
        return event

    def _note_call(self, event: machine.Event | None, key: str) -> machine.Event:
        """Advance past all but the newest answer, which the caller's loop takes."""
        if event is not None:
            self._cycle, command = machine.advance(self._cycle, event, self._limits)
            assert command is None, command
        return machine.CallFinished(key)

    async def _run_call(self, call: ToolCall) -> None:
        self._shard.running += 1
        try:
            tool = self._shard.tools.get(call.name)
            if tool is None:
                raise unknown_tool(call.name, self._shard.tools)
            context = ToolContext(
                signal=self.signal,
                idempotency_key=call.id,
                attempt=call.attempt,
                session=self._context_session(),
            )
            result = await tool.call(args_text(call.args), context)
        except ToolError as error:
            await self._finish_call(call, None, error)
        else:
            await self._finish_call(call, result, None)
        finally:
            self._shard.running -= 1

    def _context_session(self) -> Session:
        from aidb_ray.database import Session

        return Session(self._shard.database, self._session)

    async def _finish_call(self, call: ToolCall, result: Any, error: ToolError | None) -> None:
        finished = call.model_copy(
            update={
                "status": ToolCallStatus.FAILED if error else ToolCallStatus.COMPLETED,
                "result": result,
                "error": None if error is None else str(error),
                "error_code": None if error is None else error.code,
                "updated_at": utc_now(),
            }
        )
        await self._commit([self._update("tool_calls", _call_codec, finished)])
        self._state.put_call(finished)

    # The end.

    async def _end(self, end: End) -> None:
        now = utc_now()
        generation = self._generation.model_copy(
            update={
                "status": GenerationStatus(end.ending),
                "usage": _to_usage(self._cycle.usage),
                "error": end.error or None if end.ending != "completed" else None,
                "error_code": end.code or None,
                "updated_at": now,
            }
        )
        mutations: list[Mutation] = []
        if end.ending == "completed" and self._definition.pending_work is None:
            mutations.append(self._insert("messages", _message_codec, self._reply_row(end, now)))
        if end.ending == "cancelled":
            mutations += [
                self._update("tool_calls", _call_codec, call) for call in self._cancelled_calls(now)
            ]
        mutations.append(self._update("generations", _generation_codec, generation))
        intents = await self._respond() if end.ending == "completed" else []
        await self._commit_end(mutations, intents, end)
        self._keep(generation)

    def _cancelled_calls(self, now: datetime) -> list[ToolCall]:
        return [
            call.model_copy(update={"status": ToolCallStatus.CANCELLED, "updated_at": now})
            for call in self._state.calls_of(self._generation.id)
            if not call.status.is_terminal
        ]

    async def _respond(self) -> list[Intent]:
        """Call `on_response`; what it writes in this session is part of the round's end."""
        on_response = self._definition.on_response
        if on_response is None:
            return []
        group = Group(self._session, takes_all=False)
        token = current_group.set(group)
        try:
            result = on_response(self._reply, self._rows_to_answer())
            if inspect.isawaitable(result):
                await result
        finally:
            current_group.reset(token)
        return group.intents

    async def _commit_end(self, mutations: list[Mutation], intents: list[Intent], end: End) -> None:
        ending = {"completed": "finished", "failed": "raised", "cancelled": "cancelled"}
        self._shard.flusher.close(self._buffer)
        taken = self._buffer.take(cast("Any", ending[end.ending]))
        assert taken is not None
        append, columns = taken
        for attempt in range(MAX_REMAKES + 1):
            answered = self._answered()
            made = await make_mutations(self._shard.client, self._session, intents)
            try:
                revision = await self._commit([append, *mutations, *answered, *made], columns)
            except ConflictError as error:
                if error.collection == "chunks" or attempt == MAX_REMAKES:
                    raise
                await self._read_messages_again()
            else:
                for each in [*mutations, *answered]:
                    if isinstance(each, Insert | Update) and each.collection == "messages":
                        self._state.put_message(each.key, revision, each.value)
                return

    def _answered(self) -> list[Mutation]:
        """Return the updates that stamp the answered messages."""
        if self._definition.pending_work is not None:
            return []
        updates: list[Mutation] = []
        for key in self._pending:
            known = self._state.messages.get(key)
            if known is None:
                continue
            fields = msgspec.json.decode(known.value)
            fields["processed"] = True
            fields["generationId"] = self._generation.id
            value = msgspec.json.encode(fields)
            updates.append(Update(self._session, "messages", key, value, known.revision))
        return updates

    async def _read_messages_again(self) -> None:
        read = await self._shard.client.read_session(self._session, ("messages",))
        for row in read.rows["messages"]:
            self._state.put_message(row.key, row.revision, row.value)

    def _reply_row(self, end: End, now: datetime) -> AgentMessage:
        newest = [self._state.messages[key].message for key in self._pending]
        newest.sort(key=lambda message: message.created_at)
        last = newest[-1] if newest else None
        if last is not None:
            # After what it answers, whatever the clocks of those who wrote say.
            answered_at = datetime.fromisoformat(last.created_at)
            now = max(now, answered_at.astimezone(UTC) + timedelta(microseconds=1))
        return AgentMessage(
            id=f"{self._generation.id}:reply",
            role="assistant",
            actor_id=self._definition.name,
            target_agent=last.actor_id if last is not None else "",
            content=end.text,
            created_at=now,
            processed=True,
            generation_id=self._generation.id,
            in_reply_to=last.id if last is not None else None,
        )

    # Writing.

    def _commit(
        self, mutations: Sequence[Mutation], columns: ChunkColumns = EMPTY
    ) -> asyncio.Future[int]:
        shard = self._shard
        return shard.client.commit(mutations, chunks=columns, runner=shard.runner)

    async def _commit_with_chunks(self, mutations: Sequence[Mutation]) -> None:
        self._shard.flusher.check(self._buffer)
        taken = self._buffer.take()
        if taken is None:
            await self._commit(mutations)
        else:
            first: Append = taken[0]
            await self._commit([first, *mutations], taken[1])

    def _insert(self, collection: str, codec: Any, row: BaseModel) -> Insert:
        key, value = codec.encode(collection, row)
        return Insert(self._session, collection, key, value)

    def _update(self, collection: str, codec: Any, row: BaseModel) -> Update:
        # Only this runner writes these rows while it holds the session, so any revision will do.
        key, value = codec.encode(collection, row)
        return Update(self._session, collection, key, value, 0)

    def _keep(self, generation: Generation) -> None:
        self._generation = generation
        self._state.put_generation(generation)


def _new_generation_id() -> str:
    from uuid import uuid4

    return uuid4().hex


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


def _retrieve(started: asyncio.Future[int]) -> None:
    # A refusal shows again in the commit that follows; here it must only not be "never retrieved".
    if not started.cancelled():
        error = started.exception()
        if error is not None and not isinstance(error, FencedError):
            logger.warning("a generation could not be started: %s", error)


def _parse_args(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        # Not JSON: kept as it is; running the call answers the model with what is wrong.
        return text


def _to_usage(usage: ModelUsage) -> Usage | None:
    if not usage.input_tokens and not usage.output_tokens:
        return None
    return Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
    )


def _as_text(result: object) -> str:
    if isinstance(result, BaseModel):
        return result.model_dump_json()
    return msgspec.json.encode(result).decode()


async def _as_events(stream: AsyncIterator[Any]) -> AsyncIterator[Event]:
    """Return a stream of events or of texts as events."""
    from aidb_ray.models.events import text_content

    async for item in stream:
        yield text_content("generate", item) if isinstance(item, str) else item
