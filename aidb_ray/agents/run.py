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
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
from ag_ui.core import StepFinishedEvent, StepStartedEvent
from pydantic import BaseModel

from aidb_ray.agents import cycle as machine
from aidb_ray.agents.cycle import Cycle, End, Limits, RoundFailed, RoundFinished
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.recorder import Recorder, SilenceLimit
from aidb_ray.agents.rows import (
    GenerationRow,
    MessageRow,
    ToolCallRow,
    UsageRow,
    encode_row,
    now_text,
    random_id,
)
from aidb_ray.agents.session import SessionState, args_text
from aidb_ray.chunks import (
    ChunkBuffer,
    ChunkCollection,
    ChunkFlusher,
    Ending,
    follow_slices,
    slice_to_chunks,
)
from aidb_ray.contracts import AgentMessage, ToolCallStatus, time_text
from aidb_ray.errors import (
    AidbError,
    ConflictError,
    ContractError,
    FencedError,
    KeyMissingError,
    ModelError,
    RowError,
    RunCancelledError,
    StorageError,
    ToolError,
    UnavailableError,
)
from aidb_ray.models.base import ModelMessage, TextAdapter, parse_messages, stream_round
from aidb_ray.models.base import Usage as ModelUsage
from aidb_ray.models.chat import parse_output, unknown_tool
from aidb_ray.models.events import EventDecoder
from aidb_ray.models.round import Round
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import Tool, ToolContext
from aidb_ray.store.changes import CHUNKS, Append, Insert, Mutation, Runner, StoredRow, Update
from aidb_ray.store.collection import Group, current_group
from aidb_ray.store.columns import EMPTY
from aidb_ray.store.local import LocalWrites, View
from aidb_ray.store.rows import codec_of
from aidb_ray.store.transaction import MAX_REMAKES, Intent, make_mutations

if TYPE_CHECKING:
    from ag_ui.core import BaseEvent, Event

    from aidb_ray.database import Database, Session
    from aidb_ray.store.changes import ChunkColumns
    from aidb_ray.store.client import StoreClient

logger = logging.getLogger(__name__)

MAX_RUNNING_TOOLS = 16
_CLOSES: Mapping[machine.Ending, Ending] = {
    "completed": "finished",
    "failed": "raised",
    "cancelled": "cancelled",
}

_message_codec = codec_of(AgentMessage, "id")


@dataclass(slots=True)
class Shard:
    """What all runs of one shard share.

    Attributes:
        writes: Own writes of this process, on top of `view`.
        view: The rows that may be in the `pending_work`, if it has one.
    """

    definition: AgentDefinition
    database: Database
    client: StoreClient
    writes: LocalWrites
    flusher: ChunkFlusher
    silence: SilenceLimit
    runner: Runner
    tools: Mapping[str, Tool]
    view: View | None = None
    running: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one run shall do.

    Attributes:
        pending: Keys of the rows to answer; none if whoever waited has gone.
        rows: Those rows, of a `pending_work`.
        generation: The one to go on with, if it was begun before.
        is_leftover: Whether the rows waited when this process began: an earlier one may have died
            of them before it could write anything.
    """

    pending: Sequence[str]
    rows: Sequence[Any] = ()
    generation: GenerationRow | None = None
    is_leftover: bool = False


W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class GenerateContext(Generic[W]):
    """What `generate` and `build_messages` are given; `W` is the type of pending rows.

    Attributes:
        messages: The conversation for the model.
        pending: The rows to answer.
        signal: Fires when the run should stop.
    """

    session: Session
    pending: list[W]
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
        assignment: Assignment,
    ) -> None:
        self._shard = shard
        self._definition = shard.definition
        self._session = session
        self._state = state
        self._assignment = assignment
        self._pending = list(assignment.pending)
        self._pending_rows = list(assignment.rows)
        self._cycle: Cycle
        self._generation: GenerationRow
        self._buffer: ChunkBuffer
        self._recorder: Recorder
        self._reply: Any = None
        self._sent: asyncio.Future[int] | None = None
        self._unsent: tuple[Append, ChunkColumns] | None = None
        # The task that runs it, while it may be stopped there.
        self._stoppable: asyncio.Task[Any] | None = None
        self._unwritten: RoundFinished | None = None
        self._is_cancelled = False
        self.signal = Signal()
        limits = self._definition
        self._limits = Limits(limits.max_iterations, limits.retry, limits.usage_limits)

    @property
    def answered(self) -> Sequence[str]:
        """Keys of the rows that the generation answers."""
        return self._pending

    @property
    def is_suspect(self) -> bool:
        """See `Cycle.is_suspect`; not before it has begun."""
        return self._cycle.is_suspect

    async def run(self) -> bool:
        """Run until the generation has ended; False if a person must decide before it goes on.

        If the task is cancelled it stops where it is, and a later run goes on from the rows.

        Raises:
            FencedError: another runner has the session.
        """
        command = await self._begin()
        if isinstance(command, machine.Park):
            logger.warning("tool calls in doubt wait for a person: %s", ", ".join(command.keys))
            return False
        try:
            await self._end(*await self._decide(command))
        except asyncio.CancelledError:
            # What is on its way will be applied: whoever goes on with the rows must see it.
            await self._settled()
            raise
        finally:
            self._shard.flusher.discard(self._buffer)
        return True

    def cancel(self, reason: str) -> None:
        """Have the generation end as cancelled, unless its end is being written already."""
        self._is_cancelled = True
        self.signal.abort(reason)
        task, self._stoppable = self._stoppable, None
        if task is not None:
            task.cancel()

    async def _decide(self, command: machine.Command) -> tuple[End, list[Intent]]:
        """Run up to the end, and return it with what `on_response` writes."""
        limit = self._definition.run_timeout_ms
        task = self._stoppable = asyncio.current_task()
        assert task is not None
        intents: list[Intent] = []
        bound = None if limit is None else asyncio.timeout(limit / 1000)
        try:
            async with bound or nullcontext():
                end = await self._follow(command)
                if end.ending == "completed":
                    intents = await self._respond()
        except asyncio.CancelledError:
            # A tool that is stopped aborts the signal as well, whoever stops it.
            if not self._is_cancelled:
                raise
            task.uncancel()
        except TimeoutError:
            if bound is None or not bound.expired():
                raise
            self.signal.abort("run timeout")
            return End("failed", error=f"It took over {limit} ms.", code="run_timeout"), []
        except ContractError as error:
            return End("failed", error=str(error), code=error.code), []
        except _ResponseFailed as failed:
            return End("failed", error=str(failed), code=failed.code), []
        else:
            if not self.signal.is_aborted:
                return end, intents
        finally:
            self._stoppable = None
        return End("cancelled", error=self.signal.reason), []

    async def _begin(self) -> machine.Command:
        found = self._assignment.generation
        if found is None:
            command: machine.Command = machine.AskModel()
            generation, next_index = self._new_generation(), 0
            self._cycle = Cycle(generation.id)
            mutation: Mutation = self._insert("generations", generation.id, generation)
        else:
            command = self._resume(found)
            if isinstance(command, machine.Park):
                return command
            page = await self._shard.client.read_chunks(self._session, found.id, 1 << 62)
            next_index = page.next_index
            if isinstance(command, machine.AskModel) and self._definition.generate is None:
                self._unwritten = await self._find_unwritten(found)
            generation = self._next_attempt(found)
            mutation = self._update("generations", generation)
        self._keep(generation)
        self._buffer = ChunkBuffer(
            self._session, generation.id, next_index=next_index, attempt=self._cycle.attempt
        )
        self._buffer.begin_attempt()
        shard = self._shard
        self._recorder = Recorder(self._buffer, shard.flusher, shard.silence)
        is_suspicious = found is not None or self._assignment.is_leftover
        if is_suspicious and isinstance(command, machine.AskModel):
            # Durable before the user's code runs, or the processes it ends could not be counted.
            await self._write([mutation], EMPTY, lambda _: None)
        else:
            # The model may be called before this is durable: commits of one client keep their
            # order, so if this one is refused, so is what follows.
            self._send([mutation]).add_done_callback(_retrieve)
        self._shard.flusher.open(self._buffer, self._shard.runner)
        return command

    def _new_generation(self) -> GenerationRow:
        now = now_text()
        return GenerationRow(
            random_id(),
            self._definition.name,
            message_ids=self._pending,
            created_at=now,
            updated_at=now,
        )

    def _resume(self, found: GenerationRow) -> machine.Command:
        """Return what follows for a generation that was begun before."""
        state, definition = self._state, self._definition
        is_interrupted = not state.was_written_since(found.id, self._shard.runner.epoch)
        self._cycle, command = machine.resume(
            found,
            state.calls_of(found.id),
            definition.on_in_doubt,
            self._limits,
            is_interrupted=is_interrupted,
        )
        if not self._pending:
            return End("cancelled", error="Nobody waits for it any more.")
        if isinstance(command, machine.Park) and self.signal.is_aborted:
            return End("cancelled", error=self.signal.reason)
        return command

    def _next_attempt(self, found: GenerationRow) -> GenerationRow:
        # Rows of a `pending_work` may have joined; messages that did are answered afterwards.
        joins = self._definition.pending_work is not None and self._pending
        return msgspec.structs.replace(
            found,
            message_ids=self._pending if joins else found.message_ids,
            attempt=self._cycle.attempt,
            interruptions=self._cycle.interruptions,
            updated_at=now_text(),
        )

    async def _find_unwritten(self, generation: GenerationRow) -> RoundFinished | None:
        """Return the round that the model had finished when the process died, if there is one.

        A round is finished when its last chunk is durable, and what it came to is in its chunks.
        Its rows come in the commit after, or in the same one; if they are missing, the model need
        not be asked again.
        """
        decode = EventDecoder().decode
        heard = Round()
        last: BaseEvent | None = None
        stored = ChunkCollection(self._shard.database, self._session)
        async for part in follow_slices(stored, generation.id, follow=False):
            for chunk in slice_to_chunks(part):
                last = decode(chunk.type, chunk.content)
                if isinstance(last, StepStartedEvent):
                    heard = Round()
                heard.add(last)
        if not isinstance(last, StepFinishedEvent) or not heard.is_finished:
            return None
        newest = len(generation.rounds) - 1
        calls = self._state.calls_of(generation.id)
        written = [call.model_call_id for call in calls if call.round == newest]
        if heard.tool_calls and [request.id for request in heard.tool_calls] == written:
            return None
        return RoundFinished(heard.text, tuple(heard.tool_calls), heard.usage)

    async def _follow(self, command: machine.Command) -> End:
        while not self.signal.is_aborted:
            match command:
                case machine.AskModel(pause_ms):
                    if pause_ms:
                        await asyncio.sleep(pause_ms / 1000)
                    event = await self._ask()
                case machine.RunCalls(requests, keys):
                    event = await self._run_calls(await self._write_calls(requests, keys))
                case machine.RunAgain(keys, rejected):
                    event = await self._run_again(keys, rejected)
                case machine.AnswerInDoubt(keys):
                    event = await self._answer_calls(keys, _in_doubt())
                case End():
                    return command
                case machine.Park() | None:
                    raise AssertionError(self._cycle)
            self._cycle, command = machine.advance(self._cycle, event, self._limits)
        return End("cancelled", error=self.signal.reason)

    # The model.

    async def _ask(self) -> machine.Event:
        if self._unwritten is not None:
            event, self._unwritten = self._unwritten, None
            if self._fits(event):
                return event
        buffer = self._buffer
        if buffer.attempt != self._cycle.attempt:
            # What is still held belongs to the attempt that failed.
            self._shard.flusher.flush(buffer)
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
        except RunCancelledError as error:
            return machine.Cancelled(error.reason)
        except TimeoutError as error:
            return RoundFailed(_words(error), "timeout", is_retryable=True)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something that the user's functions or the adapter waited for was cancelled, not this.
            words = "What the model round waited for was cancelled."
            return RoundFailed(words, "agent_error", is_retryable=False)
        except Exception as error:
            if _is_of_store(error):
                raise
            # A mistake in the user's functions or in the adapter: asking again would only repeat
            # it, and whoever waits for the reply should hear of it.
            logger.exception("a model round failed", extra={"session": self._session})
            return RoundFailed(_words(error), _code_of(error), is_retryable=False)

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
        heard = await self._recorder.record(events)
        if not heard.is_finished:
            raise ModelError("The model's stream broke off.", retryable=True, code="truncated")
        if definition.output_schema is not None and not heard.tool_calls:
            parse_output(heard.text, definition.output_schema)
        return RoundFinished(heard.text, tuple(heard.tool_calls), heard.usage)

    def _fits(self, event: RoundFinished) -> bool:
        schema = self._definition.output_schema
        if schema is None or event.requests:
            return True
        try:
            parse_output(event.text, schema)
        except ModelError:
            return False
        return True

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
        return [
            _message_codec.decode(messages[key].value) for key in self._pending if key in messages
        ]

    def _context(self, messages: list[ModelMessage]) -> GenerateContext[Any]:
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

    async def _generate(self) -> machine.Event:
        definition = self._definition
        assert definition.generate is not None
        messages: list[ModelMessage] = []
        if definition.build_messages is not None or definition.pending_work is None:
            messages = await self._messages()
        result = definition.generate(self._context(messages))
        if inspect.isawaitable(result):
            result = await result
        usage: ModelUsage | None = None
        if hasattr(result, "__aiter__"):
            heard = await self._recorder.record(_as_events(result))
            result, usage = heard.text, heard.usage
        self._reply = result
        text = result if isinstance(result, str) else _as_text(result)
        # What cannot be stored fails the round, before it is taken for finished.
        text.encode()
        return RoundFinished(text, (), usage)

    # Tool calls.

    async def _write_calls(self, requests: Sequence[Any], keys: Sequence[str]) -> list[ToolCallRow]:
        now = now_text()
        number = self._cycle.round
        calls = [
            ToolCallRow(
                key,
                self._generation.id,
                request.name,
                _parse_args(request.args_json),
                ToolCallStatus.EXECUTING.value,
                self._definition.name,
                number,
                request.id,
                1,
                created_at=now,
                updated_at=now,
            )
            for request, key in zip(requests, keys, strict=True)
        ]
        generation = msgspec.structs.replace(
            self._generation,
            rounds=list(self._cycle.rounds),
            interruptions=self._cycle.interruptions,
            usage=_to_usage(self._cycle.usage),
            updated_at=now,
        )
        mutations: list[Mutation] = [self._insert("tool_calls", call.id, call) for call in calls]
        mutations.append(self._update("generations", generation))

        def know(_revision: int) -> None:
            self._keep(generation)
            self._know_calls(calls)

        self._shard.flusher.check(self._buffer)
        append, columns = self._take() or (None, EMPTY)
        await self._write(mutations if append is None else [append, *mutations], columns, know)
        return calls

    def _know_calls(self, calls: Sequence[ToolCallRow]) -> None:
        for call in calls:
            self._state.put_call(call)

    async def _write_again(self, keys: Sequence[str]) -> list[ToolCallRow]:
        known = self._state.calls[self._generation.id]
        calls = [
            msgspec.structs.replace(
                known[key],
                status=ToolCallStatus.EXECUTING.value,
                attempt=known[key].attempt + 1,
                # Decided once: if the process dies again, someone must decide again.
                approval=None,
                updated_at=now_text(),
            )
            for key in keys
        ]
        # Durable before the tool runs, or the attempts could not be counted.
        updates = [self._update("tool_calls", call) for call in calls]
        await self._write(updates, EMPTY, lambda _: self._know_calls(calls))
        return calls

    async def _run_again(self, keys: Sequence[str], rejected: Sequence[str]) -> machine.Event:
        event: machine.Event | None = None
        if rejected:
            event = await self._answer_calls(rejected, _rejected())
        if not keys:
            assert event is not None
            return event
        calls = await self._write_again(keys)
        if event is not None:
            self._note_call(event, keys[0])
        return await self._run_calls(calls)

    async def _answer_calls(self, keys: Sequence[str], error: ToolError) -> machine.Event:
        """Answer calls with an error instead of running them."""
        known = self._state.calls[self._generation.id]
        event: machine.Event | None = None
        for key in keys:
            await self._finish_call(known[key], None, error)
            event = self._note_call(event, key)
        assert event is not None
        return event

    async def _run_calls(self, calls: Sequence[ToolCallRow]) -> machine.Event:
        if len(calls) == 1:
            await self._run_call(calls[0])
            return machine.CallFinished(calls[0].id)
        slots = asyncio.Semaphore(MAX_RUNNING_TOOLS)

        async def run(call: ToolCallRow) -> None:
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

    async def _run_call(self, call: ToolCallRow) -> None:
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

    async def _finish_call(self, call: ToolCallRow, result: Any, error: ToolError | None) -> None:
        status = ToolCallStatus.COMPLETED if error is None else ToolCallStatus.FAILED
        finished = msgspec.structs.replace(
            call,
            status=status.value,
            result=result,
            error=None if error is None else _storable(str(error)),
            error_code=None if error is None else error.code,
            updated_at=now_text(),
        )
        update = self._update("tool_calls", finished)
        await self._write([update], EMPTY, lambda _: self._state.put_call(finished))

    # The end.

    async def _end(self, end: End, intents: Sequence[Intent]) -> None:
        self._shard.flusher.close(self._buffer)
        try:
            await self._commit_end(end, intents)
        except (RowError, ConflictError) as error:
            if end.ending != "completed" or _is_of_store(error):
                raise
            words = f"The answer cannot be stored: {error}"
            await self._commit_end(End("failed", error=words, code=error.code), [])

    async def _commit_end(self, end: End, intents: Sequence[Intent]) -> None:
        """Write the end of stream and generation, the reply, and what `on_response` wrote."""
        taken = self._take(_CLOSES[end.ending])
        assert taken is not None
        append, columns = taken
        for attempt in range(MAX_REMAKES + 1):
            generation, rows = self._ending_rows(end)
            messages = [row for row in rows if row.collection == "messages"]

            def know(
                revision: int,
                generation: GenerationRow = generation,
                messages: Sequence[Insert | Update] = messages,
            ) -> None:
                self._keep(generation)
                for row in messages:
                    self._state.put_message(row.key, revision, row.value)

            try:
                made = await make_mutations(self._shard.client, self._session, intents)
                await self._write([append, *rows, *made], columns, know)
            except (ConflictError, KeyMissingError) as error:
                # A message changed or went meanwhile, or a row that `on_response` patches.
                if attempt == MAX_REMAKES or error.code not in ("conflict", "not_found"):
                    raise
                await self._read_messages_again()
            else:
                return

    def _ending_rows(self, end: End) -> tuple[GenerationRow, list[Insert | Update]]:
        now = now_text()
        generation = msgspec.structs.replace(
            self._generation,
            status=end.ending,
            usage=_to_usage(self._cycle.usage),
            error=_storable(end.error) or None if end.ending != "completed" else None,
            error_code=end.code or None,
            updated_at=now,
        )
        rows: list[Insert | Update] = []
        if end.ending != "completed":
            rows += [self._update("tool_calls", call) for call in self._cancelled_calls(now)]
        elif self._definition.pending_work is None:
            reply = self._reply_row(end, now)
            rows.append(self._insert("messages", reply.id, reply))
        rows.append(self._update("generations", generation))
        return generation, rows + self._answered()

    def _cancelled_calls(self, now: str) -> list[ToolCallRow]:
        return [
            msgspec.structs.replace(call, status=ToolCallStatus.CANCELLED.value, updated_at=now)
            for call in self._state.calls_of(self._generation.id)
            if not call.is_terminal
        ]

    async def _respond(self) -> list[Intent]:
        """Call `on_response`; what it writes in this session is part of the round's end.

        Raises:
            _ResponseFailed: it raised; nothing of it is written.
        """
        on_response = self._definition.on_response
        if on_response is None:
            return []
        group = Group(self._session, takes_all=False, shown=await self._shown_rows())
        token = current_group.set(group)
        try:
            result = on_response(self._reply, self._rows_to_answer())
            # A lambda may return the write it made, which is durable only with the round's end.
            if inspect.iscoroutine(result):
                await result
        except Exception as error:
            if _is_of_store(error):
                raise
            logger.exception("on_response failed", extra={"session": self._session})
            raise _ResponseFailed(_words(error), _code_of(error)) from error
        finally:
            current_group.reset(token)
        return group.intents

    async def _shown_rows(self) -> dict[tuple[str, str], bytes | None]:
        """Return the rows to answer as they are known here, for drafts and reads of them.

        The store is asked only for rows that have left the query meanwhile.
        """
        shard, session = self._shard, self._session
        view = shard.view
        assert view is not None
        collection = view.filter.collection
        shown: dict[tuple[str, str], bytes | None] = {}
        for key in self._pending:
            synced, told = view.synced.get((session, key)), view.told
            if synced is None:
                found = await shard.client.find(session, collection, key)
                synced = None if found is None else StoredRow(found.revision, found.value)
                told = 0
            row, _ = shard.writes.look((session, collection, key), synced, told)
            shown[collection, key] = None if row is None else row.value
        return shown

    def _answered(self) -> list[Insert | Update]:
        """Return the updates that stamp the answered messages."""
        if self._definition.pending_work is not None:
            return []
        updates: list[Insert | Update] = []
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
        rows = {row.key: row for row in read.rows["messages"]}
        for key in [key for key in self._pending if key not in rows]:
            self._state.put_message(key, read.revision, None)
        for row in rows.values():
            self._state.put_message(row.key, row.revision, row.value)

    def _reply_row(self, end: End, now: str) -> MessageRow:
        messages = self._state.messages
        asked = [messages[key].message for key in self._pending if key in messages]
        last = max(asked, key=lambda message: message.created_at, default=None)
        if last is not None and last.created_at >= now:
            # After what it answers, whatever the clocks of those who wrote say.
            asked_at = datetime.fromisoformat(last.created_at)
            now = time_text(asked_at + timedelta(microseconds=1))
        return MessageRow(
            f"{self._generation.id}:reply",
            "assistant",
            self._definition.name,
            last.actor_id if last is not None else "",
            end.text,
            now,
            processed=True,
            generation_id=self._generation.id,
            in_reply_to=last.id if last is not None else None,
        )

    # Writing.

    async def _write(
        self, mutations: Sequence[Mutation], columns: ChunkColumns, know: Callable[[int], None]
    ) -> None:
        """Make a commit; once it is durable, `know` takes it into what this process knows.

        Whoever is cancelled waits for the outcome: the store knows of it, so must the state.
        """
        sent = self._send(mutations, columns)
        try:
            revision = await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            if sent.exception() is None:
                self._unsent = None
                know(sent.result())
            raise
        self._unsent = None
        know(revision)

    def _send(
        self, mutations: Sequence[Mutation], columns: ChunkColumns = EMPTY
    ) -> asyncio.Future[int]:
        shard = self._shard
        self._sent = shard.client.commit(mutations, chunks=columns, runner=shard.runner)
        return self._sent

    async def _settled(self) -> None:
        """Wait until all that was sent has its outcome."""
        sent = [self._sent, self._shard.flusher.sent(self._buffer)]
        waiting = [each for each in sent if each is not None and not each.done()]
        if waiting:
            await asyncio.wait(waiting)

    def _take(self, ending: Ending | None = None) -> tuple[Append, ChunkColumns] | None:
        """Return the chunks for the next commit; those of one that was refused come again."""
        if self._unsent is None:
            self._unsent = self._buffer.take(ending)
        elif ending is not None:
            append, columns = self._unsent
            self._unsent = msgspec.structs.replace(append, closes=ending), columns
        return self._unsent

    def _insert(self, collection: str, key: str, row: Any) -> Insert:
        return Insert(self._session, collection, key, encode_row(row))

    def _update(self, collection: str, row: GenerationRow | ToolCallRow) -> Update:
        # Only this runner writes these rows while it holds the session, so any revision will do.
        return Update(self._session, collection, row.id, encode_row(row), 0)

    def _keep(self, generation: GenerationRow) -> None:
        self._generation = generation
        self._state.put_generation(generation)


def _in_doubt() -> ToolError:
    return ToolError(
        "The process died while the tool ran; it may have had its effect or not.", code="in_doubt"
    )


def _rejected() -> ToolError:
    return ToolError("It was decided that the call is not run again.", code="rejected")


class _ResponseFailed(Exception):  # noqa: N818  Says how the generation ends.
    """`on_response` raised."""

    def __init__(self, words: str, code: str) -> None:
        super().__init__(words)
        self.code = code


def _code_of(error: Exception) -> str:
    """Return the code for what the user's functions or the adapter raised."""
    return error.code if isinstance(error, AidbError) else "agent_error"


def _is_of_store(error: Exception) -> bool:
    """Whether it tells of the store and not of a mistake in the user's functions."""
    if isinstance(error, ConflictError):
        return error.collection == CHUNKS
    return isinstance(error, UnavailableError | FencedError | StorageError)


def _storable(text: str) -> str:
    """Return a text without halves of surrogate pairs, as file names in errors may have."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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


def _to_usage(usage: ModelUsage) -> UsageRow | None:
    read, written = usage.input_tokens, usage.output_tokens
    return UsageRow(read, written, read + written) if read or written else None


def _as_text(result: object) -> str:
    if isinstance(result, BaseModel):
        return result.model_dump_json()
    return msgspec.json.encode(result).decode()


async def _as_events(stream: AsyncIterator[Any]) -> AsyncIterator[Event]:
    """Return a stream of events or of texts as events."""
    from aidb_ray.models.events import text_content

    async for item in stream:
        yield text_content("generate", item) if isinstance(item, str) else item
