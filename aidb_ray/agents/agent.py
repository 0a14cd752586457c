"""Agents as their users hold them: create, attach, send, wait, drain, cancel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, overload
from weakref import finalize

import msgspec

from aidb_ray.agents.definition import AgentDefinition, raw_definition
from aidb_ray.agents.drain import DrainLifecycle, DrainResult, run_drain
from aidb_ray.agents.replies import Replies, ReplyHandle
from aidb_ray.agents.run import GenerateContext
from aidb_ray.agents.shard import AgentActor, ShardStatus
from aidb_ray.agents.startup import RETIRE_MS, OnChange, find_shards, start_shards
from aidb_ray.contracts import AgentMessage, CancelRequest, new_id
from aidb_ray.database import Database, ProcessInfo, Session, current_database
from aidb_ray.errors import (
    AidbError,
    ConfigError,
    ConflictError,
    KeyExistsError,
    NotReadyError,
    UnavailableError,
)
from aidb_ray.models.base import TextAdapter
from aidb_ray.models.tools import Tool
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.runtime import ActorRef
from aidb_ray.runtime.garbage import close_with
from aidb_ray.store.changes import Filter, Insert
from aidb_ray.store.transaction import Transaction

logger = logging.getLogger(__name__)

W = TypeVar("W")
DRAIN_MS = 25_000
HEADROOM_MS = 1_000
_STATUS_MS = 2_000


@overload
def create_agent(
    definition: AgentDefinition,
    /,
    *,
    database: Database | None = None,
    on_change: OnChange = "replace",
) -> Agent: ...
@overload
def create_agent(
    *,
    name: str,
    pending_work: Callable[[QueryRoot], Query[W]],
    generate: Callable[[GenerateContext[W]], Any],
    session: Callable[[W], str] | None = None,
    build_messages: Callable[[list[W], GenerateContext[W]], Any] | None = None,
    on_response: Callable[[Any, list[W]], Any] | None = None,
    adapter: TextAdapter | None = None,
    instructions: str = "",
    tools: Sequence[Tool] = (),
    database: Database | None = None,
    on_change: OnChange = "replace",
    **options: Any,
) -> Agent: ...
def create_agent(
    definition: AgentDefinition | None = None,
    /,
    *,
    database: Database | None = None,
    on_change: OnChange = "replace",
    **options: Any,
) -> Agent:
    """Start an agent in the background, or attach to it if it runs; returns at once.

    Give it what `durable_agent` returns; or, for collections of your own, the options `name`,
    `pending_work`, `generate`, `session`, `build_messages`, `on_response`, `adapter`, `tools` and
    those of `durable_agent`.

    A row of a `pending_work` waits until a generation for it has ended, however it ended. If it
    still matches then, as after an `on_response` that raised, it is left alone until it changes or
    the agent starts again; the row of the generation says why.

    With the name of a running agent it attaches if the definition's fingerprint is equal; else
    `on_change` says: `"replace"` (rounds in flight finish, later ones run the new definition),
    `"attach"` (go on with the old) or `"error"`. A definition that could not start, as its key is
    missing where the old one runs, replaces nothing: `ready()` raises. Dropping the handle stops
    nothing.

    Raises:
        ConfigError: the definition cannot be, or there is no database. Nothing was started.
    """
    if definition is None:
        if "pending_work" not in options:
            raise ConfigError(
                "Give create_agent(durable_agent(...)), or `pending_work` and `generate`.",
                code="pending_work_required",
            )
        given: dict[str, Any] = {"generate": None, **options}
        definition = raw_definition(**given)
    elif options:
        raise ConfigError(
            f"Options belong into durable_agent(...): {', '.join(options)}.", code="invalid_option"
        )
    if on_change not in ("replace", "attach", "error"):
        raise ConfigError(
            f"on_change is 'replace', 'attach' or 'error', not {on_change!r}.",
            code="invalid_option",
        )
    home = database or current_database()
    agent = Agent(home, definition.name, definition.stream_url, definition.shards)
    agent.begin(definition, on_change)
    home.keep_agent(agent)
    return agent


def attach_agent(database: Database, name: str) -> Agent:
    """Return the handle of an agent that runs already; it is looked for at the first await.

    Once `ready()` was awaited it knows the agent's session, if that is only one; before, `send`
    and `collections` need to be told.
    """
    agent = _handle_of(database, name, None, 0)
    agent.attach()
    return agent


class AgentCollections:
    """The collections of an agent's session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.messages = session.messages
        self.generations = session.generations
        self.tool_calls = session.tool_calls
        self.chunks = session.chunks


@dataclass(slots=True, eq=False)
class _InLoop:
    """What a handle has in one event loop: its start, and the replies by partition."""

    closing: finalize[..., Any] = field(init=False)
    starting: asyncio.Task[None] | None = None
    replies: dict[int, Replies] = field(default_factory=dict[int, Replies])

    @property
    def has_failed(self) -> bool:
        """Whether it could not start."""
        starting = self.starting
        if starting is None or not starting.done():
            return False
        return starting.cancelled() or starting.exception() is not None


class Agent:
    """A running agent. Light; it pickles, and attaches where it arrives.

    A handle may be used in several event loops, one after the other, as by tasks that each call
    `asyncio.run`; each attaches anew. A `ReplyHandle` is of the loop that sent. Replies are heard
    while anyone holds the handle, or one of its `ReplyHandle`s.
    """

    def __init__(self, database: Database, name: str, url: str | None, shards: int) -> None:
        self.name = name
        self.database = database
        self._url = url
        self._shard_count = shards
        # Both of one that is attached to only once they are known.
        self.is_raw = False
        self.reaches: frozenset[str] = frozenset()
        self._refs: list[ActorRef[AgentActor]] = []
        self._loops: dict[asyncio.AbstractEventLoop, _InLoop] = {}

    def __repr__(self) -> str:
        return f"<Agent {self.name!r}>"

    @property
    def stream_url(self) -> str | None:
        """The session, or the pattern of sessions, it works for; None while that is not known."""
        return self._url

    def __reduce__(self) -> tuple[Any, ...]:
        return _handle_of, (self.database, self.name, self._url, self._shard_count)

    def begin(self, definition: AgentDefinition | None, on_change: OnChange) -> None:
        """Start or find the shards in the background."""
        if definition is not None:
            self.is_raw, self.reaches = definition.is_raw, definition.reaches
        starting = asyncio.get_running_loop().create_task(self._begin(definition, on_change))
        starting.add_done_callback(_retrieve)
        self._here().starting = starting
        if self._url is not None:
            self._listen()

    def attach(self) -> None:
        """Look for the shards in the background, unless that was done in this event loop."""
        here = self._here()
        if here.starting is None or here.has_failed:
            self.begin(None, "attach")

    async def ready(self) -> None:
        """Wait until every shard is at work.

        Raises:
            ConfigError: what the adapter needs is missing where the agent runs, such as its key
                (`missing_api_key`). Messages wait.
            AidbError: it could not start; every awaited method raises the same.
        """
        here = self._here()
        if here.starting is None:
            self.begin(None, "attach")
        assert here.starting is not None
        await asyncio.shield(here.starting)
        for replies in here.replies.values():
            await replies.ready()

    # The conversation.

    @property
    def collections(self) -> AgentCollections:
        """The collections of the agent's one session.

        Raises:
            ConfigError: `session_required`: it works for a pattern of sessions.
            NotReadyError: the handle is of `db.agent(name)`, and `ready()` was not awaited.
        """
        return AgentCollections(self.database.session(self._one_session()))

    def in_session(self, session: Session | str) -> AgentInSession:
        """Return the agent of one session of its pattern."""
        url = session.url if isinstance(session, Session) else session
        self._check_session(url)
        return AgentInSession(self, url)

    def send(
        self,
        text: str,
        *,
        session: Session | str | None = None,
        actor_id: str = "user",
        message_id: str | None = None,
        **fields: Any,
    ) -> ReplyHandle:
        """Write a user's message to the agent and return a handle of its answer; returns at once.

        With a `message_id` that exists, nothing is written and the handle waits for, or finds,
        the answer to that message; so a script may be run again. If that message is another one,
        by content, author or target, `reply()` and `sent` raise `ConflictError` with the code
        `message_differs`. Without a `session` it goes to
        the agent's one, see `collections`. Further `fields` are those of `AgentMessage`.

        Raises:
            TypeError: it has no such field; nothing was written.
        """
        if not fields.keys() <= AgentMessage.model_fields.keys():
            raise _unknown_keywords(fields)
        url = self._url_of(session)
        replies = self._listen_in(url)
        row = {
            "id": message_id or new_id(),
            "role": "user",
            "actor_id": actor_id,
            "target_agent": self.name,
            "content": text,
            **fields,
        }
        messages = self.database.session(url).messages
        try:
            sent = messages.insert(row)
        except KeyExistsError:
            sent = self._sent_before(url, row, messages.get(row["id"]))
        else:
            sent.explain = partial(self._compare, url, row)
        starting = self._here().starting
        return ReplyHandle(self, replies, url, str(row["id"]), sent, starting)

    def _sent_before(
        self, url: str, row: Mapping[str, Any], shown: AgentMessage | None
    ) -> Transaction | None:
        """Return the write of a message that this process knows; None if it is durable."""
        site, key = self.database.site_of(url), str(row["id"])
        stored = {} if shown is None else shown.model_dump(mode="json", by_alias=True)
        if _is_same(row, stored):
            owner = site.writes.latest_owner((url, "messages", key))
            return owner if isinstance(owner, Transaction) else None
        refused = Transaction(url, [Insert(url, "messages", key, b"")], site.client, site.writes)
        refused.settle(0, _differs(key, stored))
        return refused

    async def _compare(self, url: str, row: Mapping[str, Any], error: Exception) -> None:
        """Raise if the message that a refused one met in the store is another one."""
        if not isinstance(error, KeyExistsError):
            return
        found = await self.database.site_of(url).client.find(url, "messages", error.key)
        if found is not None:
            stored = msgspec.json.decode(found.value, type=dict[str, Any])
            if not _is_same(row, stored):
                raise _differs(error.key, stored, found.revision)

    def reply_to(self, message_id: str, *, session: Session | str | None = None) -> ReplyHandle:
        """Return the handle of a message that was written before, here or elsewhere."""
        url = self._url_of(session)
        replies, starting = self._listen_in(url), self._here().starting
        return ReplyHandle(self, replies, url, message_id, None, starting)

    async def cancel(self, *, session: Session | str | None = None, reason: str = "") -> None:
        """Ask the agent to stop what it does in a session, durably; returns when that is written.

        What runs is aborted and ends as cancelled; what only waits is cancelled, too.
        """
        url = self._url_of(session)
        request = CancelRequest(agent=self.name, reason=reason)
        await self.database.session(url).cancel_requests.insert(request)

    # The loop.

    async def has_pending_work(self, *, session: Session | str | None = None) -> bool:
        """Whether a row waits for the agent or is being answered.

        A row whose generation has ended waits no more, also if that failed and the row still
        matches a `pending_work`; see `create_agent`.
        """
        await self.ready()
        if self.is_raw or self._url is None:
            if session is not None:
                named = session.url if isinstance(session, Session) else session
                asked = [ref.ask(AgentActor.has_pending, named) for ref in self._refs]
                return any(await asyncio.gather(*asked))
            return any(status.pending for status in await self.status())
        url = self._url if session is None else self._url_of(session)
        where = (("targetAgent", (self.name,)), ("processed", (False,)))
        wanted = Filter("messages", url, where=where)
        if url.endswith("*"):
            wanted = Filter("messages", prefix=url[:-1], where=where)
        for partition in self.database.sites_of(url):
            await partition.drain()
            _, rows = await partition.client.read(wanted)
            if rows:
                return True
        return False

    async def run_generation_cycle(self, *, session: Session | str | None = None) -> bool:
        """Run one generation, or wait for one that runs already; False if nothing is pending."""
        await self.ready()
        await self._drain_writes()
        url = None if session is None else self._url_of(session)
        for ref in self._refs:
            if await ref.with_timeout(RETIRE_MS * 10).ask(AgentActor.run_cycle, url):
                return True
        return False

    async def drain_until_idle(
        self,
        *,
        max_duration_ms: int = DRAIN_MS,
        headroom_ms: int = HEADROOM_MS,
        lifecycle: DrainLifecycle | None = None,
        build_checkpoint: Callable[[], Awaitable[Sequence[Any]]] | None = None,
        session: Session | str | None = None,
    ) -> DrainResult:
        """Work until nothing is pending, see `has_pending_work`, or time is up.

        Generations may have failed: a drain looks for work, not at how it ended. Their rows in
        `generations` say so, and `reply()` raises.

        A reactive agent works anyhow; then this waits. `lifecycle` is called in this process. No
        cycle starts within `headroom_ms` of the deadline; what this began is stopped there, stays
        pending, and `completed` is False.
        """
        await self.ready()
        await self._drain_writes()
        url = None if session is None else self._url_of(session)

        async def step(timeout_ms: int) -> tuple[bool, int]:
            answers = await asyncio.gather(
                *(
                    ref.with_timeout(timeout_ms + 10_000).ask(AgentActor.drain, url, timeout_ms)
                    for ref in self._refs
                )
            )
            return all(idle for idle, _ in answers), sum(cycles for _, cycles in answers)

        result = await run_drain(
            step,
            max_duration_ms=max_duration_ms,
            headroom_ms=headroom_ms,
            lifecycle=lifecycle,
            build_checkpoint=build_checkpoint,
        )
        if not result.completed:
            await asyncio.gather(*(ref.ask(AgentActor.abort_drained) for ref in self._refs))
        return result

    async def status(self) -> list[ShardStatus]:
        """Return how each shard is doing."""
        await self.ready()
        return list(await asyncio.gather(*(_status(ref) for ref in self._refs)))

    async def actors(self) -> list[ActorRef[AgentActor]]:
        """Return the addresses of the shards, once every one is at work."""
        await self.ready()
        return list(self._refs)

    async def processes(self) -> list[ProcessInfo]:
        """Return the processes of the shards; those that do not answer are not serving."""
        found: list[ProcessInfo] = []
        for index, ref in enumerate(self._refs):
            name = f"{self.name}/{index}"
            try:
                status = await ref.with_timeout(_STATUS_MS).ask(AgentActor.status)
            except AidbError:
                found.append(ProcessInfo("agent", name, 0, 0, serving=False))
            else:
                serving = status.epoch > 0 and not status.fenced
                found.append(ProcessInfo("agent", name, status.pid, status.running, serving))
        return found

    async def aclose(self) -> None:
        """End the agent: what runs stops where it is, and a later runner goes on with it."""
        await self.detach()
        await asyncio.gather(*(ref.with_timeout(RETIRE_MS).stop() for ref in self._refs))
        if self.database.local_shards.get(self.name) == self._refs:
            del self.database.local_shards[self.name]
        self.database.forget_agent(self)

    async def detach(self) -> None:
        """Let go of the agent; it goes on."""
        here = self._here()
        if here.starting is not None and not here.starting.done():
            await asyncio.wait([here.starting])
        for replies in here.replies.values():
            replies.close()
        here.replies.clear()

    # Starting.

    async def _begin(self, definition: AgentDefinition | None, on_change: OnChange) -> None:
        if definition is not None:
            self._refs = await start_shards(self.database, definition, on_change)
            return
        self._refs, status = await find_shards(self.database, self.name)
        self.is_raw, self.reaches = status.is_raw, status.reaches
        if self._url is None:
            self._url = status.stream_url
            self._listen()

    # Inside.

    def _here(self) -> _InLoop:
        """Return what the handle has in this event loop; forget what it had in closed ones."""
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            for gone in [other for other in self._loops if other.is_closed()]:
                self._loops.pop(gone).closing.detach()
            found = self._loops[loop] = _InLoop()
            found.closing = close_with(self, found.replies.values())
        return found

    def _one_session(self) -> str:
        if self._url is None:
            raise NotReadyError(
                f"Which session agent {self.name!r} follows is not known yet: await ready() first, "
                f"or name a session."
            )
        url = self._url
        if url.endswith("*") or not url:
            raise ConfigError(
                f"Agent {self.name!r} works for {url or 'rows of your own'}: name a session with "
                f"agent.in_session(url).",
                code="session_required",
            )
        return url

    def _url_of(self, session: Session | str | None) -> str:
        if session is None:
            return self._one_session()
        url = session.url if isinstance(session, Session) else session
        self._check_session(url)
        return url

    def _check_session(self, url: str) -> None:
        mine = self._url
        if mine is None:
            return
        fits = url.startswith(mine[:-1]) if mine.endswith("*") else url == mine
        if not fits or url.endswith("*"):
            raise ConfigError(
                f"{url!r} is no session of agent {self.name!r}, which works for {mine!r}.",
                code="foreign_session",
            )

    def _listen(self) -> None:
        if self._url is None or not self._url.startswith("aidb://"):
            return
        heard = self._here().replies
        for index, partition in enumerate(self.database.partitions):
            if index not in heard and partition in self.database.sites_of(self._url):
                heard[index] = Replies(partition, self.name, self._url)

    def _listen_in(self, url: str) -> Replies:
        partition = self.database.site_of(url)
        index = self.database.partitions.index(partition)
        heard = self._here().replies
        found = heard.get(index)
        if found is None:
            found = heard[index] = Replies(partition, self.name, self._url or "aidb://*")
        return found

    async def _drain_writes(self) -> None:
        for partition in self.database.partitions:
            await partition.drain()


class AgentInSession:
    """An agent as it is in one session of its pattern."""

    def __init__(self, agent: Agent, url: str) -> None:
        self.agent = agent
        self.name = agent.name
        self.url = url

    @property
    def collections(self) -> AgentCollections:
        """The collections of the session."""
        return AgentCollections(self.agent.database.session(self.url))

    def send(self, text: str, **options: Any) -> ReplyHandle:
        """See `Agent.send`."""
        return self.agent.send(text, session=self.url, **options)

    async def cancel(self, *, reason: str = "") -> None:
        """See `Agent.cancel`."""
        await self.agent.cancel(session=self.url, reason=reason)

    async def has_pending_work(self) -> bool:
        """See `Agent.has_pending_work`."""
        return await self.agent.has_pending_work(session=self.url)

    async def run_generation_cycle(self) -> bool:
        """See `Agent.run_generation_cycle`."""
        return await self.agent.run_generation_cycle(session=self.url)

    async def drain_until_idle(self, **options: Any) -> DrainResult:
        """See `Agent.drain_until_idle`."""
        return await self.agent.drain_until_idle(session=self.url, **options)


async def _status(ref: ActorRef[AgentActor]) -> ShardStatus:
    try:
        return await ref.ask(AgentActor.status)
    except UnavailableError:
        # It may have been replaced, of which the address hears now; then it finds the next one.
        return await ref.ask(AgentActor.status)


def _is_same(row: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether a stored message (wire names) says the same of the same author to the same agent."""
    named = (("content", "content"), ("actor_id", "actorId"), ("target_agent", "targetAgent"))
    return all(row[name] == stored.get(wire) for name, wire in named)


def _differs(key: str, stored: dict[str, Any], revision: int = 0) -> ConflictError:
    return ConflictError(
        f"There is a message {key!r} already, and it is another one. Choose another message_id; "
        f"reply_to({key!r}) waits for the answer to that one.",
        code="message_differs",
        collection="messages",
        key=key,
        current=stored,
        revision=revision,
    )


def _unknown_keywords(given: Mapping[str, Any]) -> TypeError:
    unknown = ", ".join(repr(name) for name in given if name not in AgentMessage.model_fields)
    own = ("session", "actor_id", "message_id")
    allowed = ", ".join(dict.fromkeys((*own, *AgentMessage.model_fields)))
    return TypeError(f"send() does not take {unknown}; besides the text it takes {allowed}.")


def _retrieve(starting: asyncio.Task[None]) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        logger.error("an agent could not start: %s", error)


def _handle_of(database: Database, name: str, url: str | None, shards: int) -> Agent:
    """Return this process's handle of an agent: each would listen for replies by itself."""
    agent = database.find_agent(name)
    if agent is None:
        agent = Agent(database, name, url, shards)
        database.share_agent(agent)
    return agent
