"""A live query equals the same query run afresh, after every commit.

Random programs of inserts, updates and deletes run against random queries to one source, whose
rows fit badly. `nested_loops` answers them in the obvious way.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aidb_ray.query.builder import Query
from aidb_ray.query.operators import Pipeline, RowChange
from tests.property.deltas import fold
from tests.property.nested_loops import Trace, evaluate_query, tag
from tests.property.questions import FIELD_VALUES, Key, Row, queries, rows

Table = dict[Key, tuple[Row, bool]]
Commit = dict[Key, tuple[Row, bool] | None]

keys = st.tuples(st.sampled_from(["aidb://a/1", "aidb://a/2"]), st.sampled_from("abcdef"))
written = st.tuples(rows, st.booleans())
commits: st.SearchStrategy[list[Commit]] = st.lists(
    st.dictionaries(keys, st.one_of(written, written, written, st.none()), min_size=3, max_size=8),
    min_size=2,
    max_size=8,
)


def test_a_live_query_equals_the_same_query_run_afresh() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None)
    @given(queries(), commits)
    def law(query: Query[Any], program: list[Commit]) -> None:
        pipeline = Pipeline(query)
        table: Table = {}
        folded: dict[Any, Any] = {}
        traits: set[str] = set()
        for revision, commit in enumerate(program, 1):
            traits |= {"deletes"} if any(k in table and not commit[k] for k in commit) else set()
            changes = [
                RowChange("m", key, value and value[0], revision, synced=not value or value[1])
                for key, value in commit.items()
            ]
            for key, value in commit.items():
                table.pop(key, None)
                if value is not None:
                    table[key] = value

            deltas = pipeline.advance(changes)

            trace = Trace()
            found = evaluate_query(query, {"messages": table}, trace)
            fresh = [row for _key, row in found]
            assert list(map(tag, pipeline.rows)) == list(map(tag, fresh))
            fold(folded, deltas)
            assert Counter(map(tag, folded.values())) == Counter(map(tag, fresh))
            assert all(delta.revision == revision for delta in deltas)
            traits |= _traits(query, table, fresh) | ({"tie at a limit"} if trace.ties else set())
        seen.update(traits | {"cases"})

    law()

    cases = seen.pop("cases")
    print({trait: f"{share / cases:.0%}" for trait, share in sorted(seen.items())})  # noqa: T201
    expected = {"deletes", "distinct", "groups", "nulls", "rows", "tie at a limit", "window moves"}
    assert expected <= seen.keys()


def _traits(query: Query[Any], table: Table, fresh: list[Any]) -> set[str]:
    traits = {"rows"} if fresh else set[str]()
    if any(None in row.values() or len(row) < len(FIELD_VALUES) for row, _synced in table.values()):
        traits.add("nulls")
    if fresh and query.is_grouped:
        traits.add("groups")
    if fresh and query.is_distinct:
        traits.add("distinct")
    if fresh and query.window != (0, None):
        traits.add("window moves")
    return traits
