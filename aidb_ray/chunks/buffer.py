"""Chunks on their way to the store: what a stream has said and is not sent yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from aidb_ray.errors import ContractError
from aidb_ray.store.changes import CHUNKS, Append, ChunkColumns
from aidb_ray.store.columns import EMPTY, pack

# The place of a name is its code on disk: names are only ever added at the end.
TYPE_NAMES = (
    "TEXT_MESSAGE_START",
    "TEXT_MESSAGE_CONTENT",
    "TEXT_MESSAGE_END",
    "TEXT_MESSAGE_CHUNK",
    "TOOL_CALL_START",
    "TOOL_CALL_ARGS",
    "TOOL_CALL_END",
    "TOOL_CALL_CHUNK",
    "TOOL_CALL_RESULT",
    "STATE_SNAPSHOT",
    "STATE_DELTA",
    "MESSAGES_SNAPSHOT",
    "ACTIVITY_SNAPSHOT",
    "ACTIVITY_DELTA",
    "RAW",
    "CUSTOM",
    "RUN_STARTED",
    "RUN_FINISHED",
    "RUN_ERROR",
    "STEP_STARTED",
    "STEP_FINISHED",
    "REASONING_START",
    "REASONING_MESSAGE_START",
    "REASONING_MESSAGE_CONTENT",
    "REASONING_MESSAGE_END",
    "REASONING_MESSAGE_CHUNK",
    "REASONING_END",
    "REASONING_ENCRYPTED_VALUE",
    "SUBAGENT_STARTED",
    "SUBAGENT_FINISHED",
    "SUBAGENT_ERROR",
)
_CODES = {name: code for code, name in enumerate(TYPE_NAMES)}
_TEXT_CODE = _CODES["TEXT_MESSAGE_CONTENT"]
FIRST_OWN_CODE = 200
_MAX_OWN_TYPES = 56

FLUSH_INTERVAL_MS = 50
FLUSH_CHUNKS = 512

Ending = Literal["finished", "raised", "cancelled"]


def type_name(code: int, own: Sequence[str]) -> str:
    """Return the name of a chunk's type from its code and its slice's own names."""
    return own[code - FIRST_OWN_CODE] if code >= FIRST_OWN_CODE else TYPE_NAMES[code]


def restart_marker(attempt: int) -> str:
    """Return the payload of the `CUSTOM` event that begins attempt `attempt`, from 2 on."""
    return msgspec.json.encode({"name": "attempt", "value": attempt}).decode()


class ChunkBuffer:
    """Chunks of one generation that are not written yet. No I/O.

    Attributes:
        attempt: The start of the run that writes them.
    """

    def __init__(self, session: str, generation_id: str, *, next_index: int, attempt: int) -> None:
        self.session = session
        self.generation_id = generation_id
        self.attempt = attempt
        self._taken = next_index
        self._codes: list[int] = []
        self._payloads: list[str] = []
        self._own: list[str] = []

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def next_index(self) -> int:
        """Index that the next chunk gets."""
        return self._taken + len(self._codes)

    def add(self, type_: str, payload: str) -> None:
        """Add one chunk.

        Raises:
            ContractError: `invalid_unicode`: there is half of a surrogate pair in it.
        """
        if not payload.isascii():
            _check_unicode(payload)
        code = _CODES.get(type_)
        self._codes.append(self._own_code(type_) if code is None else code)
        self._payloads.append(payload)

    def add_text(self, text: str) -> None:
        """Add one chunk that is a fragment of text. See `add`."""
        if not text.isascii():
            _check_unicode(text)
        self._codes.append(_TEXT_CODE)
        self._payloads.append(text)

    def begin_attempt(self) -> None:
        """Mark that a new attempt begins here, if it is not the first."""
        if self.attempt > 1:
            self.add("CUSTOM", restart_marker(self.attempt))

    def take(self, ending: Ending | None = None) -> tuple[Append, ChunkColumns] | None:
        """Return what to append, and forget it; None if there is nothing to say."""
        count = len(self._codes)
        if not count and ending is None:
            return None
        append = Append(
            self.session,
            self.generation_id,
            self.attempt,
            self._taken,
            0,
            count,
            tuple(self._own),
            ending or "",
        )
        columns = pack(self._codes, self._payloads) if count else EMPTY
        self._taken += count
        self._codes, self._payloads, self._own = [], [], []
        return append, columns

    def _own_code(self, type_: str) -> int:
        if type_ not in self._own:
            if len(self._own) >= _MAX_OWN_TYPES:
                raise ContractError(
                    f"Over {_MAX_OWN_TYPES} chunk types that AG-UI does not know came within "
                    f"{FLUSH_INTERVAL_MS} ms; put what varies into the content.",
                    code="too_many_types",
                    collection=CHUNKS,
                )
            self._own.append(type_)
        return FIRST_OWN_CODE + self._own.index(type_)


def _check_unicode(payload: str) -> None:
    try:
        payload.encode()
    except UnicodeEncodeError:
        raise ContractError(
            "A chunk holds half of a surrogate pair.",
            code="invalid_unicode",
            collection=CHUNKS,
        ) from None
