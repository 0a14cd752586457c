"""Errors of actors on their way to the callers, who may be in another process or have left."""

# Ray's errors are not typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import traceback
from dataclasses import dataclass
from typing import Any

from aidb_ray.errors import AidbError, ConfigError, UnavailableError

# Ray's words for a call that it did not send because the actor's process is being replaced.
_NOT_SENT = "The actor is restarting"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to the caller: pickled, in words, and where it was raised."""

    pickled: bytes
    words: str
    remote_traceback: str


def check_sendable(value: object, name: str) -> None:
    """Raise if `value`, which people know as `name`, cannot be sent to another process.

    Raises:
        ConfigError: `not_picklable`, or what the value itself says of that.
    """
    import ray.cloudpickle

    try:
        ray.cloudpickle.dumps(value)  # pyright: ignore[reportPrivateImportUsage]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name} cannot be sent to another process: {words(error)}. Make it a function of a "
            f"module that holds on to no sockets, locks or the like.",
            code="not_picklable",
        ) from error


def pack(error: Exception) -> Failure:
    """Return of `error` what can be sent: its pickle, if it has one, and its words."""
    import ray.cloudpickle

    try:
        pickled = ray.cloudpickle.dumps(error)  # pyright: ignore[reportPrivateImportUsage]
    except Exception:  # noqa: BLE001  Whatever forbids to pickle it, its words can be sent.
        pickled = b""
    return Failure(pickled, words(error), "".join(traceback.format_exception(error)).rstrip())


def unpack(failure: Failure, label: str) -> Exception:
    """Return the error that the call `label` raised in another process.

    One that does not unpickle here is an `AidbError` with its words and code `remote_error`.
    """
    import ray.cloudpickle

    error = None
    with contextlib.suppress(Exception):  # Unpickling runs the error's own code.
        error = ray.cloudpickle.loads(failure.pickled)
    if not isinstance(error, Exception):
        error = AidbError(
            f"{label} raised an error that cannot be sent between processes: {failure.words}",
            code="remote_error",
        )
    error.add_note(f"Raised in {label} in another process:\n{failure.remote_traceback}")
    return error


def log_when_late(answering: asyncio.Future[Any], label: str) -> None:
    """Log the error that `answering` may end with, now that its caller has left."""

    def log(answering: asyncio.Future[Any]) -> None:
        if answering.cancelled():
            return
        error = answering.exception()
        answer = answering.result() if error is None else None
        if type(answer) is Failure:
            _log.error("%s failed after its caller left:\n%s", label, answer.remote_traceback)
        elif error is not None:
            _log.error("%s failed after its caller left: %s", label, error, exc_info=error)

    answering.add_done_callback(log)


def explain(error: Exception, label: str) -> AidbError:
    """Say what an error of Ray means for the call; Ray's own words become a note."""
    from ray import exceptions

    # Ray colours its tracebacks for terminals.
    ray_words = re.sub(r"\x1b\[\d+m", "", str(error)).strip()
    last_line = ray_words.rsplit("\n", 1)[-1]
    match error:
        case exceptions.RayActorError(actor_init_failed=True):
            explained = ConfigError(f"{label} was not called: the constructor raised {last_line}")
        case exceptions.ActorUnschedulableError() | exceptions.RuntimeEnvSetupError():
            explained = ConfigError(f"{label} was not called: the actor has no place. {last_line}")
        case exceptions.ActorUnavailableError() if _NOT_SENT in ray_words:
            explained = UnavailableError(
                f"{label} was not called: the actor's process is being replaced. Try again soon.",
                outcome="not_applied",
            )
        case exceptions.RayActorError():
            explained = UnavailableError(
                f"{label} gave no answer: the actor's process went away. It may have run: read "
                f"back before trying again.",
                outcome="unknown",
            )
        case exceptions.TaskCancelledError():
            explained = UnavailableError(
                f"{label} gave no answer: someone else cancelled the call. It may have run in "
                f"part: read back before trying again.",
                outcome="unknown",
                code="call_cancelled",
            )
        case exceptions.RayTaskError():
            # Errors of methods come as answers. What is left to Ray is an argument that the actor
            # cannot unpickle, or an answer that it cannot pickle.
            explained = AidbError(
                f"An argument or the answer of {label} cannot be sent between processes: "
                f"{last_line}",
                code="remote_error",
            )
        case _:
            explained = UnavailableError(
                f"{label} gave no answer: {words(error)}. It may have run: read back before "
                f"trying again.",
                outcome="unknown",
            )
    explained.add_note(f"Ray says: {ray_words}")
    return explained


def words(error: BaseException) -> str:
    """Return the class and the message of `error`, without its module."""
    return f"{type(error).__qualname__}: {error}"
