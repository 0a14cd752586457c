from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import pytest
from ag_ui.core import BaseEvent, ToolCallStartEvent
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.errors import ModelError
from aidb_ray.models.base import ToolCallRequest, Usage
from aidb_ray.models.events import EventDecoder, EventEncoder
from aidb_ray.models.openai_events import ChatTranslator, ResponsesTranslator, provider_error
from aidb_ray.models.round import Round
from aidb_ray.models.sse import EventStreamParser

Json: TypeAlias = dict[str, Any]


def chat_stream(*deltas: Json, finish: str | None = "stop", usage: Json | None = None) -> bytes:
    """Build the body of a Chat Completions answer, ended as OpenAI ends it."""
    chunks: list[Json] = [
        {"id": "cmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    if finish:
        chunks.append(
            {"id": "cmpl-1", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
        )
    if usage:
        chunks.append({"id": "cmpl-1", "choices": [], "usage": usage})
    return b"".join(map(sse, chunks)) + b"data: [DONE]\n\n"


def responses_stream(*events: Json) -> bytes:
    """Build the body of a Responses answer, each event with its `event:` line."""
    return b"".join(f"event: {event['type']}\n".encode() + sse(event) for event in events)


def sse(payload: Json) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def translate(translator: ChatTranslator | ResponsesTranslator, body: bytes) -> list[BaseEvent]:
    events: list[BaseEvent] = []
    for payload in EventStreamParser().feed(body):
        events += translator.translate(payload)
    return events if translator.is_done else [*events, *translator.end()]


def hear(events: Sequence[BaseEvent]) -> Round:
    heard = Round()
    for event in events:
        heard.add(event)
    return heard


def types_of(events: list[BaseEvent]) -> list[str]:
    return [event.type.value for event in events]


def call_delta(index: int, arguments: str = "", **more: Any) -> Json:
    name = more.pop("name", None)
    function = {"arguments": arguments, **({"name": name} if name else {})}
    return {"tool_calls": [{"index": index, "function": function, **more}]}


def test_chat_text_becomes_a_message() -> None:
    events = translate(
        ChatTranslator(),
        chat_stream(
            {"role": "assistant", "content": ""},
            {"content": "Hel"},
            {"content": "lo"},
            usage={
                "prompt_tokens": 10,
                "completion_tokens": 4,
                "total_tokens": 14,
                "prompt_tokens_details": {"cached_tokens": 3},
                "completion_tokens_details": {"reasoning_tokens": 2},
            },
        ),
    )

    assert types_of(events) == [
        "STEP_STARTED",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "STEP_FINISHED",
    ]
    heard = hear(events)
    assert (heard.text, heard.finish_reason) == ("Hello", "stop")
    assert heard.usage == Usage(10, 4, 2, 3)


def test_parallel_chat_calls_may_interleave() -> None:
    heard = hear(
        translate(
            ChatTranslator(),
            chat_stream(
                {"content": "Looking."},
                call_delta(0, name="search", id="c0"),
                call_delta(0, '{"q":'),
                call_delta(1, '{"n"', name="count", id="c1"),
                call_delta(0, '"a"}'),
                call_delta(1, ":1}"),
                finish="tool_calls",
            ),
        )
    )

    assert heard.text == "Looking."
    assert heard.tool_calls == [
        ToolCallRequest("c0", "search", '{"q":"a"}'),
        ToolCallRequest("c1", "count", '{"n":1}'),
    ]
    assert heard.finish_reason == "tool_calls"


def test_calls_that_share_an_index_or_have_no_id_are_told_apart() -> None:
    shared = hear(
        translate(
            ChatTranslator(),
            chat_stream(
                call_delta(0, '{"a":1}', name="f", id="c0"),
                call_delta(0, '{"a":2}', name="f", id="c1"),
            ),
        )
    )
    nameless = hear(
        translate(
            ChatTranslator(),
            chat_stream(call_delta(0, "{}", name="f"), call_delta(1, "{}", name="g")),
        )
    )

    assert [call.args_json for call in shared.tool_calls] == ['{"a":1}', '{"a":2}']
    assert [call.name for call in nameless.tool_calls] == ["f", "g"]
    assert len({call.id for call in nameless.tool_calls}) == 2


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_shown_reasoning_comes_before_the_text(field: str) -> None:
    events = translate(
        ChatTranslator(), chat_stream({field: "Let me "}, {field: "see."}, {"content": "Yes."})
    )

    heard = hear(events)
    assert (heard.reasoning, heard.text) == ("Let me see.", "Yes.")
    assert types_of(events)[1:8] == [
        "REASONING_START",
        "REASONING_MESSAGE_START",
        "REASONING_MESSAGE_CONTENT",
        "REASONING_MESSAGE_CONTENT",
        "REASONING_MESSAGE_END",
        "REASONING_END",
        "TEXT_MESSAGE_START",
    ]


def test_a_refusal_is_text() -> None:
    assert hear(translate(ChatTranslator(), chat_stream({"refusal": "No."}))).text == "No."


def test_text_after_a_call_is_a_message_of_its_own() -> None:
    events = translate(
        ChatTranslator(),
        chat_stream({"content": "a"}, call_delta(0, name="f", id="c"), {"content": "b"}),
    )

    ids = [getattr(e, "message_id", "") for e in events if e.type.value == "TEXT_MESSAGE_START"]
    assert len(ids) == len(set(ids)) == 2
    assert hear(events).text == "ab"


def test_the_end_of_the_connection_may_stand_for_done() -> None:
    body = chat_stream({"content": "Hi"}).removesuffix(b"data: [DONE]\n\n")

    assert hear(translate(ChatTranslator(), body)).is_finished


@pytest.mark.parametrize(
    "body",
    [
        b"",
        chat_stream({"content": "Hi"}, finish=None),
        chat_stream({"content": "Hi"}, finish=None).removesuffix(b"data: [DONE]\n\n"),
        chat_stream({"content": "Hi"})[:-70],
    ],
)
def test_a_chat_stream_that_stops_early_is_truncated(body: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        translate(ChatTranslator(), body)

    assert caught.value.code == "truncated"
    assert caught.value.retryable


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[]",
        b'{"choices": 5}',
        b'{"choices": [{"delta": {"content": 5}}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c"}]}}]}',
        b'\xff{"choices": []}',
        b'{"vendor": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
)
def test_what_is_no_chat_chunk_is_malformed(payload: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        ChatTranslator().translate(payload)

    assert caught.value.code == "malformed"
    assert caught.value.retryable


TEXT_ITEM: list[Json] = [
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {"type": "message", "id": "msg_1"},
    },
    {"type": "response.output_text.delta", "output_index": 0, "item_id": "msg_1", "delta": "Hel"},
    {"type": "response.output_text.delta", "output_index": 0, "item_id": "msg_1", "delta": "lo"},
    {"type": "response.output_text.done", "output_index": 0, "item_id": "msg_1", "text": "Hello"},
    {
        "type": "response.output_item.done",
        "output_index": 0,
        "item": {"type": "message", "id": "msg_1"},
    },
]
CREATED: Json = {"type": "response.created", "response": {"id": "resp_1", "usage": None}}
COMPLETED: Json = {
    "type": "response.completed",
    "response": {
        "id": "resp_1",
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 14,
        },
    },
}


def call_item(index: int, call_id: str, name: str, *deltas: str, done: str = "") -> list[Json]:
    item = {"type": "function_call", "id": f"fc_{index}", "call_id": call_id, "name": name}
    return [
        {
            "type": "response.output_item.added",
            "output_index": index,
            "item": {**item, "arguments": ""},
        },
        *(
            {
                "type": "response.function_call_arguments.delta",
                "output_index": index,
                "item_id": item["id"],
                "delta": delta,
            }
            for delta in deltas
        ),
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "arguments": done or "".join(deltas)},
        },
    ]


def test_responses_text_becomes_a_message() -> None:
    events = translate(ResponsesTranslator(), responses_stream(CREATED, *TEXT_ITEM, COMPLETED))

    assert types_of(events) == [
        "STEP_STARTED",
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
        "STEP_FINISHED",
    ]
    heard = hear(events)
    assert (heard.text, heard.finish_reason) == ("Hello", "stop")
    assert heard.usage == Usage(10, 4, 2, 3)


def test_responses_calls_are_heard_whether_or_not_arguments_are_streamed() -> None:
    events = translate(
        ResponsesTranslator(),
        responses_stream(
            *call_item(0, "call_a", "search", '{"q":', '"a"}'),
            *call_item(1, "call_b", "count", done='{"n":1}'),
            call_item(2, "call_c", "late", done="{}")[-1],
            COMPLETED,
        ),
    )

    heard = hear(events)
    assert heard.tool_calls == [
        ToolCallRequest("call_a", "search", '{"q":"a"}'),
        ToolCallRequest("call_b", "count", '{"n":1}'),
        ToolCallRequest("call_c", "late", "{}"),
    ]
    assert heard.finish_reason == "tool_calls"
    assert types_of(events).count("TOOL_CALL_END") == 3


def test_responses_reasoning_is_shown_and_kept_for_the_next_round() -> None:
    summary = "response.reasoning_summary_text.delta"
    item: Json = {"type": "reasoning", "id": "rs_1", "encrypted_content": "opaque", "summary": []}
    heard = hear(
        translate(
            ResponsesTranslator(),
            responses_stream(
                {"type": summary, "item_id": "rs_1", "summary_index": 0, "delta": "First."},
                {"type": summary, "item_id": "rs_1", "summary_index": 1, "delta": "Then."},
                {"type": "response.output_item.done", "output_index": 0, "item": item},
                *call_item(1, "call_a", "f"),
                COMPLETED,
            ),
        )
    )

    assert heard.reasoning == "First.\n\nThen."
    assert [json.loads(kept) for kept in heard.to_message().reasoning] == [item]


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter")],
)
def test_an_incomplete_response_says_why(reason: str, finish_reason: str) -> None:
    incomplete = {
        "type": "response.incomplete",
        "response": {"incomplete_details": {"reason": reason}},
    }
    heard = hear(translate(ResponsesTranslator(), responses_stream(*TEXT_ITEM, incomplete)))

    assert heard.finish_reason == finish_reason
    assert heard.is_finished


@pytest.mark.parametrize("length", range(1 + len(TEXT_ITEM)))
def test_a_responses_stream_that_stops_early_is_truncated(length: int) -> None:
    with pytest.raises(ModelError) as caught:
        translate(ResponsesTranslator(), responses_stream(CREATED, *TEXT_ITEM[:length]))

    assert caught.value.code == "truncated"


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type": 5}',
        b'{"type": "response.output_text.delta", "delta": 5}',
        b'{"type": "response.function_call_arguments.delta", "output_index": 3, "delta": "{"}',
        b'{"type": "response.output_item.added", "item": {"type": "function_call"}}',
    ],
)
def test_what_is_no_responses_event_is_malformed(payload: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        ResponsesTranslator().translate(payload)

    assert caught.value.code == "malformed"


def test_events_of_a_later_version_of_the_protocol_are_passed_over() -> None:
    assert ResponsesTranslator().translate(b'{"type": "response.new_thing", "delta": [1]}') == []


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"type": "error", "code": "server_error", "message": "m"}, ("server_error", True)),
        ({"type": "error", "error": {"code": "rate_limit_exceeded"}}, ("rate_limited", True)),
        (
            {"type": "response.failed", "response": {"error": {"code": "invalid_prompt"}}},
            ("provider_error", False),
        ),
    ],
)
def test_an_error_in_a_responses_stream_is_raised(
    payload: Json, expected: tuple[str, bool]
) -> None:
    with pytest.raises(ModelError) as caught:
        ResponsesTranslator().translate(json.dumps(payload).encode())

    assert (caught.value.code, caught.value.retryable) == expected


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        ({"message": "m", "type": "server_error"}, None, ("server_error", True)),
        ({"error": {"message": "m", "code": 502}}, None, ("server_error", True)),
        ({"message": "m", "code": 429}, None, ("rate_limited", True)),
        ({"message": "m", "code": "insufficient_quota"}, 429, ("insufficient_quota", False)),
        (
            {"message": "m", "code": "context_length_exceeded"},
            400,
            ("context_length_exceeded", False),
        ),
        ({"message": "m"}, 401, ("unauthorized", False)),
        ({"message": "m"}, 404, ("not_found", False)),
        ({"message": "m"}, 422, ("invalid_request", False)),
        ({"message": "m"}, 503, ("server_error", True)),
        ("<html>", 500, ("server_error", True)),
        (None, 408, ("timeout", True)),
    ],
)
def test_errors_are_told_apart_by_what_to_do_about_them(
    error: Any, status: int | None, expected: tuple[str, bool]
) -> None:
    reported = provider_error(error, status=status)

    assert (reported.code, reported.retryable) == expected
    assert str(reported)


BODY = responses_stream(CREATED, *TEXT_ITEM, *call_item(1, "c", "f", '{"ü":', "1}"), COMPLETED)


@given(st.lists(st.integers(0, len(BODY)), max_size=8))
def test_a_stream_may_be_cut_anywhere_on_its_way(cuts: list[int]) -> None:
    parser, marks = EventStreamParser(), [0, *sorted(cuts), len(BODY)]

    payloads = [
        payload for start, end in pairwise(marks) for payload in parser.feed(BODY[start:end])
    ]

    assert payloads == EventStreamParser().feed(BODY)
    assert len(payloads) == 11


def test_the_parser_knows_comments_line_ends_and_data_in_several_lines() -> None:
    body = b': ping\r\n\r\nevent: x\r\ndata: {"a":\r\ndata:1}\r\n\r\nid: 5\n\ndata\n\ndata: cut'

    assert EventStreamParser().feed(body) == [b'{"a":\n1}']


def test_an_event_without_end_is_refused() -> None:
    parser = EventStreamParser(max_event_bytes=100)
    for _ in range(3):
        assert parser.feed(b"data: " + b"x" * 80 + b"\n\n")

    assert parser.feed(b"data: " + b"x" * 80) == []
    with pytest.raises(ModelError) as caught:
        parser.feed(b"x" * 80)
    assert caught.value.code == "malformed"


def text_delta(field: str, text: str) -> Json:
    return {field: text}


def call_fragment(index: int, arguments: str, *, has_id: bool) -> Json:
    given = {"id": f"c{index}"} if has_id else {}
    return call_delta(index, arguments, name=f"f{index}", **given)


fragments = st.text(max_size=3)
deltas = st.one_of(
    st.builds(text_delta, st.sampled_from(["content", "reasoning"]), fragments),
    st.builds(call_fragment, st.integers(0, 2), fragments, has_id=st.booleans()),
)


@given(st.lists(deltas, max_size=10))
def test_any_answer_gives_well_formed_events_that_survive_storage(answer: list[Json]) -> None:
    """Each block opens once and closes once, and what is replayed is what was heard."""
    events = translate(ChatTranslator(), chat_stream(*answer))
    encoder, decoder = EventEncoder(), EventDecoder()
    replayed = [decoder.decode(*encoder.encode(event)) for event in events]

    open_ids: set[str] = set()
    for event in events:
        kind, _, stage = event.type.value.rpartition("_")
        id_ = f"{kind}:{getattr(event, 'message_id', '') or getattr(event, 'tool_call_id', '')}"
        if stage == "START":
            assert id_ not in open_ids
            open_ids.add(id_)
        elif stage in ("CONTENT", "ARGS"):
            assert id_ in open_ids
        elif stage == "END":
            open_ids.remove(id_)
    assert open_ids == set()
    assert replayed == events
    assert vars(hear(replayed)) == vars(hear(events))
    starts = [event for event in events if isinstance(event, ToolCallStartEvent)]
    assert len(starts) == len(hear(events).tool_calls)
