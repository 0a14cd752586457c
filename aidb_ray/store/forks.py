"""What becomes of a session's rows in a fork of it. Pure.

Most stay as they are. What was under way does not go on in the fork, so that nothing happens
twice: it is cancelled there, and messages without an answer wait for one again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import msgspec

from aidb_ray.contracts import GenerationStatus, ToolCallStatus
from aidb_ray.store.changes import StoredRow
from aidb_ray.store.claims import CLAIMS

REASON = "forked"

ForkedRow: TypeAlias = tuple[str, str, bytes]
"""(collection, key, value)"""

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


def fork_rows(rows: Iterable[tuple[str, str, StoredRow]]) -> Iterator[ForkedRow]:
    """Yield the rows of a fork, given (collection, key, row) of the session that is forked.

    Generations and tool calls that go on are cancelled, requests to cancel are done, what running
    work asks people is left out, and requests of one agent to another are answered. Claims are
    left out. A row that is as it was has the same bytes.
    """
    given = list(rows)
    ended = {
        key
        for collection, key, row in given
        if collection == "generations" and not _goes_on(row.value, GenerationStatus)
    }
    for collection, key, row in given:
        value = row.value
        match collection:
            case "generations" if key not in ended:
                value = _changed(
                    value,
                    status=GenerationStatus.CANCELLED.value,
                    error=REASON,
                    errorCode=REASON,
                )
            case "tool_calls" if _goes_on(value, ToolCallStatus):
                value = _changed(value, status=ToolCallStatus.CANCELLED.value)
            case "cancel_requests":
                value = _changed(value, done=True)
            case "messages" if _is_request(value) and _field(value, "generationId") not in ended:
                value = _changed(value, processed=True)
            case "questions" if _field(value, "status") == "open":
                continue
            case _ if collection == CLAIMS:
                continue
            case _:
                pass
        yield collection, key, value


def _goes_on(value: bytes, statuses: type[GenerationStatus] | type[ToolCallStatus]) -> bool:
    """Whether a row of the runtime's has a status that is no end; rows of others have none."""
    try:
        return not statuses(_field(value, "status")).is_terminal
    except ValueError:
        return False


def _is_request(value: bytes) -> bool:
    """Whether a message is an agent's request to another one that waits for an answer."""
    fields = _fields(value)
    return fields.get("requestId") == fields.get("id") and fields.get("processed") is False


def _field(value: bytes, name: str) -> Any:
    return _fields(value).get(name)


def _fields(value: bytes) -> dict[str, Any]:
    try:
        return _decode(value)
    except msgspec.DecodeError:
        return {}


def _changed(value: bytes, **changes: Any) -> bytes:
    fields = _fields(value)
    if all(fields.get(name) == given for name, given in changes.items()):
        return value
    return _encode({**fields, **changes})
