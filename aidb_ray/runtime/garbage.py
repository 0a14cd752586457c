"""Closing what garbage held open, in the event loop that it belongs to."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol


class Closes(Protocol):
    """What can be closed, more than once."""

    def close(self) -> None:
        """Close it."""
        ...


def close_with(owner: object, held: Iterable[Closes]) -> weakref.finalize[..., Any]:
    """Close all that is `held` by then, soon after `owner` is garbage, in this event loop.

    What is held must not refer to its owner.
    """
    closing = weakref.finalize(owner, _close_in, asyncio.get_running_loop(), held)
    closing.atexit = False
    return closing


def _close_in(loop: asyncio.AbstractEventLoop, held: Iterable[Closes]) -> None:
    # Garbage is collected anywhere: in another thread, or amid the work of what is held.
    with suppress(RuntimeError):  # The loop was closed, and all in it has ended.
        loop.call_soon_threadsafe(_close_all, held)


def _close_all(held: Iterable[Closes]) -> None:
    for each in held:
        each.close()
