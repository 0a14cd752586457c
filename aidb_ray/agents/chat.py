"""`durable_chat`: a chat in the caller's process that goes on after a crash, by its id.

It is one generation, run as an agent runs its own, but for whoever calls. A claim of its row, with
a lease, says who that is; the end is one commit with giving it up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, TypeVar, cast, overload
from uuid import uuid4

import msgspec
from pydantic import BaseModel

from aidb_ray.agents.assignment import Assignment, Shard
from aidb_ray.agents.cycle import Cycle, End
from aidb_ray.agents.definition import (
    AgentDefinition,
    InDoubt,
    OnCrash,
    Retry,
    UsageLimits,
)
from aidb_ray.agents.ending import Ending
from aidb_ray.agents.parking import Waiting
from aidb_ray.agents.recorder import SilenceLimit
from aidb_ray.agents.rows import GenerationRow, decode_generation, encode_row, now_ms, now_text
from aidb_ray.agents.run import GenerationRun
from aidb_ray.agents.session import SessionState
from aidb_ray.chunks import ChunkCollection, ChunkFlusher
from aidb_ray.contracts import MAX_KEY_LENGTH, ToolCall
from aidb_ray.database import Database, Session, current_database
from aidb_ray.effects.waiters import waiters_of
from aidb_ray.errors import (
    AidbError,
    ConfigError,
    ConflictError,
    ContractError,
    FencedError,
    KeyExistsError,
    KeyMissingError,
    ModelError,
    RunCancelledError,
)
from aidb_ray.models.base import ModelMessage, TextAdapter, parse_messages
from aidb_ray.models.chat import parse_output
from aidb_ray.models.tools import Tool
from aidb_ray.store.changes import (
    Change,
    ChunkColumns,
    Claim,
    Filter,
    FoundRow,
    Held,
    Insert,
    Mutation,
    Release,
    Renew,
    Runner,
    Update,
)
from aidb_ray.store.claims import CLAIMS, claim_key, decode_claim
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Collection
from aidb_ray.store.columns import EMPTY
from aidb_ray.store.transaction import Intent

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

LEASE_MS = 10_000
_NAME = "durable_chat"
_RETRY = Retry()
# Keys of its calls are longer than the id by a round and a number.
_MAX_ID_LENGTH = MAX_KEY_LENGTH - 24


@overload
async def durable_chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    generation_id: str,
    output_schema: type[M],
    tools: Sequence[Tool] = (),
    tool_calls: Collection[ToolCall] | None = None,
    chunks: ChunkCollection | None = None,
    session: Session | str | None = None,
    system_prompts: Sequence[str] = (),
    max_iterations: int = 10,
    retry: Retry = _RETRY,
    usage_limits: UsageLimits | None = None,
    run_timeout_ms: int | None = None,
    idle_timeout_ms: int | None = 60_000,
    on_in_doubt: InDoubt = "retry",
    on_crash: OnCrash = "retry",
    lease_ms: int = LEASE_MS,
) -> M: ...
@overload
async def durable_chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    generation_id: str,
    output_schema: None = None,
    tools: Sequence[Tool] = (),
    tool_calls: Collection[ToolCall] | None = None,
    chunks: ChunkCollection | None = None,
    session: Session | str | None = None,
    system_prompts: Sequence[str] = (),
    max_iterations: int = 10,
    retry: Retry = _RETRY,
    usage_limits: UsageLimits | None = None,
    run_timeout_ms: int | None = None,
    idle_timeout_ms: int | None = 60_000,
    on_in_doubt: InDoubt = "retry",
    on_crash: OnCrash = "retry",
    lease_ms: int = LEASE_MS,
) -> str: ...
async def durable_chat(
    *,
    adapter: TextAdapter,
    messages: Iterable[ModelMessage | Mapping[str, Any]],
    generation_id: str,
    output_schema: type[BaseModel] | None = None,
    tools: Sequence[Tool] = (),
    tool_calls: Collection[ToolCall] | None = None,
    chunks: ChunkCollection | None = None,
    session: Session | str | None = None,
    system_prompts: Sequence[str] = (),
    max_iterations: int = 10,
    retry: Retry = _RETRY,
    usage_limits: UsageLimits | None = None,
    run_timeout_ms: int | None = None,
    idle_timeout_ms: int | None = 60_000,
    on_in_doubt: InDoubt = "retry",
    on_crash: OnCrash = "retry",
    lease_ms: int = LEASE_MS,
) -> str | BaseModel:
    """Let the model answer as `chat` does, with what it says and its tool calls kept as rows.

    Called again with the same `generation_id`, after a crash or by another process, it goes on:
    finished rounds and calls come from the rows, neither model nor tool is asked for them again,
    and one that has ended returns its result, or raises its error, without any call. Of those who
    call it at the same time one runs it and the others wait for the result; should that one die,
    another takes over once its lease has ended.

    Tools run here. Those without an implementation are left to an executor
    (`create_tool_execution_effect`), and those that need an approval wait for it, for as long as
    it takes. The chat follows no agent and no agent hears of it: it writes no messages.

    Cancelling the awaiting task aborts the request and leaves the chat to be gone on with. To end
    it for good, from any process, set its row in `generations` to `cancelled`.

    Args:
        adapter: The model.
        messages: What it is asked.
        generation_id: Names this chat in its session. One id stands for one question.
        output_schema: The answer is JSON that fits this model, and is returned as one.
        tools: What the model may call.
        tool_calls: `session.tool_calls` of the session in which everything is kept.
        chunks: `session.chunks` of it.
        session: The session itself, or its URL in the current database. One of the three is
            enough.
        system_prompts: Given to the model before the messages.
        max_iterations: Model rounds at most.
        retry: How errors of the provider are tried again, and how often lost processes.
        usage_limits: Bounds of the whole.
        run_timeout_ms: Bound on the whole in this process.
        idle_timeout_ms: Longest silence of the model.
        on_in_doubt: What becomes of a tool call that was running when the process died.
        on_crash: What becomes of a model round that was. See `durable_agent`.
        lease_ms: How long others wait after the process that runs it has died.

    Raises:
        ConfigError: an option or a tool cannot be; `session_required`; `one_session`: the three
            name different ones. Nothing was written.
        ContractError: `invalid_id`. Nothing was written.
        ValueError: a message is malformed. Nothing was written.
        ConflictError: `generation_differs`: the id stands for something else. Nothing was written.
        ModelError: it has failed: the provider did, or a bound was reached.
        RunCancelledError: someone set its row to `cancelled`, or deleted it.
    """
    asked = parse_messages(messages)
    database, url = _home_of(tool_calls, chunks, session)
    _check_id(generation_id)
    definition = AgentDefinition(
        name=_NAME,
        adapter=adapter,
        system_prompts=tuple(system_prompts),
        tools=tuple(tools),
        stream_url=url,
        build_messages=lambda _pending, _context: asked,
        output_schema=output_schema,
        max_iterations=max_iterations,
        retry=retry,
        usage_limits=usage_limits or UsageLimits(),
        run_timeout_ms=run_timeout_ms,
        idle_timeout_ms=idle_timeout_ms,
        on_in_doubt=on_in_doubt,
        on_crash=on_crash,
    )
    if lease_ms < 1:
        raise ConfigError(f"lease_ms is {lease_ms}; it is 1 or more.", code="invalid_bound")
    digest = _digest(asked, system_prompts)
    chat = _Chat(database, url, generation_id, definition, digest, lease_ms)
    ended = await chat.run()
    text = _result_of(ended)
    return text if output_schema is None else parse_output(text, output_schema)


class _Chat:
    """One call of `durable_chat`."""

    def __init__(
        self,
        database: Database,
        session: str,
        generation_id: str,
        definition: AgentDefinition,
        digest: str,
        lease_ms: int,
    ) -> None:
        self._database = database
        self._session = session
        self._id = generation_id
        self._definition = definition
        self._digest = digest
        self._lease_ms = lease_ms
        self._site = database.site_of(session)
        self._client: StoreClient = self._site.client
        self._place = (session, "generations", generation_id)
        self._holder = f"{_NAME}@{uuid4()}"

    async def run(self) -> GenerationRow:
        """Run the chat, or wait until others have; return its row once it has ended."""
        await self._database.connected()
        while True:
            found = await self._client.find(*self._place)
            if found is None:
                claimed = await self._begin()
            else:
                row = self._checked(found)
                if row.is_terminal:
                    return row
                claimed = await self._claim(found)
            if claimed is None:
                await self._wait_for_others()
                continue
            try:
                return await claimed.run()
            except FencedError as error:
                logger.warning("chat %r is someone else's now: %s", self._id, error)
                if await self._client.find(*self._place) is None:
                    raise _deleted() from None

    def _checked(self, found: FoundRow) -> GenerationRow:
        row = decode_generation(found.value)
        if row.agent or row.input_digest != self._digest:
            raise ConflictError(
                f"There is a generation {self._id!r} already, and it was asked something else. "
                f"Choose another generation_id.",
                code="generation_differs",
                collection="generations",
                key=self._id,
                current=msgspec.json.decode(found.value),
                revision=found.revision,
            )
        return row

    async def _begin(self) -> _ClaimedChat | None:
        """Write the row and claim it; None if someone else was faster."""
        now = now_text()
        # Its first attempt has not begun.
        row = GenerationRow(
            self._id, "", attempt=0, created_at=now, updated_at=now, input_digest=self._digest
        )
        insert = Insert(*self._place, encode_row(row))
        try:
            return await self._take([insert], base=0, is_interrupted=False)
        except KeyExistsError:
            return None

    async def _claim(self, found: FoundRow) -> _ClaimedChat | None:
        """Claim the row of a chat that was begun before; None if someone else has it."""
        key = claim_key("generations", self._id)
        record = await self._client.find(self._session, CLAIMS, key)
        is_orphan = record is not None and decode_claim(record.value).state == "orphan"
        try:
            return await self._take([], base=found.revision, is_interrupted=is_orphan)
        except ConflictError as error:
            if error.code not in ("claimed", "conflict"):
                raise
            return None

    async def _take(
        self, mutations: Sequence[Mutation], *, base: int, is_interrupted: bool
    ) -> _ClaimedChat:
        claim = Claim(*self._place, f"~{_NAME}", self._holder, self._lease_ms, base=base)
        sent = self._client.commit([*mutations, claim])
        try:
            token = await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            if sent.exception() is None:
                await self._client.commit([Release(*self._place, sent.result(), "free")])
            raise
        client = _HeldClient(self._client, Held(*self._place, token))
        shard = Shard(
            self._definition,
            self._database,
            cast("StoreClient", client),
            self._site.writes,
            ChunkFlusher(cast("StoreClient", client)),
            SilenceLimit(self._definition.idle_timeout_ms),
            # Not asked for: the claim fences.
            Runner("", 0),
        )
        lease = Renew(self._holder, self._lease_ms)
        return _ClaimedChat(shard, client, self._session, self._id, lease, is_interrupted)

    async def _wait_for_others(self) -> None:
        """Return once nobody holds the chat any more."""
        waiters = waiters_of(self._client, self._session, CLAIMS)

        async def is_there() -> bool:
            return True

        def is_free(value: bytes) -> bool:
            return decode_claim(value).state != "held"

        try:
            await waiters.until(claim_key("generations", self._id), is_free, is_there)
        except KeyMissingError:
            # The claim goes with its row.
            raise _deleted() from None


class _HeldClient:
    """The store as it is reached under a claim: once that is lost, commits are refused.

    Attributes:
        is_ending: Whether the next commit gives the claim up, as done.
    """

    def __init__(self, client: StoreClient, held: Held) -> None:
        self._client = client
        self._held = held
        self.is_ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def commit(
        self,
        mutations: Sequence[Mutation],
        *,
        chunks: ChunkColumns = EMPTY,
        runner: Runner | None = None,
        **options: Any,
    ) -> asyncio.Future[int]:
        """See `StoreClient.commit`; what fences is the claim, whoever is the runner."""
        del runner
        if self.is_ending:
            mutations = [*mutations, self.release("done")]
        return self._client.commit(mutations, chunks=chunks, held=self._held, **options)

    def release(self, state: Any) -> Release:
        """Return the mutation that gives the claim up."""
        held = self._held
        return Release(held.session, held.collection, held.key, held.token, state)


class _ClaimedChat:
    """A chat that this process has claimed."""

    def __init__(
        self,
        shard: Shard,
        client: _HeldClient,
        session: str,
        generation_id: str,
        lease: Renew,
        is_interrupted: bool,  # noqa: FBT001  The last of many that belong together.
    ) -> None:
        self._shard = shard
        self._client = client
        self._session = session
        self._id = generation_id
        self._lease = lease
        self._is_interrupted = is_interrupted
        self._run: _ChatRun | None = None
        # Set when a call is answered or decided elsewhere, or the chat cancelled.
        self._changed = asyncio.Event()
        self._heard_of = 0

    async def run(self) -> GenerationRow:
        """Run to the end, and return the row as it is then.

        Raises:
            FencedError: the claim was lost.
        """
        try:
            async with self._renewing(), self._listening():
                while True:
                    ended = await self._go_on()
                    if ended is not None:
                        return ended
        except FencedError:
            raise
        except BaseException:
            await self._give_up()
            raise

    async def _go_on(self) -> GenerationRow | None:
        """Run from where the rows say it stands, up to the end or until others have done a part."""
        state = SessionState("")
        row = await self._read(state)
        if row.is_terminal:
            # Someone else has ended it; what belongs to it is still to be ended.
            state.put_generation(msgspec.structs.replace(row, status="running"))
        assignment = Assignment(
            self._session,
            state,
            [self._id],
            generation=state.generations[self._id],
            is_interrupted=self._is_interrupted,
        )
        run = self._run = _ChatRun(self._shard, self._client, assignment)
        if row.is_terminal:
            run.cancel(row.error or row.status)
        self._is_interrupted = False
        try:
            outcome = await run.run()
        finally:
            self._run = None
        if outcome == "ended":
            return run.generation
        if isinstance(outcome, Waiting):
            await self._until_changed(state.revision, outcome.until_ms)
        return None

    async def _read(self, state: SessionState) -> GenerationRow:
        """Take in the rows of the chat, and return its own."""
        mine = Filter("tool_calls", self._session, where=(("generationId", (self._id,)),))
        # The calls first: those that are written later are of rounds that the row does not have.
        revision, calls = await self._client.read(mine)
        found = await self._client.find(self._session, "generations", self._id)
        if found is None:
            raise FencedError(resource=self._id, our_epoch=0, current_epoch=0)
        state.load(revision, {"messages": [], "generations": [found], "tool_calls": calls})
        return state.generations[self._id]

    async def _until_changed(self, since: int, until_ms: int | None) -> None:
        limit = None if until_ms is None else max(until_ms - now_ms(), 0) / 1000
        try:
            async with asyncio.timeout(limit):
                while self._heard_of <= since:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            # Whether something has expired is decided by its rows.
            return

    @asynccontextmanager
    async def _listening(self) -> AsyncGenerator[None]:
        """Hear what others write to the rows of the chat."""
        feed = self._client.feed
        calls = Filter("tool_calls", self._session, where=(("generationId", (self._id,)),))
        own = Filter("generations", self._session, where=(("id", (self._id,)),))
        subscriptions = [
            feed.subscribe(calls, self._hear_calls, self._see, snapshot=False),
            feed.subscribe(own, self._hear_own, self._see, snapshot=False),
        ]
        try:
            for subscription in subscriptions:
                await asyncio.shield(subscription.started)
            yield
        finally:
            for subscription in subscriptions:
                feed.unsubscribe(subscription)

    def _see(self, _rows: Sequence[FoundRow], revision: int) -> None:
        # Changes were missed: what there is must be looked at.
        self._note(revision)

    def _hear_calls(self, changes: Sequence[Change]) -> None:
        # Our own are among them: then the rows are looked at once more.
        self._note(changes[-1].revision)

    def _hear_own(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key != self._id or change.value is None:
                continue
            row = decode_generation(change.value)
            if row.status == "cancelled":
                self._note(change.revision)
                if self._run is not None:
                    self._run.cancel(row.error or "cancelled")

    def _note(self, revision: int) -> None:
        self._heard_of = max(self._heard_of, revision)
        self._changed.set()

    @asynccontextmanager
    async def _renewing(self) -> AsyncGenerator[None]:
        """Extend the lease meanwhile; if it is lost, what runs inside is stopped."""
        task = asyncio.current_task()
        assert task is not None
        lost: list[FencedError] = []

        async def renew() -> None:
            while True:
                await asyncio.sleep(self._lease.lease_ms / 3000)
                try:
                    await self._client.commit([self._lease])
                except FencedError as error:
                    lost.append(error)
                    task.cancel()
                    return
                except AidbError as error:
                    logger.warning("the lease of a chat could not be renewed: %s", error)

        renewing = asyncio.create_task(renew())
        try:
            yield
        except asyncio.CancelledError:
            if lost and task.uncancel() == 0:
                raise lost[0] from None
            raise
        finally:
            renewing.cancel()
            await asyncio.wait([renewing])

    async def _give_up(self) -> None:
        """Let others, or a later call, go on at once."""
        try:
            await asyncio.shield(self._client.commit([self._client.release("free")]))
        except AidbError as error:
            logger.warning("a chat could not be given up, its lease will end: %s", error)


class _ChatRun(GenerationRun):
    """The run of a chat: its answer is kept in its row, and nothing is written to messages."""

    def __init__(self, shard: Shard, client: _HeldClient, assignment: Assignment) -> None:
        super().__init__(shard, assignment)
        self._ending = _ChatEnding(shard, self._session, self._state, self._commits, self._pending)
        self._ending.client = client

    @property
    def generation(self) -> GenerationRow:
        """The row as it was written last."""
        return self._commits.generation


class _ChatEnding(Ending):
    """The end of a chat, which gives its claim up."""

    client: _HeldClient

    async def write(self, end: End, cycle: Cycle, intents: Sequence[Intent]) -> None:
        """See `Ending.write`."""
        self.client.is_ending = True
        await super().write(end, cycle, intents)

    def _rows(self, end: End, cycle: Cycle) -> tuple[GenerationRow, list[Insert | Update]]:
        output = end.text if end.ending == "completed" else None
        commits = self._commits
        commits.generation = msgspec.structs.replace(commits.generation, output=output)
        return super()._rows(end, cycle)

    def _reply(self, end: End, now: str) -> None:
        del end, now


def _home_of(
    tool_calls: Collection[ToolCall] | None,
    chunks: ChunkCollection | None,
    session: Session | str | None,
) -> tuple[Database, str]:
    """Return the database and the session that the arguments name."""
    homes: list[tuple[object, str | None]] = []
    if tool_calls is not None:
        if tool_calls.name != "tool_calls" or tool_calls.row_type is not ToolCall:
            raise ConfigError(
                f"{tool_calls!r} is not the `tool_calls` of a session.", code="invalid_tool_calls"
            )
        homes.append((tool_calls.sites, tool_calls.session))
    if chunks is not None:
        homes.append((chunks.sites, chunks.session))
    if isinstance(session, Session):
        homes.append((session.database, session.url))
    elif session is not None:
        homes.append((homes[0][0] if homes else current_database(), session))
    if not homes or any(not url or url.endswith("*") for _, url in homes):
        raise ConfigError(
            "A durable chat is kept in one session: give tool_calls=, chunks= or session= of it.",
            code="session_required",
        )
    database, url = homes[0]
    if any(other != url or where is not database for where, other in homes):
        raise ConfigError(
            "tool_calls=, chunks= and session= are of different sessions.", code="one_session"
        )
    assert isinstance(database, Database)
    assert url is not None
    return database, url


def _check_id(generation_id: str) -> None:
    try:
        generation_id.encode()
    except UnicodeEncodeError:
        is_valid = False
    else:
        is_valid = 1 <= len(generation_id) <= _MAX_ID_LENGTH and "\0" not in generation_id
    if not is_valid:
        raise ContractError(
            f"A generation_id has 1 to {_MAX_ID_LENGTH} characters without NUL.",
            code="invalid_id",
            collection="generations",
            loc=("generation_id",),
        )


def _digest(messages: Sequence[ModelMessage], system_prompts: Sequence[str]) -> str:
    asked = msgspec.json.encode([messages, list(system_prompts)])
    return blake2b(asked, digest_size=16).hexdigest()


def _deleted() -> RunCancelledError:
    return RunCancelledError("The chat's rows were deleted.", reason="deleted")


def _result_of(ended: GenerationRow) -> str:
    match ended.status:
        case "completed":
            return ended.output or ""
        case "cancelled":
            reason = ended.error or ""
            raise RunCancelledError(
                f"The chat was cancelled: {reason or 'no reason given'}.", reason=reason
            )
        case _:
            raise ModelError(
                ended.error or "The chat failed.", retryable=False, code=ended.error_code
            )
