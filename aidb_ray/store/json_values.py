"""What of Python's values JSON can hold, and what every reader of JSON can read again. Pure."""

from __future__ import annotations

from typing import cast

MAX_DEPTH = 64
_LEAST_INT, _GREATEST_INT = -(1 << 63), (1 << 64) - 1


def find_problem(
    value: object, loc: tuple[str | int, ...], depth: int = 0
) -> tuple[str, tuple[str | int, ...], str] | None:
    """Return code, place and words of the first thing that JSON cannot hold, if any."""
    if depth > MAX_DEPTH:
        return "too_deep", loc[:8], f"is nested deeper than {MAX_DEPTH} levels"
    match value:
        case None | bool():
            return None
        case str():
            return None if is_unicode(value) else _half_a_pair(loc)
        case int():
            if _LEAST_INT <= value <= _GREATEST_INT:
                return None
            return "invalid_number", loc, "is an integer beyond 64 bits"
        case float():
            if value - value == 0:
                return None
            return "invalid_number", loc, "is not a finite number"
        case dict():
            for name, item in cast("dict[object, object]", value).items():
                if not isinstance(name, str):
                    return "not_serializable", loc, f"has the key {name!r}, which is no string"
                if not is_unicode(name):
                    return _half_a_pair(loc)
                problem = find_problem(item, (*loc, name), depth + 1)
                if problem is not None:
                    return problem
            return None
        case list() | tuple():
            for index, item in enumerate(cast("list[object]", value)):
                problem = find_problem(item, (*loc, index), depth + 1)
                if problem is not None:
                    return problem
            return None
        case _:
            return "not_serializable", loc, f"is a {type(value).__name__}, which JSON cannot hold"


def _half_a_pair(loc: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...], str]:
    return "invalid_unicode", loc, "holds half of a surrogate pair"


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no bytes could hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
