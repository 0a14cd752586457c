"""Actors and the calls between them; the only module that knows Ray.

Everything above holds an `ActorRef` and awaits `ref.ask(Actor.method, ...)`. A `RayRef` reaches an
actor in its own worker process, a `LocalRef` one in this event loop. Both keep the promises of
`ActorRef`, so what runs on a cluster also runs without one.

Any class with async methods can be an actor. Its constructor must only store its arguments: when it
raises, Ray gives the actor up for ever. An async method `start`, if it has one, runs beside the
calls from the beginning of each process, also of one that replaces a killed one; its error is
logged, and what calls answer then is the actor's business. An async method `stop` runs when the
ref's `stop` is called. A killed process does not run it.
"""

# What Ray gives us (handles, refs, options) is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import itertools
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from aidb_ray.errors import AidbError, ConfigError, UnavailableError

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "aidb"
CALL_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_MS = 120_000
MAX_CONCURRENCY = 10_000
MAX_PENDING_CALLS = 20_000

_CREATE_ATTEMPTS = 8
_FIRST_PAUSE_MS = 10
_LAST_PAUSE_MS = 500
_PROBE_SECONDS = 5.0

# Ray's words for a call that it did not send because the actor's process is being replaced.
_NOT_SENT = "The actor is restarting"

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

    async def stop(self) -> None:
        """End the actor for good, after its own `stop` if it has one.

        Takes at most the ref's time; then the actor is ended as it is. Calls in flight end with
        `UnavailableError`. Stopping an actor that is gone does nothing.
        """
        ...


class _Host(Generic[A]):
    """Runs one actor in the current event loop: its `start`, its calls, its `stop`."""

    def __init__(self, actor: A) -> None:
        self.actor = actor
        self._is_closed = False
        self._starting: asyncio.Task[None] | None = None
        start = getattr(actor, "start", None)
        if start is not None:
            self._starting = _create_detached_task(self._start(start))

    async def _start(self, start: Callable[[], Awaitable[object]]) -> None:
        try:
            await start()
        except Exception:  # noqa: BLE001  Logged; calls are answered all the same.
            _log.exception("%s could not start", type(self.actor).__qualname__)

    async def invoke(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the actor's method `name` answers."""
        if self._is_closed:
            raise _gone(f"{type(self.actor).__qualname__}.{name}")
        return await getattr(self.actor, name)(*args, **kwargs)

    async def close(self) -> None:
        """Refuse further calls, run the actor's `stop`, then end its `start` if that still runs."""
        self._is_closed = True
        stop = getattr(self.actor, "stop", None)
        try:
            if stop is not None:
                await stop()
        finally:
            if self._starting is not None:
                self._starting.cancel()
                await asyncio.wait([self._starting])


class _RayHost:
    """The class that Ray runs.

    Errors of the actor are answers here: Ray would change their class, and lose those that do not
    pickle.
    """

    def __init__(self, cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An actor's rows and sessions live long and make no cycles. At Python's thresholds the
        # collector walks them over and over: 30 % of the CPU of an agent with 2,000 sessions.
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        # Ray constructs async actors in their event loop, so `start` is under way from here on.
        self._host = _Host(cls(*args, **kwargs))

    async def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Answer one call; with a `_Failure` if the method raises."""
        try:
            return await self._host.invoke(name, args, kwargs)
        except Exception as error:  # noqa: BLE001  Belongs to the caller.
            return _pack(error)

    async def pid(self) -> int:
        """Return the id of this process."""
        return os.getpid()

    async def close(self) -> _Failure | None:
        """Let the actor close down, in whatever state it is."""
        try:
            await self._host.close()
        except Exception as error:  # noqa: BLE001  Belongs to the caller.
            return _pack(error)
        return None


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the caller: pickled, in words, and where it was raised."""

    pickled: bytes
    words: str
    remote_traceback: str


def _pack(error: Exception) -> _Failure:
    import ray.cloudpickle

    try:
        pickled = ray.cloudpickle.dumps(error)  # pyright: ignore[reportPrivateImportUsage]
    except Exception:  # noqa: BLE001  Whatever forbids to pickle it, its words can be sent.
        pickled = b""
    return _Failure(pickled, _words(error), "".join(traceback.format_exception(error)).rstrip())


def _unpack(failure: _Failure, label: str) -> Exception:
    import ray.cloudpickle

    error = None
    with contextlib.suppress(Exception):  # Unpickling runs the error's own code.
        error = ray.cloudpickle.loads(failure.pickled)
    if not isinstance(error, Exception):
        error = AidbError(
            f"{label} raised an error that cannot be sent between processes: {failure.words}",
            code="remote_error",
        )
    error.add_note(f"Raised in {label} in another process:\n{failure.remote_traceback}")
    return error


def _words(error: BaseException) -> str:
    return f"{type(error).__qualname__}: {error}"


class RayRef(Generic[A_co]):
    """An actor in its own Ray worker process; see `ActorRef`. Can be sent to other processes.

    A ref to a named actor travels as its name: it finds the actor where it arrives, and finds the
    next one of that name once the actor has ended. An unnamed actor ends with the last ref to it,
    or with the process that spawned it.
    """

    __slots__ = ("_handle", "_name", "_namespace", "_timeout_ms")

    def __init__(
        self,
        handle: Any,
        *,
        name: str | None = None,
        namespace: str = NAMESPACE,
        timeout_ms: int = CALL_TIMEOUT_MS,
    ) -> None:
        self._handle = handle
        self._name = name
        self._namespace = namespace
        self._timeout_ms = timeout_ms

    def __reduce__(self) -> tuple[Any, ...]:
        handle = self._handle if self._name is None else None
        return _restore_ref, (handle, self._name, self._namespace, self._timeout_ms)

    def __repr__(self) -> str:
        return f"RayRef({self._name or self._handle!r})"

    def with_timeout(self, timeout_ms: int) -> RayRef[A_co]:
        """See `ActorRef.with_timeout`."""
        return _restore_ref(self._handle, self._name, self._namespace, timeout_ms)

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask`."""
        label = method.__qualname__
        handle = self._handle or await self._look_up(label)
        pending = _submit(handle.call.remote, label, method.__name__, *args, **kwargs)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                answer = await pending
        except asyncio.CancelledError:
            _cancel(pending)
            raise
        except TimeoutError:
            _cancel(pending)
            raise _timed_out(label, self._timeout_ms) from None
        except Exception as error:
            raise self._explain(error, label) from error
        if type(answer) is _Failure:
            raise _unpack(answer, label)
        return answer

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask_shielded`."""
        label = method.__qualname__
        handle = self._handle or await self._look_up(label)
        pending = _submit(handle.call.remote, label, method.__name__, *args, **kwargs)
        answering = asyncio.wrap_future(pending.future())
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                answer = await asyncio.shield(answering)
        except asyncio.CancelledError:
            _log_when_late(answering, label)
            raise
        except TimeoutError:
            _log_when_late(answering, label)
            raise _timed_out(label, self._timeout_ms) from None
        except Exception as error:
            raise self._explain(error, label) from error
        if type(answer) is _Failure:
            raise _unpack(answer, label)
        return answer

    async def wait_alive(self, timeout_ms: int = CALL_TIMEOUT_MS) -> int:
        """Return the id of the actor's process as soon as it answers.

        Asks again and again while the process is started, restarted or replaced.

        Raises:
            UnavailableError: it did not answer within `timeout_ms`, or it has ended for good.
            ConfigError: the actor cannot be started as it was defined.
        """
        label = f"pid of {self!r}"
        deadline = time.monotonic() + timeout_ms / 1000
        for pause_ms in _pauses_ms():
            # An attempt may be lost in the old process, or wait in one that is busy recovering:
            # the first wants a short patience and the second a long one.
            patience = min(deadline - time.monotonic(), 20 * pause_ms / 1000)
            try:
                async with asyncio.timeout(patience):
                    handle = self._handle or await self._look_up(label)
                    return await _submit(handle.pid.remote, label)
            except TimeoutError:
                reason: AidbError = _timed_out(label, timeout_ms)
            except AidbError as error:
                reason = error
            except Exception as error:  # noqa: BLE001  Whatever Ray says is explained, or raised.
                reason = self._explain(error, label)
            is_final = isinstance(reason, ConfigError) or reason.code == "actor_ended"
            if is_final or time.monotonic() + pause_ms / 1000 >= deadline:
                raise reason
            await asyncio.sleep(pause_ms / 1000)
        raise AssertionError

    async def stop(self) -> None:
        """See `ActorRef.stop`."""
        import ray

        try:
            handle = self._handle or await self._look_up("stop")
            closing = _submit(handle.close.remote, "stop")
        except AidbError:
            return
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                failure = await closing
            if failure is not None:
                _log.error("%r failed to stop by itself:\n%s", self, failure.remote_traceback)
        except TimeoutError:
            _log.warning("%r did not stop within %d ms and is ended", self, self._timeout_ms)
        except Exception as error:  # noqa: BLE001  However its end began, it ends below.
            _log.info("%r did not answer while stopping: %s", self, _words(error))
        finally:
            self._handle = None
            with contextlib.suppress(ValueError):  # Ray has forgotten it already.
                ray.kill(handle, no_restart=True)

    async def _look_up(self, label: str) -> Any:
        """Return the handle of the actor that has the name now."""
        if self._name is None:
            raise _gone(label)
        # Ray asks its head node and waits for it, so this must not run in the event loop.
        self._handle = await asyncio.to_thread(_get_handle, self._name, self._namespace)
        if self._handle is None:
            raise UnavailableError(
                f"{label} was not called: there is no actor named {self._name!r} in namespace "
                f"{self._namespace!r} of this cluster. Start it first.",
                outcome="not_applied",
            )
        return self._handle

    def _explain(self, error: Exception, label: str) -> AidbError:
        from ray.exceptions import ActorDiedError

        # "Died" is final: Ray says "unavailable" of an actor that it will restart.
        if isinstance(error, ActorDiedError) and not error.actor_init_failed:
            self._handle = None
        return _explain(error, label)


def _restore_ref(handle: Any, name: str | None, namespace: str, timeout_ms: int) -> RayRef[Any]:
    return RayRef(handle, name=name, namespace=namespace, timeout_ms=timeout_ms)


def _submit(remote: Callable[..., Any], label: str, /, *args: Any, **kwargs: Any) -> Any:
    """Hand a call to Ray, which pickles each argument by itself and spares bytes the pickling."""
    from ray.exceptions import PendingCallsLimitExceeded

    _require_ray()
    try:
        return remote(*args, **kwargs)
    except PendingCallsLimitExceeded:
        raise _too_many_pending(label) from None
    except Exception as error:
        # So bare is the exception by which Ray says that the actor was in another cluster.
        if type(error) is Exception:
            raise _gone(label) from error
        raise


def _cancel(pending: Any) -> None:
    import ray

    # Not recursive: what the method asks of others, it cancels by its own `ask`, and a commit that
    # it sent with `ask_shielded` must go on.
    ray.cancel(pending, recursive=False)


def _log_when_late(answering: asyncio.Future[Any], label: str) -> None:
    """Log the error that `answering` may end with, now that its caller has left."""

    def log(answering: asyncio.Future[Any]) -> None:
        if answering.cancelled():
            return
        error = answering.exception()
        answer = answering.result() if error is None else None
        if type(answer) is _Failure:
            _log.error("%s failed after its caller left:\n%s", label, answer.remote_traceback)
        elif error is not None:
            _log.error("%s failed after its caller left: %s", label, error, exc_info=error)

    answering.add_done_callback(log)


def _require_ray() -> None:
    """Raise if Ray is not initialised, as many of its functions would start a cluster then."""
    import ray

    if not ray.is_initialized():
        raise ConfigError("This process is in no Ray cluster: connect first.", code="not_connected")


def _get_handle(name: str, namespace: str) -> Any | None:
    import ray

    _require_ray()
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def _pauses_ms() -> Iterator[int]:
    pause_ms = _FIRST_PAUSE_MS
    while True:
        yield pause_ms
        pause_ms = min(2 * pause_ms, _LAST_PAUSE_MS)


def _explain(error: Exception, label: str) -> AidbError:
    """Say what an error of Ray means for the call; Ray's own words become a note."""
    from ray import exceptions

    # Ray colours its tracebacks for terminals.
    ray_words = re.sub(r"\x1b\[\d+m", "", str(error)).strip()
    last_line = ray_words.rsplit("\n", 1)[-1]
    match error:
        case exceptions.RayActorError(actor_init_failed=True):
            explained = ConfigError(f"{label} was not called: the constructor raised {last_line}")
        case exceptions.ActorUnschedulableError() | exceptions.RuntimeEnvSetupError():
            explained = ConfigError(f"{label} was not called: the actor has no place. {last_line}")
        case exceptions.ActorUnavailableError() if _NOT_SENT in ray_words:
            explained = UnavailableError(
                f"{label} was not called: the actor's process is being replaced. Try again soon.",
                outcome="not_applied",
            )
        case exceptions.RayActorError():
            explained = UnavailableError(
                f"{label} gave no answer: the actor's process went away. It may have run: read "
                f"back before trying again.",
                outcome="unknown",
            )
        case exceptions.TaskCancelledError():
            explained = UnavailableError(
                f"{label} gave no answer: someone else cancelled the call. It may have run in "
                f"part: read back before trying again.",
                outcome="unknown",
                code="call_cancelled",
            )
        case exceptions.RayTaskError():
            # Errors of methods come as answers. What is left to Ray is an argument that the actor
            # cannot unpickle, or an answer that it cannot pickle.
            explained = AidbError(
                f"An argument or the answer of {label} cannot be sent between processes: "
                f"{last_line}",
                code="remote_error",
            )
        case _:
            explained = UnavailableError(
                f"{label} gave no answer: {_words(error)}. It may have run: read back before "
                f"trying again.",
                outcome="unknown",
            )
    explained.add_note(f"Ray says: {ray_words}")
    return explained


def _timed_out(label: str, timeout_ms: int) -> UnavailableError:
    return UnavailableError(
        f"{label} gave no answer within {timeout_ms} ms. It may have run: read back before "
        f"trying again.",
        outcome="unknown",
        code="timed_out",
    )


def _too_many_pending(label: str) -> UnavailableError:
    return UnavailableError(
        f"{label} was not called: too many calls wait for their answers. Try again later.",
        outcome="not_applied",
        code="overloaded",
    )


def _gone(label: str) -> UnavailableError:
    return UnavailableError(
        f"{label} was not called: the actor has ended.", outcome="not_applied", code="actor_ended"
    )


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How and where Ray runs an actor.

    Attributes:
        name: Name by which other processes find it; at most one actor has it at a time.
        detached: Whether it outlives the process that spawned it. Needs a name.
        namespace: Where the name is looked up.
        max_restarts: How often a process that died is replaced; -1 is without limit. The new
            process gets the constructor's arguments and no other memory.
        max_concurrency: Calls that run at once; more wait in its process.
        max_pending_calls: Calls of one process that may wait for answers; more are refused.
        num_cpus: CPUs reserved for it. 0 lets any number share a node.
        node_id: The only node that it may run on, also after a restart.
        env: Environment variables of its process. With any, the process is started anew, as the
            ones that Ray keeps ready do not have them.
        timeout_ms: Bound on each call of the ref.
    """

    name: str | None = None
    detached: bool = False
    namespace: str = NAMESPACE
    max_restarts: int = -1
    max_concurrency: int = MAX_CONCURRENCY
    max_pending_calls: int = MAX_PENDING_CALLS
    num_cpus: float = 0
    node_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_ms: int = CALL_TIMEOUT_MS

    def __post_init__(self) -> None:
        if self.detached and self.name is None:
            raise ConfigError("A detached actor needs a name: nobody could find or end it.")


async def spawn(
    cls: Callable[P, A], options: ActorOptions, /, *args: P.args, **kwargs: P.kwargs
) -> RayRef[A]:
    """Start `cls(*args, **kwargs)` in a process of its own and return its address.

    Returns before the actor runs; calls wait for it. If there is an actor of that name already,
    its address is returned and nothing is started: whether it is the one that was meant is for the
    caller to ask it.

    Raises:
        ConfigError: this process is in no cluster.
        UnavailableError: the name was taken and free in turn, eight times; nothing was started.
    """
    for pause_ms in itertools.islice(_pauses_ms(), _CREATE_ATTEMPTS):
        # Both wait for Ray's head node, so they must not run in the event loop.
        handle = None
        if options.name is not None:
            handle = await asyncio.to_thread(_get_handle, options.name, options.namespace)
        if handle is None:
            handle = await asyncio.to_thread(_create, cls, options, args, kwargs)
        if handle is not None:
            return _restore_ref(handle, options.name, options.namespace, options.timeout_ms)
        await asyncio.sleep(pause_ms / 1000)
    raise UnavailableError(
        f"The actor {options.name!r} can be neither found nor started: others seem to start and "
        f"end it all the time. Try again later.",
        outcome="not_applied",
    )


async def find(
    cls: type[A],
    name: str,
    *,
    namespace: str = NAMESPACE,
    timeout_ms: int = CALL_TIMEOUT_MS,
) -> RayRef[A] | None:
    """Return the address of the actor of that name, None if there is none.

    `cls` says what the caller takes it for; whether it is one is for the caller to ask it.
    """
    handle = await asyncio.to_thread(_get_handle, name, namespace)
    return None if handle is None else _restore_ref(handle, name, namespace, timeout_ms)


def _create(
    cls: Callable[..., Any],
    options: ActorOptions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any | None:
    """Return a handle of the new actor, None if its name is taken."""
    from ray.exceptions import ActorAlreadyExistsError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _require_ray()
    settings: dict[str, Any] = {
        "num_cpus": options.num_cpus,
        "max_restarts": options.max_restarts,
        # Only its sender knows whether a call that may have run can be repeated.
        "max_task_retries": 0,
        "max_concurrency": options.max_concurrency,
        "max_pending_calls": options.max_pending_calls,
    }
    if options.name is not None:
        settings |= {"name": options.name, "namespace": options.namespace}
    if options.detached:
        settings["lifetime"] = "detached"
    if options.node_id is not None:
        settings["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            options.node_id, soft=False
        )
    if options.env:
        settings["runtime_env"] = {"env_vars": dict(options.env)}
    try:
        return _actor_class(cls).options(**settings).remote(cls, args, kwargs)
    except ActorAlreadyExistsError:
        return None


@functools.lru_cache(maxsize=64)
def _actor_class(cls: Callable[..., Any]) -> Any:
    """Return the class that Ray runs for `cls`, named after it for Ray's logs and tools."""
    import ray

    return ray.remote(type(cls.__name__, (_RayHost,), {"__module__": __name__}))


class LocalRef(Generic[A_co]):
    """An actor in this event loop; see `ActorRef`. Cannot be sent to another process.

    Lists, dicts and sets are copied on their way in and out, so that neither side sees what the
    other changes later. All other objects are shared: treat them as frozen. A call that is
    cancelled or out of time has ended when `ask` raises.
    """

    def __init__(
        self,
        actor: A_co,
        *,
        timeout_ms: int = CALL_TIMEOUT_MS,
        max_pending_calls: int = MAX_PENDING_CALLS,
    ) -> None:
        self._host = _Host(actor)
        self._calls: set[asyncio.Task[Any]] = set()
        self._timeout_ms = timeout_ms
        self._max_pending_calls = max_pending_calls

    def __repr__(self) -> str:
        return f"LocalRef({self._host.actor!r})"

    def with_timeout(self, timeout_ms: int) -> LocalRef[A_co]:
        """See `ActorRef.with_timeout`."""
        other = copy.copy(self)
        other._timeout_ms = timeout_ms
        return other

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask`."""
        label = method.__qualname__
        call = self._begin(label, method.__name__, args, kwargs)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await asyncio.wait([call])
        except TimeoutError:
            raise _timed_out(label, self._timeout_ms) from None
        finally:
            if call.cancel():
                await asyncio.wait([call])
        return _answer(call, label)

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask_shielded`."""
        label = method.__qualname__
        call = self._begin(label, method.__name__, args, kwargs)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await asyncio.wait([call])
        except asyncio.CancelledError:
            _log_when_late(call, label)
            raise
        except TimeoutError:
            _log_when_late(call, label)
            raise _timed_out(label, self._timeout_ms) from None
        return _answer(call, label)

    async def stop(self) -> None:
        """See `ActorRef.stop`."""
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await self._host.close()
        except TimeoutError:
            _log.warning("%r did not stop within %d ms and is ended", self, self._timeout_ms)
        except Exception:  # noqa: BLE001  However its end began, it ends below.
            _log.exception("%r failed to stop by itself", self)
        finally:
            for call in self._calls:
                call.cancel()
            if self._calls:
                await asyncio.wait(self._calls)

    def _begin(
        self, label: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Task[Any]:
        if len(self._calls) >= self._max_pending_calls:
            raise _too_many_pending(label)
        call = _create_detached_task(
            self._host.invoke(name, _copy_containers(args), _copy_containers(kwargs))
        )
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # Asyncio would warn of an error whose caller was cancelled meanwhile.


def _create_detached_task(work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
    """Start `work` without the context variables of whoever happens to start it."""
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


def _answer(call: asyncio.Task[R], label: str) -> R:
    """Return or raise what a finished local call came to."""
    if call.cancelled():
        raise UnavailableError(
            f"{label} gave no answer: the actor was stopped. It may have run in part: read back "
            f"before trying again.",
            outcome="unknown",
        )
    return _copy_containers(call.result())


def _copy_containers(value: Any) -> Any:
    """Copy the lists, dicts, tuples and sets that `value` consists of, and share the rest."""
    kind = type(value)
    if kind is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    if kind is list:
        return [_copy_containers(item) for item in value]
    if kind is tuple:
        return tuple([_copy_containers(item) for item in value])
    if kind is set:
        return set(value)
    return value


class Cluster:
    """The Ray cluster that this process is part of, until it is closed.

    Attributes:
        owned: Whether this process started the cluster. Then it ends with this process, however
            that ends, and when the last `Cluster` that this process holds is closed.
        node_id: The node that this process runs on.
    """

    def __init__(self, membership: _Membership | None, node_id: str) -> None:
        self._membership = membership
        self.owned = membership is not None and membership.owned
        self.node_id = node_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the cluster, which ends it if it was started here.

        Does nothing while others in this process hold it, or if it was not joined here. Detached
        actors of a cluster that goes on live on.
        """
        await asyncio.to_thread(self.release)

    def release(self) -> None:
        """Do as `close` does, waiting in this thread."""
        import ray

        with _ray_lock:
            membership, self._membership = self._membership, None
            if membership is None:
                return
            membership.holders -= 1
            if membership.holders == 0 and membership in _memberships:
                _memberships.remove(membership)
                ray.shutdown()
                membership.left.set()


async def connect_cluster(
    address: str | None = None,
    *,
    namespace: str = NAMESPACE,
    num_cpus: int | None = None,
    timeout_ms: int = CONNECT_TIMEOUT_MS,
) -> Cluster:
    """Join a Ray cluster, or start one on this machine, and return it.

    Args:
        address: None is the cluster that this process is in already, else the one that the
            environment variable RAY_ADDRESS names, else a new one. "auto", "host:port" and
            "ray://host:port" join a running one.
        namespace: Namespace of this process in the cluster.
        num_cpus: CPUs that a new cluster offers; None is all that this machine has.
        timeout_ms: Bound on the whole. What Ray joins or starts later, or after the caller was
            cancelled, is left or ended again.

    Raises:
        UnavailableError: there is no cluster at that address, or it does not answer in time.
        ConfigError: Ray refuses to start or join with these settings, or this process is in
            another cluster.
    """
    joining: Future[Cluster] = Future()
    joining.set_running_or_notify_cancel()
    # Linux ends the processes that Ray starts when the thread that started them ends, so that
    # thread must last as long as they. Being a daemon, it does not keep this process alive.
    threading.Thread(
        target=_join, args=(joining, address, namespace, num_cpus), name="aidb-ray", daemon=True
    ).start()
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            cluster = await asyncio.wrap_future(joining)
    except TimeoutError:
        joining.add_done_callback(_abandon)
        raise UnavailableError(
            f"Ray was not ready within {timeout_ms} ms (address {address!r}).",
            outcome="not_applied",
            code="timed_out",
        ) from None
    except asyncio.CancelledError:
        joining.add_done_callback(_abandon)
        raise
    _restore_sigterm()
    return cluster


def _restore_sigterm() -> None:
    """Let SIGTERM do only what it did before: Ray makes it print a stack trace as well."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _abandon(joining: Future[Cluster]) -> None:
    """Give up a cluster that nobody waits for any more."""
    if joining.exception() is None:
        joining.result().release()


@dataclass(slots=True)
class _Membership:
    """What keeps this process in a cluster that it joined here.

    Attributes:
        owned: Whether the cluster was started here.
        holders: Open `Cluster` objects; with the last of them the process leaves.
        left: Set when it has left.
    """

    owned: bool
    holders: int = 0
    left: threading.Event = field(default_factory=threading.Event)


# Ray is one per process, so its membership is too: at most one entry, changed under the lock.
_ray_lock = threading.Lock()
_memberships: list[_Membership] = []


def _join(
    joining: Future[Cluster], address: str | None, namespace: str, num_cpus: int | None
) -> None:
    """Answer `joining`, then stay for as long as the cluster needs this thread."""
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            # Ray reads the environment when it is imported, and never again.
            _show_token(os.environ)
        import ray

        with _ray_lock:
            membership = _enter(address, namespace, num_cpus)
            node_id = ray.get_runtime_context().get_node_id()
    except Exception as error:  # noqa: BLE001  Belongs to whoever awaits `joining`.
        joining.set_exception(error)
        return
    joining.set_result(Cluster(membership, node_id))
    if membership is not None and membership.owned:
        membership.left.wait()


def _enter(address: str | None, namespace: str, num_cpus: int | None) -> _Membership | None:
    """Make this process part of a cluster; None if someone else did that already."""
    import ray

    if ray.is_initialized():
        _check_same_cluster(address, ray.get_runtime_context().gcs_address)
        if not _memberships:
            return None
    else:
        if _memberships:  # Someone shut Ray down behind our back.
            _memberships.pop().left.set()
        address = address or os.environ.get("RAY_ADDRESS")
        _init_ray(address, namespace, num_cpus)
        _memberships.append(_Membership(owned=address is None))
    _memberships[0].holders += 1
    return _memberships[0]


def _init_ray(address: str | None, namespace: str, num_cpus: int | None) -> None:
    import ray
    from ray.job_config import JobConfig

    settings: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "job_config": JobConfig(_py_driver_sys_path=_import_paths()),
    }
    if address is None:
        _provide_token()
        # "local" never joins a cluster that happens to run on this machine.
        settings |= {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "_system_config": {
                # Without it, callers of a process that died hear of it only when Ray knows why:
                # after 1.3 to 3.5 s instead of 20 ms.
                "timeout_ms_task_wait_for_death_info": 0,
                # Ray gives way to all else on the machine (nice 15). With two busy processes
                # beside it a call took 24 ms (p50) so, and 1.6 ms like this.
                "worker_niceness": 0,
            },
        }
    else:
        settings["address"] = address
        _check_answers(address)
    try:
        ray.init(**settings)
    except ConnectionError as error:
        raise UnavailableError(
            f"There is no Ray cluster at {address!r}: {error}", outcome="not_applied"
        ) from error
    except Exception as error:
        where = "start here" if address is None else f"join {address!r}"
        raise ConfigError(f"Ray cannot {where}: {_words(error)}") from error


def _import_paths() -> list[str]:
    """Return where this process imports from, other than its interpreter's own directories.

    Ray itself tells its workers of the script's and of the current directory only.
    """
    installed = (sys.prefix, sys.base_prefix)
    return [path for path in sys.path if path and not path.startswith(installed)]


def _provide_token() -> None:
    """Make sure that the secret of clusters started here can be read by its owner only.

    Ray's own way is a file that others on this machine can read.
    """
    if any(key.startswith("RAY_AUTH_") for key in os.environ):
        return
    token = secrets.token_hex(32)
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    except OSError:  # No home to write to. Then only children of this process can join.
        os.environ["RAY_AUTH_TOKEN"] = token
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(token)


def _show_token(environment: MutableMapping[str, str]) -> None:
    """Have Ray show this user's token to the cluster it joins; one that wants none ignores it.

    `ray start` asks for a token wherever there is one, but a driver shows it only if told to.
    """
    if "RAY_AUTH_MODE" in environment:
        return
    with contextlib.suppress(OSError, RuntimeError):  # There may be no home, or none to look into.
        is_given = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
        if is_given or (Path.home() / ".ray" / "auth_token").exists():
            environment["RAY_AUTH_MODE"] = "token"


def _split_address(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def _check_answers(address: str) -> None:
    """Raise if nobody listens at `address`, where Ray would try for minutes."""
    where = _split_address(address)
    if where is None:
        return
    try:
        socket.create_connection(where, timeout=_PROBE_SECONDS).close()
    except OSError as error:
        raise UnavailableError(
            f"There is no Ray cluster at {address!r}: {error}", outcome="not_applied"
        ) from error


def _check_same_cluster(address: str | None, current: str) -> None:
    """Raise if `address` names another cluster than the one at `current`."""
    asked, here = _split_address(address or ""), _split_address(current)
    if address is None or asked is None or address.startswith("ray://") or here is None:
        return
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(asked[0])
        is_here = host == here[0] or host.startswith("127.")
        if asked[1] == here[1] and is_here:
            return
    raise ConfigError(
        f"This process is in the Ray cluster at {current!r} and cannot join {address!r} as well. "
        f"Leave the first one, or use another process."
    )
