from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aidb_ray.contracts import (
    DEFAULT_ROW_TYPES,
    AgentMessage,
    Chunk,
    ChunkContract,
    Generation,
    GenerationContract,
    GenerationStatus,
    ToolCall,
    ToolCallContract,
    ToolCallStatus,
    is_valid_name,
)


@pytest.mark.parametrize("name", ["a", "agent-1", "aidb://support/42", "a.b_c~d", "x" * 512])
def test_names_that_need_no_escape_in_a_url_are_valid(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 513, "a b", "ä", "a\0", "../../etc/passwd", "a/../b", "/a", "__ds", "a?b", "a\n"],
)
def test_names_that_could_be_mistaken_for_paths_or_commands_are_not(name: str) -> None:
    assert not is_valid_name(name)


@given(
    st.datetimes(min_value=datetime(1000, 1, 1)),  # noqa: DTZ001
    st.datetimes(min_value=datetime(1000, 1, 1)),  # noqa: DTZ001
    st.integers(-12, 12),
)
def test_times_are_stored_in_utc_as_texts_that_sort_as_the_times_do(
    one: datetime, other: datetime, hours: int
) -> None:
    def stored(moment: datetime) -> str:
        message = AgentMessage(role="user", actor_id="u", content="", created_at=moment)
        return message.model_dump(mode="json", by_alias=True)["createdAt"]

    zone = timezone(timedelta(hours=hours))
    first = one.replace(tzinfo=UTC)
    second = other.replace(tzinfo=UTC)
    try:
        moved = second.astimezone(zone)
    except OverflowError:
        moved = second

    assert (stored(first) < stored(moved)) == (first < second)
    assert stored(first).endswith("Z")
    assert len(stored(first)) == 27


def test_rows_do_not_change() -> None:
    message = AgentMessage(role="user", actor_id="u", content="")

    with pytest.raises(ValidationError):
        message.content = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_ids_are_fresh_and_times_are_aware() -> None:
    one, other = (AgentMessage(role="user", actor_id="u", content="") for _ in range(2))

    assert one.id != other.id
    assert one.created_at.tzinfo is UTC
    assert one.processed is False


@pytest.mark.parametrize("status", list(ToolCallStatus) + list(GenerationStatus))
def test_three_statuses_are_terminal(status: ToolCallStatus | GenerationStatus) -> None:
    assert status.is_terminal == (status.value in ("completed", "failed", "cancelled"))


def test_the_default_rows_meet_the_contracts() -> None:
    assert isinstance(ToolCall(id="t", generation_id="g", name="n"), ToolCallContract)
    assert isinstance(Generation(id="g", agent="a"), GenerationContract)
    assert isinstance(Chunk(id="g:0", generation_id="g", index=0, type="x"), ChunkContract)
    assert set(DEFAULT_ROW_TYPES) == {
        "messages",
        "tool_calls",
        "generations",
        "cancel_requests",
        "questions",
        "steps",
    }
