"""Actors and the calls between them; the only module that knows Ray.

Everything above holds an `ActorRef` and awaits `ref.ask(Actor.method, ...)`. A `RayRef` reaches an
actor in its own worker process, a `LocalRef` one in this event loop; both keep the promises of
`ActorRef`, so what runs on a cluster also runs without one.
"""

# Ray's API is untyped where this module uses it (handles, refs, options).
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import itertools
import logging
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from aidb_ray.errors import AidbError, ConfigError, UnavailableError

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "aidb"
DEFAULT_TIMEOUT_MS = 30_000
MAX_CONCURRENCY = 10_000

_CREATE_ATTEMPTS = 8
_FIRST_BACKOFF_MS = 10
_MAX_BACKOFF_MS = 500
_PING_SECONDS = 5.0

# Ray's words for a call that it did not send because the actor's process is being replaced.
_RESTARTING = "The actor is restarting"

_log = logging.getLogger(__name__)


class ActorRef(Protocol[A_co]):
    """The address of an actor: an object whose async methods run somewhere else.

    A method's arguments, answer and errors travel by value. Calls made at the same time run
    concurrently and in no promised order; the actor sees them interleave at its awaits.
    """

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Call `method` on the actor and return its answer.

        An error of the method is raised here with its class and fields, the actor's traceback as
        a note. The call runs at most once. Cancelling the caller, or running out of time, cancels
        the method as well.

        Raises:
            UnavailableError: no answer within the ref's time, or the actor's process is gone;
                `outcome` says whether the method may have run.
            ConfigError: the actor cannot be started as it was defined.
            AidbError: with code `remote_error`, for an error or answer that cannot be sent.
        """
        ...

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Call `method` as `ask` does, but let it finish once it was sent.

        A caller that is cancelled or runs out of time only stops waiting. An error that arrives
        later is logged.
        """
        ...

    def with_timeout(self, timeout_ms: int) -> ActorRef[A_co]:
        """Return the same address with another bound on each call."""
        ...

    async def stop(self) -> None:
        """End the actor for good, after its own async `stop` method if it has one.

        Bounded by the ref's time, after which the actor is ended as it is. Stopping an actor that
        is gone does nothing.
        """
        ...


class _Host(Generic[A]):
    """Runs one actor object in the current event loop: its `start`, its calls, its `stop`.

    `start` runs beside the calls from the moment the process begins, so that an actor which Ray
    restarted recovers although nobody asks it anything. If it fails, every later call fails so.
    """

    def __init__(self, actor: A) -> None:
        self.actor = actor
        self._start_error: Exception | None = None
        start = getattr(actor, "start", None)
        self._starting: asyncio.Task[None] | None = None
        if start is not None:
            loop = asyncio.get_running_loop()
            self._starting = loop.create_task(self._start(start), context=contextvars.Context())

    async def _start(self, start: Callable[[], Awaitable[None]]) -> None:
        try:
            await start()
        except Exception as error:  # noqa: BLE001  Told to every caller.
            _log.exception("%s could not start", type(self.actor).__qualname__)
            self._start_error = error

    async def invoke(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the actor's method `name` answers."""
        if self._start_error is not None:
            # Without this its traceback would grow with each caller.
            raise self._start_error.with_traceback(None)
        return await getattr(self.actor, name)(*args, **kwargs)

    async def close(self) -> None:
        """Run the actor's `stop`, then end its `start` if that still runs."""
        stop = getattr(self.actor, "stop", None)
        try:
            if stop is not None:
                await stop()
        finally:
            if self._starting is not None:
                self._starting.cancel()
                await asyncio.wait([self._starting])


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the caller: pickled, in words, and where it happened."""

    pickled: bytes
    words: str
    remote_traceback: str


class _RayHost:
    """The class that Ray runs. It never raises: Ray would rewrap or lose what it cannot pickle."""

    def __init__(self, cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Ray runs this in the actor's event loop. An exception here ends the actor for ever.
        self._host = _Host(cls(*args, **kwargs))

    async def call(self, request: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
        """Answer one call, with a `_Failure` in place of an error."""
        try:
            return await self._host.invoke(*request)
        except Exception as error:  # noqa: BLE001  Every error of a method belongs to its caller.
            return _pack(error)

    async def pid(self) -> int:
        """Return the id of this process."""
        return os.getpid()

    async def close(self) -> _Failure | None:
        """Let the actor close down."""
        try:
            await self._host.close()
        except Exception as error:  # noqa: BLE001  As in `call`.
            return _pack(error)
        return None


def _pack(error: Exception) -> _Failure:
    import ray.cloudpickle

    words = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    try:
        pickled = ray.cloudpickle.dumps(error)  # pyright: ignore[reportPrivateImportUsage]
    except Exception:  # noqa: BLE001  Whatever stops pickling, its words can still be sent.
        pickled = b""
    return _Failure(pickled, words, "".join(traceback.format_exception(error)))


def _unpack(failure: _Failure, label: str) -> Exception:
    import ray.cloudpickle

    try:
        error = ray.cloudpickle.loads(failure.pickled)
    except Exception:  # noqa: BLE001  Unpickling runs the error's own code, which may do anything.
        error = None
    if not isinstance(error, Exception):
        error = AidbError(
            f"{label} raised an error that cannot be sent between processes: {failure.words}",
            code="remote_error",
        )
    error.add_note(f"In {label}, where it ran:\n{failure.remote_traceback.rstrip()}")
    return error


class RayRef(Generic[A_co]):
    """An actor in its own Ray worker process; see `ActorRef`. Can be sent to other processes.

    A ref to a named actor travels as the name and finds the actor again where it arrives, and
    after the actor of that name was replaced.
    """

    __slots__ = ("_handle", "_name", "_namespace", "_timeout_ms")

    def __init__(
        self,
        handle: Any,
        *,
        name: str | None = None,
        namespace: str = NAMESPACE,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
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
        return RayRef(
            self._handle, name=self._name, namespace=self._namespace, timeout_ms=timeout_ms
        )

    async def ask(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask`."""
        label = method.__qualname__
        handle = self._handle or await self._look_up(label)
        pending = self._send(handle, label, (method.__name__, args, kwargs))
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
        answering = self._send(handle, label, (method.__name__, args, kwargs)).as_future()
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                answer = await asyncio.shield(answering)
        except asyncio.CancelledError:
            answering.add_done_callback(_late_logger(label))
            raise
        except TimeoutError:
            answering.add_done_callback(_late_logger(label))
            raise _timed_out(label, self._timeout_ms) from None
        except Exception as error:
            raise self._explain(error, label) from error
        if type(answer) is _Failure:
            raise _unpack(answer, label)
        return answer

    async def wait_alive(self, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> int:
        """Return the actor's process id as soon as it answers.

        Asks again with growing pauses while the actor is being started, restarted or replaced.

        Raises:
            UnavailableError: it did not answer within `timeout_ms`, or it ended for good.
            ConfigError: the actor cannot be started as it was defined.
        """
        deadline = time.monotonic() + timeout_ms / 1000
        for pause_ms in _backoff():
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(min(left, _PING_SECONDS)):
                    handle = self._handle or await self._look_up("wait_alive")
                    return await handle.pid.remote()
            except TimeoutError:
                reason: AidbError = _timed_out("wait_alive", timeout_ms)
            except UnavailableError as error:
                reason = error
            except Exception as error:
                reason = self._explain(error, "wait_alive")
                ended = self._name is None and _is_dead(error)
                if ended or not isinstance(reason, UnavailableError):
                    raise reason from error
            if time.monotonic() + pause_ms / 1000 >= deadline:
                raise reason
            await asyncio.sleep(pause_ms / 1000)
        raise AssertionError

    async def stop(self) -> None:
        """See `ActorRef.stop`."""
        import ray

        try:
            handle = self._handle or await self._look_up("stop")
        except UnavailableError:
            return
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                failure = await handle.close.remote()
        except TimeoutError:
            _log.warning("%r did not stop within %d ms; ending it", self, self._timeout_ms)
        except Exception as error:  # noqa: BLE001  However it fails, the actor is ended below.
            if _is_dead(error):
                return
            _log.warning("%r could not stop by itself; ending it: %s", self, error)
        else:
            if failure is not None:
                _log.error("%r failed to stop: %s", self, failure.remote_traceback)
        with contextlib.suppress(ValueError):
            ray.kill(handle, no_restart=True)

    def _send(self, handle: Any, label: str, request: tuple[Any, ...]) -> Any:
        from ray.exceptions import PendingCallsLimitExceeded

        try:
            return handle.call.remote(request)
        except PendingCallsLimitExceeded:
            raise _too_many_pending(label) from None

    async def _look_up(self, label: str) -> Any:
        """Find the named actor again, off this event loop since Ray asks its head node."""
        assert self._name is not None, "an unnamed ref always has its handle"
        self._handle = await asyncio.to_thread(_get_handle, self._name, self._namespace)
        if self._handle is None:
            raise UnavailableError(
                f"{label} was not called: there is no actor named {self._name!r} in namespace "
                f"{self._namespace!r}. Start it, or connect to the cluster that has it.",
                outcome="not_applied",
            )
        return self._handle

    def _explain(self, error: Exception, label: str) -> AidbError:
        """Say what an error of Ray means to the caller of `label`."""
        if self._name is not None and _is_dead(error):
            self._handle = None  # An actor of that name may have been started since.
        return _explain(error, label)


def _restore_ref(handle: Any, name: str | None, namespace: str, timeout_ms: int) -> RayRef[Any]:
    return RayRef(handle, name=name, namespace=namespace, timeout_ms=timeout_ms)


def _cancel(pending: Any) -> None:
    import ray

    # Not recursive: what the method itself asked for is cancelled by its own `ask`, and a commit
    # it sent with `ask_shielded` must go on.
    ray.cancel(pending, recursive=False)


def _late_logger(label: str) -> Callable[[asyncio.Future[Any]], None]:
    def log(answering: asyncio.Future[Any]) -> None:
        if answering.cancelled():
            return
        error = answering.exception()
        answer = None if error is not None else answering.result()
        if error is not None:
            _log.error("%s failed after its caller had left: %s", label, error)
        elif type(answer) is _Failure:
            _log.error("%s failed after its caller had left: %s", label, answer.remote_traceback)

    return log


def _timed_out(label: str, timeout_ms: int) -> UnavailableError:
    return UnavailableError(
        f"No answer from {label} within {timeout_ms} ms. It may have run: read back before "
        f"trying again.",
        outcome="unknown",
        code="timed_out",
    )


def _too_many_pending(label: str) -> UnavailableError:
    return UnavailableError(
        f"{label} was not called: too many calls are waiting for their answers. Try again later.",
        outcome="not_applied",
    )


def _is_dead(error: Exception) -> bool:
    from ray.exceptions import ActorDiedError

    return isinstance(error, ActorDiedError)


def _explain(error: Exception, label: str) -> AidbError:
    from ray import exceptions

    match error:
        case exceptions.RayActorError(actor_init_failed=True):
            return ConfigError(f"{label} was not called: the actor cannot be started. {error}")
        case exceptions.ActorUnschedulableError() | exceptions.RuntimeEnvSetupError():
            return ConfigError(f"{label} was not called: the actor cannot be placed. {error}")
        case exceptions.ActorUnavailableError() if _RESTARTING in str(error):
            return UnavailableError(
                f"{label} was not called: the actor is being restarted. Try again later.",
                outcome="not_applied",
            )
        case exceptions.RayActorError():
            return UnavailableError(
                f"The process of {label} went away before it answered. It may have run: read "
                f"back before trying again. {error}",
                outcome="unknown",
            )
        case exceptions.TaskCancelledError():
            return UnavailableError(
                f"Someone else cancelled {label}. It may have run in part: read back before "
                f"trying again.",
                outcome="unknown",
                code="call_cancelled",
            )
        case exceptions.RayTaskError():
            # The methods' own errors come back as values, so this is an argument that could not
            # be unpickled there or an answer that could not be pickled.
            return AidbError(
                f"An argument or the answer of {label} cannot be sent between processes: {error}",
                code="remote_error",
            )
        case _:
            return UnavailableError(
                f"{label} got no answer: {error}. Read back before trying again.",
                outcome="unknown",
            )


def _backoff() -> Iterator[int]:
    pause_ms = _FIRST_BACKOFF_MS
    while True:
        yield pause_ms
        pause_ms = min(2 * pause_ms, _MAX_BACKOFF_MS)


def _get_handle(name: str, namespace: str) -> Any | None:
    import ray

    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """How and where Ray runs an actor.

    Attributes:
        name: Name by which other processes find the actor; one process runs under a name.
        detached: Whether the actor outlives the process that spawned it. Needs a name.
        namespace: Where the name is looked up.
        max_restarts: How often a process that died is replaced; -1 is without limit. The new
            process has the constructor's arguments and no other memory.
        max_concurrency: Calls that run at once; more wait in Ray's queue.
        max_pending_calls: Unanswered calls of one ref, beyond which `ask` refuses at once.
        num_cpus: CPUs reserved for it. 0 lets any number share a node.
        node_id: The only node it may run on, also when it is restarted.
        env: Environment variables of its process. Costs a process start, since the processes
            that Ray holds ready do not have them.
        timeout_ms: Bound on each call of the ref.
    """

    name: str | None = None
    detached: bool = False
    namespace: str = NAMESPACE
    max_restarts: int = -1
    max_concurrency: int = MAX_CONCURRENCY
    max_pending_calls: int = 2 * MAX_CONCURRENCY
    num_cpus: float = 0
    node_id: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_ms: int = DEFAULT_TIMEOUT_MS

    def __post_init__(self) -> None:
        if self.detached and self.name is None:
            raise ConfigError("A detached actor needs a name, or nobody could find or end it.")


async def spawn(
    cls: Callable[P, A], options: ActorOptions, /, *args: P.args, **kwargs: P.kwargs
) -> RayRef[A]:
    """Start `cls(*args, **kwargs)` in a process of its own and return its address.

    Returns before the actor runs; calls wait for it. If an actor of that name is there already,
    returns its address and starts nothing: whether it is the one that was meant, and was started
    with these arguments, is for the caller to ask it.

    The constructor must only store its arguments: when it raises, the actor is gone for ever. If
    the class has an async method `start`, it runs beside the calls from the beginning of each
    process, so after a restart too; if it raises, that error answers every later call. An async
    method `stop` runs when the ref's `stop` is called. Neither runs when the process is killed.

    Raises:
        UnavailableError: the name kept appearing and vanishing; nothing was started.
    """
    for pause_ms in itertools.islice(_backoff(), _CREATE_ATTEMPTS):
        if options.name is not None:
            handle = await asyncio.to_thread(_get_handle, options.name, options.namespace)
            if handle is not None:
                return _ref(handle, options)
        handle = await asyncio.to_thread(_create, cls, options, args, kwargs)
        if handle is not None:
            return _ref(handle, options)
        await asyncio.sleep(pause_ms / 1000)
    raise UnavailableError(
        f"The actor {options.name!r} can be neither found nor created in namespace "
        f"{options.namespace!r}. Others seem to start and end it all the time; try again later.",
        outcome="not_applied",
    )


async def find(
    cls: type[A],
    name: str,
    *,
    namespace: str = NAMESPACE,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> RayRef[A] | None:
    """Return the address of the actor of that name, or None if there is none.

    `cls` says what the caller expects; whether the actor is one is for the caller to ask it.
    """
    handle = await asyncio.to_thread(_get_handle, name, namespace)
    if handle is None:
        return None
    return RayRef[A](handle, name=name, namespace=namespace, timeout_ms=timeout_ms)


def _ref(handle: Any, options: ActorOptions) -> RayRef[Any]:
    return RayRef(
        handle, name=options.name, namespace=options.namespace, timeout_ms=options.timeout_ms
    )


def _create(
    cls: Callable[..., Any],
    options: ActorOptions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any | None:
    """Return a handle of the new actor, or None if its name is taken."""
    from ray.exceptions import ActorAlreadyExistsError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    settings: dict[str, Any] = {
        "num_cpus": options.num_cpus,
        "max_restarts": options.max_restarts,
        # A call that may have run is never repeated by Ray: only its sender knows how.
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
    """Return the class that Ray runs for `cls`, under its name so that Ray's tools show it."""
    import ray

    return ray.remote(type(cls.__name__, (_RayHost,), {"__module__": __name__}))


class LocalRef(Generic[A_co]):
    """An actor in this event loop; see `ActorRef`. It cannot be sent to another process.

    Lists, dicts and sets are copied on their way in and out, so that neither side sees the
    other's later changes; other objects are shared and must not be changed.
    """

    def __init__(
        self,
        actor: A_co,
        *,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
        max_pending_calls: int = 2 * MAX_CONCURRENCY,
    ) -> None:
        self._site = _LocalSite(_Host(actor), max_pending_calls)
        self._timeout_ms = timeout_ms

    def __repr__(self) -> str:
        return f"LocalRef({self._site.host.actor!r})"

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
        call = self._site.begin(label, method.__name__, args, kwargs)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await asyncio.wait([call])
        except TimeoutError:
            raise _timed_out(label, self._timeout_ms) from None
        finally:
            if call.cancel():
                await asyncio.wait([call])
        return self._site.answer(call, label)

    async def ask_shielded(
        self,
        method: Callable[Concatenate[A_co, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """See `ActorRef.ask_shielded`."""
        label = method.__qualname__
        call = self._site.begin(label, method.__name__, args, kwargs)
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await asyncio.wait([call])
        except TimeoutError:
            call.add_done_callback(_late_logger(label))
            raise _timed_out(label, self._timeout_ms) from None
        except asyncio.CancelledError:
            call.add_done_callback(_late_logger(label))
            raise
        return self._site.answer(call, label)

    async def stop(self) -> None:
        """See `ActorRef.stop`."""
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                await self._site.close()
        except TimeoutError:
            _log.warning("%r did not stop within %d ms", self, self._timeout_ms)


class _LocalSite:
    """What all refs to one local actor share: the actor, its calls in flight, whether it ended."""

    def __init__(self, host: _Host[Any], max_pending_calls: int) -> None:
        self.host = host
        self._max_pending_calls = max_pending_calls
        self._calls: set[asyncio.Task[Any]] = set()
        self._is_stopped = False

    def begin(
        self, label: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> asyncio.Task[Any]:
        """Start one call. It does not see the context variables of its caller."""
        if self._is_stopped:
            raise UnavailableError(
                f"{label} was not called: the actor was stopped.", outcome="not_applied"
            )
        if len(self._calls) >= self._max_pending_calls:
            raise _too_many_pending(label)
        invoking = self.host.invoke(name, _detach(args), _detach(kwargs))
        call = asyncio.get_running_loop().create_task(invoking, context=contextvars.Context())
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def answer(self, call: asyncio.Task[Any], label: str) -> Any:
        """Return or raise what a finished call came to."""
        if call.cancelled():
            raise UnavailableError(
                f"The actor was stopped before {label} answered. It may have run in part: read "
                f"back before trying again.",
                outcome="unknown",
            )
        error = call.exception()
        if error is not None:
            raise error
        return _detach(call.result())

    async def close(self) -> None:
        """Refuse further calls, cancel those in flight and let the actor close down."""
        if self._is_stopped:
            return
        self._is_stopped = True
        try:
            await self.host.close()
        finally:
            for call in self._calls:
                call.cancel()
            if self._calls:
                await asyncio.wait(self._calls)


def _detach(value: Any) -> Any:
    """Copy the containers of `value`, whose contents could be changed by either side."""
    match value:
        case list():
            return [_detach(item) for item in value]
        case dict():
            return {key: _detach(item) for key, item in value.items()}
        case tuple() if type(value) is tuple:
            return tuple(_detach(item) for item in value)
        case set():
            return set(value)
        case _:
            return value


@dataclass(frozen=True, slots=True)
class Cluster:
    """The Ray cluster that this process is part of.

    Attributes:
        owned: Whether the cluster was started here and ends with this process.
        node_id: The node that this process runs on.
    """

    owned: bool
    node_id: str
    namespace: str


async def connect_cluster(
    address: str | None = None, *, namespace: str = NAMESPACE, num_cpus: int | None = None
) -> Cluster:
    """Join a Ray cluster, or start one here."""
    import ray
    from ray.job_config import JobConfig

    settings: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "job_config": JobConfig(_py_driver_sys_path=_own_import_paths()),
    }
    owned = False
    if not ray.is_initialized():
        if address is None and not os.environ.get("RAY_ADDRESS"):
            owned = True
            settings |= {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
        elif address is not None:
            settings["address"] = address
        ray.init(logging_level=logging.WARNING, **settings)
    return Cluster(owned, ray.get_runtime_context().get_node_id(), namespace)


def _own_import_paths() -> list[str]:
    """Return where this process imports from besides its interpreter's own directories.

    Ray tells its workers of the script's and the current directory only.
    """
    installed = (sys.prefix, sys.base_prefix)
    return [path for path in sys.path if path and not path.startswith(installed)]
