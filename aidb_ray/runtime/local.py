"""Actors in this event loop. No Ray."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from aidb_ray import crash_points
from aidb_ray.errors import UnavailableError
from aidb_ray.runtime.failures import log_when_late
from aidb_ray.runtime.refs import (
    CALL_TIMEOUT_MS,
    MAX_PENDING_CALLS,
    Host,
    create_detached_task,
    timed_out,
    too_many_pending,
)

A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)


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
        self._life = crash_points.Life(self._die)
        self._host = Host(actor, self._life)
        self._calls: set[asyncio.Task[Any]] = set()
        self._armed: list[crash_points.Armed] = []
        self._timeout_ms = timeout_ms
        self._max_pending_calls = max_pending_calls

    def __repr__(self) -> str:
        return f"LocalRef({self._host.actor!r})"

    def with_timeout(self, timeout_ms: int) -> LocalRef[A_co]:
        """See `ActorRef.with_timeout`."""
        other = copy.copy(self)
        other._timeout_ms = timeout_ms
        return other

    def pinned(self) -> LocalRef[A_co]:
        """See `ActorRef.pinned`. There are no names here."""
        return self

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
            raise timed_out(label, self._timeout_ms) from None
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
            log_when_late(call, label)
            raise
        except TimeoutError:
            log_when_late(call, label)
            raise timed_out(label, self._timeout_ms) from None
        return _answer(call, label)

    async def arm(self, point: str, hit: int) -> None:
        """See `ActorRef.arm`; only this actor dies, not the process."""
        self._armed.append(crash_points.arm(point, hit=hit, life=self._life))

    async def disarm(self) -> None:
        """See `ActorRef.disarm`."""
        while self._armed:
            crash_points.disarm(self._armed.pop())

    async def until_dead(self) -> None:
        """See `ActorRef.until_dead`."""
        await self._life.ended.wait()

    def kill(self) -> None:
        """End the actor as the end of its process would; calls in flight get no answer.

        What it sent to a store before may still be applied, and nothing later.
        """
        self._life.kill()

    def _die(self) -> None:
        self._host.kill()
        for call in self._calls:
            call.cancel()

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
            raise too_many_pending(label)
        call = create_detached_task(
            self._host.invoke(name, _copy_containers(args), _copy_containers(kwargs)), self._life
        )
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # Asyncio would warn of an error whose caller was cancelled meanwhile.


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
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    if kind is list:
        return [_copy_containers(item) for item in value]
    if kind is tuple:
        return tuple([_copy_containers(item) for item in value])
    if kind is set:
        return set(value)
    return value
