"""Agents that ask other agents, by message rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    AgentMessage,
    AgentTool,
    CancelRequest,
    ConfigError,
    Database,
    Generation,
    ModelError,
    RunCancelledError,
    connect,
    create_agent,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.agents.definition import AgentDefinition
from aidb_ray.agents.delegation import MAX_DEPTH, MAX_FAN_OUT, Delegate, make_request
from aidb_ray.errors import ToolError
from aidb_ray.models.base import ModelMessage, ToolCallRequest
from aidb_ray.models.tools import declare_tool
from aidb_ray.query.builder import QueryRoot
from aidb_ray.store.collection import Collection
from aidb_ray.testing import CallTool, Reply, ScriptedModel
from tests.stores import until

URL = "aidb://brief/1"
EVERY = "aidb://brief/*"
SOON_MS = 20_000
Play = Callable[[Sequence[ModelMessage]], Reply | Awaitable[Reply]]


class Depth(BaseModel):
    message: str
    depth: int = 3


class Facts(BaseModel):
    facts: list[str]


class Filled(BaseModel):
    response: str


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


def told(messages: Sequence[ModelMessage]) -> list[str]:
    """Return what calls came to since the newest message of a user."""
    last_user = max(at for at, message in enumerate(messages) if message.role == "user")
    return [message.content for message in messages[last_user:] if message.role == "tool"]


def asks(*requests: CallTool) -> Callable[[Sequence[ModelMessage]], Reply]:
    """Return a model that asks for these calls, then says what it was told."""

    def play(messages: Sequence[ModelMessage]) -> Reply:
        answers = told(messages)
        return " ".join(answers) if answers else list(requests)

    return play


def says(prefix: str) -> Play:
    return lambda messages: f"{prefix}: {messages[-1].content}"


def call(name: str, message: str = "go", **fields: Any) -> CallTool:
    return CallTool(name, {"message": message, **fields})


def define(name: str, play: Play, *agents: AgentTool, **options: Any) -> AgentDefinition:
    given: dict[str, Any] = {"stream_url": EVERY, **options}
    return durable_agent(name=name, adapter=ScriptedModel(play), agents=agents, **given)


async def start(name: str, play: Play, *agents: AgentTool | Agent, **options: Any) -> Agent:
    tools = [AgentTool(each) if isinstance(each, Agent) else each for each in agents]
    agent = create_agent(define(name, play, *tools, **options))
    await agent.ready()
    return agent


async def ask(agent: Agent, text: str = "go", **options: Any) -> str:
    handle = agent.send(text, session=URL, **options)
    return (await handle.reply(timeout_ms=SOON_MS)).content


async def rows(db: Database, name: str) -> list[Any]:
    source: Collection[Any] = getattr(db.session(URL), name)
    return await db.query(lambda q: q.from_(r=source).order_by(lambda r: r.created_at))


async def requests_to(db: Database, agent: str, count: int = 1) -> list[AgentMessage]:
    """Return the open requests to an agent once there are so many."""
    messages = db.session(URL).messages
    async with db.live_query(
        lambda q: q.from_(m=messages).where(lambda m: eq(m.target_agent, agent))
    ) as live:
        await until(
            lambda: (
                live.is_ready
                and sum(not m.processed and m.request_id is not None for m in live.rows) == count
            )
        )
        return [m for m in live.rows if not m.processed and m.request_id is not None]


class Door:
    """A model that waits until it may answer."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.was_asked = asyncio.Event()

    async def __call__(self, messages: Sequence[ModelMessage]) -> Reply:
        self.was_asked.set()
        await self.open.wait()
        return f"heard {messages[-1].content}"


# The way of a request.


async def test_a_brief_of_three_agents(db: Database) -> None:
    def plan(messages: Sequence[ModelMessage]) -> Reply:
        match told(messages):
            case []:
                return ["Let me see. ", call("researcher", "lithium")]
            case [facts]:
                return call("writer", facts)
            case [_, text]:
                return text
            case answers:
                raise AssertionError(answers)

    researcher = await start("researcher", says("Facts"))
    writer = await start("writer", says("Text"))
    planner = await start("planner", plan, researcher, writer)

    assert await ask(planner, "brief", message_id="m") == "Text: Facts: lithium"

    asked, first, second, third, fourth, reply = await rows(db, "messages")
    generations: list[Generation] = await rows(db, "generations")
    mine = next(g for g in generations if g.agent == "planner")
    for request, answer, name, number in (
        (first, second, "researcher", 0),
        (third, fourth, "writer", 1),
    ):
        assert request.id == request.request_id == f"{mine.id}:{number}:0"
        assert (request.role, request.actor_id, request.target_agent) == ("user", "planner", name)
        assert (request.path, request.processed) == (["planner"], True)
        assert (answer.role, answer.actor_id, answer.target_agent) == (
            "assistant",
            name,
            "planner",
        )
        assert answer.request_id == answer.in_reply_to == request.id
        assert answer.processed
        assert request.generation_id == answer.generation_id != mine.id
    assert (asked.id, reply.in_reply_to, reply.request_id) == ("m", "m", None)
    assert await rows(db, "tool_calls") == [], "it would be recorded twice"
    assert [(g.status, g.attempt, g.interruptions) for g in generations] == [
        ("completed", 1, 0)
    ] * 3


async def test_each_sees_the_conversation_as_its_own(db: Database) -> None:
    seen: dict[str, list[tuple[str, str]]] = {}

    def noted(name: str, play: Play) -> Play:
        def noting(messages: Sequence[ModelMessage]) -> Reply | Awaitable[Reply]:
            seen[name] = [(message.role, message.content) for message in messages]
            return play(messages)

        return noting

    helper = await start("helper", noted("helper", says("Yes")))
    boss = await start("boss", noted("boss", asks(call("helper", "may I?"))), helper)
    await ask(boss, "one")
    await ask(boss, "two")
    await ask(helper, "hello")

    assert seen["boss"] == [
        ("user", "one"),
        ("assistant", ""),
        ("tool", "Yes: may I?"),
        ("assistant", "Yes: may I?"),
        ("user", "two"),
        ("assistant", ""),
        ("tool", "Yes: may I?"),
    ]
    assert seen["helper"] == [
        ("user", "may I?"),
        ("assistant", "Yes: may I?"),
        ("user", "may I?"),
        ("assistant", "Yes: may I?"),
        ("user", "hello"),
    ]


async def test_agents_and_tools_of_one_round_go_at_once(db: Database) -> None:
    @tool
    def look() -> str:
        """Look."""
        return "seen"

    door = Door()
    helper = await start("helper", door)
    play = asks(call("helper", "a"), CallTool("look"), call("helper", "b"))
    boss = await start("boss", play, helper, tools=[look])
    handle = boss.send("go", session=URL)
    await requests_to(db, "helper", 2)
    assert not (await boss.drain_until_idle(max_duration_ms=30, headroom_ms=0)).completed
    assert (await boss.status())[0].running == 0
    door.open.set()

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "heard a seen heard b"
    assert (await boss.drain_until_idle()).completed
    by_helper = [g for g in await rows(db, "generations") if g.agent == "helper"]
    assert [len(g.message_ids) for g in by_helper] == [1, 1]


async def test_requests_are_answered_alone_and_other_messages_together(db: Database) -> None:
    door = Door()
    helper = await start("helper", door)
    boss = await start("boss", asks(call("helper", "a")), helper)
    helper.send("first", session=URL, message_id="1")
    await door.was_asked.wait()
    handle = boss.send("go", session=URL)
    await requests_to(db, "helper")
    for number in (2, 3):
        sent = helper.send("later", session=URL, message_id=str(number)).sent
        assert sent is not None
        await sent
    door.open.set()

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "heard a"
    assert (await helper.drain_until_idle()).completed
    answered = [g.message_ids for g in await rows(db, "generations") if g.agent == "helper"]
    assert [len(ids) for ids in answered] == [1, 1, 2]
    assert (answered[0], answered[2]) == (["1"], ["2", "3"])


@pytest.mark.parametrize(
    ("reply", "output", "result"),
    [
        ('{"facts": ["a"]}', Facts, '{"facts":["a"]}'),
        ("words", Filled, '{"response":"words"}'),
        ("words", None, "words"),
        ("words", Facts, "invalid_result"),
        ('{"facts": [], "facts": ["a"]}', Facts, "invalid_result"),
    ],
)
async def test_input_and_output_have_schemas(
    db: Database, reply: str, output: type[BaseModel] | None, result: str
) -> None:
    helper = await start("helper", lambda _: reply)
    asking = AgentTool(helper, "Help.", input_schema=Depth, output_schema=output)
    boss = await start("boss", asks(call("helper", "a", depth=2)), asking)

    assert result in await ask(boss)
    [_, request, *_] = await rows(db, "messages")
    assert request.content == '{"message":"a","depth":2}'


async def test_what_does_not_fit_asks_nobody(db: Database) -> None:
    helper = await start("helper", says("Yes"))
    boss = await start("boss", asks(call("helper", depth=3)), helper)

    assert "invalid_args" in await ask(boss)

    [failed] = await rows(db, "tool_calls")
    assert (failed.name, failed.status, failed.error_code) == ("helper", "failed", "invalid_args")
    assert len(await rows(db, "messages")) == 2


# When it ends otherwise.


def fails(_: Sequence[ModelMessage]) -> Reply:
    return ModelError("No key.", retryable=False, code="bad_key")


async def test_a_request_that_fails_is_answered_with_the_error(db: Database) -> None:
    helper = await start("helper", fails)
    boss = await start("boss", asks(call("helper")), helper)

    assert await ask(boss) == '{"error":"bad_key","message":"No key."}'

    [_, request, answer, _] = await rows(db, "messages")
    assert (answer.error_code, answer.content) == ("bad_key", "No key.")
    assert answer.in_reply_to == request.id
    assert request.processed


async def test_an_error_is_no_part_of_what_was_said(db: Database) -> None:
    replies: list[Reply] = [fails([]), "Better now."]
    seen: list[list[tuple[str, str]]] = []

    def play(messages: Sequence[ModelMessage]) -> Reply:
        seen.append([(message.role, message.content) for message in messages])
        return replies.pop(0)

    helper = await start("helper", play)
    boss = await start("boss", asks(call("helper", "a")), helper)
    await ask(boss)
    await ask(boss)

    assert seen[1] == [("user", "a"), ("user", "a")]


async def test_a_request_that_is_cancelled_is_answered_so(db: Database) -> None:
    door = Door()
    helper = await start("helper", door)
    boss = await start("boss", asks(call("helper")), helper)
    handle = boss.send("go", session=URL)
    await door.was_asked.wait()

    await helper.cancel(session=URL, reason="enough")

    content = (await handle.reply(timeout_ms=SOON_MS)).content
    assert content == '{"error":"cancelled","message":"enough"}'


async def test_a_cancel_goes_all_the_way_down_and_nowhere_else(db: Database) -> None:
    door = Door()
    digger = await start("digger", door)
    helper = await start("helper", asks(call("digger")), digger)
    boss = await start("boss", asks(call("helper", "a"), call("helper", "b")), helper)
    handle = boss.send("go", session=URL)
    await door.was_asked.wait()
    bystander = helper.send("hello", session=URL)
    assert bystander.sent is not None
    await bystander.sent

    await boss.cancel(session=URL, reason="enough")

    with pytest.raises(RunCancelledError):
        await handle.reply(timeout_ms=SOON_MS)
    # Two of the helper, of which one was only waiting, and the digger's first.
    replies = db.session(URL).messages
    async with db.live_query(
        lambda q: q.from_(m=replies).where(lambda m: eq(m.error_code, "cancelled"))
    ) as live:
        await until(lambda: live.is_ready and len(live.rows) == 3)
    door.open.set()
    assert (await bystander.reply(timeout_ms=SOON_MS)).content == "heard go"
    for agent in (boss, helper, digger):
        assert (await agent.drain_until_idle()).completed
    messages: list[AgentMessage] = await rows(db, "messages")
    assert all(message.processed for message in messages)
    assert sum(m.error_code is not None for m in messages) == 3
    requests = {m.id for m in messages if m.request_id == m.id}
    answers = [m.in_reply_to for m in messages if m.request_id not in (None, m.id)]
    assert sorted(map(str, answers)) == sorted(requests)
    cancels: list[CancelRequest] = await rows(db, "cancel_requests")
    assert all(cancel.done for cancel in cancels)
    assert [c.reason for c in cancels if c.agent == "digger"] == ["helper: boss: enough"]


async def test_a_cancel_of_one_message_ends_nothing_else(db: Database) -> None:
    door = Door()
    agent = await start("helper", door)
    first = agent.send("one", session=URL, message_id="1")
    await door.was_asked.wait()
    second = agent.send("two", session=URL, message_id="2", request_id="2")
    third = agent.send("three", session=URL, message_id="3")
    for handle in (second, third):
        assert handle.sent is not None
        await handle.sent
    cancel = CancelRequest(agent="helper", message_id="2", reason="enough")
    await db.session(URL).cancel_requests.insert(cancel)
    client = db.partitions[0].client
    await client.feed.reached((await client.status()).revision)
    door.open.set()

    with pytest.raises(RunCancelledError):
        await second.reply(timeout_ms=SOON_MS)
    assert (await first.reply(timeout_ms=SOON_MS)).content == "heard one"
    assert (await third.reply(timeout_ms=SOON_MS)).content == "heard three"


async def test_a_cancel_of_what_waits_leaves_what_is_parked_alone(db: Database) -> None:
    """A generation that waits for others goes on waiting while another message is cancelled."""

    class To(BaseModel):
        to: str

    send = declare_tool(name="send", description="Send.", input_schema=To)
    agent = await start("helper", asks(CallTool("send", {"to": "ann"})), tools=[send])
    first = agent.send("one", session=URL, message_id="1")
    calls = db.session(URL).tool_calls
    async with db.live_query(lambda q: q.from_(c=calls)) as live:
        await until(lambda: live.is_ready and len(live.rows) == 1)
        [waits] = live.rows
    second = agent.send("two", session=URL, message_id="2")
    assert second.sent is not None
    await second.sent
    await db.session(URL).cancel_requests.insert(CancelRequest(agent="helper", message_id="2"))

    with pytest.raises(RunCancelledError):
        await second.reply(timeout_ms=SOON_MS)
    await calls.update(waits.id, {"status": "completed", "result": "sent"})
    assert (await first.reply(timeout_ms=SOON_MS)).content == "sent"


# Bounds.


def test_cycles_are_refused_where_they_show() -> None:
    reader = define("reader", says("Yes"), AgentTool("writer"))
    planner = define("planner", says("Yes"), AgentTool(reader))

    for name, agents in (
        ("writer", [AgentTool(reader)]),
        ("writer", [AgentTool(planner)]),
        ("writer", [AgentTool("writer")]),
    ):
        with pytest.raises(ConfigError) as raised:
            define(name, says("Yes"), *agents)
        assert raised.value.code == "delegation_cycle"


async def test_a_cycle_that_did_not_show_is_an_answer(db: Database) -> None:
    await start("writer", asks(call("planner")), AgentTool("planner"))
    planner = await start("planner", asks(call("writer")), AgentTool("writer"))

    answer = await ask(planner)

    assert "delegation_cycle" in answer
    assert len(await rows(db, "messages")) == 4


async def test_agents_do_not_wait_for_one_another_from_two_ends(db: Database) -> None:
    """Neither path shows it: each was asked by a user, and each would ask the other."""
    door = asyncio.Event()

    async def slow(messages: Sequence[ModelMessage]) -> Reply:
        await door.wait()
        return asks(call("planner"))(messages)

    writer = await start("writer", slow, AgentTool("planner"))
    planner = await start("planner", asks(call("writer")), AgentTool("writer"))
    first = writer.send("go", session=URL)
    assert first.sent is not None
    await first.sent
    second = planner.send("go", session=URL)
    await requests_to(db, "writer")
    client = db.partitions[0].client
    await client.feed.reached((await client.status()).revision)
    door.set()

    assert "delegation_cycle" in (await first.reply(timeout_ms=SOON_MS)).content
    await second.reply(timeout_ms=SOON_MS)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
async def test_of_agents_that_ask_one_another_at_once_one_takes_it_back(
    db: Database, names: tuple[str, ...]
) -> None:
    """None of them can know of the others' requests when it makes its own."""
    door = asyncio.Event()
    thinking = 0

    def after_the_door(name: str) -> Play:
        async def play(messages: Sequence[ModelMessage]) -> Reply:
            nonlocal thinking
            thinking += 1
            await door.wait()
            return asks(call(name))(messages)

        return play

    agents = [
        await start(name, after_the_door(names[index - 1]), AgentTool(names[index - 1]))
        for index, name in enumerate(names)
    ]
    handles = [agent.send("go", session=URL) for agent in agents]
    await until(lambda: thinking == len(names))
    door.set()
    replies = [(await handle.reply(timeout_ms=SOON_MS)).content for handle in handles]

    messages: list[AgentMessage] = await rows(db, "messages")
    taken_back = [message for message in messages if message.error_code == "delegation_cycle"]
    assert len(taken_back) == 1
    assert all("delegation_cycle" in reply for reply in replies)
    assert all(message.processed for message in messages)


async def test_depth_has_a_bound(db: Database) -> None:
    agents = [await start("a0", says("Bottom"))]
    for number in range(1, MAX_DEPTH + 2):
        below = agents[-1]
        agents.append(await start(f"a{number}", asks(call(below.name)), below))

    assert await ask(agents[MAX_DEPTH]) == "Bottom: go"
    assert "delegation_limit" in await ask(agents[MAX_DEPTH + 1])


async def test_fan_out_has_a_bound(db: Database) -> None:
    helper = await start("helper", says("Yes"))
    many = [call("helper", str(number)) for number in range(MAX_FAN_OUT + 2)]
    boss = await start("boss", asks(*many), helper)

    content = await ask(boss)

    assert content.count("Yes: ") == MAX_FAN_OUT
    assert content.count("delegation_limit") == 2


@pytest.mark.parametrize(
    ("agent", "options", "code"),
    [
        (define("helper", says("Yes"), stream_url="aidb://other/*"), {}, "foreign_session"),
        (define("helper", says("Yes"), stream_url=URL), {}, "foreign_session"),
        ("helper", {"tools": [tool(name="helper")(lambda: 1)]}, "duplicate_tool"),
        ("no.tool", {}, "invalid_name"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(
    agent: AgentDefinition | str, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        define("boss", says("Yes"), AgentTool(agent), **options)
    assert raised.value.code == code


async def test_an_agent_over_rows_of_the_user_s_own_can_neither_ask_nor_be_asked(
    db: Database,
) -> None:
    tasks = db.collection("tasks", session=URL)

    def pending(q: QueryRoot) -> Any:
        return q.from_(t=tasks)

    def generate(_: Any) -> str:
        return "done"

    given: dict[str, Any] = {"name": "raw", "pending_work": pending, "generate": generate}
    with pytest.raises(ConfigError) as raised:
        create_agent(**given, agents=(AgentTool("helper").to_delegate(),))
    assert raised.value.code == "invalid_option"
    raw = create_agent(**given)
    with pytest.raises(ConfigError) as raised:
        define("boss", says("Yes"), AgentTool(raw))
    assert raised.value.code == "invalid_option"


def test_whom_it_may_ask_is_part_of_what_an_agent_is() -> None:
    plain = define("boss", says("Yes"), AgentTool("helper", "Help."))

    assert (
        plain.fingerprint()
        == define("boss", says("Yes"), AgentTool("helper", "Help.")).fingerprint()
    )
    for other in (AgentTool("helper", "Else."), AgentTool("helper", "Help.", Depth)):
        assert plain.fingerprint() != define("boss", says("Yes"), other).fingerprint()


def delegate(**schemas: Any) -> Delegate:
    return AgentTool("helper", **schemas).to_delegate()


def test_who_waits_is_not_asked_even_if_its_request_is_gone() -> None:
    with pytest.raises(ToolError) as raised:
        make_request(
            delegate(),
            ToolCallRequest("c", "helper", '{"message": "hi"}'),
            "g:0:0",
            generation_id="g",
            agent="boss",
            path=["helper", "other"],
            number=0,
            waits={},
            now="",
        )
    assert raised.value.code == "delegation_cycle"


def test_what_was_asked_can_be_told_from_the_message() -> None:
    plain, deep = delegate(), delegate(input_schema=Depth)

    assert plain.content_of('{"message": "hi"}') == "hi"
    assert plain.args_of("hi") == '{"message":"hi"}'
    content = deep.content_of('{"message": "hi", "depth": 2}')
    assert deep.args_of(content) == content == '{"message":"hi","depth":2}'
    assert deep.args_of("asked under another schema") == '{"message":"asked under another schema"}'
    for wrong in ('{"message": 3}', "no JSON", '{"message": "hi", "more": 1}'):
        with pytest.raises(ToolError, match=r"helper") as raised:
            plain.content_of(wrong)
        assert raised.value.code == "invalid_args"


# Restarts.


async def test_either_side_may_restart_meanwhile(db: Database) -> None:
    doors = [Door(), Door()]
    helper = await start("helper", doors[0])
    boss = await start("boss", asks(call("helper")), AgentTool("helper"))
    boss.send("go", session=URL, message_id="m")
    await doors[0].was_asked.wait()

    await boss.aclose()
    await helper.aclose()
    boss = await start("boss", asks(call("helper")), AgentTool("helper"))
    assert (await boss.status())[0].running == 0
    await boss.aclose()
    helper = await start("helper", doors[1])
    doors[1].open.set()
    assert (await helper.drain_until_idle()).completed
    boss = await start("boss", asks(call("helper")), AgentTool("helper"))

    reply = await boss.reply_to("m", session=URL).reply(timeout_ms=SOON_MS)
    assert reply.content == "heard go"
    by_agent = {g.agent: g for g in await rows(db, "generations")}
    assert (by_agent["boss"].attempt, by_agent["boss"].interruptions) == (1, 0)
    assert (by_agent["helper"].attempt, by_agent["helper"].interruptions) == (2, 1)
    assert len(await rows(db, "messages")) == 4


async def test_a_reply_that_comes_while_the_feed_is_lost_is_seen(db: Database) -> None:
    """Also if the agent was at work on another call then, and so was not waiting yet."""
    looks, door = asyncio.Event(), asyncio.Event()

    @tool
    async def look() -> str:
        """Look, for long."""
        looks.set()
        await door.wait()
        return "seen"

    play = asks(call("helper"), CallTool("look"))
    boss = await start("boss", play, AgentTool("helper"), tools=[look])
    handle = boss.send("go", session=URL)
    await looks.wait()
    other = Database(db.name, db._refs, data_dir=db.data_dir, cluster=None)
    feed = db.partitions[0].client.feed
    feed._generation = "of another store"
    helper = create_agent(define("helper", says("Yes")), database=other)
    assert (await helper.drain_until_idle()).completed
    client = db.partitions[0].client
    await client.feed.reached((await client.status()).revision)
    door.set()

    assert (await handle.reply(timeout_ms=SOON_MS)).content == "Yes: go seen"
    await helper.aclose()
    for partition in other.partitions:
        await partition.aclose()
