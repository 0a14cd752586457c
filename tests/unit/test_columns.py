from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.store.changes import ChunkColumns
from aidb_ray.store.columns import EMPTY, cut, from_arrow, is_consistent, pack, to_arrow, unpack

chunks = st.lists(st.tuples(st.integers(0, 255), st.text(max_size=5)), max_size=12)
Chunks = list[tuple[int, str]]


def packed(some: Chunks) -> ChunkColumns:
    return pack([kind for kind, _ in some], [text for _, text in some])


def unpacked(columns: ChunkColumns) -> Chunks:
    kinds, texts = unpack(columns)
    return list(zip(kinds, texts, strict=True))


@given(chunks, st.data())
def test_cutting_columns_is_slicing_chunks(some: Chunks, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(some)))
    count = data.draw(st.integers(0, len(some) - start))

    part = cut(packed(some), start, count)

    assert unpacked(part) == some[start : start + count]
    assert is_consistent(part)


@given(st.lists(chunks.filter(bool), min_size=1, max_size=4), st.data())
def test_columns_joined_in_arrow_come_back_as_they_were(
    parts: list[Chunks], data: st.DataObject
) -> None:
    together = [chunk for part in parts for chunk in part]
    start = data.draw(st.integers(0, len(together)))

    batch = to_arrow([packed(part) for part in parts])
    batch.validate(full=True)

    assert unpacked(from_arrow(batch)) == together
    assert unpacked(from_arrow(batch.slice(start))) == together[start:]


def test_buffers_that_do_not_fit_together_are_seen() -> None:
    good = packed([(1, "ab"), (2, "c")])

    assert is_consistent(good)
    assert is_consistent(EMPTY)
    assert not is_consistent(ChunkColumns(good.types + b"\1", good.ends, good.payload))
    assert not is_consistent(ChunkColumns(good.types, good.ends, good.payload + b"x"))
    assert not is_consistent(ChunkColumns(good.types, array("i", [3, 2]).tobytes(), b"ab"))
    assert not is_consistent(ChunkColumns(good.types, array("i", [-1, 3]).tobytes(), b"abc"))
