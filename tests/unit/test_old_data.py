"""A data directory of an earlier program opens, holds what it held, and is written on.

`fixtures/data-format-2.tar.xz` has the directory of a database, with segments, what compaction left
of others, and snapshots; and what was read from it by the program that wrote it.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from aidb_ray.agents.agent import create_agent
from aidb_ray.agents.definition import durable_agent
from aidb_ray.chunks import replay
from aidb_ray.database import Database, Session, connect
from aidb_ray.store.actor import StoreActor
from aidb_ray.testing import ScriptedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    with tarfile.open(FIXTURES / "data-format-2.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path


async def read(session: Session) -> dict[str, Any]:
    """Return all that a session holds, as the program that wrote it did."""
    found: dict[str, Any] = {}
    for collection in (session.messages, session.generations, session.tool_calls):
        await collection.ready()
        rows = [row.model_dump(mode="json") for row in collection.values()]
        found[collection.name] = sorted(rows, key=lambda row: row["created_at"])
    notes = session.collection("notes")
    await notes.ready()
    found["notes"] = notes.values()
    found["chunks"] = {
        generation["id"]: [
            chunk.model_dump(mode="json")
            async for chunk in replay(session.chunks, generation_id=generation["id"], follow=False)
        ]
        for generation in found["generations"]
    }
    return found


def as_known(found: Any, known: Any) -> Any:
    """Return what was found without fields that are newer than the program that wrote it."""
    match found, known:
        case dict(), dict():
            fields, names = cast("dict[str, Any]", found), cast("dict[str, Any]", known)
            return {name: as_known(fields[name], value) for name, value in names.items()}
        case list(), list():
            pairs = zip(cast("list[Any]", found), cast("list[Any]", known), strict=True)
            return [as_known(one, other) for one, other in pairs]
        case _:
            return found


async def check(db: Database, expected: dict[str, Any]) -> None:
    for url, rows in expected.items():
        assert as_known(await read(db.session(url)), rows) == rows


async def test_it_opens_and_holds_what_it_held(data_dir: Path) -> None:
    expected = json.loads((data_dir / "expected.json").read_text())
    for _ in range(2):
        async with connect("local", data_dir=data_dir, database="old") as db:
            await check(db, expected)
            assert await db.collection("settings").find("color") == {"id": "color", "value": "blue"}


async def test_it_is_written_on_compacted_and_opened_again(data_dir: Path) -> None:
    expected = json.loads((data_dir / "expected.json").read_text())
    gone = "aidb://helper/1"
    async with connect("local", data_dir=data_dir, database="old") as db:
        await db.session(gone).delete()
        del expected[gone]
        model = ScriptedModel(lambda messages: f"{len(messages)} messages")
        agent = create_agent(durable_agent(name="helper", adapter=model))
        reply = await agent.send("more", session="aidb://helper/9").reply(timeout_ms=20_000)
        assert reply.content == "1 messages"
        for n in range(4):
            await db.collection("settings").insert({"id": f"{n}", "pad": "x" * 20_000})
            await db.partitions[0].ref.ask(StoreActor.snapshot)
        await agent.aclose()
    async with connect("local", data_dir=data_dir, database="old") as db:
        await check(db, expected)
        assert [session.url for session in await db.sessions("aidb://helper/")] == [
            "aidb://helper/0",
            "aidb://helper/2",
            "aidb://helper/9",
        ]
