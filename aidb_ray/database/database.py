"""A connected database: its sessions, collections and queries, and what runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload
from weakref import WeakValueDictionary

from aidb_ray.database.checks import check_place, check_retention, check_session
from aidb_ray.database.connections import forget_connection, open_connections
from aidb_ray.database.partition import Partition
from aidb_ray.database.session import Session
from aidb_ray.errors import ConfigError, UnavailableError
from aidb_ray.expressions import Migrate
from aidb_ray.runtime import ActorRef, Cluster, LocalRef
from aidb_ray.store.actor import StoreActor, StoreStatus
from aidb_ray.store.changes import Retain, bucket_of
from aidb_ray.store.collection import Collection, Group, Shown, current_group
from aidb_ray.store.holders import Holders
from aidb_ray.store.shared import SharedCollections
from aidb_ray.store.transaction import Transaction

if TYPE_CHECKING:
    from aidb_ray.agents.agent import Agent
    from aidb_ray.query.builder import Query, QueryRoot, SingleQuery
    from aidb_ray.query.live import LiveQuery

R = TypeVar("R")


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
        # Executors that run in this process, by effect: the definition's fingerprint, and they.
        self.local_effects: dict[str, tuple[str, list[Any]]] = {}

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
        check_session(url)
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
            check_place(name, session)
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
        check_retention(collection, session, retention_ms)
        policy = (collection, session or "")
        for site in self.sites_of(session or ""):
            await site.client.commit([Retain(*policy, retention_ms or 0)])
            site.retained.pop(policy, None)

    def _declare_retention(self, collection: str, session: str, retention_ms: int) -> None:
        check_retention(collection, session or None, retention_ms)
        if _running_loop() is None:
            raise ConfigError(
                "retention_ms is sent to the store, which needs a running event loop.",
                code="invalid_retention",
            )
        for site in self.sites_of(session):
            site.declare_retention(collection, session, retention_ms)

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
        check_session(url)
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
        forget_connection(self)
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


def _is_hashable(value: object) -> bool:
    # To a type checker every callable is; an instance of a dataclass is not.
    return isinstance(value, Hashable)


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
    for database in open_connections():
        if (database.name, database.data_dir) == (name, data_dir) and not database.is_local:
            return database
    where = (name, data_dir)
    found = _attached.get(where)
    if found is None or found.is_closed:
        found = _attached[where] = Database(
            name, refs, data_dir=data_dir, cluster=None, durability=durability
        )
    return found
