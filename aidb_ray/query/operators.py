"""Queries answered incrementally: changes of rows in, deltas of the answer out. Pure.

A step costs what it changes, not what the answer holds. See `circuit` for the stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

from aidb_ray.query.answer import Answer, Delta, Row
from aidb_ray.query.builder import Query, build
from aidb_ray.query.circuit import Circuit, Input, make_window
from aidb_ray.query.shown import DecoderOf, decoder_by_type, show_of

__all__ = ["Delta", "Input", "Pipeline", "RowChange"]

R = TypeVar("R")


class RowChange(msgspec.Struct, frozen=True):
    """One row of a source as it is now; `row` is None when it is gone.

    Attributes:
        alias: The source, as the query calls it; inside a query that is read, see `Input.name`.
        key: Identifies the row in its source; keys of one source can be compared.
        row: Its fields by wire name. It is kept, so it must not be changed afterwards.
        revision: The commit that made it so.
        synced: False while an optimistic write of this process to it is outstanding.
    """

    alias: str
    key: Any
    row: Row | None
    revision: int
    synced: bool = True


class Pipeline(Generic[R]):
    """A query with the answer to all changes so far.

    Memory is proportional to what it keeps, which is what a later change may need:

    - Of rows that do not meet the predicate, nothing.
    - Of others what `select` makes of them, or the row where nothing was selected. A `limit` keeps
      that of rows beyond it, too: one of them enters when one within it goes.
    - With groups, of each row the values that it belongs to and is summed up by, to take them
      back; not the row. `min_` and `max_` keep the values in order.
    - Of each side of a join the rows that meet what is asked of that side alone, with an entry in
      an index each, as far as their fields are asked for anywhere; pairs only as the answer.
    - A query that is read by another keeps no answer, but for one with `limit`, `offset` or
      `distinct`.

    Attributes:
        inputs: The collections that changes come from.
    """

    def __init__(self, query: Query[R], *, decoder_of: DecoderOf = decoder_by_type) -> None:
        """Begin with no rows."""
        query = build(query)
        show = show_of(query, decoder_of)
        self._answer = make_window(query, show) or Answer(show)
        self._circuit = Circuit(query, self._answer)
        self._entrances = self._circuit.entrances
        self.inputs: tuple[Input, ...] = tuple([door.input for door in self._entrances.values()])
        self._rows: list[R] | None = None
        self._revision = 0

    @property
    def rows(self) -> list[R]:
        """The answer, in order.

        Raises:
            QueryError: a row is not what its type or `select` requires (`invalid_row`).
        """
        if self._rows is None:
            self._rows = [entry.row() for entry in self._answer.in_order()]
        return self._rows.copy()

    def enters(self) -> list[Delta[R]]:
        """Return the answer as deltas for someone who knows nothing of it yet, in order.

        Their revision is that of the newest change taken in.
        """
        return [Delta.of("enter", entry, self._revision) for entry in self._answer.in_order()]

    def advance(self, changes: Iterable[RowChange]) -> list[Delta[R]]:
        """Take in the changes of one commit or snapshot, and return what they do to the answer.

        There is at most one delta for each key: exits first, then the others, both in the order
        of the answer. A row that only moves gives none. No row can make this fail; one that
        cannot be decoded fails whoever looks at it.
        """
        entrances = self._entrances
        newest = self._revision
        for change in changes:
            entrance = entrances.get(change.alias)
            assert entrance is not None, f"{change.alias!r} is none of {', '.join(entrances)}"
            entrance.put(change.key, change.row, change.revision, synced=change.synced)
            newest = max(newest, change.revision)
        self._revision = newest
        self._circuit.flush()
        if not self._answer.touched:
            return []
        self._rows = None
        return [Delta.of(*move) for move in self._answer.flush()]
