from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from ag_ui.core import (
    BaseEvent,
    CustomEvent,
    ReasoningEncryptedValueEvent,
    ReasoningMessageEndEvent,
    ReasoningMessageStartEvent,
    RunFinishedEvent,
    StateSnapshotEvent,
    TextMessageChunkEvent,
    TextMessageContentEvent,
    TextMessageEndEvent,
    TextMessageStartEvent,
    TokenUsage,
    ToolCallArgsEvent,
    ToolCallEndEvent,
    ToolCallResultEvent,
    ToolCallStartEvent,
)
from hypothesis import given
from hypothesis import strategies as st

from aidb_ray.models.base import ModelMessage, ToolCallRequest, Usage
from aidb_ray.models.events import (
    EventDecoder,
    EventEncoder,
    reasoning_content,
    text_content,
    tool_call_args,
)
from aidb_ray.models.round import Round, finish_round

ids = st.sampled_from(["a", "b", "ö"])
texts = st.text(max_size=8) | st.sampled_from(["", "\x1e", '\x1e{"a":1}', "{", "\x00"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
extras = st.fixed_dictionaries(
    {},
    optional={
        "timestamp": st.integers(0, 2**50),
        "metadata": st.dictionaries(texts, json_values, max_size=2),
        "raw_event": json_values,
        "subagent_run_id": texts,
        "vendorField": json_values,
    },
)


def events_of(cls: type[BaseEvent], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def make(own: dict[str, Any], more: dict[str, Any]) -> BaseEvent:
        return cls(**own, **more)

    return st.builds(make, st.fixed_dictionaries(fields), extras)


events = st.one_of(
    events_of(TextMessageStartEvent, message_id=ids, role=st.just("assistant")),
    st.builds(text_content, ids, texts),
    events_of(TextMessageContentEvent, message_id=ids, delta=texts),
    events_of(TextMessageEndEvent, message_id=ids),
    events_of(ToolCallStartEvent, tool_call_id=ids, tool_call_name=texts),
    st.builds(tool_call_args, ids, texts),
    events_of(ToolCallArgsEvent, tool_call_id=ids, delta=texts),
    events_of(ToolCallEndEvent, tool_call_id=ids),
    events_of(ToolCallResultEvent, message_id=ids, tool_call_id=ids, content=texts),
    events_of(ReasoningMessageStartEvent, message_id=ids, role=st.just("reasoning")),
    st.builds(reasoning_content, ids, texts),
    events_of(ReasoningMessageEndEvent, message_id=ids),
    events_of(CustomEvent, name=texts, value=json_values),
    events_of(StateSnapshotEvent, snapshot=json_values),
    events_of(TextMessageChunkEvent, message_id=st.none() | ids, delta=texts),
    st.builds(finish_round, texts, st.none() | st.builds(Usage, st.integers(0, 9))),
    st.just(
        RunFinishedEvent(thread_id="t", run_id="r", usage=[TokenUsage(model="m", input_tokens=1)])
    ),
)


def encode(stream: Sequence[BaseEvent]) -> list[tuple[str, str]]:
    encoder = EventEncoder()
    return [encoder.encode(event) for event in stream]


def decode(rows: Sequence[tuple[str, str]]) -> list[BaseEvent]:
    decoder = EventDecoder()
    return [decoder.decode(type_, payload) for type_, payload in rows]


@given(st.lists(events, max_size=12))
def test_replayed_events_equal_streamed_events(stream: list[BaseEvent]) -> None:
    rows = encode(stream)
    replayed = decode(rows)

    assert replayed == stream
    assert [type(event) for event in replayed] == [type(event) for event in stream]
    assert [type_ for type_, _ in rows] == [event.type.value for event in stream]


@given(st.lists(events, max_size=8), st.lists(events, max_size=8))
def test_another_encoder_may_take_over_in_the_middle(
    before: list[BaseEvent], after: list[BaseEvent]
) -> None:
    assert decode(encode(before) + encode(after)) == before + after


STREAM: list[BaseEvent] = [
    ReasoningMessageStartEvent(message_id="r", role="reasoning"),
    reasoning_content("r", "Hm"),
    ReasoningMessageEndEvent(message_id="r"),
    TextMessageStartEvent(message_id="m", role="assistant"),
    text_content("m", "Let me "),
    text_content("m", "look."),
    TextMessageEndEvent(message_id="m"),
    ToolCallStartEvent(tool_call_id="c1", tool_call_name="search"),
    tool_call_args("c1", '{"q":'),
    ToolCallStartEvent(tool_call_id="c2", tool_call_name="now"),
    tool_call_args("c1", "1}"),
    ToolCallEndEvent(tool_call_id="c1"),
    ToolCallEndEvent(tool_call_id="c2"),
    ReasoningEncryptedValueEvent(subtype="message", entity_id="r", encrypted_value="opaque"),
    finish_round("tool_calls", Usage(10, 5, 2, 1)),
]


def test_a_fragment_is_stored_as_nothing_but_itself() -> None:
    rows = encode(STREAM)

    assert rows[1] == ("REASONING_MESSAGE_CONTENT", "Hm")
    assert rows[4:7] == [
        ("TEXT_MESSAGE_CONTENT", "Let me "),
        ("TEXT_MESSAGE_CONTENT", "look."),
        ("TEXT_MESSAGE_END", ""),
    ]
    assert rows[8] == ("TOOL_CALL_ARGS", '{"q":')


def test_a_fragment_that_looks_like_the_mark_of_json_is_kept() -> None:
    stream = [STREAM[3], text_content("m", '\x1e{"messageId":"m","delta":"no"}')]

    assert decode(encode(stream)) == stream


def test_a_reader_may_leave_fragments_out() -> None:
    rows = encode(STREAM)

    assert decode([row for row in rows if row[1] != "Let me "]) == STREAM[:4] + STREAM[5:]


def test_a_made_fragment_is_a_whole_event() -> None:
    event = text_content("m", "x")

    assert event == TextMessageContentEvent(message_id="m", delta="x")
    assert event.model_dump_json(by_alias=True) == (
        '{"type":"TEXT_MESSAGE_CONTENT","messageId":"m","delta":"x"}'
    )
    event.timestamp = 5
    assert event.model_fields_set == {"message_id", "delta", "timestamp"}
    assert text_content("m", "x").model_fields_set == {"message_id", "delta"}
    assert text_content("m", "x").model_extra == {}


@pytest.mark.parametrize(
    ("type_", "payload", "why"),
    [
        ("TEXT_MESSAGE_CONTENT", "x", "before any start"),
        ("NO_SUCH_EVENT", "{}", "NO_SUCH_EVENT"),
        ("TEXT_MESSAGE_START", "{}", "messageId"),
        ("CUSTOM", "{", "JSON"),
    ],
)
def test_rows_that_are_no_events_are_refused(type_: str, payload: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        EventDecoder().decode(type_, payload)


def hear(stream: Sequence[BaseEvent]) -> Round:
    heard = Round()
    for event in stream:
        heard.add(event)
    return heard


def test_a_round_gathers_what_the_model_said() -> None:
    heard = hear(STREAM)

    assert heard.is_finished
    assert heard.text == "Let me look."
    assert heard.reasoning == "Hm"
    assert heard.tool_calls == [
        ToolCallRequest("c1", "search", '{"q":1}'),
        ToolCallRequest("c2", "now", "{}"),
    ]
    assert heard.usage == Usage(10, 5, 2, 1)
    assert heard.finish_reason == "tool_calls"
    assert heard.to_message() == ModelMessage(
        "assistant",
        "Let me look.",
        tool_calls=tuple(heard.tool_calls),
        reasoning=("opaque",),
    )


@given(st.integers(0, len(STREAM)))
def test_a_round_rebuilt_from_rows_equals_the_one_that_was_heard(length: int) -> None:
    heard, rebuilt = hear(STREAM[:length]), hear(decode(encode(STREAM))[:length])

    assert vars(rebuilt) == vars(heard)
    assert rebuilt.to_message() == heard.to_message()
    assert rebuilt.is_finished == (length == len(STREAM))


def test_a_round_understands_the_chunk_shorthand_and_foreign_runs() -> None:
    from ag_ui.core import RunErrorEvent, ToolCallChunkEvent

    heard = hear(
        [
            TextMessageChunkEvent(message_id="m", delta="Hi"),
            TextMessageChunkEvent(delta="!"),
            ToolCallChunkEvent(tool_call_id="c", tool_call_name="f", delta="{"),
            ToolCallChunkEvent(delta="}"),
            RunFinishedEvent(
                thread_id="t",
                run_id="r",
                usage=[TokenUsage(input_tokens=1), TokenUsage(output_tokens=2)],
            ),
        ]
    )
    failed = hear([RunErrorEvent(message="broken")])

    assert heard.text == "Hi!"
    assert heard.tool_calls == [ToolCallRequest("c", "f", "{}")]
    assert heard.usage == Usage(1, 2)
    assert heard.is_finished
    assert failed.error == "broken"
    assert not failed.is_finished


def test_arguments_of_a_call_that_never_started_are_refused() -> None:
    with pytest.raises(ValueError, match="c9"):
        hear([tool_call_args("c9", "{}")])
