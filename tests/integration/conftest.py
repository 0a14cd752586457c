"""One Ray cluster for all tests of this directory, started at the first one that needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from aidb_ray.runtime import Cluster, connect_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        # No secret is written to the home directory, and no cluster of the environment is used.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = asyncio.run(connect_cluster(num_cpus=2))
        yield cluster
        asyncio.run(cluster.close())
