"""The connections that this process has, and the one that is meant where none is named."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from aidb_ray.errors import ConfigError

if TYPE_CHECKING:
    from aidb_ray.database.database import Database

_current: ContextVar[Database | None] = ContextVar("aidb_database", default=None)
_open: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Database]] = WeakKeyDictionary()


def current_database() -> Database:
    """Return the default database: of an agent's code its own, else the latest open of this loop.

    Raises:
        ConfigError: `not_connected`.
    """
    found = _current.get()
    if found is not None and not found.is_closed:
        return found
    stack = _open.get(asyncio.get_running_loop(), [])
    if stack:
        return stack[-1]
    raise ConfigError(
        "There is no database: `await aidb_ray.connect(...)` first.", code="not_connected"
    )


def set_current_database(database: Database) -> None:
    """Make `database` the default of this context."""
    _current.set(database)


def keep_open(database: Database) -> Database:
    """Make a new connection this event loop's default; return it."""
    for loop in [loop for loop in _open if loop.is_closed()]:
        # A directory stays open in this process; all else nobody can use who does not hold it.
        _open[loop] = [each for each in _open[loop] if each.is_local]
    _open.setdefault(asyncio.get_running_loop(), []).append(database)
    return database


def forget_connection(database: Database) -> None:
    """Have a connection that closes be nobody's default."""
    for stack in _open.values():
        if database in stack:
            stack.remove(database)


def open_connections() -> list[Database]:
    """Return the connections of this process, of all its event loops."""
    return [database for stack in list(_open.values()) for database in stack]
