"""What one piece of work must not do twice: its steps and its questions, as rows of its session."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from aidb_ray.contracts import Question, Step
from aidb_ray.errors import KeyExistsError, ToolError
from aidb_ray.models.tools import MAX_RESULT_BYTES, describe_mismatch
from aidb_ray.store.changes import Change, Filter, FoundRow, Insert, Mutation
from aidb_ray.store.client import StoreClient
from aidb_ray.store.rows import codec_of

Write = Callable[[Sequence[Mutation]], Awaitable[Any]]
"""Makes a commit on behalf of the work; raises `FencedError` once that is someone else's."""

_steps = codec_of(Step, "id")
_questions = codec_of(Question, "id")


class WorkRecord:
    """Steps and questions of one call or generation. See `ToolContext.step` and `ask`.

    Args:
        owner: Names the work, the same in every attempt.
        is_first: Whether no attempt came before, so that nothing can be recorded yet.
        write: How rows are written, fenced.
    """

    def __init__(
        self,
        client: StoreClient,
        session: str,
        owner: str,
        write: Write,
        *,
        agent: str = "",
        is_first: bool = False,
    ) -> None:
        self._client = client
        self._session = session
        self._owner = owner
        self._write = write
        self._agent = agent
        self._used: set[str] = set()
        self._asked = 0
        self._recorded: dict[str, Any] | None = {} if is_first else None

    async def step(self, name: str, fn: Callable[[], Any]) -> Any:
        """See `ToolContext.step`."""
        if name in self._used:
            raise ToolError(
                f"Step {name!r} was used before in this call; give each its own name.",
                code="duplicate_step",
            )
        self._used.add(name)
        recorded = await self._read_steps()
        if name in recorded:
            return recorded[name]
        result = fn()
        if inspect.isawaitable(result):
            result = await result
        value = _json_value(f"The result of step {name!r}", result)
        step = Step(id=f"{self._owner}:{name}", owner=self._owner, name=name, result=value)
        key, encoded = _steps.encode("steps", step)
        await self._write([Insert(self._session, "steps", key, encoded)])
        return value

    async def ask(self, question: str, schema: Any = None) -> Any:
        """See `ToolContext.ask`."""
        key = f"{self._owner}:{self._asked}"
        self._asked += 1
        adapter: TypeAdapter[Any] | None = None if schema is None else TypeAdapter(schema)
        asked = Question(
            id=key,
            owner=self._owner,
            agent=self._agent,
            question=question,
            answer_schema=None if adapter is None else adapter.json_schema(),
        )
        if await self._client.find(self._session, "questions", key) is None:
            _, encoded = _questions.encode("questions", asked)
            # An earlier attempt's write may arrive late; the question is the same.
            with suppress(KeyExistsError):
                await self._write([Insert(self._session, "questions", key, encoded)])
        answer = await self._answer_to(key)
        if adapter is None:
            return answer
        try:
            return adapter.validate_json(msgspec.json.encode(answer))
        except ValidationError as error:
            raise ToolError(
                f"The answer to {question!r} does not fit: {describe_mismatch(error)}.",
                code="invalid_answer",
            ) from error

    async def _read_steps(self) -> dict[str, Any]:
        if self._recorded is None:
            mine = Filter("steps", self._session, where=(("owner", (self._owner,)),))
            _, rows = await self._client.read(mine)
            steps = [_steps.decode(row.value) for row in rows]
            self._recorded = {step.name: step.result for step in steps}
        return self._recorded

    async def _answer_to(self, key: str) -> Any:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def look(row_key: str, value: bytes | None) -> None:
            if row_key == key and value is not None and not answered.done():
                question = _questions.decode(value)
                if question.status == "answered":
                    answered.set_result(question.answer)

        def hear(changes: Sequence[Change]) -> None:
            for change in changes:
                look(change.key, change.value)

        def see(rows: Sequence[FoundRow], _revision: int) -> None:
            for row in rows:
                look(row.key, row.value)

        mine = Filter("questions", self._session, where=(("owner", (self._owner,)),))
        subscription = self._client.feed.subscribe(mine, hear, see)
        try:
            return await answered
        finally:
            self._client.feed.unsubscribe(subscription)


def _json_value(what: str, value: Any) -> Any:
    try:
        encoded = to_json(value)
        if len(encoded) > MAX_RESULT_BYTES:
            raise ToolError(
                f"{what} is {len(encoded):,} bytes of JSON; at most {MAX_RESULT_BYTES:,} are kept.",
                code="result_too_large",
            )
        return from_json(encoded, allow_inf_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ToolError(f"{what} has no JSON form: {error}", code="not_serializable") from error
