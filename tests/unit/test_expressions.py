from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.errors import QueryError
from aidb_ray.expressions import (
    MAX_DEPTH,
    MAX_LIST,
    MAX_NODES,
    Constant,
    Expression,
    Field,
    Ref,
    Reference,
    add,
    and_,
    as_node,
    as_predicate,
    case_when,
    coalesce,
    compile_predicate,
    compile_value,
    concat,
    count,
    decode_expression,
    divide,
    encode_expression,
    eq,
    equalities,
    evaluate,
    gt,
    gte,
    identity,
    ilike,
    in_array,
    is_null,
    is_undefined,
    length,
    like,
    lower,
    lt,
    lte,
    max_,
    multiply,
    not_,
    or_,
    predicate,
    references,
    substitute,
    subtract,
    sum_,
    synced,
    upper,
)
from tests.property.questions import FIELDS, M, Row, conditions, patterns, rows, scalars

ANY = Ref(Reference("m", ()), None)
"""A row of a source without a schema."""

# Untyped, as they come from users without a type checker.
NULL: Any = None
TRUTH: Any = True
LISTS: Any = [[1]]
REFS: Any = [ANY.n]


def value_of(expression: Expression, row: Row) -> Any:
    """Compute both ways, which must agree also in kind."""
    node = as_node(expression)
    result = evaluate(node, {"m": row})
    for compiled in (compile_value(node)(row), compile_value(node, joined=True)({"m": row})):
        assert (type(compiled), compiled) == (type(result), result)
    return result


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(QueryError) as caught:
        make()
    return caught.value.code


@given(conditions, rows, st.booleans())
def test_a_compiled_predicate_is_true_exactly_where_the_definition_is(
    condition: Expression, row: Row, is_synced: Any
) -> None:
    row = row if is_synced else {**row, "$synced": False}
    node = as_node(condition)

    expected = evaluate(node, {"m": row})

    assert compile_predicate(node)(row) is (expected is True)
    assert compile_predicate(node, joined=True)({"m": row}) is (expected is True)
    assert compile_predicate(as_node(~condition))(row) is (expected is False)
    assert compile_value(node)(row) is expected


@given(scalars, rows)
def test_a_compiled_value_is_the_defined_one(value: Expression, row: Row) -> None:
    value_of(value, row)


@given(conditions)
def test_a_missing_row_reads_as_nulls(condition: Expression) -> None:
    """As after an outer join. A row that is not there counts as synced."""
    node = as_node(condition)

    expected = evaluate(node, {"m": None})

    assert compile_value(node, joined=True)({"m": None}) is expected


@given(conditions | scalars)
def test_an_expression_comes_back_from_json(expression: Expression) -> None:
    node = as_node(expression)

    decoded = decode_expression(json.loads(json.dumps(encode_expression(node))))

    assert decoded == node
    assert hash(decoded) == hash(node)
    assert pickle.loads(pickle.dumps(node)) == node


@given(conditions, conditions, rows)
def test_rows_that_meet_a_condition_have_the_values_it_allows(
    first: Expression, second: Expression, row: Row
) -> None:
    node = as_node(first & second)

    if compile_predicate(node)(row):
        assert all(row[name] in allowed for name, allowed in equalities(node).items())


UNKNOWN = eq(ANY.absent, 1)
TRUE = eq(ANY.one, 1)
FALSE = eq(ANY.one, 2)
ONE = {"one": 1}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (and_(TRUE, UNKNOWN), None),
        (and_(FALSE, UNKNOWN), False),
        (and_(UNKNOWN, FALSE), False),
        (or_(TRUE, UNKNOWN), True),
        (or_(UNKNOWN, TRUE), True),
        (or_(FALSE, UNKNOWN), None),
        (not_(UNKNOWN), None),
        (not_(TRUE), False),
        (TRUE & ~FALSE, True),
        (FALSE | UNKNOWN, None),
        (ANY.one != 1, False),
        (ANY.absent != 1, None),
    ],
)
def test_unknown_is_neither_true_nor_false(condition: Expression, expected: Any) -> None:
    assert value_of(condition, ONE) is expected


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (1, 1.0, True),
        (1, True, None),
        ("1", 1, None),
        (None, 1, None),
        (None, None, None),
        ([1, {"a": 2}], [1.0, {"a": 2}], True),
        ([1], [True], False),
        ({"a": 1}, [1], None),
        ({"a": 1}, {"a": 1}, True),
    ],
)
def test_only_values_of_one_kind_are_compared(left: Any, right: Any, expected: Any) -> None:
    assert value_of(eq(ANY.a, ANY.b), {"a": left, "b": right}) is expected


INSTANT = "2026-01-01T00:00:00Z"
CONSTANTS: list[Any] = [True, False, 0, 1, 1.0, 0.5, -1, "1", "", INSTANT]
VALUES: list[Any] = [*CONSTANTS, None, 2, "2", [], [1], {}, "2026-01-01T01:00:00+01:00"]


@pytest.mark.parametrize("op", [eq, gt, gte, lt, lte])
@pytest.mark.parametrize("field", [ANY.a, M.done, M.args.a], ids=str)
def test_a_comparison_with_a_constant_is_as_defined(op: Any, field: Ref) -> None:
    """Every kind of constant has a closure of its own."""
    for constant in CONSTANTS:
        for condition in (op(field, constant), ~op(field, constant), op(constant, field)):
            node = as_node(condition)
            test = compile_predicate(node)
            for value in VALUES:
                row = {"a": value, "done": value, "args": {"a": value}}
                assert test(row) is (evaluate(node, {"m": row}) is True)


@pytest.mark.parametrize("op", [eq, gt, gte, lt, lte])
def test_a_comparison_with_an_instant_is_as_defined(op: Any) -> None:
    for condition in (op(M.created_at, INSTANT), ~op(M.created_at, INSTANT)):
        test = compile_predicate(as_node(condition))
        for value in [*VALUES, "2026-01-01T00:00:00.1Z", "2025-12-31T23:59:59Z"]:
            row = {"createdAt": value}
            assert test(row) is (evaluate(as_node(condition), {"m": row}) is True)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_field_alone_is_a_condition_and_only_a_boolean_is_true_or_false(value: Any) -> None:
    row = {"done": value, **ONE}
    known = value if isinstance(value, bool) else None

    assert compile_predicate(as_node(M.done))(row) is (known is True)
    assert compile_predicate(as_node(~M.done))(row) is (known is False)
    assert value_of(and_(M.done, TRUE), row) is known
    assert value_of(or_(M.done, FALSE), row) is known
    assert value_of(not_(M.done), row) is (None if known is None else not known)


def test_lists_and_objects_have_no_order() -> None:
    assert value_of(gt(ANY.a, ANY.b), {"a": [2], "b": [1]}) is None
    assert value_of(lt(ANY.a, 3), {"a": {"b": 1}}) is None


def test_null_is_present_and_an_absent_field_is_both_null_and_undefined() -> None:
    assert [value_of(is_null(ANY.a), row) for row in ({}, {"a": None}, {"a": 0})] == [1, 1, 0]
    assert [value_of(is_undefined(ANY.a), row) for row in ({}, {"a": None}, {"a": 0})] == [1, 0, 0]
    assert value_of(is_undefined(ANY.a.b), {"a": 1}) is True
    assert value_of(is_undefined(ANY), {"a": 1}) is False


def test_instants_compare_by_time_and_not_as_text() -> None:
    early, late = "2026-01-01T00:00:29Z", "2026-01-01T00:00:29.5Z"
    assert late < early, "the texts order the other way"

    node = as_node(lt(M.created_at, late))

    assert compile_predicate(node)({"createdAt": early}) is True
    assert value_of(eq(M.created_at, "2026-01-01T01:00:29+01:00"), {"createdAt": early}) is True


def test_an_aware_datetime_makes_a_field_without_schema_an_instant() -> None:
    noon = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=1)))

    assert value_of(gte(ANY.at, noon), {"at": "2026-01-01T11:00:00Z"}) is True
    assert value_of(in_array(ANY.at, [noon]), {"at": "2026-01-01T11:00:00.000Z"}) is True


@pytest.mark.parametrize("text", ["yesterday", "2026-01-01T00:00:00", "", "2026-13-01T00:00:00Z"])
def test_what_is_no_instant_is_of_another_kind(text: str) -> None:
    row = {"createdAt": text}

    assert value_of(gt(M.created_at, "2026-01-01T00:00:00Z"), row) is None
    assert value_of(M.created_at, row) == text
    assert refused(lambda: eq(M.created_at, text)) == "invalid_instant"


def test_the_ends_of_time_are_no_instants() -> None:
    assert value_of(M.created_at, {"createdAt": "0001-01-01T00:00:00+14:00"}).startswith("0001")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (add(ANY.two, 3), 5),
        (2 - ANY.two, 0),
        (ANY.two * 1.5, 3.0),
        (ANY.two / 4, 0.5),
        (10 / ANY.two, 5.0),
        (1 + ANY.two, 3),
        (3 * ANY.two, 6),
        (subtract(ANY.two, ANY.absent), None),
        (divide(ANY.two, 0), None),
        (add(ANY.yes, 1), None),
        (multiply(ANY.big, ANY.big), None),
        (multiply(ANY.huge, 1e10), None),
        (add(ANY.text, "x"), None),
        (upper(ANY.text), "ÄB%"),
        (lower(upper(ANY.text)), "äb%"),
        (upper(ANY.two), None),
        (length(ANY.text), 3),
        (length(ANY.items), 2),
        (length(ANY.two), None),
        (concat(ANY.text, 1, ANY.absent, TRUTH, 2.0, 0.5), "äb%1true20.5"),
        (coalesce(ANY.absent, ANY.none, 7, 8), 7),
        (coalesce(ANY.absent), None),
        (case_when(gt(ANY.two, 5), "many", gt(ANY.two, 1), "some", "none"), "some"),
        (case_when(gt(ANY.two, 5), "many", "few"), "few"),
        (case_when(gt(ANY.absent, 5), "many"), None),
    ],
)
def test_functions(expression: Expression, expected: Any) -> None:
    row = {
        "two": 2,
        "text": "äb%",
        "items": [1, 2],
        "yes": True,
        "none": None,
        "big": 2**63,
        "huge": 1e300,
    }

    assert value_of(expression, row) == expected


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("a%", ["a", "abc", "a\n"], ["ba", "", "A"]),
        ("%a", ["a", "ba"], ["ab"]),
        ("%a%b%", ["ab", "xaxbx", "aab"], ["ba", "a"]),
        ("a_c", ["abc", "a%c", "a\nc"], ["ac", "abbc"]),
        (r"100\%", ["100%"], ["1000", "100\\"]),
        (r"a\_b", ["a_b"], ["axb"]),
        ("a\\", ["a\\"], ["a"]),
        ("a.c*", ["a.c*"], ["abc", "a.cc"]),
        ("", [""], ["a"]),
        ("%", ["", "a\nb"], []),
        ("%ab%ab", ["abab", "xabyab"], ["ab", "aba"]),
    ],
)
def test_like_patterns(pattern: str, matching: list[str], other: list[str]) -> None:
    assert [
        text for text in [*matching, *other] if value_of(like(ANY.a, pattern), {"a": text})
    ] == (matching)


@given(st.text("ab%_\\W", max_size=8), st.text("abW", max_size=8) | patterns)
def test_like_agrees_with_a_search_of_all_ways_to_match(pattern: str, text: str) -> None:
    def ways(p: int, t: int) -> bool:
        if p == len(pattern):
            return t == len(text)
        char = pattern[p]
        if char == "%":
            return any(ways(p + 1, later) for later in range(t, len(text) + 1))
        if char == "\\" and p + 1 < len(pattern):
            p, char = p + 1, pattern[p + 1]
        elif char == "_":
            return t < len(text) and ways(p + 1, t + 1)
        return t < len(text) and text[t] == char and ways(p + 1, t + 1)

    assert value_of(like(ANY.a, pattern), {"a": text}) is ways(0, 0)


def test_a_hostile_pattern_takes_linear_time() -> None:
    test = compile_predicate(as_node(like(ANY.a, "%a" * 30 + "b")))

    began = time.process_time()
    assert test({"a": "a" * 5_000}) is False

    assert time.process_time() - began < 1


def test_ilike_takes_letters_in_both_cases_and_a_pattern_may_be_a_field() -> None:
    assert value_of(ilike(ANY.a, "WRI%É"), {"a": "writer é"}) is True
    assert value_of(like(ANY.a, ANY.b), {"a": "abc", "b": "a%"}) is True
    assert value_of(like(ANY.a, ANY.b), {"a": "abc", "b": 1}) is None


@pytest.mark.parametrize(
    ("needle", "items", "expected"),
    [
        ("x", ["x", 1], True),
        ("y", ["x"], False),
        ("y", ["x", 1], None),
        (True, [1], None),
        (1, [1.0], True),
        (None, ["x"], None),
        ("x", [], False),
        ("x", "xyz", None),
        ("x", None, None),
    ],
)
def test_in_array_is_as_many_comparisons(needle: Any, items: Any, expected: Any) -> None:
    row = {"a": needle, "items": items}

    assert value_of(in_array(ANY.a, ANY["items"]), row) is expected
    if isinstance(items, list):
        written = in_array(ANY.a, cast("list[Any]", items))
        assert value_of(written, row) is expected
        assert compile_predicate(as_node(written))(row) is (expected is True)


def test_nested_paths_read_objects_and_nothing_else() -> None:
    test = compile_predicate(as_node(eq(M.args.city.name, "Oslo")))

    assert test({"args": {"city": {"name": "Oslo"}}}) is True
    assert not any(map(test, [{}, {"args": None}, {"args": "x"}, {"args": {"city": ["name"]}}]))


def test_a_row_that_does_not_say_is_synced() -> None:
    test = compile_predicate(as_node(synced(M)))

    assert [test({}), test({"$synced": True}), test({"$synced": False})] == [True, True, False]


def test_operators_are_the_functions() -> None:
    pairs = [
        (ANY.n == 1, eq(ANY.n, 1)),
        (ANY.n != 1, not_(eq(ANY.n, 1))),
        (ANY.n > 1, gt(ANY.n, 1)),
        (ANY.n >= 1, gte(ANY.n, 1)),
        ((~ANY.done) & (ANY.n < 3), and_(not_(ANY.done), lt(ANY.n, 3))),
        (ANY.a | ANY.b, or_(ANY.a, ANY.b)),
        (ANY.n + 1, add(ANY.n, 1)),
        (~~ANY.done, ANY.done),
    ]

    for written, called in pairs:
        assert as_node(written) == as_node(called)
        assert hash(written) == hash(called)


@pytest.mark.parametrize(
    "use",
    [
        lambda: bool(eq(ANY.n, 1)),
        lambda: 1 < ANY.n < 3,
        lambda: eq(ANY.n, 1) and eq(ANY.m, 1),
        lambda: not ANY.done,
    ],
)
def test_an_expression_has_no_truth_and_says_what_to_write(use: Callable[[], object]) -> None:
    with pytest.raises(QueryError, match=r"&, \| and ~") as caught:
        use()
    assert caught.value.code == "no_truth_value"


def test_python_in_and_iteration_are_refused() -> None:
    with pytest.raises(QueryError, match="in_array"):
        assert "x" in ANY.tags
    assert refused(lambda: list(ANY.tags)) == "not_iterable"


def test_a_wrong_name_is_refused_where_it_is_written_and_the_right_one_named() -> None:
    with pytest.raises(QueryError, match="Did you mean 'target_agent'") as caught:
        _ = M.target_agnt
    assert caught.value.code == "unknown_field"
    with pytest.raises(QueryError, match="Did you mean 'target_agent'"):
        _ = M["targetAgent"]
    assert refused(lambda: M.created_at.year) == "unknown_field"
    assert refused(lambda: ANY[0]) == "unknown_field"  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttributeError):
        _ = ANY._repr_html_


def test_names_are_translated_at_every_level_that_has_a_schema() -> None:
    nested = Field("usage", fields={"input_tokens": Field("inputTokens"), "raw": Field("raw")})
    ref = Ref(Reference("m", ()), {"usage": nested})

    assert as_node(ref.usage.input_tokens) == Reference("m", ("usage", "inputTokens"))
    assert as_node(ref.usage.raw.any_thing) == Reference("m", ("usage", "raw", "any_thing"))
    assert refused(lambda: ref.usage.output_tokens) == "unknown_field"


class Status(StrEnum):
    PENDING = "pending"


def test_literals_become_plain_json() -> None:
    key = UUID(int=7)

    assert as_node(Status.PENDING) == Constant("pending")
    assert type(getattr(as_node(Status.PENDING), "value")) is str  # noqa: B009
    assert as_node(key) == Constant(str(key))
    assert as_node({"b", "a", "c"}) == Constant(("a", "b", "c"))
    assert Constant(1) != Constant(TRUTH)
    assert Constant((1,)) != Constant((1.0,))


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: eq(ANY.n, NULL), "null_comparison"),
        (lambda: ANY.n == None, "null_comparison"),  # noqa: E711
        (lambda: gt(NULL, ANY.n), "null_comparison"),
        (lambda: in_array(ANY.n, [1, NULL]), "null_comparison"),
        (lambda: in_array(ANY.n, "abc"), "invalid_expression"),
        (lambda: eq(ANY.n, datetime(2026, 1, 1)), "timezone_required"),  # noqa: DTZ001
        (lambda: eq(ANY.n, float("nan")), "invalid_number"),
        (lambda: eq(ANY.n, 2**64), "invalid_number"),
        (lambda: eq(ANY.n, "\ud800"), "invalid_unicode"),
        (lambda: eq(ANY.n, b"x"), "invalid_literal"),
        (lambda: eq(ANY.n, LISTS), "invalid_literal"),
        (lambda: eq(ANY.n, REFS), "invalid_literal"),
        (lambda: in_array(ANY.n, range(MAX_LIST + 1)), "invalid_literal"),
        (lambda: in_array(ANY.n, [1] * (MAX_LIST + 1)), "too_large"),
        (lambda: eq(ANY, 1), "invalid_expression"),
        (lambda: and_(), "invalid_expression"),
        (lambda: and_(eq(ANY.n, 1), TRUTH), "unknown_field"),
        (lambda: not_(upper(ANY.n)), "unknown_field"),
        (lambda: as_predicate(ANY), "unknown_field"),
        (lambda: sum_(max_(ANY.n)), "aggregate_not_allowed"),
        (lambda: synced(ANY.n), "invalid_expression"),
        (lambda: is_undefined(upper(ANY.n)), "invalid_expression"),
        (lambda: compile_value(as_node(count())), "aggregate_not_allowed"),
        (lambda: evaluate(as_node(count()), {}), "aggregate_not_allowed"),
    ],
)
def test_what_cannot_mean_anything_is_refused(make: Callable[[], object], code: str) -> None:
    assert refused(make) == code


def test_comparing_with_null_points_to_is_null() -> None:
    with pytest.raises(QueryError, match=r"is_null\(m\.n\)"):
        eq(ANY.n, NULL)


def test_a_long_chain_stays_shallow_and_an_endless_one_is_refused() -> None:
    chain = eq(ANY.n, 0)
    for number in range(100):
        chain = chain | eq(ANY.n, number)
    assert as_node(chain).depth == 3

    def endless() -> None:
        longer = chain
        for number in range(MAX_NODES):
            longer = longer | eq(ANY.n, number)

    def deep() -> None:
        value: Expression = ANY.n
        for _ in range(MAX_DEPTH):
            value = value + 1

    assert refused(endless) == "too_large"
    assert refused(deep) == "too_deep"


def test_nested_comparisons_are_computed_once_each() -> None:
    """Otherwise sixty levels would take 2**60 steps."""
    value: Expression = ANY.a
    for _ in range(MAX_DEPTH - 2):
        value = eq(value, ANY.a)

    assert compile_predicate(as_node(value))({"a": True}) is True
    assert evaluate(as_node(value), {"m": {"a": True}}) is True


def nest(levels: int) -> list[Any]:
    data: list[Any] = ["value", True]
    for _ in range(levels):
        data = ["call", "not", [data]]
    return data


JUNK: list[tuple[Any, str]] = [
    (None, "invalid_expression"),
    ("eq", "invalid_expression"),
    ([], "invalid_expression"),
    (["call", "eval", [["value", "1"]]], "unknown_operation"),
    (["call", "eq", [["value", 1]]], "invalid_expression"),
    (["call", "eq", "ab"], "invalid_expression"),
    (["ref", "m", "abc", "other"], "invalid_expression"),
    (["ref", "m", [1], "other"], "invalid_expression"),
    (["ref", "m", ["a"], "code"], "invalid_expression"),
    (["ref", "m", ["a"] * (MAX_DEPTH + 1), "other"], "invalid_expression"),
    (["value", {"a": 1}], "invalid_expression"),
    (["value", float("inf")], "invalid_number"),
    (["instant", "yesterday"], "invalid_instant"),
    (["list", [["list", []]]], "invalid_expression"),
    (["list", [["value", 1]] * (MAX_LIST + 1)], "too_large"),
    (nest(MAX_DEPTH + 1), "too_deep"),
    (nest(20_000), "too_deep"),
    (["call", "and", [["value", True]] * (MAX_NODES + 1)], "too_large"),
    (["call", "and", [["call", "and", [["value", 1]] * 900]] * 900], "too_large"),
]


@pytest.mark.parametrize(
    ("data", "code"),
    JUNK,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_junk_from_another_process_is_refused(data: object, code: str) -> None:
    assert refused(lambda: decode_expression(data)) == code


def test_a_condition_on_one_row_may_call_it_anything() -> None:
    assert predicate(lambda row: eq(row.done, True), FIELDS) == as_node(
        eq(Ref(Reference("row", ()), FIELDS).done, True)
    )


def test_parameters_with_defaults_are_not_aliases() -> None:
    made = [predicate(lambda m, name=name: eq(m.a, name)) for name in ("x", "y")]

    assert made == [as_node(eq(ANY.a, name)) for name in ("x", "y")]


async def _coroutine(m: Ref) -> Expression:
    return eq(m.a, 1)


def _star(*rows: Ref) -> Expression:
    return eq(rows[0].a, 1)


def _double_star(**rows: Ref) -> Expression:
    return eq(rows["m"].a, 1)


def _two(m: Ref, u: Ref) -> Expression:
    return eq(m.a, u.a)


@pytest.mark.parametrize(
    "fn",
    [_star, _double_star, _two, _coroutine, partial(_two, u=ANY), lambda: eq(ANY.a, 1), len, "m.a"],
)
def test_only_plain_functions_of_rows_are_called(fn: Any) -> None:
    assert refused(lambda: predicate(fn)) == "invalid_lambda"


def test_a_function_is_called_once() -> None:
    calls: list[str] = []

    def condition(m: Ref) -> Expression:
        calls.append("called")
        return eq(m.a, 1)

    predicate(condition)

    assert calls == ["called"]


def test_equalities_are_read_off_terms_that_must_hold() -> None:
    node = as_node(
        and_(
            eq(M.target_agent, "writer"),
            in_array(M.n, [1, 2]),
            gt(M.n, 1),
            in_array(M.n, [2, 3]),
            ~M.done,
            eq(M.created_at, "2026-01-01T00:00:00Z"),
            eq(M.args.n, 1),
            or_(eq(M.n, 1), eq(M.n, 2)),
            synced(M),
        )
    )

    assert equalities(node) == {
        "targetAgent": frozenset({"writer"}),
        "n": frozenset({2}),
        "done": frozenset({False}),
    }
    assert equalities(node, "u") == {}
    assert equalities(as_node(M.done)) == {"done": frozenset({True})}
    assert equalities(as_node(eq(M.n, 0.5))) == {}
    assert equalities(as_node(in_array(M.n, [1, 0.5]))) == {}
    assert equalities(as_node(or_(eq(M.n, 1), eq(M.target_agent, "writer")))) == {}
    assert equalities(as_node(eq("writer", M.target_agent))) == {
        "targetAgent": frozenset({"writer"})
    }


def test_references_and_substitution() -> None:
    node = as_node(and_(gt(M.n, 1), eq(M.args.n, M.n)))
    n = Reference("m", ("n",))

    assert references(node) == {n, Reference("m", ("args", "n"))}
    assert references(substitute(node, {n: Constant(1)})) == {Reference("m", ("args", "n"))}


def test_expressions_print_as_they_read() -> None:
    text = str(and_(eq(M.target_agent, "writer"), or_(~M.done, gt(M.n + 1, 3)), is_null(M.args)))

    assert text == (
        "(m.targetAgent = 'writer') and (not(m.done) or ((m.n + 1) > 3)) and is_null(m.args)"
    )
    assert repr(M.n) == "<Ref m.n>"
    assert str(in_array(M.n, [1, True])) == "m.n in [1, true]"
    instant = gt(M.created_at, "2026-01-01T00:00:00Z")
    assert str(instant) == "m.createdAt > 2026-01-01T00:00:00+00:00"


def test_identities_tell_kinds_apart_and_numbers_together() -> None:
    now = datetime.now(UTC)
    values = [None, True, 1, 0.5, "1", now, [1], {"a": 1}, [], {}, [True], {"a": None}]

    assert len({identity(value) for value in values}) == len(values)
    assert identity([1.0, {"b": 2, "a": True}]) == identity([1, {"a": True, "b": 2.0}])
