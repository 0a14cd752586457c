"""What of Python's values JSON can hold, and JSON that comes from outside. Pure.

What passes here every reader of JSON can read, and all of them read the same.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn, cast

from aidb_ray.errors import ContractError

MAX_DEPTH = 64
MAX_TEXT_BYTES = 1 << 20
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


def parse_json(text: str | bytes, *, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Return what JSON from outside stands for.

    Costs no more than its text: what is nested too deeply is left where it is noticed.

    Raises:
        ContractError: `payload_too_large`, `invalid_json`; or it is JSON that readers understand
            differently: `too_deep`, `duplicate_json_key`, `invalid_number` (not finite, or an
            integer beyond 64 bits), `invalid_unicode`. `loc` is the place, where there is one.
    """
    if len(text) > max_bytes or (isinstance(text, str) and _size(text) > max_bytes):
        raise _refused(f"It is longer than {max_bytes:,} bytes.", "payload_too_large")
    try:
        # Left to itself the standard library guesses the encoding and lets half characters pass.
        decoded = text if isinstance(text, str) else text.decode()
        value = _decode(decoded)
    except UnicodeDecodeError as error:
        raise _refused(f"It is no UTF-8: {error.reason}.", "invalid_unicode") from None
    except json.JSONDecodeError as error:
        words = f"It is no JSON: {error.msg} at line {error.lineno} column {error.colno}."
        raise _refused(words, "invalid_json") from None
    except RecursionError:
        words = f"It is nested deeper than {MAX_DEPTH} levels."
        raise _refused(words, "too_deep") from None
    except ValueError:
        # Python refuses to read thousands of digits, which takes it quadratic time.
        raise _refused("It has an integer beyond 64 bits.", "invalid_number") from None
    problem = find_problem(value, ())
    if problem is not None:
        code, loc, words = problem
        raise _refused(f"{'.'.join(map(str, loc)) or 'It'} {words}.", code, loc)
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) < len(members):
        names = [name for name, _value in members]
        twice = next(name for name in made if names.count(name) > 1)
        raise _refused(f"The name {twice!r} comes twice in one object.", "duplicate_json_key")
    return made


def _no_number(name: str) -> NoReturn:
    raise _refused(f"{name} is not a finite number.", "invalid_number")


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number).decode


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _refused(words: str, code: str, loc: tuple[str | int, ...] = ()) -> ContractError:
    return ContractError(words, code=code, loc=loc)
