"""The commits of one run: rows and the chunks so far, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aidb_ray.agents.rows import GenerationRow, MessageRow, ToolCallRow, encode_row
from aidb_ray.chunks import ChunkBuffer, Ending
from aidb_ray.store.changes import Append, Insert, Mutation, Need, Update
from aidb_ray.store.columns import EMPTY

if TYPE_CHECKING:
    from aidb_ray.agents.assignment import Shard
    from aidb_ray.agents.session import SessionState
    from aidb_ray.store.changes import ChunkColumns


class Commits:
    """Writes for one generation, fenced by the shard's epoch; refused once its row is gone.

    Attributes:
        generation: The row as it is written, or on its way.
        buffer: Chunks that are not written yet.
    """

    generation: GenerationRow
    buffer: ChunkBuffer

    def __init__(self, shard: Shard, session: str, state: SessionState) -> None:
        self._shard = shard
        self._session = session
        self._state = state
        self._sent: asyncio.Future[int] | None = None
        self._unsent: tuple[Append, ChunkColumns] | None = None

    def insert(self, collection: str, key: str, row: Any) -> Insert:
        """Return the mutation that adds a row."""
        return Insert(self._session, collection, key, encode_row(row))

    def update(
        self, collection: str, row: GenerationRow | ToolCallRow | MessageRow, base: int = 0
    ) -> Update:
        """Return the mutation that replaces a row.

        Without a `base` whatever revision is there will do: only this runner writes generations,
        and calls that run here, while it holds the session.
        """
        return Update(self._session, collection, row.id, encode_row(row), base)

    async def write(
        self,
        mutations: Sequence[Mutation],
        know: Callable[[int], None],
        *,
        ending: Ending | None = None,
        takes_chunks: bool = False,
        needs: tuple[Need, ...] | None = None,
    ) -> None:
        """Make a commit; once it is durable, `know` takes it into what this process knows.

        Whoever is cancelled waits for the outcome: the store knows of it, so must the state.

        Args:
            mutations: What to write.
            know: Hears the revision.
            ending: Closes the generation's stream of chunks.
            takes_chunks: Whether the chunks so far go with it.
            needs: See `send`.
        """
        taken = self._take(ending) if takes_chunks else None
        if taken is None:
            sent = self.send(mutations, needs=needs)
        else:
            sent = self.send([taken[0], *mutations], taken[1], needs=needs)
        try:
            revision = await asyncio.shield(sent)
        except asyncio.CancelledError:
            await asyncio.wait([sent])
            if sent.exception() is None:
                self._forget(taken)
                know(sent.result())
            raise
        self._forget(taken)
        know(revision)

    def send(
        self,
        mutations: Sequence[Mutation],
        columns: ChunkColumns = EMPTY,
        *,
        needs: tuple[Need, ...] | None = None,
    ) -> asyncio.Future[int]:
        """Send a commit. Commits of one process keep their order.

        It `needs` rows to be there, by default that of the generation: rows of a session that was
        deleted meanwhile must not come back.
        """
        if needs is None:
            needs = (Need(self._session, "generations", self.generation.id),)
        shard = self._shard
        sent = shard.client.commit(mutations, chunks=columns, runner=shard.runner, needs=needs)
        # Whoever waits for it may be cancelled; what follows a refused one is refused as well.
        sent.add_done_callback(lambda sent: sent.cancelled() or sent.exception())
        self._sent = sent
        return sent

    async def settled(self) -> None:
        """Wait until all that was sent has its outcome."""
        sent = [self._sent, self._shard.flusher.sent(self.buffer)]
        waiting = [each for each in sent if each is not None and not each.done()]
        if waiting:
            await asyncio.wait(waiting)

    def keep(self, generation: GenerationRow) -> None:
        """Know the generation as it is now."""
        self.generation = generation
        self._state.put_generation(generation)

    def _forget(self, taken: tuple[Append, ChunkColumns] | None) -> None:
        if taken is not None:
            self._unsent = None

    def _take(self, ending: Ending | None) -> tuple[Append, ChunkColumns] | None:
        """Return the chunks for the next commit; those of one that was refused come again."""
        if self._unsent is None:
            self._unsent = self.buffer.take(ending)
        elif ending is not None:
            append, columns = self._unsent
            self._unsent = msgspec.structs.replace(append, closes=ending), columns
        return self._unsent
