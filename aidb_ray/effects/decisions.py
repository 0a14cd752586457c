"""What persons and programs decide about running work, from any process: approvals and answers."""

from __future__ import annotations

from typing import Any, cast

from jsonschema import Draft202012Validator

# Its type information leaves `best_match` partly unknown.
from jsonschema.exceptions import (
    ValidationError,
    best_match,  # pyright: ignore[reportUnknownVariableType]
)

from aidb_ray.contracts import Question, utc_now
from aidb_ray.errors import ContractError, KeyMissingError
from aidb_ray.expressions import Expression, Ref, and_, eq, in_array, is_null, or_
from aidb_ray.store.collection import Collection

_OPEN = ["pending", "executing"]


async def approve(tool_calls: Collection[Any], key: str) -> None:
    """Let a tool call run that waits for it; returns once that is durable.

    A call that is approved already stays so.

    Raises:
        KeyMissingError: there is no such call.
        ConflictError: `condition_failed`: it has ended, or was rejected.
    """
    await tool_calls.update(key, {"approval": "approved"}, when=_undecided_or("approved"))


async def reject(tool_calls: Collection[Any], key: str, *, reason: str = "") -> None:
    """Answer a tool call that waits for a decision with `reason`, which the model reads.

    A call that is rejected already keeps its reason.

    Raises:
        KeyMissingError: there is no such call.
        ConflictError: `condition_failed`: it has ended, or was approved.
    """
    found = await tool_calls.find(key)
    if getattr(found, "approval", None) == "rejected":
        return
    await tool_calls.update(
        key, {"approval": "rejected", "reason": reason or None}, when=_undecided_or("rejected")
    )


async def answer(questions: Collection[Question], key: str, value: Any) -> None:
    """Answer a question that a tool asked with `ToolContext.ask`; returns once that is durable.

    Raises:
        KeyMissingError: there is no such question.
        ContractError: `invalid_answer`: the value does not fit the question's schema.
        ConflictError: `condition_failed`: it was answered before.
    """
    found = await questions.find(key)
    if found is None:
        raise KeyMissingError(f"There is no question {key!r}.", collection=questions.name, key=key)
    if found.answer_schema is not None:
        validator: Any = Draft202012Validator(found.answer_schema)
        wrong = cast("ValidationError | None", best_match(validator.iter_errors(value)))
        if wrong is not None:
            path: list[str | int] = [*wrong.absolute_path]
            raise ContractError(
                f"The answer to {found.question!r} does not fit: {wrong.message}",
                code="invalid_answer",
                collection=questions.name,
                key=key,
                loc=("answer", *path),
            )
    await questions.update(
        key,
        {"status": "answered", "answer": value, "answered_at": utc_now()},
        when=lambda q: eq(q.status, "open"),
    )


def _undecided_or(decision: str) -> Any:
    def condition(call: Ref) -> Expression:
        undecided = or_(is_null(call.approval), in_array(call.approval, ["needed", decision]))
        return and_(in_array(call.status, _OPEN), undecided)

    return condition
