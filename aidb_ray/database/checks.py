"""What names sessions, collections and revisions, and for how long rows are kept."""

from __future__ import annotations

from aidb_ray.contracts import is_valid_name
from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.store.retention import LEAST_KEPT_MS


def check_place(name: str, session: str | None) -> None:
    """Raise unless a collection can be called so, in such a session or in none."""
    if not is_valid_name(name):
        raise ConfigError(
            f"{name!r} cannot name a collection: 1 to 512 of A-Z a-z 0-9 . _ ~ : / - without "
            f"'..' are allowed.",
            code="invalid_name",
        )
    if session is not None:
        check_session(session)


def check_session(url: str) -> None:
    """Raise unless it can be a session's url, or a pattern of such that ends in `*`."""
    if not url.startswith("aidb://") or not is_valid_name(url.removesuffix("*")):
        raise ConfigError(
            f"{url!r} cannot name a session; it looks like 'aidb://support/42'.",
            code="invalid_name",
        )


def check_retention(collection: str, session: str | None, retention_ms: object) -> None:
    """Raise unless rows of such a collection can be kept for so long."""
    check_place(collection, session)
    if collection.startswith("~"):
        raise ConfigError(f"{collection!r} is the store's own.", code="invalid_name")
    if retention_ms is None:
        return
    if not isinstance(retention_ms, int) or retention_ms < LEAST_KEPT_MS:
        raise ConfigError(
            f"Rows are kept for a whole number of milliseconds, {LEAST_KEPT_MS} or more, or for "
            f"ever, which is None; not for {retention_ms!r}.",
            code="invalid_retention",
        )


def check_revision(at: object) -> None:
    """Raise unless it is a revision, or None."""
    if at is not None and (not isinstance(at, int) or isinstance(at, bool) or at < 0):
        raise ContractError(
            f"A revision is a whole number from 0, not {at!r}.",
            code="invalid_cursor",
            loc=("at",),
        )
