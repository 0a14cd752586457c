"""A pydantic model, a dataclass and a TypedDict do as row types wherever rows go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Annotated, Any, ClassVar, Generic, NotRequired, TypeVar, cast
from uuid import UUID

import msgspec
import pytest
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    computed_field,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from aidb_ray.database import Database, connect
from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.expressions import and_, eq, gt
from aidb_ray.store.collection import Change
from aidb_ray.store.rows import codec_of
from tests.stores import until


class Kind(StrEnum):
    BUG = "bug"
    WISH = "wish"


class Author(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    full_name: str
    born_at: AwareDatetime | None = None


class Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)

    id: str
    written_by: Author
    opened_at: AwareDatetime
    kind: Kind = Kind.BUG
    votes: Annotated[int, Field(ge=0)] = 0
    tags: list[str] = Field(default_factory=list)


class FrozenModel(Model):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


@dataclass
class Class:
    id: str
    written_by: Author
    opened_at: AwareDatetime
    kind: Kind = Kind.BUG
    votes: Annotated[int, Field(ge=0)] = 0
    tags: list[str] = field(default_factory=list[str])
    counted: ClassVar[int] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenClass:
    id: str
    written_by: Annotated[Author, Field(alias="writtenBy")]
    opened_at: Annotated[AwareDatetime, Field(alias="openedAt")]
    kind: Kind = Kind.BUG
    votes: Annotated[int, Field(ge=0)] = 0
    tags: tuple[str, ...] = ()


@pydantic_dataclass(config=ConfigDict(alias_generator=to_camel, populate_by_name=True))
class PydanticClass:
    id: str
    written_by: Author
    opened_at: AwareDatetime
    kind: Kind = Kind.BUG
    votes: Annotated[int, Field(ge=0)] = 0
    tags: list[str] = field(default_factory=list[str])


class Typed(TypedDict):
    __pydantic_config__ = ConfigDict(alias_generator=to_camel)  # pyright: ignore[reportGeneralTypeIssues]

    id: str
    written_by: Author
    opened_at: AwareDatetime
    kind: Kind
    votes: Annotated[int, Field(ge=0)]
    tags: NotRequired[list[str]]


TYPES: list[type[Any]] = [Model, FrozenModel, Class, FrozenClass, PydanticClass, Typed]
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def fields(key: str = "a", **changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "id": key,
        "written_by": {"full_name": "Ada", "bornAt": NOON},
        "opened_at": NOON,
        "kind": "bug",
        "votes": 3,
    }
    return given | changed


def get(row: Any, name: str) -> Any:
    return cast("dict[str, Any]", row)[name] if isinstance(row, dict) else getattr(row, name)


@pytest.fixture
async def db() -> Any:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.mark.parametrize("row_type", TYPES)
async def test_every_kind_of_row_type_goes_everywhere(db: Database, row_type: type[Any]) -> None:
    rows = db.collection("rows", row_type, session="aidb://s/1")
    heard: list[Change[Any]] = []
    subscribed = rows.subscribe(heard.extend, where=lambda r: gt(r.votes, 2))
    await subscribed.ready()
    live = db.live_query(
        lambda q: q.from_(r=rows).where(
            lambda r: and_(
                eq(r.written_by.full_name, "Ada"),
                eq(r.kind, "bug"),
                gt(r.written_by.born_at, datetime(2025, 1, 1, tzinfo=UTC)),
            )
        )
    )
    await live.ready()
    changes = rows.changes(since=0)

    await rows.insert(fields())
    await rows.insert(fields("b", kind=Kind.WISH, tags=["x"]))
    await rows.update("a", {"votes": 4})

    def draft(row: Any) -> None:
        row.tags = [*row.tags, "y"]
        row.opened_at = NOON.replace(hour=13)

    await rows.update("b", draft)
    await rows.ready()
    row = rows.get("a")
    assert row is not None
    assert isinstance(row, dict if row_type is Typed else row_type)
    assert get(row, "votes") == 4
    assert get(row, "opened_at") == NOON
    assert get(row, "written_by") == Author(full_name="Ada", born_at=NOON)
    assert await rows.find("a") == row == rows.values()[0]
    assert live.rows == [row]
    other = rows.get("b")
    assert get(other, "kind") is Kind.WISH
    assert list(get(other, "tags")) == ["x", "y"]
    assert get(other, "opened_at") == NOON.replace(hour=13)
    await until(lambda: len(heard) == 4)
    assert heard[2].before is not None
    assert [get(change.after, "votes") for change in heard] == [3, 3, 4, 3]
    told = [await anext(changes) for _ in range(4)]
    await changes.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert [change.after for change in told][2:] == [row, other]
    subscribed.close()
    await live.aclose()


@pytest.mark.parametrize("row_type", TYPES)
@pytest.mark.parametrize(
    ("changed", "code", "loc"),
    [
        ({"votes": "3"}, "int_type", ("votes",)),
        ({"votes": True}, "int_type", ("votes",)),
        ({"votes": 3.0}, "int_type", ("votes",)),
        ({"votes": -1}, "greater_than_equal", ("votes",)),
        ({"votes": float("nan")}, "invalid_number", ("votes",)),
        ({"votes": 1 << 70}, "invalid_number", ("votes",)),
        ({"kind": "rumor"}, "enum", ("kind",)),
        ({"opened_at": "soon"}, "datetime_parsing", ("opened_at",)),
        ({"opened_at": "2026-01-01T12:00:00"}, "timezone_required", ("opened_at",)),
        ({"opened_at": 5}, "datetime_type", ("opened_at",)),
        ({"written_by": {"full_name": 5}}, "string_type", ("written_by", "full_name")),
        ({"written_by": {}}, "missing_field", ("written_by", "full_name")),
        ({"written_by": {"full_name": "\ud800"}}, "invalid_unicode", ("written_by",)),
        ({"written_by": object()}, "not_serializable", ("written_by",)),
        ({"vote": 1}, "extra_forbidden", ("vote",)),
        ({"opened_at": ...}, "missing_field", ("opened_at",)),
        ({"~v": 2}, "extra_forbidden", ("~v",)),
    ],
)
def test_every_kind_is_strict_and_names_the_field(
    row_type: type[Any], changed: dict[str, Any], code: str, loc: tuple[str, ...]
) -> None:
    codec = codec_of(row_type, "id")
    given = {name: value for name, value in fields(**changed).items() if value is not ...}

    with pytest.raises(ContractError) as caught:
        codec.encode("rows", given)

    assert (caught.value.code, caught.value.loc[: len(loc)]) == (code, loc)
    if ... in changed.values():
        return
    _, stored = codec.encode("rows", fields())
    with pytest.raises(ContractError) as patched:
        codec.patch("rows", stored, codec.prepare("rows", changed, "a"), "a")
    assert (patched.value.code, patched.value.loc[: len(loc)]) == (code, loc)


@pytest.mark.parametrize("row_type", [Class, FrozenClass, Typed])
def test_an_instance_that_nothing_checked_is_checked(row_type: type[Any]) -> None:
    codec = codec_of(row_type, "id")
    wrong = row_type(**fields(votes="many", written_by=Author(full_name="Ada")))

    with pytest.raises(ContractError) as caught:
        codec.encode("rows", wrong)

    assert (caught.value.code, caught.value.loc) == ("int_type", ("votes",))


def test_a_model_that_was_changed_unchecked_is_checked() -> None:
    model = Model.model_validate(
        {"id": "a", "writtenBy": {"fullName": "Ada"}, "openedAt": NOON, "votes": 1}
    )
    model.votes = -1

    with pytest.raises(ContractError) as caught:
        codec_of(Model, "id").encode("rows", model)

    assert (caught.value.code, caught.value.loc) == ("greater_than_equal", ("votes",))


@pytest.mark.parametrize("row_type", TYPES)
def test_python_names_and_stored_names_may_be_given(row_type: type[Any]) -> None:
    codec = codec_of(row_type, "id")
    wire = "opened_at" if row_type is Class else "openedAt"
    given = fields()
    given[wire] = given.pop("opened_at")

    assert codec.encode("rows", given) == codec.encode("rows", fields())
    assert wire in msgspec.json.decode(codec.encode("rows", given)[1])


class Converting(BaseModel):
    model_config = ConfigDict(strict=False)

    id: str
    n: int


class Dropping(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str


class WithOpen(BaseModel):
    id: str
    inside: Open


@pytest.mark.parametrize(
    ("row_type", "given", "stored"),
    [
        (Converting, {"id": "a", "n": "5"}, {"id": "a", "n": 5}),
        (Dropping, {"id": "a", "x": 1}, {"id": "a"}),
        (Open, {"id": "a", "x": 1}, {"id": "a", "x": 1}),
        (WithOpen, {"id": "a", "inside": {"id": "b", "x": 1}}, ...),
    ],
)
def test_a_type_that_speaks_of_strict_or_extra_is_taken_at_its_word(
    row_type: type[Any], given: dict[str, Any], stored: Any
) -> None:
    _, value = codec_of(row_type, "id").encode("rows", given)

    assert msgspec.json.decode(value) == (given if stored is ... else stored)


def test_rows_of_an_open_type_may_get_new_fields() -> None:
    codec = codec_of(Open, "id")
    _, stored = codec.encode("rows", {"id": "a"})

    patched = codec.patch("rows", stored, codec.prepare("rows", {"x": 1}, "a"), "a")

    assert msgspec.json.decode(patched) == {"id": "a", "x": 1}
    for changes in ({"~v": 1}, {"x": object()}):
        with pytest.raises(ContractError):
            codec.prepare("rows", changes, "a")


class Area(BaseModel):
    id: str
    width: Decimal
    code: UUID

    @computed_field
    @property
    def double(self) -> Decimal:
        return 2 * self.width


def test_what_is_computed_is_not_stored() -> None:
    codec = codec_of(Area, "id")
    area = Area(id="a", width=Decimal("1.5"), code=UUID(int=1))

    _, stored = codec.encode("rows", area)

    assert msgspec.json.decode(stored) == {"id": "a", "width": "1.5", "code": str(UUID(int=1))}
    assert codec.decode(stored) == area


class Node(BaseModel):
    id: str
    parent: Node | None = None
    children: list[Node] = Field(default_factory=list["Node"])


def test_a_type_may_contain_itself() -> None:
    codec = codec_of(Node, "id")
    tree = Node(id="a", parent=Node(id="b"), children=[Node(id="c")])

    _, stored = codec.encode("rows", tree)

    assert codec.decode(stored) == tree
    assert codec.fields is not None
    assert codec.fields["parent"].fields is None


X = TypeVar("X")


class Box(BaseModel, Generic[X]):
    id: str
    inside: X


def test_a_generic_model_may_be_a_row_type() -> None:
    codec = codec_of(Box[Author], "id")

    _, stored = codec.encode("rows", {"id": "a", "inside": {"full_name": "Ada"}})

    assert codec.decode(stored) == Box[Author](id="a", inside=Author(full_name="Ada"))
    assert codec.fields is not None
    inside = codec.fields["inside"].fields
    assert inside is not None
    assert inside["full_name"].wire == "fullName"


class Legacy(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str
    text: str

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, value: Any) -> Any:
        if isinstance(value, dict) and "body" in value:
            given = cast("dict[str, Any]", value)
            return {"id": given["id"], "text": given["body"]}
        return cast("object", value)


def test_a_validator_sees_what_was_given() -> None:
    codec = codec_of(Legacy, "id")

    _, stored = codec.encode("rows", {"id": "a", "body": "hi"})

    assert codec.decode(stored) == Legacy(id="a", text="hi")


class Unreadable(BaseModel):
    id: str
    n: int = Field(serialization_alias="number")


class Version(BaseModel):
    id: str
    v: int = Field(alias="~v")


class Root(RootModel[dict[str, int]]):
    pass


@pytest.mark.parametrize(
    ("row_type", "names"),
    [(Unreadable, "'number'"), (Version, "'~v'"), (Root, "Root"), (int, "int"), (Enum, "Enum")],
)
def test_types_that_cannot_be_rows_are_refused(row_type: type[Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names) as caught:
        codec_of(row_type, "id")

    assert caught.value.code == "invalid_schema"


@dataclass
class Loose:
    id: str
    anything: Any = None
    bag: dict[str, Any] = field(default_factory=dict[str, Any])
    items: list[Any] = field(default_factory=list[Any])


@pytest.mark.parametrize("name", ["anything", "bag", "items"])
@pytest.mark.parametrize("make", [dict[str, Any], Loose])
def test_what_no_type_checks_must_be_json(name: str, make: Callable[..., Any]) -> None:
    """Else a time in it would come back as a text."""
    inside: Any = {"anything": NOON, "bag": {"at": NOON}, "items": [NOON]}[name]

    with pytest.raises(ContractError) as caught:
        codec_of(Loose, "id").encode("rows", make(id="a", **{name: inside}))

    assert (caught.value.code, caught.value.loc[0]) == ("not_serializable", name)


def test_dataclasses_are_told_by_their_fields() -> None:
    kind = codec_of(Class, "id").fields

    assert kind is not None
    assert list(kind) == [one.name for one in dataclasses.fields(Class)]
