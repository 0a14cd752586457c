"""What may be asked of a store and what comes of it, as values. No I/O, no clock, no Ray.

Everything here crosses processes as MessagePack arrays: position is meaning, so fields are only
ever added at the end.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Literal, TypeAlias, cast

import msgspec

from aidb_ray.errors import (
    AidbError,
    CompactedError,
    ConflictError,
    ContractError,
    FencedError,
    KeyExistsError,
    KeyMissingError,
    UnavailableError,
)
from aidb_ray.store.versions import unstamp

BUCKETS = 4096
MAX_BATCH_COMMITS = 4_096
MAX_BATCH_BYTES = 1 << 20
MAX_ROW_BYTES = 2 << 20
MAX_COMMIT_BYTES = 32 << 20
MAX_FORK_BYTES = 128 << 20
CHUNKS = "chunks"
"""Collection whose rows are chunks: they live in chunk batches, not among the rows."""


def bucket_of(session: str) -> int:
    """Return the bucket of a session, 0 to 4095, the same in every process and for ever."""
    return int.from_bytes(blake2b(session.encode(), digest_size=8).digest(), "big") % BUCKETS


class Insert(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Add a row; refused if the key is present.

    `value` is the row as compact JSON with wire names: no spaces between tokens, and no escapes
    where none are needed, so that a reader may look for a field's bytes before it decodes.
    """

    session: str
    collection: str
    key: str
    value: bytes


class Update(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """Replace the row that revision `base` wrote; refused if another revision wrote it since."""

    session: str
    collection: str
    key: str
    value: bytes
    base: int


class Delete(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """Remove the row that revision `base` wrote; 0 removes whatever is there."""

    session: str
    collection: str
    key: str
    base: int = 0


class Append(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """Add chunks to one generation's stream; refused unless `index` is the next one.

    Attributes:
        index: Index of the first chunk.
        start: Where the chunks begin in the batch's chunk columns.
        count: How many there are; 0 only to close a stream.
        types: Names of chunk types, by code minus 200, that are no AG-UI event types.
        closes: How the stream ended (`finished`, `raised`, `cancelled`), `""` if it goes on.
    """

    session: str
    generation_id: str
    attempt: int
    index: int
    start: int
    count: int
    types: tuple[str, ...] = ()
    closes: str = ""


class ClaimBuckets(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """Make the sender the one runner of `agent` for the buckets `low` (incl.) to `high` (excl.).

    The revision of this commit is the epoch; earlier holders are refused from then on.
    """

    agent: str
    low: int
    high: int


class Claim(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Take the sole right to work on a row; refused while another holder has it.

    The revision of this commit is the token of the claim. It lasts until it is released, or until
    the holder's lease ends; claiming extends that lease. Made again under the claim itself it
    only changes the note.

    Attributes:
        effect: Whose work it is: what one holder of an effect leaves, another one takes over.
        holder: Who claims. All claims of a holder share one lease.
        base: Revision that must have written the row, 0 for any.
        attempts: How often the row was claimed before; -1 for any. If that is wrong, so may be
            what the sender knows of those attempts: the refusal has the record.
        note: Kept for whoever takes over.
    """

    session: str
    collection: str
    key: str
    effect: str
    holder: str
    lease_ms: int
    base: int = 0
    attempts: int = -1
    note: str = ""


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Extend the lease of a holder, and with it all its claims.

    Refused if the holder is not known any more: then its claims were taken from it.
    """

    holder: str
    lease_ms: int


class Release(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Give up a claim; refused unless `token` is the current one. Doing it twice does no harm.

    Attributes:
        state: `done`: the work is finished. `free`: it is to be claimed again when its row says
            so. `orphan`: someone else of the same effect shall go on with it.
    """

    session: str
    collection: str
    key: str
    token: int
    state: Literal["done", "free", "orphan"] = "done"


class Disown(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """End the leases of holders now, because their processes have ended; claims become orphans.

    Attributes:
        holder: How the names of those holders begin.
    """

    holder: str


class DeleteSession(msgspec.Struct, frozen=True, array_like=True, tag=10, gc=False):
    """Remove all that a session holds: rows, streams and claims. The only mutation of its commit.

    It never conflicts, and a session that holds nothing may be deleted. One that is written to
    afterwards begins anew.
    """

    session: str


class Retain(msgspec.Struct, frozen=True, array_like=True, tag=11, gc=False):
    """Keep rows for a while only, counted from their last write.

    Attributes:
        collection: `chunks` for streams, which are kept until they have ended in any case.
        session: Exactly this session, or those that a pattern ending in `*` names.
        keep_ms: How long; 0 for ever.
    """

    collection: str
    session: str
    keep_ms: int


class Fork(msgspec.Struct, frozen=True, array_like=True, tag=12, gc=False):
    """Begin a session with the rows of another one. The only mutation of its commit.

    Refused if the new session holds anything, or lies in another partition. What was under way is
    cancelled in the new one, see `forks`; claims are not copied. Chunks are shared.

    Attributes:
        session: The new one.
        source: Whose rows they are.
        at: As of which revision; -1 for now.
    """

    session: str
    source: str
    at: int = -1


Mutation: TypeAlias = (
    Insert
    | Update
    | Delete
    | Append
    | ClaimBuckets
    | Claim
    | Renew
    | Release
    | Disown
    | DeleteSession
    | Retain
    | Fork
)


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A claim under which a commit is made; refused unless `token` is the current one."""

    session: str
    collection: str
    key: str
    token: int


class Runner(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """On whose behalf a commit is made; refused unless it holds every session's bucket."""

    agent: str
    epoch: int


class Need(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row that a commit takes for granted; refused (`gone`) unless it is there.

    Whoever works on rows that may be deleted meanwhile names one, for its commit may bring new
    rows only, which would outlive what they belong to.

    Attributes:
        base: Revision that must have written it, 0 for any.
    """

    session: str
    collection: str
    key: str
    base: int = 0


class Commit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Mutations that become durable and visible together, or not at all."""

    mutations: tuple[Mutation, ...]
    runner: Runner | None = None
    held: Held | None = None
    needs: tuple[Need, ...] = ()


class ChunkColumns(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Chunks as the buffers of two Arrow columns.

    Attributes:
        types: One type code a chunk (uint8).
        ends: End of each payload in `payload` (int32, little endian), without the leading 0.
        payload: The payloads, one after the other, UTF-8.
    """

    types: bytes
    ends: bytes
    payload: bytes


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What a client sends in one call: commits numbered `first_seq`, `first_seq + 1`, ..."""

    client_id: int
    first_seq: int
    commits: list[Commit]
    chunks: ChunkColumns | None = None


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Why a commit was refused. Nothing of it was applied."""

    reason: str
    collection: str = ""
    key: str = ""
    current: bytes | None = None
    revision: int = 0
    expected: int = 0
    got: int = 0

    def to_error(self) -> AidbError:
        """Return the error to raise for the caller."""
        row = f"{self.collection}[{self.key!r}]"
        match self.reason:
            case "exists":
                return KeyExistsError(
                    f"{row} exists already. Update it, or insert under another key.",
                    collection=self.collection,
                    key=self.key,
                )
            case "missing":
                return KeyMissingError(
                    f"{row} does not exist. Insert it first.",
                    collection=self.collection,
                    key=self.key,
                )
            case "gone":
                return KeyMissingError(
                    f"{row}, on which this was working, is there no more. Stop.",
                    code="gone",
                    collection=self.collection,
                    key=self.key,
                )
            case "conflict":
                found = None if self.current is None else unstamp(self.current)[1]
                current = None if found is None else msgspec.json.decode(found)
                return ConflictError(
                    f"{row} was changed by revision {self.revision} meanwhile. "
                    f"Look at `current` and decide again.",
                    collection=self.collection,
                    key=self.key,
                    current=cast("dict[str, Any] | None", current),
                    revision=self.revision,
                )
            case "idempotency_mismatch":
                return ConflictError(
                    f"Batch {self.key} was sent before with other content. Nothing was applied.",
                    code="idempotency_mismatch",
                )
            case "fenced":
                return FencedError(
                    resource=self.key, our_epoch=self.got, current_epoch=self.expected
                )
            case "claimed":
                return ConflictError(
                    f"{row} is claimed by someone else, who holds token {self.expected}.",
                    code="claimed",
                    collection=self.collection,
                    key=self.key,
                    revision=self.expected,
                )
            case "claim_changed":
                current = None if self.current is None else msgspec.json.decode(self.current)
                return ConflictError(
                    f"{row} was claimed before. Look at that claim, which is `current`, first.",
                    code="claim_changed",
                    collection=self.collection,
                    key=self.key,
                    current=cast("dict[str, Any] | None", current),
                    revision=self.revision,
                )
            case "stale_claim":
                return FencedError(
                    resource=row,
                    our_epoch=self.got,
                    current_epoch=self.expected,
                    code="stale_claim",
                )
            case "unknown_holder":
                return FencedError(
                    resource=f"claims of {self.key}",
                    our_epoch=0,
                    current_epoch=0,
                    code="unknown_holder",
                )
            case "session_exists":
                return KeyExistsError(
                    f"{self.key} holds rows already; fork into a session that holds none.",
                    code="session_exists",
                    key=self.key,
                )
            case "compacted":
                return CompactedError(
                    f"What {self.key} was at revision {self.got} is not known any more; the oldest "
                    f"that is known is revision {self.expected}.",
                    oldest=self.expected,
                )
            case "revision_in_future":
                return ConflictError(
                    f"Revision {self.got} does not exist yet; the newest is {self.expected}.",
                    code="revision_in_future",
                    revision=self.expected,
                )
            case "session_too_large":
                return ContractError(
                    f"{self.key} has {self.got} bytes of rows; sessions of up to {self.expected} "
                    f"can be forked.",
                    code="session_too_large",
                    key=self.key,
                )
            case "not_alone":
                return ContractError(
                    "What concerns a whole session is the only mutation of its commit.",
                    code="not_alone",
                )
            case "sequence_gap":
                return ConflictError(
                    f"Chunk {self.got} of {self.key!r} came where chunk {self.expected} is next.",
                    code="sequence_gap",
                    collection=CHUNKS,
                    key=self.key,
                    expected=self.expected,
                    got=self.got,
                )
            case "stream_closed":
                return ConflictError(
                    f"The chunk stream of {self.key!r} has ended; start a new generation.",
                    code="stream_closed",
                    collection=CHUNKS,
                    key=self.key,
                )
            case "invalid_index" | "invalid_batch":
                return ContractError(
                    f"The chunks of {self.key!r} do not fit: index {self.got}, or a place outside "
                    f"of the batch that they came with.",
                    code=self.reason,
                    collection=CHUNKS,
                    key=self.key,
                )
            case "too_large":
                return ContractError(
                    f"{row} has {self.got} bytes; {self.expected} are allowed.",
                    code="row_too_large",
                    collection=self.collection,
                    key=self.key,
                )
            case reason:
                return UnavailableError(
                    f"The store refused the commit: {reason}.", outcome="not_applied", code=reason
                )


class Committed(msgspec.Struct, frozen=True, array_like=True):
    """What a store answers to a `Batch`, once it is durable.

    Accepted commits got consecutive revisions from `first_revision` on; `refused` names the
    others by their place in the batch.
    """

    first_revision: int
    epoch: int
    refused: list[tuple[int, Refusal]] = []


class Change(msgspec.Struct, frozen=True, array_like=True):
    """One row after a commit; `value` is None when the row is gone.

    For the collection `chunks`, `key` is the generation's id and `value` an encoded
    `ChunkSlice`. `is_new` says that there was no row before.
    """

    revision: int
    session: str
    collection: str
    key: str
    value: bytes | None
    is_new: bool = False


class ChunkSlice(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive chunks of one generation."""

    generation_id: str
    attempt: int
    index: int
    columns: ChunkColumns
    types: tuple[str, ...] = ()
    closes: str = ""


class Filter(msgspec.Struct, frozen=True, array_like=True):
    """Which rows a reader wants: a collection, perhaps narrowed. A row must meet every part.

    Attributes:
        session: Exactly this session; None for any.
        prefix: Sessions that begin so.
        buckets: Bucket range, low (incl.) to high (excl.).
        where: Wire field and the values it may have. Only strings, integers and booleans.
    """

    collection: str
    session: str | None = None
    prefix: str = ""
    buckets: tuple[int, int] | None = None
    where: tuple[tuple[str, tuple[str | int | bool, ...]], ...] = ()

    def covers(self, session: str, bucket: int) -> bool:
        """Whether rows of this session may pass."""
        if self.session is not None:
            return session == self.session
        if self.prefix and not session.startswith(self.prefix):
            return False
        return self.buckets is None or self.buckets[0] <= bucket < self.buckets[1]

    def accepts(self, fields: dict[str, Any]) -> bool:
        """Whether a row with these fields passes `where`."""
        for name, allowed in self.where:
            value = fields.get(name)
            # To Python 1 is True; to a query it is not.
            is_bool = value is True or value is False
            for one in allowed:
                if value == one and (one is True or one is False) == is_bool:
                    break
            else:
                return False
        return True


class StoredRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row as kept: the revision that wrote it, and its JSON."""

    revision: int
    value: bytes


class FoundRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row as read: where it is, the revision that wrote it, and its JSON."""

    session: str
    key: str
    revision: int
    value: bytes


class ReadRequest(msgspec.Struct, frozen=True, array_like=True):
    """Ask for rows. `after` is the (session, key) that the previous page ended with."""

    filter: Filter
    key: str | None = None
    after: tuple[str, str] | None = None
    max_bytes: int = 4 << 20


class SessionsRead(msgspec.Struct, frozen=True, array_like=True):
    """Ask for all rows of some collections in some sessions."""

    sessions: tuple[tuple[str, tuple[str, ...]], ...]


class SessionRowsRead(msgspec.Struct, frozen=True, array_like=True):
    """All rows asked for of one session, at one revision; by collection, in no order.

    Attributes:
        streams: Of each chunk stream: generation, next index, and how it ended.
    """

    revision: int
    rows: dict[str, list[FoundRow]]
    streams: dict[str, tuple[int, str]]


class RowPage(msgspec.Struct, frozen=True, array_like=True):
    """Rows in order of (session, key).

    Attributes:
        revision: Latest applied revision when reading began.
        more: Whether another page follows.
        latest: Latest applied revision when reading ended.
    """

    revision: int
    rows: list[FoundRow]
    more: bool = False
    latest: int = 0


class PollRequest(msgspec.Struct, frozen=True, array_like=True):
    """Ask for the changes after revision `after`; waits up to `wait_ms` for the first.

    Attributes:
        feed_id: Names the reader's feed, so that `release_poll` finds a waiting poll.
        generation: The store generation that the reader's cursor belongs to.
        number: Counts the polls of a feed, for calls may overtake each other: a release that
            names this poll counts even if it arrives first.
    """

    feed_id: str
    generation: str
    after: int
    filters: tuple[Filter, ...]
    wait_ms: int = 0
    number: int = 0


class Changes(msgspec.Struct, frozen=True, array_like=True):
    """Every change that a reader asked for in the revisions `after` + 1 to `through`.

    Attributes:
        lost: Oldest revision that can still be told, when `after` is older: start anew.
        retry_after_ms: Above 0 when the store holds too many polls: ask again that much later.
    """

    generation: str
    through: int
    latest: int
    changes: list[Change] = []
    lost: int = 0
    retry_after_ms: int = 0


class ChunkRead(msgspec.Struct, frozen=True, array_like=True):
    """Ask for a generation's stored chunks from `index` on."""

    session: str
    generation_id: str
    index: int = 0
    max_bytes: int = 4 << 20


class ChunkPage(msgspec.Struct, frozen=True, array_like=True):
    """Stored slices of one generation, in order; `next_index` follows the last stored chunk.

    Attributes:
        attempt: The newest attempt that wrote, 0 if none did.
    """

    revision: int
    slices: list[ChunkSlice]
    next_index: int
    closes: str = ""
    more: bool = False
    attempt: int = 0


encode = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(Batch).decode
decode_committed = msgspec.msgpack.Decoder(Committed).decode
decode_read = msgspec.msgpack.Decoder(ReadRequest).decode
decode_page = msgspec.msgpack.Decoder(RowPage).decode
decode_sessions_read = msgspec.msgpack.Decoder(SessionsRead).decode
decode_sessions = msgspec.msgpack.Decoder(list[SessionRowsRead]).decode
decode_poll = msgspec.msgpack.Decoder(PollRequest).decode
decode_changes = msgspec.msgpack.Decoder(Changes).decode
decode_chunk_read = msgspec.msgpack.Decoder(ChunkRead).decode
decode_chunk_page = msgspec.msgpack.Decoder(ChunkPage).decode
decode_slice = msgspec.msgpack.Decoder(ChunkSlice).decode
