"""The answer of a query: its rows in order, and what has changed in them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, cast

from sortedcontainers import SortedList

from aidb_ray.errors import AidbError, QueryError
from aidb_ray.expressions import identity
from aidb_ray.query.ordering import Place

R = TypeVar("R")

Key: TypeAlias = Hashable
Row: TypeAlias = "dict[str, Any]"
Decode: TypeAlias = Callable[[Row], Any]
Op: TypeAlias = Literal["enter", "update", "exit"]


class Delta(Generic[R]):
    """One row of an answer that is new, different or gone. It does not change.

    Attributes:
        op: `enter`, `update`, or `exit`.
        key: Identifies the row in the answer: the source's key; of a join the keys of its
            sources, None for a missing row; the values that make a group or a distinct row what
            it is; of a union the number of the query, from 0, and the key there.
        revision: The commit that caused this; it may have changed another row than this one.
    """

    __slots__ = ("_entry", "key", "op", "revision")
    __match_args__ = ("op", "key", "row", "revision")

    def __init__(self, op: Op, key: Any, row: R, revision: int) -> None:
        self.op: Op = op
        self.key = key
        self.revision = revision
        self._entry = Entry(key, (), None, lambda _raw: row)

    @classmethod
    def of(cls, op: Op, entry: Entry, revision: int) -> Delta[R]:
        """Return a delta whose row is decoded when someone looks at it."""
        delta: Delta[R] = cls.__new__(cls)
        delta.op = op
        delta.key = entry.key
        delta.revision = revision
        delta._entry = entry
        return delta

    @property
    def row(self) -> R:
        """The row as it is now; at `exit` as it was.

        Raises:
            QueryError: the row is not what its type or `select` requires (`invalid_row`).
        """
        return self._entry.row()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        ours, theirs = self._to_tuple(), cast("Delta[Any]", other)._to_tuple()
        return ours == theirs

    def __repr__(self) -> str:
        op, key, row, revision = self._to_tuple()
        return f"Delta({op!r}, {key!r}, {row!r}, revision={revision})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Delta, self._to_tuple()

    def _to_tuple(self) -> tuple[Op, Any, R, int]:
        return self.op, self.key, self.row, self.revision


class Entry:
    """A row of the answer: as computed and, once someone looked, as readers get it."""

    __slots__ = ("_show", "_shown", "key", "place", "raw")

    def __init__(self, key: Key, place: Place, raw: Any, show: Decode) -> None:
        self.key = key
        self.place = place
        self.raw = raw
        self._show: Decode | None = show
        self._shown: Any = None

    def row(self) -> Any:
        """Return the row as readers get it, the same object each time."""
        if self._show is not None:
            try:
                self._shown = self._show(self.raw)
            except (AidbError, TypeError, ValueError) as error:
                raise QueryError(
                    f"The row {self.key!r} is not what its reader asks for: {error}",
                    code="invalid_row",
                ) from error
            self._show = None
        return self._shown


class Placed(Protocol):
    """A stage that takes rows of the answer with their place in it."""

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        """Take in that the row of `key` is now `raw` and stands at `place`; None: it is gone.

        The last part of a place is the key, so that no two are equal.
        """
        ...


class Distinct:
    """Passes on the first of equal rows, under a key made of what they have in common."""

    def __init__(self, target: Placed) -> None:
        self._target = target
        self._members: dict[Key, tuple[Key, Place, Any]] = {}
        self._places: dict[Key, SortedList[Place]] = {}

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        """See `Placed.put`."""
        touched: dict[Key, None] = {}
        if (member := self._members.pop(key, None)) is not None:
            content, old_place, _raw = member
            places = self._places[content]
            places.remove(old_place)
            if not places:
                del self._places[content]
            touched[content] = None
        if place is not None:
            content = identity(raw)
            self._members[key] = content, place, raw
            self._places.setdefault(content, SortedList()).add(place)
            touched[content] = None
        for content in touched:
            self._pass_on(content, revision)

    def _pass_on(self, content: Key, revision: int) -> None:
        places = self._places.get(content)
        if places is None:
            self._target.put(content, None, None, revision)
        else:
            first = places[0]
            self._target.put(content, (*first, content), self._members[first[-1]][2], revision)


class Answer:
    """All rows, put in order when they are read."""

    def __init__(self, show: Decode) -> None:
        self._show = show
        self._entries: dict[Key, Entry] = {}
        # What readers had of a row before this step, and the latest commit that touched it.
        self.touched: dict[Key, tuple[Entry | None, int]] = {}

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        """See `Placed.put`."""
        before = self._entries.get(key)
        if place is not None:
            self._entries[key] = Entry(key, place, raw, self._show)
        elif before is not None:
            del self._entries[key]
        else:
            return
        self._touch(key, before, revision)

    def _touch(self, key: Key, before: Entry | None, revision: int) -> None:
        touched = self.touched.get(key)
        self.touched[key] = (before if touched is None else touched[0]), revision

    def in_order(self) -> Iterator[Entry]:
        """Yield the rows of the answer, in order."""
        return iter(sorted(self._entries.values(), key=_place_of))

    def _visible(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def flush(self) -> list[tuple[Op, Entry, int]]:
        """Return what readers have to learn since the last time, in the order of the answer."""
        gone: list[tuple[Op, Entry, int]] = []
        here: list[tuple[Op, Entry, int]] = []
        for key, (before, revision) in self.touched.items():
            after = self._visible(key)
            if before is None:
                if after is not None:
                    here.append(("enter", after, revision))
            elif after is None:
                gone.append(("exit", before, revision))
            elif not are_same(before.raw, after.raw):
                here.append(("update", after, revision))
        self.touched.clear()
        for moves in (gone, here):
            if len(moves) > 1:
                moves.sort(key=_place_of_move)
        return gone + here


class Window(Answer):
    """Rows of which only those from `begin` to before `end` are the answer.

    A row that comes or goes shifts those behind it, so at most one row moves over each edge.
    Costs O(log n) for each row that changes.
    """

    def __init__(self, show: Decode, begin: int, end: int) -> None:
        super().__init__(show)
        self._begin = begin
        self._end = end
        self._places: SortedList[Place] = SortedList()

    def put(self, key: Key, place: Place | None, raw: Any, revision: int) -> None:
        """See `Placed.put`."""
        before = self._entries.get(key)
        if before is not None and before.place == place:
            self._entries[key] = Entry(key, before.place, raw, self._show)
            if self._visible(key) is not None:
                self._touch(key, before, revision)
            return
        if before is not None:
            self._remove(before, revision)
        if place is not None:
            self._insert(Entry(key, place, raw, self._show), revision)

    def _remove(self, entry: Entry, revision: int) -> None:
        at = self._places.bisect_left(entry.place)
        del self._places[at]
        del self._entries[entry.key]
        if at >= self._end or self._begin == self._end:
            return
        leaving = entry if at >= self._begin else self._at(self._begin - 1)
        if leaving is not None:
            self._touch(leaving.key, leaving, revision)
        entering = self._at(self._end - 1)
        if entering is not None:
            self._touch(entering.key, None, revision)

    def _insert(self, entry: Entry, revision: int) -> None:
        at = self._places.bisect_left(entry.place)
        self._places.add(entry.place)
        self._entries[entry.key] = entry
        if at >= self._end or self._begin == self._end:
            return
        entering = entry if at >= self._begin else self._at(self._begin)
        if entering is not None:
            self._touch(entering.key, None, revision)
        leaving = self._at(self._end)
        if leaving is not None:
            self._touch(leaving.key, leaving, revision)

    def _at(self, index: int) -> Entry | None:
        return self._entries[self._places[index][-1]] if index < len(self._places) else None

    def in_order(self) -> Iterator[Entry]:
        """Yield the rows of the answer, in order."""
        for place in self._places.islice(self._begin, self._end):
            yield self._entries[place[-1]]

    def _visible(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        return entry if self._begin <= self._places.bisect_left(entry.place) < self._end else None


def _place_of(entry: Entry) -> Place:
    return entry.place


def _place_of_move(move: tuple[Op, Entry, int]) -> Place:
    return move[1].place


def are_same(before: Any, after: Any) -> bool:
    """Whether a reader could not tell two rows apart."""
    # Python takes 1 for True, and a reader may not; equal rows are rare enough to look twice.
    return before is after or (before == after and identity(before) == identity(after))
