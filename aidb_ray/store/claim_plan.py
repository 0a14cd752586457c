"""Claims and leases as the commits of one flush change them. Part of `Plan`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import msgspec

from aidb_ray.store.changes import (
    Claim,
    Delete,
    Disown,
    Held,
    Refusal,
    Release,
    Renew,
    StoredRow,
    encode,
)
from aidb_ray.store.claims import (
    CLAIMS,
    ClaimRecord,
    Lease,
    Place,
    claim_key,
    decode_claim,
)
from aidb_ray.store.tables import HOLDERS, SYSTEM, RowEnd, Tables, Where

Ends: TypeAlias = dict[Where, RowEnd]
Look: TypeAlias = Callable[[Where], RowEnd]
PutSystem: TypeAlias = Callable[[int, str, str, bytes | None], None]


class Claiming:
    """What one commit does to claims and leases, until it is accepted."""

    __slots__ = ("disowned", "holds", "leases", "token")

    def __init__(self, token: int = 0) -> None:
        # Of the claim under which the commit is made.
        self.token = token
        # Of each place: who held it before, and the holder and token from now on.
        self.holds: list[tuple[Place, str | None, tuple[str, int] | None]] = []
        self.leases: dict[str, Lease] = {}
        self.disowned: list[str] = []


class ClaimPlan:
    """Who holds which rows after the commits that were accepted so far.

    Args:
        look: Gives a row as a commit finds it.
        put_system: Changes a row of the store's own: (revision, collection, key, value).
    """

    def __init__(self, tables: Tables, look: Look, put_system: PutSystem) -> None:
        self._tables = tables
        self._look = look
        self._put_system = put_system
        self._claims: dict[str, dict[Place, int]] = {}
        self._leases: dict[str, Lease | None] = {}

    def disown_expired(self, revision: int) -> tuple[Ends, Claiming]:
        """End the leases whose time is over, unless they were renewed meanwhile."""
        leases = self._tables.leases
        claiming = Claiming()
        ends: Ends = {}
        for holder in leases.expired():
            lease = self._lease_of(holder)
            if lease is not None and lease.ends_at_ms <= leases.now_ms:
                self._disown(holder, revision, ends, claiming)
        return ends, claiming

    def _claim_end(self, place: Place, ends: Ends) -> RowEnd:
        where = (place[0], CLAIMS, claim_key(place[1], place[2]))
        end = ends.get(where)
        if end is None:
            end = ends[where] = self._look(where)
        return end

    def check_held(self, held: Held, ends: Ends) -> Refusal | None:
        """Return why a commit under this claim is refused, None if the claim is current."""
        end = self._claim_end((held.session, held.collection, held.key), ends)
        record = None if end.after is None else decode_claim(end.after.value)
        if record is not None and record.state == "held" and record.token == held.token:
            return None
        return _stale(held, record)

    def _plan_claim(
        self,
        mutation: Claim | Release,
        revision: int,
        ends: Ends,
        claiming: Claiming,
    ) -> Refusal | None:
        place = (mutation.session, mutation.collection, mutation.key)
        end = self._claim_end(place, ends)
        record = None if end.after is None else decode_claim(end.after.value)
        if isinstance(mutation, Claim) and record is not None and record.token == claiming.token:
            # Its own claim, which the commit's `held` has shown to be current.
            taken = msgspec.structs.replace(record, note=mutation.note)
        elif isinstance(mutation, Claim):
            refusal = self._plan_taking(mutation, end.after, record, revision, ends)
            if refusal is not None:
                return refusal
            known = record or ClaimRecord(mutation.collection, mutation.key)
            taken = msgspec.structs.replace(
                known,
                effect=mutation.effect,
                holder=mutation.holder,
                token=revision,
                attempt=known.attempt + 1,
                state="held",
                note=mutation.note,
            )
            claiming.holds.append((place, None, (mutation.holder, revision)))
            now_ms = self._tables.leases.now_ms
            claiming.leases[mutation.holder] = Lease(now_ms, mutation.lease_ms)
        elif record is None or record.token != mutation.token:
            return _stale(mutation, record)
        elif record.state != "held":
            return None if record.state == mutation.state else _stale(mutation, record)
        else:
            taken = msgspec.structs.replace(
                record,
                holder="",
                state=mutation.state,
                orphaned=record.orphaned + (mutation.state == "orphan"),
            )
            claiming.holds.append((place, record.holder, None))
        end.after = StoredRow(revision, taken.encode())
        return None

    def _plan_taking(
        self,
        wanted: Claim,
        stored: StoredRow | None,
        record: ClaimRecord | None,
        revision: int,
        ends: Ends,
    ) -> Refusal | None:
        where = (wanted.session, wanted.collection, wanted.key)
        if where[0] == SYSTEM or where[1].startswith("~"):
            return Refusal("reserved_name", wanted.collection, wanted.key)
        row = (ends.get(where) or self._look(where)).after
        if row is None:
            return Refusal("missing", wanted.collection, wanted.key)
        if wanted.base not in (row.revision, 0) and row.revision != revision:
            return Refusal("conflict", wanted.collection, wanted.key, row.value, row.revision)
        if record is not None and record.state == "held":
            return Refusal("claimed", wanted.collection, wanted.key, expected=record.token)
        if (
            stored is not None
            and record is not None
            and wanted.attempts not in (-1, record.attempt)
        ):
            return Refusal(
                "claim_changed", wanted.collection, wanted.key, stored.value, stored.revision
            )
        return None

    def plan(
        self,
        mutation: Claim | Release | Renew | Disown,
        revision: int,
        ends: Ends,
        claiming: Claiming,
    ) -> Refusal | None:
        """Plan one mutation of the commit that would be `revision`."""
        match mutation:
            case Claim() | Release():
                return self._plan_claim(mutation, revision, ends, claiming)
            case Renew() | Disown():
                return self._plan_lease(mutation, revision, ends, claiming)

    def _plan_lease(
        self, mutation: Renew | Disown, revision: int, ends: Ends, claiming: Claiming
    ) -> Refusal | None:
        holder = mutation.holder
        if isinstance(mutation, Disown):
            for each in self._holders_like(holder):
                self._disown(each, revision, ends, claiming)
        elif self._lease_of(holder) is None and holder not in claiming.leases:
            return Refusal("unknown_holder", key=holder)
        else:
            claiming.leases[holder] = Lease(self._tables.leases.now_ms, mutation.lease_ms)
        return None

    def _disown(self, holder: str, revision: int, ends: Ends, claiming: Claiming) -> None:
        """Make orphans of all that a holder has claimed, and end its lease."""
        claiming.disowned.append(holder)
        for place in self._claims_of(holder):
            end = self._claim_end(place, ends)
            record = None if end.after is None else decode_claim(end.after.value)
            if record is None or record.holder != holder:
                # Released or deleted in this very commit.
                continue
            orphan = msgspec.structs.replace(
                record, holder="", state="orphan", orphaned=record.orphaned + 1
            )
            end.after = StoredRow(revision, orphan.encode())
            claiming.holds.append((place, holder, None))

    def is_worked_on(self, place: Place, ends: Ends) -> bool:
        """Whether someone has claimed a row, or is to take over from one who had."""
        after = self._claim_end(place, ends).after
        return after is not None and decode_claim(after.value).state in ("held", "orphan")

    def forget(self, deleted: Delete, ends: Ends, claiming: Claiming) -> None:
        """Drop what is kept beside a row that is deleted."""
        place = (deleted.session, deleted.collection, deleted.key)
        end = self._claim_end(place, ends)
        if end.after is not None:
            record = decode_claim(end.after.value)
            if record.state == "held":
                claiming.holds.append((place, record.holder, None))
            end.after = None

    def forget_session(self, session: str, revision: int, records: Iterable[bytes]) -> None:
        """Give up what is claimed of a session that is deleted; `records` are its claims."""
        claiming = Claiming()
        for record in map(decode_claim, records):
            if record.state == "held":
                place = (session, record.collection, record.row)
                claiming.holds.append((place, record.holder, None))
        self.accept(revision, claiming)

    def _claims_of(self, holder: str) -> dict[Place, int]:
        claims = self._claims.get(holder)
        if claims is None:
            claims = self._claims[holder] = dict(self._tables.leases.claims_of(holder))
        return claims

    def _holders_like(self, prefix: str) -> list[str]:
        known = {**self._tables.leases.holders, **self._leases}
        return [name for name, lease in known.items() if lease and name.startswith(prefix)]

    def _lease_of(self, holder: str) -> Lease | None:
        if holder in self._leases:
            return self._leases[holder]
        return self._tables.leases.holders.get(holder)

    def accept(self, revision: int, claiming: Claiming) -> None:
        """Take over what an accepted commit does to claims and leases."""
        for place, before, held in claiming.holds:
            key = "\0".join(place)
            if before is not None:
                self._claims_of(before).pop(place, None)
            if held is None:
                self._put_system(revision, CLAIMS, key, None)
            else:
                holder, token = held
                self._claims_of(holder)[place] = token
                self._put_system(revision, CLAIMS, key, encode(held))
        for holder, lease in claiming.leases.items():
            if lease != self._lease_of(holder):
                self._leases[holder] = lease
                self._put_system(revision, HOLDERS, holder, encode(lease))
        for holder in claiming.disowned:
            if self._lease_of(holder) is not None:
                self._leases[holder] = None
                self._put_system(revision, HOLDERS, holder, None)


def _stale(wanted: Held | Release, record: ClaimRecord | None) -> Refusal:
    current = 0 if record is None or record.state != "held" else record.token
    return Refusal("stale_claim", wanted.collection, wanted.key, expected=current, got=wanted.token)
