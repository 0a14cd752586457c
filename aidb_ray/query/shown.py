"""Rows of an answer as their readers get them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from aidb_ray.expressions import Reference, SourceRef
from aidb_ray.query.answer import Decode, Row
from aidb_ray.query.outputs import Outputs, is_row, leaves
from aidb_ray.query.query import Query, Source, UnionAll

DecoderOf: TypeAlias = Callable[[SourceRef[Any]], Decode]
"""Gives what makes a stored row (wire names) of a collection what its reader gets."""


def show_of(query: Query[Any], decoder_of: DecoderOf) -> Decode:
    """Return what makes a row of the answer, as computed, the thing that its reader gets."""
    shows = {alias: _show_source(source, decoder_of) for alias, source in query.scope.items()}
    outputs, into = query.outputs, query.into
    if outputs is None:
        return _show_joined(shows) if query.is_joined else next(iter(shows.values()))
    has_rows = any(map(is_row, leaves(outputs)))

    def show(raw: Row) -> Any:
        row = _show_rows(raw, outputs, shows) if has_rows else dict(raw)
        return row if into is None else into(**row)

    return show


def _show_source(source: Source[Any], decoder_of: DecoderOf) -> Decode:
    match source:
        case SourceRef():
            return decoder_of(source)
        case Query():
            return show_of(source, decoder_of)
        case UnionAll(queries):
            # Their rows look alike, so one shows those of all.
            return show_of(queries[0], decoder_of)


def _show_joined(shows: Mapping[str, Decode]) -> Decode:
    def show(raw: Row) -> Any:
        return {
            alias: None if raw[alias] is None else show_row(raw[alias])
            for alias, show_row in shows.items()
        }

    return show


def _show_rows(raw: Row, outputs: Outputs, shows: Mapping[str, Decode]) -> Row:
    shown: Row = {}
    for name, output in outputs:
        value = raw[name]
        if isinstance(output, tuple):
            shown[name] = _show_rows(value, output, shows)
        elif isinstance(output, Reference) and is_row(output) and value is not None:
            shown[name] = shows[output.alias](value)
        else:
            shown[name] = value
    return shown


def decoder_by_type(source: SourceRef[Any]) -> Decode:
    """Return what makes a row the collection's `row_type`, or a dict without one."""
    row_type: Any = source.row_type
    if row_type is None or row_type is dict:
        return dict
    validate: Decode | None = getattr(row_type, "model_validate", None)
    return validate or (lambda row: row_type(**row))
