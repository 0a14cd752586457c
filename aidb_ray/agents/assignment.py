"""What a run is given: what all runs of its shard share, and what it shall answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.delegation import Delegate
from aidb_ray.agents.recorder import SilenceLimit
from aidb_ray.agents.rows import GenerationRow
from aidb_ray.agents.session import SessionState
from aidb_ray.agents.threads import ToolThreads
from aidb_ray.chunks import ChunkFlusher
from aidb_ray.models.tools import Tool
from aidb_ray.store.changes import Runner
from aidb_ray.store.local import LocalWrites, View

if TYPE_CHECKING:
    from aidb_ray.database import Database
    from aidb_ray.store.client import StoreClient


LEAST_THREADS = 16
"""As many calls of one round run at once."""


@dataclass(slots=True)
class Shard:
    """What all runs of one shard share.

    Attributes:
        writes: Own writes of this process, on top of `view`.
        tools: The definition's, by name.
        delegates: The agents that it may ask, by name.
        threads: Those that plain tools run in.
        view: The rows that may be in the `pending_work`, if it has one.
    """

    definition: AgentDefinition
    database: Database
    client: StoreClient
    writes: LocalWrites
    flusher: ChunkFlusher
    silence: SilenceLimit
    runner: Runner
    tools: Mapping[str, Tool] = field(init=False)
    delegates: Mapping[str, Delegate] = field(init=False)
    threads: ToolThreads = field(init=False)
    view: View | None = None
    running: int = 0

    def __post_init__(self) -> None:
        self.tools = {tool.name: tool for tool in self.definition.tools}
        self.delegates = {delegate.name: delegate for delegate in self.definition.agents}
        self.threads = ToolThreads(max(self.definition.max_running, LEAST_THREADS))


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one run shall do.

    Attributes:
        session: Where its rows are.
        state: What is known of them.
        pending: Keys of the rows to answer; none if whoever waited has gone.
        rows: Those rows, of a `pending_work`.
        generation: The one to go on with, if it was begun before.
        is_leftover: Whether the rows waited when this process began: an earlier one may have died
            of them before it could write anything.
        is_interrupted: Whether the process has ended that ran `generation`, at work on it.
    """

    session: str
    state: SessionState
    pending: Sequence[str]
    rows: Sequence[Any] = ()
    generation: GenerationRow | None = None
    is_leftover: bool = False
    is_interrupted: bool = False
