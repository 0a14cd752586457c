"""`connect`: from an address and a directory to a database."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aidb_ray.contracts import is_valid_name
from aidb_ray.database.connections import keep_open, open_connections
from aidb_ray.database.database import Database
from aidb_ray.database.stores import Plan, check_shared_directory, find_running, start_stores
from aidb_ray.errors import ConfigError, StoreLockedError
from aidb_ray.runtime import Cluster, connect_cluster
from aidb_ray.store.holders import holders_of


class Connecting(Coroutine[Any, Any, "Database"]):
    """What `connect` returns: await it, or enter it. A task may be made of it, too."""

    def __init__(self, opening: Coroutine[Any, Any, Database]) -> None:
        # Made already, so that it warns as coroutines do if nobody ever awaits it.
        self._opening = opening
        self._database: Database | None = None

    def __await__(self) -> Generator[Any, None, Database]:
        return self._opening.__await__()

    def send(self, value: Any, /) -> Any:
        """See `Coroutine`."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """See `Coroutine`."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """See `Coroutine`."""
        self._opening.close()

    async def __aenter__(self) -> Database:
        self._database = await self._opening
        return self._database

    async def __aexit__(self, *_: object) -> None:
        assert self._database is not None
        await self._database.aclose()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say what is missing, where a `Database` is taken for granted."""
            raise AttributeError(
                f"connect(...) has no {name!r} before it is awaited: write `db = await "
                f"connect(...)` or `async with connect(...) as db`.",
                name=name,
                obj=self,
            )


def connect(
    address: str | None = None,
    *,
    data_dir: str | os.PathLike[str] = ".aidb",
    database: str = "default",
    partitions: int = 1,
    replicas: int = 1,
    durability: Literal["local", "memory"] = "local",
    store_options: dict[str, Any] | None = None,
) -> Connecting:
    """Connect to a database, creating it if it does not exist: `await` it or `async with` it.

    Args:
        address: None: the Ray cluster of this process or of RAY_ADDRESS, else one started here.
            `"local"`: in this process, no Ray, same log format, one connection at a time. `"auto"`,
            `"host:port"`: an existing cluster, whose stores and agents outlive this process.
        data_dir: Where the log lies. Relative only for a cluster started here or `"local"`.
        database: Its name, which is that of its directory in `data_dir`, too.
        partitions: Fixed when the database is created.
        replicas: 1.
        durability: `"local"`: durable on this node's disk. `"memory"`: lost with the process.
        store_options: Overrides for `StoreOptions`, such as `snapshot_bytes`.

    Raises:
        ConfigError: an argument cannot be; `partitions` differs from what the database has.
        StoreMismatchError: the directory is missing on an existing cluster, or foreign.
        StoreLockedError: another process still has the directory after 20 s, or a `"local"`
            connection of this process has it.
    """
    if not is_valid_name(database) or "/" in database:
        raise ConfigError(f"{database!r} cannot name a database.", code="invalid_name")
    if not 1 <= partitions <= 4096:
        raise ConfigError("A database has 1 to 4096 partitions.", code="invalid_partitions")
    if replicas != 1:
        raise ConfigError("Only replicas=1 is available.", code="invalid_replicas")
    if durability not in ("local", "memory"):
        raise ConfigError(
            f"durability is 'local' or 'memory', not {durability!r}.", code="invalid_durability"
        )
    plan = Plan(
        address, Path(data_dir), database, partitions, durability, dict(store_options or {})
    )
    opening = _connect(plan)
    opening.__qualname__ = "connect(...)"  # Of which the warning speaks.
    return Connecting(opening)


async def _connect(plan: Plan) -> Database:
    if plan.address == "local":
        with _opening_here(plan):
            return keep_open(await _open_here(plan))
    cluster = await connect_cluster(plan.address)
    try:
        database = await _open_database(plan, cluster)
    except BaseException:
        await cluster.close()
        raise
    return keep_open(database)


async def _open_here(plan: Plan) -> Database:
    refs = await start_stores(plan, plan.home, None, is_private=True)
    return Database(
        plan.database, refs, data_dir=str(plan.home), cluster=None, durability=plan.durability
    )


async def _open_database(plan: Plan, cluster: Cluster) -> Database:
    home = plan.home
    holders = holders_of(plan.database) if cluster.owned else None
    async with nullcontext() if holders is None else holders.turn():
        refs = await find_running(plan, home)
        if not refs:
            if holders is None:
                check_shared_directory(plan)
            refs = await start_stores(plan, home, cluster, is_private=holders is not None)
        database = Database(
            plan.database,
            refs,
            data_dir=str(home),
            cluster=cluster,
            durability=plan.durability,
            holders=holders,
        )
        if holders is not None:
            holders.join(database)
    return database


_opening_guard = threading.Lock()
_opening: set[Path] = set()
"""Directories that `"local"` connections of this process are about to open."""


@contextmanager
def _opening_here(plan: Plan) -> Generator[None]:
    """Be the only one of this process to open a directory; else it would wait for its own lock."""
    if plan.durability != "local":
        yield
        return
    home = plan.home.resolve()
    with _opening_guard:
        if home in _opening or _is_open_here(home):
            raise StoreLockedError(
                f"{str(plan.home)!r} is open in this process already. Use that connection, or "
                f"close it first.",
                pid=os.getpid(),
                host=socket.gethostname(),
            )
        _opening.add(home)
    try:
        yield
    finally:
        with _opening_guard:
            _opening.discard(home)


def _is_open_here(home: Path) -> bool:
    return any(
        other.is_local and other.durability == "local" and Path(other.data_dir).resolve() == home
        for other in open_connections()
    )
