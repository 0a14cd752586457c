"""Rows of several versions of a schema in one collection, as each reader meets them."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import msgspec
import pytest
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from aidb_ray.database import Database, connect
from aidb_ray.errors import ConfigError, ConflictError, ContractError, KeyMissingError
from aidb_ray.expressions import eq, gt
from aidb_ray.query.builder import Query, QueryRoot, build
from aidb_ray.query.live import filter_of
from aidb_ray.query.operators import Pipeline
from aidb_ray.store.changes import Delete
from aidb_ray.store.collection import Change, Collection
from aidb_ray.store.rows import RowCodec, codec_of
from aidb_ray.store.versions import stamp, unstamp
from tests.stores import Process, open_store, until

SESSION = "aidb://people/1"


@dataclass
class PersonOne:
    id: str
    first: str
    last: str
    age: str = "0"


@dataclass
class PersonTwo:
    id: str
    name: str
    age: str = "0"


class Person(BaseModel):
    """Version 3."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    id: str
    full_name: str
    age: int = 0


def to_two(fields: dict[str, Any], version: int) -> dict[str, Any]:
    assert version == 1
    fields["name"] = f"{fields.pop('first')} {fields.pop('last')}"
    return fields


def to_three(fields: dict[str, Any], version: int) -> dict[str, Any]:
    if version < 2:
        fields = to_two(fields, version)
    return {"id": fields["id"], "fullName": fields["name"], "age": int(fields["age"])}


def ones(db: Database) -> Collection[PersonOne]:
    return db.collection("people", PersonOne, session=SESSION)


def twos(db: Database) -> Collection[PersonTwo]:
    return db.collection("people", PersonTwo, session=SESSION, version=2, migrate=to_two)


def people(db: Database) -> Collection[Person]:
    return db.collection("people", Person, session=SESSION, version=3, migrate=to_three)


async def stored(db: Database, key: str) -> dict[str, Any]:
    found = await db.site_of(SESSION).client.find(SESSION, "people", key)
    assert found is not None
    return msgspec.json.decode(found.value)


@pytest.fixture
async def db() -> AsyncGenerator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


async def mixed(db: Database) -> None:
    """Write a row under each version."""
    await ones(db).insert(PersonOne("a", "Ada", "Byron", "36"))
    await twos(db).insert({"id": "b", "name": "Bob B", "age": "7"})
    await people(db).insert({"id": "c", "full_name": "Cy C", "age": 50})


ADA = Person(id="a", full_name="Ada Byron", age=36)
BOB = Person(id="b", full_name="Bob B", age=7)
CY = Person(id="c", full_name="Cy C", age=50)


def test_a_row_of_version_one_is_stored_as_it_is() -> None:
    row = b'{"id":"a"}'

    assert stamp(row, 1) == row
    assert unstamp(row) == (1, row)


@pytest.mark.parametrize("version", [2, 9, 10, 999_999_999])
def test_a_version_is_found_again(version: int) -> None:
    row = b'{"id":"a","~v":7}'

    assert unstamp(stamp(row, version)) == (version, row)


@pytest.mark.parametrize("row", [b'{"~v":"x","id":"a"}', b'{"~v":0,"id":"a"}', b'{"~v":2}', b"{}"])
def test_what_only_looks_like_a_version_is_none(row: bytes) -> None:
    assert unstamp(row) == (1, row)
    assert codec_of(None, "id").current(row) == row


async def test_old_rows_are_migrated_when_read_and_written_back_when_updated(db: Database) -> None:
    await mixed(db)
    rows = people(db)

    assert [await rows.find(key) for key in "abc"] == [ADA, BOB, CY]
    await rows.ready()
    assert rows.values() == [ADA, BOB, CY]
    assert (len(rows), rows.get("a"), "b" in rows) == (3, ADA, True)
    assert await stored(db, "a") == {"id": "a", "first": "Ada", "last": "Byron", "age": "36"}
    assert await stored(db, "b") == {"~v": 2, "id": "b", "name": "Bob B", "age": "7"}

    await rows.update("a", {"age": 37})

    assert await stored(db, "a") == {"~v": 3, "id": "a", "fullName": "Ada Byron", "age": 37}
    assert rows.get("a") == await rows.find("a") == ADA.model_copy(update={"age": 37})
    assert await stored(db, "b") == {"~v": 2, "id": "b", "name": "Bob B", "age": "7"}


async def test_drafts_and_conditions_see_migrated_rows(db: Database) -> None:
    await mixed(db)
    rows = people(db)
    await rows.ready()

    def grow(row: Any) -> None:
        row.age += 1

    await rows.update("a", grow)
    await rows.update("b", {"age": 8}, when=lambda r: eq(r.full_name, "Bob B"))
    with pytest.raises(ConflictError) as caught:
        await rows.update("c", {"age": 1}, when=lambda r: gt(r.age, 50))

    assert [row.age for row in rows.values()] == [37, 8, 50]
    assert caught.value.current == {"id": "c", "fullName": "Cy C", "age": 50}
    with pytest.raises(ConflictError) as old:
        await rows.delete("b", expected_revision=1)
    assert old.value.current == {"id": "b", "fullName": "Bob B", "age": 8}


async def test_a_refused_write_names_the_row_without_its_version(db: Database) -> None:
    await mixed(db)
    client = db.site_of(SESSION).client

    with pytest.raises(ConflictError) as caught:
        await client.commit([Delete(SESSION, "people", "c", base=1)])

    assert caught.value.current == {"id": "c", "fullName": "Cy C", "age": 50}


async def test_queries_ask_migrated_rows(db: Database) -> None:
    await mixed(db)
    rows = people(db)

    def named(q: QueryRoot) -> Query[Person]:
        return q.from_(p=rows).where(lambda p: eq(p.full_name, "Ada Byron"))

    async with db.live_query(named) as live:
        assert live.rows == await db.query(named) == [ADA]
        await twos(db).insert({"id": "d", "name": "Ada Byron", "age": "1"})
        await until(lambda: len(live.rows) == 2)
        assert live.rows == await db.query(named)


async def test_the_store_is_asked_for_no_field_that_versions_store_differently(
    db: Database,
) -> None:
    def filter_for(rows: Collection[Any]) -> Any:
        query = build(lambda q: q.from_(p=rows).where(lambda p: eq(p.age, 7)))
        return filter_of(Pipeline(query).inputs[0])

    alike = db.collection("people", Person, session=SESSION, version=3)

    assert filter_for(people(db)).where == ()
    assert filter_for(people(db)).session == SESSION
    assert filter_for(alike).where == (("age", (7,)),)


async def test_subscribers_and_changes_hear_migrated_rows(db: Database) -> None:
    await mixed(db)
    rows = people(db)
    heard: list[Change[Person]] = []
    subscribed = rows.subscribe(
        heard.extend, where=lambda p: gt(p.age, 10), include_initial_state=True
    )
    await subscribed.ready()
    changes = rows.changes(since=0)

    await twos(db).update("a", {"age": "5"})
    await until(lambda: len(heard) == 3)

    assert [change.after for change in heard] == [ADA, CY, None]
    assert heard[2].before == ADA
    told = [await anext(changes) for _ in range(4)]
    await changes.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert [change.after for change in told] == [ADA, BOB, CY, ADA.model_copy(update={"age": 5})]
    assert told[3].before == ADA
    subscribed.close()


async def test_a_subscriber_looks_for_what_old_rows_do_not_store(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        writer = Collection(Process(store), "people", PersonOne, session=SESSION)
        await writer.insert({"id": "a", "first": "Ada", "last": "Byron", "age": "36"})
        reader = Collection(
            Process(store), "people", Person, session=SESSION, version=3, migrate=to_three
        )
        heard: list[Change[Person]] = []
        subscribed = reader.subscribe(
            heard.extend,
            where=lambda p: eq(p.full_name, "Ada Byron"),
            include_initial_state=True,
        )
        await subscribed.ready()

        assert [change.after for change in heard] == [ADA]
        subscribed.close()


async def test_an_older_reader_refuses_newer_rows_and_serves_the_others(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await mixed(db)
    rows = twos(db)

    with pytest.raises(ContractError, match=r"version 3 .* up to 2") as caught:
        await rows.find("c")
    await rows.ready()
    with pytest.raises(ContractError) as got:
        rows.get("c")
    with pytest.raises(ContractError) as updated:
        await rows.update("c", {"age": "1"})

    assert {caught.value.code, got.value.code, updated.value.code} == {"newer_schema"}
    assert (got.value.collection, got.value.key) == ("people", "c")
    assert [row.name for row in rows.values()] == ["Ada Byron", "Bob B"]
    assert len(rows) == 2
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert await stored(db, "c") == {"~v": 3, "id": "c", "fullName": "Cy C", "age": 50}
    with pytest.raises(ContractError) as plain:
        await db.collection("people", session=SESSION).find("b")
    assert plain.value.code == "newer_schema"


def fails_for_bob(fields: dict[str, Any], version: int) -> dict[str, Any]:
    if fields["id"] == "b":
        raise ZeroDivisionError("no Bob")
    return to_three(fields, version)


async def test_a_row_that_cannot_be_migrated_hides_no_other(
    db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await mixed(db)
    rows = db.collection("people", Person, session=SESSION, version=3, migrate=fails_for_bob)
    heard: list[Change[Person]] = []
    subscribed = rows.subscribe(heard.extend, include_initial_state=True)
    await subscribed.ready()
    await rows.ready()

    with pytest.raises(ContractError) as caught:
        await rows.find("b")
    with pytest.raises(ContractError):
        rows.get("b")
    async with db.live_query(lambda q: q.from_(p=rows).where(lambda p: gt(p.age, 0))) as live:
        assert live.rows == rows.values() == [ADA, CY]
    assert [change.after for change in heard] == [ADA, CY]
    assert await db.query(lambda q: q.from_(p=rows)) == [ADA, CY]
    told = rows.changes(since=0)
    seen = [await anext(told) for _ in range(2)]
    assert [(change.key, change.is_last) for change in seen] == [("a", True), ("c", True)]
    await told.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    error = caught.value
    assert (error.code, error.collection, error.key) == ("migration_failed", "people", "b")
    assert "from version 2 to 3" in str(error)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert all("no Bob" in record.getMessage() for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.ERROR}

    caplog.clear()
    assert len(rows) == 2
    assert not caplog.records, "once is enough for a row that did not change"

    await rows.delete("b")
    with pytest.raises(KeyMissingError):
        await rows.delete("b")
    subscribed.close()


async def test_a_commit_whose_last_row_cannot_be_read_still_has_an_end(db: Database) -> None:
    await twos(db).insert([PersonTwo("a", "A A"), PersonTwo("b", "B B")])
    rows = db.collection("people", Person, session=SESSION, version=3, migrate=fails_for_bob)

    changes = rows.changes(since=0)
    change = await anext(changes)
    await changes.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    assert (change.key, change.is_last) == ("a", True)


@pytest.mark.parametrize(
    ("returned", "words", "loc"),
    [
        (None, "NoneType", ()),
        ([], "list", ()),
        ({"fullName": "A", "age": 1}, "id", ("id",)),
        ({"id": "other", "fullName": "A"}, "'other'", ()),
        ({"id": "a", "fullName": 5}, "full_name", ("full_name",)),
        ({"id": "a", "fullName": "A", "age": "1"}, "age", ("age",)),
        ({"id": "a", "fullName": "A", "first": "Ada"}, "first", ("first",)),
        ({"id": "a", "fullName": "\ud800"}, "surrogate", ("full_name",)),
    ],
)
def test_what_does_not_fit_after_migration_is_named(
    returned: Any, words: str, loc: tuple[str, ...]
) -> None:
    codec: RowCodec[Any] = RowCodec(Person, "id", 2, lambda _fields, _version: returned)

    with pytest.raises(ContractError, match=words) as caught:
        codec.decode(b'{"id":"a","first":"Ada"}', "people", "a")

    assert (caught.value.code, caught.value.loc) == ("migration_failed", loc)
    assert codec.try_current(b'{"id":"a"}', "people", "a") is None


def test_plain_rows_have_versions_too() -> None:
    def migrate(fields: dict[str, Any], version: int) -> dict[str, Any]:
        return {**fields, "was": version}

    codec: RowCodec[Any] = RowCodec(None, "id", 3, migrate)

    key, now = codec.encode("rows", {"id": "a", "was": 0})

    assert (key, now) == ("a", b'{"~v":3,"id":"a","was":0}')
    assert codec.decode(now, "rows", "a") == {"id": "a", "was": 0}
    assert codec.decode(b'{"~v":2,"id":"a"}', "rows", "a") == {"id": "a", "was": 2}
    assert codec.decode(b'{"id":"a"}', "rows", "a") == {"id": "a", "was": 1}
    assert codec.patch("rows", b'{"id":"a"}', {"x": 1}, "a") == b'{"~v":3,"id":"a","was":1,"x":1}'


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str


WRITES: list[Callable[[Collection[Any], Collection[Any]], object]] = [
    lambda plain, _: plain.insert({"id": "b", "~v": 2}),
    lambda plain, _: plain.update("a", {"~v": 2}),
    lambda _, typed: typed.insert({"id": "b", "~v": 2}),
    lambda _, typed: typed.insert(Open.model_validate({"id": "b", "~v": 2})),
    lambda _, typed: typed.update("a", {"~v": 2}),
]


@pytest.mark.parametrize("write", WRITES)
async def test_the_field_of_the_version_is_the_stores(
    db: Database, write: Callable[[Collection[Any], Collection[Any]], object]
) -> None:
    plain, typed = db.collection("plain"), db.collection("typed", Open)
    await plain.insert({"id": "a"})
    await typed.insert({"id": "a"})

    with pytest.raises(ContractError) as caught:
        write(plain, typed)

    assert (caught.value.code, caught.value.loc) == ("reserved_field", ("~v",))


async def wait(_fields: dict[str, Any], _version: int) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"version": 0}, "invalid_version"),
        ({"version": "2"}, "invalid_version"),
        ({"version": 1 << 40}, "invalid_version"),
        ({"migrate": to_two}, "invalid_version"),
        ({"version": 2, "migrate": wait}, "invalid_migrate"),
        ({"version": 2, "migrate": "to_two"}, "invalid_migrate"),
    ],
)
async def test_options_that_make_no_sense_are_refused(
    db: Database, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        db.collection("people", **options)

    assert caught.value.code == code


class Nowhere:
    """A database that pickles."""

    def site_of(self, session: str) -> Any:
        raise AssertionError(session)

    sites_of = site_of

    async def connected(self) -> None:
        raise AssertionError


def test_handles_take_their_version_and_migration_along() -> None:
    rows = Collection(Nowhere(), "people", Person, session=SESSION, version=3, migrate=to_three)
    local = Collection(
        Nowhere(), "people", Person, session=SESSION, version=3, migrate=lambda f, v: to_three(f, v)
    )

    for sent in (pickle.loads(pickle.dumps(rows)), cloudpickle.loads(cloudpickle.dumps(local))):
        source = sent.as_source()
        assert (source.version, source.key, source.row_type) == (3, "id", Person)
        old = b'{"~v":2,"id":"b","name":"Bob B","age":"7"}'
        assert sent._codec.decode(old, "people", "b") == BOB


def test_a_migration_that_cannot_travel_is_named() -> None:
    loop = asyncio.new_event_loop()
    rows = Collection(
        Nowhere(), "people", Person, version=3, migrate=lambda f, v: to_three(f, v) if loop else f
    )

    with pytest.raises(ConfigError, match="migrate") as caught:
        cloudpickle.dumps(rows)

    loop.close()
    assert caught.value.code == "not_picklable"


async def test_an_agent_takes_work_of_older_versions(db: Database) -> None:
    await mixed(db)
    rows = people(db)
    from aidb_ray.agents.agent import create_agent

    answered: dict[str, str] = {}

    async def generate(ctx: Any) -> str:
        return ",".join(row.full_name for row in ctx.pending)

    def on_response(response: str, pending: list[Person]) -> None:
        for row in pending:
            answered[row.id] = response
            rows.update(row.id, {"age": 0})

    agent = create_agent(
        name="greeter",
        pending_work=lambda q: q.from_(p=rows).where(lambda p: gt(p.age, 0)),
        session=lambda row: row.id,
        generate=generate,
        on_response=on_response,
    )
    await agent.ready()
    async with asyncio.timeout(10):
        await agent.drain_until_idle(max_duration_ms=5_000)

    assert answered == {"a": "Ada Byron", "b": "Bob B", "c": "Cy C"}
    assert await rows.find("b") == BOB.model_copy(update={"age": 0})


async def test_rows_survive_with_their_versions(tmp_path: Path) -> None:
    async with connect("local", data_dir=tmp_path) as db:
        await mixed(db)
    async with connect("local", data_dir=tmp_path) as db:
        rows = people(db)
        await rows.ready()

        assert rows.values() == [ADA, BOB, CY]


def test_codecs_are_made_once() -> None:
    assert codec_of(Person, "id", 3, to_three) is codec_of(Person, "id", 3, to_three)
    assert codec_of(Person, "id") is not codec_of(Person, "id", 3, to_three)


def test_an_insert_under_a_version_bears_it() -> None:
    codec: RowCodec[Any] = codec_of(Person, "id", 3, to_three)

    _, value = codec.encode("people", ADA)

    assert value == b'{"~v":3,"id":"a","fullName":"Ada Byron","age":36}'
