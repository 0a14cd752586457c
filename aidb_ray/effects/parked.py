"""Rows that were left in the middle, until a person says what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from aidb_ray.store.changes import Filter
from aidb_ray.store.local import RowEvent, View

if TYPE_CHECKING:
    from aidb_ray.database import Database
    from aidb_ray.effects.definition import EffectDefinition

logger = logging.getLogger(__name__)

MAX_FOLLOWED = 1_000

Place = tuple[str, str]
"""(session, key)"""


class ParkedRows:
    """Follows each parked row, which the effect's query need not find, up to `MAX_FOLLOWED`."""

    def __init__(
        self, database: Database, definition: EffectDefinition, on_written: Callable[[Place], None]
    ) -> None:
        self._database = database
        self._definition = definition
        self._on_written = on_written
        self._views: dict[Place, View] = {}

    def __len__(self) -> int:
        return len(self._views)

    def add(self, place: Place, recorded_at: int) -> bool:
        """Call `on_written` once the row is written after that revision; False if too many are."""
        if place in self._views:
            return True
        if len(self._views) >= MAX_FOLLOWED:
            return False
        session, key = place
        logger.warning("%r was left in the middle; a person decides what becomes of it", key)
        partition, definition = self._database.site_of(session), self._definition
        self._views[place] = View(
            partition.client,
            partition.writes,
            Filter(definition.source.name, session, where=((definition.key_name, (key,)),)),
            partial(self._hear, place, recorded_at),
            shows_writes=False,
        )
        return True

    def close(self) -> None:
        """Follow nothing any more."""
        for view in self._views.values():
            view.close()
        self._views.clear()

    def _hear(self, place: Place, recorded_at: int, events: Sequence[RowEvent]) -> None:
        is_written = any(
            (e.session, e.key) == place and (e.row is None or e.row.revision > recorded_at)
            for e in events
        )
        if is_written and (view := self._views.pop(place, None)) is not None:
            view.close()
            self._on_written(place)
