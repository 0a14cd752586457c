"""The end of a generation: one commit of its last chunks, its row and its reply."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray.agents.calls import storable
from aidb_ray.agents.cycle import Cycle, End
from aidb_ray.agents.rows import (
    GenerationRow,
    MessageRow,
    ToolCallRow,
    UsageRow,
    decode_call,
    now_text,
)
from aidb_ray.contracts import CancelRequest, ToolCallStatus, time_text
from aidb_ray.errors import (
    AidbError,
    ConflictError,
    FencedError,
    KeyMissingError,
    RowError,
    StorageError,
    UnavailableError,
)
from aidb_ray.store.changes import CHUNKS, Insert, StoredRow, Update
from aidb_ray.store.collection import Group, current_group
from aidb_ray.store.rows import codec_of
from aidb_ray.store.transaction import MAX_REMAKES, Intent, make_mutations

if TYPE_CHECKING:
    from aidb_ray.agents.assignment import Shard
    from aidb_ray.agents.commits import Commits
    from aidb_ray.agents.cycle import Ending as GenerationEnding
    from aidb_ray.agents.session import SessionState, is_of_round
    from aidb_ray.chunks import Ending as StreamEnding
    from aidb_ray.models.base import Usage

logger = logging.getLogger(__name__)

_cancel_codec = codec_of(CancelRequest, "id")

_CLOSES: Mapping[GenerationEnding, StreamEnding] = {
    "completed": "finished",
    "failed": "raised",
    "cancelled": "cancelled",
}


class Ending:
    """Writes how one generation ended."""

    def __init__(
        self,
        shard: Shard,
        session: str,
        state: SessionState,
        commits: Commits,
        pending: Sequence[str],
    ) -> None:
        self._shard = shard
        self._definition = shard.definition
        self._session = session
        self._state = state
        self._commits = commits
        self._pending = pending

    async def write(self, end: End, cycle: Cycle, intents: Sequence[Intent]) -> None:
        """Write the end, once, with what `on_response` wrote.

        An answer that cannot be stored fails the generation instead.
        """
        self._shard.flusher.close(self._commits.buffer)
        try:
            await self._commit(end, cycle, intents)
        except (RowError, ConflictError) as error:
            if end.ending != "completed" or is_of_store(error):
                raise
            words = f"The answer cannot be stored: {error}"
            await self._commit(End("failed", error=words, code=error.code), cycle, [])

    async def _commit(self, end: End, cycle: Cycle, intents: Sequence[Intent]) -> None:
        for attempt in range(MAX_REMAKES + 1):
            generation, rows = self._rows(end, cycle)
            messages = [row for row in rows if row.collection == "messages"]

            def know(
                revision: int,
                generation: GenerationRow = generation,
                messages: Sequence[Insert | Update] = messages,
            ) -> None:
                self._commits.keep(generation)
                for row in messages:
                    self._state.put_message(row.key, revision, row.value)

            try:
                made = await make_mutations(self._shard.client, self._session, intents)
                await self._commits.write(
                    [*rows, *made], know, takes_chunks=True, ending=_CLOSES[end.ending]
                )
            except (ConflictError, KeyMissingError) as error:
                # A message or a call changed or went meanwhile, or a row of `on_response`.
                if attempt == MAX_REMAKES or error.code not in ("conflict", "not_found"):
                    raise
                await self._read_again()
            else:
                return

    def _rows(self, end: End, cycle: Cycle) -> tuple[GenerationRow, list[Insert | Update]]:
        now = now_text()
        generation = msgspec.structs.replace(
            self._commits.generation,
            status=end.ending,
            attempt=cycle.attempt,
            usage=to_usage_row(cycle.usage),
            error=storable(end.error) or None if end.ending != "completed" else None,
            error_code=end.code or None,
            updated_at=now,
        )
        rows: list[Insert | Update] = []
        if end.ending != "completed":
            rows += [
                self._commits.update("tool_calls", call, self._state.call_revision(call.id))
                for call in self._cancelled_calls(now)
            ]
            rows += self._cancels(end)
        reply = self._reply(end, now)
        # Who delegated waits for a reply in any case; others hear of a failure by the generation.
        if reply is not None and (end.ending == "completed" or reply.request_id is not None):
            rows.append(self._commits.insert("messages", reply.id, reply))
        rows.append(self._commits.update("generations", generation))
        return generation, rows + self._answered()

    def _cancelled_calls(self, now: str) -> list[ToolCallRow]:
        return [
            msgspec.structs.replace(call, status=ToolCallStatus.CANCELLED.value, updated_at=now)
            for call in self._state.calls_of(self._commits.generation.id)
            if not call.is_terminal
        ]

    def _cancels(self, end: End) -> list[Insert]:
        """Return what asks other agents to stop what they do for this generation."""
        reason = f"{self._definition.name}: {end.error or end.ending}"
        inserts: list[Insert] = []
        for request, reply in self._state.requests_of(self._commits.generation.id):
            if reply is None and not request.processed:
                cancel = CancelRequest(
                    id=f"{request.id}:cancel",
                    agent=request.target_agent,
                    reason=storable(reason),
                    message_id=request.id,
                )
                key, value = _cancel_codec.encode("cancel_requests", cancel)
                inserts.append(Insert(self._session, "cancel_requests", key, value))
        return inserts

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
            fields["generationId"] = self._commits.generation.id
            value = msgspec.json.encode(fields)
            updates.append(Update(self._session, "messages", key, value, known.revision))
        return updates

    async def _read_again(self) -> None:
        """Take in the messages that are answered, and the calls, as they are now."""
        read = await self._shard.client.read_session(self._session, ("messages", "tool_calls"))
        rows = {row.key: row for row in read.rows["messages"]}
        for key in [key for key in self._pending if key not in rows]:
            self._state.put_message(key, read.revision, None)
        for row in rows.values():
            self._state.put_message(row.key, row.revision, row.value)
        mine = self._commits.generation.id
        calls = {row.key: row for row in read.rows["tool_calls"]}
        for call in self._state.calls_of(mine):
            if call.id not in calls:
                self._state.drop_call(call)
        for row in calls.values():
            call = decode_call(row.value)
            if call.generation_id == mine and is_of_round(call):
                self._state.put_call(call, row.revision)

    def _reply(self, end: End, now: str) -> MessageRow | None:
        if self._definition.pending_work is not None:
            return None
        messages = self._state.messages
        asked = [messages[key].message for key in self._pending if key in messages]
        last = max(asked, key=lambda message: message.created_at, default=None)
        if last is not None and last.created_at >= now:
            # After what it answers, whatever the clocks of those who wrote say.
            asked_at = datetime.fromisoformat(last.created_at)
            now = time_text(asked_at + timedelta(microseconds=1))
        is_failure = end.ending != "completed"
        return MessageRow(
            f"{self._commits.generation.id}:reply",
            "assistant",
            self._definition.name,
            last.actor_id if last is not None else "",
            storable(end.text or end.error or end.ending) if is_failure else end.text,
            now,
            processed=True,
            generation_id=self._commits.generation.id,
            request_id=last.request_id if last is not None else None,
            in_reply_to=last.id if last is not None else None,
            error_code=(end.code or end.ending) if is_failure else None,
        )

    # What the user's code adds.

    async def respond(self, reply: Any, rows: list[Any]) -> list[Intent] | End:
        """Call `on_response`; what it writes in this session is part of the round's end.

        Returns:
            What it writes; or, if it raised, how the generation ends, and nothing is written.
        """
        on_response = self._definition.on_response
        if on_response is None:
            return []
        group = Group(self._session, takes_all=False, shown=await self._shown_rows())
        token = current_group.set(group)
        try:
            result = on_response(reply, rows)
            # A lambda may return the write it made, which is durable only with the round's end.
            if inspect.iscoroutine(result):
                await result
        except Exception as error:
            if is_of_store(error):
                raise
            logger.exception("on_response failed", extra={"session": self._session})
            return End("failed", error=in_words(error), code=code_of(error))
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


def to_usage_row(usage: Usage) -> UsageRow | None:
    """Return what a generation has used as its row keeps it."""
    read, written = usage.input_tokens, usage.output_tokens
    return UsageRow(read, written, read + written) if read or written else None


def in_words(error: Exception) -> str:
    """Return an error of the user's code as rows keep it."""
    return f"{type(error).__name__}: {error}"


def code_of(error: Exception) -> str:
    """Return the code for what the user's functions or the adapter raised."""
    return error.code if isinstance(error, AidbError) else "agent_error"


def is_of_store(error: Exception) -> bool:
    """Whether it tells of the store and not of a mistake in the user's functions."""
    if isinstance(error, ConflictError):
        return error.collection == CHUNKS
    return isinstance(error, UnavailableError | FencedError | StorageError) or is_gone(error)


def is_gone(error: BaseException) -> bool:
    """Whether it says that what the work was for has been deleted, so that it must stop."""
    return isinstance(error, KeyMissingError) and error.code == "gone"
