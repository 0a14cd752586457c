"""Stores in this event loop, on real files, whose process can die and whose disk can be held up."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, overload
from uuid import uuid4

from aidb_ray.database import Partition
from aidb_ray.errors import UnavailableError
from aidb_ray.runtime import ActorRef, LocalRef
from aidb_ray.store.actor import StoreActor, StoreOptions
from aidb_ray.store.changes import Insert, Mutation
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Collection
from aidb_ray.store.files import FileSystem
from aidb_ray.store.log import create_store

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

SESSION = "aidb://test/1"


def insert(key: str, value: str = "1", *, session: str = SESSION, into: str = "rows") -> Insert:
    """Return an insert of `{"id": key, "v": value}`, where `value` is JSON."""
    return Insert(session, into, key, row(key, value))


def row(key: str, value: str = "1") -> bytes:
    return f'{{"id":"{key}","v":{value}}}'.encode()


class HeldFiles(FileSystem):
    """Real files of a process that can die, on a disk whose syncs can be held up or fail.

    Attributes:
        sync_error: The error number that every sync of data raises, 0 for none.
        free: Whether there is space to write.
    """

    def __init__(self) -> None:
        self.sync_error = 0
        self.free = True
        self.syncs = 0
        self._may_sync = threading.Event()
        self._may_sync.set()
        self._fds: set[int] = set()
        self._is_dead = False

    def hold_syncs(self) -> None:
        self._may_sync.clear()

    def let_syncs_go(self) -> None:
        self._may_sync.set()

    def die(self) -> None:
        """Close what is open, as the end of a process does, and refuse everything later."""
        self._is_dead = True
        self._may_sync.set()
        # Taken away first: what is collected meanwhile closes its file as well.
        fds, self._fds = self._fds, set()
        for fd in fds:
            os.close(fd)

    def open(self, path: Path, *, write: bool = False, create: bool = False) -> int:
        self._check()
        fd = super().open(path, write=write, create=create)
        self._fds.add(fd)
        return fd

    def open_lock(self, path: Path) -> int:
        fd = super().open_lock(path)
        self._fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        # A snapshot that outlives its process is closed when it is collected.
        if fd in self._fds:
            self._fds.discard(fd)
            super().close(fd)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._check()
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fd, data, offset)

    def sync_data(self, fd: int) -> None:
        self._may_sync.wait()
        self._check()
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        self.syncs += 1
        super().sync_data(fd)

    def _check(self) -> None:
        if self._is_dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Store:
    """A store and the one address under which its incarnations are reached.

    Attributes:
        lose_answers: How many answers to commits are lost on the way back.
        refuses_polls: Whether readers cannot reach the store, while others can.
        deaths: How often the store gave itself up.
        now: Its clock, in seconds; the one on the wall is `wall` ahead of it.
    """

    def __init__(self, directory: Path, **options: Any) -> None:
        self.directory = directory / "p0"
        self.uuid = str(uuid4())
        usual: dict[str, Any] = {
            "database": "test",
            "partition": 0,
            "durability": "local",
            "directory": str(self.directory),
            "store_uuid": self.uuid,
            "segment_bytes": 1 << 20,
            "reserve_bytes": 0,
        }
        self.options = StoreOptions(**{**usual, **options})
        create_store(
            self.directory,
            FileSystem(),
            store_uuid=self.uuid,
            database="test",
            partition=0,
            partitions=1,
        )
        self.now = 0.0
        self.wall = 1_000_000_000.0
        self.lose_answers = 0
        self.refuses_polls = False
        self.deaths = 0
        self.files = HeldFiles()
        self.actor: StoreActor
        self.calls = 0
        self._local: LocalRef[StoreActor] | None = None
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clients: list[StoreClient] = []

    def _die(self) -> None:
        self.deaths += 1

    def start(self) -> None:
        self.files = HeldFiles()
        self.actor = StoreActor(
            self.options,
            files=self.files,
            die=self._die,
            clock=lambda: self.now,
            wall=lambda: self.wall + self.now,
        )
        self._dead = asyncio.get_running_loop().create_future()
        self._local = LocalRef(self.actor)

    async def kill(self) -> None:
        """End the process: calls in flight get no answer, and nothing more is written."""
        local, self._local = self._local, None
        self._dead.set_result(None)
        self.files.die()
        assert local is not None
        local.kill()
        tasks = [t for t in (self.actor._flusher, self.actor._opening) if t is not None]
        await asyncio.gather(*tasks, *local._calls, return_exceptions=True)

    async def restart(self) -> None:
        """Kill the store and start another in its place."""
        await self.kill()
        self.start()
        await self.actor.open()

    @property
    def ref(self) -> ActorRef[StoreActor]:
        return cast("ActorRef[StoreActor]", self)

    def client(self, **options: Any) -> StoreClient:
        client = StoreClient(self.ref, **options)
        self._clients.append(client)
        return client

    async def aclose(self) -> None:
        self.files.let_syncs_go()
        for client in self._clients:
            await client.aclose()
        if self._local is not None:
            await self._local.stop()

    # The address.

    def with_timeout(self, timeout_ms: int) -> Store:
        del timeout_ms
        return self

    async def ask(
        self,
        method: Callable[Concatenate[StoreActor, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        local, dead = self._local, self._dead
        if local is None or (self.refuses_polls and method.__name__ == "poll"):
            raise UnavailableError("The store is down.", outcome="not_applied")
        self.calls += 1
        asking = asyncio.ensure_future(local.ask(method, *args, **kwargs))
        try:
            await asyncio.wait([asking, dead], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not asking.done():
                asking.cancel()
        if not asking.done() or asking.cancelled():
            raise UnavailableError("The store went away.", outcome="unknown")
        return asking.result()

    async def ask_shielded(
        self,
        method: Callable[Concatenate[StoreActor, P], Awaitable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        answer = await self.ask(method, *args, **kwargs)
        if self.lose_answers and method.__name__ == "commit":
            self.lose_answers -= 1
            raise UnavailableError("The answer was lost.", outcome="unknown")
        return answer


@asynccontextmanager
async def open_store(directory: Path, **options: Any) -> AsyncGenerator[Store]:
    """Give a fresh store that serves."""
    store = Store(directory, **options)
    store.start()
    try:
        await store.actor.open()
        yield store
    finally:
        await store.aclose()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until `condition` holds; fails after 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  Threads and files send no events.
            await asyncio.sleep(0.001)


async def committed(client: StoreClient, *mutations: Mutation) -> int:
    return await client.commit(mutations)


class Process:
    """One process's connection to a store, with the collections it holds."""

    def __init__(self, store: Store, **options: Any) -> None:
        self.site = Partition(store.ref)
        self.site.client = store.client(**options)

    async def connected(self) -> None:
        """It is."""

    def site_of(self, session: str) -> Partition:
        del session
        return self.site

    def sites_of(self, session: str) -> list[Partition]:
        return [self.site_of(session)]

    @overload
    def collection(self, name: str, *, session: str = ...) -> Collection[dict[str, Any]]: ...
    @overload
    def collection(self, name: str, row_type: type[T], *, session: str = ...) -> Collection[T]: ...
    def collection(
        self, name: str, row_type: type[Any] | None = None, *, session: str = SESSION
    ) -> Collection[Any]:
        return Collection(self, name, row_type, session=session)
