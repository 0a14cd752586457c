"""What is written of a row where the user gave no callback."""

from __future__ import annotations

from typing import Any

from aidb_ray.contracts import utc_now
from aidb_ray.errors import ToolError
from aidb_ray.store.collection import Collection


class StatusWrites:
    """What is written of a row where the user gave no callback, as far as it has the fields."""

    def __init__(self, collection: Collection[Any], statuses: tuple[str, str, str]) -> None:
        self._collection = collection
        self._executing, self._completed, self._failed = statuses
        self._known = collection.fields

    def executing(self, claimed_attempt: int, *, is_in_doubt: bool) -> dict[str, Any]:
        """Return the changes that say that a row is being worked on."""
        changes = {"status": self._executing, "attempt": claimed_attempt}
        if is_in_doubt:
            changes["in_doubt"] = True
        return self._fitting(changes)

    def completed(self, result: Any) -> dict[str, Any]:
        """Return the changes that say what came of it."""
        return self._fitting({"status": self._completed, **self._result(result)})

    def failed(self, error: ToolError) -> dict[str, Any]:
        """Return the changes that say why nothing came of it."""
        words = str(error).encode(errors="replace").decode()
        changes = {"status": self._failed, "error": words, "error_code": error.code}
        return self._fitting(changes)

    def late(self, result: Any) -> dict[str, Any] | None:
        """Return the changes that mark a result which came too late, None if it has no place."""
        known = self._known
        return None if known is not None and "late_result" not in known else {"late_result": result}

    def _result(self, result: Any) -> dict[str, Any]:
        if self._known is None or "result" in self._known or "output" not in self._known:
            return {"result": result}
        return {"output": result}

    def _fitting(self, changes: dict[str, Any]) -> dict[str, Any]:
        known = self._known
        if known is None:
            return changes
        if "updated_at" in known:
            changes["updated_at"] = utc_now()
        return {name: value for name, value in changes.items() if name in known}
