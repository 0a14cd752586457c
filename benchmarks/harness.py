"""What every benchmark shares: where it runs, how it measures, what it reports."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import shutil
import signal
import statistics
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import aidb_ray
from aidb_ray import ConfigError, Database
from aidb_ray.runtime import ActorOptions, ActorRef, LocalRef, spawn
from aidb_ray.store.actor import StoreStatus
from aidb_ray.store.files import FileSystem

A = TypeVar("A")
P = ParamSpec("P")
S = TypeVar("S")

IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems on which a sync is free, so figures would say nothing about a disk."""

_PACKAGES = ("aidb-ray", "ray", "pyarrow", "pydantic", "msgspec", "ag-ui-protocol")


class Figure(NamedTuple):
    """One measured number: the name it is asked for by, and what exactly it counts."""

    name: str
    value: float
    about: str


@dataclass(frozen=True, slots=True)
class Benchmark(Generic[S]):
    """Something that can be measured, and how much of it.

    Attributes:
        quick: Sizes that only show that it runs; its figures are too noisy to quote.
    """

    measure: Callable[[Rig, S], Coroutine[Any, Any, list[Figure]]]
    full: S
    quick: S


@dataclass(frozen=True, slots=True)
class Rig:
    """Where benchmarks run.

    Attributes:
        directory: Each database gets a directory of its own in it, removed afterwards.
        address: As `aidb_ray.connect` takes it. `"local"` has neither processes nor their costs:
            it shows that a benchmark runs, and its figures mean nothing.
    """

    directory: Path
    address: str | None = None

    @asynccontextmanager
    async def open(self, **store_options: Any) -> AsyncGenerator[Database]:
        """Connect to an empty database of one partition that syncs to the disk."""
        async with (
            self.scratch() as home,
            aidb_ray.connect(
                self.address, data_dir=home, durability="local", store_options=store_options
            ) as db,
        ):
            yield db

    @asynccontextmanager
    async def scratch(self) -> AsyncGenerator[Path]:
        """Make an empty directory and remove it with all that is in it."""
        home = Path(tempfile.mkdtemp(prefix="aidb-bench-", dir=self.directory))
        try:
            yield home
        finally:
            await asyncio.to_thread(shutil.rmtree, home)

    async def spawn(self, cls: Callable[P, A], /, *args: P.args, **kwargs: P.kwargs) -> ActorRef[A]:
        """Start an actor in a process of its own."""
        if self.address == "local":
            return LocalRef(cls(*args, **kwargs))
        return await spawn(cls, ActorOptions(), *args, **kwargs)

    def kill(self, pid: int) -> None:
        """SIGKILL a process, unless it is this one."""
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Logged:
    """What a store wrote to its log between two looks at it."""

    rows: int
    bytes: int
    syncs: int

    @classmethod
    def between(cls, before: StoreStatus, after: StoreStatus) -> Logged:
        """Return the difference; both are of one process of the store."""
        return cls(
            after.logged_rows - before.logged_rows,
            after.logged_bytes - before.logged_bytes,
            after.fdatasyncs - before.fdatasyncs,
        )

    @classmethod
    def total(cls, parts: Sequence[Logged]) -> Logged:
        """Return the sum."""
        return cls(
            sum(part.rows for part in parts),
            sum(part.bytes for part in parts),
            sum(part.syncs for part in parts),
        )

    @property
    def rows_per_sync(self) -> float:
        """How many rows shared one sync."""
        return self.rows / self.syncs if self.syncs else 0.0


async def status_of(db: Database) -> StoreStatus:
    """Return how the database's one partition is doing."""
    return (await db.status())[0]


@asynccontextmanager
async def counting_log(db: Database, into: list[Logged]) -> AsyncGenerator[None]:
    """Add to `into` what the store logs inside."""
    before = await status_of(db)
    yield
    into.append(Logged.between(before, await status_of(db)))


def sync_figures(logged: Sequence[Logged], during: str) -> list[Figure]:
    """Return the figures that tell how well rows shared their syncs."""
    total = Logged.total(logged)
    return [
        Figure("fdatasyncs", total.syncs, f"of the store, {during}"),
        Figure("rows_per_sync", total.rows_per_sync, f"logged rows a sync, {during}"),
    ]


async def median_of(runs: int, measure: Callable[[int], Awaitable[float]]) -> float:
    """Return the median of `runs` measurements, after one that only warms up.

    `measure` is given the number of its run, which begins with 0 for the one not counted.
    """
    found: list[float] = []
    for run in range(runs + 1):
        # One run should not pay for what another left behind.
        gc.collect()
        found.append(await measure(run))
    return statistics.median(found[1:])


def percentile(values: Iterable[float], rank: float) -> float:
    """Return the smallest value that at least `rank` percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * rank // 100) - 1)]


async def gather_bounded(works: Iterable[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Run all works, at most `at_once` of them at a time."""
    slots = asyncio.Semaphore(at_once)

    async def hold(work: Coroutine[Any, Any, None]) -> None:
        async with slots:
            await work

    async with asyncio.TaskGroup() as tasks:
        for work in works:
            tasks.create_task(hold(work))


def choose_directory(asked: Path | None) -> Path:
    """Return where to measure: the directory asked for, else one that is on a disk.

    Raises:
        ConfigError: `no_disk`: what was asked for, or all there is, is kept in memory.
    """
    files = FileSystem()
    candidates = [asked] if asked else [Path.cwd(), Path("/var/tmp")]  # noqa: S108  On a disk.
    for candidate in candidates:
        if not os.access(candidate, os.W_OK):
            continue
        if files.filesystem_type(candidate) not in IN_MEMORY:
            return candidate.resolve()
    named = " and ".join(str(candidate) for candidate in candidates)
    raise ConfigError(
        f"Durable writes cannot be measured in {named}: a file system in memory syncs nothing, and "
        f"a directory must be writable. Name one on a real disk with --dir.",
        code="no_disk",
    )


def describe_machine(directory: Path) -> dict[str, Any]:
    """Return what figures depend on, apart from software."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "memory_gib": round(pages / (1 << 30), 1),
        "system": platform.platform(),
        "filesystem": FileSystem().filesystem_type(directory),
    }


def describe_versions() -> dict[str, str]:
    """Return the versions of the software that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # Run from its sources, a package has no version.
            found[package] = "from source"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
