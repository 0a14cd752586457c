from __future__ import annotations

import random
from typing import TypeVar

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.store.frames import (
    CHUNK_SCHEMA,
    HEADER_SIZE,
    SECTOR,
    Frame,
    FrameHeader,
    FrameKind,
    Rows,
    count_zero_sectors,
    decode_chunks,
    decode_header,
    decode_rows,
    encode_frame,
    encode_payload,
    frame_size,
    is_intact,
    is_torn_header,
    is_torn_payload,
    split_payload,
)
from tests.frame_builders import make_chunks, make_frame

SALT = 0xC0FFEE
T = TypeVar("T")


def encode(frame: Frame, *, offset: int = 4096, prev_chain: int = 7) -> bytes:
    data, _ = encode_frame(
        FrameKind.DATA,
        encode_payload(frame),
        salt=SALT,
        segment=3,
        offset=offset,
        first_revision=frame.first_revision,
        commits=frame.commits,
        rows=len(frame.rows.ops),
        epoch=2,
        committed=frame.first_revision - 1,
        prev_chain=prev_chain,
    )
    return data


def decode(data: bytes, *, offset: int = 4096, segment: int = 3) -> FrameHeader | None:
    return decode_header(data, 0, salt=SALT, segment=segment, offset=offset)


def payload_of(data: bytes, header: FrameHeader) -> bytes:
    return data[HEADER_SIZE : HEADER_SIZE + header.payload_size]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    count = draw(st.integers(1, 30))

    def column(values: st.SearchStrategy[T]) -> list[T]:
        return draw(st.lists(values, min_size=count, max_size=count))

    return Rows(
        revisions=column(st.integers(0, 2**62)),
        ops=column(st.integers(0, 255)),
        sessions=column(texts),
        collections=column(texts),
        keys=column(texts),
        values=column(st.none() | st.binary(max_size=600)),
    )


@given(
    rows(), st.none() | st.lists(texts, max_size=50), st.integers(0, 1 << 20).map(lambda n: n * 8)
)
def test_a_frame_comes_back_as_it_was(
    columns: Rows, payloads: list[str] | None, offset: int
) -> None:
    chunks: pa.RecordBatch | None = None
    if payloads is not None:
        chunks = pa.RecordBatch.from_pylist(
            [{"type": 1, "payload": payload} for payload in payloads], schema=CHUNK_SCHEMA
        )

    data = encode(Frame(9, 2, columns, chunks), offset=offset)

    header = decode(data, offset=offset)
    assert header is not None
    assert len(data) == frame_size(header.payload_size)
    assert (header.first_revision, header.commits, header.next_revision) == (9, 2, 11)
    assert (header.epoch, header.committed, header.prev_chain) == (2, 8, 7)
    payload = payload_of(data, header)
    assert is_intact(payload, header)
    row_batch, chunk_batch = split_payload(payload)
    assert decode_rows([row_batch]) == [columns]
    assert decode_chunks(chunk_batch) == chunks


def test_rows_of_many_frames_decode_as_one_by_one() -> None:
    frames = [make_frame(first, commits) for first, commits in ((1, 3), (4, 0), (4, 1), (5, 40))]
    batches = [split_payload(encode_payload(frame))[0] for frame in frames]

    assert decode_rows(batches) == [frame.rows for frame in frames]


def test_every_flipped_bit_is_seen_before_anything_is_parsed() -> None:
    data = encode(make_frame(1, 2, chunks=5))
    header = decode(data)
    assert header is not None

    for bit in range((HEADER_SIZE + header.payload_size) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        seen = decode(bytes(damaged))
        assert seen is None or not is_intact(payload_of(bytes(damaged), seen), seen)


def test_a_frame_counts_only_in_its_own_place() -> None:
    data = encode(make_frame(1))

    assert decode(data) is not None
    assert decode(data, offset=4104) is None
    assert decode(data, segment=2) is None
    assert decode_header(data, 0, salt=SALT + 1, segment=3, offset=4096) is None
    assert decode(data[: HEADER_SIZE - 1]) is None


@given(st.data(), st.integers(0, 3 * SECTOR))
def test_zero_sectors_are_counted_where_they_lie(data: st.DataObject, offset: int) -> None:
    """Oracle: lay the payload into a disk of sectors and look at each one it touches."""
    parts = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=8))
    payload = b"".join((b"\x05" if full else b"\0") * size for full, size in parts)

    count = count_zero_sectors(payload, offset)

    touched = [
        payload[max(0, start - offset) : start + SECTOR - offset]
        for start in range(offset // SECTOR * SECTOR, offset + len(payload), SECTOR)
    ]
    assert count == sum(bool(part) and not any(part) for part in touched)


@pytest.mark.parametrize("offset", [0, 8, 448, 456, 504, 512])
def test_a_header_cut_anywhere_looks_torn(offset: int) -> None:
    data = encode(make_frame(1), offset=offset)[:HEADER_SIZE]

    for length in range(HEADER_SIZE):
        assert is_torn_header(data[:length], offset)
        assert is_torn_header(data[:length].ljust(HEADER_SIZE, b"\0"), offset)
    assert not is_torn_header(data, offset)


def test_a_header_with_one_of_two_sectors_looks_torn() -> None:
    data = encode(make_frame(1), offset=480)[:HEADER_SIZE]

    assert is_torn_header(data[:32] + bytes(32), 480)
    assert is_torn_header(bytes(32) + data[32:], 480)
    assert not is_torn_header(bytes(16) + data[16:], 480)


def test_a_header_with_a_flipped_bit_does_not_look_torn() -> None:
    for offset in (0, 456, 480, 504):
        data = encode(make_frame(1), offset=offset)[:HEADER_SIZE]
        for bit in range(HEADER_SIZE * 8):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            assert not is_torn_header(bytes(damaged), offset)


@pytest.mark.parametrize("offset", [0, 8, 448, 500])
def test_a_payload_cut_anywhere_looks_torn(offset: int) -> None:
    data = encode(make_frame(1, 30, value_bytes=90), offset=offset - offset % 8)
    offset -= offset % 8
    header = decode(data, offset=offset)
    assert header is not None
    payload = payload_of(data, header)

    for length in range(0, len(payload), 13):
        assert is_torn_payload(payload[:length], offset + HEADER_SIZE, header)
        cut = payload[:length].ljust(len(payload), b"\0")
        assert is_torn_payload(cut, offset + HEADER_SIZE, header)


def test_a_payload_that_misses_any_sector_looks_torn() -> None:
    data = encode(make_frame(1, 60, value_bytes=90))
    header = decode(data)
    assert header is not None
    rng = random.Random(5)
    sectors = range(SECTOR, len(data), SECTOR)

    for _ in range(50):
        damaged = bytearray(data)
        for start in rng.sample(sectors, rng.randint(1, len(sectors))):
            damaged[start : start + SECTOR] = bytes(len(damaged[start : start + SECTOR]))
        assert is_torn_payload(payload_of(bytes(damaged), header), 4096 + HEADER_SIZE, header)


def test_a_damaged_payload_does_not_look_torn() -> None:
    """Zeros that belong there are counted when the frame is written, so they prove nothing."""
    frame = make_frame(1, 3)
    frame.rows.values[1] = bytes(4000)
    data = encode(frame)
    header = decode(data)
    assert header is not None
    assert header.zero_sectors >= 6

    for at in range(HEADER_SIZE, HEADER_SIZE + header.payload_size, 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        assert not is_torn_payload(payload_of(bytes(damaged), header), 4096 + HEADER_SIZE, header)


def test_chunks_cost_few_bytes() -> None:
    one = len(encode(make_frame(1)))
    many = len(encode(make_frame(1, chunks=500)))

    assert (many - one) / 500 < 30
    assert one < 1000


def test_chunks_of_another_schema_are_refused() -> None:
    frame = Frame(1, 1, make_frame(1).rows, make_chunks(1, 3).select(["payload"]))

    with pytest.raises(ValueError, match="schema"):
        encode_payload(frame)
