"""Connecting to a database: its partitions, sessions and collections."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Hashable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakValueDictionary

from aidb_ray.contracts import (
    AgentMessage,
    CancelRequest,
    Generation,
    Question,
    Step,
    ToolCall,
    is_valid_name,
    new_id,
)
from aidb_ray.errors import (
    AidbError,
    CompactedError,
    ConfigError,
    ContractError,
    StorageError,
    StoreLockedError,
    StoreMismatchError,
    UnavailableError,
)
from aidb_ray.expressions import Migrate
from aidb_ray.runtime import ActorOptions, ActorRef, Cluster, LocalRef, connect_cluster, find, spawn
from aidb_ray.store.actor import StoreActor, StoreOptions, StoreStatus
from aidb_ray.store.changes import DeleteSession, Fork, Retain, bucket_of
from aidb_ray.store.client import StoreClient
from aidb_ray.store.collection import Collection, Group, Shown, current_group
from aidb_ray.store.holders import Holders, holders_of
from aidb_ray.store.local import LocalWrites
from aidb_ray.store.retention import LEAST_KEPT_MS
from aidb_ray.store.shared import SharedCollections
from aidb_ray.store.transaction import Transaction

if TYPE_CHECKING:
    from aidb_ray.agents.agent import Agent
    from aidb_ray.chunks import ChunkCollection
    from aidb_ray.query.builder import Query, QueryRoot, SingleQuery
    from aidb_ray.query.live import LiveQuery
    from aidb_ray.store.files import FileSystem

logger = logging.getLogger(__name__)

R = TypeVar("R")
OPEN_TIMEOUT_MS = 120_000
FIND_TIMEOUT_MS = 30_000


class Partition:
    """One partition as this process reaches it.

    Attributes:
        retained: How long rows are kept by collection and session, as far as declared here.
    """

    def __init__(self, ref: ActorRef[StoreActor]) -> None:
        self.ref = ref
        self.client = StoreClient(ref)
        self.writes = LocalWrites()
        self.retained: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that belongs to the connection: closing waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self) -> None:
        """Wait until every write made so far has its outcome; those made meanwhile may not."""
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        await self.client.drain()

    async def aclose(self) -> None:
        """Wait for outstanding writes and refuse others, then end the feed."""
        await self.drain()
        await self.client.aclose()
        if self._tasks:
            await asyncio.wait(set(self._tasks))


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One process of a database.

    Attributes:
        kind: `store` or `agent`.
        name: Partition, or agent and shard.
        running: Model rounds and tool calls in flight.
        serving: Whether it answers and has recovered.
    """

    kind: Literal["store", "agent"]
    name: str
    pid: int
    running: int
    serving: bool


class Closable(Protocol):
    """What works on a database's rows and must end, or be left alone, before it closes."""

    async def disconnect(self) -> None:
        """End what cannot go on without the connection."""
        ...


_current: ContextVar[Database | None] = ContextVar("aidb_database", default=None)
_open: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Database]] = WeakKeyDictionary()


def current_database() -> Database:
    """Return the default database: of an agent's code its own, else the latest open of this loop.

    Raises:
        ConfigError: `not_connected`.
    """
    found = _current.get()
    if found is not None and not found.is_closed:
        return found
    stack = _open.get(asyncio.get_running_loop(), [])
    if stack:
        return stack[-1]
    raise ConfigError(
        "There is no database: `await aidb_ray.connect(...)` first.", code="not_connected"
    )


def set_current_database(database: Database) -> None:
    """Make `database` the default of this context."""
    _current.set(database)


class Database:
    """A connected database. Light to hold; it pickles, and connects where it arrives.

    Leaving it as a context manager waits for outstanding writes. What runs on a cluster that was
    started here ends with the last connection that this process has to it; on an existing cluster
    stores and agents go on.
    """

    def __init__(
        self,
        name: str,
        refs: list[ActorRef[StoreActor]],
        *,
        data_dir: str,
        cluster: Cluster | None,
        durability: str = "local",
        holders: Holders | None = None,
    ) -> None:
        self.name = name
        self.data_dir = data_dir
        self.durability = durability
        self.cluster = cluster
        self.is_closed = False
        self._refs = refs
        # Who else of this process uses stores that it started on Ray, and so must end.
        self._holders = holders
        # A client belongs to one event loop; a handle may be used in several, one after the other.
        self._partitions: dict[asyncio.AbstractEventLoop, list[Partition]] = {}
        self._collections: dict[asyncio.AbstractEventLoop, SharedCollections] = {}
        self._agents: dict[str, Agent] = {}
        self._effects: list[Closable] = []
        # Of agents that others created, while somebody holds the handle.
        self._attached_agents: WeakValueDictionary[str, Agent] = WeakValueDictionary()
        # Shards of agents that run in this process, by agent; on Ray they are found by name.
        self.local_shards: dict[str, list[Any]] = {}
        self.local_turns: dict[str, asyncio.Lock] = {}

    def __repr__(self) -> str:
        return f"<Database {self.name!r} in {self.data_dir}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_local:
            raise ConfigError(
                "A database in this process cannot be sent to another one; connect to a Ray "
                "cluster instead.",
                code="local_only",
            )
        return _reattach, (self.name, self._refs, self.data_dir, self.durability)

    async def __aenter__(self) -> Database:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def is_local(self) -> bool:
        """Whether it lives in this process, without Ray."""
        return any(isinstance(ref, LocalRef) for ref in self._refs)

    @property
    def partitions(self) -> list[Partition]:
        """The partitions as this event loop reaches them."""
        loop = asyncio.get_running_loop()
        found = self._partitions.get(loop)
        if found is None:
            if self.is_closed:
                raise _closed(self.name)
            for gone in [other for other in self._partitions if other.is_closed()]:
                del self._partitions[gone]
            found = self._partitions[loop] = [Partition(ref) for ref in self._refs]
        return found

    async def connected(self) -> None:
        """Connect if that has not happened in this process yet; refs find their actors."""
        if self.is_closed:
            raise _closed(self.name)

    def site_of(self, session: str) -> Partition:
        """Return the partition that holds a session; sessions that are none are in the first."""
        partitions = self.partitions
        if len(partitions) == 1 or not session:
            return partitions[0]
        if session.endswith("*"):
            raise ConfigError(
                f"The sessions of {session!r} are in {len(partitions)} partitions, which count "
                f"their revisions apart. Use a query, or subscribe.",
                code="spans_partitions",
            )
        return partitions[bucket_of(session) % len(partitions)]

    def sites_of(self, session: str) -> list[Partition]:
        """Return the partitions that hold a session, or the sessions of a pattern."""
        return self.partitions if session.endswith("*") else [self.site_of(session)]

    # What is in it.

    def session(self, url: str) -> Session:
        """Return the session `aidb://...`; it exists once it has a row."""
        _check_session(url)
        return Session(self, url)

    async def sessions(self, prefix: str = "") -> list[Session]:
        """Return the sessions that hold rows, ascending by name."""
        found: list[str] = []
        for partition in self.partitions:
            found += await partition.client.sessions(prefix)
        # The name that stands for no session holds collections of the whole database.
        return [Session(self, url) for url in sorted(found) if url]

    @overload
    def collection(
        self,
        name: str,
        schema: None = None,
        *,
        key: str = ...,
        session: str | None = ...,
        version: int = ...,
        migrate: Migrate | None = ...,
        retention_ms: int | None = ...,
    ) -> Collection[dict[str, Any]]: ...
    @overload
    def collection(
        self,
        name: str,
        schema: type[R],
        *,
        key: str = ...,
        session: str | None = ...,
        version: int = ...,
        migrate: Migrate | None = ...,
        retention_ms: int | None = ...,
    ) -> Collection[R]: ...
    def collection(
        self,
        name: str,
        schema: type[Any] | None = None,
        *,
        key: str = "id",
        session: str | None = None,
        version: int = 1,
        migrate: Migrate | None = None,
        retention_ms: int | None = None,
    ) -> Collection[Any]:
        """Return a collection; it exists once it has a row.

        Without a session it lives in the first partition. A session ending in `*` reads across
        sessions. In an event loop it is the same object each time, so its rows are copied once:
        the 256 that were asked for last are kept, others while somebody holds them.

        Args:
            name: The collection's, 1 to 512 of the characters that need no escape in a URL.
            schema: pydantic model, dataclass or TypedDict that rows are held to; None for dicts.
            key: Name of the field that identifies a row.
            session: Whose rows these are.
            version: Of the schema, from 1. It is stored with each row that is written; rows of a
                later version cannot be read here (`newer_schema`).
            migrate: `migrate(fields, version)` makes of a row that an earlier version wrote one of
                this version. It gets what is stored, under the names it is stored under (those of
                JSON: aliases, where the type has them, for the type itself may be gone) with
                values as in JSON, and returns a row as `insert` takes it, under the same key.
                It runs whenever such a row is read, in whichever process reads it, so it is a
                plain function that gives the same for the same row; what is stored changes when
                the row is next updated. Queries see migrated rows, and so the store cannot look
                for fields: it sends every row of the collection. Without `migrate`, rows of all
                versions are taken to look alike.
            retention_ms: Rows are removed when their last write is that long ago; see `retain`,
                which also ends it. It is declared in the background, once, and holds for all.

        Raises:
            ConfigError: `invalid_name`, `invalid_schema`, `invalid_key_field`, `invalid_version`,
                `invalid_migrate`, `invalid_retention`.
        """

        def make() -> Collection[Any]:
            _check_place(name, session)
            return Collection(
                self, name, schema, key=key, session=session, version=version, migrate=migrate
            )

        if retention_ms is not None:
            self._declare_retention(name, session or "", retention_ms)
        loop = _running_loop()
        if loop is None or self.is_closed or not _is_hashable(migrate):
            return make()
        shared = self._collections.get(loop)
        if shared is None:
            for gone in [other for other in self._collections if other.is_closed()]:
                del self._collections[gone]
            shared = self._collections[loop] = SharedCollections()
        return shared.get((name, schema, key, session, version, migrate), make)

    async def retain(
        self, collection: str, retention_ms: int | None, *, session: str | None = "aidb://*"
    ) -> None:
        """Keep rows of a collection for a while only, or for ever with None; durable.

        Rows whose last write is longer ago are removed by the store, a thousand a commit, up to
        about a sixteenth late and never early. Readers hear of them as of other deletions. The
        time is the store's, which it begins to note with the first such policy: rows that are
        older count as written then. A session's own policy comes before those of patterns, and
        longer patterns before shorter ones. It holds until it is changed, whoever runs.

        What is at work is left alone whatever its age: streams that have not ended; of the
        collections that agents rely on, messages that wait, and whatever belongs to a generation
        or call that has not ended; rows that an effect has claimed.

        Args:
            collection: Its name; `chunks` for the streams of sessions.
            retention_ms: At least 1,000.
            session: Which sessions: one, or a pattern ending in `*`, by default all; None for a
                collection of no session.

        Raises:
            ConfigError: `invalid_name`, `invalid_retention`.
        """
        _check_retention(collection, session, retention_ms)
        policy = (collection, session or "")
        for site in self.sites_of(session or ""):
            await site.client.commit([Retain(*policy, retention_ms or 0)])
            site.retained.pop(policy, None)

    def _declare_retention(self, collection: str, session: str, retention_ms: int) -> None:
        _check_retention(collection, session or None, retention_ms)
        if _running_loop() is None:
            raise ConfigError(
                "retention_ms is sent to the store, which needs a running event loop.",
                code="invalid_retention",
            )
        for site in self.sites_of(session):
            if site.retained.get((collection, session)) != retention_ms:
                site.retained[collection, session] = retention_ms
                site.spawn(_declare(site, collection, session, retention_ms))

    @overload
    async def query(self, fn: Callable[[QueryRoot], SingleQuery[R]]) -> R | None: ...
    @overload
    async def query(self, fn: Callable[[QueryRoot], Query[R]]) -> list[R]: ...
    async def query(self, fn: Callable[[QueryRoot], Query[Any]]) -> Any:
        """Run a query once: a list of rows, or one row or None for `find_one`."""
        from aidb_ray.query.live import run_query

        return await run_query(self, fn)

    def live_query(self, fn: Callable[[QueryRoot], Query[R]]) -> LiveQuery[R]:
        """Return a query whose answer is kept current; `await live.ready()` before reading."""
        from aidb_ray.query.live import LiveQuery

        return LiveQuery(self, fn)

    def agent(self, name: str) -> Agent:
        """Return the handle of a running agent; using it fails if there is none."""
        from aidb_ray.agents.agent import attach_agent

        return self._agents.get(name) or attach_agent(self, name)

    def find_agent(self, name: str) -> Agent | None:
        """Return the handle that this connection has of an agent, if it has one."""
        return self._agents.get(name) or self._attached_agents.get(name)

    @asynccontextmanager
    async def transaction(self, session: Session | str) -> AsyncGenerator[Transaction]:
        """Collect the writes made inside and commit them together at the end.

        An exception inside writes nothing. Only writes to `session` can take part. Awaiting a
        write inside is an error, for it is durable only afterwards.
        """
        url = session.url if isinstance(session, Session) else session
        _check_session(url)
        outer = current_group.get()
        if outer is not None and outer.is_open:
            raise ConfigError("Transactions cannot be nested.", code="nested_transaction")
        site = self.site_of(url)
        group = Group(url)
        transaction = Transaction(url, group.intents, site.client, site.writes)
        transaction.is_part = True
        token = current_group.set(group)
        try:
            yield transaction
        finally:
            current_group.reset(token)
            group.is_open = False
            transaction.is_part = False
        if not group.intents:
            transaction.settle(0, None)
            return
        await self._commit_group(site, group, transaction)

    async def _commit_group(self, site: Partition, group: Group, transaction: Transaction) -> None:
        url, writes = group.session, site.writes
        earlier: dict[Transaction, None] = {}
        values: list[Shown] = []
        for intent in group.intents:
            where = (intent.collection, intent.key)
            owner = writes.latest_owner((url, *where))
            if isinstance(owner, Transaction):
                earlier[owner] = None
            values.append(group.shown.get(where, ...))
        transaction.follow(list(earlier), is_of_shown=True)
        transaction.show(values)
        site.spawn(
            transaction.run(lambda patch: writes.durable((url, patch.collection, patch.key), None))
        )
        await transaction

    # How it runs.

    async def status(self) -> list[StoreStatus]:
        """Return how each partition is doing."""
        return [await partition.client.status() for partition in self.partitions]

    async def processes(self) -> list[ProcessInfo]:
        """Return the processes of this database: stores, and the shards of agents used here."""
        found: list[ProcessInfo] = []
        for index, partition in enumerate(self.partitions):
            name = f"p{index}"
            try:
                status = await partition.ref.with_timeout(2_000).ask(StoreActor.status)
            except UnavailableError:
                found.append(ProcessInfo("store", name, 0, 0, serving=False))
            else:
                serving = status.state == "serving"
                found.append(ProcessInfo("store", name, status.pid, 0, serving))
        for agent in self._agents.values():
            found += await agent.processes()
        return found

    def keep_agent(self, agent: Agent) -> None:
        """Remember an agent that was created or attached here."""
        self._agents[agent.name] = agent

    def share_agent(self, agent: Agent) -> None:
        """Give the same handle to all who ask for this agent while somebody holds it."""
        self._attached_agents[agent.name] = agent

    def forget_agent(self, agent: Agent) -> None:
        """Forget an agent that was ended."""
        if self._agents.get(agent.name) is agent:
            del self._agents[agent.name]

    def keep_effect(self, effect: Closable) -> None:
        """Remember an effect that was created here, to end it with the connection."""
        self._effects.append(effect)

    def forget_effect(self, effect: Closable) -> None:
        """Forget an effect that was ended."""
        if effect in self._effects:
            self._effects.remove(effect)

    async def aclose(self) -> None:
        """Wait for outstanding writes and disconnect; the last connection ends what it can.

        That is everything on `"local"` and on a cluster that was started here; agents of this
        connection go on there while another one of this process is open. Agents end first, for
        they write; stores last. What fails on the way does not keep the rest from closing.
        """
        if self.is_closed:
            return
        self.is_closed = True
        for stack in _open.values():
            if self in stack:
                stack.remove(self)
        loop = asyncio.get_running_loop()
        partitions = self._partitions.get(loop, [])
        async with AsyncExitStack() as closing:
            # The last one pushed is the first to close.
            closing.callback(self._partitions.pop, loop, None)
            closing.callback(self._collections.pop, loop, None)
            if self.cluster is not None:
                closing.push_async_callback(self.cluster.close)
            if self.is_local:
                closing.push_async_callback(self._stop_stores)
            elif self._holders is not None:
                closing.push_async_callback(self._leave, self._holders)
            for partition in partitions:
                closing.push_async_callback(partition.aclose)
            for agent in list(self._agents.values()):
                closing.push_async_callback(self._let_go, agent)
            for effect in list(self._effects):
                closing.push_async_callback(effect.disconnect)

    async def _let_go(self, agent: Agent) -> None:
        """End an agent that was created here, or leave it to whoever may end it later."""
        holders = self._holders
        if self.is_local or (holders is not None and holders.count == 1):
            await agent.aclose()
            return
        if holders is not None:
            holders.leave_running(agent.name, agent.aclose)
        await agent.detach()

    async def _leave(self, holders: Holders) -> None:
        """End the stores, and the agents that were left running, if no other connection is left."""
        holders.leave(self)
        if holders.count:
            return
        async with holders.turn():
            if holders.count:
                return  # Another one has connected meanwhile.
            async with AsyncExitStack() as ending:
                ending.push_async_callback(self._stop_stores)
                for end in holders.take_endings():
                    ending.push_async_callback(end)

    async def shutdown(self) -> None:
        """End the agents and stores of this database, also on an existing cluster; rows stay."""
        await self._stop_agents()
        for partition in self.partitions:
            await partition.drain()
        await self._stop_stores()
        await self.aclose()

    async def _stop_stores(self) -> None:
        await asyncio.gather(*(ref.with_timeout(30_000).stop() for ref in self._refs))

    async def _stop_agents(self) -> None:
        for agent in list(self._agents.values()):
            await agent.aclose()


class Session:
    """A conversation: its messages, generations, tool calls, chunks and whatever else it holds."""

    def __init__(self, database: Database, url: str) -> None:
        self.database = database
        self.url = url

    def __repr__(self) -> str:
        return f"<Session {self.url}>"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Session) and other.url == self.url and other.database is self.database
        )

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def messages(self) -> Collection[AgentMessage]:
        """What was said."""
        return self.collection("messages", AgentMessage)

    @property
    def generations(self) -> Collection[Generation]:
        """Runs of models."""
        return self.collection("generations", Generation)

    @property
    def tool_calls(self) -> Collection[ToolCall]:
        """Requests of models to run tools."""
        return self.collection("tool_calls", ToolCall)

    @property
    def cancel_requests(self) -> Collection[CancelRequest]:
        """Requests to stop what agents do here."""
        return self.collection("cancel_requests", CancelRequest)

    @property
    def questions(self) -> Collection[Question]:
        """What running work asks people and programs."""
        return self.collection("questions", Question)

    @property
    def steps(self) -> Collection[Step]:
        """Results of named steps of running work."""
        return self.collection("steps", Step)

    @property
    def chunks(self) -> ChunkCollection:
        """What models streamed."""
        from aidb_ray.chunks import ChunkCollection

        return ChunkCollection(self.database, self.url)

    @overload
    def collection(
        self,
        name: str,
        schema: None = None,
        *,
        key: str = ...,
        version: int = ...,
        migrate: Migrate | None = ...,
        retention_ms: int | None = ...,
    ) -> Collection[dict[str, Any]]: ...
    @overload
    def collection(
        self,
        name: str,
        schema: type[R],
        *,
        key: str = ...,
        version: int = ...,
        migrate: Migrate | None = ...,
        retention_ms: int | None = ...,
    ) -> Collection[R]: ...
    def collection(
        self,
        name: str,
        schema: type[Any] | None = None,
        *,
        key: str = "id",
        version: int = 1,
        migrate: Migrate | None = None,
        retention_ms: int | None = None,
    ) -> Collection[Any]:
        """Return a collection of this session. See `Database.collection`."""
        return self.database.collection(
            name,
            schema,
            key=key,
            session=self.url,
            version=version,
            migrate=migrate,
            retention_ms=retention_ms,
        )

    async def fork(self, at: int | None = None, to: str | None = None) -> Session:
        """Begin a session with the rows of this one, durably, in one commit; return it.

        What was under way is not taken along, so that nothing happens twice: generations that
        had not ended are cancelled there (error `forked`), as are tool calls, and open questions
        are left out. Messages without an answer wait for one, and an agent that serves the new
        session answers them anew. Claims are left out. Rows of other collections are as they were.
        Streams of chunks are shared, not copied; those that had not ended are cancelled. Rows that
        their retention has removed since come back.

        Args:
            at: As of which revision; None for now, own writes made before included.
            to: The new session's url, in which nothing is stored yet; None for one below this
                session's.

        Raises:
            ConflictError: `revision_in_future`: `at` is to come.
            CompactedError: what the session was `at` that revision is not known any more, or it
                was deleted since; of a database in memory only what is now is known.
            KeyExistsError: `session_exists`: `to` holds rows.
            ContractError: `invalid_cursor`: `at` is no revision. `session_too_large`: the rows have
                over 128 MiB.
            ConfigError: `invalid_name`: `to` cannot name a session. `spans_partitions`: it would
                lie in another partition.
        """
        self._check_one("forked")
        _check_revision(at)
        await self.database.connected()
        site = self.database.site_of(self.url)
        url = self._url_below() if to is None else to
        forked = Session(self.database, url)
        forked._check_one("begun")
        if self.database.site_of(url) is not site:
            raise ConfigError(
                f"{url!r} lies in another partition than {self.url!r}, whose chunks it would "
                f"share. Leave `to` out, or choose another one.",
                code="spans_partitions",
            )
        await site.drain()
        revision = await site.client.commit([Fork(url, self.url, -1 if at is None else at)])
        with suppress(CompactedError):
            await site.client.feed.reached(revision)
        return forked

    def _url_below(self) -> str:
        """Return the url of a new session in the same partition."""
        here = self.database.site_of(self.url)
        while True:
            url = f"{self.url}/{new_id()}"
            # One of as many as there are partitions, on average.
            if self.database.site_of(url) is here:
                return url

    def _check_one(self, verb: str) -> None:
        _check_session(self.url)
        if self.url.endswith("*"):
            raise ConfigError(
                f"{self.url!r} stands for many sessions, which cannot be {verb} at once.",
                code="session_required",
            )

    async def delete(self) -> None:
        """Remove every row, chunk stream and claim of the session, durably, in one commit.

        Readers hear of each row that it goes; followed streams end with `KeyMissingError`
        (`gone`). An agent or effect at work in it is refused at its next commit and stops; nothing
        of what it had under way comes back. Writes that this process has made to the session are
        waited for first. Deleting a session that holds nothing is no error, and one that is
        written to afterwards begins anew. Other sessions that share chunks with it keep them.

        Its bytes leave the disk later: those of rows when two more snapshots have been taken,
        those of chunks with the next compaction of their file.

        Raises:
            ConfigError: `in_transaction`: a transaction of the session is open here.
            UnavailableError: the store does not answer; sending it again does no harm.
        """
        self._check_one("deleted")
        group = current_group.get()
        if group is not None and group.is_open and group.session == self.url:
            raise ConfigError(
                "A session is deleted in a commit of its own, not in a transaction.",
                code="in_transaction",
            )
        await self.database.connected()
        site = self.database.site_of(self.url)
        await site.drain()
        revision = await site.client.commit([DeleteSession(self.url)])
        site.writes.delete_session(self.url, revision)
        with suppress(CompactedError):
            # A reader that begins anew sees it, too.
            await site.client.feed.reached(revision)


class _Connecting(Coroutine[Any, Any, "Database"]):
    """What `connect` returns: await it, or enter it. A task may be made of it, too."""

    def __init__(self, opening: Coroutine[Any, Any, Database]) -> None:
        # Made already, so that it warns as coroutines do if nobody ever awaits it.
        self._opening = opening
        self._database: Database | None = None

    def __await__(self) -> Generator[Any, None, Database]:
        return self._opening.__await__()

    def send(self, value: Any, /) -> Any:
        """See `Coroutine`."""
        return self._opening.send(value)

    def throw(self, *error: Any) -> Any:
        """See `Coroutine`."""
        return self._opening.throw(*error)

    def close(self) -> None:
        """See `Coroutine`."""
        self._opening.close()

    async def __aenter__(self) -> Database:
        self._database = await self._opening
        return self._database

    async def __aexit__(self, *_: object) -> None:
        assert self._database is not None
        await self._database.aclose()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Say what is missing, where a `Database` is taken for granted."""
            raise AttributeError(
                f"connect(...) has no {name!r} before it is awaited: write `db = await "
                f"connect(...)` or `async with connect(...) as db`.",
                name=name,
                obj=self,
            )


def connect(
    address: str | None = None,
    *,
    data_dir: str | os.PathLike[str] = ".aidb",
    database: str = "default",
    partitions: int = 1,
    replicas: int = 1,
    durability: Literal["local", "memory"] = "local",
    store_options: dict[str, Any] | None = None,
) -> _Connecting:
    """Connect to a database, creating it if it does not exist: `await` it or `async with` it.

    Args:
        address: None: the Ray cluster of this process or of RAY_ADDRESS, else one started here.
            `"local"`: in this process, no Ray, same log format, one connection at a time. `"auto"`,
            `"host:port"`: an existing cluster, whose stores and agents outlive this process.
        data_dir: Where the log lies. Relative only for a cluster started here or `"local"`.
        database: Its name, which is that of its directory in `data_dir`, too.
        partitions: Fixed when the database is created.
        replicas: 1.
        durability: `"local"`: durable on this node's disk. `"memory"`: lost with the process.
        store_options: Overrides for `StoreOptions`, such as `snapshot_bytes`.

    Raises:
        ConfigError: an argument cannot be; `partitions` differs from what the database has.
        StoreMismatchError: the directory is missing on an existing cluster, or foreign.
        StoreLockedError: another process still has the directory after 20 s, or a `"local"`
            connection of this process has it.
    """
    if not is_valid_name(database) or "/" in database:
        raise ConfigError(f"{database!r} cannot name a database.", code="invalid_name")
    if not 1 <= partitions <= 4096:
        raise ConfigError("A database has 1 to 4096 partitions.", code="invalid_partitions")
    if replicas != 1:
        raise ConfigError("Only replicas=1 is available.", code="invalid_replicas")
    if durability not in ("local", "memory"):
        raise ConfigError(
            f"durability is 'local' or 'memory', not {durability!r}.", code="invalid_durability"
        )
    plan = _Plan(
        address, Path(data_dir), database, partitions, durability, dict(store_options or {})
    )
    opening = _connect(plan)
    opening.__qualname__ = "connect(...)"  # Of which the warning speaks.
    return _Connecting(opening)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What `connect` was asked for."""

    address: str | None
    data_dir: Path
    database: str
    partitions: int
    durability: Literal["local", "memory"]
    options: dict[str, Any]

    @property
    def home(self) -> Path:
        """The database's own directory."""
        return self.data_dir.absolute() / self.database


async def _connect(plan: _Plan) -> Database:
    if plan.address == "local":
        with _opening_here(plan):
            return _keep_open(await _open_here(plan))
    cluster = await connect_cluster(plan.address)
    try:
        database = await _open_database(plan, cluster)
    except BaseException:
        await cluster.close()
        raise
    return _keep_open(database)


def _keep_open(database: Database) -> Database:
    for loop in [loop for loop in _open if loop.is_closed()]:
        # A directory stays open in this process; all else nobody can use who does not hold it.
        _open[loop] = [each for each in _open[loop] if each.is_local]
    _open.setdefault(asyncio.get_running_loop(), []).append(database)
    return database


async def _open_here(plan: _Plan) -> Database:
    refs = await _start_stores(plan, plan.home, None, is_private=True)
    return Database(
        plan.database, refs, data_dir=str(plan.home), cluster=None, durability=plan.durability
    )


async def _open_database(plan: _Plan, cluster: Cluster) -> Database:
    home = plan.home
    holders = holders_of(plan.database) if cluster.owned else None
    async with nullcontext() if holders is None else holders.turn():
        refs = await _find_running(plan, home)
        if not refs:
            if holders is None:
                _check_shared_directory(plan)
            refs = await _start_stores(plan, home, cluster, is_private=holders is not None)
        database = Database(
            plan.database,
            refs,
            data_dir=str(home),
            cluster=cluster,
            durability=plan.durability,
            holders=holders,
        )
        if holders is not None:
            holders.join(database)
    return database


_opening_guard = threading.Lock()
_opening: set[Path] = set()
"""Directories that `"local"` connections of this process are about to open."""


@contextmanager
def _opening_here(plan: _Plan) -> Generator[None]:
    """Be the only one of this process to open a directory; else it would wait for its own lock."""
    if plan.durability != "local":
        yield
        return
    home = plan.home.resolve()
    with _opening_guard:
        if home in _opening or _is_open_here(home):
            raise StoreLockedError(
                f"{str(plan.home)!r} is open in this process already. Use that connection, or "
                f"close it first.",
                pid=os.getpid(),
                host=socket.gethostname(),
            )
        _opening.add(home)
    try:
        yield
    finally:
        with _opening_guard:
            _opening.discard(home)


def _is_open_here(home: Path) -> bool:
    return any(
        other.is_local and other.durability == "local" and Path(other.data_dir).resolve() == home
        for stack in list(_open.values())
        for other in stack
    )


def _check_shared_directory(plan: _Plan) -> None:
    if plan.durability != "local":
        return
    if not plan.data_dir.is_absolute():
        raise ConfigError(
            f"On an existing cluster data_dir must be absolute, not {str(plan.data_dir)!r}: "
            f"its processes have other working directories.",
            code="relative_data_dir",
        )
    if not plan.data_dir.is_dir():
        raise StoreMismatchError(
            f"{plan.data_dir} does not exist on this node. Create it on the node that shall hold "
            f"the data, and connect from there.",
            code="store_missing",
        )


async def _find_running(plan: _Plan, home: Path) -> list[ActorRef[StoreActor]]:
    """Return the stores of the database that run on the cluster, none if it has none."""
    first = await find(StoreActor, _store_name(plan.database, 0))
    if first is None:
        return []
    _check_store(plan, home, await first.with_timeout(OPEN_TIMEOUT_MS).ask(StoreActor.open))
    refs: list[ActorRef[StoreActor]] = [first]
    deadline = time.monotonic() + FIND_TIMEOUT_MS / 1000
    while len(refs) < plan.partitions:
        another = await find(StoreActor, _store_name(plan.database, len(refs)))
        if another is not None:
            refs.append(another)
        elif time.monotonic() > deadline:
            raise UnavailableError(
                f"Partition {len(refs)} of database {plan.database!r} is not running.",
                outcome="not_applied",
            )
        else:
            # Whoever starts the database starts its partitions one after the other.
            await asyncio.sleep(0.1)
    await _open_all(refs[1:])
    return refs


def _check_store(plan: _Plan, home: Path, status: StoreStatus) -> None:
    """Raise unless a store that runs already is one of the database that is asked for."""
    _check_partitions(plan, status.partitions)
    if status.durability != plan.durability:
        raise ConfigError(
            f"Database {plan.database!r} runs with durability {status.durability!r}, not "
            f"{plan.durability!r}.",
            code="durability_differs",
        )
    expected = home / f"p{status.partition}"
    if plan.durability == "local" and Path(status.directory) != expected:
        raise StoreMismatchError(
            f"Database {plan.database!r} of this cluster is in {status.directory!r}, not in "
            f"{str(expected)!r}. Name its data_dir, or another database."
        )


async def _start_stores(
    plan: _Plan, home: Path, cluster: Cluster | None, *, is_private: bool
) -> list[ActorRef[StoreActor]]:
    options = await asyncio.to_thread(_store_options, plan, home, in_process=cluster is None)
    refs: list[ActorRef[StoreActor]] = []
    try:
        for option in options:
            refs.append(await _start_store(option, cluster, is_private=is_private))  # noqa: PERF401
        # Another driver may have been faster to start them, and want another database.
        for status in await _open_all(refs):
            _check_store(plan, home, status)
    except BaseException:
        # A store that cannot be opened would answer later drivers under its name.
        await asyncio.gather(*(_give_up_store(ref, is_private=is_private) for ref in refs))
        raise
    return refs


async def _give_up_store(ref: ActorRef[StoreActor], *, is_private: bool) -> None:
    """End a store, unless other drivers may have it: one that serves, or is being opened."""
    ref = ref.pinned().with_timeout(5_000)
    if not is_private:
        try:
            status = await ref.ask(StoreActor.status)
        except UnavailableError:
            return
        if status.state != "recovering" or not status.problem:
            return
    await ref.stop()


async def _open_all(refs: Iterable[ActorRef[StoreActor]]) -> list[StoreStatus]:
    opening = (ref.with_timeout(OPEN_TIMEOUT_MS).ask(StoreActor.open) for ref in refs)
    return await asyncio.gather(*opening)


def _store_options(plan: _Plan, home: Path, *, in_process: bool) -> list[StoreOptions]:
    if plan.durability == "memory":
        uuid = str(uuid4())
        directories = [""] * plan.partitions
    else:
        uuid = _create_or_identify(plan, home)
        directories = [str(home / f"p{index}") for index in range(plan.partitions)]
    return [
        StoreOptions(
            database=plan.database,
            partition=index,
            durability=plan.durability,
            directory=directory,
            store_uuid=uuid,
            partitions=plan.partitions,
            in_process=in_process,
            **plan.options,
        )
        for index, directory in enumerate(directories)
    ]


def _create_or_identify(plan: _Plan, home: Path) -> str:
    """Return the store's uuid, creating its directories if there are none yet."""
    from aidb_ray.store.directory import StoreDirectory, storage_error
    from aidb_ray.store.files import FileSystem

    files = FileSystem()
    try:
        for path in (plan.data_dir, home):
            if path.is_symlink():
                raise ConfigError(
                    f"The data directory {str(path)!r} is a link. Name the directory itself.",
                    code="data_dir_refused",
                )
        if not home.exists():
            _create_home(plan, home, files)
        meta = StoreDirectory(home / "p0", files).read_meta()
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"The data directory {str(home)!r} cannot be used: {error.strerror}.",
            code="data_dir_refused",
        ) from error
    except OSError as error:
        raise storage_error(error, "opening", home) from error
    _check_partitions(plan, meta.partitions)
    return meta.store_uuid


def _create_home(plan: _Plan, home: Path, files: FileSystem) -> None:
    from aidb_ray.store.log import create_store

    home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made under another name and renamed, so that it is there whole or not at all.
    uuid = str(uuid4())
    draft = home.with_name(f".{home.name}.{uuid}.draft")
    draft.mkdir(mode=0o700)
    try:
        for index in range(plan.partitions):
            create_store(
                draft / f"p{index}",
                files,
                store_uuid=uuid,
                database=plan.database,
                partition=index,
                partitions=plan.partitions,
            )
        files.rename(draft, home)
    except (OSError, StorageError):
        shutil.rmtree(draft, ignore_errors=True)
        # Someone else may have made it at the same time.
        if not home.exists():
            raise
    files.sync_directory(home.parent)


def _check_partitions(plan: _Plan, partitions: int) -> None:
    if partitions != plan.partitions:
        raise ConfigError(
            f"Database {plan.database!r} has {partitions} partitions, not {plan.partitions}; "
            f"the number is fixed when a database is created.",
            code="partitions_differ",
        )


async def _start_store(
    options: StoreOptions, cluster: Cluster | None, *, is_private: bool
) -> ActorRef[StoreActor]:
    if cluster is None:
        return LocalRef(StoreActor(options, die=_stay))
    actor_options = ActorOptions(
        name=_store_name(options.database, options.partition),
        detached=not is_private,
        node_id=cluster.node_id,
    )
    return await spawn(StoreActor, actor_options, options)


def _stay() -> None:
    # In the user's own process a store that failed answers so; it must not end the program.
    logger.critical("the store in this process has failed; connect again to recover")


def _store_name(database: str, partition: int) -> str:
    return f"aidb/{database}/p{partition}"


def _is_hashable(value: object) -> bool:
    # To a type checker every callable is; an instance of a dataclass is not.
    return isinstance(value, Hashable)


def _check_place(name: str, session: str | None) -> None:
    if not is_valid_name(name):
        raise ConfigError(
            f"{name!r} cannot name a collection: 1 to 512 of A-Z a-z 0-9 . _ ~ : / - without "
            f"'..' are allowed.",
            code="invalid_name",
        )
    if session is not None:
        _check_session(session)


async def _declare(site: Partition, collection: str, session: str, retention_ms: int) -> None:
    try:
        await site.client.commit([Retain(collection, session, retention_ms)])
    except AidbError as error:
        # Who asks for the collection again tries again.
        site.retained.pop((collection, session), None)
        logger.error(  # noqa: TRY400
            "rows of %r in %r are kept for ever: their retention could not be declared: %s",
            collection,
            session,
            error,
        )


def _check_retention(collection: str, session: str | None, retention_ms: object) -> None:
    _check_place(collection, session)
    if collection.startswith("~"):
        raise ConfigError(f"{collection!r} is the store's own.", code="invalid_name")
    if retention_ms is None:
        return
    if not isinstance(retention_ms, int) or retention_ms < LEAST_KEPT_MS:
        raise ConfigError(
            f"Rows are kept for a whole number of milliseconds, {LEAST_KEPT_MS} or more, or for "
            f"ever, which is None; not for {retention_ms!r}.",
            code="invalid_retention",
        )


def _check_revision(at: object) -> None:
    if at is not None and (not isinstance(at, int) or isinstance(at, bool) or at < 0):
        raise ContractError(
            f"A revision is a whole number from 0, not {at!r}.",
            code="invalid_cursor",
            loc=("at",),
        )


def _check_session(url: str) -> None:
    if not url.startswith("aidb://") or not is_valid_name(url.removesuffix("*")):
        raise ConfigError(
            f"{url!r} cannot name a session; it looks like 'aidb://support/42'.",
            code="invalid_name",
        )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _closed(name: str) -> ConfigError:
    return ConfigError(
        f"The connection to database {name!r} was closed; connect again.", code="not_connected"
    )


_attached: dict[tuple[str, str], Database] = {}


def _reattach(
    name: str, refs: list[ActorRef[StoreActor]], data_dir: str, durability: str
) -> Database:
    # One connection per process, whatever number of handles arrive.
    for stack in _open.values():
        for database in stack:
            if (database.name, database.data_dir) == (name, data_dir) and not database.is_local:
                return database
    where = (name, data_dir)
    found = _attached.get(where)
    if found is None or found.is_closed:
        found = _attached[where] = Database(
            name, refs, data_dir=data_dir, cluster=None, durability=durability
        )
    return found
