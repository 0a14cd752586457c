"""Rows of a `pending_work` as an agent answers them: by group, one group at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aidb_ray.query.live import decoder_of, filter_of, to_changes
from aidb_ray.query.operators import Pipeline

if TYPE_CHECKING:
    from aidb_ray.query.builder import Query
    from aidb_ray.store.changes import Filter
    from aidb_ray.store.local import RowEvent

logger = logging.getLogger(__name__)


class Moved(NamedTuple):
    """A row that left a group, or came into one, or both; the same one if it only changed."""

    key: str
    left: str | None
    joined: str | None


class RowGroups:
    """The rows that match, and the group of each.

    A group is the session that a row lies in, or what `by` makes of it; rows of two sessions are
    never answered together. Without a query there are no rows, and sessions are groups.
    """

    def __init__(self, query: Query[Any] | None, by: Callable[[Any], str] | None) -> None:
        self._by = by
        self._pipeline: Pipeline[Any] | None = None
        if query is not None:
            self._pipeline = Pipeline(query, decoder_of=decoder_of)
        self._rows: dict[tuple[str, str], tuple[str, Any]] = {}
        self._storage: dict[str, str] = {}

    @property
    def wanted(self) -> Filter:
        """The rows that may match."""
        assert self._pipeline is not None
        (source,) = self._pipeline.inputs
        return filter_of(source)

    def advance(self, events: Sequence[RowEvent]) -> Iterator[Moved]:
        """Take in changes, and tell what moved."""
        assert self._pipeline is not None
        (source,) = self._pipeline.inputs
        changes = to_changes([source.name], source.source, events)
        for delta in self._pipeline.advance(changes):
            place = storage, key = delta.key
            known = self._rows.pop(place, None)
            group = None if delta.op == "exit" else self._group_of(delta.row, storage)
            if group is not None:
                self._rows[place] = (group, delta.row)
                self._storage[group] = storage
            yield Moved(key, None if known is None else known[0], group)

    def row(self, storage: str, key: str) -> Any:
        """Return a row that matches, None if it does not any more."""
        return self._rows.get((storage, key), ("", None))[1]

    def storage_of(self, group: str) -> str:
        """Return the session that a group's rows lie in."""
        return self._storage.get(group, group)

    def of(self, storage: str) -> list[str]:
        """Return the groups whose rows lie in a session."""
        if self._by is None:
            return [storage]
        return [group for group, at in self._storage.items() if at == storage]

    def add(self, group: str, storage: str) -> None:
        """Add a group without rows."""
        self._storage[group] = storage

    def forget(self, group: str) -> None:
        """Forget a group that has no rows any more."""
        self._storage.pop(group, None)

    def _group_of(self, row: Any, storage: str) -> str | None:
        if self._by is None:
            return storage
        try:
            group = str(self._by(row))
        except Exception:
            logger.exception("`session` failed; the row is left alone", extra={"session": storage})
            return None
        return group if self._storage.get(group, storage) == storage else f"{group} in {storage}"
