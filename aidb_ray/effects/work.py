"""One claimed row, from the claim to its end."""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Literal

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from aidb_ray import crash_points
from aidb_ray.effects.claimed import ClaimedRow, idempotency_key, rows_of
from aidb_ray.effects.definition import EffectDefinition, Happened
from aidb_ray.effects.outcomes import Start
from aidb_ray.effects.record import WorkRecord
from aidb_ray.effects.threads import ThreadEnd
from aidb_ray.effects.writing import NOT_OURS, RowWriter, error_of, fitting_args
from aidb_ray.errors import AidbError, FencedError, ToolError
from aidb_ray.models.signals import Signal
from aidb_ray.models.tools import ToolContext

if TYPE_CHECKING:
    from aidb_ray.database import Database

logger = logging.getLogger(__name__)

Stop = Literal["", "closed", "ended", "fenced"]
"""Why a work is stopped: its executor closes, its row was ended elsewhere, its claim is lost."""


class RowWork:
    """Works on one claimed row to its end, which is written together with the end of the claim.

    Whoever loses the claim writes nothing more. Whatever else stops the work before the end is
    written leaves the row to whoever takes over, at once.
    """

    def __init__(
        self,
        database: Database,
        definition: EffectDefinition,
        claimed: ClaimedRow,
        *,
        matches: Callable[[], bool],
        heartbeat: Callable[[], None],
        threads: Executor,
    ) -> None:
        self._database = database
        self._definition = definition
        self._heartbeat = heartbeat
        self._client = database.site_of(claimed.session).client
        self._writer = RowWriter(
            self._client,
            rows_of(database, definition, claimed.session),
            definition,
            claimed,
            matches=matches,
        )
        self._task: asyncio.Task[Any] | None = None
        self._stop: Stop = ""
        self._is_over = False
        self.token = claimed.token
        self.thread = ThreadEnd(asyncio.get_running_loop(), threads)
        self.thread.on_late = self._take_late
        self.signal = Signal()

    @property
    def revision(self) -> int:
        """Revision of the row as it was written here last, or as it was claimed."""
        return self._writer.claimed.row.revision

    async def do(self, start: Start) -> bool:
        """Do what was decided; True if the row's end was written, False if it is not ours to write.

        Cancelling stops the work where it is; the row is left for the next one to take over.

        Raises:
            AidbError: the store cannot be reached, or others write the row all the time.
        """
        self._task = asyncio.current_task()
        try:
            return await self._do(start)
        except FencedError as error:
            logger.warning("another executor has the row, or it is gone: %s", error)
            self._stop = "fenced"
            self.signal.abort("the claim was lost", is_stop=True)
            return False
        except asyncio.CancelledError:
            self._is_over = True
            self.thread.is_given_up = True
            if self._stop in ("", "closed"):
                await self._writer.release("orphan")
                raise
            if self._task is not None:
                self._task.uncancel()
            if self._stop == "ended":
                await self._writer.release("done")
            return False
        except Exception:
            self._is_over = True
            await self._writer.release("orphan")
            raise
        finally:
            self._is_over = True
            self._task = None

    def stop(self, why: Stop, reason: str) -> None:
        """Have the work end: its signal fires and what it awaits is cancelled."""
        if self._stop or self._is_over:
            return
        self._stop = why
        self.signal.abort(reason, is_stop=why != "ended")
        if self._task is not None:
            self._task.cancel()

    def context(self, earlier_tries: int = 0) -> ToolContext:
        """Return what the work is told of its call; after so many tries under this claim."""
        from aidb_ray.database import Session

        claimed = self._writer.claimed
        attempt = claimed.attempt + earlier_tries
        where = {"session": claimed.session, "key": claimed.key, "attempt": claimed.attempt}
        key = idempotency_key(claimed.session, claimed.collection, claimed.key)
        return ToolContext(
            signal=self.signal,
            idempotency_key=key,
            attempt=attempt,
            session=Session(self._database, claimed.session) if claimed.session else None,
            log=logging.LoggerAdapter(logging.getLogger("aidb_ray.tool"), where),
            on_heartbeat=self._heartbeat,
            generation_id=str(self._writer.field("generationId") or ""),
            record=WorkRecord(
                self._client,
                claimed.session,
                key,
                self._writer.commit,
                agent=self._definition.name,
                is_first=attempt == 1,
            ),
            watch=self.thread,
        )

    # Doing.

    async def _do(self, start: Start) -> bool:
        if self._stop:
            # It ended before it began.
            raise asyncio.CancelledError
        if not await self._writer.write_executing(self.context()):
            return False
        match start:
            case "reject":
                words = self._writer.field("reason") or _REJECTED
                return await self._end(None, ToolError(str(words), code="rejected"))
            case "fail_in_doubt":
                return await self._end(None, ToolError(_IN_DOUBT, code="in_doubt"))
            case "give_up":
                return await self._end(None, _crashed(self._definition.retry.max_interruptions))
            case "reconcile":
                happened, failure = await self._bounded(self._reconcile)
                if failure is not None:
                    is_own = failure.code not in ("tool_error", "timeout")
                    words = failure if is_own else ToolError(str(failure), code="in_doubt")
                    return await self._end(None, words)
                if happened is not None:
                    return await self._end(happened.result, None)
            case _:
                pass
        result, failure = await self._bounded(self._try_again)
        if crash_points.armed:
            await crash_points.reach("effect.ran")
        return await self._end(result, failure)

    async def _end(self, result: Any, failure: ToolError | None) -> bool:
        return await self._writer.write_end(result, failure, self.context())

    async def _bounded(self, run: Callable[[], Awaitable[Any]]) -> tuple[Any, ToolError | None]:
        """Run the user's code within `timeout_ms`; return its result, or why there is none."""
        limit = self._definition.timeout_ms
        bound = asyncio.timeout(None if limit is None else limit / 1000)
        try:
            async with bound:
                return await run(), None
        except NOT_OURS:
            raise
        except Exception as error:  # A door: what users' functions raise is the row's failure.
            if bound.expired():
                self.signal.abort("timeout")
                self.thread.is_given_up = True
                return None, ToolError(f"It took over {limit} ms and was stopped.", code="timeout")
            if not isinstance(error, ToolError):
                key = self._writer.claimed.key
                logger.warning("the work for %r raised", key, exc_info=True)
            return None, error_of(error)

    async def _try_again(self) -> Any:
        """Run the handler, and again if it raised something that may pass."""
        definition = self._definition
        row, retry = self._writer.row, definition.retry

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

    async def _reconcile(self) -> Happened | None:
        """Ask the user's function what became of the attempt that was lost."""
        reconcile = self._definition.on_in_doubt
        assert callable(reconcile)
        said = reconcile(*fitting_args(reconcile, (self._writer.row, self.context())))
        if inspect.isawaitable(said):
            said = await said
        if said is None or isinstance(said, Happened):
            return said
        raise ToolError(
            f"A reconcile function returns Happened(result) or None, not {said!r}.",
            code="in_doubt",
        )

    def _take_late(self, result: Any, error: ToolError | None) -> None:
        if self._stop in ("", "ended"):
            self._writer.take_late(result, error)
        else:
            # The row has not ended: whoever takes over will.
            logger.info("a late result of %r is dropped", self._writer.claimed.key)


_REJECTED = "It was decided that the call is not run."
_IN_DOUBT = "The process died while the tool ran; it may have had its effect or not."


def _crashed(times: int) -> ToolError:
    return ToolError(
        f"The executor's process ended {times} times while the tool ran. Look for what ends it.",
        code="tool_crashed",
    )


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, ToolError):
        return error.code == "tool_error"
    return isinstance(error, Exception) and not isinstance(error, AidbError)
