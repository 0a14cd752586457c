"""Connecting to a database: its partitions, sessions and collections."""

from aidb_ray.database.connecting import connect
from aidb_ray.database.connections import current_database, set_current_database
from aidb_ray.database.database import Database, ProcessInfo
from aidb_ray.database.partition import Partition
from aidb_ray.database.session import Session

__all__ = [
    "Database",
    "Partition",
    "ProcessInfo",
    "Session",
    "connect",
    "current_database",
    "set_current_database",
]
