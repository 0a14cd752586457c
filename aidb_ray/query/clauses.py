"""What the clauses of a query take, checked as it is written. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from aidb_ray.errors import QueryError
from aidb_ray.expressions import Expression, Node, Reference, as_node, is_aggregate, walk

Direction: TypeAlias = Literal["asc", "desc"]


@dataclass(frozen=True, slots=True)
class OrderTerm:
    """One thing that rows are ordered by. Nulls are least."""

    node: Node
    descending: bool = False

    @classmethod
    def towards(cls, direction: Direction, node: Node) -> OrderTerm:
        """Return a term as `order_by` takes it.

        Raises:
            QueryError: there is no such direction.
        """
        if direction not in ("asc", "desc"):
            raise QueryError(
                f"The direction is 'asc' or 'desc', not {direction!r}.", code="invalid_argument"
            )
        return cls(node, descending=direction == "desc")

    def __str__(self) -> str:
        return f"{self.node}{' desc' if self.descending else ''}"


def field_or_value(value: object, clause: str) -> Node:
    """Return a value of a row that is no whole row.

    Raises:
        QueryError: it is something else.
    """
    if not isinstance(value, Expression):
        raise QueryError(
            f"{clause} needs a field or value of a row, not {value!r}.", code="invalid_expression"
        )
    node = as_node(value)
    if isinstance(node, Reference) and not node.path:
        raise QueryError(
            f"{clause} needs a field of {node}, not the whole row.", code="invalid_expression"
        )
    return node


def refuse_aggregates(node: Node, clause: str) -> None:
    """Refuse what sums up groups in a clause that comes before them."""
    for part in walk(node):
        if is_aggregate(part):
            raise QueryError(
                f"{clause} comes before groups are made: {part} belongs into having or select.",
                code="aggregate_not_allowed",
            )


def whole_number(value: int, clause: str) -> int:
    """Return a number of rows.

    Raises:
        QueryError: it is negative or no whole number.
    """
    if type(value) is not int or value < 0:
        raise QueryError(
            f"{clause} takes a whole number from 0, not {value!r}.", code="invalid_argument"
        )
    return value
