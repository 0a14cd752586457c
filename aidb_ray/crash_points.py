"""Named points at which a process can be made to die, so that tests can look at what is left.

A point is named after what has just happened. Nothing happens there unless a test has armed it,
see `aidb_ray.testing.crash_at`; until then it costs a look at an empty dict.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType

from aidb_ray.errors import ConfigError, UnavailableError

CRASH_POINTS: Mapping[str, str] = MappingProxyType(
    {
        "store.planned": "A store has worked out what to write; nothing of it is on the disk.",
        "store.logged": "What a store was asked to write is durable; nobody was told, nobody sees.",
        "agent.claimed": "An agent's process has its sessions; it has not looked for messages.",
        "generation.begun": "A generation's row was sent to the store; its model was not asked.",
        "round.heard": "A model has finished a round; what it came to is not recorded.",
        "calls.written": "The calls of a round are rows; no tool has run.",
        "tool.ran": "A tool has run; its result is not recorded.",
        "tool.recorded": "A tool's result is durable; nothing has followed from it.",
        "generation.ending": "The last round is done, and `on_response` has run; the end and the "
        "reply are not recorded.",
        "generation.ended": "The end of a generation and the reply are durable.",
        "effect.claimed": "An executor has claimed a row; its function has not run.",
        "effect.ran": "An executor's function has run; its result is not recorded.",
        "effect.recorded": "The end of an executor's row is durable, and the claim was given up.",
        "step.ran": "The function of a `ctx.step` has run; its result is not recorded.",
        "step.recorded": "The result of a `ctx.step` is durable; the caller does not have it yet.",
    }
)


class Life:
    """What dies together where a process has more to do than that: one actor in an event loop.

    Code that runs in a life that has ended, such as a `finally` of the user's, writes nothing.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self.ended = asyncio.Event()

    def kill(self) -> None:
        """End it as the end of a process would: nothing is finished, told or written."""
        if not self.ended.is_set():
            dead.add(self)
            self.ended.set()
            self._end()


class Armed:
    """A point at which something is to die.

    Attributes:
        died: Set when it has.
    """

    def __init__(self, point: str, hits: int, life: Life | None) -> None:
        self.point = point
        self.died = asyncio.Event()
        self._hits = hits
        self._life = life

    def is_hit(self, life: Life | None) -> bool:
        """Count one more arrival at the point; True if it is the one."""
        if self._life not in (None, life):
            return False
        self._hits -= 1
        return self._hits == 0


current_life: ContextVar[Life | None] = ContextVar("aidb_life", default=None)
# Of the whole process, for a test arms from outside what runs anywhere in it.
armed: dict[str, list[Armed]] = {}
dead: set[Life] = set()


def arm(point: str, *, hit: int = 1, life: Life | None = None) -> Armed:
    """Let whatever reaches the point for the `hit`-th time die there, or only that life.

    Raises:
        ConfigError: `unknown_crash_point`.
    """
    if point not in CRASH_POINTS:
        raise ConfigError(
            f"There is no crash point {point!r}; there are: {', '.join(CRASH_POINTS)}.",
            code="unknown_crash_point",
        )
    if hit < 1:
        raise ConfigError(f"hit is {hit}; it counts from 1.", code="invalid_bound")
    added = Armed(point, hit, life)
    armed.setdefault(point, []).append(added)
    return added


def disarm(gone: Armed) -> None:
    """Take back an `arm`, if that has not been hit."""
    waiting = armed.get(gone.point, [])
    if gone in waiting:
        waiting.remove(gone)
        if not waiting:
            del armed[gone.point]


async def reach(point: str) -> None:
    """Die here if that was armed; call it only `if armed`, which is all it costs otherwise."""
    assert point in CRASH_POINTS, point
    life = current_life.get()
    for each in [one for one in armed.get(point, ()) if one.is_hit(life)]:
        disarm(each)
        each.died.set()
        if life is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            life.kill()
        # What is killed goes no further; its tasks are cancelled by then.
        await asyncio.Event().wait()


def check_alive() -> None:
    """Raise if what runs here has been killed; call it only `if dead`."""
    if current_life.get() in dead:
        raise UnavailableError(
            "What runs here was killed at a crash point, so it writes no more.",
            outcome="not_applied",
            code="killed",
        )
