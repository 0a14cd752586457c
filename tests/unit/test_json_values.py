from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray import ContractError
from aidb_ray.json_values import MAX_DEPTH, MAX_TEXT_BYTES, parse_json

DEEP = 50_000

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_is_json_to_everyone_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)

    assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "code", "loc"),
    [
        ("", "invalid_json", ()),
        ('{"a": 1', "invalid_json", ()),
        ("{'a': 1}", "invalid_json", ()),
        ("1 2", "invalid_json", ()),
        (b'"\xff"', "invalid_unicode", ()),
        ('["\ud800"]', "invalid_unicode", (0,)),
        (r'{"a": ["\ud800"]}', "invalid_unicode", ("a", 0)),
        (r'{"\udc00": 1}', "invalid_unicode", ()),
        ('{"a": NaN}', "invalid_number", ()),
        ("-Infinity", "invalid_number", ()),
        ('{"a": [0, 1e999]}', "invalid_number", ("a", 1)),
        (f'{{"a": {1 << 64}}}', "invalid_number", ("a",)),
        ("9" * 5_000, "invalid_number", ()),
        ('{"a": 1, "b": 2, "a": 1}', "duplicate_json_key", ()),
        ('[{"a": {"b": 1, "b": 2}}]', "duplicate_json_key", ()),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "too_deep", (0,) * 8),
        ("[" * DEEP + "]" * DEEP, "too_deep", ()),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "too_deep", ()),
        (" " * (MAX_TEXT_BYTES + 1), "payload_too_large", ()),
        (f'"{"ä" * (MAX_TEXT_BYTES // 2)}"', "payload_too_large", ()),
    ],
    ids=range(20),
)
def test_what_readers_would_understand_differently_is_refused(
    text: str | bytes, code: str, loc: tuple[str | int, ...]
) -> None:
    with pytest.raises(ContractError) as caught:
        parse_json(text)

    assert (caught.value.code, caught.value.loc) == (code, loc)


def test_as_deep_as_allowed_is_read() -> None:
    depth = MAX_DEPTH + 1  # The value itself is no level.

    value = parse_json("[" * depth + "]" * depth)

    assert json.dumps(value) == "[" * depth + "]" * depth


def test_a_text_as_long_as_allowed_is_read() -> None:
    assert len(parse_json(f'"{"a" * (MAX_TEXT_BYTES - 2)}"')) == MAX_TEXT_BYTES - 2


def test_nesting_without_end_costs_neither_time_nor_memory() -> None:
    text = "[" * DEEP + "]" * DEEP
    tracemalloc.start()

    took: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        with pytest.raises(ContractError):
            parse_json(text)
        took.append(time.perf_counter() - began)

    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert min(took) < 0.05
    assert peak < 10 << 20
