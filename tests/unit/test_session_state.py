from __future__ import annotations

from typing import Any

import msgspec
import pytest

from aidb_ray.agents.definition import History
from aidb_ray.agents.rows import GenerationRow, MessageRow, ToolCallRow, encode_row
from aidb_ray.agents.session import SessionState
from aidb_ray.models.base import ModelMessage, ToolCallRequest
from aidb_ray.store.changes import FoundRow

URL = "aidb://echo/1"
NO_LIMIT = History()


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}.000000Z"


def message(key: str, second: int, **fields: Any) -> MessageRow:
    defaults: dict[str, Any] = {
        "role": "user",
        "actor_id": "user",
        "target_agent": "echo",
        "content": key,
    }
    return MessageRow(id=key, created_at=at(second), **{**defaults, **fields})


def reply(generation_id: str, second: int, content: str = "") -> MessageRow:
    key = f"{generation_id}:reply"
    return message(
        key,
        second,
        role="assistant",
        actor_id="echo",
        target_agent="user",
        content=content or key,
        processed=True,
        generation_id=generation_id,
    )


def found(row: MessageRow | GenerationRow | ToolCallRow, revision: int = 1) -> FoundRow:
    return FoundRow(URL, row.id, revision, encode_row(row))


def load(
    *messages: MessageRow,
    generations: tuple[GenerationRow, ...] = (),
    calls: tuple[ToolCallRow, ...] = (),
    revision: int = 10,
) -> SessionState:
    state = SessionState("echo")
    state.load(
        revision,
        {
            "messages": [found(row) for row in messages],
            "generations": [found(row) for row in generations],
            "tool_calls": [found(row) for row in calls],
        },
    )
    return state


def read(
    state: SessionState, *pending: str, generation_id: str = "", history: History = NO_LIMIT
) -> list[tuple[str, str]]:
    said = state.conversation(list(pending), generation_id, history)
    return [(part.role, part.content) for part in said]


def test_what_was_answered_comes_right_before_its_answer() -> None:
    """A message that arrived while the agent talked belongs to the turn that answered it."""
    state = load(
        message("one", 1, processed=True, generation_id="g1"),
        message("two", 2, processed=True, generation_id="g2"),
        reply("g1", 3, "first"),
        reply("g2", 4, "second"),
        message("three", 5),
    )

    assert read(state, "three") == [
        ("user", "one"),
        ("assistant", "first"),
        ("user", "two"),
        ("assistant", "second"),
        ("user", "three"),
    ]


def test_messages_of_one_turn_keep_their_order() -> None:
    state = load(
        message("b", 2, processed=True, generation_id="g"),
        message("a", 1, processed=True, generation_id="g"),
        reply("g", 3, "both"),
    )
    assert read(state) == [("user", "a"), ("user", "b"), ("assistant", "both")]


def test_a_greeting_that_no_run_wrote_draws_nothing_to_itself() -> None:
    greeting = message("hi", 1, role="assistant", actor_id="echo", target_agent="user")
    state = load(greeting, message("note", 2, target_agent=""), message("ask", 3))
    assert read(state, "ask") == [("assistant", "hi"), ("user", "note"), ("user", "ask")]


def test_what_is_said_to_others_is_not_read() -> None:
    state = load(
        message("to all", 1, target_agent="", actor_id="bob"),
        message("to other", 2, target_agent="other"),
        message("by other", 3, role="assistant", actor_id="other", target_agent="echo"),
        message("system", 4, role="system"),
    )
    assert read(state) == [("user", "to all"), ("user", "by other"), ("system", "system")]


def test_finished_rounds_are_read_with_their_calls_and_answers() -> None:
    calls = (
        ToolCallRow("g:0:10", "g", "b", {"x": 1}, "failed", round=0, model_call_id="c10",
                    error="No.", error_code="tool_error"),
        ToolCallRow("g:0:2", "g", "a", "not json", "completed", round=0, result=[1]),
        ToolCallRow("g:1:0", "g", "a", None, "cancelled", round=1, model_call_id="c3"),
        ToolCallRow("other:0:0", "other", "a", None, "completed", round=0),
    )  # fmt: skip
    generation = GenerationRow("g", "echo", "running", ["m"], ["first", ""])
    state = load(message("m", 1), generations=(generation,), calls=calls)

    assert state.conversation(["m"], "g", NO_LIMIT) == [
        ModelMessage("user", "m"),
        ModelMessage(
            "assistant",
            "first",
            tool_calls=(
                ToolCallRequest("g:0:2", "a", "not json"),
                ToolCallRequest("c10", "b", '{"x":1}'),
            ),
        ),
        ModelMessage("tool", "[1]", tool_call_id="g:0:2"),
        ModelMessage(
            "tool", '{"error":"tool_error","message":"No."}', tool_call_id="c10"
        ),
        ModelMessage("assistant", "", tool_calls=(ToolCallRequest("c3", "a", "null"),)),
        ModelMessage(
            "tool", '{"error":"cancelled","message":"cancelled"}', tool_call_id="c3"
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("max_tokens", "kept"), [(None, 3), (40, 3), (25, 2), (14, 1), (1, 0)])
def test_history_keeps_the_newest_that_fit_and_always_what_is_asked(
    max_tokens: int | None, kept: int
) -> None:
    past = [message(f"{number}".rjust(20), number, target_agent="") for number in range(3)]
    state = load(*past, message("ask.", 9))

    said = read(state, "ask.", history=History(max_tokens))

    assert [content.strip() for _, content in said] == [*["0", "1", "2"][3 - kept :], "ask."]


def test_changes_that_come_before_the_rows_are_folded_in() -> None:
    state = SessionState("echo")
    state.put_message("old", 5, encode_row(message("old", 1, content="stale")))
    state.put_message("new", 12, encode_row(message("new", 2)))
    state.put_message("gone", 13, None)
    rows = [found(message("old", 1), 7), found(message("gone", 3), 8)]
    state.load(10, {"messages": rows, "generations": [], "tool_calls": []})

    assert {key: known.message.content for key, known in state.messages.items()} == {
        "old": "old",
        "new": "new",
    }


def test_changes_older_than_what_is_known_change_nothing() -> None:
    state = load(message("m", 1), revision=10)
    state.put_message("m", 20, encode_row(message("m", 1, content="own")))
    state.put_message("m", 15, encode_row(message("m", 1, content="late")))
    state.put_message("deleted before the rows were read", 9, encode_row(message("x", 1)))

    assert [known.message.content for known in state.messages.values()] == ["own"]


def test_a_row_that_is_no_message_is_left_out() -> None:
    state = load(message("m", 1))
    state.put_message("odd", 11, b'{"id": 3}')
    state.put_message("m", 12, b"[]")
    assert state.messages == {}


def test_only_own_generations_and_their_calls_are_kept() -> None:
    mine = GenerationRow("g", "echo", "running", ["m"])
    other = GenerationRow("h", "other", "running", ["m"])
    calls = (ToolCallRow("h:0:0", "h", "a"), ToolCallRow("g:0:0", "g", "a"))
    state = load(generations=(other, mine), calls=calls)

    assert list(state.generations) == ["g"]
    assert list(state.calls) == ["g"]
    assert state.open_generation() == mine
    assert state.open_generation(["m", "n"]) == mine
    assert state.open_generation(["n"]) is None


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_an_ended_generation_is_not_open(status: str) -> None:
    assert load(generations=(GenerationRow("g", "echo", status),)).open_generation() is None


def test_the_size_follows_what_is_held() -> None:
    state = load()
    call = ToolCallRow("g:0:0", "g", "a", status="executing")
    state.put_message("m", 11, encode_row(message("m", 1, content="x" * 1_000)))
    state.put_call(call, 12)
    state.put_call(msgspec.structs.replace(call, result="y" * 5_000), 12)
    assert state.size > 6_000

    state.put_message("m", 12, None)
    state.put_call(call, 12)
    assert state.size < 1_000


def test_a_message_waits_until_it_is_processed_or_gone() -> None:
    state = load(message("m", 1), message("done", 2, processed=True))
    assert state.is_waiting("m")
    assert not state.is_waiting("done")
    assert not state.is_waiting("nowhere")
