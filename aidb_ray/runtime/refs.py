"""What every address of an actor promises, and what hosts the actor in its process. No Ray."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from aidb_ray.crash_points import Life, current_life
from aidb_ray.errors import UnavailableError

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

CALL_TIMEOUT_MS = 30_000
MAX_PENDING_CALLS = 20_000

_log = logging.getLogger(__name__)


class ActorRef(Protocol[A_co]):
    """The address of an actor: an object whose async methods run somewhere else.

    Arguments, answers and errors travel by value. Calls made at the same time run concurrently,
    in no promised order, and interleave at the awaits of the methods. A call does not see the
    context variables of its caller.
    """

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Call `method` on the actor and return its answer.

        The method runs at most once. An error that it raises is raised here with its class and
        fields; the traceback of another process is in its notes. When the caller is cancelled or
        the ref's time is up, the method is cancelled too.

        Raises:
            UnavailableError: no answer within the ref's time, or the actor's process is gone;
                `outcome` says whether the method may have run.
            ConfigError: the actor cannot be started as it was defined, or this process has left
                the actor's cluster.
            AidbError: with code `remote_error`, for what cannot be sent between processes.
        """
        ...

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Call `method` as `ask` does, but never cancel it.

        When the caller is cancelled or the ref's time is up, the caller only stops waiting. An
        error that arrives later is logged.
        """
        ...

    def with_timeout(self, timeout_ms: int) -> ActorRef[A_co]:
        """Return the same address with another bound on each call."""
        ...

    def pinned(self) -> ActorRef[A_co]:
        """Return the address of the actor that is reached now, not of one that takes its name.

        What is asked of it once that actor has ended is refused with `actor_ended`.
        """
        ...

    async def arm(self, point: str, hit: int) -> None:
        """Let the actor's process die when it reaches a crash point for the `hit`-th time.

        It does so once: a process that replaces it is not armed.

        Raises:
            ConfigError: `unknown_crash_point`.
        """
        ...

    async def disarm(self) -> None:
        """Take back what `arm` asked for, if it has not happened."""
        ...

    async def until_dead(self) -> None:
        """Return once the process that the actor has now has ended, however that came."""
        ...

    async def stop(self) -> None:
        """End the actor for good, after its own `stop` if it has one.

        Takes at most the ref's time; then the actor is ended as it is. Calls in flight end with
        `UnavailableError`. Stopping an actor that is gone does nothing.
        """
        ...


class Host(Generic[A]):
    """Runs one actor in the current event loop: its `start`, its calls, its `stop`."""

    def __init__(self, actor: A, life: Life | None = None) -> None:
        self.actor = actor
        self._is_closed = False
        self._is_killed = False
        self._starting: asyncio.Task[None] | None = None
        start = getattr(actor, "start", None)
        if start is not None:
            self._starting = create_detached_task(self._start(start), life)

    async def _start(self, start: Callable[[], Awaitable[object]]) -> None:
        try:
            await start()
        except Exception:  # noqa: BLE001  Logged; calls are answered all the same.
            _log.exception("%s could not start", type(self.actor).__qualname__)

    async def invoke(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the actor's method `name` answers."""
        if self._is_closed:
            raise gone(f"{type(self.actor).__qualname__}.{name}")
        return await getattr(self.actor, name)(*args, **kwargs)

    async def close(self) -> None:
        """Refuse further calls, run the actor's `stop`, then end its `start` if that still runs."""
        if self._is_killed:
            return
        self._is_closed = True
        stop = getattr(self.actor, "stop", None)
        try:
            if stop is not None:
                await stop()
        finally:
            if self._starting is not None:
                self._starting.cancel()
                await asyncio.wait([self._starting])

    def kill(self) -> None:
        """Refuse further calls, and end what runs where it is, as the end of a process would.

        An actor that has tasks or files of its own lets go of them in a plain method `die`.
        """
        self._is_closed = self._is_killed = True
        if self._starting is not None:
            self._starting.cancel()
        die = getattr(self.actor, "die", None)
        if die is not None:
            die()


def create_detached_task(work: Coroutine[Any, Any, R], life: Life | None = None) -> asyncio.Task[R]:
    """Start `work` without the context variables of whoever happens to start it, in a life."""
    context = contextvars.Context()
    if life is not None:
        context.run(current_life.set, life)
    return asyncio.get_running_loop().create_task(work, context=context)


def timed_out(label: str, timeout_ms: int) -> UnavailableError:
    """Return the error of a call that was not answered in time."""
    return UnavailableError(
        f"{label} gave no answer within {timeout_ms} ms. It may have run: read back before "
        f"trying again.",
        outcome="unknown",
        code="timed_out",
    )


def too_many_pending(label: str) -> UnavailableError:
    """Return the error of a call that was refused because too many others wait."""
    return UnavailableError(
        f"{label} was not called: too many calls wait for their answers. Try again later.",
        outcome="not_applied",
        code="overloaded",
    )


def gone(label: str) -> UnavailableError:
    """Return the error of a call to an actor that has ended for good."""
    return UnavailableError(
        f"{label} was not called: the actor has ended.", outcome="not_applied", code="actor_ended"
    )
