"""Agents that are killed: at every frame of a conversation in this process, and on Ray by SIGKILL.

A life ends at one of the frames of its log. What happened outside (the model was asked, a tool
ran) is kept by witnesses that outlive it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

import pytest

from aidb_ray import (
    AgentMessage,
    Chunk,
    Database,
    Generation,
    Retry,
    Session,
    ToolCall,
    connect,
    create_agent,
    durable_agent,
    replay,
    tool,
)
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.tools import Tool, ToolContext
from aidb_ray.testing import CallTool, Reply, Say, ScriptedModel, crash_at

pytestmark = pytest.mark.chaos

T = TypeVar("T")
URL = "aidb://echo/1"
ANSWER = "The sums are 3 7 and 10 so it is done."
ANSWER_IN_DOUBT = "in_doubt"
Policy = Literal["retry", "fail"]


def live(
    life: Callable[[], Awaitable[T]], *, dies_at: int = 0, keeps_last: bool = False
) -> T | None:
    """Run one life; None if it died, at frame `dies_at` of its log, which may still be kept."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_live(life, dies_at, keeps_last=keeps_last))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _live(life: Callable[[], Awaitable[T]], dies_at: int, *, keeps_last: bool) -> T | None:
    if not dies_at:
        return await life()
    living = asyncio.ensure_future(life())
    async with crash_at("store.logged" if keeps_last else "store.planned", hit=dies_at) as crash:
        dying = asyncio.ensure_future(crash.happened(within_ms=120_000))
        await asyncio.wait([living, dying], return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if not crash.has_happened:
            return living.result()
    # The store has died with the process, and so must all that used it.
    asyncio.get_running_loop().set_exception_handler(_ignore)
    for _ in range(10):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=1)
    return None


def _ignore(_loop: asyncio.AbstractEventLoop, _context: dict[str, Any]) -> None:
    """Nobody asks what became of the writes of the dead."""


@dataclass
class Outside:
    """What the outside world saw, whoever died."""

    rounds: list[int] = field(default_factory=list[int])
    calls: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def forget(self) -> None:
        self.rounds.clear()
        self.calls.clear()

    def play(self, messages: Sequence[ModelMessage]) -> Reply:
        tools = [message for message in messages if message.role == "tool"]
        self.rounds.append(sum(message.role == "assistant" for message in messages))
        match len(tools):
            case 0:
                return [
                    Say("Let me see what the first two sums come to."),
                    CallTool("add", {"a": 1, "b": 2}),
                    CallTool("add", {"a": 3, "b": 4}),
                ]
            case 2:
                a, b = (m.content for m in tools)
                if not (a.isdigit() and b.isdigit()):
                    return ANSWER_IN_DOUBT
                return [Say("And now their sum."), CallTool("add", {"a": int(a), "b": int(b)})]
            case _:
                a, b, c = (m.content for m in tools)
                if not c.isdigit():
                    return ANSWER_IN_DOUBT
                return Say(f"The sums are {a} {b} and {c} so it is done.")


@dataclass(frozen=True)
class Rows:
    """All rows of the session."""

    messages: list[AgentMessage]
    generations: list[Generation]
    calls: list[ToolCall]
    chunks: list[Chunk]


async def read(db: Database) -> Rows:
    session = db.session(URL)
    messages = await db.query(lambda q: q.from_(m=session.messages))
    generations = await db.query(lambda q: q.from_(g=session.generations))
    calls = await db.query(lambda q: q.from_(c=session.tool_calls).order_by(lambda c: c.id))
    chunks = [
        chunk
        for generation in generations
        async for chunk in replay(session.chunks, generation_id=generation.id, follow=False)
    ]
    return Rows(messages, generations, calls, chunks)


def converse(path: Path, outside: Outside, policy: Policy) -> Callable[[], Awaitable[Rows]]:
    """Return a life: look what is there, then have the message answered; its last rows."""

    @tool
    async def add(a: int, b: int, ctx: ToolContext) -> int:
        """Add."""
        outside.calls.append((ctx.idempotency_key, ctx.attempt))
        return a + b

    async def life() -> Rows:
        async with connect("local", data_dir=path) as db:
            before = await read(db)
            seen = (list(outside.rounds), list(outside.calls))
            outside.forget()
            agent = create_agent(
                durable_agent(
                    name="echo",
                    # A little time between words, so that frames are written among them.
                    adapter=ScriptedModel(outside.play, tokens_per_second=2_000),
                    tools=[add],
                    on_in_doubt=policy,
                    retry=Retry(max_interruptions=100),
                )
            )
            await agent.send("sum", session=URL, message_id="m").reply(timeout_ms=60_000)
            after = await read(db)
            check_life(before, after, outside, policy)
            outside.rounds[:0], outside.calls[:0] = seen
            return after

    return life


def check_life(before: Rows, after: Rows, outside: Outside, policy: Policy) -> None:
    """What was finished when this life began was not done again, and what was not, was."""
    finished_calls = {call.id for call in before.calls if call.status == "completed"}
    doubtful = {call.id: call.attempt for call in before.calls if call.status == "executing"}
    ran = dict(outside.calls)
    assert len(ran) == len(outside.calls), "a call ran twice in one life"
    assert not finished_calls & ran.keys(), "a finished call was repeated"
    if policy == "retry":
        assert {key: ran[key] for key in doubtful} == {
            key: attempt + 1 for key, attempt in doubtful.items()
        }
    else:
        assert not doubtful.keys() & ran.keys(), "a call in doubt was repeated"
    # A round is finished when its last chunk is durable.
    finished_rounds = sum(chunk.type == "STEP_FINISHED" for chunk in before.chunks)
    last = len(after.generations[0].rounds)
    assert outside.rounds == list(range(finished_rounds, last + 1)), "rounds were repeated or left"
    by_index = {chunk.index: chunk for chunk in after.chunks}
    assert all(by_index[chunk.index] == chunk for chunk in before.chunks), "a chunk changed"


def check_end(rows: Rows, policy: Policy, *, crashes: int) -> None:
    """All is there, once."""
    [asked, reply] = sorted(rows.messages, key=lambda message: message.created_at)
    [generation] = rows.generations
    assert (asked.id, asked.processed, asked.generation_id) == ("m", True, generation.id)
    assert (reply.id, reply.in_reply_to) == (f"{generation.id}:reply", "m")
    assert reply.content == ANSWER or (policy == "fail" and reply.content == ANSWER_IN_DOUBT)
    assert generation.status == "completed"
    assert 1 <= generation.attempt <= crashes + 1
    assert [chunk.index for chunk in rows.chunks] == list(range(len(rows.chunks)))
    attempts = [chunk.attempt for chunk in rows.chunks]
    assert attempts == sorted(attempts)
    markers = [(chunk.attempt, chunk.content) for chunk in rows.chunks if chunk.type == "CUSTOM"]
    later = sorted(set(attempts) - {1})
    assert markers == [(n, f'{{"name":"attempt","value":{n}}}') for n in later]
    for before, chunk in zip(rows.chunks, rows.chunks[1:], strict=False):
        assert (chunk.attempt != before.attempt) == (chunk.type == "CUSTOM")
    if policy == "retry":
        assert [call.status for call in rows.calls] == ["completed"] * 3


@pytest.fixture(autouse=True)
def small_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write frames in the middle of each stream."""
    monkeypatch.setattr("aidb_ray.agents.recorder.FLUSH_CHUNKS", 4)


@pytest.mark.parametrize("policy", ["retry", "fail"])
@pytest.mark.parametrize("keeps_last", [False, True], ids=["frame lost", "answer lost"])
def test_at_every_frame(tmp_path: Path, policy: Policy, *, keeps_last: bool) -> None:
    repeated: Counter[str] = Counter()
    for go in range(5):
        deaths = crash_at_every_frame(tmp_path / str(go), policy, repeated, keeps_last=keeps_last)
        assert deaths >= 12, "the conversation has fewer frames than it should"
        if repeated["calls"] or policy == "fail" or keeps_last:
            break
    assert repeated["rounds"] >= 2, "no death came in the middle of a round"
    if policy == "retry" and not keeps_last:
        # On a busy machine a call's effect and its record may come to lie in one frame.
        assert repeated["calls"] >= 1, "no death came between a call's effect and its record"


def crash_at_every_frame(
    directory: Path, policy: Policy, repeated: Counter[str], *, keeps_last: bool
) -> int:
    """Let one conversation after the other die at its next frame; return how many did."""
    deaths = 0
    for dies_at in count(1):
        path, outside = directory / str(dies_at), Outside()
        life = converse(path, outside, policy)
        rows = live(life, dies_at=dies_at, keeps_last=keeps_last)
        if rows is not None:
            break
        deaths += 1
        rows = live(life)
        assert rows is not None
        check_end(rows, policy, crashes=1)
        repeated["rounds"] += len(outside.rounds) - len(set(outside.rounds))
        repeated["calls"] += len(outside.calls) - len({key for key, _ in outside.calls})
        assert len(outside.rounds) - len(set(outside.rounds)) <= 1
    return deaths


@pytest.mark.parametrize("seed", range(6))
def test_again_and_again(tmp_path: Path, seed: int) -> None:
    rng, outside = Random(seed), Outside()
    life = converse(tmp_path / "db", outside, "retry")
    crashes = 0
    rows = None
    while rows is None:
        dies_at = rng.randint(1, 8) if crashes < 12 else 0
        rows = live(life, dies_at=dies_at, keeps_last=rng.random() < 0.5)
        crashes += rows is None
    check_end(rows, "retry", crashes=crashes)
    assert crashes >= 2


# On Ray, by SIGKILL.


class Witness:
    """A file that lines are added to, whole and at once; it outlives every process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, *words: object) -> None:
        """Add a line; its last word is the time, which all processes share."""
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, (" ".join(map(str, [*words, time.monotonic_ns()])) + "\n").encode())
        finally:
            os.close(fd)

    def times(self, kind: str) -> dict[str, list[int]]:
        """Return when each thing of one kind was done."""
        found: dict[str, list[int]] = {}
        for line in self._path.read_text().splitlines():
            first, name, at = line.split()
            if first == kind:
                found.setdefault(name, []).append(int(at))
        return found


def make_witnessed_model(witness: Witness) -> ScriptedModel:
    """Return a model that asks for two rounds of tools for each message, and tells."""

    def play(messages: Sequence[ModelMessage]) -> Reply:
        last_user = max(at for at, message in enumerate(messages) if message.role == "user")
        rounds = sum(message.role == "assistant" for message in messages[last_user:])
        name = messages[last_user].content
        witness.say("round", f"{name}/{rounds}")
        if rounds == 2:
            return Say(f"Done with {name}.")
        return [Say("One moment, please."), CallTool("note"), CallTool("note")]

    return ScriptedModel(play, tokens_per_second=400)


def make_note(witness: Witness) -> Tool:
    @tool
    async def note(ctx: ToolContext) -> str:
        """Tell that it ran."""
        witness.say("call", ctx.idempotency_key)
        return "noted"

    return note


SESSIONS, TURNS, KILLS = 8, 6, ("agent", "store", "both", "agent")


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
async def test_processes_that_are_killed_at_work(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "witness")
    async with connect(data_dir=tmp_path / "data") as db:
        agent = create_agent(
            durable_agent(
                name="echo", adapter=make_witnessed_model(witness), tools=[make_note(witness)]
            )
        )
        epochs = [(await agent.status())[0].epoch]
        said: dict[str, AgentMessage] = {}
        answered = asyncio.Semaphore(0)
        kills: list[int] = []

        async def talk(session: int) -> None:
            for turn in range(TURNS):
                name = f"{session}-{turn}"
                handle = agent.send(name, session=f"aidb://echo/{session}", message_id=name)
                said[name] = await handle.reply(timeout_ms=120_000)
                answered.release()

        talks = [asyncio.create_task(talk(session)) for session in range(SESSIONS)]
        for victim in KILLS:
            for _ in range(SESSIONS):
                await answered.acquire()
            for process in await db.processes():
                if victim in (process.kind, "both"):
                    os.kill(process.pid, signal.SIGKILL)
                    if process.kind == "agent":
                        kills.append(time.monotonic_ns())
            await until_serving(db)
            epochs.append((await agent.status())[0].epoch)
        await asyncio.gather(*talks)

        sessions = [db.session(f"aidb://echo/{session}") for session in range(SESSIONS)]
        messages: list[AgentMessage] = []
        generations: list[Generation] = []
        calls: list[ToolCall] = []
        for session in sessions:
            messages += await db.query(lambda q: q.from_(m=session.messages))  # noqa: B023
            calls += await db.query(lambda q: q.from_(c=session.tool_calls))  # noqa: B023
            found = await db.query(lambda q: q.from_(g=session.generations))  # noqa: B023
            for generation in found:
                await check_chunks(session, generation)
            generations += found

    assert epochs == sorted(epochs)
    assert len(set(epochs)) == 1 + sum(victim != "store" for victim in KILLS)
    check_replies(said, messages, generations)
    check_witness(witness, kills, generations, calls)


async def until_serving(db: Database) -> None:
    """Return once every process answers and has recovered."""
    async with asyncio.timeout(60):
        while True:
            if all(process.serving for process in await db.processes()):
                return
            await asyncio.sleep(0.05)


async def check_chunks(session: Session, generation: Generation) -> None:
    """The stream has ended, without a gap, with a marker where each later attempt begins."""
    chunks = [c async for c in replay(session.chunks, generation_id=generation.id)]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    for before, chunk in itertools.pairwise(chunks):
        assert (chunk.attempt > before.attempt) == (chunk.type == "CUSTOM")


def check_replies(
    said: dict[str, AgentMessage], messages: list[AgentMessage], generations: list[Generation]
) -> None:
    """Every message was answered exactly once, in its own generation."""
    asked = {message.id: message for message in messages if message.role == "user"}
    replies = [message for message in messages if message.role == "assistant"]
    assert len(asked) == len(said) == SESSIONS * TURNS
    assert {reply.in_reply_to for reply in replies} == asked.keys()
    assert len(replies) == len(asked) == len(generations)
    for reply in replies:
        name = str(reply.in_reply_to)
        assert reply.content == f"Done with {name}."
        assert said[name] == reply
        assert asked[name].generation_id == reply.generation_id
    assert all(message.processed for message in messages)
    assert {generation.status for generation in generations} == {"completed"}


def check_witness(
    witness: Witness, kills: list[int], generations: list[Generation], calls: list[ToolCall]
) -> None:
    """Everything was done, and twice only with a kill of the agent in between."""
    rounds, ran = witness.times("round"), witness.times("call")
    assert rounds.keys() == {f"{g.message_ids[0]}/{n}" for g in generations for n in range(3)}
    assert ran.keys() == {call.id for call in calls}
    assert len(calls) == 4 * len(generations)
    for times in (*rounds.values(), *ran.values()):
        for first, second in itertools.pairwise(times):
            assert any(first < kill < second for kill in kills), "repeated without a kill"
    for call in calls:
        assert call.status == "completed"
        assert len(ran[call.id]) <= call.attempt
    assert any(generation.attempt > 1 for generation in generations), "no kill met a generation"
