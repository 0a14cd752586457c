from __future__ import annotations

from typing import Any

import msgspec
import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.store.changes import Filter
from aidb_ray.store.matching import RowTest, make_row_test

values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["a", "a b", 'q"', "back\\", "\x7f", "é", "", True, False, 0, 1, 2]),
    st.text(max_size=3),
)
wheres = st.lists(
    st.tuples(st.sampled_from(["x", "y", "é"]), st.lists(values, max_size=3).map(tuple)),
    max_size=2,
).map(tuple)
rows = st.dictionaries(st.sampled_from(["x", "y", "é", "z"]), values | st.none())


@given(wheres, rows, st.sampled_from([msgspec.json.encode, pydantic_core.to_json]))
def test_looking_at_bytes_first_gives_the_answer_of_looking_at_fields(
    where: Any, fields: dict[str, Any], encode: Any
) -> None:
    """Oracle: decode the row, and ask the filter."""
    wanted = Filter("rows", where=where)

    assert RowTest(wanted).accepts(encode(fields)) == wanted.accepts(fields)


def test_a_filter_tells_booleans_from_numbers() -> None:
    assert not Filter("rows", where=(("x", (1,)),)).accepts({"x": True})
    assert not Filter("rows", where=(("x", (True,)),)).accepts({"x": 1})
    assert Filter("rows", where=(("x", (1,)),)).accepts({"x": 1.0})


@pytest.mark.parametrize("value", [b"", b"[]", b'{"x":', b"\xff", b'{"x":"a"'])
def test_a_row_that_is_no_json_object_passes_nothing(value: bytes) -> None:
    assert not RowTest(Filter("rows", where=(("x", ("a",)),))).accepts(value)
    assert not RowTest(Filter("rows", where=(("x", (1,)),))).accepts(value)


def test_without_conditions_there_is_no_test() -> None:
    assert make_row_test(Filter("rows", "aidb://a")) is None
