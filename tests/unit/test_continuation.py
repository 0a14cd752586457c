"""What a generation's stored stream says of its newest round."""

from __future__ import annotations

from ag_ui.core import BaseEvent, CustomEvent

from aidb_ray.agents.continuation import hear_newest, put_taken_over
from aidb_ray.chunks import ChunkBuffer, slice_to_chunks
from aidb_ray.models.events import EventDecoder
from aidb_ray.models.round import Round
from aidb_ray.models.writer import RoundWriter
from aidb_ray.store.changes import ChunkSlice


def said(*texts: str, call: str = "", is_finished: bool = True) -> list[BaseEvent]:
    writer = RoundWriter()
    writer.texts(texts, "m")
    if call:
        writer.start_call(call, "add")
        writer.call_args(call, '{"a":')
    if is_finished:
        writer.finish("stop")
    return [*writer.take()]


def marker(attempt: int) -> BaseEvent:
    return CustomEvent(name="attempt", value=attempt)


def taken_over(text: str, attempt: int = 2) -> list[BaseEvent]:
    """Return what a new attempt begins with, as it is read back."""
    buffer = ChunkBuffer("aidb://a", "g", next_index=5, attempt=attempt)
    buffer.begin_attempt()
    put_taken_over(buffer, text)
    taken = buffer.take()
    assert taken is not None
    append, columns = taken
    decode = EventDecoder().decode
    chunks = slice_to_chunks(ChunkSlice("g", attempt, append.index, columns))
    return [decode(chunk.type, chunk.content) for chunk in chunks]


def newest(*parts: list[BaseEvent] | BaseEvent) -> Round:
    heard = Round()
    for part in parts:
        heard = hear_newest(heard, part if isinstance(part, list) else [part])
    return heard


def test_a_stream_that_broke_off_tells_how_far_it_came() -> None:
    heard = newest(said("It ", "is ", is_finished=False))

    assert (heard.text, heard.is_finished) == ("It is ", False)


def test_a_round_that_was_finished_is_whole() -> None:
    heard = newest(said("One moment.", call="c"))

    assert heard.is_finished
    assert [request.id for request in heard.tool_calls] == ["c"]


def test_only_the_newest_round_counts() -> None:
    heard = newest(said("One moment.", call="c"), said("It ", is_finished=False))

    assert (heard.text, heard.is_finished, heard.tool_calls) == ("It ", False, [])


def test_what_follows_a_finished_round_and_is_none_leaves_it_alone() -> None:
    heard = newest(said("It is 14."), CustomEvent(name="note", value=1))

    assert (heard.text, heard.is_finished) == ("It is 14.", True)


def test_a_new_attempt_begins_afresh() -> None:
    heard = newest(said("It ", is_finished=False), marker(2), said("Is ", is_finished=False))

    assert heard.text == "Is "
    assert newest(said("It ", is_finished=False), marker(2)).text == ""


def test_an_attempt_that_took_over_has_said_that_as_well() -> None:
    begun = newest(said("It ", is_finished=False), taken_over("It "))
    later = newest(taken_over("It "), said("is ", is_finished=False))
    whole = newest(taken_over("It "), said("is ", "14."))

    assert (begun.text, later.text, whole.text) == ("It ", "It is ", "It is 14.")
    assert [each.is_finished for each in (begun, later, whole)] == [False, False, True]


def test_a_round_after_one_that_took_over_stands_for_itself() -> None:
    heard = newest(taken_over("It "), said("is 14.", call="c"), said("So ", is_finished=False))

    assert heard.text == "So "


def test_an_attempt_that_takes_over_begins_with_its_marker_and_one_message() -> None:
    events = taken_over("It \x1eis ", attempt=3)

    assert [type(event).__name__ for event in events] == [
        "CustomEvent",
        "TextMessageStartEvent",
        "TextMessageContentEvent",
        "TextMessageEndEvent",
    ]
    assert newest(events).text == "It \x1eis "
