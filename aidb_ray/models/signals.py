"""`Signal`: tells running work that it should stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from aidb_ray.errors import RunCancelledError


class Signal:
    """A request to stop that fires at most once and may be raised and seen from any thread.

    Work in a thread cannot be interrupted, so it should look at `is_aborted` now and then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], object]] = []
        self._aborted = False
        self._reason = ""
        self._is_stop = False

    @property
    def is_aborted(self) -> bool:
        """Whether the work should stop."""
        return self._aborted

    @property
    def reason(self) -> str:
        """What the one who aborted said, `""` until then."""
        return self._reason

    @property
    def is_stop(self) -> bool:
        """Whether only this process stops, so that the work goes on elsewhere or later."""
        return self._is_stop

    def abort(self, reason: str = "", *, is_stop: bool = False) -> None:
        """Ask the work to stop; calls after the first change nothing."""
        with self._lock:
            if self._aborted:
                return
            self._reason = reason
            self._is_stop = is_stop
            self._aborted = True
            listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()

    def raise_if_aborted(self) -> None:
        """Raise `RunCancelledError` once the work should stop."""
        if self._aborted:
            raise RunCancelledError(
                f"The run was cancelled: {self._reason or 'no reason given'}.", reason=self._reason
            )

    def add_listener(self, listener: Callable[[], object]) -> Callable[[], None]:
        """Call `listener` once on abort, in the aborting thread, or now if that has happened.

        Returns:
            A function that takes the listener away again.
        """
        with self._lock:
            if not self._aborted:
                self._listeners.append(listener)
                return lambda: self._remove(listener)
        listener()
        return lambda: None

    async def wait(self) -> None:
        """Return once the work should stop."""
        loop = asyncio.get_running_loop()
        aborted = asyncio.Event()
        remove = self.add_listener(lambda: loop.call_soon_threadsafe(aborted.set))
        try:
            await aborted.wait()
        finally:
            remove()

    def _remove(self, listener: Callable[[], object]) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
