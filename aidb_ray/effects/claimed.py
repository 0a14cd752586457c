"""A row under a claim, and what names the work for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from aidb_ray.store.changes import Held, Release, StoredRow
from aidb_ray.store.collection import Collection

if TYPE_CHECKING:
    from aidb_ray.database import Database
    from aidb_ray.effects.definition import EffectDefinition


@dataclass(frozen=True, slots=True)
class ClaimedRow:
    """A row under a claim of ours.

    Attributes:
        token: Of the claim.
        attempt: How often the row has been claimed, this time included.
        row: As we know it, which is what our writes are made on.
        note: The status that we gave it.
        is_in_doubt: Whether an earlier attempt was lost in the middle.
    """

    session: str
    collection: str
    key: str
    token: int
    attempt: int
    row: StoredRow
    note: str
    is_in_doubt: bool

    @property
    def held(self) -> Held:
        """What a commit under the claim carries."""
        return Held(self.session, self.collection, self.key, self.token)

    def release(self, state: Literal["done", "orphan"]) -> Release:
        """Return the mutation that ends the claim."""
        return Release(self.session, self.collection, self.key, self.token, state)

    def is_at(self, collection: str, key: str) -> bool:
        """Whether this is that row, of those of its session."""
        return (collection, key) == (self.collection, self.key)


def idempotency_key(session: str, collection: str, key: str) -> str:
    """Return what names the work for a row, the same in every attempt and in every process."""
    return f"{session}/{collection}/{key}"


def rows_of(database: Database, definition: EffectDefinition, session: str) -> Collection[Any]:
    """Return the collection of an effect's rows in one session."""
    source = definition.source
    return database.collection(
        source.name,
        source.row_type,
        key=source.key,
        session=session or None,
        version=source.version,
        migrate=source.migrate,
    )
