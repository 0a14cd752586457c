"""The store against a dict: two clients write at random, and its process dies at random.

Laws 1 to 3: what was answered is there after a crash; revisions have no gaps; each reader hears
every change once and in order, and what it holds is what the rows are; a live query equals the
same query run afresh, own writes included.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aidb_ray.errors import AidbError, ConflictError, KeyExistsError, KeyMissingError, RowError
from aidb_ray.expressions import eq, gt
from aidb_ray.query.builder import Query, build
from aidb_ray.query.live import LiveQuery, run_query
from aidb_ray.store.changes import (
    Change,
    Delete,
    DeleteSession,
    Filter,
    FoundRow,
    Insert,
    Mutation,
    Update,
)
from aidb_ray.store.client import StoreClient
from tests.stores import Process, Store, open_store

KEYS = ["a", "b", "c"]
SESSIONS = ["aidb://s/1", "aidb://s/2"]

Rows = dict[tuple[str, str], tuple[int, bytes]]

mutations = st.tuples(
    st.sampled_from(["insert", "update", "delete"]),
    st.sampled_from(SESSIONS),
    st.sampled_from(KEYS),
    st.integers(0, 3),
    # Which revision of the row is expected: any, the one it has, or an older one.
    st.sampled_from(["any", "own", "stale"]),
)
Drawn = tuple[str, str, str, int, str]
commits = st.tuples(st.integers(0, 1), st.lists(mutations, min_size=1, max_size=3))
steps = st.lists(
    st.one_of(
        commits,
        commits,
        commits,
        st.sampled_from(["kill", "lose", "snapshot"]),
        st.builds(DeleteSession, st.sampled_from(SESSIONS)),
    ),
    min_size=1,
    max_size=25,
)
slow = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


class Model:
    """What the store should hold, worked out in the obvious way."""

    def __init__(self) -> None:
        self.rows: Rows = {}

    def make(self, drawn: Sequence[Drawn]) -> list[Mutation]:
        made: list[Mutation] = []
        for op, session, key, n, expected in drawn:
            revision, _ = self.rows.get((session, key), (0, b""))
            base = {"any": 0, "own": revision, "stale": max(1, revision - 1)}[expected]
            value = msgspec.json.encode({"id": key, "n": n})
            match op:
                case "insert":
                    made.append(Insert(session, "rows", key, value))
                case "update":
                    made.append(Update(session, "rows", key, value, base))
                case _:
                    made.append(Delete(session, "rows", key, base))
        return made

    def apply(self, made: Sequence[Mutation], revision: int) -> type[AidbError] | None:
        """Apply a commit, or return why it is refused."""
        rows = dict(self.rows)
        for mutation in made:
            if isinstance(mutation, DeleteSession):
                rows = {place: row for place, row in rows.items() if place[0] != mutation.session}
                continue
            assert isinstance(mutation, Insert | Update | Delete)
            place = (mutation.session, mutation.key)
            row = rows.get(place)
            if isinstance(mutation, Insert):
                if row is not None:
                    return KeyExistsError
            elif row is None:
                return KeyMissingError
            elif mutation.base not in (0, row[0]) and row[0] != revision:
                return ConflictError
            if isinstance(mutation, Delete):
                del rows[place]
            else:
                rows[place] = (revision, mutation.value)
        self.rows = rows
        return None


class Follower:
    """Holds the rows of a filter as a subscription tells them."""

    def __init__(self, client: StoreClient, wanted: Filter) -> None:
        self.rows: Rows = {}
        self.heard: list[Change] = []
        self.begins = 0
        self.subscription = client.feed.subscribe(wanted, self.hear, self.see)

    def see(self, rows: Sequence[FoundRow], _revision: int) -> None:
        self.begins += 1
        self.rows = {(row.session, row.key): (row.revision, row.value) for row in rows}

    def hear(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.heard.append(change)
            if change.value is None:
                self.rows.pop((change.session, change.key), None)
            else:
                self.rows[change.session, change.key] = (change.revision, change.value)


def run(program: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(asyncio.wait_for(program(Path(directory)), 60))


@slow
@given(steps)
def test_the_store_holds_what_it_answered_whatever_happens(drawn: list[Any]) -> None:
    async def program(directory: Path) -> None:
        model = Model()
        async with open_store(directory, max_resident_bytes=1) as store:
            clients: list[StoreClient] = [store.client(), store.client()]
            for client in clients:
                await client.commit([Insert("aidb://other", "other", str(id(client)), b"{}")])
            watcher = store.client()
            follower = Follower(watcher, Filter("rows"))
            await follower.subscription.ready
            revision = (await watcher.status()).revision
            for step in drawn:
                if isinstance(step, str):
                    await disturb(store, step)
                    continue
                who: int = 0 if isinstance(step, DeleteSession) else step[0]
                asked: list[Drawn] = [] if isinstance(step, DeleteSession) else step[1]
                made = [step] if isinstance(step, DeleteSession) else model.make(asked)
                expected = model.apply(made, revision + 1)
                if expected is None:
                    assert await clients[who].commit(made) == revision + 1
                    revision += 1
                else:
                    assert type(await refusal(clients[who], made)) is expected
                    assert (await watcher.status()).revision == revision
            await check(watcher, follower, model, revision, had_snapshot="snapshot" in drawn)

    run(program)


async def refusal(client: StoreClient, made: Sequence[Mutation]) -> AidbError | None:
    try:
        await client.commit(made)
    except (RowError, ConflictError) as error:
        return error
    return None


async def disturb(store: Store, how: str) -> None:
    match how:
        case "kill":
            await store.restart()
        case "lose":
            store.lose_answers = 1
        case _:
            await store.actor.snapshot()


async def check(
    watcher: StoreClient, follower: Follower, model: Model, revision: int, *, had_snapshot: bool
) -> None:
    await watcher.feed.reached(revision)
    _, found = await watcher.read(Filter("rows"))
    stored = {(row.session, row.key): (row.revision, row.value) for row in found}
    assert stored == model.rows
    assert follower.rows == model.rows
    # A reader goes on where it was, unless the store forgot what is in its snapshot.
    assert follower.begins == 1 or had_snapshot
    # Once, and in order: a commit that brings nothing tells nothing.
    heard = [(change.revision, change.session, change.key) for change in follower.heard]
    assert len(set(heard)) == len(heard)
    revisions = [at for at, _, _ in heard]
    assert revisions == sorted(revisions)


@slow
@given(st.lists(st.tuples(commits, st.booleans()), min_size=2, max_size=30))
def test_two_clients_that_race_leave_no_gap_and_agree(drawn: list[Any]) -> None:
    """Commits are sent without waiting; the order of revisions is the order of effects."""

    async def program(directory: Path) -> None:
        async with open_store(directory) as store:
            clients: list[StoreClient] = [store.client(), store.client()]
            model = Model()
            sent: list[tuple[list[Mutation], asyncio.Future[int]]] = []
            each: tuple[tuple[int, list[Drawn]], bool]
            for each in drawn:
                (who, asked), gives_way = each
                made = model.make(
                    [(op, session, key, n, "any") for op, session, key, n, _ in asked]
                )
                sent.append((made, clients[who].commit(made)))
                if gives_way:
                    await asyncio.sleep(0)
            results = await asyncio.gather(*(done for _, done in sent), return_exceptions=True)

            accepted = sorted(
                (result, made)
                for result, (made, _) in zip(results, sent, strict=True)
                if isinstance(result, int)
            )
            for at, made in accepted:
                assert model.apply(made, at) is None
            registered = set(store.actor._tables.clients)
            latest = (await clients[0].status()).revision
            assert sorted([*registered, *(at for at, _ in accepted)]) == list(range(1, latest + 1))
            _, found = await clients[0].read(Filter("rows"))
            assert {(r.session, r.key): (r.revision, r.value) for r in found} == model.rows

    run(program)


writes = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["insert", "update", "delete"]),
    st.sampled_from(KEYS),
    st.integers(0, 3),
    st.booleans(),
)


@slow
@given(st.lists(st.one_of(writes, writes, st.just("kill")), min_size=1, max_size=20))
def test_a_live_query_equals_the_same_query_run_afresh(drawn: list[Any]) -> None:
    async def program(directory: Path) -> None:
        async with open_store(directory) as store:
            processes = [Process(store), Process(store)]
            handles = [process.collection("rows") for process in processes]

            def question(who: int) -> Query[Any]:
                query: Query[Any] = build(lambda q: q.from_(r=handles[who]))
                return (
                    query.where(lambda r: eq(r.open, True) & gt(r.n, 0))
                    .order_by(lambda r: r.n, "desc")
                    .limit(2)
                )

            lives: list[LiveQuery[Any]] = [
                LiveQuery(process, question(who)) for who, process in enumerate(processes)
            ]
            for live, rows in zip(lives, handles, strict=True):
                await live.ready()
                await rows.ready()
            for step in drawn:
                if step == "kill":
                    await store.restart()
                    continue
                who, op, key, n, is_open = step
                write(handles[who], op, key, n, is_open=is_open)
                if n == 0:
                    await asyncio.sleep(0)
                # Whatever is on its way: an answer is what the rows that show here give.
                for live, rows in zip(lives, handles, strict=True):
                    assert live.rows == answer(rows.values())
            for process in processes:
                await process.site.drain()
            latest = (await processes[0].site.client.status()).revision
            for process in processes:
                await process.site.client.feed.reached(latest)

            fresh = await run_query(Process(store), question(0))
            assert [live.rows for live in lives] == [fresh, fresh]
            for live in lives:
                await live.aclose()

    run(program)


def answer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Oracle: the query above, in the obvious way."""
    found = [row for row in rows if row["open"] is True and row["n"] > 0]
    return sorted(found, key=lambda row: (-row["n"], row["id"]))[:2]


def write(rows: Any, op: str, key: str, n: int, *, is_open: bool) -> None:
    """Write without waiting; what this process knows to be wrong is refused at once."""
    try:
        match op:
            case "insert":
                rows.insert({"id": key, "n": n, "open": is_open})
            case "update":
                rows.update(key, {"n": n, "open": is_open})
            case _:
                rows.delete(key)
    except RowError:
        pass
