"""One claimed row: told at work, run, and its end written together with the end of the claim."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from aidb_ray import crash_points
from aidb_ray.effects.definition import EffectDefinition
from aidb_ray.effects.outcomes import is_ended
from aidb_ray.effects.record import WorkRecord
from aidb_ray.effects.statuses import StatusWrites
from aidb_ray.effects.threads import ThreadEnd
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
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import ToolContext
from aidb_ray.store.changes import (
    Claim,
    Held,
    Mutation,
    Release,
    StoredRow,
    Update,
)
from aidb_ray.store.collection import Collection, Group, current_group
from aidb_ray.store.transaction import MAX_REMAKES, Intent, Patch, make_mutations

if TYPE_CHECKING:
    from aidb_ray.database import Database
    from aidb_ray.store.client import StoreClient

logger = logging.getLogger(__name__)

Stop = Literal["", "closed", "ended", "fenced"]
"""Why a work is stopped: its executor closes, its row was ended elsewhere, its claim is lost."""


@dataclass(frozen=True, slots=True)
class ClaimedRow:
    """A row under a claim of ours.

    Attributes:
        token: Of the claim.
        attempt: How often the row has been claimed, this time included.
        row: As we know it, which is what our writes are made on.
        note: The status that we gave it.
        is_in_doubt: Whether an earlier attempt was lost in the middle.
    """

    session: str
    collection: str
    key: str
    token: int
    attempt: int
    row: StoredRow
    note: str
    is_in_doubt: bool

    @property
    def held(self) -> Held:
        """What a commit under the claim carries."""
        return Held(self.session, self.collection, self.key, self.token)

    def release(self, state: Literal["done", "free", "orphan"] = "done") -> Release:
        """Return the mutation that ends the claim."""
        return Release(self.session, self.collection, self.key, self.token, state)


class RowWork:
    """Works on one claimed row to its end.

    What the callbacks write to the row's session is made under the claim: together with the end
    of the claim, for `on_complete` and `on_error`. Whoever loses the claim writes nothing more.
    """

    def __init__(
        self,
        database: Database,
        definition: EffectDefinition,
        claimed: ClaimedRow,
        *,
        matches: Callable[[], bool],
        heartbeat: Callable[[], None],
    ) -> None:
        self._database = database
        self._definition = definition
        self._claimed = claimed
        self._matches = matches
        self._heartbeat = heartbeat
        self._client: StoreClient = database.site_of(claimed.session).client
        self._collection = rows_of(database, definition, claimed.session)
        self._writes = StatusWrites(self._collection, definition.statuses)
        self._task: asyncio.Task[None] | None = None
        self._stop: Stop = ""
        self._is_over = False
        self._is_released = False
        self.thread = ThreadEnd(asyncio.get_running_loop())
        self.signal = Signal()

    @property
    def revision(self) -> int:
        """Revision of the row as it was written here last, or as it was claimed."""
        return self._claimed.row.revision

    @property
    def row(self) -> Any:
        """The row, as its type."""
        return self._collection.decode_row(self._claimed.row.value, self._claimed.key)

    def field(self, name: str) -> object:
        """Return a field of the row by wire name."""
        return self._fields_in(self._claimed.row.value).get(name)

    async def run(self) -> bool:
        """Work on the row; True if its end was written, False if it is no longer ours to write.

        Cancelling stops the work where it is; the row is left for the next one to take over.

        Raises:
            UnavailableError, StorageError: the store cannot be reached; the claim stands until
                its lease ends.
        """
        self._task = asyncio.current_task()
        try:
            return await self._tell_executing() and await self._run_handler()
        except FencedError as error:
            return self._let_go(error)
        except asyncio.CancelledError:
            if self._stop in ("", "closed"):
                await self._write_release("orphan")
                raise
            assert self._task is not None
            self._task.uncancel()
            if self._stop == "ended":
                await self._write_release("done")
            return False
        finally:
            self._is_over = True
            self._task = None

    async def fail(self, error: ToolError) -> bool:
        """End the row with an error, without running it. See `run`."""
        try:
            return await self._tell_executing() and await self._finish(None, error)
        except FencedError as fenced:
            return self._let_go(fenced)

    async def complete(self, result: Any) -> bool:
        """End the row with a result that an earlier attempt has brought about. See `run`."""
        try:
            return await self._tell_executing() and await self._finish(result, None)
        except FencedError as fenced:
            return self._let_go(fenced)

    def _let_go(self, error: FencedError) -> bool:
        logger.warning("another executor has the row, or it is gone: %s", error)
        self.signal.abort("the claim was lost")
        return False

    def stop(self, why: Stop, reason: str) -> None:
        """Have the work end: its signal fires and what it awaits is cancelled."""
        if self._stop or self._is_over:
            return
        self._stop = why
        self.signal.abort(reason)
        if self._task is not None:
            self._task.cancel()

    def context(self, earlier_tries: int = 0) -> ToolContext:
        """Return what the work is told of its call; after so many tries under this claim."""
        from aidb_ray.database import Session

        claimed = self._claimed
        where = {"session": claimed.session, "key": claimed.key, "attempt": claimed.attempt}
        key = idempotency_key(claimed.session, claimed.collection, claimed.key)
        return ToolContext(
            signal=self.signal,
            idempotency_key=key,
            attempt=claimed.attempt + earlier_tries,
            session=Session(self._database, claimed.session) if claimed.session else None,
            log=logging.LoggerAdapter(logging.getLogger("aidb_ray.tool"), where),
            on_heartbeat=self._heartbeat,
            generation_id=str(self.field("generationId") or ""),
            record=WorkRecord(
                self._client,
                claimed.session,
                key,
                self._write_fenced,
                agent=self._definition.name,
                is_first=claimed.attempt + earlier_tries == 1,
            ),
            watch=self.thread,
        )

    # Running.

    async def _run_handler(self) -> bool:
        definition = self._definition
        self.thread.on_late = self._take_late
        result, failure = None, None
        limit = definition.timeout_ms
        bound = asyncio.timeout(None if limit is None else limit / 1000)
        try:
            async with bound:
                result = await self._try_again()
        except asyncio.CancelledError:
            self.thread.is_given_up = True
            raise
        except FencedError:
            raise
        except Exception as error:  # A door: what users' functions raise is the row's failure.
            if isinstance(error, UnavailableError | StorageError):
                raise
            if bound.expired():
                self.signal.abort("timeout")
                self.thread.is_given_up = True
                error = ToolError(f"It took over {limit} ms and was stopped.", code="timeout")
            elif not isinstance(error, ToolError):
                logger.warning("the work for %r raised", self._claimed.key, exc_info=True)
            failure = error_of(error)
        if crash_points.armed:
            await crash_points.reach("effect.ran")
        return await self._finish(result, failure)

    async def _try_again(self) -> Any:
        """Run the handler, and again if it raised something that may pass."""
        definition = self._definition
        row, retry = self.row, definition.retry

        def pause_s(state: RetryCallState) -> float:
            return retry.pause_ms(state.attempt_number, jitter=random.random()) / 1000  # noqa: S311

        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(retry.max_attempts),
            wait=pause_s,
            retry=retry_if_exception(_may_pass),
            reraise=True,
        ):
            with attempt:
                tries = attempt.retry_state.attempt_number - 1
                return await definition.handler(row, self.context(tries))
        raise AssertionError

    # Writing.

    async def _tell_executing(self) -> bool:
        """Write what `on_executing` says; False if the row was ended meanwhile."""
        callback = self._definition.on_executing
        if callback is None:
            # The claim came with it.
            return True
        intents = await self._collect(callback, ())
        if not intents:
            return True
        for _ in range(MAX_REMAKES + 1):
            try:
                made = await self._make(intents)
                revision = await self._write([*made, self._note(self._value_in(made))])
            except ConflictError as error:
                if not await self._is_still_ours(error):
                    await self._write([self._claimed.release()])
                    return False
            else:
                self._know(made, revision)
                return True
        raise ToolError("The row changes all the time.", code="conflict")

    async def _finish(self, result: Any, failure: ToolError | None) -> bool:
        """Write the end of the row and of the claim in one commit; False if it comes too late."""
        try:
            if self._definition.on_complete is None and failure is None:
                intents = self._default(self._writes.completed(result))
            else:
                intents = await self._ask_callback(result, failure)
            return await self._write_end(intents, result)
        except RowError as error:
            if isinstance(error, KeyMissingError):
                raise FencedError(
                    resource=self._claimed.key, our_epoch=self._claimed.token, current_epoch=0
                ) from error
            logger.warning("the end of %r cannot be stored: %s", self._claimed.key, error)
            words = f"The result cannot be stored: {error}"
            failed = self._writes.failed(ToolError(words, code=error.code))
            return await self._write_end(self._default(failed), None)

    async def _ask_callback(self, result: Any, failure: ToolError | None) -> Sequence[Intent]:
        definition = self._definition
        try:
            if failure is None:
                assert definition.on_complete is not None
                return await self._collect(definition.on_complete, (result,))
            if definition.on_error is None:
                return self._default(self._writes.failed(failure))
            return await self._collect(definition.on_error, (failure,))
        except Exception as error:  # A door: a mistake in the user's callback.
            if isinstance(error, UnavailableError | StorageError | FencedError):
                raise
            logger.exception("a callback of effect %r failed", definition.name)
            return self._default(self._writes.failed(error_of(error, code="callback_failed")))

    async def _write_end(self, intents: Sequence[Intent], result: Any) -> bool:
        release = self._claimed.release()
        for _ in range(MAX_REMAKES + 1):
            try:
                made = await self._make(intents)
                revision = await self._write([*made, release])
            except ConflictError as error:
                if not await self._is_still_ours(error):
                    break
            else:
                self._know(made, revision)
                return True
        else:
            logger.error("row %r changes all the time; its result is dropped", self._claimed.key)
        await self._write([release])
        self._take_late(result, None)
        return False

    async def _is_still_ours(self, error: ConflictError) -> bool:
        """Look at a row that somebody else has written: False if they ended it."""
        claimed = self._claimed
        if (error.collection, error.key) != (claimed.collection, claimed.key):
            # Another row that the callback changes; it is made again on that.
            return True
        found = await self._client.find(claimed.session, claimed.collection, claimed.key)
        if found is None:
            raise FencedError(resource=claimed.key, our_epoch=claimed.token, current_epoch=0)
        self._claimed = replace(claimed, row=StoredRow(found.revision, found.value))
        is_complete = self._definition.is_complete
        row = None if is_complete is None else self._collection.decode_row(found.value, found.key)
        return not is_ended(
            status=self._fields_in(found.value).get("status"),
            note=claimed.note,
            matches=self._matches(),
            is_complete=None if is_complete is None else is_complete(row),
        )

    async def _collect(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> list[Intent]:
        """Call one of the user's callbacks and return what it writes to the row's session."""
        claimed = self._claimed
        shown = {(claimed.collection, claimed.key): claimed.row.value}
        group = Group(claimed.session, takes_all=False, shown=dict(shown))
        token = current_group.set(group)
        try:
            result = callback(*fitting_args(callback, (self.row, *args, self.context())))
            # A lambda may return the write it made, which is durable only with the commit.
            if inspect.iscoroutine(result):
                await result
        finally:
            current_group.reset(token)
            group.is_open = False
        return group.intents

    def _default(self, changes: dict[str, Any]) -> Sequence[Intent]:
        patch = self._collection.patch_of(self._claimed.key, changes)
        follow_up = self._definition.follow_up
        if follow_up is None:
            return [patch]
        after = {**self._fields_in(self._claimed.row.value), **(patch.fields or {})}
        return [patch, *follow_up(self._claimed.session, after)]

    async def _make(self, intents: Sequence[Intent]) -> list[Mutation]:
        return await make_mutations(self._client, self._claimed.session, intents, self._known)

    def _known(self, intent: Patch) -> StoredRow | None:
        claimed = self._claimed
        is_row = (intent.collection, intent.key) == (claimed.collection, claimed.key)
        return claimed.row if is_row else None

    def _note(self, value: bytes) -> Claim:
        """Return the mutation that leaves the row's status for whoever takes over."""
        claimed, definition = self._claimed, self._definition
        place = (claimed.session, claimed.collection, claimed.key)
        status = str(self._fields_in(value).get("status"))
        return Claim(*place, definition.name, "", definition.lease_ms, note=status)

    def _fields_in(self, value: bytes) -> dict[str, Any]:
        return self._collection.fields_in(value, self._claimed.key)

    def _know(self, made: Sequence[Mutation], revision: int) -> None:
        value = self._value_in(made)
        if value is not self._claimed.row.value:
            note = str(self._fields_in(value).get("status"))
            self._claimed = replace(self._claimed, row=StoredRow(revision, value), note=note)

    def _value_in(self, made: Sequence[Mutation]) -> bytes:
        """Return the row as mutations leave it."""
        claimed = self._claimed
        value = claimed.row.value
        for mutation in made:
            if isinstance(mutation, Update) and mutation.collection == claimed.collection:
                value = mutation.value if mutation.key == claimed.key else value
        return value

    async def _write(self, mutations: Sequence[Mutation]) -> int:
        # Whoever is cancelled still waits: a commit that is on its way is not taken back.
        sent = self._client.commit(mutations, held=self._claimed.held)
        try:
            return await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            raise
        finally:
            if sent.done() and sent.exception() is None:
                ends = (isinstance(each, Release) for each in mutations)
                self._is_released = self._is_released or any(ends)

    async def _write_fenced(self, mutations: Sequence[Mutation]) -> int:
        return await self._write(mutations)

    async def _write_release(self, state: Literal["done", "orphan"]) -> None:
        if self._is_released:
            return
        try:
            await self._write([self._claimed.release(state)])
        except AidbError as error:
            logger.warning("a claim could not be released, its lease will end: %s", error)

    # Late.

    def _take_late(self, result: Any, error: ToolError | None) -> None:
        """Mark or drop what came after the row had ended."""
        claimed = self._claimed
        changes = None if error is not None else self._writes.late(result)
        if self._definition.late_results == "discard" or changes is None:
            logger.info("a late result of %r is dropped", claimed.key)
            return
        self._collection.update(claimed.key, changes)


def idempotency_key(session: str, collection: str, key: str) -> str:
    """Return what names the work for a row, the same in every attempt and in every process."""
    return f"{session}/{collection}/{key}"


def rows_of(database: Database, definition: EffectDefinition, session: str) -> Collection[Any]:
    """Return the collection of an effect's rows in one session."""
    source = definition.source
    return database.collection(
        source.name,
        source.row_type,
        key=source.key,
        session=session or None,
        version=source.version,
        migrate=source.migrate,
    )


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


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, ToolError):
        return error.code == "tool_error"
    return isinstance(error, Exception) and not isinstance(error, AidbError)
