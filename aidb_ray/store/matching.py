"""Whether an encoded row passes a filter, decoded only when its bytes leave that open. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from aidb_ray.store.changes import Filter

# Text that every JSON encoder writes in one way.
_PLAIN = re.compile(r"[ !#-\[\]-~]*")
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class RowTest:
    """`Filter.where` of encoded rows. A row that is no JSON object passes nothing."""

    __slots__ = ("_probes", "_wanted")

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        found = [_probes(name, allowed) for name, allowed in wanted.where]
        self._probes = [probes for probes in found if probes]

    def accepts(self, value: bytes) -> bool:
        """Whether the row passes."""
        for probes in self._probes:
            for probe in probes:
                if probe in value:
                    break
            else:
                return False
        try:
            return self._wanted.accepts(_decode(value))
        except msgspec.MsgspecError:
            return False

    @property
    def probe(self) -> bytes | None:
        """Bytes that every row which passes contains, None if there are none."""
        for probes in self._probes:
            if len(probes) == 1:
                return probes[0]
        return None


def make_row_test(wanted: Filter) -> RowTest | None:
    """Return the test that rows must pass, None if every row does."""
    return RowTest(wanted) if wanted.where else None


def _probes(name: str, allowed: tuple[str | int | bool, ...]) -> list[bytes]:
    """Return bytes of which a row that passes contains one; none if that cannot be said."""
    if not _PLAIN.fullmatch(name):
        return []
    found: list[bytes] = []
    for value in allowed:
        is_certain = _PLAIN.fullmatch(value) if isinstance(value, str) else isinstance(value, bool)
        if not is_certain:
            return []
        found.append(msgspec.json.encode(name) + b":" + msgspec.json.encode(value))
    return found
