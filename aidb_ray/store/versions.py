"""Which version of its collection's schema a stored row has. Pure.

A row of version 1 is stored as it is, so declaring a version changes no row that is there. Later
ones begin with a field of their own, which no row of a user may have.
"""

from __future__ import annotations

import re

VERSION_FIELD = "~v"
MARK = b'{"~v":'
"""How stored rows begin that bear a version; others do hardly ever."""

_STAMP = re.compile(rb'\{"~v":([1-9][0-9]{0,8}),')


def stamp(row: bytes, version: int) -> bytes:
    """Return a row's JSON, which is no empty object, with its version, as it is stored."""
    return row if version == 1 else b"%b%d,%b" % (MARK, version, row[1:])


def unstamp(stored: bytes) -> tuple[int, bytes]:
    """Return the version of a stored row, and its JSON without it."""
    found = _STAMP.match(stored)
    if found is None:
        return 1, stored
    return int(found[1]), b"{" + stored[found.end() :]
