"""Finding the stores of a database, or creating and starting them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from aidb_ray.errors import ConfigError, StorageError, StoreMismatchError, UnavailableError
from aidb_ray.runtime import ActorOptions, ActorRef, Cluster, LocalRef, find, spawn
from aidb_ray.store.actor import StoreActor, StoreOptions, StoreStatus

if TYPE_CHECKING:
    from aidb_ray.store.files import FileSystem

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_MS = 120_000
FIND_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What `connect` was asked for."""

    address: str | None
    data_dir: Path
    database: str
    partitions: int
    durability: Literal["local", "memory"]
    options: dict[str, Any]

    @property
    def home(self) -> Path:
        """The database's own directory."""
        return self.data_dir.absolute() / self.database


async def find_running(plan: Plan, home: Path) -> list[ActorRef[StoreActor]]:
    """Return the stores of the database that run on the cluster, none if it has none."""
    first = await find(StoreActor, _store_name(plan.database, 0))
    if first is None:
        return []
    _check_store(plan, home, await first.with_timeout(OPEN_TIMEOUT_MS).ask(StoreActor.open))
    refs: list[ActorRef[StoreActor]] = [first]
    deadline = time.monotonic() + FIND_TIMEOUT_MS / 1000
    while len(refs) < plan.partitions:
        another = await find(StoreActor, _store_name(plan.database, len(refs)))
        if another is not None:
            refs.append(another)
        elif time.monotonic() > deadline:
            raise UnavailableError(
                f"Partition {len(refs)} of database {plan.database!r} is not running.",
                outcome="not_applied",
            )
        else:
            # Whoever starts the database starts its partitions one after the other.
            await asyncio.sleep(0.1)
    await _open_all(refs[1:])
    return refs


async def start_stores(
    plan: Plan, home: Path, cluster: Cluster | None, *, is_private: bool
) -> list[ActorRef[StoreActor]]:
    """Start the stores of a database, creating its directory if there is none, and open them."""
    options = await asyncio.to_thread(_store_options, plan, home, in_process=cluster is None)
    refs: list[ActorRef[StoreActor]] = []
    try:
        for option in options:
            refs.append(await _start_store(option, cluster, is_private=is_private))  # noqa: PERF401
        # Another driver may have been faster to start them, and want another database.
        for status in await _open_all(refs):
            _check_store(plan, home, status)
    except BaseException:
        # A store that cannot be opened would answer later drivers under its name.
        await asyncio.gather(*(_give_up_store(ref, is_private=is_private) for ref in refs))
        raise
    return refs


def check_shared_directory(plan: Plan) -> None:
    """Raise unless stores of an existing cluster can be started in the data directory."""
    if plan.durability != "local":
        return
    if not plan.data_dir.is_absolute():
        raise ConfigError(
            f"On an existing cluster data_dir must be absolute, not {str(plan.data_dir)!r}: "
            f"its processes have other working directories.",
            code="relative_data_dir",
        )
    if not plan.data_dir.is_dir():
        raise StoreMismatchError(
            f"{plan.data_dir} does not exist on this node. Create it on the node that shall hold "
            f"the data, and connect from there.",
            code="store_missing",
        )


def _check_store(plan: Plan, home: Path, status: StoreStatus) -> None:
    """Raise unless a store that runs already is one of the database that is asked for."""
    _check_partitions(plan, status.partitions)
    if status.durability != plan.durability:
        raise ConfigError(
            f"Database {plan.database!r} runs with durability {status.durability!r}, not "
            f"{plan.durability!r}.",
            code="durability_differs",
        )
    expected = home / f"p{status.partition}"
    if plan.durability == "local" and Path(status.directory) != expected:
        raise StoreMismatchError(
            f"Database {plan.database!r} of this cluster is in {status.directory!r}, not in "
            f"{str(expected)!r}. Name its data_dir, or another database."
        )


def _check_partitions(plan: Plan, partitions: int) -> None:
    if partitions != plan.partitions:
        raise ConfigError(
            f"Database {plan.database!r} has {partitions} partitions, not {plan.partitions}; "
            f"the number is fixed when a database is created.",
            code="partitions_differ",
        )


async def _give_up_store(ref: ActorRef[StoreActor], *, is_private: bool) -> None:
    """End a store, unless other drivers may have it: one that serves, or is being opened."""
    ref = ref.pinned().with_timeout(5_000)
    if not is_private:
        try:
            status = await ref.ask(StoreActor.status)
        except UnavailableError:
            return
        if status.state != "recovering" or not status.problem:
            return
    await ref.stop()


async def _open_all(refs: Iterable[ActorRef[StoreActor]]) -> list[StoreStatus]:
    opening = (ref.with_timeout(OPEN_TIMEOUT_MS).ask(StoreActor.open) for ref in refs)
    return await asyncio.gather(*opening)


def _store_options(plan: Plan, home: Path, *, in_process: bool) -> list[StoreOptions]:
    if plan.durability == "memory":
        uuid = str(uuid4())
        directories = [""] * plan.partitions
    else:
        uuid = create_or_identify(plan, home)
        directories = [str(home / f"p{index}") for index in range(plan.partitions)]
    return [
        StoreOptions(
            database=plan.database,
            partition=index,
            durability=plan.durability,
            directory=directory,
            store_uuid=uuid,
            partitions=plan.partitions,
            in_process=in_process,
            **plan.options,
        )
        for index, directory in enumerate(directories)
    ]


def create_or_identify(plan: Plan, home: Path) -> str:
    """Return the store's uuid, creating its directories if there are none yet."""
    from aidb_ray.store.directory import StoreDirectory, storage_error
    from aidb_ray.store.files import FileSystem

    files = FileSystem()
    try:
        for path in (plan.data_dir, home):
            if path.is_symlink():
                raise ConfigError(
                    f"The data directory {str(path)!r} is a link. Name the directory itself.",
                    code="data_dir_refused",
                )
        if not home.exists():
            _create_home(plan, home, files)
        meta = StoreDirectory(home / "p0", files).read_meta()
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"The data directory {str(home)!r} cannot be used: {error.strerror}.",
            code="data_dir_refused",
        ) from error
    except OSError as error:
        raise storage_error(error, "opening", home) from error
    _check_partitions(plan, meta.partitions)
    return meta.store_uuid


def _create_home(plan: Plan, home: Path, files: FileSystem) -> None:
    from aidb_ray.store.log import create_store

    home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made under another name and renamed, so that it is there whole or not at all.
    uuid = str(uuid4())
    draft = home.with_name(f".{home.name}.{uuid}.draft")
    draft.mkdir(mode=0o700)
    try:
        for index in range(plan.partitions):
            create_store(
                draft / f"p{index}",
                files,
                store_uuid=uuid,
                database=plan.database,
                partition=index,
                partitions=plan.partitions,
            )
        files.rename(draft, home)
    except (OSError, StorageError):
        shutil.rmtree(draft, ignore_errors=True)
        # Someone else may have made it at the same time.
        if not home.exists():
            raise
    files.sync_directory(home.parent)


async def _start_store(
    options: StoreOptions, cluster: Cluster | None, *, is_private: bool
) -> ActorRef[StoreActor]:
    if cluster is None:
        return LocalRef(StoreActor(options, die=_stay))
    actor_options = ActorOptions(
        name=_store_name(options.database, options.partition),
        detached=not is_private,
        node_id=cluster.node_id,
    )
    return await spawn(StoreActor, actor_options, options)


def _stay() -> None:
    # In the user's own process a store that failed answers so; it must not end the program.
    logger.critical("the store in this process has failed; connect again to recover")


def _store_name(database: str, partition: int) -> str:
    return f"aidb/{database}/p{partition}"
