"""A set of names that may say yes by mistake and never no: a Bloom filter that grows. Pure."""

from __future__ import annotations

from hashlib import blake2b

_BITS_PER_NAME = 10
_PROBES = 5
_FIRST_CAPACITY = 1 << 14


class NamePresence:
    """Names that were added; takes about 10 bits a name and errs in about 1 of 100 look-ups."""

    def __init__(self) -> None:
        self._layers: list[bytearray] = []
        self._capacity = _FIRST_CAPACITY // 2
        self._free = 0

    def add(self, name: str) -> None:
        """Add a name. Adding it again costs space."""
        if self._free == 0:
            # Layers double, so that there are few of them whatever the number of names.
            self._capacity = self._free = self._capacity * 2
            self._layers.append(bytearray(self._capacity * _BITS_PER_NAME // 8))
        layer = self._layers[-1]
        self._free -= 1
        at, step = _hashes(name)
        bits = len(layer) * 8
        for _ in range(_PROBES):
            at = (at + step) % bits
            layer[at >> 3] |= 1 << (at & 7)

    def may_contain(self, name: str) -> bool:
        """Return False only if the name was never added."""
        first, step = _hashes(name)
        for layer in self._layers:
            bits = len(layer) * 8
            at = first
            for _ in range(_PROBES):
                at = (at + step) % bits
                if not layer[at >> 3] >> (at & 7) & 1:
                    break
            else:
                return True
        return False


def _hashes(name: str) -> tuple[int, int]:
    digest = blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") | 1
