"""What rows of a query look like to their reader, so that those of a union look alike. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from aidb_ray.expressions import Node, Reference, SourceRef
from aidb_ray.query.outputs import Outputs

Shape: TypeAlias = "tuple[str, type[Any] | None, tuple[tuple[str, Shape], ...]]"
"""What it is ("row", "object" or "value"), its type if it has one, and its names."""

_VALUE: Shape = ("value", None, ())


def shape_of_source(source: SourceRef[Any]) -> Shape:
    """Return what rows of a collection look like."""
    names = sorted(field.wire for field in (source.fields or {}).values())
    return "row", source.row_type, tuple([(name, _VALUE) for name in names])


def shape_of_outputs(
    outputs: Outputs, into: type[Any] | None, shapes: Mapping[str, Shape]
) -> Shape:
    """Return what rows made of `outputs` look like; `shapes` are those of the aliases."""
    parts = [(name, _shape_of(output, shapes)) for name, output in outputs]
    return "object", into, tuple(sorted(parts, key=lambda part: part[0]))


def _shape_of(output: Node | Outputs, shapes: Mapping[str, Shape]) -> Shape:
    if isinstance(output, tuple):
        return shape_of_outputs(output, None, shapes)
    if isinstance(output, Reference) and not output.path:
        return shapes[output.alias]
    return _VALUE


def describe_shape(shape: Shape) -> str:
    """Return a shape in words."""
    what, kind, parts = shape
    named = "" if kind is None else f"{kind.__name__} "
    if what == "value":
        return "a value"
    inner = [name if part == _VALUE else f"{name}: {describe_shape(part)}" for name, part in parts]
    return f"{named}{{{', '.join(inner)}}}" if inner else f"{named or 'untyped '}rows"
