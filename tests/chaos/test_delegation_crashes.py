"""A brief of three agents, one of whose processes is killed at each transition of its machine.

In this loop every agent has a connection of its own; a process dies when its connection does: what
it still sends is lost, or arrives without an answer. On Ray it is killed by SIGKILL.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from aidb_ray import (
    AgentMessage,
    AgentTool,
    CancelRequest,
    Database,
    Generation,
    ModelError,
    Retry,
    ToolCall,
    approve,
    connect,
    create_agent,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.agents import cycle as machine
from aidb_ray.agents.cycle import (
    TRANSITIONS,
    Cancelled,
    Cycle,
    OutputRefused,
    Phase,
    Resumed,
    RoundFailed,
    TimedOut,
)
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.run import GenerationRun
from aidb_ray.models.base import ModelMessage
from aidb_ray.store.actor import StoreActor
from aidb_ray.testing import CallTool, Reply, Say, ScriptedModel

pytestmark = pytest.mark.chaos

URL = "aidb://brief/1"
ANSWERS = {
    "writer": '{"text":"written"}',
    "researcher": '{"text":"found"}',
    "coordinator": '{"text":"done"}',
}
ASKS = {"coordinator": "researcher", "researcher": "writer"}
# The coordinator asks the researcher twice, and that the writer twice each time.
TIMES = {"coordinator": 1, "researcher": 2, "writer": 4}
WAIT_S = 20

Step = tuple[Phase, type[Any], Phase]

Story = Literal[
    "works", "fails", "babbles", "hangs asking", "hangs calling", "hangs waiting", "is late"
]

# How the researcher's generations end in the stories in which they do not end well.
ENDS: dict[Story, Step] = {
    "fails": ("asking", RoundFailed, "ended"),
    "babbles": ("asking", OutputRefused, "ended"),
    "hangs asking": ("asking", Cancelled, "ended"),
    "hangs calling": ("calling", Cancelled, "ended"),
    "hangs waiting": ("waiting", Cancelled, "ended"),
    "is late": ("asking", TimedOut, "ended"),
}
# They need the policy `park`, ten interruptions in a row, or another place to be late in.
ELSEWHERE: frozenset[Step] = frozenset(
    {
        ("calling", Resumed, "waiting"),
        ("asking", Resumed, "ended"),
        ("calling", Resumed, "ended"),
        ("calling", TimedOut, "ended"),
        ("waiting", TimedOut, "ended"),
    }
)


class Text(BaseModel):
    text: str


# What the agents do.


class Outside:
    """What outlives every process: what the models said once, and what tools did."""

    def __init__(self, story: Story = "works") -> None:
        self.story: Story = story
        self.hangs = asyncio.Event()
        self.said_once: set[tuple[str, str]] = set()
        self.noted: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def is_first(self, agent: str, what: str) -> bool:
        first = (agent, what) not in self.said_once
        self.said_once.add((agent, what))
        return first

    async def hang(self) -> None:
        self.hangs.set()
        await asyncio.Event().wait()

    async def play(self, agent: str, messages: Sequence[ModelMessage]) -> Reply:
        """Go through every kind of round: others, here, both, a person, an error, no JSON."""
        last_user = max(at for at, message in enumerate(messages) if message.role == "user")
        if agent == "writer":
            return ANSWERS[agent]
        if messages[last_user].content.startswith("The answer must be JSON"):
            babbles = (agent, self.story) == ("researcher", "babbles")
            return "no JSON" if babbles else ANSWERS[agent]
        ask = CallTool(ASKS[agent], {"message": f"{agent} asks"})
        rounds: list[Reply] = [
            [Say("First."), ask, CallTool("note"), CallTool("note")],
            [CallTool("note"), ask],
            CallTool("note"),
            [CallTool("send"), CallTool("send")],
        ]
        number = sum(message.role == "assistant" for message in messages[last_user:])
        if number < len(rounds):
            return rounds[number]
        if agent == "researcher":
            match self.story:
                case "fails":
                    return ModelError("No key.", retryable=False, code="bad_key")
                case "babbles":
                    return "no JSON"
                case "hangs asking" | "is late":
                    await self.hang()
                case _:
                    pass
        if self.is_first(agent, "an error"):
            return ModelError("Busy.", retryable=True, code="busy")
        if self.is_first(agent, "no JSON"):
            return "no JSON"
        return ANSWERS[agent]

    def define(self, name: str) -> AgentDefinition:
        @tool
        async def note() -> str:
            """Note."""
            if (name, self.story) == ("researcher", "hangs calling"):
                await self.hang()
            self.noted[name] += 1
            return "noted"

        @tool(needs_approval=True)
        async def send() -> str:
            """Send."""
            self.sent[name] += 1
            return "sent"

        return durable_agent(
            name=name,
            adapter=ScriptedModel(lambda messages: self.play(name, messages)),
            tools=[note, send],
            agents=[AgentTool(ASKS[name])] if name in ASKS else [],
            output_schema=Text,
            stream_url=URL,
            run_timeout_ms=300 if (name, self.story) == ("researcher", "is late") else None,
            retry=Retry(first_pause_ms=1, longest_pause_ms=1, max_interruptions=100),
        )


# Processes.


class DeadRef:
    """The way to the store of a process that is dead, or dies when its next commit has arrived."""

    def __init__(self, ref: Any, *, keeps_last: bool) -> None:
        self._ref = ref
        self._keeps_last = keeps_last

    async def ask(self, *_: Any) -> Any:
        await asyncio.Event().wait()

    async def ask_shielded(self, method: Any, *args: Any) -> Any:
        if self._keeps_last and method is StoreActor.commit:
            self._keeps_last = False
            await self._ref.ask_shielded(method, *args)
        await asyncio.Event().wait()


class Process:
    """An agent as it is in a process of its own."""

    def __init__(self, db: Database, definition: AgentDefinition) -> None:
        # A connection of its own to the same store.
        self._database = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
        self._agent = create_agent(definition, database=self._database)
        self.died = asyncio.Event()

    async def start(self) -> None:
        await self._agent.ready()

    def die(self, *, keeps_last: bool) -> None:
        client: Any = self._database.partitions[0].client
        client._ref = client.feed._ref = DeadRef(client._ref, keeps_last=keeps_last)
        for ref in self._database.local_shards.get(self._agent.name, []):
            for work in ref._host.actor._works:
                # What still runs of it begins nothing new, nor can it leave a trace.
                work.is_retired = True
        self.died.set()


Fate = Literal["lost", "kept"]
"""What becomes of the next commit of a process that is killed."""


class Killer:
    """Kills the process of an agent at a transition, and the next ones at their first.

    Args:
        victim: Whose process.
        at: The number of the transition, from 1; or the transition itself, the first time.
        fates: One for each kill.
    """

    def __init__(self, victim: str, at: int | Step, fates: Sequence[Fate]) -> None:
        self.processes: dict[str, Process] = {}
        self.kills: list[Step] = []
        self.is_over = asyncio.Event()
        self.is_over.set()
        self.victim = victim
        self._at = at
        self._fates = fates
        self._steps = 0

    def see(self, agent: str, step: Step) -> None:
        if agent != self.victim or self.processes[agent].died.is_set():
            return
        self._steps += 1
        done = len(self.kills)
        if done < len(self._fates) and (done or self._at in (self._steps, step)):
            self.kills.append(step)
            self.is_over.clear()
            self.processes[agent].die(keeps_last=self._fates[done] == "kept")
        else:
            # The next process has found where its generation stood.
            self.is_over.set()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[Killer]:
    """Tell the one killer of the list of every transition."""
    killers: list[Killer] = []
    agents: dict[str, str] = {}
    new, advance, resume = GenerationRun._new_generation, machine.advance, machine.resume

    def noted_new(run: GenerationRun) -> Any:
        generation = new(run)
        agents[generation.id] = generation.agent
        return generation

    def see(before: Phase, event: Any, after: Cycle) -> None:
        killers[-1].see(agents[after.generation_id], (before, event, after.phase))

    def seen_advance(cycle: Cycle, event: Any, limits: Any) -> Any:
        after, command = advance(cycle, event, limits)
        see(cycle.phase, type(event), after)
        return after, command

    def seen_resume(generation: Any, calls: Any, *args: Any, **options: Any) -> Any:
        agents[generation.id] = generation.agent
        after, command = resume(generation, calls, *args, **options)
        newest = [call for call in calls if call.round == len(generation.rounds) - 1]
        see(machine._phase_of(newest), Resumed, after)
        return after, command

    monkeypatch.setattr(GenerationRun, "_new_generation", noted_new)
    monkeypatch.setattr(machine, "advance", seen_advance)
    monkeypatch.setattr(machine, "resume", seen_resume)
    return killers


# A brief.


@dataclass(frozen=True)
class Rows:
    """All rows of the session."""

    messages: list[AgentMessage]
    generations: list[Generation]
    calls: list[ToolCall]


async def hold_brief(killer: Killer, outside: Outside) -> Rows:
    """Ask the coordinator, start anew who dies, approve what is asked, and return the rows."""
    async with connect("local", durability="memory") as db:
        session = db.session(URL)

        async def keep_alive(name: str) -> None:
            while True:
                process = killer.processes[name] = Process(db, outside.define(name))
                # It may die while it starts.
                starting = asyncio.create_task(process.start())
                await process.died.wait()
                starting.cancel()

        async def approve_all() -> None:
            needed = db.live_query(
                lambda q: q.from_(c=session.tool_calls).where(lambda c: eq(c.approval, "needed"))
            )
            async for delta in needed:
                hangs = (delta.row.agent, outside.story) == ("researcher", "hangs waiting")
                if delta.op == "enter" and hangs:
                    outside.hangs.set()
                elif delta.op == "enter":
                    if delta.row.agent == killer.victim:
                        await killer.is_over.wait()
                    await approve(session.tool_calls, delta.row.id)

        async def cancel_what_hangs() -> None:
            requests = db.live_query(
                lambda q: q.from_(m=session.messages).where(
                    lambda m: eq(m.target_agent, "researcher")
                )
            )
            async for delta in requests:
                if delta.op == "enter" and delta.row.role == "user":
                    await outside.hangs.wait()
                    outside.hangs.clear()
                    cancel = CancelRequest(agent="researcher", message_id=delta.row.id)
                    await session.cancel_requests.insert(cancel)

        async def replied() -> None:
            answers = db.live_query(
                lambda q: q.from_(m=session.messages).where(lambda m: eq(m.in_reply_to, "m"))
            )
            async for delta in answers:
                if delta.op == "enter":
                    return

        helpers = [asyncio.create_task(keep_alive(name)) for name in ANSWERS]
        helpers.append(asyncio.create_task(approve_all()))
        if outside.story.startswith("hangs"):
            helpers.append(asyncio.create_task(cancel_what_hangs()))
        await session.messages.insert(
            AgentMessage(
                id="m", role="user", actor_id="me", target_agent="coordinator", content="brief"
            )
        )
        replying = asyncio.create_task(replied())
        await asyncio.wait(
            [replying, *helpers], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED
        )
        for helper in helpers:
            assert not helper.done(), helper
            helper.cancel()
        assert replying.done(), "it was never answered"
        rows = Rows(
            await db.query(lambda q: q.from_(m=session.messages).order_by(lambda m: m.created_at)),
            await db.query(lambda q: q.from_(g=session.generations)),
            await db.query(lambda q: q.from_(c=session.tool_calls).order_by(lambda c: c.id)),
        )
        for process in killer.processes.values():
            process.die(keeps_last=False)
        return rows


def live(work: Callable[[], Coroutine[Any, Any, Rows]]) -> Rows:
    """Run to the end in a loop of its own, then leave what the dead still wait for."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_ignore)
    try:
        return loop.run_until_complete(work())
    finally:
        loop.run_until_complete(_bury())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _bury() -> None:
    for _ in range(10):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=1)


def _ignore(_loop: asyncio.AbstractEventLoop, _context: dict[str, Any]) -> None:
    """Nobody asks what became of the writes of the dead."""


def check(rows: Rows, outside: Outside, *, deaths: dict[str, int]) -> None:
    """Everything was answered once, by who was asked, and repeated only for a death."""
    check_replies(rows)
    assert all(reply.error_code is None for reply in rows.messages)
    assert all(m.content == ANSWERS[m.actor_id] for m in rows.messages if m.role == "assistant")
    asked = Counter(m.target_agent for m in rows.messages if m.role == "user")
    assert asked == Counter(g.agent for g in rows.generations) == TIMES
    for generation in rows.generations:
        assert generation.status == "completed"
        assert generation.interruptions <= deaths.get(generation.agent, 0)
    assert {call.status for call in rows.calls} == {"completed"}
    for agent in ASKS:
        times = TIMES[agent]
        calls = Counter(call.name for call in rows.calls if call.agent == agent)
        assert calls == {"note": 4 * times, "send": 2 * times}, "a call was recorded twice"
        again = sum(call.attempt - 1 for call in rows.calls if call.agent == agent)
        ran = outside.noted[agent] + outside.sent[agent]
        assert 6 * times <= ran <= 6 * times + again
        assert again <= 3 * deaths.get(agent, 0)


def check_replies(rows: Rows) -> None:
    """Everything was answered once, by who was asked."""
    by_id = {message.id: message for message in rows.messages}
    assert len(by_id) == len(rows.messages)
    assert all(message.processed for message in rows.messages)
    asked = [m for m in rows.messages if m.role == "user"]
    replies = [m for m in rows.messages if m.role == "assistant"]
    assert Counter(m.in_reply_to for m in replies) == {m.id: 1 for m in asked}
    for reply in replies:
        request = by_id[str(reply.in_reply_to)]
        assert (reply.actor_id, reply.target_agent) == (request.target_agent, request.actor_id)
        assert reply.request_id == request.request_id
        assert reply.generation_id == request.generation_id
    for request in asked:
        if request.id != "m":
            assert request.request_id == request.id
            assert request.path == [*ASKS][: [*ASKS].index(request.actor_id) + 1]


@pytest.mark.parametrize("victim", ["coordinator", "researcher"])
def test_killed_at_each_transition(watch: list[Killer], victim: str) -> None:
    killed: list[Step] = []
    every: list[list[Fate]] = [["lost"], ["kept"], ["lost", "lost"], ["kept", "lost"]]
    for fates in every:
        for at in count(1):
            outside, killer = Outside(), Killer(victim, at, fates)
            watch.append(killer)
            rows = live(lambda killer=killer, outside=outside: hold_brief(killer, outside))
            check(rows, outside, deaths={victim: len(killer.kills)})
            if not killer.kills:
                break
            killed += killer.kills
    assert len(killed) >= 6 * 19, "a brief has fewer steps than it should"
    missing = TRANSITIONS.difference(killed, ELSEWHERE, ENDS.values())
    assert not missing, f"{len(killed)} kills, none of them at {missing}"


@pytest.mark.parametrize("fate", ["lost", "kept"])
@pytest.mark.parametrize("story", ENDS)
def test_killed_at_an_end_that_is_no_answer(watch: list[Killer], story: Story, fate: Fate) -> None:
    """Whoever delegated hears of it once, and goes on."""
    killer = Killer("researcher", ENDS[story], [fate])
    watch.append(killer)
    rows = live(lambda: hold_brief(killer, Outside(story)))

    assert killer.kills == [ENDS[story]]
    check_replies(rows)
    statuses = {(g.agent, g.status) for g in rows.generations if g.agent != "writer"}
    ending = "cancelled" if story.startswith("hangs") else "failed"
    assert statuses == {("coordinator", "completed"), ("researcher", ending)}
    replies = [m for m in rows.messages if m.actor_id == "researcher" and m.role == "assistant"]
    assert [reply.error_code is None for reply in replies] == [False, False]
    assert all(call.status in ("completed", "cancelled") for call in rows.calls)


def test_every_transition_has_its_death() -> None:
    assert set(ENDS.values()) | ELSEWHERE < TRANSITIONS
