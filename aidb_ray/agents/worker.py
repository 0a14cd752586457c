"""Worker agents: one task each time, with a fresh context, as a function or as a tool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Generic, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ValidationError

from aidb_ray.agents.agent import Agent, create_agent
from aidb_ray.agents.definition import AgentDefinition, durable_agent
from aidb_ray.agents.replies import ReplyHandle
from aidb_ray.contracts import AgentMessage, is_valid_name, new_id
from aidb_ray.database import Database, current_database
from aidb_ray.errors import (
    AidbError,
    ContractError,
    ModelError,
    RunCancelledError,
    ToolError,
    UnavailableError,
)
from aidb_ray.models.base import ModelMessage, TextAdapter
from aidb_ray.models.chat import parse_output
from aidb_ray.models.signals import Signal
from aidb_ray.models.signatures import Signature
from aidb_ray.models.tools import Tool, ToolContext, describe_mismatch

logger = logging.getLogger(__name__)

I = TypeVar("I", bound=BaseModel)  # noqa: E741  An input, as O is an output.
O = TypeVar("O")  # noqa: E741

_END_MS = 10_000
_PAUSE_MS = 500
_GIVE_UP_MS = 120_000


class WorkerAgent(Tool, Generic[I, O]):
    """An agent for one task at a time, as `create_worker_agent` makes it.

    It is a tool, too: in `tools=[...]` of another agent its input is what the model gives. A
    handle pickles, and reaches the same pool from every process.
    """

    def __init__(
        self,
        definition: AgentDefinition,
        description: str,
        input_schema: type[I],
        *,
        isolated: bool,
        pool_size: int,
        database: Database | None,
    ) -> None:
        async def serve(worker_input: Any, ctx: ToolContext) -> Any:
            return await self._serve(worker_input, ctx)

        signature = Signature(definition.name, model=input_schema)
        super().__init__(
            name=definition.name,
            description=description,
            signature=signature.bind(serve, ToolContext, {"ToolContext": ToolContext, "Any": Any}),
            function=serve,
            output_type=definition.output_schema,
        )
        self._definition = definition
        self._input_schema = input_schema
        self._isolated = isolated
        self._pool_size = pool_size
        self._database = database
        self._pools: WeakKeyDictionary[Database, Agent] = WeakKeyDictionary()
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self._definition, self.description, self._input_schema)
        return _restore, (*given, self._isolated, self._pool_size, self._database)

    def __repr__(self) -> str:
        return f"WorkerAgent({self.name!r})"

    async def run(self, input_: I | Mapping[str, Any], *, run_id: str | None = None) -> O:
        """Do the task and return its result: an `output_schema`, or text without one.

        A run is a session of its own, `aidb://<name>/<run_id>`: its messages, rounds and calls
        are rows, and it goes on after a crash of its process. With a `run_id` that was used
        before nothing is done again: the run is waited for, or its result is found.

        Cancelling the awaiting task cancels the run, durably.

        Raises:
            ContractError: `invalid_input`: the input does not fit; `invalid_id`: the run's id
                cannot name a session. Nothing was started.
            ModelError: the run failed; `invalid_output` if its answer did not fit, for the third
                time.
            RunCancelledError: someone cancelled it.
            AidbError: the pool could not be started, or the store not be reached.
        """
        run_id = run_id or new_id()
        if not is_valid_name(run_id):
            raise ContractError(f"{run_id!r} cannot name a session.", code="invalid_id")
        return await self._run(self._check(input_), run_id, lambda: True)

    async def ready(self) -> None:
        """Start the pool, or find it, and wait until it is at work. A run does so by itself.

        Raises:
            AidbError: it could not be started.
        """
        if not self._isolated:
            await self._pool()

    async def aclose(self) -> None:
        """End the pool: what runs stops where it is, and a later run with its id goes on."""
        pool = self._pools.pop(self._home(), None)
        if pool is not None:
            await pool.aclose()

    async def _serve(self, input_: I, ctx: ToolContext) -> O:
        """Run as a tool of another agent: each call has one run, whoever crashes."""
        run_id = _run_id_of(ctx.idempotency_key) if ctx.idempotency_key else new_id()
        try:
            # A call that is stopped with its process goes on later, and so does its run.
            return await self._run(
                input_, run_id, lambda: _is_cancelled(ctx.signal), is_patient=True
            )
        except (ModelError, RunCancelledError) as error:
            raise ToolError(f"{self.name!r} failed: {error}", code=error.code) from error

    async def _run(
        self,
        input_: I,
        run_id: str,
        is_cancelled: Callable[[], bool],
        *,
        is_patient: bool = False,
    ) -> O:
        url = f"aidb://{self.name}/{run_id}"
        content = input_.model_dump_json(by_alias=True)
        async with self._agent_for(run_id, url) as agent:
            handle = agent.send(content, session=url, message_id=run_id)
            try:
                reply = await _reply_to(agent, handle, is_patient=is_patient)
            except asyncio.CancelledError:
                if is_cancelled():
                    await asyncio.shield(_cancel(agent, handle))
                raise
        schema = self._definition.output_schema
        return cast("O", reply if schema is None else parse_output(reply, schema))

    def _check(self, input_: I | Mapping[str, Any]) -> I:
        if isinstance(input_, self._input_schema):
            return input_
        try:
            return self._input_schema.model_validate(input_)
        except ValidationError as error:
            raise ContractError(
                f"The input of {self.name!r} does not fit: {describe_mismatch(error)}.",
                code="invalid_input",
                loc=error.errors()[0]["loc"],
            ) from error

    def _home(self) -> Database:
        return self._database or current_database()

    async def _pool(self) -> Agent:
        home = self._home()
        pool = self._pools.get(home)
        if pool is None:
            pool = self._pools[home] = create_agent(self._definition, database=home)
        try:
            await pool.ready()
        except AidbError:
            # The next run tries again.
            if self._pools.get(home) is pool:
                del self._pools[home]
            raise
        return pool

    @asynccontextmanager
    async def _agent_for(self, run_id: str, url: str) -> AsyncGenerator[Agent]:
        """Give the agent that does a run: the pool, or one in a process of its own."""
        if not self._isolated:
            yield await self._pool()
            return
        loop = asyncio.get_running_loop()
        slots = self._slots.setdefault(loop, asyncio.Semaphore(self._pool_size))
        async with slots:
            name = f"{self.name}.{run_id.replace('/', '_')}"
            alone = replace(self._definition, name=name, stream_url=url, shards=1)
            agent = create_agent(alone, database=self._home())
            try:
                await agent.ready()
                yield agent
            finally:
                await asyncio.shield(agent.aclose())


def _restore(
    definition: AgentDefinition,
    description: str,
    input_schema: type[BaseModel],
    isolated: bool,  # noqa: FBT001  Pickle gives arguments by place.
    pool_size: int,
    database: Database | None,
) -> WorkerAgent[Any, Any]:
    return WorkerAgent(
        definition,
        description,
        input_schema,
        isolated=isolated,
        pool_size=pool_size,
        database=database,
    )


def _run_id_of(key: str) -> str:
    """Return the id of the run that serves a call: its key, where that can name a session."""
    return key if is_valid_name(key) else blake2b(key.encode(), digest_size=16).hexdigest()


async def _reply_to(agent: Agent, handle: ReplyHandle, *, is_patient: bool) -> str:
    """Wait for the reply; a patient one asks again while the store or the pool is away."""
    patience_ms = _GIVE_UP_MS if is_patient else 0
    while True:
        try:
            return (await handle.reply()).content
        except UnavailableError:
            patience_ms -= _PAUSE_MS
            if patience_ms < 0:
                raise
            logger.warning("a worker is waited for that cannot be reached now", exc_info=True)
        await asyncio.sleep(_PAUSE_MS / 1000)
        handle = agent.reply_to(handle.message_id, session=handle.session)


def _is_cancelled(signal: Signal) -> bool:
    # Where only the caller's process stops, its call is made again and finds the run.
    return signal.is_aborted and not signal.is_stop


async def _cancel(agent: Agent, handle: ReplyHandle) -> None:
    """Cancel a run and wait until it has ended; it ends later if that takes too long."""
    try:
        await agent.cancel(session=handle.session, reason="Nobody waits for it any more.")
        await handle.reply(timeout_ms=_END_MS)
    except (AidbError, TimeoutError) as error:
        if not isinstance(error, RunCancelledError):
            logger.warning("a run was cancelled and has not ended so: %s", error)


@dataclass(frozen=True, slots=True)
class _Context:
    """Makes the messages of a run from its input."""

    input_schema: type[BaseModel]
    build: Callable[[Any], Any] | None

    def __call__(self, pending: Sequence[AgentMessage], _ctx: Any) -> Any:
        content = pending[0].content
        if self.build is None:
            return [ModelMessage("user", content)]
        return self.build(self.input_schema.model_validate_json(content))


OM = TypeVar("OM", bound=BaseModel)


@overload
def create_worker_agent(
    *,
    name: str,
    adapter: TextAdapter,
    input_schema: type[I],
    output_schema: type[OM],
    description: str = "",
    instructions: str = "",
    build_messages: Callable[[I], Iterable[ModelMessage | Mapping[str, Any]] | Any] | None = None,
    pool_size: int = 1,
    isolated: bool = False,
    ray_options: Mapping[str, Any] | None = None,
    database: Database | None = None,
    **options: Any,
) -> WorkerAgent[I, OM]: ...


@overload
def create_worker_agent(
    *,
    name: str,
    adapter: TextAdapter,
    input_schema: type[I],
    output_schema: None = None,
    description: str = "",
    instructions: str = "",
    build_messages: Callable[[I], Iterable[ModelMessage | Mapping[str, Any]] | Any] | None = None,
    pool_size: int = 1,
    isolated: bool = False,
    ray_options: Mapping[str, Any] | None = None,
    database: Database | None = None,
    **options: Any,
) -> WorkerAgent[I, str]: ...


def create_worker_agent(
    *,
    name: str,
    adapter: TextAdapter,
    input_schema: type[I],
    output_schema: type[BaseModel] | None = None,
    description: str = "",
    instructions: str = "",
    build_messages: Callable[[I], Any] | None = None,
    pool_size: int = 1,
    isolated: bool = False,
    ray_options: Mapping[str, Any] | None = None,
    database: Database | None = None,
    **options: Any,
) -> WorkerAgent[Any, Any]:
    """Return a worker: `await worker.run(input)`, or a tool of another agent.

    Nothing starts before its first run, or `ready()`; then there is one pool of that name, however
    many processes use it.

    Args:
        name: What a model calls it, too: letters, digits, `_` and `-`, at most 64.
        adapter: The model.
        input_schema: What it is given.
        output_schema: What it returns; text without one. An answer that does not fit is sent back
            with what is wrong, twice at most.
        description: What another agent's model is told about it.
        instructions: Given to its model as the system prompt.
        build_messages: `(input) -> messages` for its model, plain or async; by default one of the
            user with the input as JSON.
        pool_size: Processes of the pool, each of which does many runs at once; or, `isolated`, how
            many runs one process has done at once.
        isolated: Whether each run has a process of its own, which ends with it.
        ray_options: Resources of each process: `num_cpus`, `num_gpus`, `resources`, `runtime_env`.
        database: Where it runs; by default the one that is current at a run.
        options: Others of `durable_agent`, such as `tools`, `retry` or `run_timeout_ms`.

    Raises:
        ConfigError: it cannot be.
    """
    definition = durable_agent(
        name=name,
        adapter=adapter,
        instructions=instructions,
        build_messages=_Context(input_schema, build_messages),
        output_schema=output_schema,
        shards=1 if isolated else pool_size,
        ray_options=ray_options,
        **options,
    )
    return WorkerAgent(
        definition,
        description,
        input_schema,
        isolated=isolated,
        pool_size=pool_size,
        database=database,
    )
