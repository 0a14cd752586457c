from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from pydantic import BaseModel

from aidb_ray.agents.agent import create_agent
from aidb_ray.agents.definition import (
    AgentDefinition,
    History,
    Retry,
    UsageLimits,
    durable_agent,
    raw_definition,
)
from aidb_ray.errors import ConfigError, QueryError
from aidb_ray.expressions import eq
from aidb_ray.models.signatures import Signature
from aidb_ray.models.tools import Tool, declare_tool, tool
from aidb_ray.query.builder import QueryRoot
from aidb_ray.store.collection import Collection
from aidb_ray.testing import ScriptedModel


class Model(ScriptedModel):
    """A model that says which one it is."""

    def __init__(self, name: str) -> None:
        super().__init__([])
        self._name = name

    def fingerprint(self) -> str:
        return self._name


def make_tool(name: str = "add", **options: Any) -> Tool:
    async def add(a: int) -> int:
        """Add."""
        return a

    return tool(name=name, **options)(add)


def define(**options: Any) -> AgentDefinition:
    given: dict[str, Any] = {"name": "echo", "adapter": Model("a"), **options}
    return durable_agent(**given)


class Out(BaseModel):
    value: int


class Args(BaseModel):
    a: int


def without_implementation() -> Tool:
    return Tool(name="add", description="", signature=Signature("add", model=Args), function=None)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": ""}, "invalid_name"),
        ({"name": "a b"}, "invalid_name"),
        ({"name": "a/b"}, "invalid_name"),
        ({"name": "a*"}, "invalid_name"),
        ({"name": "x" * 600}, "invalid_name"),
        ({"tools": [make_tool(), make_tool()]}, "duplicate_tool"),
        ({"tools": [without_implementation()]}, "missing_implementation"),
        ({"tools": [print]}, "not_a_tool"),
        ({"adapter": None}, "invalid_adapter"),
        ({"adapter": "gpt-4o"}, "invalid_adapter"),
        ({"adapter": object()}, "invalid_adapter"),
        ({"adapter": ScriptedModel}, "invalid_adapter"),
        ({"stream_url": ""}, "invalid_name"),
        ({"stream_url": "support/42"}, "invalid_name"),
        ({"stream_url": "https://host/v1"}, "invalid_name"),
        ({"stream_url": "aidb://a*b"}, "invalid_name"),
        ({"shards": 0}, "invalid_shards"),
        ({"shards": 2_000}, "invalid_shards"),
        ({"shards": 2, "stream_url": "aidb://echo/1"}, "invalid_shards"),
        ({"max_running": 0}, "invalid_bound"),
        ({"max_iterations": 0}, "invalid_bound"),
        ({"idle_timeout_ms": 0}, "invalid_bound"),
        ({"idle_timeout_ms": -1}, "invalid_bound"),
        ({"idle_timeout_ms": "60"}, "invalid_bound"),
        ({"run_timeout_ms": 0}, "invalid_bound"),
        ({"run_timeout_ms": -1}, "invalid_bound"),
        ({"run_timeout_ms": True}, "invalid_bound"),
        ({"on_in_doubt": "guess"}, "invalid_option"),
        ({"on_crash": "hope"}, "invalid_option"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as raised:
        define(**options)
    assert raised.value.code == code


def test_tools_may_run_elsewhere_or_need_an_approval() -> None:
    def sub(a: int) -> int:
        return -a

    declared = declare_tool(name="sub", description="Subtract.", input_schema=Args)

    assert define(tools=[declared, make_tool(needs_approval=True)]).tools[0].runs_elsewhere
    assert not declared.with_implementation(sub).runs_elsewhere


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (Retry, "max_attempts"),
        (Retry, "first_pause_ms"),
        (Retry, "longest_pause_ms"),
        (Retry, "max_interruptions"),
        (UsageLimits, "max_total_tokens"),
        (UsageLimits, "max_tool_calls"),
        (History, "max_tokens"),
    ],
)
def test_a_bound_is_a_whole_number_and_not_negative(make: Callable[..., Any], field: str) -> None:
    for wrong in (-1, 1.5, "1", True):
        with pytest.raises(ConfigError, match=f"{field} is a whole number") as raised:
            make(**{field: wrong})
        assert raised.value.code == "invalid_bound"
    make(**{field: 1})


def test_what_must_happen_once_has_a_bound_of_one() -> None:
    for field in ("max_attempts", "max_interruptions"):
        with pytest.raises(ConfigError, match="1 or more"):
            Retry(**{field: 0})
    Retry(first_pause_ms=0, longest_pause_ms=0)


def test_none_is_without_bound() -> None:
    UsageLimits(max_total_tokens=None, max_tool_calls=None)
    History(max_tokens=None)
    unbound = define(idle_timeout_ms=None, run_timeout_ms=None)
    assert unbound.idle_timeout_ms is unbound.run_timeout_ms is None


def test_sessions_default_to_those_named_after_the_agent() -> None:
    assert define().stream_url == "aidb://echo/*"
    assert define().is_pattern
    assert not define(stream_url="aidb://support/42").is_pattern


def test_own_rows_need_a_function_that_answers_them() -> None:
    with pytest.raises(ConfigError) as raised:
        raw_definition(name="planner", pending_work=lambda: None, generate=None)
    assert raised.value.code == "generate_required"


def test_what_a_function_of_the_user_has_said_cannot_be_continued() -> None:
    rows: Collection[Any] = Collection(cast("Any", None), "rows", None)

    def pending(q: QueryRoot) -> Any:
        return q.from_(r=rows)

    with pytest.raises(ConfigError) as raised:
        raw_definition(
            name="planner",
            pending_work=pending,
            generate=lambda _context: "",
            on_crash="continue",
        )
    assert raised.value.code == "invalid_option"


def test_own_rows_need_no_adapter_but_not_a_wrong_one() -> None:
    rows: Collection[Any] = Collection(cast("Any", None), "rows", None)

    def pending(q: QueryRoot) -> Any:
        return q.from_(r=rows)

    def define_raw(**options: Any) -> AgentDefinition:
        return raw_definition(
            name="planner", pending_work=pending, generate=lambda _context: "", **options
        )

    assert define_raw().adapter is None
    with pytest.raises(ConfigError) as raised:
        define_raw(adapter="gpt-4o")
    assert raised.value.code == "invalid_adapter"


def test_own_rows_are_those_of_one_collection() -> None:
    rows: Collection[Any] = Collection(cast("Any", None), "rows", None)

    def joined(q: QueryRoot) -> Any:
        return q.from_(a=rows).join(b=rows, on=lambda a, b: eq(a.id, b.parent))

    with pytest.raises(QueryError, match="reads one collection") as raised:
        raw_definition(name="planner", pending_work=joined, generate=lambda _context: "")
    assert raised.value.code == "unsupported_query"


@pytest.mark.parametrize(
    ("given", "options", "code"),
    [
        ([], {"name": "echo"}, "pending_work_required"),
        ([define()], {"name": "other"}, "invalid_option"),
        ([define()], {"on_change": "hope"}, "invalid_option"),
    ],
)
def test_create_agent_refuses_before_it_needs_a_database(
    given: list[Any], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        create_agent(*given, **options)
    assert raised.value.code == code


CHANGES: list[dict[str, Any]] = [
    {"name": "other", "stream_url": "aidb://echo/*"},
    {"instructions": "Be brief."},
    {"adapter": Model("b")},
    {"tools": [make_tool("other")]},
    {"tools": []},
    {"output_schema": Out},
    {"stream_url": "aidb://other/*"},
    {"version": "2"},
    {"shards": 2},
    {"tools": [make_tool(needs_approval=True)]},
    {"usage_limits": UsageLimits(max_tool_calls=1)},
    {"history": History(max_tokens=100)},
    {"run_timeout_ms": 1_000},
    {"max_iterations": 3},
    {"retry": Retry(max_attempts=1)},
    {"on_in_doubt": "park"},
    {"on_crash": "continue"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change))
def test_the_fingerprint_tells_apart_what_answers_otherwise(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"tools": [make_tool()]}
    assert define(**{**base, **change}).fingerprint() != define(**base).fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"max_running": 3}, {"idle_timeout_ms": 5}, {"autostart": False}, {"tools": [make_tool()]}],
    ids=lambda change: ",".join(change),
)
def test_the_fingerprint_is_equal_for_what_answers_alike(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"tools": [make_tool()]}
    assert define(**{**base, **change}).fingerprint() == define(**base).fingerprint()


def test_the_order_of_tools_does_not_matter() -> None:
    one, two = make_tool("one"), make_tool("two")
    assert define(tools=[one, two]).fingerprint() == define(tools=[two, one]).fingerprint()
