"""What is under way in a session, and so needs rows that are old. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec

from aidb_ray.contracts import GenerationStatus, ToolCallStatus
from aidb_ray.store.claims import CLAIMS, claim_key, decode_claim
from aidb_ray.store.tables import SessionRows, StoredRow

Fields: TypeAlias = Mapping[str, Any]
Statuses: TypeAlias = type[GenerationStatus] | type[ToolCallStatus]

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def is_over(collection: str, key: str, value: bytes, session: SessionRows) -> bool:
    """Whether nothing that is under way needs a row: then it may go when its time has come."""
    claim = session.collections.get(CLAIMS, {}).get(claim_key(collection, key))
    if claim is not None and _is_worked_on(claim):
        return False
    fields = _fields(value)
    match collection:
        case "messages":
            is_answered = fields.get("processed") is True or not fields.get("targetAgent")
            return is_answered and not _is_awaited(fields, session)
        case "generations":
            return _is_ended(fields, GenerationStatus)
        case "tool_calls":
            return _is_ended(fields, ToolCallStatus) and has_ended(
                fields.get("generationId"), session
            )
        case "cancel_requests":
            return fields.get("done") is True
        case "questions" | "steps":
            return _is_at_rest(session)
        case _:
            return True


def has_ended(generation_id: object, session: SessionRows) -> bool:
    """Whether nobody works on a generation: its row has ended or is gone, and so its stream."""
    if not isinstance(generation_id, str):
        return True
    stream = session.streams.get(generation_id)
    if stream is not None and not stream.closes:
        return False
    row = session.collections.get("generations", {}).get(generation_id)
    return row is None or _is_ended(_fields(row.value), GenerationStatus)


def _is_awaited(message: Fields, session: SessionRows) -> bool:
    """Whether a request to another agent, or the reply to one, is of a generation that goes on."""
    request_id = message.get("requestId")
    if not isinstance(request_id, str):
        return False
    request = session.collections.get("messages", {}).get(request_id)
    return request is not None and not has_ended(
        _fields(request.value).get("generationId"), session
    )


def _is_at_rest(session: SessionRows) -> bool:
    """Whether no generation and no call goes on that could want its steps and answers again."""
    rows = session.collections
    return (
        _are_ended(rows.get("generations", {}).values(), GenerationStatus)
        and _are_ended(rows.get("tool_calls", {}).values(), ToolCallStatus)
        and not any(_is_worked_on(claim) for claim in rows.get(CLAIMS, {}).values())
        and all(stream.closes for stream in session.streams.values())
    )


def _is_worked_on(claim: StoredRow) -> bool:
    return decode_claim(claim.value).state in ("held", "orphan")


def _are_ended(rows: Iterable[StoredRow], statuses: Statuses) -> bool:
    return all(_is_ended(_fields(row.value), statuses) for row in rows)


def _is_ended(fields: Fields, statuses: Statuses) -> bool:
    try:
        return statuses(fields.get("status")).is_terminal
    except ValueError:
        return False


def _fields(value: bytes) -> Fields:
    try:
        return _decode(value)
    except msgspec.DecodeError:
        # No row of the runtime's: it has no status that could have ended.
        return {}
