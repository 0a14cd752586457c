"""What a row of an answer consists of: names with what stands under each. Pure.

Values and whole rows stand as expressions; names within names are objects within the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

from aidb_ray.errors import QueryError
from aidb_ray.expressions import Field, Fields, Node, Reference, as_node, is_instant

Outputs: TypeAlias = "tuple[tuple[str, Node | Outputs], ...]"

Scope: TypeAlias = "Mapping[str, Fields | None]"
"""The fields of each alias; None where any name goes."""


def as_outputs(value: object) -> Outputs:
    """Return what a function given to `select` returned, checked.

    Raises:
        QueryError: it is no mapping of names to values, rows and further such mappings.
    """
    if not isinstance(value, Mapping) or not value:
        raise QueryError(
            f"select returns names and values, such as {{'id': m.id}}, not {value!r}.",
            code="invalid_select",
        )
    named = cast("Mapping[object, object]", value)
    if not all(isinstance(name, str) for name in named):
        raise QueryError("The names in select are strings.", code="invalid_select")
    return tuple(
        (
            cast("str", name),
            as_outputs(cast("object", item)) if isinstance(item, Mapping) else as_node(item),
        )
        for name, item in named.items()
    )


def check_names(outputs: Outputs, into: type[Any]) -> None:
    """Refuse names that `into`, a pydantic model or dataclass, does not have."""
    known: set[str] = set()
    if getattr(into, "model_config", {}).get("extra") != "allow":
        for name, info in getattr(into, "model_fields", {}).items():
            known |= {name, info.alias or name}
    if dataclasses.is_dataclass(into):
        known = {one.name for one in dataclasses.fields(into)}
    if not known:
        return
    for name, _output in outputs:
        if name not in known:
            raise QueryError(
                f"{into.__name__} has no field {name!r}. Its fields: {', '.join(sorted(known))}.",
                code="unknown_field",
            )


def leaves(outputs: Outputs) -> Iterator[Node]:
    """Yield the expressions under `outputs`, in order."""
    for _name, output in outputs:
        if isinstance(output, tuple):
            yield from leaves(output)
        else:
            yield output


def map_outputs(outputs: Outputs, change: Callable[[Node], Node]) -> Outputs:
    """Return `outputs` with each expression changed."""
    return tuple(
        (name, map_outputs(out, change) if isinstance(out, tuple) else change(out))
        for name, out in outputs
    )


def is_row(node: Node) -> bool:
    """Whether `node` is a whole row."""
    return isinstance(node, Reference) and not node.path


def fields_of(outputs: Outputs, scope: Scope) -> Fields:
    """Return the fields that rows made of `outputs` have."""
    return {name: _field(name, output, scope) for name, output in outputs}


def _field(name: str, output: Node | Outputs, scope: Scope) -> Field:
    if isinstance(output, tuple):
        return Field(name, fields=fields_of(output, scope))
    if isinstance(output, Reference):
        return Field(name, output.kind, _fields_at(output, scope))
    return Field(name, "datetime" if is_instant(output) else "other")


def _fields_at(at: Reference, scope: Scope) -> Fields | None:
    fields = scope[at.alias]
    for wire in at.path:
        if fields is None:
            return None
        found = next((field for field in fields.values() if field.wire == wire), None)
        fields = None if found is None else found.fields
    return fields


def merge_fields(first: Fields | None, second: Fields | None) -> Fields | None:
    """Return the fields of rows of which some have `first` and some `second`, named alike."""
    if first is None or second is None:
        return None
    merged: dict[str, Field] = {}
    for name, field in first.items():
        other = second.get(name, field)
        kind = "datetime" if "datetime" in (field.kind, other.kind) else "other"
        merged[name] = Field(field.wire, kind, merge_fields(field.fields, other.fields))
    return merged


def output_lines(outputs: Outputs, indent: str) -> Iterator[str]:
    """Yield the lines that show `outputs` to people."""
    for name, output in outputs:
        if isinstance(output, tuple):
            yield f"{indent}{name}:"
            yield from output_lines(output, indent + "  ")
        else:
            yield f"{indent}{name}: {output}"
