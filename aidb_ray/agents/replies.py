"""Waiting for replies in the process that asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import msgspec

from aidb_ray.chunks import ChunkCollection, follow_slices, slice_to_chunks
from aidb_ray.contracts import AgentMessage, Generation, GenerationStatus
from aidb_ray.errors import (
    AidbError,
    KeyExistsError,
    KeyMissingError,
    ModelError,
    RunCancelledError,
    UnavailableError,
)
from aidb_ray.store.changes import Change, Filter, FoundRow
from aidb_ray.store.rows import codec_of
from aidb_ray.store.transaction import Transaction

if TYPE_CHECKING:
    from ag_ui.core import Event

    from aidb_ray.agents.agent import Agent
    from aidb_ray.database import Partition

_ENDS = tuple(status.value for status in GenerationStatus if status.is_terminal)
T = TypeVar("T")

LOOK_AGAIN_MS = 30_000
_MAX_REPLIES = 10_000


class _Ended(msgspec.Struct, rename="camel"):
    """The fields of a generation that tell whom it answered."""

    id: str
    status: str
    message_ids: list[str]
    error: str | None = None
    error_code: str | None = None


_decode_ended = msgspec.json.Decoder(_Ended).decode
_message_codec = codec_of(AgentMessage, "id")
_generation_codec = codec_of(Generation, "id")


class Replies:
    """The replies of one agent that this process waits for, in one partition.

    It follows ends of generations and the agent's own messages; both are of one commit.
    """

    def __init__(self, partition: Partition, agent: str, url: str) -> None:
        self._client = partition.client
        self._writes = partition.writes
        self._waiting: dict[tuple[str, str], asyncio.Future[AgentMessage]] = {}
        self._unclaimed: dict[tuple[str, str], bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.started = -1
        sessions = Filter("generations", url)
        if url.endswith("*"):
            sessions = Filter("generations", prefix=url[:-1])
        ends = msgspec.structs.replace(sessions, where=(("agent", (agent,)), ("status", _ENDS)))
        said = msgspec.structs.replace(
            sessions, collection="messages", where=(("actorId", (agent,)),)
        )
        self._agent = agent
        subscribe = self._client.feed.subscribe
        self._subscriptions = [
            subscribe(said, self._hear_messages, self._start_anew, snapshot=False),
            subscribe(ends, self._hear_ends, None, snapshot=False),
        ]

    async def ready(self) -> None:
        """Wait until ends of generations are heard."""
        started = [await asyncio.shield(each.started) for each in self._subscriptions]
        self.started = max(self.started, *started)

    def close(self) -> None:
        """Hear no more; whoever waits gets `UnavailableError`."""
        for subscription in self._subscriptions:
            self._client.feed.unsubscribe(subscription)
        for task in self._tasks:
            task.cancel()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(
                    UnavailableError("The connection was closed.", outcome="unknown")
                )
                waiting.exception()

    def expect(self, session: str, message_id: str) -> asyncio.Future[AgentMessage]:
        """Return a future of the reply to a message."""
        place = (session, message_id)
        waiting = self._waiting.get(place)
        if waiting is None:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting[place] = waiting
            waiting.add_done_callback(lambda _: self._waiting.pop(place, None))
        return waiting

    async def look_up(self, session: str, message_id: str) -> bool:
        """Settle the future of a message that may have been answered before it was awaited.

        Raises:
            KeyMissingError: there is no such message.
        """
        found = await self._client.find(session, "messages", message_id)
        if found is None:
            raise KeyMissingError(
                f"There is no message {message_id!r} in {session}.",
                collection="messages",
                key=message_id,
            )
        message = _message_codec.decode(found.value)
        if not message.processed or message.generation_id is None:
            return False
        ended = await self._client.find(session, "generations", message.generation_id)
        if ended is None:
            return False
        reply = await self._client.find(session, "messages", f"{message.generation_id}:reply")
        generation = _decode_ended(ended.value)
        waiting = self._waiting.get((session, message_id))
        if waiting is not None and not waiting.done():
            _settle(waiting, generation, None if reply is None else reply.value)
        return True

    def _hear_messages(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is not None and change.is_new and change.key.endswith(":reply"):
                self._unclaimed[change.session, change.key] = change.value
                if len(self._unclaimed) > _MAX_REPLIES:
                    self._unclaimed.pop(next(iter(self._unclaimed)))

    def _hear_ends(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.value is None:
                continue
            ended = _decode_ended(change.value)
            if ended.status not in _ENDS:
                continue
            reply = self._unclaimed.pop((change.session, f"{ended.id}:reply"), None)
            for message_id in ended.message_ids:
                waiting = self._waiting.get((change.session, message_id))
                if waiting is None or waiting.done():
                    continue
                if reply is None and ended.status == "completed":
                    # The reply is of the same commit, but the ends may be told first.
                    self._look_up_later(change.session, message_id)
                else:
                    _settle(waiting, ended, reply)

    def _start_anew(self, _rows: Sequence[FoundRow], revision: int) -> None:
        # Ends were missed: whoever waits must look into the store. A message that is still on its
        # way is not there yet; `reply` looks, once it is, if its revision is an earlier one.
        self.started = max(self.started, revision)
        for session, message_id in list(self._waiting):
            if not self._writes.is_outstanding((session, "messages", message_id)):
                self._look_up_later(session, message_id)

    def _look_up_later(self, session: str, message_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._look_up_or_fail(session, message_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_up_or_fail(self, session: str, message_id: str) -> None:
        try:
            await self.look_up(session, message_id)
        except AidbError as error:
            waiting = self._waiting.get((session, message_id))
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
                waiting.exception()


def _settle(waiting: asyncio.Future[AgentMessage], ended: _Ended, reply: bytes | None) -> None:
    match ended.status:
        case "completed" if reply is not None:
            waiting.set_result(_message_codec.decode(reply))
            return
        case "completed":
            error: AidbError = ModelError(
                f"Generation {ended.id} has ended without a reply.", retryable=False
            )
        case "cancelled":
            reason = ended.error or ""
            words = f"The run was cancelled: {reason or 'no reason given'}."
            error = RunCancelledError(words, reason=reason)
        case _:
            error = ModelError(
                ended.error or "The generation failed.", retryable=False, code=ended.error_code
            )
    waiting.set_exception(error)
    # Nobody need await a reply; then its failure is no news either.
    waiting.exception()


class ReplyHandle:
    """A message that was sent: await its `reply`, or iterate over the events of the answer."""

    def __init__(
        self,
        agent: Agent,
        replies: Replies,
        session: str,
        message_id: str,
        sent: Transaction | None,
        starting: asyncio.Task[None] | None = None,
    ) -> None:
        self.session = session
        self.message_id = message_id
        self.sent = sent
        # Kept, for with its last handle an agent's replies are heard no more.
        self._agent = agent
        self._replies = replies
        self._starting = starting
        self._expected = replies.expect(session, message_id)

    async def reply(self, *, timeout_ms: int | None = None) -> AgentMessage:
        """Return the agent's reply to this message, once it is durable.

        Raises:
            ModelError: the generation that answers it has failed.
            RunCancelledError: it was cancelled.
            TimeoutError: there was no reply within `timeout_ms`; it may still come.
            ConflictError: `message_differs`: there is another message with this `message_id`.
            KeyMissingError: the message was deleted; that is noticed within half a minute.
            UnavailableError: the message could not be written.
            AidbError: there is no reply yet, and the agent could not be started.
        """
        async with nullcontext() if timeout_ms is None else asyncio.timeout(timeout_ms / 1000):
            await self._be_sure()
            return await self._while_asked(self._expected)

    async def _while_asked(self, awaited: asyncio.Future[T]) -> T:
        """Wait for a future, unless the message that it depends on is deleted meanwhile.

        Nobody tells of that, so the store is asked now and then; it also finds what was missed.

        Raises:
            KeyMissingError: the message is gone.
        """
        while not awaited.done():
            await asyncio.wait([awaited], timeout=LOOK_AGAIN_MS / 1000)
            if not awaited.done():
                await self._replies.look_up(self.session, self.message_id)
        return awaited.result()

    async def _be_sure(self) -> None:
        """Make sure that the message is there and that its answer is heard or found."""
        replies = self._replies
        was_there = self.sent is None
        if self.sent is not None:
            try:
                await self.sent
            except KeyExistsError:
                # Sent before, perhaps by a process that died: its answer may be there already.
                was_there = True
        if replies.started < 0:
            await replies.ready()
        heard_late = self.sent is not None and self.sent.revision <= replies.started
        if (was_there or heard_late) and not self._expected.done():
            await replies.look_up(self.session, self.message_id)
        if self._starting is not None and not self._expected.done():
            # Nobody would ever answer if it fails.
            await asyncio.shield(self._starting)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the AG-UI events of the answer while it is written, those of every attempt."""
        from aidb_ray.models.events import EventDecoder

        await self._be_sure()
        generation_id = await self._generation_id()
        chunks = ChunkCollection(self._agent.database, self.session)
        decode = EventDecoder().decode
        async for part in follow_slices(chunks, generation_id):
            for chunk in slice_to_chunks(part):
                yield decode(chunk.type, chunk.content)

    async def _generation_id(self) -> str:
        found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def look(value: bytes | None) -> None:
            if value is not None and not found.done():
                generation = _decode_ended(value)
                if self.message_id in generation.message_ids:
                    found.set_result(generation.id)

        def hear(changes: Sequence[Change]) -> None:
            for change in changes:
                look(change.value)

        def see(rows: Sequence[FoundRow], _revision: int) -> None:
            for row in rows:
                look(row.value)

        feed = self._agent.database.site_of(self.session).client.feed
        subscription = feed.subscribe(Filter("generations", self.session), hear, see)
        try:
            return await self._while_asked(found)
        finally:
            feed.unsubscribe(subscription)
