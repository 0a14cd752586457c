"""Claims of rows against a slow, obvious model: one holder at a time, whatever happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aidb_ray.store.changes import Claim, Delete, Disown, Held, Release, Renew, Update
from aidb_ray.store.claims import CLAIMS, claim_key, decode_claim
from tests.planner import Engine
from tests.stores import SESSION, insert, row

KEYS = ("a", "b", "c")
HOLDERS = ("one", "two", "three")
keys, holders = st.sampled_from(KEYS), st.sampled_from(HOLDERS)
LEASE_MS = 1_000


@dataclass
class Known:
    """What a row's claim should be."""

    holder: str = ""
    token: int = 0
    attempt: int = 0
    state: str = "none"
    orphaned: int = 0


@dataclass
class Model:
    now_ms: int = 0
    rows: dict[str, Known] = field(default_factory=dict[str, Known])
    leases: dict[str, int] = field(default_factory=dict[str, int])

    def end(self, holder: str) -> None:
        self.leases.pop(holder, None)
        for known in self.rows.values():
            if known.holder == holder:
                known.holder, known.state, known.orphaned = "", "orphan", known.orphaned + 1


class Claims(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine()
        self.model = Model()
        self.values: dict[str, int] = {}
        for key in KEYS:
            self.engine.one(insert(key))
            self.model.rows[key] = Known()

    @rule(key=keys, holder=holders)
    def claim(self, key: str, holder: str) -> None:
        refusal = self.engine.one(Claim(SESSION, "rows", key, "tools", holder, LEASE_MS))
        known = self.model.rows.get(key)
        assert (refusal is None) == (known is not None and known.state != "held")
        if known is not None and refusal is None:
            known.holder, known.state = holder, "held"
            known.token, known.attempt = self.engine.tables.revision, known.attempt + 1
            self.model.leases[holder] = self.model.now_ms + LEASE_MS

    @rule(key=keys, back=st.integers(0, 2), state=st.sampled_from(["done", "free", "orphan"]))
    def write_and_release(self, key: str, back: int, state: str) -> None:
        """By whoever holds it, or by someone with an older token."""
        known = self.model.rows.get(key, Known())
        token = known.token - back
        refusal = self.engine.one(
            Update(SESSION, "rows", key, row(key, str(token)), 0),
            Release(SESSION, "rows", key, token, state),  # pyright: ignore[reportArgumentType]
            held=Held(SESSION, "rows", key, token),
        )
        assert (refusal is None) == (known.state == "held" and back == 0)
        if refusal is None:
            known.holder, known.state = "", state
            known.orphaned += state == "orphan"

    @rule(holder=holders)
    def renew(self, holder: str) -> None:
        refusal = self.engine.one(Renew(holder, LEASE_MS))
        assert (refusal is None) == (holder in self.model.leases)
        if refusal is None:
            self.model.leases[holder] = self.model.now_ms + LEASE_MS

    @rule(holder=holders)
    def disown(self, holder: str) -> None:
        assert self.engine.one(Disown(holder)) is None
        self.model.end(holder)

    @rule(key=keys)
    def delete_and_insert(self, key: str) -> None:
        assert self.engine.one(Delete(SESSION, "rows", key)) is None
        assert self.engine.one(insert(key)) is None
        self.model.rows[key] = Known()

    @rule(elapsed_ms=st.integers(1, 250))
    def wait(self, elapsed_ms: int) -> None:
        self.engine.tick(elapsed_ms)
        self.model.now_ms += elapsed_ms
        for holder in [h for h, end in self.model.leases.items() if end <= self.model.now_ms]:
            self.model.end(holder)

    @rule()
    def restart(self) -> None:
        """Lease time goes back to what was logged: a lease may end later, never earlier."""
        before = self.engine.tables.leases.now_ms
        self.engine.restart()
        lost = before - self.engine.tables.leases.now_ms
        assert lost >= 0
        self.model.now_ms -= lost

    @invariant()
    def rows_say_what_the_model_says(self) -> None:
        held: dict[str, dict[tuple[str, str, str], int]] = {}
        for key, known in self.model.rows.items():
            stored = self.engine.tables.get(SESSION, CLAIMS, claim_key("rows", key))
            if stored is None:
                assert known.state == "none"
                continue
            record = decode_claim(stored.value)
            seen = (record.holder, record.token, record.attempt, record.state, record.orphaned)
            expected = (known.holder, known.token, known.attempt, known.state, known.orphaned)
            assert seen == expected
            if known.state == "held":
                held.setdefault(known.holder, {})[SESSION, "rows", key] = known.token
        assert self.engine.tables.leases.claims == held
        assert set(self.engine.tables.leases.holders) == set(self.model.leases)


TestClaims = Claims.TestCase
TestClaims.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
