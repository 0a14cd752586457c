"""Chunk streams: where their chunks rest in the log, and chunks that no stream has any more. Pure.

Frames hold the chunks of many streams side by side. What a stream leaves behind when it is removed
is garbage until compaction has dropped it from its frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

from aidb_ray.store.changes import Append, encode


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where consecutive chunks of one stream rest: frame, place in its chunk batch, indexes."""

    segment: int
    offset: int
    start: int
    count: int
    index: int
    attempt: int
    types: tuple[str, ...]

    @property
    def place(self) -> tuple[int, int]:
        """Where the frame lies."""
        return self.segment, self.offset


class Stream(msgspec.Struct, array_like=True):
    """The stored chunks of one generation."""

    revision: int = 0
    next_index: int = 0
    closes: str = ""
    runs: list[Run] = []

    def extend(self, revision: int, wanted: Append, start: int, place: tuple[int, int]) -> bool:
        """Add chunks that the frame at `place` holds from its chunk `start` on.

        What is known already is not added again, so a frame can be replayed over a snapshot that
        has some of it; returns whether there was something to add.
        """
        is_new = wanted.count > 0 and wanted.index >= self.next_index
        if is_new:
            run = Run(*place, start, wanted.count, wanted.index, wanted.attempt, wanted.types)
            self.runs.append(run)
            self.next_index = wanted.index + wanted.count
        self.closes = wanted.closes or self.closes
        self.revision = revision
        return is_new


decode_stream = msgspec.msgpack.Decoder(Stream).decode


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Chunks `start` up to `start + count` of the frame at `offset` of a segment."""

    offset: int
    start: int
    count: int


Garbage: TypeAlias = Mapping[int, Sequence[Span]]
"""By segment, chunks that no stream refers to any more."""

NO_GARBAGE: Garbage = {}

_decode_spans = msgspec.msgpack.Decoder(list[Span]).decode


def garbage_of(
    runs: Iterable[Run], revision: int, session: str, generation_id: str
) -> Iterator[tuple[str, bytes]]:
    """Yield (key, value) of rows that remember the runs of a removed stream, one a segment."""
    spans: dict[int, list[Span]] = {}
    for run in runs:
        spans.setdefault(run.segment, []).append(Span(run.offset, run.start, run.count))
    for segment, found in spans.items():
        # The same stream may be removed, written anew and removed again.
        yield f"{segment:016x}\0{revision:x}\0{session}\0{generation_id}", encode(found)


def runs_in(stream: Stream, garbage: Garbage) -> Iterator[Run]:
    """Yield the runs of a stream that lie in segments with garbage."""
    return (run for run in stream.runs if run.segment in garbage)


def spare(garbage: Garbage, used: Iterable[Run]) -> Garbage:
    """Return garbage without what other streams use: those of forks share whole runs."""
    places = {(run.segment, run.offset, run.start) for run in used}
    return {
        segment: [span for span in spans if (segment, span.offset, span.start) not in places]
        for segment, spans in garbage.items()
    }


def segment_of(key: str) -> int:
    """Return the segment of a row that `garbage_of` yielded."""
    return int(key[:16], 16)


def spans_by_segment(rows: Iterable[tuple[str, bytes]]) -> dict[int, list[Span]]:
    """Return what rows of `garbage_of` remember."""
    found: dict[int, list[Span]] = {}
    for key, value in rows:
        found.setdefault(segment_of(key), []).extend(_decode_spans(value))
    return found
