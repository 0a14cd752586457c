"""How the conditions of a query are met as early as they can be. Pure.

A condition on one source is asked of its rows before they are joined. Where an outer join may
leave that source out this needs care: a row that was refused early can come back as a missing
one, so the condition must not be true of a missing row, and is asked again afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aidb_ray.expressions import Node, evaluate
from aidb_ray.query.joins import (
    LEFT_STAYS,
    RIGHT_STAYS,
    JoinType,
    aliases_in,
    all_of,
    check_equality,
    equality_of,
    terms_of,
)
from aidb_ray.query.query import Query


@dataclass(frozen=True, slots=True)
class JoinPlan:
    """One join: which values of the two sides are equal, and what else their rows must meet.

    Attributes:
        earlier: Aliases of the left side, in order.
        left: Values of the left side, each equal to the one of `right` at its place.
        rest: Condition on a pair.
    """

    join_type: JoinType
    earlier: tuple[str, ...]
    alias: str
    left: tuple[Node, ...]
    right: tuple[Node, ...]
    rest: Node | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each condition of a query is met.

    Attributes:
        conditions: By alias, what rows of a source must meet before anything else.
        rest: What joined rows must meet in the end.
    """

    conditions: Mapping[str, Node]
    joins: tuple[JoinPlan, ...]
    rest: Node | None


def plan_of(query: Query[Any]) -> Plan:
    """Return where the conditions of a query are met.

    Raises:
        QueryError: a source of `from_` has no equality with those before it.
    """
    if not query.is_joined:
        alias, _source = query.sources[0]
        return Plan({} if query.predicate is None else {alias: query.predicate}, (), None)
    planner = _Planner(query)
    joins = planner.plan_joins()
    rest = planner.settle_where()
    conditions = {alias: all_of(terms) for alias, terms in planner.conditions.items()}
    return Plan(
        {alias: node for alias, node in conditions.items() if node is not None}, joins, rest
    )


class _Planner:
    def __init__(self, query: Query[Any]) -> None:
        self._query = query
        self._where = terms_of(query.predicate)
        self._missing_at_end = _missing_after(query, len(query.joins))
        self.conditions: dict[str, list[Node]] = {alias: [] for alias in query.scope}

    def plan_joins(self) -> tuple[JoinPlan, ...]:
        (first, _source), *others = self._query.sources
        earlier = [first]
        plans: list[JoinPlan] = []
        for alias, _source in others:
            plans.append(self._plan_source(tuple(earlier), alias))
            earlier.append(alias)
        for at, join in enumerate(self._query.joins):
            missing = _missing_after(self._query, at)
            plans.append(self._plan_join(tuple(earlier), join.join_type, join.alias, at, missing))
            earlier.append(join.alias)
        return tuple(plans)

    def _plan_source(self, earlier: tuple[str, ...], alias: str) -> JoinPlan:
        """Plan the join of a source of `from_`, whose equalities are in `where`."""
        equal = [term for term in self._where if self._can_be_early(term)]
        check_equality(equal, earlier, alias, "from_ of several sources: where")
        pairs: list[tuple[Node, Node]] = []
        for term in equal:
            pair = equality_of(term, earlier, alias)
            if pair is not None:
                pairs.append(pair)
                if not aliases_in(term) & self._missing_at_end:
                    self._where.remove(term)
        left, right = zip(*pairs, strict=True)
        return JoinPlan("inner", earlier, alias, left, right, None)

    def _can_be_early(self, term: Node) -> bool:
        return not aliases_in(term) & self._missing_at_end or not _is_true_of_missing(term)

    def _plan_join(
        self,
        earlier: tuple[str, ...],
        join_type: JoinType,
        alias: str,
        at: int,
        missing: frozenset[str],
    ) -> JoinPlan:
        pairs: list[tuple[Node, Node]] = []
        rest: list[Node] = []
        for term in terms_of(self._query.joins[at].on):
            pair = equality_of(term, earlier, alias)
            if pair is not None:
                pairs.append(pair)
                continue
            # Rows that stay whatever the condition says of them cannot be refused early.
            names = aliases_in(term)
            stays = join_type in (RIGHT_STAYS if alias in names else LEFT_STAYS)
            if stays or not self._settle(term, names, missing):
                rest.append(term)
        left, right = zip(*pairs, strict=True)
        return JoinPlan(join_type, earlier, alias, left, right, all_of(rest))

    def settle_where(self) -> Node | None:
        """Ask what can be asked early, and return what is left for the end."""
        missing = self._missing_at_end
        return all_of(
            [term for term in self._where if not self._settle(term, aliases_in(term), missing)]
        )

    def _settle(self, term: Node, names: frozenset[str], missing: frozenset[str]) -> bool:
        """Ask `term` of one source early if it is of one; whether it need not be asked again."""
        if len(names) != 1:
            return False
        (alias,) = names
        if alias in missing and _is_true_of_missing(term):
            return False
        self.conditions[alias].append(term)
        return alias not in missing


def _missing_after(query: Query[Any], joins: int) -> frozenset[str]:
    """Return the aliases whose row may be missing behind the first `joins` joins."""
    known = [alias for alias, _source in query.sources]
    missing: set[str] = set()
    for join in query.joins[:joins]:
        if join.join_type in RIGHT_STAYS:
            missing.update(known)
        if join.join_type in LEFT_STAYS:
            missing.add(join.alias)
        known.append(join.alias)
    return frozenset(missing)


def _is_true_of_missing(term: Node) -> bool:
    return evaluate(term, dict.fromkeys(aliases_in(term))) is True
