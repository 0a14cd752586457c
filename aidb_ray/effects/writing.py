"""What is written of a claimed row: that it is worked on, its end, and the end of the claim."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from aidb_ray.effects.claimed import ClaimedRow
from aidb_ray.effects.definition import EffectDefinition
from aidb_ray.effects.outcomes import is_ended
from aidb_ray.effects.statuses import StatusWrites
from aidb_ray.errors import (
    AidbError,
    ConflictError,
    FencedError,
    KeyMissingError,
    RowError,
    StorageError,
    ToolError,
    UnavailableError,
)
from aidb_ray.models.tools import ToolContext
from aidb_ray.store.changes import Claim, Delete, Mutation, Release, StoredRow, Update
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Collection, Group, current_group
from aidb_ray.store.transaction import MAX_REMAKES, Intent, Patch, make_mutations

logger = logging.getLogger(__name__)

CALLBACK_LIMIT_S = 60.0
"""How long a callback may take: it only says what to write."""
FEED_LIMIT_S = 10.0

NOT_OURS = (UnavailableError, StorageError, FencedError)
"""What is no mistake of the user's code, although it may be raised in it."""


class RowWriter:
    """Writes one claimed row, and what callbacks write beside it, in commits under the claim.

    Attributes:
        claimed: The row as it was written here last, or as somebody else has written it since.
    """

    def __init__(
        self,
        client: StoreClient,
        collection: Collection[Any],
        definition: EffectDefinition,
        claimed: ClaimedRow,
        *,
        matches: Callable[[], bool],
    ) -> None:
        self.claimed = claimed
        self._client = client
        self._collection = collection
        self._definition = definition
        self._matches = matches
        self._statuses = StatusWrites(collection, definition.statuses)
        self._is_released = False

    @property
    def row(self) -> Any:
        """The row, as its type."""
        return self._collection.decode_row(self.claimed.row.value, self.claimed.key)

    def field(self, name: str) -> object:
        """Return a field of the row by wire name."""
        return self._fields_in(self.claimed.row.value).get(name)

    async def write_executing(self, context: ToolContext) -> bool:
        """Write what `on_executing` says; False if the row was ended meanwhile, or now is.

        Raises:
            FencedError: the claim was lost.
        """
        callback = self._definition.on_executing
        if callback is None:
            # The claim came with it.
            return True
        try:
            return await self._write_executing(await self._collect(callback, (), context))
        except NOT_OURS:
            raise
        except Exception as error:  # A door: a mistake in the user's callback.
            if isinstance(error, KeyMissingError) and self._is_own(error):
                raise self._gone() from error
            await self._write_failed(self._failure_of(error))
            return False

    async def _write_executing(self, intents: Sequence[Intent]) -> bool:
        if not intents:
            return True
        for _ in range(MAX_REMAKES + 1):
            try:
                made = await self._make(intents)
                revision = await self.commit([*made, self._note(self._value_in(made))])
            except ConflictError as error:
                if not await self._is_still_open(error):
                    await self.commit([self.claimed.release("done")])
                    return False
            else:
                self._know(made, revision)
                return True
        raise ToolError("The row changes all the time.", code="conflict")

    async def write_end(self, result: Any, failure: ToolError | None, context: ToolContext) -> bool:
        """Write the end of the row and of the claim in one commit; False if it comes too late.

        Raises:
            FencedError: the claim was lost, or the row is gone.
            ConflictError: the row is written by others all the time.
        """
        try:
            if self._definition.on_complete is None and failure is None:
                intents = self._default(self._statuses.completed(result))
            else:
                intents = await self._ask_callback(result, failure, context)
            return await self._write_end(intents, result)
        except (RowError, ConflictError) as error:
            if self._is_own(error):
                if isinstance(error, KeyMissingError):
                    raise self._gone() from error
                if isinstance(error, ConflictError):
                    raise
            logger.warning("the end of %r cannot be stored: %s", self.claimed.key, error)
            words = f"The result cannot be stored: {error}"
            return await self._write_failed(ToolError(words, code=error.code))

    async def _write_failed(self, error: ToolError) -> bool:
        return await self._write_end(self._default(self._statuses.failed(error)), None)

    async def _ask_callback(
        self, result: Any, failure: ToolError | None, context: ToolContext
    ) -> Sequence[Intent]:
        definition = self._definition
        try:
            if failure is None:
                assert definition.on_complete is not None
                return await self._collect(definition.on_complete, (result,), context)
            if definition.on_error is None:
                return self._default(self._statuses.failed(failure))
            return await self._collect(definition.on_error, (failure,), context)
        except NOT_OURS:
            raise
        except Exception as error:  # noqa: BLE001  A door: a mistake in the user's callback.
            return self._default(self._statuses.failed(self._failure_of(error)))

    def _failure_of(self, error: Exception) -> ToolError:
        logger.error("a callback of effect %r failed", self._definition.name, exc_info=error)
        if isinstance(error, TimeoutError):
            error = RuntimeError(f"it took over {CALLBACK_LIMIT_S:.0f} s and was stopped")
        return error_of(error, code="callback_failed")

    async def _write_end(self, intents: Sequence[Intent], result: Any) -> bool:
        release = self.claimed.release("done")
        for remakes_left in range(MAX_REMAKES, -1, -1):
            try:
                made = await self._make(intents)
                # With a row goes what is kept beside it.
                is_gone = any(
                    isinstance(each, Delete) and self.claimed.is_at(each.collection, each.key)
                    for each in made
                )
                revision = await self.commit(made if is_gone else [*made, release])
            except ConflictError as error:
                if not remakes_left:
                    raise
                if not await self._is_still_open(error):
                    break
            else:
                self._know(made, revision)
                if not is_gone:
                    self._warn_if_unended()
                return True
        await self.commit([release])
        self.take_late(result, None)
        return False

    def _warn_if_unended(self) -> None:
        if self.claimed.note == str(self.field("status")) == self._definition.statuses[0]:
            logger.warning(
                "a callback of effect %r left %r as %r: nobody works on it any more",
                self._definition.name,
                self.claimed.key,
                self.claimed.note,
            )

    async def _is_still_open(self, error: ConflictError) -> bool:
        """Look at a row that somebody else has written: False if they ended it."""
        claimed = self.claimed
        if not self._is_own(error):
            if error.code != "conflict":
                raise error
            # Another row that the callback changes; it is made again on that.
            return True
        found = await self._client.find(claimed.session, claimed.collection, claimed.key)
        if found is None:
            raise self._gone()
        self.claimed = replace(claimed, row=StoredRow(found.revision, found.value))
        await self._hear_up_to(found.revision)
        return not is_ended(
            status=self.field("status"),
            note=claimed.note,
            matches=self._matches(),
            is_complete=self._ask_is_complete(),
        )

    async def _hear_up_to(self, revision: int) -> None:
        """Wait for the feed: whether the query finds a row is known only as far as it has come."""
        try:
            async with asyncio.timeout(FEED_LIMIT_S):
                await self._client.feed.reached(revision)
        except (TimeoutError, AidbError):
            logger.warning("revision %d has not been heard of", revision)
        # What is heard in this moment is taken in with the next turn of the loop.
        await asyncio.sleep(0)

    def _ask_is_complete(self) -> bool | None:
        is_complete = self._definition.is_complete
        if is_complete is None:
            return None
        try:
            return is_complete(self.row)
        except Exception:  # A door: without an answer it is as if there were no such function.
            logger.exception("`is_complete` of effect %r failed", self._definition.name)
            return None

    def _is_own(self, error: ConflictError | RowError) -> bool:
        return self.claimed.is_at(error.collection, error.key)

    def _gone(self) -> FencedError:
        return FencedError(resource=self.claimed.key, our_epoch=self.claimed.token, current_epoch=0)

    async def _collect(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: ToolContext
    ) -> list[Intent]:
        """Call one of the user's callbacks and return what it writes to the row's session."""
        claimed = self.claimed
        shown = {(claimed.collection, claimed.key): claimed.row.value}
        group = Group(claimed.session, takes_all=False, shown=dict(shown))
        token = current_group.set(group)
        try:
            result = callback(*fitting_args(callback, (self.row, *args, context)))
            # A lambda may return the write it made, which is durable only with the commit.
            if inspect.iscoroutine(result):
                async with asyncio.timeout(CALLBACK_LIMIT_S):
                    await result
        finally:
            current_group.reset(token)
            group.is_open = False
        return group.intents

    def _default(self, changes: dict[str, Any]) -> Sequence[Intent]:
        patch = self._collection.patch_of(self.claimed.key, changes)
        follow_up = self._definition.follow_up
        if follow_up is None:
            return [patch]
        after = {**self._fields_in(self.claimed.row.value), **(patch.fields or {})}
        return [patch, *follow_up(self.claimed.session, after)]

    async def _make(self, intents: Sequence[Intent]) -> list[Mutation]:
        return await make_mutations(self._client, self.claimed.session, intents, self._known)

    def _known(self, intent: Patch) -> StoredRow | None:
        claimed = self.claimed
        return claimed.row if claimed.is_at(intent.collection, intent.key) else None

    def _note(self, value: bytes) -> Claim:
        """Return the mutation that leaves the row's status for whoever takes over."""
        claimed, definition = self.claimed, self._definition
        place = (claimed.session, claimed.collection, claimed.key)
        status = str(self._fields_in(value).get("status"))
        return Claim(*place, definition.name, "", definition.lease_ms, note=status)

    def _fields_in(self, value: bytes) -> dict[str, Any]:
        return self._collection.fields_in(value, self.claimed.key)

    def _know(self, made: Sequence[Mutation], revision: int) -> None:
        value = self._value_in(made)
        if value is not self.claimed.row.value:
            note = str(self._fields_in(value).get("status"))
            self.claimed = replace(self.claimed, row=StoredRow(revision, value), note=note)

    def _value_in(self, made: Sequence[Mutation]) -> bytes:
        """Return the row as mutations leave it."""
        value = self.claimed.row.value
        for mutation in made:
            if isinstance(mutation, Update) and self.claimed.is_at(
                mutation.collection, mutation.key
            ):
                value = mutation.value
        return value

    async def commit(self, mutations: Sequence[Mutation]) -> int:
        """Make a commit under the claim; whoever is cancelled meanwhile still waits for it.

        Raises:
            FencedError: the claim was lost.
        """
        sent = self._client.commit(mutations, held=self.claimed.held)
        try:
            return await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            raise
        finally:
            if sent.done() and sent.exception() is None:
                ends = (isinstance(each, Release) for each in mutations)
                self._is_released = self._is_released or any(ends)

    async def release(self, state: Literal["done", "orphan"]) -> None:
        """End the claim, unless that was done; if it cannot be, it ends with its lease."""
        if self._is_released:
            return
        try:
            await self.commit([self.claimed.release(state)])
        except FencedError:
            # It has ended: with an end that was written without our knowing, or with its row.
            logger.info("the claim of %r has ended already", self.claimed.key)
        except AidbError as error:
            logger.warning("a claim could not be released, its lease will end: %s", error)

    def take_late(self, result: Any, error: ToolError | None) -> None:
        """Mark or drop what came after the row had ended."""
        changes = None if error is not None else self._statuses.late(result)
        if self._definition.late_results == "discard" or changes is None:
            logger.info("a late result of %r is dropped", self.claimed.key)
            return
        self._collection.update(self.claimed.key, changes)


def error_of(error: BaseException, *, code: str = "tool_error") -> ToolError:
    """Return what a row says of an exception of the user's code."""
    if isinstance(error, ToolError):
        return error
    return ToolError(f"{type(error).__name__}: {error}", code=code)


def fitting_args(callback: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments that a callback takes: its last, the context, may be left out."""
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):
        return args[:-1]
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return args
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return args[: max(sum(each.kind in positional for each in parameters), 1)]
