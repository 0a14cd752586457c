"""Joins as data, and the conditions in them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from aidb_ray.errors import QueryError
from aidb_ray.expressions import Call, Node, references

JoinType: TypeAlias = Literal["left", "right", "inner", "full"]

LEFT_STAYS = frozenset({"left", "full"})
"""Joins that keep rows of what came before although they find no partner."""

RIGHT_STAYS = frozenset({"right", "full"})
"""Joins that keep rows of the source that is joined although they find no partner."""


@dataclass(frozen=True, slots=True)
class Join:
    """One more source, beside those before it.

    Attributes:
        on: What makes rows partners; at least one equality of both sides is among its terms.
    """

    join_type: JoinType
    alias: str
    source: Any
    on: Node


def terms_of(node: Node | None) -> list[Node]:
    """Return the conditions that must all be met for `node` to be true."""
    if node is None:
        return []
    if isinstance(node, Call) and node.op == "and":
        return [term for arg in node.args for term in terms_of(arg)]
    return [node]


def all_of(terms: Iterable[Node]) -> Node | None:
    """Return the condition that all terms are met, None if there are none."""
    args = tuple(terms)
    if len(args) > 1:
        return Call("and", args)
    return args[0] if args else None


def aliases_in(node: Node) -> frozenset[str]:
    """Return the aliases that `node` speaks of."""
    return frozenset(at.alias for at in references(node))


def equality_of(term: Node, earlier: Iterable[str], alias: str) -> tuple[Node, Node] | None:
    """Return what a value of earlier sources equals and the value of `alias` that it equals.

    None if `term` is no equality between the two sides.
    """
    match term:
        case Call("eq", (left, right)):
            for ours, theirs in ((left, right), (right, left)):
                there = aliases_in(ours)
                if there and there.issubset(earlier) and aliases_in(theirs) == frozenset({alias}):
                    return ours, theirs
            return None
        case _:
            return None


def check_equality(terms: Iterable[Node], earlier: Iterable[str], alias: str, clause: str) -> None:
    """Refuse terms of which none is an equality between `alias` and the sources before it.

    Without one every row would be compared with every other at each change.
    """
    names = list(earlier)
    if any(equality_of(term, names, alias) for term in terms):
        return
    raise QueryError(
        f"{clause} needs an equality between {alias!r} and what comes before it "
        f"({', '.join(map(repr, names))}), such as eq({names[0]}.id, {alias}.{names[0]}_id).",
        code="join_condition",
    )
