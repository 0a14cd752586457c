"""Cancels on their way: what was asked for, and which rows it covers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class CancelOrder:
    """A cancel that is being carried out.

    It covers what was written before `revision`, or only what answers the message `message_id`.
    """

    reason: str
    revision: int
    message_id: str | None = None
    is_done: bool = False

    def covers(self, keys: Sequence[str], written: Sequence[int]) -> bool:
        """Whether it covers any of these rows, or none of them is there any more.

        Args:
            keys: Of the rows.
            written: The revisions that wrote those that are still there.
        """
        if self.message_id is not None:
            return self.message_id in keys
        return not written or min(written) < self.revision


class CancelOrders:
    """The orders of each session, and which requests they come from."""

    def __init__(self) -> None:
        self._orders: dict[str, list[CancelOrder]] = {}
        self._requests: set[str] = set()

    def begin(self, request_id: str) -> bool:
        """Take up a request; False if it has been taken up."""
        is_new = request_id not in self._requests
        self._requests.add(request_id)
        return is_new

    def end(self, request_id: str) -> None:
        """Let go of a request."""
        self._requests.discard(request_id)

    def add(self, session: str, order: CancelOrder) -> None:
        """Give an order to whoever is at work in a session, or will be."""
        self._orders.setdefault(session, []).append(order)

    def remove(self, session: str, order: CancelOrder) -> None:
        """Take an order back."""
        orders = self._orders[session]
        orders.remove(order)
        if not orders:
            del self._orders[session]

    def open(self, session: str) -> list[CancelOrder]:
        """Return the orders of a session that are not done."""
        return [order for order in self._orders.get(session, ()) if not order.is_done]
