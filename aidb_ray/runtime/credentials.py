"""What is checked before Ray is asked to join: whose secret is shown, what address is meant.

No Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import MutableMapping
from pathlib import Path

from aidb_ray.errors import ConfigError, UnavailableError

_PROBE_SECONDS = 5.0


def provide_token() -> None:
    """Make sure that the secret of clusters started here can be read by its owner only.

    Ray's own way is a file that others on this machine can read.
    """
    if any(key.startswith("RAY_AUTH_") for key in os.environ):
        return
    token = secrets.token_hex(32)
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    except OSError:  # No home to write to. Then only children of this process can join.
        os.environ["RAY_AUTH_TOKEN"] = token
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(token)


def show_token(environment: MutableMapping[str, str]) -> None:
    """Have Ray show this user's token to the cluster it joins; one that wants none ignores it.

    `ray start` asks for a token wherever there is one, but a driver shows it only if told to.
    """
    if "RAY_AUTH_MODE" in environment:
        return
    with contextlib.suppress(OSError, RuntimeError):  # There may be no home, or none to look into.
        is_given = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment
        if is_given or (Path.home() / ".ray" / "auth_token").exists():
            environment["RAY_AUTH_MODE"] = "token"


def _split_address(address: str) -> tuple[str, int] | None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def check_answers(address: str) -> None:
    """Raise if nobody listens at `address`, where Ray would try for minutes."""
    where = _split_address(address)
    if where is None:
        return
    try:
        socket.create_connection(where, timeout=_PROBE_SECONDS).close()
    except OSError as error:
        raise UnavailableError(
            f"There is no Ray cluster at {address!r}: {error}", outcome="not_applied"
        ) from error


def check_same_cluster(address: str | None, current: str) -> None:
    """Raise if `address` names another cluster than the one at `current`."""
    asked, here = _split_address(address or ""), _split_address(current)
    if address is None or asked is None or address.startswith("ray://") or here is None:
        return
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(asked[0])
        is_here = host == here[0] or host.startswith("127.")
        if asked[1] == here[1] and is_here:
            return
    raise ConfigError(
        f"This process is in the Ray cluster at {current!r} and cannot join {address!r} as well. "
        f"Leave the first one, or use another process."
    )
