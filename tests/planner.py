"""Tables and plans without a store around them: one client that sends one batch after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aidb_ray.store.changes import (
    Batch,
    Commit,
    Committed,
    Held,
    Mutation,
    Refusal,
    Runner,
    encode,
)
from aidb_ray.store.claims import MAX_TICK_MS
from aidb_ray.store.plan import Plan
from aidb_ray.store.retention import Victim
from aidb_ray.store.tables import LogColumns, Tables

PLACE = (0, 0)


class Engine:
    """Tables with one client, that takes one batch after the other."""

    def __init__(self) -> None:
        self.tables = Tables()
        self.logged: list[LogColumns] = []
        self.client_id = self.register()
        self.seq = 1

    def register(self, supersedes: int = 0) -> int:
        plan = Plan(self.tables, 1)
        client_id, self.superseded_last = plan.add_client(supersedes)
        self._apply(plan)
        return client_id

    def commit(self, *commits: Commit, chunks: Any = None) -> Committed:
        batch = Batch(self.client_id, self.seq, list(commits), chunks)
        answer = self.send(batch)
        assert isinstance(answer, Committed)
        self.seq += len(commits)
        return answer

    def send(self, batch: Batch) -> Committed | Refusal:
        plan = Plan(self.tables, 1)
        answer = plan.add_batch(batch, encode(batch))
        self.last_plan = plan
        self._apply(plan)
        return answer

    def one(
        self, *mutations: Mutation, runner: Runner | None = None, held: Held | None = None
    ) -> Refusal | None:
        answer = self.commit(Commit(mutations, runner, held))
        return answer.refused[0][1] if answer.refused else None

    def tick(self, elapsed_ms: int) -> None:
        """Let lease time pass, and end the leases that are over."""
        while elapsed_ms > 0:
            self.tables.leases.tick(min(elapsed_ms, MAX_TICK_MS))
            elapsed_ms -= MAX_TICK_MS
            plan = Plan(self.tables, 1)
            plan.end_leases()
            self._apply(plan)

    def expire(self, victims: Sequence[Victim]) -> int:
        plan = Plan(self.tables, 1)
        removed = plan.expire(victims)
        self._apply(plan)
        return removed

    def restart(self) -> None:
        """Replay all that was logged into new tables."""
        tables = Tables()
        for columns in self.logged:
            for _ in tables.replay(columns, PLACE, None):
                pass
        tables.revision = self.tables.revision
        self.tables = tables

    def _apply(self, plan: Plan) -> None:
        if not plan.is_empty:
            self.logged.append(plan.log)
            self.tables.apply(plan, PLACE)
