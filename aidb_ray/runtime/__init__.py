"""Actors and the calls between them; the only package that knows Ray.

Everything above holds an `ActorRef` and awaits `ref.ask(Actor.method, ...)`. A `RayRef` reaches an
actor in its own worker process, a `LocalRef` one in this event loop. Both keep the promises of
`ActorRef`, so what runs on a cluster also runs without one.

Any class with async methods can be an actor. Its constructor must only store its arguments: when it
raises, Ray gives the actor up for ever. An async method `start`, if it has one, runs beside the
calls from the beginning of each process, also of one that replaces a killed one; its error is
logged, and what calls answer then is the actor's business. An async method `stop` runs when the
ref's `stop` is called. A killed process does not run it.

Ray is imported by the functions that need it: importing this package does not load it.
"""

from __future__ import annotations

from aidb_ray.runtime.cluster import CONNECT_TIMEOUT_MS, Cluster, connect_cluster
from aidb_ray.runtime.failures import check_sendable
from aidb_ray.runtime.local import LocalRef
from aidb_ray.runtime.ray_refs import (
    MAX_CONCURRENCY,
    NAMESPACE,
    ActorOptions,
    RayRef,
    find,
    spawn,
)
from aidb_ray.runtime.refs import (
    CALL_TIMEOUT_MS,
    MAX_PENDING_CALLS,
    ActorRef,
    create_detached_task,
)

__all__ = [
    "CALL_TIMEOUT_MS",
    "CONNECT_TIMEOUT_MS",
    "MAX_CONCURRENCY",
    "MAX_PENDING_CALLS",
    "NAMESPACE",
    "ActorOptions",
    "ActorRef",
    "Cluster",
    "LocalRef",
    "RayRef",
    "check_sendable",
    "connect_cluster",
    "create_detached_task",
    "find",
    "spawn",
]
