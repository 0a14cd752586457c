"""Rows 1 to 18 of the bad inputs: each is refused with its code, and names the field."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from aidb_ray.contracts import AgentMessage, ToolCall
from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.store.changes import MAX_ROW_BYTES
from aidb_ray.store.rows import RowCodec, codec_of

MESSAGES = codec_of(AgentMessage, "id")
CALLS = codec_of(ToolCall, "id")
PLAIN: RowCodec[Any] = codec_of(None, "id")
HELLO: dict[str, Any] = {"id": "m", "role": "user", "actor_id": "u", "content": "hello"}


def nested(depth: int) -> list[Any]:
    top: list[Any] = []
    inner = top
    for _ in range(depth):
        inner.append([])
        inner = inner[0]
    return top


@pytest.mark.parametrize(
    ("changed", "code", "loc"),
    [
        ({"role": ...}, "missing_field", ("role",)),
        ({"actor_id": ...}, "missing_field", ("actor_id",)),
        ({"role": "robot"}, "literal_error", ("role",)),
        ({"processed": "yes"}, "bool_type", ("processed",)),
        ({"content": 5}, "string_type", ("content",)),
        ({"proccessed": True}, "extra_forbidden", ("proccessed",)),
        ({"created_at": "yesterday"}, "datetime_from_date_parsing", ("created_at",)),
        ({"created_at": datetime(2026, 1, 1)}, "timezone_required", ("created_at",)),  # noqa: DTZ001
        ({"created_at": "2026-01-01T00:00:00"}, "timezone_required", ("created_at",)),
        ({"id": ""}, "invalid_id", ("id",)),
        ({"id": "x" * 4096}, "invalid_id", ("id",)),
        ({"id": "a\0b"}, "invalid_id", ("id",)),
        ({"content": "\ud800"}, "invalid_unicode", ("content",)),
        ({"content": "x" * MAX_ROW_BYTES}, "row_too_large", ()),
    ],
)
def test_a_message_that_does_not_fit_is_refused(
    changed: dict[str, Any], code: str, loc: tuple[str, ...]
) -> None:
    fields = {name: value for name, value in (HELLO | changed).items() if value is not ...}

    with pytest.raises(ContractError) as caught:
        MESSAGES.encode("messages", fields)

    assert (caught.value.code, caught.value.loc) == (code, loc)
    assert caught.value.collection == "messages"


class Color(Enum):
    RED = object()


class Text(str):
    __slots__ = ()


UNSTORABLE: list[tuple[Any, str]] = [
    (float("nan"), "invalid_number"),
    (float("inf"), "invalid_number"),
    (float("1e999"), "invalid_number"),
    (10**5_000, "invalid_number"),
    (1 << 64, "invalid_number"),
    (-(1 << 63) - 1, "invalid_number"),
    ("\ud800", "invalid_unicode"),
    ({"\ud800": 1}, "invalid_unicode"),
    (datetime(2026, 1, 1, tzinfo=UTC), "not_serializable"),
    ({1, 2}, "not_serializable"),
    (b"bytes", "not_serializable"),
    (lambda: None, "not_serializable"),
    (object(), "not_serializable"),
    (Color.RED, "not_serializable"),
    ({1: "one"}, "not_serializable"),
    (MappingProxyType({}), "not_serializable"),
    (AgentMessage(**HELLO), "not_serializable"),
    (nested(65), "too_deep"),
]


@pytest.mark.parametrize(("value", "code"), UNSTORABLE, ids=range(len(UNSTORABLE)))
def test_what_json_cannot_hold_is_refused_with_its_place(value: Any, code: str) -> None:
    args = {"list": [1, value]}

    with pytest.raises(ContractError) as plain:
        PLAIN.encode("rows", {"id": "a", "args": args})
    with pytest.raises(ContractError) as typed:
        CALLS.encode("tool_calls", {"id": "a", "generation_id": "g", "name": "n", "args": args})
    with pytest.raises(ContractError) as patched:
        CALLS.prepare("tool_calls", {"args": args}, "a")

    for caught in (plain, typed, patched):
        assert caught.value.code == code
        assert caught.value.loc[:3] == ("args", "list", 1)


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63), "é", [], {}, None, True, 0.5, nested(60)])
def test_what_json_can_hold_comes_back(value: Any) -> None:
    key, stored = CALLS.encode(
        "tool_calls", {"id": "a", "generation_id": "g", "name": "n", "args": value}
    )

    assert key == "a"
    assert CALLS.decode(stored).args == value


def test_a_subclass_that_only_looks_like_json_is_refused() -> None:
    with pytest.raises(ContractError) as caught:
        PLAIN.encode("rows", {"id": "a", "x": Text("x")})

    assert caught.value.code == "not_serializable"


def test_a_very_deep_value_is_refused_at_once() -> None:
    deep = nested(50_000)

    began = time.perf_counter()
    for codec, name in ((PLAIN, "rows"), (CALLS, "tool_calls")):
        with pytest.raises(ContractError) as caught:
            codec.encode(name, {"id": "a", "generation_id": "g", "name": "n", "args": deep})
        assert caught.value.code == "too_deep"

    assert time.perf_counter() - began < 0.5


def test_a_typed_integer_beyond_64_bits_is_refused() -> None:
    fields = {"id": "a", "generation_id": "g", "name": "n", "round": 10**5_000}

    with pytest.raises(ContractError) as caught:
        CALLS.encode("tool_calls", fields)

    assert caught.value.code == "invalid_number"


@pytest.mark.parametrize("key", [None, 5, "", "a\0b", "x" * 1025])
def test_a_plain_row_needs_a_key_that_is_text(key: Any) -> None:
    with pytest.raises(ContractError) as caught:
        PLAIN.encode("rows", {"id": key})

    assert caught.value.code == ("missing_field" if key is None else "invalid_id")
    assert caught.value.loc == ("id",)


def test_a_row_that_is_no_mapping_is_refused() -> None:
    for row in (5, "text", ["id"], object()):
        with pytest.raises(ContractError):
            PLAIN.encode("rows", row)
        with pytest.raises(ContractError):
            MESSAGES.encode("messages", row)  # pyright: ignore[reportArgumentType]


def test_defaults_are_filled_in_and_names_are_those_of_the_wire() -> None:
    key, stored = MESSAGES.encode(
        "messages", MappingProxyType({k: HELLO[k] for k in HELLO if k != "id"})
    )

    fields = msgspec.json.decode(stored)
    assert fields["id"] == key
    assert fields["actorId"] == "u"
    assert fields["processed"] is False
    assert fields["createdAt"].endswith("Z")
    assert b": " not in stored


def test_a_model_is_stored_as_it_is() -> None:
    message = AgentMessage(**HELLO)

    key, stored = MESSAGES.encode("messages", message)

    assert key == "m"
    assert MESSAGES.decode(stored) == message


def test_a_patch_changes_only_what_it_names() -> None:
    _, stored = MESSAGES.encode("messages", HELLO)
    before = MESSAGES.decode(stored)
    later = datetime(2030, 1, 1, 12, tzinfo=UTC)

    fields = MESSAGES.prepare("messages", {"processed": True, "created_at": later}, "m")
    after = MESSAGES.decode(MESSAGES.patch("messages", stored, fields, "m"))

    assert after == before.model_copy(update={"processed": True, "created_at": later})


@pytest.mark.parametrize(
    ("changes", "code", "loc"),
    [
        ({"id": "other"}, "immutable_key", ("id",)),
        ({"processed": "yes"}, "bool_type", ("processed",)),
        ({"role": "robot"}, "literal_error", ("role",)),
        ({"nonsense": 1}, "extra_forbidden", ("nonsense",)),
        ({"content": "x" * MAX_ROW_BYTES}, "row_too_large", ()),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(
    changes: dict[str, Any], code: str, loc: tuple[str, ...]
) -> None:
    _, stored = MESSAGES.encode("messages", HELLO)

    with pytest.raises(ContractError) as caught:
        MESSAGES.patch("messages", stored, MESSAGES.prepare("messages", changes, "m"), "m")

    assert (caught.value.code, caught.value.loc, caught.value.key) == (code, loc, "m")


def test_a_prepared_patch_is_a_copy() -> None:
    tags = ["a"]
    fields = PLAIN.prepare("rows", {"tags": tags}, "k")
    called = CALLS.prepare("tool_calls", {"args": {"tags": tags}}, "k")

    tags.append("b")

    assert fields == {"tags": ["a"]}
    assert called == {"args": {"tags": ["a"]}}


@dataclass
class Point:
    id: str
    x: int = 0
    tags: list[str] = field(default_factory=list[str])


@dataclass
class Deep(Point):
    z: int = 1


class Note(TypedDict):
    id: str
    text: str


class Inner(BaseModel):
    n: int


class Outer(BaseModel):
    id: str
    inner: Inner = Field(alias="theInner")


@pytest.mark.parametrize(
    ("row_type", "row", "stored"),
    [
        (Point, {"id": "p", "x": 1}, b'{"id":"p","x":1,"tags":[]}'),
        (Point, Point("p", 2, ["t"]), b'{"id":"p","x":2,"tags":["t"]}'),
        (Deep, Deep("p"), b'{"id":"p","x":0,"tags":[],"z":1}'),
        (Note, {"id": "n", "text": "hi"}, b'{"id":"n","text":"hi"}'),
        (Outer, {"id": "o", "theInner": {"n": 3}}, b'{"id":"o","theInner":{"n":3}}'),
        (None, {"id": "d", "any": [1]}, b'{"id":"d","any":[1]}'),
    ],
)
def test_models_dataclasses_typed_dicts_and_dicts_are_rows(
    row_type: Any, row: Any, stored: bytes
) -> None:
    codec: RowCodec[Any] = codec_of(row_type, "id")

    key, value = codec.encode("rows", row)

    assert value == stored
    assert key == msgspec.json.decode(stored)["id"]
    again = codec.encode("rows", codec.decode(value))
    assert again == (key, value)
    assert codec.patch("rows", value, {}, key) == stored


def test_fields_know_their_wire_name_kind_and_what_is_inside() -> None:
    assert MESSAGES.fields is not None
    assert MESSAGES.fields["created_at"].wire == "createdAt"
    assert MESSAGES.fields["created_at"].kind == "datetime"
    assert MESSAGES.fields["not_before"].kind == "datetime"
    outer = codec_of(Outer, "id").fields
    assert outer is not None
    inner = outer["inner"].fields
    assert inner is not None
    assert inner["n"].wire == "n"
    assert PLAIN.fields is None


def test_a_row_type_without_the_key_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        codec_of(Note, "key")

    assert caught.value.code == "invalid_key_field"


def test_a_stored_row_of_another_type_is_named() -> None:
    with pytest.raises(ContractError) as caught:
        MESSAGES.decode(b'{"id":"a"}')

    assert caught.value.code == "invalid_row"
