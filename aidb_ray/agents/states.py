"""What a shard knows of sessions: their rows, read once and kept while there is room."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from aidb_ray.agents.session import COLLECTIONS, SessionState

if TYPE_CHECKING:
    from aidb_ray.store.client import StoreClient

CACHE_BYTES = 256 << 20


class StateCache:
    """The states of sessions by name; the longest unused go first once there are too many bytes.

    Args:
        make: Makes an empty state.
        has_messages: Whether messages are part of them.
    """

    def __init__(
        self, client: StoreClient, make: Callable[[], SessionState], *, has_messages: bool
    ) -> None:
        self._client = client
        self._make = make
        self._has_messages = has_messages
        self._states: dict[str, SessionState] = {}
        self._bytes = 0

    def find(self, session: str) -> SessionState | None:
        """Return a state that is known, also one whose rows are still on their way."""
        return self._states.get(session)

    async def get(self, session: str, storage: str) -> SessionState:
        """Return a session's state, read from `storage` if it is not known."""
        state = self._states.get(session)
        if state is not None:
            self._states[session] = self._states.pop(session)
            return state
        # Known before it is read: what changes meanwhile must not be missed.
        state = self._states[session] = self._make()
        try:
            read = await self._client.read_session(storage, COLLECTIONS)
        except BaseException:
            self.forget(session)
            raise
        rows = read.rows if self._has_messages else {**read.rows, "messages": []}
        state.load(read.revision, rows)
        self._bytes += state.size
        return state

    def bound(self, grown: int, keep: Container[str]) -> None:
        """Count that states have grown by so much, and make room; those to `keep` stay."""
        self._bytes += grown
        if self._bytes <= CACHE_BYTES:
            return
        # Counted afresh, since forgotten ones were not subtracted.
        self._bytes = sum(each.size for each in self._states.values())
        for session in list(self._states):
            if self._bytes <= CACHE_BYTES:
                break
            if session not in keep:
                self._bytes -= self._states.pop(session).size

    def forget(self, session: str) -> None:
        """Forget a session; it is read again when it is needed."""
        self._states.pop(session, None)

    def clear(self) -> None:
        """Forget all."""
        self._states.clear()
        self._bytes = 0
