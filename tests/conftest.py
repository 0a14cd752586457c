from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from aidb_ray.runtime import Cluster, connect_cluster

# Shared machines are slow at times, which says nothing about the code. Every run of CI tries the
# same cases; elsewhere each run tries others.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One Ray cluster for all tests, started at the first one that needs it."""
    with pytest.MonkeyPatch.context() as patch:
        # No secret is written to the home directory, and no cluster of the environment is used.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = asyncio.run(connect_cluster(num_cpus=2))
        yield cluster
        asyncio.run(cluster.close())
