"""Threads in which an agent's plain tools run: of its own, as many as may be needed at once."""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor

from aidb_ray.errors import ToolError


class ToolThreads:
    """A pool that grows as it is used and ends with whoever has it. See `ThreadWatch`."""

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, "aidb-tool")

    @property
    def threads(self) -> Executor:
        """The pool."""
        return self._pool

    def began(self) -> None:
        """Do nothing: what an agent runs is counted where it is awaited."""

    def ended(self, result: object, error: ToolError | None) -> None:
        """Do nothing: a call that was given up has its answer, and a late result is dropped."""
