"""One generation, run: asks the model, runs tools, and writes each step as one commit.

`cycle` decides; this does what it says. What a model round or a tool call came to is durable
before the next one begins.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec
from pydantic import BaseModel

from aidb_ray import crash_points
from aidb_ray.agents import cycle as machine
from aidb_ray.agents.assignment import Assignment, Shard
from aidb_ray.agents.calls import (
    RoundCalls,
    make_record,
    make_session,
    standings,
    waiting_for,
)
from aidb_ray.agents.commits import Commits
from aidb_ray.agents.continuation import put_taken_over, read_newest_round
from aidb_ray.agents.cycle import Cycle, End, Limits, OutputRefused, RoundFailed, RoundFinished
from aidb_ray.agents.ending import (
    Ending,
    code_of,
    in_words,
    is_gone,
    is_of_store,
    to_usage_row,
)
from aidb_ray.agents.parking import Waiting
from aidb_ray.agents.recorder import Recorder
from aidb_ray.agents.rows import GenerationRow, now_ms, now_text, random_id, time_ms
from aidb_ray.chunks import ChunkBuffer, ChunkCollection
from aidb_ray.contracts import AgentMessage
from aidb_ray.errors import ContractError, FencedError, ModelError, RunCancelledError
from aidb_ray.models.base import ModelMessage, TextAdapter, parse_messages, stream_round
from aidb_ray.models.base import Usage as ModelUsage
from aidb_ray.models.chat import MAX_OUTPUT_REPAIRS, parse_output
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import Record, Tool
from aidb_ray.store.changes import Mutation, Need
from aidb_ray.store.rows import codec_of
from aidb_ray.store.transaction import Intent

if TYPE_CHECKING:
    from ag_ui.core import Event

    from aidb_ray.database import Session

logger = logging.getLogger(__name__)

_message_codec = codec_of(AgentMessage, "id")

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class GenerateContext(Generic[W]):
    """What `generate` and `build_messages` are given; `W` is the type of pending rows.

    Attributes:
        messages: The conversation for the model.
        pending: The rows to answer.
        signal: Fires when the run should stop.
        record: Where steps are kept.
    """

    session: Session
    pending: list[W]
    messages: list[ModelMessage]
    tools: tuple[Tool, ...]
    adapter: TextAdapter | None
    signal: Signal
    generation_id: str
    attempt: int
    record: Record

    async def step(self, name: str, fn: Callable[[], Any]) -> Any:
        """Run `fn`, plain or async, and record its result; return that, as plain JSON.

        Once the result is durable, no later attempt of this generation runs `fn` again. See
        `ToolContext.step`.
        """
        return await self.record.step(name, fn)


class GenerationRun:
    """Runs one generation of one session, from where its rows say it stands."""

    def __init__(self, shard: Shard, assignment: Assignment) -> None:
        self._shard = shard
        self._definition = shard.definition
        self._session = assignment.session
        self._state = assignment.state
        self._assignment = assignment
        self._pending = list(assignment.pending)
        self._pending_rows = list(assignment.rows)
        self._cycle: Cycle
        self._recorder: Recorder
        self._commits = Commits(shard, self._session, self._state)
        self.signal = Signal()
        self._is_left = False
        self._calls = RoundCalls(shard, self._session, self._state, self._commits, self.signal)
        self._ending = Ending(shard, self._session, self._state, self._commits, self._pending)
        self._reply: Any = None
        # The task that runs it, while it may be stopped there, and how it ends once it was.
        self._stoppable: asyncio.Task[Any] | None = None
        self._stopped: machine.Cancelled | machine.TimedOut | None = None
        self._unwritten: RoundFinished | None = None
        # What the model had said of the unfinished round before a crash; it goes on from there.
        self._taken_over = ""
        self._repairs: list[ModelMessage] = []
        self._record: tuple[int, Record] | None = None
        limits = self._definition
        self._limits = Limits(
            limits.max_iterations, limits.retry, limits.usage_limits, MAX_OUTPUT_REPAIRS
        )

    @property
    def answered(self) -> Sequence[str]:
        """Keys of the rows that the generation answers."""
        return self._pending

    @property
    def generation_id(self) -> str:
        """Id of the generation, `""` before it has begun."""
        found = self._assignment.generation
        if found is not None:
            return found.id
        return self._commits.generation.id if hasattr(self._commits, "generation") else ""

    @property
    def is_suspect(self) -> bool:
        """See `Cycle.is_suspect`; not before it has begun."""
        return self._cycle.is_suspect

    async def run(self) -> Waiting | Literal["ended", "changed"]:
        """Run until the generation has ended, or must wait.

        If the task is cancelled it stops where it is, and a later run goes on from the rows.

        Returns:
            `ended`; what it waits for, if others must go first; or `changed`, if they have written
            rows that it goes on from, which must be read again.

        Raises:
            FencedError: another runner has the session.
        """
        command = await self._begin()
        if isinstance(command, machine.Wait):
            return self._waiting(command)
        if crash_points.armed:
            await crash_points.reach("generation.begun")
        try:
            outcome, intents = await self._decide(command)
            if outcome is None:
                return "changed"
            if isinstance(outcome, machine.Wait):
                return self._waiting(outcome)
            if crash_points.armed:
                await crash_points.reach("generation.ending")
            await self._ending.write(outcome, self._cycle, intents)
            if crash_points.armed:
                await crash_points.reach("generation.ended")
        except asyncio.CancelledError:
            # What is on its way will be applied: whoever goes on with the rows must see it.
            await self._commits.settled()
            raise
        finally:
            self._shard.flusher.discard(self._commits.buffer)
        return "ended"

    def cancel(self, reason: str) -> None:
        """Have the generation end as cancelled, unless its end is being written already."""
        self._stop(machine.Cancelled(reason), reason)

    def _stop(self, why: machine.Cancelled | machine.TimedOut, reason: str) -> None:
        self._stopped = self._stopped or why
        self.signal.abort(reason)
        task, self._stoppable = self._stoppable, None
        if task is not None:
            task.cancel()

    def hear(self) -> None:
        """Hear that others may have decided about calls of the generation."""
        self._calls.hear()

    def leave(self) -> None:
        """Have the user's functions stop: this process is not to end the generation any more."""
        self._is_left = True
        self.signal.abort("stopped", is_stop=True)

    def _time_out(self, limit_ms: int) -> None:
        self._stop(machine.TimedOut(limit_ms), "run timeout")

    def _waiting(self, wait: machine.Wait) -> Waiting:
        found = self._assignment.generation or self._commits.generation
        return waiting_for(self._state, found, wait.keys, self._definition)

    async def _decide(
        self, command: machine.Command
    ) -> tuple[End | machine.Wait | None, list[Intent]]:
        """Run up to the end, and return it with what `on_response` writes; or see `_follow`."""
        limit = self._definition.run_timeout_ms
        task = self._stoppable = asyncio.current_task()
        assert task is not None
        intents: list[Intent] = []
        timer = None
        if limit is not None:
            timer = asyncio.get_running_loop().call_later(limit / 1000, self._time_out, limit)
        try:
            outcome = await self._follow(command)
            if isinstance(outcome, End) and outcome.ending == "completed":
                response = await self._ending.respond(self._reply, self._rows_to_answer())
                if isinstance(response, End):
                    return response, []
                intents = response
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            task.uncancel()
        except ContractError as error:
            return End("failed", error=str(error), code=error.code), []
        else:
            if not self.signal.is_aborted:
                return outcome, intents
        finally:
            self._stoppable = None
            if timer is not None:
                timer.cancel()
        return self._end_when_stopped(), []

    def _end_when_stopped(self) -> End:
        if self._is_left:
            # What was cancelled has swallowed that.
            raise asyncio.CancelledError
        # The user's functions have the signal, too.
        return self._cut_short(self._stopped or machine.Cancelled(self.signal.reason))

    def _cut_short(self, why: machine.Cancelled | machine.TimedOut) -> End:
        self._cycle, _ = machine.advance(self._cycle, why, self._limits)
        return machine.end_of(why)

    async def _begin(self) -> machine.Command:
        found = self._assignment.generation
        is_new_attempt = True
        if found is None:
            command: machine.Command = machine.AskModel()
            generation, next_index = self._new_generation(), 0
            self._cycle = Cycle(generation.id)
            mutation: Mutation = self._commits.insert("generations", generation.id, generation)
            needs: tuple[Need, ...] | None = self._asked()
        else:
            command = self._resume(found)
            if isinstance(command, machine.Wait):
                return command
            is_new_attempt = self._cycle.attempt != found.attempt
            page = await self._shard.client.read_chunks(self._session, found.id, 1 << 62)
            next_index = page.next_index
            if is_new_attempt and page.attempt >= self._cycle.attempt:
                # Rounds that are tried again in one process are counted with the next commit only.
                attempt = page.attempt + 1
                self._cycle = msgspec.structs.replace(self._cycle, attempt=attempt)
            asks = isinstance(command, machine.AskModel)
            if asks and is_new_attempt and self._definition.generate is None:
                await self._take_up_round(found)
            generation = self._next_attempt(found)
            mutation = self._commits.update("generations", generation)
            needs = None
        commits = self._commits
        commits.keep(generation)
        buffer = commits.buffer = ChunkBuffer(
            self._session, generation.id, next_index=next_index, attempt=self._cycle.attempt
        )
        if is_new_attempt:
            self._begin_attempt()
        shard = self._shard
        self._recorder = Recorder(buffer, shard.flusher, shard.silence)
        is_suspicious = found is not None or self._assignment.is_leftover
        if is_suspicious and isinstance(command, machine.AskModel):
            # Durable before the user's code runs, or the processes it ends could not be counted.
            await commits.write([mutation], lambda _: None, needs=needs)
        else:
            # The model may be called before this is durable: commits of one client keep their
            # order, so if this one is refused, so is what follows.
            commits.send([mutation], needs=needs).add_done_callback(_retrieve)
        shard.flusher.open(buffer, shard.runner)
        return command

    def _asked(self) -> tuple[Need, ...]:
        """Return the rows to answer, as they were read: it is them that a new generation is for."""
        if self._definition.pending_work is None:
            known = self._state.messages
            return tuple(
                Need(self._session, "messages", key, known[key].revision)
                for key in self._pending
                if key in known
            )
        assert self._shard.view is not None
        collection = self._shard.view.filter.collection
        return tuple(Need(self._session, collection, key) for key in self._pending)

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
        self._cycle, command = machine.resume(
            found,
            standings(self._state, found, self._definition),
            self._definition.on_in_doubt,
            self._limits,
            is_interrupted=self._assignment.is_interrupted,
        )
        if not self._pending:
            return self._cut_short(machine.Cancelled("Nobody waits for it any more."))
        if isinstance(command, machine.Wait):
            limit = self._definition.run_timeout_ms
            if self.signal.is_aborted:
                return self._end_when_stopped()
            if limit is not None and time_ms(found.created_at) + limit <= now_ms():
                return self._cut_short(machine.TimedOut(limit))
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

    async def _take_up_round(self, generation: GenerationRow) -> None:
        """See what the newest round had come to when the process died, if its rows do not say.

        A round is finished when its last chunk is durable, and what it came to is in its chunks.
        Its rows come in the commit after, or in the same one; if they are missing, the model need
        not be asked again.
        """
        stored = ChunkCollection(self._shard.database, self._session)
        heard = await read_newest_round(stored, generation.id)
        if not heard.is_finished:
            self._taken_over = heard.text if self._definition.on_crash == "continue" else ""
            return
        newest, calls = len(generation.rounds) - 1, heard.tool_calls
        if not calls or not self._state.is_written(generation.id, newest, calls):
            self._unwritten = RoundFinished(heard.text, tuple(calls), heard.usage)

    async def _follow(self, command: machine.Command) -> End | machine.Wait | None:
        """Run up to an end or a wait; None if rows have changed that it goes on from."""
        while not self.signal.is_aborted:
            match command:
                case machine.AskModel(pause_ms):
                    if pause_ms:
                        await asyncio.sleep(pause_ms / 1000)
                    events: Sequence[machine.Event] = [await self._ask()]
                    if crash_points.armed and isinstance(events[0], RoundFinished):
                        await crash_points.reach("round.heard")
                case machine.RunCalls(requests, keys):
                    generation = self._with_round()
                    number = self._cycle.round
                    events = await self._calls.begin(requests, keys, number, generation)
                case machine.GoOn():
                    events = await self._calls.go_on(command)
                    if not events:
                        return None
                case End() | machine.Wait():
                    return command
                case None:
                    raise AssertionError(self._cycle)
            for event in events:
                # All but the last answer of a round change nothing else.
                self._cycle, command = machine.advance(self._cycle, event, self._limits)
        return self._end_when_stopped()

    def _with_round(self) -> GenerationRow:
        """Return the generation with the round that has just finished."""
        return msgspec.structs.replace(
            self._commits.generation,
            rounds=list(self._cycle.rounds),
            attempt=self._cycle.attempt,
            interruptions=self._cycle.interruptions,
            usage=to_usage_row(self._cycle.usage),
            updated_at=now_text(),
        )

    # The model.

    async def _ask(self) -> machine.Event:
        if self._unwritten is not None:
            event, self._unwritten = self._unwritten, None
            if self._fits(event):
                return event
        buffer = self._commits.buffer
        if buffer.attempt != self._cycle.attempt:
            # What is still held belongs to the attempt that failed.
            self._shard.flusher.flush(buffer)
            buffer.attempt = self._cycle.attempt
            self._begin_attempt()
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
            return RoundFailed(in_words(error), "timeout", is_retryable=True)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Something that the user's functions or the adapter waited for was cancelled, not this.
            words = "What the model round waited for was cancelled."
            return RoundFailed(words, "agent_error", is_retryable=False)
        except Exception as error:
            if is_of_store(error):
                raise
            # A mistake in the user's functions or in the adapter: asking again would only repeat
            # it, and whoever waits for the reply should hear of it.
            logger.exception("a model round failed", extra={"session": self._session})
            return RoundFailed(in_words(error), code_of(error), is_retryable=False)

    def _begin_attempt(self) -> None:
        self._commits.buffer.begin_attempt()
        if self._taken_over:
            put_taken_over(self._commits.buffer, self._taken_over)

    async def _stream_round(self) -> machine.Event:
        definition = self._definition
        assert definition.adapter is not None
        messages = [*await self._messages(), *self._repairs]
        if self._taken_over:
            messages.append(ModelMessage("assistant", self._taken_over))
        events = stream_round(
            definition.adapter,
            messages,
            tools=definition.offered,
            system_prompts=definition.prompts,
            output_schema=definition.output_schema,
        )
        heard = await self._recorder.record(events)
        if not heard.is_finished:
            raise ModelError("The model's stream broke off.", retryable=True, code="truncated")
        text, self._taken_over = self._taken_over + heard.text, ""
        if definition.output_schema is not None and not heard.tool_calls:
            try:
                parse_output(text, definition.output_schema)
            except ModelError as error:
                said = msgspec.structs.replace(heard.to_message(), content=text)
                self._repairs += [said, ModelMessage("user", str(error))]
                return OutputRefused(str(error), heard.usage)
        self._repairs.clear()
        return RoundFinished(text, tuple(heard.tool_calls), heard.usage)

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
        generation_id = self._commits.generation.id
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
        return GenerateContext(
            make_session(self._shard, self._session),
            self._rows_to_answer(),
            messages,
            self._definition.tools,
            self._definition.adapter,
            self.signal,
            self._commits.generation.id,
            self._cycle.attempt,
            self._record_of_attempt(),
        )

    def _record_of_attempt(self) -> Record:
        attempt = self._cycle.attempt
        if self._record is None or self._record[0] != attempt:
            commits, is_first = self._commits, attempt == 1
            owner = commits.generation.id
            made = make_record(self._shard, self._session, commits, owner, is_first=is_first)
            self._record = (attempt, made)
        return self._record[1]

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


def _retrieve(started: asyncio.Future[int]) -> None:
    # A refusal shows again in the commit that follows; here it must only not be "never retrieved".
    if not started.cancelled():
        error = started.exception()
        if error is not None and not isinstance(error, FencedError) and not is_gone(error):
            logger.warning("a generation could not be started: %s", error)


def _as_text(result: object) -> str:
    if isinstance(result, BaseModel):
        return result.model_dump_json()
    return msgspec.json.encode(result).decode()


async def _as_events(stream: AsyncIterator[Any]) -> AsyncIterator[Event]:
    """Return a stream of events or of texts as events."""
    from aidb_ray.models.events import text_content

    async for item in stream:
        yield text_content("generate", item) if isinstance(item, str) else item
