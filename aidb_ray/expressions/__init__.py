"""Expressions over rows: written as Python, kept as data, run as closures. Pure.

While a query is written, a `Ref` stands for a row or a field. What is kept is a tree of
`Reference`, `Constant` and `Call`, which compares, hashes, pickles, prints, and crosses processes
as nested lists of JSON values. Nothing here runs code that came from elsewhere.

Rows are plain JSON objects with wire names. Names are checked and translated where they are
written, so a tree carries all that is needed to run it.

Logic is SQL's, with three values. Null, which is also what an absent field reads as, makes a
comparison unknown, and so do two values of different kinds: a row that does not fit is left out
and cannot fail a query. The kinds are boolean, number, string, instant, list and object.
"""

from __future__ import annotations

from aidb_ray.expressions.closures import Test, Value, compile_predicate, compile_value
from aidb_ray.expressions.codec import decode_expression, encode_expression
from aidb_ray.expressions.evaluate import Row, evaluate
from aidb_ray.expressions.lambdas import call_with_refs, predicate
from aidb_ray.expressions.language import (
    Expression,
    Operand,
    Ref,
    add,
    and_,
    as_node,
    as_predicate,
    avg,
    case_when,
    coalesce,
    concat,
    count,
    divide,
    eq,
    gt,
    gte,
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
    min_,
    multiply,
    not_,
    or_,
    subtract,
    sum_,
    synced,
    upper,
)
from aidb_ray.expressions.nodes import (
    MAX_DEPTH,
    MAX_LIST,
    MAX_NODES,
    SYNCED,
    Call,
    Constant,
    Kind,
    Node,
    Reference,
    equalities,
    is_aggregate,
    is_instant,
    references,
    substitute,
    walk,
)
from aidb_ray.expressions.sources import Field, Fields, Migrate, SourceRef
from aidb_ray.expressions.values import identity, parse_instant

__all__ = [
    "MAX_DEPTH",
    "MAX_LIST",
    "MAX_NODES",
    "SYNCED",
    "Call",
    "Constant",
    "Expression",
    "Field",
    "Fields",
    "Kind",
    "Migrate",
    "Node",
    "Operand",
    "Ref",
    "Reference",
    "Row",
    "SourceRef",
    "Test",
    "Value",
    "add",
    "and_",
    "as_node",
    "as_predicate",
    "avg",
    "call_with_refs",
    "case_when",
    "coalesce",
    "compile_predicate",
    "compile_value",
    "concat",
    "count",
    "decode_expression",
    "divide",
    "encode_expression",
    "eq",
    "equalities",
    "evaluate",
    "gt",
    "gte",
    "identity",
    "ilike",
    "in_array",
    "is_aggregate",
    "is_instant",
    "is_null",
    "is_undefined",
    "length",
    "like",
    "lower",
    "lt",
    "lte",
    "max_",
    "min_",
    "multiply",
    "not_",
    "or_",
    "parse_instant",
    "predicate",
    "references",
    "substitute",
    "subtract",
    "sum_",
    "synced",
    "upper",
    "walk",
]
