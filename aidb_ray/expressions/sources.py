"""Where rows come from and which fields they have, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from aidb_ray.expressions.nodes import Kind

Fields: TypeAlias = "Mapping[str, Field]"

Migrate: TypeAlias = Callable[[dict[str, Any], int], Mapping[str, Any]]
"""Makes the fields of a row that is of an older version those of a row of the newest."""

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a source: its name on the wire, and how its values compare.

    Attributes:
        wire: Its name in stored rows.
        kind: `"datetime"`: an ISO 8601 string with an offset, which compares as an instant.
        fields: What the object in it contains; None allows any name.
    """

    wire: str
    kind: Kind = "other"
    fields: Fields | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class SourceRef(Generic[R_co]):
    """Where rows come from, as data: what a query keeps of a collection.

    Attributes:
        name: Name of the collection.
        session: Its session, None if it belongs to none.
        fields: Python name to field; None allows any name and uses it as it is.
        row_type: What a row is decoded to; None leaves it a dict.
        key: Name of the field that identifies a row.
        version: The version of the rows' schema that is read.
        migrate: What makes it of older ones, if there are any that differ.
    """

    name: str
    session: str | None = None
    fields: Fields | None = field(default=None, hash=False)
    row_type: type[R_co] | None = None
    key: str = "id"
    version: int = 1
    migrate: Migrate | None = None
