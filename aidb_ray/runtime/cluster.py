"""The cluster that this process is in: joining it or starting one, and leaving it again."""

# What Ray tells of itself is not typed.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakSet

from aidb_ray.errors import ConfigError, UnavailableError
from aidb_ray.runtime.credentials import (
    check_answers,
    check_same_cluster,
    provide_token,
    show_token,
)
from aidb_ray.runtime.failures import words
from aidb_ray.runtime.ray_refs import NAMESPACE

CONNECT_TIMEOUT_MS = 120_000


class Cluster:
    """The Ray cluster that this process is part of, until it is closed.

    Attributes:
        owned: Whether this process started the cluster. Then it ends with this process, however
            that ends, and when the last `Cluster` that this process holds is closed.
        node_id: The node that this process runs on.
    """

    def __init__(self, membership: _Membership | None, node_id: str) -> None:
        self._membership = membership
        if membership is not None:
            membership.holders.add(self)
        self.owned = membership is not None and membership.owned
        self.node_id = node_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave the cluster, which ends it if it was started here.

        Does nothing while others in this process hold it, or if it was not joined here. Detached
        actors of a cluster that goes on live on.
        """
        await asyncio.to_thread(self.release)

    def release(self) -> None:
        """Do as `close` does, waiting in this thread."""
        import ray

        with _ray_lock:
            membership, self._membership = self._membership, None
            if membership is None:
                return
            membership.holders.discard(self)
            if not membership.holders and membership in _memberships:
                _memberships.remove(membership)
                ray.shutdown()
                membership.left.set()


async def connect_cluster(
    address: str | None = None,
    *,
    namespace: str = NAMESPACE,
    num_cpus: int | None = None,
    timeout_ms: int = CONNECT_TIMEOUT_MS,
) -> Cluster:
    """Join a Ray cluster, or start one on this machine, and return it.

    Args:
        address: None is the cluster that this process is in already, else the one that the
            environment variable RAY_ADDRESS names, else a new one. "auto", "host:port" and
            "ray://host:port" join a running one.
        namespace: Namespace of this process in the cluster.
        num_cpus: CPUs that a new cluster offers; None is all that this machine has.
        timeout_ms: Bound on the whole. What Ray joins or starts later, or after the caller was
            cancelled, is left or ended again.

    Raises:
        UnavailableError: there is no cluster at that address, or it does not answer in time.
        ConfigError: Ray refuses to start or join with these settings, or this process is in
            another cluster.
    """
    joining: Future[Cluster] = Future()
    joining.set_running_or_notify_cancel()
    # Linux ends the processes that Ray starts when the thread that started them ends, so that
    # thread must last as long as they. Being a daemon, it does not keep this process alive.
    threading.Thread(
        target=_join, args=(joining, address, namespace, num_cpus), name="aidb-ray", daemon=True
    ).start()
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            cluster = await asyncio.wrap_future(joining)
    except TimeoutError:
        joining.add_done_callback(_abandon)
        raise UnavailableError(
            f"Ray was not ready within {timeout_ms} ms (address {address!r}).",
            outcome="not_applied",
            code="timed_out",
        ) from None
    except asyncio.CancelledError:
        joining.add_done_callback(_abandon)
        raise
    _restore_sigterm()
    return cluster


def _restore_sigterm() -> None:
    """Let SIGTERM do only what it did before: Ray makes it print a stack trace as well."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _abandon(joining: Future[Cluster]) -> None:
    """Give up a cluster that nobody waits for any more."""
    if joining.exception() is None:
        joining.result().release()


@dataclass(slots=True)
class _Membership:
    """What keeps this process in a cluster that it joined here.

    Attributes:
        owned: Whether the cluster was started here.
        holders: Open `Cluster` objects; with the last of them the process leaves. One that was
            dropped unclosed does not count.
        left: Set when it has left.
    """

    owned: bool
    holders: WeakSet[Cluster] = field(default_factory=WeakSet["Cluster"])
    left: threading.Event = field(default_factory=threading.Event)


# Ray is one per process, so its membership is too: at most one entry, changed under the lock.
_ray_lock = threading.Lock()
_memberships: list[_Membership] = []


def _join(
    joining: Future[Cluster], address: str | None, namespace: str, num_cpus: int | None
) -> None:
    """Answer `joining`, then stay for as long as the cluster needs this thread."""
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            # Ray reads the environment when it is imported, and never again.
            show_token(os.environ)
        import ray

        with _ray_lock:
            membership = _enter(address, namespace, num_cpus)
            cluster = Cluster(membership, ray.get_runtime_context().get_node_id())
    except Exception as error:  # noqa: BLE001  Belongs to whoever awaits `joining`.
        joining.set_exception(error)
        return
    joining.set_result(cluster)
    del joining, cluster  # This thread stays, and must not hold what others drop.
    if membership is not None and membership.owned:
        membership.left.wait()


def _enter(address: str | None, namespace: str, num_cpus: int | None) -> _Membership | None:
    """Make this process part of a cluster; None if someone else did that already."""
    import ray

    if ray.is_initialized():
        check_same_cluster(address, ray.get_runtime_context().gcs_address)
        if not _memberships:
            return None
    else:
        if _memberships:  # Someone shut Ray down behind our back.
            _memberships.pop().left.set()
        address = address or os.environ.get("RAY_ADDRESS")
        _init_ray(address, namespace, num_cpus)
        _memberships.append(_Membership(owned=address is None))
    return _memberships[0]


def _init_ray(address: str | None, namespace: str, num_cpus: int | None) -> None:
    import ray
    from ray.job_config import JobConfig

    settings: dict[str, Any] = {
        "namespace": namespace,
        "logging_level": logging.ERROR,
        "job_config": JobConfig(_py_driver_sys_path=_import_paths()),
    }
    if address is None:
        provide_token()
        # "local" never joins a cluster that happens to run on this machine.
        settings |= {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "_system_config": {
                # Without it, callers of a process that died hear of it only when Ray knows why:
                # after 1.3 to 3.5 s instead of 20 ms.
                "timeout_ms_task_wait_for_death_info": 0,
                # Ray gives way to all else on the machine (nice 15). With two busy processes
                # beside it a call took 24 ms (p50) so, and 1.6 ms like this.
                "worker_niceness": 0,
            },
        }
    else:
        settings["address"] = address
        check_answers(address)
    try:
        ray.init(**settings)
    except ConnectionError as error:
        raise UnavailableError(
            f"There is no Ray cluster at {address!r}: {error}", outcome="not_applied"
        ) from error
    except Exception as error:
        where = "start here" if address is None else f"join {address!r}"
        raise ConfigError(f"Ray cannot {where}: {words(error)}") from error


def _import_paths() -> list[str]:
    """Return where this process imports from, other than its interpreter's own directories.

    Ray itself tells its workers of the script's and of the current directory only.
    """
    installed = (sys.prefix, sys.base_prefix)
    return [path for path in sys.path if path and not path.startswith(installed)]
