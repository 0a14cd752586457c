"""The calls of one round: their rows, running those that run here, leaving others to others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray import crash_points
from aidb_ray.agents.cycle import AnswerCode, Call, CallDeferred, CallFinished, GoOn, Standing
from aidb_ray.agents.delegation import make_request, take_back
from aidb_ray.agents.parking import Waiting
from aidb_ray.agents.rows import MessageRow, ToolCallRow, decode_call, now_ms, now_text, time_ms
from aidb_ray.agents.session import args_text, round_of
from aidb_ray.contracts import ToolCallStatus
from aidb_ray.effects.record import WorkRecord
from aidb_ray.errors import ConflictError, ContractError, ToolError
from aidb_ray.json_values import parse_json
from aidb_ray.models.chat import unknown_tool
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import Tool, ToolContext
from aidb_ray.store.changes import CHUNKS, Filter, Mutation

if TYPE_CHECKING:
    from aidb_ray.agents.assignment import Shard
    from aidb_ray.agents.commits import Commits
    from aidb_ray.agents.definition import AgentDefinition
    from aidb_ray.agents.delegation import Delegate
    from aidb_ray.agents.rows import GenerationRow
    from aidb_ray.agents.session import SessionState
    from aidb_ray.database import Session
    from aidb_ray.models.base import ToolCallRequest
    from aidb_ray.store.client import StoreClient

MAX_RUNNING_TOOLS = 16
_MAX_KEPT_TEXT = 65_536


class RoundCalls:
    """Runs the calls of one generation, each end of which is a commit of its own."""

    def __init__(
        self, shard: Shard, session: str, state: SessionState, commits: Commits, signal: Signal
    ) -> None:
        self._shard = shard
        self._session = session
        self._state = state
        self._commits = commits
        self._signal = signal
        self._news = asyncio.Event()

    def hear(self) -> None:
        """Hear that others may have decided about calls: those that may run now need not wait."""
        self._news.set()

    async def begin(
        self,
        requests: Sequence[ToolCallRequest],
        keys: Sequence[str],
        number: int,
        generation: GenerationRow,
    ) -> list[CallFinished | CallDeferred]:
        """Write all rows of round `number`, and the generation as it is now, then run what may run.

        Returns:
            What became of each call, in the order of `keys`.
        """
        made = self._rows_of(requests, keys, number)
        calls = [row for row in made if isinstance(row, ToolCallRow)]
        asked = {
            row.id: self._commits.insert("messages", row.id, row)
            for row in made
            if isinstance(row, MessageRow)
        }
        commits = self._commits
        mutations: list[Mutation] = [commits.insert("tool_calls", c.id, c) for c in calls]
        mutations += [*asked.values(), commits.update("generations", generation)]

        def know(revision: int) -> None:
            commits.keep(generation)
            self._know(calls, revision)
            for key, insert in asked.items():
                self._state.put_message(key, revision, insert.value)

        self._shard.flusher.check(commits.buffer)
        await commits.write(mutations, know, takes_chunks=True)
        if crash_points.armed:
            await crash_points.reach("calls.written")
        begun = [call for call in calls if call.status == ToolCallStatus.EXECUTING]
        ran = await self._run_all(begun)
        return [
            CallDeferred(row.id) if _is_left(row) and row.id not in ran else CallFinished(row.id)
            for row in made
        ]

    async def go_on(self, command: GoOn) -> list[CallFinished | CallDeferred]:
        """Answer and run calls that were found open; all that is decided is one commit.

        Returns:
            What became of each; nothing if someone else has written one of them meanwhile: then
            nothing was done.
        """
        known = self._state.calls.get(self._commits.generation.id, {})
        ended = [
            _ended(
                msgspec.structs.replace(
                    known[key], in_doubt=known[key].in_doubt or code == "in_doubt"
                ),
                None,
                _answer(known[key], code),
            )
            for key, code in command.answers.items()
            if code != "delegation_cycle"
        ]
        circular = {key for key, code in command.answers.items() if code == "delegation_cycle"}
        taken_back = [
            take_back(request)
            for request, _ in self._state.requests_of(self._commits.generation.id)
            if request.id in circular
        ]
        started = [self._started(known[key]) for key in command.keys]
        # Durable before the tool runs, or the attempts could not be counted.
        if not await self._write_found([*ended, *started], taken_back):
            return []
        ran = await self._run_all(started)
        # Those that waited first: else nothing but waiting would seem to be left.
        joined = ran[len(started) :]
        return [CallFinished(key) for key in (*joined, *command.answers, *command.keys)]

    def _rows_of(
        self, requests: Sequence[ToolCallRequest], keys: Sequence[str], number: int
    ) -> list[ToolCallRow | MessageRow]:
        now = now_text()
        rows: list[ToolCallRow | MessageRow] = []
        asked = 0
        for request, key in zip(requests, keys, strict=True):
            delegate = self._shard.delegates.get(request.name)
            if delegate is None:
                rows.append(self._row_of(request, key, number, now))
                continue
            try:
                rows.append(self._request_to(delegate, request, key, asked, now))
            except ToolError as error:
                # Nobody was asked, so it is a call that failed.
                rows.append(_ended(self._call_of(request, key, number, now), None, error))
            else:
                asked += 1
        return rows

    def _request_to(
        self, delegate: Delegate, request: ToolCallRequest, key: str, asked: int, now: str
    ) -> MessageRow:
        generation = self._commits.generation
        return make_request(
            delegate,
            request,
            key,
            generation_id=generation.id,
            agent=self._shard.definition.name,
            path=self._state.path_of(generation.message_ids),
            number=asked,
            waits=self._state.waits(),
            now=now,
        )

    def _call_of(self, request: ToolCallRequest, key: str, number: int, now: str) -> ToolCallRow:
        return ToolCallRow(
            key,
            self._commits.generation.id,
            request.name,
            _parse_args(request.args_json),
            ToolCallStatus.EXECUTING.value,
            self._commits.generation.agent,
            number,
            request.id,
            1,
            created_at=now,
            updated_at=now,
        )

    def _row_of(self, request: ToolCallRequest, key: str, number: int, now: str) -> ToolCallRow:
        call = self._call_of(request, key, number, now)
        tool = self._shard.tools.get(request.name)
        if tool is None or not is_deferred(tool):
            return call
        try:
            # Nobody is asked about what could not run.
            tool.parse_args(request.args_json)
        except ToolError as error:
            return _ended(call, None, error)
        return msgspec.structs.replace(
            call,
            status=ToolCallStatus.PENDING.value,
            attempt=0,
            approval="needed" if tool.needs_approval else None,
        )

    def _know(self, calls: Sequence[ToolCallRow], revision: int) -> None:
        for call in calls:
            self._state.put_call(call, revision)

    def _started(self, call: ToolCallRow) -> ToolCallRow:
        is_decided_once = self._shard.definition.on_in_doubt == "park"
        return msgspec.structs.replace(
            call,
            status=ToolCallStatus.EXECUTING.value,
            attempt=call.attempt + 1,
            # If the process dies again, someone must decide again.
            approval=None if is_decided_once else call.approval,
            in_doubt=call.in_doubt or call.status == ToolCallStatus.EXECUTING,
            updated_at=now_text(),
        )

    async def _run_all(self, calls: Sequence[ToolCallRow]) -> list[str]:
        """Run calls at once, and what is decided meanwhile with them; return the keys of all."""
        ran = [call.id for call in calls]
        if len(calls) < 2 and not self._is_any_left():
            for call in calls:
                await self._run(call)
            return ran
        slots = asyncio.Semaphore(MAX_RUNNING_TOOLS)

        async def run(call: ToolCallRow) -> None:
            async with slots:
                await self._run(call)

        try:
            async with asyncio.TaskGroup() as group:
                running = {group.create_task(run(call)) for call in calls}
                while running:
                    running -= await self._until_news(running)
                    if self._news.is_set():
                        self._news.clear()
                        decided = await self._start_decided()
                        ran += [call.id for call in decided]
                        running |= {group.create_task(run(call)) for call in decided}
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return ran

    async def _until_news(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[Any]]:
        """Wait until a call has ended, or there may be another; return the tasks that are done."""
        if not self._is_any_left():
            return (await asyncio.wait(running))[0]
        news = asyncio.create_task(self._news.wait())
        try:
            first = asyncio.FIRST_COMPLETED
            return (await asyncio.wait([*running, news], return_when=first))[0]
        finally:
            news.cancel()

    def _is_any_left(self) -> bool:
        """Whether calls of the generation wait for others to decide."""
        calls = self._state.calls.get(self._commits.generation.id, {})
        return any(call.status == ToolCallStatus.PENDING for call in calls.values())

    async def _start_decided(self) -> list[ToolCallRow]:
        """Write of calls that wait and may run by now that they are run; return those."""
        pending = (("generationId", (self._commits.generation.id,)), ("status", ("pending",)))
        _, rows = await self._shard.client.read(Filter("tool_calls", self._session, where=pending))
        ready: list[ToolCallRow] = []
        for row in rows:
            call = decode_call(row.value)
            tool = self._shard.tools.get(call.name)
            if _standing(call, tool, now_ms(), is_decided=False) == "ready":
                self._state.put_call(call, row.revision)
                ready.append(self._started(call))
        # If others write one of them in this moment, there will be news again.
        return ready if ready and await self._write_found(ready, ()) else []

    async def _run(self, call: ToolCallRow) -> None:
        # Of its own: a tool that waited for something cancelled aborts it, and only this call.
        signal = Signal()
        stop = self._signal
        forget = stop.add_listener(lambda: signal.abort(stop.reason, is_stop=stop.is_stop))
        self._shard.running += 1
        try:
            tool = self._shard.tools.get(call.name)
            if tool is None:
                raise unknown_tool(call.name, self._shard.tools)
            result = await tool.call(args_text(call.args), self._context(call, signal))
        except ToolError as error:
            await self._finish(call, None, error)
        else:
            await self._finish(call, result, None)
        finally:
            self._shard.running -= 1
            forget()

    def _context(self, call: ToolCallRow, signal: Signal) -> ToolContext:
        return ToolContext(
            signal=signal,
            idempotency_key=call.id,
            attempt=call.attempt,
            session=make_session(self._shard, self._session),
            generation_id=call.generation_id,
            agent=self._commits.generation.agent,
            record=make_record(
                self._shard, self._session, self._commits, call.id, is_first=call.attempt == 1
            ),
            watch=self._shard.threads,
        )

    async def _finish(self, call: ToolCallRow, result: Any, error: ToolError | None) -> None:
        if crash_points.armed:
            await crash_points.reach("tool.ran")
        finished = _ended(call, result, error)
        update = self._commits.update("tool_calls", finished)
        await self._commits.write([update], lambda revision: self._know([finished], revision))
        if crash_points.armed:
            await crash_points.reach("tool.recorded")

    async def _write_found(
        self, calls: Sequence[ToolCallRow], requests: Sequence[MessageRow]
    ) -> bool:
        """Write calls and requests unless others have written any of them since they were read."""
        messages = self._state.messages
        updates = [
            self._commits.update("tool_calls", call, self._state.call_revision(call.id))
            for call in calls
        ]
        asked = {
            request.id: self._commits.update("messages", request, messages[request.id].revision)
            for request in requests
        }

        def know(revision: int) -> None:
            self._know(calls, revision)
            for key, update in asked.items():
                self._state.put_message(key, revision, update.value)

        try:
            await self._commits.write([*updates, *asked.values()], know)
        except ConflictError as error:
            if error.collection == CHUNKS:
                raise
            return False
        return True


def make_session(shard: Shard, session: str) -> Session:
    """Return the session as the user's code gets it."""
    from aidb_ray.database import Session

    return Session(shard.database, session)


def make_record(
    shard: Shard, session: str, commits: Commits, owner: str, *, is_first: bool
) -> WorkRecord:
    """Return where a call or a generation keeps its steps and questions."""

    async def write(mutations: Sequence[Mutation]) -> None:
        await asyncio.shield(commits.send(mutations))

    return WorkRecord(
        shard.client, session, owner, write, agent=commits.generation.agent, is_first=is_first
    )


# How calls stand, by their rows.


def _is_left(row: ToolCallRow | MessageRow) -> bool:
    """Whether a row of a new round is for others to answer or decide."""
    return isinstance(row, MessageRow) or row.status == ToolCallStatus.PENDING


def is_deferred(tool: Tool) -> bool:
    """Whether someone else must answer or decide before a call of the tool goes on."""
    return tool.runs_elsewhere or tool.needs_approval


def standings(
    state: SessionState, generation: GenerationRow, definition: AgentDefinition
) -> list[Call]:
    """Return how all calls of a generation stand."""
    tools = {tool.name: tool for tool in definition.tools}
    now = now_ms()
    written_at = state.read_as_of(generation.id)
    found: list[Call] = []
    for call in state.calls_of(generation.id):
        tool = tools.get(call.name)
        standing = _standing(call, tool, now, is_decided=definition.on_in_doubt == "park")
        is_elsewhere = tool is not None and tool.runs_elsewhere
        if standing == "answered" and is_elsewhere and written_at is not None:
            is_later = state.call_revision(call.id) > written_at
            standing = "answered_elsewhere" if is_later else standing
        found.append(Call(call.id, call.round, standing))
    for request, reply in state.requests_of(generation.id):
        standing = "answered" if reply is not None or request.processed else "awaited"
        if standing == "awaited" and state.closes_cycle(request):
            standing = "circular"
        if reply is not None and written_at is not None and reply.revision > written_at:
            standing = "answered_elsewhere"
        found.append(Call(request.id, round_of(request.id), standing))
    return found


def _standing(call: ToolCallRow, tool: Tool | None, now: int, *, is_decided: bool) -> Standing:
    """Return how a call stands; `is_decided` says that decisions about running ones count."""
    if call.is_terminal:
        return "answered"
    is_elsewhere = tool is not None and tool.runs_elsewhere
    if call.status == ToolCallStatus.EXECUTING and not is_elsewhere:
        if is_decided and call.approval in ("approved", "rejected"):
            return "again" if call.approval == "approved" else "rejected"
        return "running"
    if call.approval == "rejected":
        return "rejected"
    if is_elsewhere:
        until_ms = _expires_at(call, tool)
        return "expired" if until_ms is not None and until_ms <= now else "awaited"
    return "awaited" if call.approval == "needed" else "ready"


def waiting_for(
    state: SessionState,
    generation: GenerationRow,
    keys: Sequence[str],
    definition: AgentDefinition,
) -> Waiting:
    """Return what a generation waits for that waits for these calls, some of other agents."""
    tools = {tool.name: tool for tool in definition.tools}
    until: list[int] = []
    if definition.run_timeout_ms is not None:
        until.append(time_ms(generation.created_at) + definition.run_timeout_ms)
    is_for_persons = True
    for key in keys:
        call = state.calls.get(generation.id, {}).get(key)
        if call is None:
            is_for_persons = False
            continue
        tool = tools.get(call.name)
        if tool is None or not tool.runs_elsewhere:
            continue
        is_for_persons = is_for_persons and call.approval == "needed"
        expires_at = _expires_at(call, tool)
        if expires_at is not None:
            until.append(expires_at)
    return Waiting(is_for_persons, min(until, default=None))


def _expires_at(call: ToolCallRow, tool: Tool | None) -> int | None:
    if tool is None or tool.timeout_ms is None:
        return None
    return time_ms(call.created_at) + tool.timeout_ms


async def are_asking(client: StoreClient, session: str, keys: Sequence[str]) -> bool:
    """Whether each of these calls waits for the answer to a question."""
    wanted = Filter("questions", session, where=(("owner", tuple(keys)), ("status", ("open",))))
    _, rows = await client.read(wanted)
    owners = {msgspec.json.decode(row.value)["owner"] for row in rows}
    return owners.issuperset(keys)


def _ended(call: ToolCallRow, result: Any, error: ToolError | None) -> ToolCallRow:
    status = ToolCallStatus.COMPLETED if error is None else ToolCallStatus.FAILED
    return msgspec.structs.replace(
        call,
        status=status.value,
        result=result,
        error=None if error is None else storable(str(error)),
        error_code=None if error is None else error.code,
        updated_at=now_text(),
    )


_WORDS: Mapping[AnswerCode, str] = {
    "in_doubt": "The process died while the tool ran; it may have had its effect or not.",
    "rejected": "It was decided that the call does not run.",
    "timeout": "Nobody has run the call in time.",
}


def _answer(call: ToolCallRow, code: AnswerCode) -> ToolError:
    words = call.reason if code == "rejected" and call.reason else _WORDS[code]
    return ToolError(words, code=code)


def storable(text: str) -> str:
    """Return a text without halves of surrogate pairs, as file names in errors may have."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _parse_args(text: str) -> Any:
    try:
        return parse_json(text)
    except ContractError:
        # Kept as it is; running the call answers the model with what is wrong. A row has bounds.
        return text if len(text) <= _MAX_KEPT_TEXT else f"{text[:_MAX_KEPT_TEXT]}…"
