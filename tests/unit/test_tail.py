from __future__ import annotations

from pathlib import Path

import pytest

from aidb_ray.errors import CompactedError
from aidb_ray.store.changes import Filter
from aidb_ray.store.tail import tail_changes
from tests.stores import SESSION, insert, open_store, until


def _as_it_is(row: bytes, _collection: str, _key: str) -> bytes:
    return row


async def test_nothing_behind_a_gap_is_told(tmp_path: Path) -> None:
    """Else a reader that goes on after the last revision it was told would miss the gap."""
    async with open_store(tmp_path) as store:
        writer, client = store.client(), store.client()
        changes = tail_changes(client, Filter("rows", SESSION), 0, 10, _as_it_is)
        await writer.commit([insert("a")])
        assert (await anext(changes))[1].key == "a"

        before = await writer.commit([insert("b")])
        await client.feed.reached(before)
        client.feed._generation = "of another store"
        missed = await writer.commit([insert("missed")])
        await until(lambda: client.feed.cursor >= missed)
        await client.feed.reached(await writer.commit([insert("behind")]))

        assert (await anext(changes))[1].key == "b"
        with pytest.raises(CompactedError, match=f"after revision {before} "):
            await anext(changes)
