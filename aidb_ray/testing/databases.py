"""A database for one test."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from aidb_ray.database import Database, connect


@asynccontextmanager
async def database(
    data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> AsyncGenerator[Database]:
    """Give a database in this process, and end with it whatever was started in it.

    Without a directory it forgets its rows. With one they are on the disk, so that a store that
    was killed can be opened again by a second `database` with the same directory.

    Args:
        data_dir: Where the log lies.
        options: Further ones of `connect`, such as `partitions`.
    """
    if data_dir is None:
        connecting = connect("local", durability="memory", **options)
    else:
        connecting = connect("local", data_dir=data_dir, **options)
    async with connecting as opened:
        yield opened
