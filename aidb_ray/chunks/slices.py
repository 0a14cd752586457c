"""Slices of a stream as rows, and from where a reader wants them."""

from __future__ import annotations

from aidb_ray.chunks.buffer import FIRST_OWN_CODE, TYPE_NAMES
from aidb_ray.contracts import Chunk
from aidb_ray.store.changes import ChunkSlice
from aidb_ray.store.columns import cut, unpack


def slice_to_chunks(part: ChunkSlice) -> list[Chunk]:
    """Return the chunks of a slice as rows."""
    generation_id, attempt, own = part.generation_id, part.attempt, part.types
    codes, texts = unpack(part.columns)
    return [
        make_chunk(
            f"{generation_id}:{index}",
            generation_id,
            index,
            attempt,
            own[code - FIRST_OWN_CODE] if code >= FIRST_OWN_CODE else TYPE_NAMES[code],
            text,
        )
        for index, (code, text) in enumerate(zip(codes, texts, strict=True), part.index)
    ]


_CHUNK_FIELDS = frozenset(Chunk.model_fields)


def make_chunk(
    id_: str, generation_id: str, index: int, attempt: int, type_: str, content: str
) -> Chunk:
    """Return a `Chunk` from values that are known to fit, at a third of validation's cost."""
    chunk = Chunk.__new__(Chunk)
    fill = object.__setattr__
    fill(
        chunk,
        "__dict__",
        {
            "id": id_,
            "generation_id": generation_id,
            "index": index,
            "attempt": attempt,
            "type": type_,
            "content": content,
        },
    )
    fill(chunk, "__pydantic_fields_set__", set(_CHUNK_FIELDS))
    fill(chunk, "__pydantic_extra__", None)
    fill(chunk, "__pydantic_private__", None)
    return chunk


def rest_of(part: ChunkSlice, index: int) -> ChunkSlice | None:
    """Return what of a slice comes at or after `index`, or None."""
    count = len(part.columns.types)
    skip = index - part.index
    if skip >= count:
        return None
    if skip <= 0:
        return part
    return ChunkSlice(
        part.generation_id,
        part.attempt,
        index,
        cut(part.columns, skip, count - skip),
        part.types,
        part.closes,
    )
