"""`EventStreamParser`: server-sent events from bytes, as far as model providers use them. No I/O.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html (only `data` is kept).
"""

from __future__ import annotations

from aidb_ray.errors import ModelError

MAX_EVENT_BYTES = 16 << 20
"""How long one event may grow; providers repeat the whole answer in their last one."""


class EventStreamParser:
    """Cuts a byte stream, fed in pieces of any size, into the data of its events."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        # The begun line in pieces, for a long event may come in very many of them.
        self._begun: list[bytes] = []
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        r"""Return the data of the events that `received` completes.

        Lines end with `\n` or `\r\n`. An event that the stream's end cuts off is never returned.

        Raises:
            ModelError: `malformed`: an event is longer than `max_event_bytes`.
        """
        self._size += len(received)
        first, *others = received.split(b"\n")
        self._begun.append(first)
        if not others:
            self._check_size()
            return []
        complete: list[bytes] = []
        self._take_line(b"".join(self._begun), complete)
        for line in others[:-1]:
            self._take_line(line, complete)
        self._begun = [others[-1]]
        self._check_size()
        return complete

    def _take_line(self, line: bytes, complete: list[bytes]) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and self._data:
            complete.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
            self._data = []
            self._size = 0

    def _check_size(self) -> None:
        if self._size > self._max_event_bytes:
            raise ModelError(
                f"The model's server sent an event longer than {self._max_event_bytes:,} bytes.",
                code="malformed",
                retryable=True,
            )
