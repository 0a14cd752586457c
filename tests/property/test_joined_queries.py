"""A live query over several sources equals the same query run afresh, after every commit.

Random programs of inserts, updates and deletes over three collections run against random queries:
joins of all kinds, sub-queries, unions, groups, windows. `nested_loops` answers them in the
obvious way.

    $ python -m tests.property.test_joined_queries --cases 20000 --seed 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from aidb_ray.expressions import Node, SourceRef, identity
from aidb_ray.query import joined, plan
from aidb_ray.query.answer import Window
from aidb_ray.query.builder import Query
from aidb_ray.query.groups import Groups
from aidb_ray.query.joined import _Side
from aidb_ray.query.operators import Pipeline, RowChange
from aidb_ray.query.outputs import is_row, leaves
from aidb_ray.query.query import UnionAll
from tests.property.deltas import fold
from tests.property.joined_questions import (
    COLLECTIONS,
    VALUES,
    Commit,
    Key,
    Row,
    commits,
    joined_queries,
)
from tests.property.nested_loops import Trace, evaluate_query, tag

SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)
"""Cases are large, and there are many of them when someone asks for it."""

Table = dict[Key, tuple[Row, bool]]


def check(query: Query[Any], program: list[Commit]) -> set[str]:
    """Run one case and return what was in it."""
    pipeline = Pipeline(query)
    tables: dict[str, Table] = {rows.name: {} for rows in COLLECTIONS}
    folded: dict[Any, Any] = {}
    traits = _traits(query)
    before = Trace()
    for revision, commit in enumerate(program, 1):
        deltas = pipeline.advance(_changes(pipeline, commit, revision))

        for (name, key), value in commit.items():
            tables[name].pop(key, None)
            if value is not None:
                tables[name][key] = value
        after = Trace()
        fresh = evaluate_query(query, tables, after)
        assert list(map(tag, pipeline.rows)) == [tag(row) for _key, row in fresh]
        fold(folded, deltas)
        assert {key: tag(row) for key, row in folded.items()} == {
            key: tag(row) for key, row in fresh
        }
        assert all(delta.revision == revision for delta in deltas)
        traits |= _traits_of_step(before, after, tables, fresh)
        before = after
    return traits


def _changes(pipeline: Pipeline[Any], commit: Commit, revision: int) -> list[RowChange]:
    """Return a commit as each input of the query hears of it."""
    return [
        RowChange(one.name, key, value and value[0], revision, synced=not value or value[1])
        for one in pipeline.inputs
        for (name, key), value in commit.items()
        if name == one.source.name
    ]


def _traits(query: Query[Any]) -> set[str]:
    traits = {f"{join.join_type} join" for join in query.joins}
    outputs = query.outputs or ()
    has = {
        "from several sources": len(query.sources) > 1,
        "three sources": len(query.scope) > 2,
        "groups": query.is_grouped,
        "groups over a join": query.is_grouped and query.is_joined,
        "having": query.group_predicate is not None,
        "order": bool(query.ordering),
        "distinct": query.is_distinct,
        "offset": query.skip > 0,
        "limit": query.max_rows is not None,
        "find one": query.is_single,
        "synced": bool(query.reads_synced),
        "object in select": any(isinstance(output, tuple) for _name, output in outputs),
        "whole row in select": any(is_row(node) for node in leaves(outputs)),
    }
    traits |= {name for name, is_so in has.items() if is_so}
    for source in query.scope.values():
        match source:
            case SourceRef():
                pass
            case UnionAll(queries):
                traits.add("union")
                for inner in queries:
                    traits |= _traits(inner)
            case _:
                traits |= {"sub-query"} | _traits(source)
    return traits


def _traits_of_step(
    before: Trace, after: Trace, tables: dict[str, Table], fresh: list[Any]
) -> set[str]:
    traits = {"rows"} if fresh else set[str]()
    if before.pairs - after.pairs:
        traits.add("deletes or moves a joined row")
    if after.ties:
        traits.add("tie at a limit")
    if after.lonely:
        traits.add("row without a partner")
    rows = [row for table in tables.values() for row, _synced in table.values()]
    if any(None in row.values() or len(row) < len(VALUES) for row in rows):
        traits.add("nulls")
    return traits


def run(
    cases: int,
    *,
    number: int | None = None,
    phases: Sequence[Phase] = (Phase.generate, Phase.shrink),
) -> Counter[str]:
    """Try `cases` cases and return how many had what."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=SLOW,
    )
    @given(joined_queries(), commits)
    def law(query: Query[Any], program: list[Commit]) -> None:
        seen.update(check(query, program) | {"cases"})

    (law if number is None else seed(number)(law))()
    return seen


EXPECTED = {
    "distinct",
    "find one",
    "from several sources",
    "full join",
    "groups",
    "groups over a join",
    "having",
    "inner join",
    "left join",
    "limit",
    "object in select",
    "offset",
    "order",
    "right join",
    "row without a partner",
    "rows",
    "sub-query",
    "synced",
    "three sources",
    "union",
    "whole row in select",
}


SHARES = {"deletes or moves a joined row": 0.3, "tie at a limit": 0.3, "nulls": 0.2}


def test_a_live_query_of_several_sources_equals_the_same_query_run_afresh() -> None:
    seen: Counter[str] = Counter()
    for number in range(1, 7):
        # What is seldom may be missing in so few cases.
        seen += run(300, number=number)
        is_enough = all(seen[trait] > least * seen["cases"] for trait, least in SHARES.items())
        if is_enough and seen.keys() >= EXPECTED:
            break

    assert seen.keys() >= EXPECTED
    for trait, least in SHARES.items():
        assert seen[trait] > least * seen["cases"], trait


def _does_nothing(*_args: object) -> None:
    """Stand in for a step that was forgotten."""


def _joins_null(value: Any) -> Any:
    return identity("null" if value is None else value)


def _is_never_true(_term: Node) -> bool:
    return False


MISTAKES: dict[str, tuple[object, str, object]] = {
    "a row that has lost its last partner does not come back": (
        _Side,
        "lose_partner",
        _does_nothing,
    ),
    "pairs stay when their rows part": (_Side, "_part", _does_nothing),
    "null joins null": (joined, "identity", _joins_null),
    "is_null is asked before an outer join": (plan, "_is_true_of_missing", _is_never_true),
    "a window does not fill up": (Window, "_at", _does_nothing),
    "groups keep what has left": (Groups, "_leave", _does_nothing),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_known_mistakes_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])

    with pytest.raises(AssertionError):
        run(2_000, number=1, phases=[Phase.generate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    seen = run(options.cases, number=options.seed)
    cases = seen.pop("cases")
    for trait, found in sorted(seen.items()):
        print(f"{trait:32} {found:6} {found / cases:4.0%}")  # noqa: T201
    seconds = time.perf_counter() - began
    print(f"{cases} cases, 0 differences, {seconds:.0f} s, seed {options.seed}")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
