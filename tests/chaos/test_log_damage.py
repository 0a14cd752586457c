"""Damage of every kind, anywhere in a log: found and named; never served.

What becomes of a damage is one of three:

named   opening is refused with file and offset.
mended  a seal was hit, which says nothing that its successor does not: noticed, logged, and
        written anew; every row is served.
torn    zeros stand where bytes of the last frame should be, the file is as long as ever, and
        nothing follows. A crash in a write leaves just that, so it cannot be told from one; see
        `recovery`. Counted apart, never among the cases of the other two.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import pytest

from aidb_ray.errors import CorruptionError
from aidb_ray.store import frames, recovery, segments
from aidb_ray.store.frames import HEADER_SIZE, Frame, FrameHeader
from aidb_ray.store.segments import SegmentReader, SegmentWalk, segment_path
from tests.faults import UnsyncedFiles
from tests.frame_builders import create, fill, make_frame, make_rows, open_log

pytestmark = pytest.mark.chaos

FRAMES: Final = 40
SEGMENT_BYTES: Final = 1 << 13
SECTOR: Final = 512


@dataclass(slots=True)
class Victim:
    """A log of several segments, its bytes, and its bytes some frames earlier.

    Attributes:
        last: Where the last frame lies, and the end of it.
        offsets: Where the frames of the last segment lie.
    """

    store: Path
    good: dict[Path, bytes]
    earlier: dict[Path, bytes]
    last: tuple[Path, int, int]
    offsets: list[int]

    def restore(self) -> None:
        """Put every file back as it was."""
        for path in self.store.rglob("*"):
            if path.is_file() and path not in self.good:
                path.unlink()
        for path, content in self.good.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def make_victim(directory: Path) -> Victim:
    """Fill a log, and leave it as a killed process would."""
    store = create(directory, UnsyncedFiles())
    log = open_log(store, UnsyncedFiles(), segment_bytes=SEGMENT_BYTES)
    earlier: dict[Path, bytes] = {}
    for number in range(FRAMES):
        if number == FRAMES - 12:
            earlier = read_files(store)
        fill(log, 1, chunks=number % 3 * 20, value_bytes=40 if number % 2 else 600)
    positions = [place for place, _ in log.frames(0)]
    number, offset = positions[-1]
    last = segment_path(store / "log", number), offset, log._writer.tail.offset
    log.abandon()
    offsets = [place.offset for place in positions if place.segment == number]
    assert len(offsets) > 3
    return Victim(store, read_files(store), earlier, last, offsets)


def read_files(store: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def look(victim: Victim) -> tuple[list[int], int]:
    """Open the log and read everything; return the revisions served and the bytes cut off."""
    log = open_log(victim.store, UnsyncedFiles(), segment_bytes=SEGMENT_BYTES)
    try:
        served: list[int] = []
        for position, frame in log.frames(0):
            (revision,) = frame.rows.revisions
            value = frame.rows.values[0] or b""
            assert frame == make_frame(
                revision, chunks=(revision - 1) % 3 * 20, value_bytes=len(value)
            )
            assert len(value) == (600 if revision % 2 else 40)
            if frame.chunks is not None:
                assert log.read_chunks(position, 0, 99) == frame.chunks
            served.append(revision)
        return served, log.torn_bytes
    finally:
        log.abandon()


def judge(victim: Victim, path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture) -> str:
    """Damage one file, look, and return what came of it; assert that it was allowed."""
    good = victim.good[path]
    assert damaged != good
    path.write_bytes(damaged)
    caplog.clear()
    try:
        served, torn_bytes = look(victim)
    except CorruptionError as error:
        if not error.file or not (error.first_revision or error.offset == 0):
            raise AssertionError("badly named") from error
        return "named"
    finally:
        victim.restore()
    assert "torn write" in caplog.text or "sealing" in caplog.text, "nobody noticed"
    if served == list(range(1, FRAMES + 1)):
        return "mended"
    last_path, start, end = victim.last
    assert served == list(range(1, FRAMES)), "lost more than a torn tail"
    assert path == last_path
    assert torn_bytes > 0
    assert len(damaged) == len(good), "a crash does not shorten the file"
    assert damaged[:start] == good[:start]
    changed = [at for at in range(start, end) if damaged[at] != good[at]]
    assert any(damaged[at] == 0 for at in changed), "no byte is missing"
    return "torn"


Damage = Callable[[Random, bytes, bytes], bytes]


def flip_bit(rng: Random, content: bytes, _earlier: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[rng.randrange(reach(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def zero_sector(rng: Random, content: bytes, _earlier: bytes) -> bytes:
    start = rng.randrange(reach(content) // SECTOR + 1) * SECTOR
    return content[:start] + bytes(len(content[start : start + SECTOR])) + content[start + SECTOR :]


def swap_sectors(rng: Random, content: bytes, _earlier: bytes) -> bytes:
    if reach(content) < 2 * SECTOR:
        return content
    first, second = sorted(rng.sample(range(reach(content) // SECTOR), 2))
    damaged = bytearray(content)
    for target, source in ((first, second), (second, first)):
        start = source * SECTOR
        damaged[target * SECTOR : (target + 1) * SECTOR] = content[start : start + SECTOR]
    return bytes(damaged)


def copy_sector(rng: Random, content: bytes, _earlier: bytes) -> bytes:
    """A write that went astray: one sector's content where another's should be."""
    if reach(content) < 2 * SECTOR:
        return content
    source, target = (rng.randrange(reach(content) // SECTOR) * SECTOR for _ in range(2))
    return content[:target] + content[source : source + SECTOR] + content[target + SECTOR :]


def stale_sector(rng: Random, content: bytes, earlier: bytes) -> bytes:
    """A write that the disk forgot: a sector as it was some frames ago."""
    start = rng.randrange(reach(content) // SECTOR + 1) * SECTOR
    size = len(content[start : start + SECTOR])
    old = earlier[start : start + size].ljust(size, b"\0")
    return content[:start] + old + content[start + size :]


def cut_file(rng: Random, content: bytes, _earlier: bytes) -> bytes:
    """A file that ends too early: anywhere in it, reserved space included."""
    return content[: rng.randrange(len(content))]


def used(content: bytes) -> int:
    return len(content.rstrip(b"\0"))


def reach(content: bytes) -> int:
    """Return up to where damage is of interest: a sector more than is used."""
    return min(used(content) + SECTOR, len(content))


def check_damage(
    victim: Victim, damage: Damage, cases: int, caplog: pytest.LogCaptureFixture
) -> Counter[str]:
    """Damage segments at random until `cases` damages were judged, besides those that look torn.

    What a draw leaves as it was is no damage, and drawn again.
    """
    rng = Random(damage.__name__)
    paths = [path for path in victim.good if path.suffix == ".log"]
    weights = [used(victim.good[path]) for path in paths]
    outcomes: Counter[str] = Counter()
    while outcomes["named"] + outcomes["mended"] < cases:
        (path,) = rng.choices(paths, weights)
        good = victim.good[path]
        damaged = damage(rng, good, victim.earlier.get(path, b""))
        if damaged != good:
            outcomes[judge(victim, path, damaged, caplog)] += 1
    return outcomes


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return make_victim(tmp_path)


@pytest.mark.parametrize(
    ("damage", "cases"),
    [(flip_bit, 750), (zero_sector, 250), (swap_sectors, 250), (copy_sector, 250),
     (stale_sector, 250), (cut_file, 250)],
)  # fmt: skip
def test_damage_is_found_and_never_served(
    victim: Victim, damage: Damage, cases: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert look(victim) == (list(range(1, FRAMES + 1)), 0)
    victim.restore()

    outcomes = check_damage(victim, damage, cases, caplog)

    print(f"{damage.__name__}: {dict(outcomes)}")  # noqa: T201
    assert outcomes["named"] > cases * 0.9
    assert not (outcomes["torn"] and damage in (flip_bit, cut_file))


def check_every_flip_in_the_last_frame(
    victim: Victim, caplog: pytest.LogCaptureFixture
) -> Counter[str]:
    """Flip one bit of every byte of the last frame's header, and of the frame's end."""
    path, start, end = victim.last
    good = victim.good[path]
    outcomes: Counter[str] = Counter()
    for at in [*range(start, start + HEADER_SIZE), *range(end - 16, end)]:
        damaged = bytearray(good)
        damaged[at] ^= 0x10
        outcomes[judge(victim, path, bytes(damaged), caplog)] += 1
    return outcomes


def test_no_flipped_bit_of_the_last_frame_is_taken_for_a_torn_write(
    victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(check_every_flip_in_the_last_frame(victim, caplog)) == {"named"}


def test_a_cut_anywhere_in_the_live_segment_is_named(
    victim: Victim, caplog: pytest.LogCaptureFixture
) -> None:
    """Every length up to the end of the last frame, its boundaries too, and some behind it."""
    path, _, end = victim.last
    good = victim.good[path]
    assert len(good) == SEGMENT_BYTES > end
    lengths = [*range(0, end, 7), *victim.offsets, *range(end, len(good), 61), len(good) - 1]
    outcomes = Counter(judge(victim, path, good[:length], caplog) for length in lengths)
    assert outcomes == {"named": len(lengths)}


def test_zeros_over_the_last_frames_read_as_never_written(victim: Victim) -> None:
    """The one damage that is not named, and why it cannot be.

    The file keeps its length, and is zeros from some byte on. So it was before those frames were
    written, and so a crash leaves it that came in the middle of one: the same bytes, whether the
    frames were acknowledged or not. Only a second place that is synced with every commit would
    know. What is served is still a prefix of the log, and a frame cut apart is logged.
    """
    path, _, end = victim.last
    good = victim.good[path]
    ends = [*victim.offsets[-2:], end]
    torn = 0
    for length in range(victim.offsets[-3], end):
        path.write_bytes(good[:length].ljust(len(good), b"\0"))
        served, torn_bytes = look(victim)
        victim.restore()
        assert served == list(range(1, FRAMES - 2 + sum(at <= length for at in ends)))
        left = good[max(at for at in victim.offsets if at <= length) : length]
        assert torn_bytes == len(left.rstrip(b"\0"))
        torn += torn_bytes > 0
    assert torn > 1000


def test_a_cut_below_the_watermark_is_named(tmp_path: Path) -> None:
    """After a clean closing META knows up to where the log was durable."""
    store = create(tmp_path, UnsyncedFiles())
    log = open_log(store, UnsyncedFiles())
    fill(log, 5)
    end = log._writer.tail.offset
    log.close()
    path = segment_path(store / "log", 0)
    good = path.read_bytes()

    for length in range(0, end, 3):
        path.write_bytes(good[:length].ljust(len(good), b"\0"))
        with pytest.raises(CorruptionError) as caught:
            open_log(store, UnsyncedFiles())
        assert caught.value.file == str(path)
    path.write_bytes(good)
    open_log(store, UnsyncedFiles()).close()


def check_stale_frame(directory: Path) -> None:
    """Put back a frame that once was written to the place where another was acknowledged."""
    store = create(directory, UnsyncedFiles())
    log = open_log(store, UnsyncedFiles())
    fill(log, 1)
    log.close()
    shutil.copytree(store, other := directory / "other")
    log = open_log(other, UnsyncedFiles())
    log.append(Frame(2, 1, make_rows([9])))
    log.close()
    stale = segment_path(other / "log", 0).read_bytes()
    log = open_log(store, UnsyncedFiles())
    fill(log, 2)
    start, end = (place.offset for place, _ in log.frames(1))
    log.close()
    path = segment_path(store / "log", 0)
    good = path.read_bytes()
    path.write_bytes(good[:start] + stale[start:end] + good[end:])

    try:
        open_log(store, UnsyncedFiles()).abandon()
    except CorruptionError:
        return
    raise AssertionError("a frame that was never acknowledged was believed")


def test_a_stale_frame_is_found(tmp_path: Path) -> None:
    check_stale_frame(tmp_path)


# Mistakes that the checkers above must catch.


def no_header_checksum(patch: pytest.MonkeyPatch) -> None:
    def decode_header(
        data: bytes | memoryview, at: int, *, salt: int, segment: int, offset: int
    ) -> FrameHeader | None:
        if len(data) - at < HEADER_SIZE:
            return None
        header = FrameHeader._make(frames._HEADER.unpack_from(data, at))
        is_header = header.magic == frames.MAGIC and header.end == frames._HEADER_END
        return header if is_header else None

    patch.setattr(segments, "decode_header", decode_header)


def no_payload_checksum(patch: pytest.MonkeyPatch) -> None:
    def is_intact(payload: bytes | memoryview, header: FrameHeader) -> bool:
        return len(payload) == header.payload_size

    patch.setattr(segments, "is_intact", is_intact)


def no_chain(patch: pytest.MonkeyPatch) -> None:
    def continues(header: FrameHeader, revision: int, chain: int) -> bool:
        return header.first_revision == revision + 1

    patch.setattr(segments, "_continues", continues)


def truncate_always(patch: pytest.MonkeyPatch) -> None:
    def judge_end(reader: SegmentReader, walk: SegmentWalk, watermark: object) -> int:
        return reader.data_end(walk.tail.offset) - walk.tail.offset

    patch.setattr(recovery, "_judge_end", judge_end)


def truncate_what_is_last(patch: pytest.MonkeyPatch) -> None:
    def is_torn(reader: SegmentReader, walk: SegmentWalk, data_end: int) -> bool:
        return True

    patch.setattr(recovery, "_is_torn", is_torn)


def no_size_check(patch: pytest.MonkeyPatch) -> None:
    def check_size(reader: SegmentReader, head: object, tail: object) -> None:
        pass

    patch.setattr(recovery, "_check_size", check_size)


@pytest.mark.parametrize(
    ("mistake", "checker"),
    [
        (no_header_checksum, "flips"),
        (no_payload_checksum, "flips"),
        (no_chain, "stale"),
        (truncate_always, "flips"),
        (truncate_what_is_last, "last"),
        (no_size_check, "cuts"),
    ],
)
def test_known_mistakes_are_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mistake: Callable[[pytest.MonkeyPatch], None],
    checker: str,
) -> None:
    victim = make_victim(tmp_path)
    checkers: dict[str, Callable[[], object]] = {
        "flips": lambda: check_damage(victim, flip_bit, 400, caplog),
        "cuts": lambda: check_damage(victim, cut_file, 100, caplog),
        "stale": lambda: check_stale_frame(tmp_path / "stale"),
        "last": lambda: check_every_flip_in_the_last_frame(victim, caplog),
    }
    mistake(monkeypatch)

    # Believing damaged bytes may end in an assertion here, or anyhow in what parses them.
    with pytest.raises(Exception):  # noqa: B017, PT011
        checkers[checker]()
