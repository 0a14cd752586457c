"""What a row type says of its fields, read from what pydantic makes of the type. Pure.

A pydantic model, a dataclass and a TypedDict have one form there, aliases and all.
Source: `pydantic_core.core_schema`, from which pydantic builds its validators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from pydantic import TypeAdapter

from aidb_ray.errors import ConfigError
from aidb_ray.expressions import Field, Fields

Schema: TypeAlias = Mapping[str, Any]

_STRUCTURES = frozenset({"model", "dataclass", "typed-dict"})
_NUMBERS = frozenset({"int", "float", "decimal", "complex"})


@dataclass(frozen=True, slots=True)
class RowType:
    """The fields of a row type, and how rows are held to it.

    Attributes:
        names: Stored name by Python name.
        accepted: By each name that a row may use for a field, the one that is validated.
        fields: The fields as queries know them.
        untyped: Fields that take whatever they are given, so that nobody checks what is inside.
        has_numbers: Whether a field that is typed may hold a number.
        strict: True: no value is converted. None: as the type's own config says.
        extra: `forbid`: no name is unknown at any depth. None: as the types in it say.
        unknown: What becomes of unknown fields of the row itself.
    """

    names: Mapping[str, str]
    accepted: Mapping[str, str]
    fields: Fields
    untyped: frozenset[str]
    has_numbers: bool
    strict: Literal[True] | None
    extra: Literal["forbid"] | None
    unknown: Literal["forbid", "ignore", "allow"]


def describe(row_type: type[Any], adapter: TypeAdapter[Any]) -> RowType:
    """Return what a row type says of its fields.

    Raises:
        ConfigError: `invalid_schema`: it has no fields, or writes one under a name that it does
            not read.
    """
    schema = cast("Schema", adapter.core_schema)
    reader = _Reader(schema)
    row = next(reader.alternatives(schema), schema)
    members = reader.members(row)
    if members is None:
        raise ConfigError(
            f"{row_type!r} cannot be a row type: it is no pydantic model, dataclass or TypedDict.",
            code="invalid_schema",
        )
    config: Schema = row.get("config", {})
    names: dict[str, str] = {}
    accepted: dict[str, str] = {}
    for name, member in members.items():
        wire = names[name] = _wire(name, member)
        read = _read_names(name, member, config)
        if wire not in read:
            raise ConfigError(
                f"{row_type.__name__} writes {name!r} as {wire!r} and reads it as "
                f"{' or '.join(map(repr, read))}, so its rows could not be read back. Give the "
                f"field one alias for both.",
                code="invalid_schema",
            )
        accepted |= {alias: alias for alias in read} | {name: wire, wire: wire}
    untyped = frozenset(name for name, one in members.items() if reader.is_untyped(one["schema"]))
    nodes = list(_nodes(schema))
    return RowType(
        names,
        accepted,
        reader.fields(members, frozenset({_identity(row)})),
        untyped,
        any(
            node.get("type") in _NUMBERS
            for name, member in members.items()
            if name not in untyped
            for node in reader.nodes(member)
        ),
        None if "strict" in config else True,
        None if any(map(_speaks_of_extra, nodes)) else "forbid",
        config.get("extra_fields_behavior", "forbid"),
    )


class _Reader:
    """Finds its way in one type's schema, whose recursive parts are defined once, by name."""

    def __init__(self, schema: Schema) -> None:
        self._definitions = {one["ref"]: one for one in schema.get("definitions", ())}

    def alternatives(self, schema: Schema) -> Iterator[Schema]:
        """Yield what a value may be, without validators, defaults and None around it."""
        match schema["type"]:
            case "definition-ref":
                yield from self.alternatives(self._definitions[schema["schema_ref"]])
            case "union":
                choices: Sequence[Schema | tuple[Schema, str]] = schema["choices"]
                for choice in choices:
                    yield from self.alternatives(choice[0] if isinstance(choice, tuple) else choice)
            case "tagged-union":
                for choice in schema["choices"].values():
                    yield from self.alternatives(choice)
            case "chain":
                yield from self.alternatives(schema["steps"][-1])
            case "json-or-python":
                yield from self.alternatives(schema["json_schema"])
            case "lax-or-strict":
                yield from self.alternatives(schema["strict_schema"])
            case kind if kind not in _STRUCTURES and "schema" in schema:
                yield from self.alternatives(schema["schema"])
            case _:
                yield schema

    def members(self, schema: Schema) -> dict[str, Schema] | None:
        """Return the fields of a model, dataclass or TypedDict by Python name, else None."""
        if schema["type"] not in _STRUCTURES:
            return None
        inner = schema
        if "schema" in schema:
            inner = next(self.alternatives(schema["schema"]))
        fields: Mapping[str, Schema] | Sequence[Schema] | None = inner.get("fields")
        if isinstance(fields, Mapping):
            return dict(fields)
        if fields is None:
            return None  # A root model: it wraps a value that has no name.
        return {one["name"]: one for one in fields if not one.get("init_only")}

    def fields(self, members: Mapping[str, Schema], above: frozenset[int]) -> Fields:
        """Return fields as queries know them; a type within itself may have any field."""
        return {name: self._field(name, member, above) for name, member in members.items()}

    def _field(self, name: str, member: Schema, above: frozenset[int]) -> Field:
        wire = _wire(name, member)
        for schema in self.alternatives(member["schema"]):
            if schema["type"] == "datetime":
                return Field(wire, kind="datetime")
            members = self.members(schema)
            if members is not None and _identity(schema) not in above:
                return Field(wire, fields=self.fields(members, above | {_identity(schema)}))
        return Field(wire)

    def is_untyped(self, schema: Schema) -> bool:
        """Whether a value of any kind fits somewhere."""
        for one in self.alternatives(schema):
            match one["type"]:
                case "any":
                    return True
                case "dict" if self._is_open(one.get("values_schema")):
                    return True
                case "list" if self._is_open(one.get("items_schema")):
                    return True
                case _:
                    pass
        return False

    def _is_open(self, inside: Schema | None) -> bool:
        return inside is None or self.is_untyped(inside)

    def nodes(self, schema: Schema) -> Iterator[Schema]:
        """Yield every part of a schema, those that it refers to included."""
        seen: set[str] = set()
        waiting = [schema]
        while waiting:
            for node in _nodes(waiting.pop()):
                yield node
                ref = node.get("schema_ref")
                if ref is not None and ref not in seen:
                    seen.add(ref)
                    waiting.append(self._definitions[ref])


def _nodes(schema: object) -> Iterator[Schema]:
    if isinstance(schema, Mapping):
        node = cast("Schema", schema)
        yield node
        for part in node.values():
            yield from _nodes(part)
    elif isinstance(schema, (list, tuple)):
        for part in cast("Sequence[object]", schema):
            yield from _nodes(part)


def _speaks_of_extra(node: Schema) -> bool:
    # A TypedDict says `ignore` where its author said nothing.
    return "extra_fields_behavior" in node or node.get("extra_behavior", "ignore") != "ignore"


def _wire(name: str, member: Schema) -> str:
    return member.get("serialization_alias") or name


def _read_names(name: str, member: Schema, config: Schema) -> list[str]:
    """Return the names under which a field may be given, but for those inside other fields."""
    alias = member.get("validation_alias")
    if alias is None or not config.get("validate_by_alias", True):
        return [name]
    if isinstance(alias, str):
        found = [alias]
    else:
        paths = alias if isinstance(alias[0], list) else [alias]
        found = [path[0] for path in paths if len(path) == 1]
    return [*found, name] if config.get("validate_by_name") else found


def _identity(schema: Schema) -> int:
    return id(schema.get("cls"))
