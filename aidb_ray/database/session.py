"""Sessions: conversations and what belongs to them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar, overload

from aidb_ray.contracts import (
    AgentMessage,
    CancelRequest,
    Generation,
    Question,
    Step,
    ToolCall,
    new_id,
)
from aidb_ray.database.checks import check_revision, check_session
from aidb_ray.errors import CompactedError, ConfigError
from aidb_ray.expressions import Migrate
from aidb_ray.store.changes import DeleteSession, Fork
from aidb_ray.store.collection import Collection, current_group

if TYPE_CHECKING:
    from aidb_ray.chunks import ChunkCollection
    from aidb_ray.database.database import Database

R = TypeVar("R")


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
        their retention has removed since come back; streams that it has removed do not, for their
        bytes are gone.

        Args:
            at: As of which revision; None for now, own writes made before included.
            to: The new session's url, in which nothing is stored yet; None for one below this
                session's.

        Raises:
            ConflictError: `revision_in_future`: `at` is to come.
            CompactedError: what the session was `at` that revision is not known any more, or it
                was deleted since; of a database in memory only what is now is known.
            KeyExistsError: `session_exists`: `to` holds rows.
            CorruptionError: what the log has of that revision is damaged; nothing was begun.
            ContractError: `invalid_cursor`: `at` is no revision. `session_too_large`: the rows have
                over 128 MiB.
            ConfigError: `invalid_name`: `to` cannot name a session. `spans_partitions`: it would
                lie in another partition.
        """
        self._check_one("forked")
        check_revision(at)
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
        if at is not None:
            await site.client.recall(self.url, at)
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
        check_session(self.url)
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
