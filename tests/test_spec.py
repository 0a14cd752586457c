"""The list of what the specification names and promises, `spec.csv`, is complete and true.

Each row of it that is not for later has a test which shows it, and each public name, method and
parameter has a row. In its column `python` a row names what it speaks of: a name, `Class.member`,
or `function(parameter, ...)`; `testing.` stands before what `aidb_ray.testing` has.
"""

from __future__ import annotations

import ast
import csv
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import aidb_ray
from aidb_ray import testing
from aidb_ray.agents.definition import raw_definition
from tests.integration.test_examples import EXAMPLES

ROOT = Path(__file__).parents[1]
COLUMNS = ["source", "section", "name", "python", "status", "what", "example", "test"]

# Of these classes users call methods; the others are values, or seen only through them.
USED = ("Agent", "Collection", "Database", "Effect", "LiveQuery", "Session", "WorkerAgent")
# Public for other parts of the package.
INTERNAL = {
    "Agent": {"actors", "attach", "begin", "detach", "processes", "stream_url"},
    "Collection": {
        *("as_source", "decode_row", "fields", "fields_in", "filter", "in_session"),
        *("patch_of", "patched", "site", "sites"),
    },
    "Database": {
        *("connected", "find_agent", "forget_agent", "forget_effect", "is_local", "keep_agent"),
        *("keep_effect", "partitions", "share_agent", "site_of", "sites_of"),
    },
    "Effect": {"actors", "disconnect"},
    "LiveQuery": set[str](),
    "Session": set[str](),
    "WorkerAgent": set[str](),
}
# Made by the package and not by users, or of no parameters to speak of: their names are enough.
NOT_CALLED = {
    *USED,
    *("AgentDefinition", "EffectStatus", "ProcessInfo", "Ref", "ReplyHandle", "Signal"),
    *("TextAdapter", "Tool", "ToolContext", "Transaction"),
    *("ChunkCollection", "Expression", "GenerateContext", "Query", "QueryRoot"),
    *("GenerationStatus", "ToolCallStatus"),
    *("ChunkContract", "GenerationContract", "ToolCallContract"),
    *("testing.Clock", "testing.Crash", "testing.FakeClock", "testing.LoopClock"),
    *("testing.CallTool", "testing.Expected", "testing.Part", "testing.Player"),
    *("testing.Reply", "testing.Say", "testing.ScriptedModel", "testing.Think"),
}

Row = dict[str, str]


def read_rows() -> list[Row]:
    with (Path(__file__).parent / "spec.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        assert rows.fieldnames == COLUMNS
        return list(rows)


ROWS = read_rows()


# Forward: what a row says is so.


@cache
def functions_of(path: str) -> frozenset[str]:
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    body = ast.parse(file.read_text("utf-8")).body
    return frozenset(
        node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )


def mistakes_of(row: Row) -> Iterator[str]:
    """Yield what is wrong with a row."""
    for column in ("source", "section", "name", "status", "what"):
        if not row[column]:
            yield f"{column} is empty"
    if row["source"] not in ("api", "readme"):
        yield "source is api or readme"
    match row["status"]:
        case "later":
            if row["example"]:
                yield "what comes later has no example"
            if "::" in row["test"] or (row["test"] and (ROOT / row["test"]).exists()):
                yield f"{row['test']} is there, so this is no more for later"
        case "here":
            if not row["python"]:
                yield "python is empty"
            path, _, function = row["test"].partition("::")
            if not function.startswith("test_") or function not in functions_of(path):
                yield f"there is no test {row['test']!r}"
        case other:
            yield f"status is here or later, not {other!r}"
    if row["example"] and Path(row["example"]) not in {
        Path("examples", f"{name}.py") for name in EXAMPLES
    }:
        yield f"{row['example']} is no example that is run"


@pytest.mark.parametrize("source", ["api", "readme"])
def test_what_the_list_says_is_so(source: str) -> None:
    wrong = [
        f"{row['section']}, {row['name']}: {mistake}"
        for row in ROWS
        if row["source"] == source
        for mistake in mistakes_of(row)
    ]
    assert wrong == []


def test_each_row_is_there_once_and_in_its_place() -> None:
    keys = [(row["source"], row["section"], row["name"]) for row in ROWS]

    assert keys == sorted(set(keys))


GOOD = {
    "source": "api",
    "section": "Agents",
    "name": "x",
    "python": "x",
    "status": "here",
    "what": "It is.",
    "example": "examples/01_chat.py",
    "test": "tests/test_spec.py::test_each_row_is_there_once_and_in_its_place",
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"what": ""},
        {"python": ""},
        {"source": "rfc"},
        {"status": "soon"},
        {"status": "later"},
        {"status": "later", "example": ""},
        {"status": "later", "example": "", "test": "tests/test_spec.py"},
        {"status": "later", "test": ""},
        {"test": ""},
        {"test": "tests/test_spec.py"},
        {"test": "tests/test_spec.py::test_nothing"},
        {"test": "tests/test_spec.py::mistakes_of"},
        {"test": "tests/unit/test_nowhere.py::test_what_the_list_says_is_so"},
        {"example": "examples/word_problems.py"},
        {"example": "examples/99_nothing.py"},
    ],
)
def test_a_mistake_in_a_row_is_seen(change: Row) -> None:
    assert list(mistakes_of(GOOD)) == []
    assert list(mistakes_of(GOOD | change))


# Backward: what is public has a row.


def named_in(rows: list[Row]) -> set[str]:
    """Return the names, members and `function(parameter)` that rows speak of."""
    found: set[str] = set()
    for row in rows:
        if row["status"] != "here":
            continue
        name, _, parameters = row["python"].removesuffix(")").partition("(")
        found.add(name)
        found.update(f"{name}({each})" for each in re.split(r",\s*", parameters) if each)
    # A member speaks of its class, too.
    return found | {name.rpartition(".")[0] for name in found if "(" not in name} - {""}


def parameters_of(value: Any) -> list[str]:
    if inspect.isclass(value) and issubclass(value, BaseModel):
        return list(value.model_fields)
    if get_args(value) or not callable(value):
        return []
    return [name for name in inspect.signature(value).parameters if name != "self"]


def surface() -> Iterator[str]:
    """Yield what is public, as rows name it."""
    for module, prefix in ((aidb_ray, ""), (testing, "testing.")):
        for name in module.__all__:
            value = getattr(module, name)
            yield prefix + name
            if prefix + name not in NOT_CALLED:
                yield from (f"{prefix}{name}({each})" for each in parameters_of(value))
    for name in USED:
        kind: Any = getattr(aidb_ray, name)
        members: dict[str, Any] = {**vars(kind)}
        for member, value in members.items():
            if member.startswith("_") or member in INTERNAL[name]:
                continue
            yield f"{name}.{member}"
            if inspect.isfunction(value):
                yield from (f"{name}.{member}({each})" for each in parameters_of(value))
    for name in ("messages", "generations"):
        yield f"Session.{name}"
    yield from (f"ScriptedModel({each})" for each in parameters_of(testing.ScriptedModel))
    yield from ("Transaction.revision", "Transaction.mutations")
    yield from (
        "ReplyHandle.reply(timeout_ms)",
        "ToolContext.step(name)",
        "ToolContext.ask(schema)",
    )


def test_all_that_is_public_has_a_row() -> None:
    named = named_in(ROWS)

    assert [each for each in surface() if each not in named] == []


@pytest.mark.parametrize(
    "forgotten",
    [
        "connect(replicas)",
        "testing.crash_at(hit)",
        "Collection.update(when)",
        "Agent.drain_until_idle(headroom_ms)",
        "ToolCall(late_result)",
        "RunCancelledError(reason)",
        "Session.steps",
    ],
)
def test_what_is_forgotten_is_seen(forgotten: str) -> None:
    assert forgotten in set(surface())
    name, _, parameter = forgotten.removesuffix(")").partition("(")
    rest = [
        row
        for row in ROWS
        if row["python"].partition("(")[0] != name or parameter not in row["python"]
    ]
    assert forgotten in named_in(ROWS)
    assert forgotten not in named_in(rest)


def test_no_row_names_what_is_not_there() -> None:
    """A row that names a function or method and its parameters names what it has."""
    wrong: list[str] = []
    for each in sorted(named_in(ROWS)):
        name, _, parameter = each.removesuffix(")").partition("(")
        module, prefix = (testing, "testing.") if name.startswith("testing.") else (aidb_ray, "")
        head, _, member = name.removeprefix(prefix).partition(".")
        if not parameter or name in NOT_CALLED or head not in module.__all__:
            continue
        value = getattr(module, head)
        known = parameters_of(getattr(value, member) if member else value)
        if name == "create_agent":
            known += parameters_of(raw_definition)
        if parameter not in known:
            wrong.append(each)
    assert wrong == []
