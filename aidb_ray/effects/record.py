"""What one piece of work must not do twice: its steps and its questions, as rows of its session."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from aidb_ray import crash_points
from aidb_ray.contracts import MAX_KEY_LENGTH, Question, Step
from aidb_ray.errors import ContractError, KeyExistsError, ToolError
from aidb_ray.models.tools import MAX_RESULT_BYTES, describe_mismatch
from aidb_ray.store.changes import Change, Filter, FoundRow, Insert, Mutation
from aidb_ray.store.client import StoreClient
from aidb_ray.store.rows import codec_of

Write = Callable[[Sequence[Mutation]], Awaitable[Any]]
"""Makes a commit on behalf of the work; raises `FencedError` once that is someone else's."""

_NOT_IN_KEYS = re.compile("[\0\ud800-\udfff]")
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
        self._check_step(name, fn)
        self._used.add(name)
        try:
            recorded = await self._read_steps()
            if name in recorded:
                return recorded[name]
            result = fn()
            if inspect.isawaitable(result):
                result = await result
            encoded, value = self._encode_step(name, result)
        except BaseException:
            # Nothing of it is recorded, so it may be tried again.
            self._used.discard(name)
            raise
        if crash_points.armed:
            await crash_points.reach("step.ran")
        try:
            await self._write([encoded])
        except KeyExistsError:
            # An earlier attempt's write arrived late. What is recorded is what later attempts get.
            self._recorded = None
            return (await self._read_steps())[name]
        if crash_points.armed:
            await crash_points.reach("step.recorded")
        return value

    def _check_step(self, name: str, fn: Callable[[], Any]) -> None:
        """Raise what can be known to be wrong before anything runs."""
        wrong = ""
        room = MAX_KEY_LENGTH - len(self._step_key(""))
        if not 1 <= len(name) <= room or _NOT_IN_KEYS.search(name):
            wrong = f"a name has 1 to {room} characters, no NUL and no halves of surrogate pairs"
        elif not callable(fn):
            if inspect.iscoroutine(fn):
                fn.close()
            wrong = "give it a function to call, such as `lambda: work()`, not what it returns"
        if wrong:
            raise ToolError(f"{name[:80]!r} is no step: {wrong}.", code="invalid_step")
        if name in self._used:
            raise ToolError(
                f"Step {name!r} was used before in this call; give each its own name.",
                code="duplicate_step",
            )

    def _step_key(self, name: str) -> str:
        return f"{self._owner}:{name}"

    def _encode_step(self, name: str, result: Any) -> tuple[Insert, Any]:
        what = f"The result of step {name!r}"
        value = _json_value(what, result)
        try:
            step = Step(id=self._step_key(name), owner=self._owner, name=name, result=value)
            key, encoded = _steps.encode("steps", step)
        except ContractError as error:
            raise _no_json_form(what, error) from error
        return Insert(self._session, "steps", key, encoded), value

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
        found = await self._client.find(self._session, "questions", key)
        if found is None:
            _, encoded = _questions.encode("questions", asked)
            # An earlier attempt's write may arrive late; what it asked is looked at below.
            with suppress(KeyExistsError):
                await self._write([Insert(self._session, "questions", key, encoded)])
        answer = await self._answer_to(key, question)
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

    async def _answer_to(self, key: str, question: str) -> Any:
        """Wait until the question in that row is answered.

        Raises:
            ToolError: the row asks something else, or has gone, so no answer can come.
        """
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def look(value: bytes | None) -> None:
            if answered.done():
                return
            if value is None:
                answered.set_exception(_withdrawn(question))
                return
            asked = _questions.decode(value)
            if asked.question != question:
                answered.set_exception(_differs(question, asked.question))
            elif asked.status == "answered":
                answered.set_result(asked.answer)

        def hear(changes: Sequence[Change]) -> None:
            for change in changes:
                if change.key == key:
                    look(change.value)

        def see(rows: Sequence[FoundRow], _revision: int) -> None:
            look(next((row.value for row in rows if row.key == key), None))

        mine = Filter("questions", self._session, where=(("owner", (self._owner,)),))
        subscription = self._client.feed.subscribe(mine, hear, see)
        try:
            await asyncio.shield(subscription.ready)
            return await answered
        finally:
            self._client.feed.unsubscribe(subscription)


def _json_value(what: str, value: Any) -> Any:
    # An iterator may never end.
    if isinstance(value, Iterator):
        raise _no_json_form(what, "it is an iterator; return a list")
    try:
        encoded = to_json(value)
        if len(encoded) > MAX_RESULT_BYTES:
            raise ToolError(
                f"{what} is {len(encoded):,} bytes of JSON; at most {MAX_RESULT_BYTES:,} are kept.",
                code="result_too_large",
            )
        return from_json(encoded, allow_inf_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise _no_json_form(what, error) from error


def _no_json_form(what: str, why: object) -> ToolError:
    return ToolError(f"{what} has no JSON form: {why}", code="not_serializable")


def _withdrawn(question: str) -> ToolError:
    return ToolError(f"The question {question!r} was withdrawn.", code="question_withdrawn")


def _differs(question: str, before: str) -> ToolError:
    return ToolError(
        f"An earlier attempt asked {before!r} where this one asks {question!r}. An answer to the "
        f"one is none to the other: ask the same questions in the same order.",
        code="question_differs",
    )
