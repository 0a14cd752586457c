"""What groups are summed up to, kept current as values come and go. Pure.

Whatever values came and went on the way, the result is that of the values that are left: sums
are kept exactly and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sortedcontainers import SortedList

from aidb_ray.query.ordering import ascending


class Aggregate(Protocol):
    """A bag of values and what it comes to."""

    def add(self, value: Any) -> None:
        """Put a value in."""
        ...

    def remove(self, value: Any) -> None:
        """Take out a value that is in."""
        ...

    def result(self) -> Any:
        """Return what the values come to; None without any that count."""
        ...


class _Count:
    """How many values are not null."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def add(self, value: Any) -> None:
        self._count += value is not None

    def remove(self, value: Any) -> None:
        self._count -= value is not None

    def result(self) -> int:
        return self._count


class _Sum:
    """Exact sum of the numbers. Whole if all of them are, else a decimal."""

    __slots__ = ("_bits", "_decimals", "_numbers", "_parts", "_whole")

    def __init__(self) -> None:
        self._numbers = 0
        self._decimals = 0
        self._whole = 0
        # Sum of the decimals in units of 2**-bits, as fine as the finest of them needs.
        self._parts = 0
        self._bits = 0

    def add(self, value: Any) -> None:
        self._change(value, 1)

    def remove(self, value: Any) -> None:
        self._change(value, -1)

    def _change(self, value: Any, sign: int) -> None:
        kind: type[object] = value.__class__
        if kind is int:
            self._whole += sign * value
        elif kind is float:
            numerator, denominator = value.as_integer_ratio()
            bits = denominator.bit_length() - 1
            if bits > self._bits:
                self._parts <<= bits - self._bits
                self._bits = bits
            self._parts += sign * numerator << (self._bits - bits)
            self._decimals += sign
        else:
            return
        self._numbers += sign

    def result(self) -> int | float | None:
        if not self._numbers:
            return None
        if not self._decimals:
            return self._whole if -(2**63) <= self._whole < 2**64 else None
        return self._divided_by(1)

    def _divided_by(self, count: int) -> float | None:
        try:
            if not self._decimals:
                return self._whole / count
            return ((self._whole << self._bits) + self._parts) / (count << self._bits)
        except OverflowError:
            return None


class _Mean(_Sum):
    """Mean of the numbers, rounded once."""

    __slots__ = ()

    def result(self) -> float | None:
        return self._divided_by(self._numbers) if self._numbers else None


class _Extreme:
    """Least or greatest value, lists and objects left out."""

    __slots__ = ("_at", "_values")

    def __init__(self, at: int) -> None:
        self._at = at
        self._values: SortedList[tuple[int, Any, bool]] = SortedList()

    def add(self, value: Any) -> None:
        if (entry := self._entry(value)) is not None:
            self._values.add(entry)

    def remove(self, value: Any) -> None:
        if (entry := self._entry(value)) is not None:
            self._values.remove(entry)

    def result(self) -> Any:
        return self._values[self._at][1] if self._values else None

    @staticmethod
    def _entry(value: Any) -> tuple[int, Any, bool] | None:
        rank, plain = ascending(value)
        # Of 1 and 1.0, which are equal, always the same one is least.
        return (rank, plain, isinstance(plain, float)) if 0 < rank < 5 else None


AGGREGATES: Mapping[str, Callable[[], Aggregate]] = {
    "count": _Count,
    "sum": _Sum,
    "avg": _Mean,
    "min": lambda: _Extreme(0),
    "max": lambda: _Extreme(-1),
}
