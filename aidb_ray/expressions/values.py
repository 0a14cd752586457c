"""What values are and how they compare: kinds, instants, numbers, patterns."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from typing import Any
from uuid import UUID

from aidb_ray.errors import QueryError
from aidb_ray.expressions.nodes import Plain


def scalar_of(value: object) -> Plain:
    """Return `value` as plain JSON holds it, or an aware datetime in UTC."""
    if isinstance(value, Enum):
        value = value.value
    match value:
        case None | bool():
            return value
        case str():
            plain = str.__str__(value)
            if not plain.isascii():
                _check_unicode(plain)
            return plain
        case int():
            if -(2**63) <= value < 2**64:
                return int(value)
            raise QueryError("A whole number must fit into 64 bits.", code="invalid_number")
        case float():
            if math.isfinite(value):
                return float(value)
            raise QueryError(f"{value!r} is not a number in JSON.", code="invalid_number")
        case datetime():
            if value.tzinfo is None:
                raise QueryError(f"{value!r} has no time zone.", code="timezone_required")
            return value.astimezone(UTC)
        case UUID():
            return str(value)
        case _:
            raise QueryError(
                f"A {type(value).__name__} cannot be a value in a query: use a string, number, "
                f"boolean, aware datetime, or a list of them.",
                code="invalid_literal",
            )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise QueryError(f"{text!r} has a lone surrogate.", code="invalid_unicode") from None


def instant_of(value: Plain) -> Plain:
    """Return the instant that a string names; any other value as it is.

    Raises:
        QueryError: the string is not ISO 8601 with an offset.
    """
    if not isinstance(value, str):
        return value
    instant = parse_instant(value)
    if instant is None:
        raise QueryError(
            f"{value!r} is compared with an instant but is not ISO 8601 with an offset.",
            code="invalid_instant",
        )
    return instant


def parse_instant(text: str) -> datetime | None:
    """Return the instant that ISO 8601 `text` names, in UTC, or None if it names none."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        return None
    if instant.tzinfo is UTC:
        return instant
    if instant.tzinfo is None:
        return None
    try:
        return instant.astimezone(UTC)
    except OverflowError:
        return None


def identity(value: Any) -> Any:
    """Return something hashable that is equal for values a query takes to be the same.

    1 and 1.0 are the same, 1 and True are not, also inside lists and objects.
    """
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is str or value is None or kind is int or kind is datetime:
        return value
    if kind is bool:
        return ("boolean", value)
    if kind is float:
        return int(value) if value.is_integer() else value
    if kind is list or kind is tuple:
        return ("list", *map(identity, value))
    if kind is dict:
        return ("object", *((name, identity(value[name])) for name in sorted(value)))
    return value


KINDS: Mapping[Any, str] = {
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    datetime: "instant",
    list: "list",
    tuple: "list",
    dict: "object",
}
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def compare(op: str, a: Any, b: Any) -> bool | None:
    """Return whether `op` holds, or None for null and for values of different kinds."""
    kind = KINDS.get(type(a))
    if kind is None or kind != KINDS.get(type(b)):
        return None
    if kind in ("list", "object"):
        return identity(a) == identity(b) if op == "eq" else None
    return _COMPARE[op](a, b)


def member(needle: Any, items: Any) -> bool | None:
    """Return whether `needle` equals one of `items`; None if one of them cannot be compared."""
    if KINDS.get(type(items)) != "list":
        return None
    found: bool | None = False
    for item in items:
        same = compare("eq", needle, item)
        if same:
            return True
        if same is None:
            found = None
    return found


@lru_cache(maxsize=256)
def _like_regex(pattern: str, *, ignore_case: bool) -> re.Pattern[str]:
    """Translate once. A backslash that escapes nothing stands for itself.

    Each `%` but the last is matched as early as possible and never tried again (an atomic
    group), which is enough, and keeps the time linear in text times pattern.
    """
    pieces = [""]
    escaped = False
    for char in pattern:
        if escaped or char not in "%_\\":
            pieces[-1] += re.escape(char)
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "_":
            pieces[-1] += "."
        else:
            pieces.append("")
    if escaped:
        pieces[-1] += re.escape("\\")
    first, *rest = pieces
    middle = "".join(f"(?>.*?{piece})" for piece in rest[:-1])
    last = f".*{rest[-1]}" if rest else ""
    flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
    return re.compile(first + middle + last, flags)


def matches(op: str, text: Any, pattern: Any) -> bool | None:
    """Return whether `text` matches a `like` or `ilike` pattern; None unless both are strings."""
    if type(text) is not str or type(pattern) is not str:
        return None
    return _like_regex(pattern, ignore_case=op == "ilike").fullmatch(text) is not None


def bounded(number: int | float) -> int | float | None:
    """Return `number`, or None if JSON readers could not hold it: 64 bits, or a finite double."""
    if isinstance(number, int):
        return number if -(2**63) <= number < 2**64 else None
    return number if math.isfinite(number) else None


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": lambda a, b: a / b,
}


def arithmetic(op: str, a: Any, b: Any) -> int | float | None:
    """Return `a` `op` `b`, or None unless both are numbers and the result is one."""
    if KINDS.get(type(a)) != "number" or KINDS.get(type(b)) != "number":
        return None
    try:
        return bounded(_ARITHMETIC[op](a, b))
    except (ZeroDivisionError, OverflowError):
        return None


def length_of(value: Any) -> int | None:
    """Return the length of a string or list, None for anything else."""
    return len(value) if KINDS.get(type(value)) in ("string", "list") else None


def text_of(value: Any) -> str:
    """Return `value` as `concat` writes it."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer() and abs(value) < 1e21:
            return str(int(value))
        case int() | float():
            return repr(value)
        case datetime():
            return value.isoformat().replace("+00:00", "Z")
        case _:
            return ""
