"""Collections as a connection hands them out: who asks for the same one gets the same handle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from aidb_ray.expressions import Migrate
from aidb_ray.store.collection import Collection

MAX_RECENT = 256

Identity: TypeAlias = tuple[str, type[Any] | None, str, str | None, int, "Migrate | None"]
"""(name, row type, key field, session, version, what migrates older rows)"""


class SharedCollections:
    """The collections of one event loop.

    The 256 that were asked for last stay, with their copies of rows if they have any; others for
    as long as somebody holds them.
    """

    def __init__(self) -> None:
        self._all: WeakValueDictionary[Identity, Collection[Any]] = WeakValueDictionary()
        self._recent: OrderedDict[Identity, Collection[Any]] = OrderedDict()

    def get(self, identity: Identity, make: Callable[[], Collection[Any]]) -> Collection[Any]:
        """Return the collection, made if there is none."""
        found = self._recent.get(identity)
        if found is None:
            found = self._all.get(identity)
            if found is None:
                found = self._all[identity] = make()
            self._recent[identity] = found
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(identity)
        return found
