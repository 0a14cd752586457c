"""An answer as someone has it who reads only its deltas."""

from __future__ import annotations

from typing import Any

from aidb_ray.query.operators import Delta
from tests.property.nested_loops import tag


def fold(answer: dict[Any, Any], deltas: list[Delta[Any]]) -> None:
    """Change `answer`, rows by key, as the deltas of one step say; fail if they make no sense."""
    assert len({delta.key for delta in deltas}) == len(deltas)
    ops = [delta.op for delta in deltas]
    assert ops == sorted(ops, key=lambda op: op != "exit")
    for delta in deltas:
        assert (delta.key in answer) == (delta.op != "enter")
        if delta.op == "exit":
            assert tag(answer.pop(delta.key)) == tag(delta.row)
        else:
            assert delta.op == "enter" or tag(answer[delta.key]) != tag(delta.row)
            answer[delta.key] = delta.row
