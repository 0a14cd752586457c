"""Every error this package raises: one base, a class per reaction of the caller.

    AidbError
    ├── ConfigError         the program is set up wrongly; fix it
    │   └── CoroutineError      a coroutine function where only a plain one will do
    ├── NotReadyError       read before `ready()`; await it first
    ├── RowError            the row breaks its contract; do not retry
    │   ├── KeyExistsError      an insert names a key that is present
    │   ├── KeyMissingError     an update or delete names a key that is absent
    │   └── ContractError       a value does not fit the contract
    ├── ConflictError       the row changed meanwhile; look at `current`, decide again
    ├── QueryError          the query cannot be compiled; fix it
    ├── FencedError         someone else holds the epoch or the claim; stop
    ├── ToolError           a tool failed; goes to the model as an answer
    ├── ModelError          the provider failed; `retryable` says whether trying again can help
    ├── RunCancelledError   the run was cancelled by a row
    ├── WebhookError        a webhook was refused; `status` is the HTTP status
    ├── UnavailableError    no answer; `outcome` says whether it may have been applied
    ├── StorageError        the disk or the directory; an operator must act
    │   ├── StorageFullError    no space; reads go on, writes resume when there is space
    │   ├── CorruptionError     damage found; `file`, `offset` and the revisions are named
    │   ├── StoreMismatchError  the directory belongs to another store or format
    │   └── StoreLockedError    another process has the directory open
    ├── SlowConsumerError   the subscriber fell too far behind; continue from `resume`
    └── CompactedError      the cursor is older than what is kept; start from a snapshot

`code` is a stable string that programs may compare; the message is for people and may change.
"""

from __future__ import annotations

from typing import Any, Literal


class AidbError(Exception):
    """Base of every error raised here, safe to send between processes.

    Unpickling calls the class with `args`, which fails when `__init__` takes anything else; Ray
    then delivers `UnserializableException` in its place. Rebuilding from `__dict__` keeps the
    class and its fields.
    """

    code: str = "aidb_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[AidbError], args: tuple[Any, ...], fields: dict[str, Any]) -> AidbError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(AidbError):
    """The program is set up wrongly: a bad option, name or definition. Nothing was started."""

    code = "config_error"


class CoroutineError(ConfigError, TypeError):
    """A coroutine function was given where only a plain one will do. It was not run."""

    code = "coroutine_not_allowed"


class NotReadyError(AidbError):
    """A synchronous read came before the rows had arrived; await `ready()` first."""

    code = "not_ready"


class RowError(AidbError):
    """A row breaks its contract. Nothing was written; sending it again will fail again.

    Attributes:
        collection: Name of the collection.
        key: Key of the row, `""` if it has none yet.
        loc: Path of the offending field, empty if the row as a whole is meant.
    """

    code = "row_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        collection: str = "",
        key: str = "",
        loc: tuple[str | int, ...] = (),
    ) -> None:
        super().__init__(message, code=code)
        self.collection = collection
        self.key = key
        self.loc = loc


class KeyExistsError(RowError):
    """An insert names a key that is present; the stored row is untouched."""

    code = "duplicate_key"


class KeyMissingError(RowError):
    """An update or delete names a key that is absent."""

    code = "not_found"


class ContractError(RowError):
    """A value does not fit the collection's contract; `loc` names the field."""

    code = "contract_error"


class ConflictError(AidbError):
    """The row changed since it was read, or the condition no longer holds.

    Attributes:
        collection: Name of the collection.
        key: Key of the row.
        current: The stored row (wire names), or None if it is gone.
        revision: Revision that last wrote the row, 0 if it is gone.
        expected: Of a chunk that came out of turn, the index that is next.
        got: Of such a chunk, its index.
    """

    code = "conflict"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        collection: str = "",
        key: str = "",
        current: dict[str, Any] | None = None,
        revision: int = 0,
        expected: int = 0,
        got: int = 0,
    ) -> None:
        super().__init__(message, code=code)
        self.collection = collection
        self.key = key
        self.current = current
        self.revision = revision
        self.expected = expected
        self.got = got


class QueryError(AidbError):
    """A query or expression cannot be compiled. Raised where it is written, not when it runs."""

    code = "query_error"


class FencedError(AidbError):
    """A newer epoch or claim holds this work, so our writes are refused: discard and stop.

    Attributes:
        resource: What was lost, such as an agent's bucket or a row's claim.
        our_epoch: The epoch or token that the refused write carried.
        current_epoch: The one that holds it now.
    """

    code = "fenced"

    def __init__(
        self, *, resource: str, our_epoch: int, current_epoch: int, code: str | None = None
    ) -> None:
        super().__init__(
            f"Lost {resource!r}: we hold epoch {our_epoch}, the current epoch is "
            f"{current_epoch}. Another runner took over; discard unsaved results and stop.",
            code=code,
        )
        self.resource = resource
        self.our_epoch = our_epoch
        self.current_epoch = current_epoch


class ToolError(AidbError):
    """A tool failed. The agent stores it and gives it to the model as that call's answer."""

    code = "tool_error"


class ModelError(AidbError):
    """The model provider failed.

    Attributes:
        retryable: Whether the same request can succeed later.
        status: HTTP status, if there was an answer.
        retry_after_ms: How long the provider asked us to wait, if it did.
    """

    code = "model_error"

    def __init__(
        self,
        message: str,
        *,
        retryable: bool,
        code: str | None = None,
        status: int | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.retryable = retryable
        self.status = status
        self.retry_after_ms = retry_after_ms


class RunCancelledError(AidbError):
    """The run that would have answered was cancelled; `reason` is what the canceller said."""

    code = "cancelled"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class WebhookError(AidbError):
    """A webhook was refused; `status` is the HTTP status to answer with."""

    code = "webhook_error"

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message, code=code)
        self.status = status


class UnavailableError(AidbError):
    """No answer from another process within the bound.

    Attributes:
        outcome: `"not_applied"`: safe to send again. `"unknown"`: read back first.
    """

    code = "unavailable"

    def __init__(
        self,
        message: str,
        *,
        outcome: Literal["not_applied", "unknown"],
        code: str | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.outcome: Literal["not_applied", "unknown"] = outcome


class StorageError(AidbError):
    """The disk or the data directory cannot be used as it is; an operator must act."""

    code = "storage_error"


class StorageFullError(StorageError):
    """No space for the log. Nothing of the batch was kept; reads go on, writes resume later."""

    code = "storage_full"


class CorruptionError(StorageError):
    """Stored bytes are damaged. They are not served and nothing was deleted.

    Attributes:
        file: Path of the damaged file.
        offset: First byte of the damaged frame or block.
        first_revision: First revision that may be affected, 0 if none is known.
        last_revision: Last revision that may be affected, 0 if none is known.
    """

    code = "corrupt"

    def __init__(
        self,
        message: str,
        *,
        file: str,
        offset: int,
        first_revision: int = 0,
        last_revision: int = 0,
    ) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.first_revision = first_revision
        self.last_revision = last_revision


class StoreMismatchError(StorageError):
    """The directory belongs to another store, or to a format this version does not read."""

    code = "store_mismatch"


class StoreLockedError(StorageError):
    """Another process, or another connection of this one, has the data directory open.

    Attributes:
        pid: Process that holds the lock, 0 if it did not say.
        host: Its host name.
    """

    code = "store_locked"

    def __init__(self, message: str, *, pid: int = 0, host: str = "") -> None:
        super().__init__(message)
        self.pid = pid
        self.host = host


class SlowConsumerError(AidbError):
    """A subscriber let too many deltas pile up; subscribe again from the cursor `resume`."""

    code = "slow_consumer"

    def __init__(self, message: str, *, resume: int) -> None:
        super().__init__(message)
        self.resume = resume


class CompactedError(AidbError):
    """The cursor is older than the oldest change kept (`oldest`); start from a snapshot."""

    code = "compacted"

    def __init__(self, message: str, *, oldest: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.oldest = oldest
