"""Actors in worker processes of Ray: starting them, finding them, calling them."""

# What Ray gives us (handles, refs, options) is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from aidb_ray import crash_points
from aidb_ray.errors import AidbError, ConfigError, UnavailableError
from aidb_ray.runtime.failures import Failure, explain, log_when_late, pack, unpack, words
from aidb_ray.runtime.refs import (
    CALL_TIMEOUT_MS,
    MAX_PENDING_CALLS,
    Host,
    gone,
    timed_out,
    too_many_pending,
)

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "aidb"
MAX_CONCURRENCY = 10_000

_CREATE_ATTEMPTS = 8
_FIRST_PAUSE_MS = 10
_LAST_PAUSE_MS = 500

_log = logging.getLogger(__name__)


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
        self._host = Host(cls(*args, **kwargs))

    async def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Answer one call; with a `Failure` if the method raises."""
        try:
            return await self._host.invoke(name, args, kwargs)
        except Exception as error:  # noqa: BLE001  Belongs to the caller.
            return pack(error)

    async def pid(self) -> int:
        """Return the id of this process."""
        return os.getpid()

    async def arm(self, point: str, hit: int) -> Failure | None:
        """Let this process die when it reaches a crash point for the `hit`-th time."""
        try:
            crash_points.arm(point, hit=hit)
        except ConfigError as error:
            return pack(error)
        return None

    async def disarm(self) -> None:
        """Let this process live."""
        crash_points.armed.clear()

    async def stay(self) -> None:
        """Return never, so that whoever asked hears when the process ends."""
        await asyncio.Event().wait()

    async def close(self) -> Failure | None:
        """Let the actor close down, in whatever state it is."""
        try:
            await self._host.close()
        except Exception as error:  # noqa: BLE001  Belongs to the caller.
            return pack(error)
        return None


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

    def pinned(self) -> RayRef[A_co]:
        """See `ActorRef.pinned`."""
        return _restore_ref(self._handle, None, self._namespace, self._timeout_ms)

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
            raise timed_out(label, self._timeout_ms) from None
        except Exception as error:
            raise self._explain(error, label) from error
        if type(answer) is Failure:
            raise unpack(answer, label)
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
            log_when_late(answering, label)
            raise
        except TimeoutError:
            log_when_late(answering, label)
            raise timed_out(label, self._timeout_ms) from None
        except Exception as error:
            raise self._explain(error, label) from error
        if type(answer) is Failure:
            raise unpack(answer, label)
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
                reason: AidbError = timed_out(label, timeout_ms)
            except AidbError as error:
                reason = error
            except Exception as error:  # noqa: BLE001  Whatever Ray says is explained, or raised.
                reason = self._explain(error, label)
            is_final = isinstance(reason, ConfigError) or reason.code == "actor_ended"
            if is_final or time.monotonic() + pause_ms / 1000 >= deadline:
                raise reason
            await asyncio.sleep(pause_ms / 1000)
        raise AssertionError

    async def arm(self, point: str, hit: int) -> None:
        """See `ActorRef.arm`."""
        label = f"arm of {self!r}"
        handle = self._handle or await self._look_up(label)
        try:
            failure = await _submit(handle.arm.remote, label, point, hit)
        except Exception as error:
            raise self._explain(error, label) from error
        if failure is not None:
            raise unpack(failure, label)

    async def disarm(self) -> None:
        """See `ActorRef.disarm`."""
        # One that has died has nothing to take back.
        with contextlib.suppress(AidbError):
            label = f"disarm of {self!r}"
            handle = self._handle or await self._look_up(label)
            try:
                await _submit(handle.disarm.remote, label)
            except Exception as error:
                raise self._explain(error, label) from error

    async def until_dead(self) -> None:
        """See `ActorRef.until_dead`."""
        label = f"end of {self!r}"
        handle = self._handle or await self._look_up(label)
        staying = _submit(handle.stay.remote, label)
        try:
            await staying
        except asyncio.CancelledError:
            _cancel(staying)
            raise
        except Exception as error:  # noqa: BLE001  Whatever Ray says of it, it has ended.
            _log.info("%r has ended: %s", self, self._explain(error, label))

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
            _log.info("%r did not answer while stopping: %s", self, words(error))
        finally:
            self._handle = None
            with contextlib.suppress(ValueError):  # Ray has forgotten it already.
                ray.kill(handle, no_restart=True)

    async def _look_up(self, label: str) -> Any:
        """Return the handle of the actor that has the name now."""
        if self._name is None:
            raise gone(label)
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
        return explain(error, label)


def _restore_ref(handle: Any, name: str | None, namespace: str, timeout_ms: int) -> RayRef[Any]:
    return RayRef(handle, name=name, namespace=namespace, timeout_ms=timeout_ms)


def _submit(remote: Callable[..., Any], label: str, /, *args: Any, **kwargs: Any) -> Any:
    """Hand a call to Ray, which pickles each argument by itself and spares bytes the pickling."""
    from ray.exceptions import PendingCallsLimitExceeded

    _require_ray()
    try:
        return remote(*args, **kwargs)
    except PendingCallsLimitExceeded:
        raise too_many_pending(label) from None
    except Exception as error:
        # So bare is the exception by which Ray says that the actor was in another cluster.
        if type(error) is Exception:
            raise gone(label) from error
        raise


def _cancel(pending: Any) -> None:
    import ray

    # Not recursive: what the method asks of others, it cancels by its own `ask`, and a commit that
    # it sent with `ask_shielded` must go on.
    ray.cancel(pending, recursive=False)


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
        num_gpus: GPUs reserved for it.
        resources: Custom resources reserved for it.
        runtime_env: What Ray prepares before its process starts; see Ray's manual.
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
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    runtime_env: Mapping[str, Any] = field(default_factory=dict[str, Any])
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
    if options.num_gpus:
        settings["num_gpus"] = options.num_gpus
    if options.resources:
        settings["resources"] = dict(options.resources)
    if options.env or options.runtime_env:
        named = {**options.runtime_env.get("env_vars", {}), **options.env}
        settings["runtime_env"] = {**options.runtime_env, "env_vars": named}
    try:
        return _actor_class(cls).options(**settings).remote(cls, args, kwargs)
    except ActorAlreadyExistsError:
        return None


@functools.lru_cache(maxsize=64)
def _actor_class(cls: Callable[..., Any]) -> Any:
    """Return the class that Ray runs for `cls`, named after it for Ray's logs and tools."""
    import ray

    return ray.remote(type(cls.__name__, (_RayHost,), {"__module__": __name__}))
