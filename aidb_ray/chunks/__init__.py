"""Chunks: a model's stream kept as Arrow batches, and replayed from them.

A generation's chunks are numbered from 0 without gaps. They travel and rest as columns; an object
is made for a chunk only where someone iterates over them.
"""

from aidb_ray.chunks.buffer import FLUSH_CHUNKS, ChunkBuffer, Ending, type_name
from aidb_ray.chunks.collection import ChunkCollection, slices_to_table
from aidb_ray.chunks.flusher import ChunkFlusher
from aidb_ray.chunks.replaying import follow_slices, replay
from aidb_ray.chunks.slices import make_chunk, slice_to_chunks
from aidb_ray.chunks.streaming import stream_to_collection

__all__ = [
    "FLUSH_CHUNKS",
    "ChunkBuffer",
    "ChunkCollection",
    "ChunkFlusher",
    "Ending",
    "follow_slices",
    "make_chunk",
    "replay",
    "slice_to_chunks",
    "slices_to_table",
    "stream_to_collection",
    "type_name",
]
