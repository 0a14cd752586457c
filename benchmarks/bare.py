"""Turns without promises: what Ray and the disk allow when every hop is batched.

Three processes, as in the real thing: a driver asks, a store syncs, an agent answers; the same rows
and a sync for all that arrived during the last one. No validation, no queries, no epochs, no bounds
and no recovery: a ceiling to compare with in the same run.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import msgspec

from aidb_ray.runtime import ActorRef
from benchmarks.harness import Rig

POLL_TIMEOUT_MS = 600_000

Ask: TypeAlias = Callable[[str, str], Awaitable[str]]
"""Asks in a session and returns the reply's text."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Row(NamedTuple):
    """A row on its way: where it belongs, and its JSON."""

    collection: str
    key: str
    value: bytes


class BareStore:
    """Keeps rows in the order in which they came, and syncs them together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._log: list[Row] = []
        self._arrived: list[tuple[Sequence[Row], asyncio.Future[None]]] = []
        self._news = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None

    async def commit(self, rows: Sequence[Row]) -> None:
        """Return when the rows are on the disk."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrived.append((rows, done))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        await done

    async def poll(self, after: int, collection: str) -> tuple[int, list[Row]]:
        """Return the rows of a collection after place `after`, and the place they end at."""
        while len(self._log) <= after:
            await self._news.wait()
        end = len(self._log)
        return end, [row for row in self._log[after:end] if row.collection == collection]

    async def stop(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    async def _flush(self) -> None:
        while self._arrived:
            taken, self._arrived = self._arrived, []
            rows = [row for part, _ in taken for row in part]
            await asyncio.to_thread(self._write, msgspec.msgpack.encode(rows))
            self._log += rows
            for _, done in taken:
                done.set_result(None)
            self._news.set()
            self._news = asyncio.Event()
        self._flushing = None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("wb", buffering=0)
        self._file.write(data)
        os.fdatasync(self._file.fileno())


class BareClient:
    """Sends together what is committed while a call is in flight."""

    def __init__(self, store: ActorRef[BareStore]) -> None:
        self._store = store
        self._rows: list[Row] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._sending: asyncio.Task[None] | None = None

    def commit(self, rows: Sequence[Row]) -> asyncio.Future[None]:
        """Send rows; the future ends when they are on the disk."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rows += rows
        self._waiting.append(done)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return done

    async def _send(self) -> None:
        await asyncio.sleep(0)
        while self._rows:
            rows, waiting = self._rows, self._waiting
            self._rows, self._waiting = [], []
            await self._store.ask(BareStore.commit, rows)
            for done in waiting:
                done.set_result(None)
        self._sending = None


class BareAgent:
    """Answers every user row, in as many rows as a real turn writes."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._answering: asyncio.Task[None] | None = None

    async def begin(self, store: ActorRef[BareStore]) -> None:
        """Answer from now on until stopped."""
        self._answering = asyncio.create_task(self._answer_all(store))

    async def stop(self) -> None:
        """Answer no more."""
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.wait([self._answering])

    async def _answer_all(self, store: ActorRef[BareStore]) -> None:
        client = BareClient(store)
        at = 0
        async with asyncio.TaskGroup() as turns:
            while True:
                at, rows = await store.ask(BareStore.poll, at, "user")
                for row in rows:
                    turns.create_task(self._answer(client, row))

    async def _answer(self, client: BareClient, row: Row) -> None:
        message = _decode(row.value)
        history = self._history.setdefault(message["session"], [])
        history.append(message)
        key = row.key
        client.commit([Row("generation", key, _encode({"id": key, "status": "running"}))])
        tokens = list(self._tokens)
        reply = {**message, "id": f"{key}:reply", "role": "assistant", "content": "".join(tokens)}
        history.append(reply)
        await client.commit(
            [
                Row("chunks", key, _encode(tokens)),
                Row("assistant", key, _encode(reply)),
                Row("processed", key, _encode({**message, "processed": True})),
                Row("generation", key, _encode({"id": key, "status": "completed"})),
            ]
        )


@asynccontextmanager
async def bare_pipeline(rig: Rig, tokens: Sequence[str]) -> AsyncGenerator[Ask]:
    """Start the three and yield a function that asks."""
    async with rig.scratch() as home:
        store = (await rig.spawn(BareStore, home / "log")).with_timeout(POLL_TIMEOUT_MS)
        agent = await rig.spawn(BareAgent, tokens)
        await agent.ask(BareAgent.begin, store)
        client = BareClient(store)
        expected: dict[str, asyncio.Future[str]] = {}
        numbers = count()

        async def listen() -> None:
            at = 0
            while True:
                at, rows = await store.ask(BareStore.poll, at, "assistant")
                for row in rows:
                    expected.pop(row.key).set_result(_decode(row.value)["content"])

        async def ask(session: str, text: str) -> str:
            key = str(next(numbers))
            message = {"id": key, "session": session, "role": "user", "content": text}
            expected[key] = asyncio.get_running_loop().create_future()
            reply = expected[key]
            client.commit([Row("user", key, _encode({**message, "processed": False}))])
            return await reply

        listening = asyncio.create_task(listen())
        try:
            yield ask
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            await agent.stop()
            await store.stop()
