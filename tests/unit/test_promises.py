"""Promises of the specification that belong to no other file."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    AgentMessage,
    Collection,
    ConfigError,
    ConflictError,
    Database,
    Effect,
    History,
    ModelError,
    Ref,
    RequestedCall,
    Retry,
    Tool,
    ToolContext,
    ToolError,
    chat,
    connect,
    create_agent,
    create_generation_effect,
    create_tool_execution_effect,
    create_worker_agent,
    declare_tool,
    durable_agent,
    durable_chat,
    eq,
    make_async_tool,
    make_durable_tool,
    tool,
)
from aidb_ray.agents.run import GenerateContext
from aidb_ray.contracts import Usage
from aidb_ray.database.stores import Plan, check_shared_directory
from aidb_ray.expressions import Expression
from aidb_ray.models.base import Event, ModelMessage
from aidb_ray.query.builder import Query, QueryRoot
from aidb_ray.store.changes import Filter
from aidb_ray.store.claims import CLAIMS, decode_claim
from aidb_ray.testing import (
    CallTool,
    LoopClock,
    ScriptedModel,
    assert_rows,
    database,
    eventually,
)
from tests.stores import Process, open_store

URL = "aidb://desk/1"
SOON_MS = 20_000


class Text(BaseModel):
    text: str = ""


class Job(BaseModel):
    id: str
    name: str = "work"
    args: Any = None
    status: str = "pending"
    outcome: Any = None


class Listening(ScriptedModel):
    """A model that echoes, and keeps what it was asked with."""

    def __init__(self) -> None:
        super().__init__(lambda messages: f"You said {messages[-1].content}.")
        self.told: list[list[str]] = []
        self.read: list[list[str]] = []

    async def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        self.told.append(list(system_prompts))
        self.read.append([message.content for message in messages])
        async for event in super().stream(messages):
            yield event


work = declare_tool(name="work", description="Do it.", input_schema=Text)


@pytest.fixture
async def db() -> AsyncIterator[Database]:
    async with connect("local", durability="memory") as database:
        yield database


@pytest.fixture
def jobs(db: Database) -> Collection[Job]:
    return db.session(URL).collection("jobs", Job)


async def ask(agent: Agent, text: str) -> str:
    return (await agent.send(text, session=URL).reply(timeout_ms=SOON_MS)).content


def run_jobs(jobs: Collection[Job], function: Any, **options: Any) -> Effect:
    return create_tool_execution_effect(
        query=lambda q: q.from_(j=jobs).where(lambda j: eq(j.status, "pending")),
        tools=[work],
        implementations={"work": function},
        placement="here",
        **options,
    )


def generate_jobs(jobs: Collection[Job], generate: Any, **options: Any) -> Effect:
    given: dict[str, Any] = {"placement": "here", **options}
    return create_generation_effect(
        query=lambda q: q.from_(j=jobs).where(lambda j: eq(j.status, "pending")),
        generate=generate,
        **given,
    )


def give() -> str:
    return "given"


def make_loud(text: str) -> str:
    return text.upper()


def fail(text: str) -> None:
    raise ValueError("no luck")


def fail_to_generate(row: Job, ctx: ToolContext) -> str:
    raise ValueError("no luck")


# Agents.


async def test_what_is_inserted_into_its_messages_is_answered(db: Database) -> None:
    agent = create_agent(durable_agent(name="desk", adapter=Listening(), stream_url=URL))
    messages = agent.collections.messages
    await messages.insert(
        {"role": "user", "actor_id": "user-42", "target_agent": agent.name, "content": "hello"}
    )

    rows = await eventually(messages, lambda rows: len(rows) == 2, within_ms=SOON_MS)
    [asked, reply] = sorted(rows, key=lambda row: row.created_at)

    assert (asked.processed, reply.content) == (True, "You said hello.")
    assert (reply.in_reply_to, reply.actor_id) == (asked.id, agent.name)


async def test_instructions_reach_the_model(db: Database) -> None:
    model = Listening()
    agent = create_agent(durable_agent(name="desk", adapter=model, instructions="Be brief."))
    await ask(agent, "hello")

    assert model.told == [["Be brief."]]


async def test_instructions_reach_the_model_of_a_worker(db: Database) -> None:
    model = Listening()
    worker = create_worker_agent(
        name="worker", adapter=model, input_schema=Text, instructions="Be brief."
    )
    await worker.run(Text(text="hello"))

    assert model.told == [["Be brief."]]


async def test_history_bounds_what_the_model_reads(db: Database) -> None:
    model = Listening()
    agent = create_agent(durable_agent(name="desk", adapter=model, history=History(max_tokens=1)))
    await ask(agent, "one")
    await ask(agent, "two")

    assert model.read == [["one"], ["two"]]


async def test_generate_is_given_what_the_agent_was_made_of(
    db: Database, jobs: Collection[Job]
) -> None:
    given: list[GenerateContext[Job]] = []

    async def generate(ctx: GenerateContext[Job]) -> str:
        given.append(ctx)
        await asyncio.Event().wait()
        return ""

    model = Listening()
    done = tool(name="done")(fail)
    agent = create_agent(
        name="planner",
        adapter=model,
        tools=[done],
        pending_work=lambda q: q.from_(j=jobs).where(lambda j: eq(j.status, "pending")),
        build_messages=lambda pending, _: [{"role": "user", "content": pending[0].name}],
        generate=generate,
    )
    await agent.ready()
    await jobs.insert(Job(id="a"))
    async with asyncio.timeout(SOON_MS / 1000):
        while not given:  # noqa: ASYNC110  It tells no one.
            await asyncio.sleep(0)
        [ctx] = given
        assert not ctx.signal.is_aborted
        await agent.cancel(session=ctx.session)
        await ctx.signal.wait()

    assert (ctx.adapter, list(ctx.tools), ctx.session.url) == (model, [done], URL)
    assert (ctx.pending, [m.content for m in ctx.messages]) == ([Job(id="a")], ["work"])


async def test_an_agent_needs_a_connection() -> None:
    with pytest.raises(ConfigError) as raised:
        create_agent(durable_agent(name="desk", adapter=Listening()))

    assert raised.value.code == "not_connected"


async def test_dropping_the_handle_stops_nothing(db: Database) -> None:
    await create_agent(durable_agent(name="desk", adapter=Listening(), stream_url=URL)).ready()
    gc.collect()
    messages = db.session(URL).messages
    await messages.insert(
        AgentMessage(role="user", actor_id="u", target_agent="desk", content="still there?")
    )

    rows = await eventually(messages, lambda rows: len(rows) == 2, within_ms=SOON_MS)

    assert "You said still there?." in [row.content for row in rows]


async def test_a_worker_may_be_of_another_database(db: Database) -> None:
    async with connect("local", durability="memory"):
        worker = create_worker_agent(
            name="worker", adapter=Listening(), input_schema=Text, database=db
        )
        await worker.run(Text(text="hello"), run_id="r")

    assert [session.url for session in await db.sessions("aidb://worker/")] == ["aidb://worker/r"]


async def test_a_generation_adds_up_its_usage(db: Database) -> None:
    model = ScriptedModel([CallTool("give"), "Done."])
    agent = create_agent(durable_agent(name="desk", adapter=model, tools=[tool(give)]))
    await ask(agent, "hello")

    [generation] = await eventually(db.session(URL).generations, bool, within_ms=SOON_MS)

    # One message, then three; one part of a reply, then another.
    assert generation.usage == Usage(input_tokens=1 + 3, output_tokens=1 + 1, total_tokens=6)


# Chat and tools.


async def test_chat_tells_the_adapter_its_system_prompts() -> None:
    model = Listening()
    messages = [ModelMessage("user", "hello")]
    await chat(adapter=model, messages=messages, system_prompts=["Be brief.", "Be kind."],
               stream=False)  # fmt: skip

    assert model.told == [["Be brief.", "Be kind."]]


def test_a_tool_may_be_described_where_it_is_made() -> None:
    assert tool(description="Fail, always.")(fail).description == "Fail, always."


async def test_results_of_a_declared_tool_are_checked() -> None:
    declared = declare_tool(
        name="work", description="", input_schema=Text, output_schema=Text, max_result_bytes=40
    )

    async def echo(text: str) -> Any:
        return Text(text=text) if text else 5

    codes: list[str] = []
    for text in ("", "x" * 40):
        with pytest.raises(ToolError) as raised:
            await declared.with_implementation(echo).call({"text": text})
        codes.append(raised.value.code)

    assert await declared.with_implementation(echo).call({"text": "a"}) == {"text": "a"}
    assert codes == ["invalid_result", "result_too_large"]


async def test_the_log_of_a_call_names_it(
    jobs: Collection[Job], caplog: pytest.LogCaptureFixture
) -> None:
    async def tell(text: str, ctx: ToolContext) -> None:
        ctx.log.warning("half way")

    def end(row: Job, result: Any) -> None:
        jobs.update(row.id, {"status": "completed"})

    async with run_jobs(jobs, tell, on_executing=do_nothing, on_complete=end):
        await jobs.insert(Job(id="a", args={}))
        await eventually(jobs, lambda rows: rows[0].status == "completed", within_ms=SOON_MS)

    [record] = [record for record in caplog.records if record.getMessage() == "half way"]
    where = vars(record)
    assert (where["session"], where["key"], where["attempt"]) == (URL, "a", 1)


def do_nothing(*_: Any) -> None:
    return None


async def test_a_durable_chat_gives_up_a_model_that_falls_silent(db: Database) -> None:
    async def hang(messages: Sequence[ModelMessage]) -> str:
        await asyncio.Event().wait()
        return ""

    with pytest.raises(ModelError) as raised:
        async with asyncio.timeout(SOON_MS / 1000):
            await durable_chat(
                adapter=ScriptedModel(hang),
                messages=[ModelMessage("user", "hello")],
                generation_id="g",
                session=URL,
                idle_timeout_ms=20,
                retry=Retry(max_attempts=1),
            )

    assert raised.value.code == "idle_timeout"


async def test_a_durable_chat_refuses_a_wrong_word_for_doubt(db: Database) -> None:
    with pytest.raises(ConfigError) as raised:
        await durable_chat(
            adapter=Listening(),
            messages=[ModelMessage("user", "hello")],
            generation_id="g",
            session=URL,
            on_in_doubt=cast("Any", "guess"),
        )

    assert raised.value.code == "invalid_option"
    assert await db.sessions() == []


# Durable tools and effects.


async def test_one_tool_takes_what_a_list_takes(jobs: Collection[Job]) -> None:
    def make(call: RequestedCall, generation_id: str) -> Job:
        return Job(id=call.id, name=call.name, args=call.args)

    def end(row: Job, result: Any) -> None:
        jobs.update(row.id, {"status": "over", "outcome": result})

    durable = make_durable_tool(
        work,
        jobs,
        transform=make,
        is_complete=lambda job: job.status == "over",
        get_result=lambda job: job.outcome,
    )
    async with run_jobs(jobs, make_loud, on_executing=do_nothing, on_complete=end):
        context = ToolContext(idempotency_key="k", generation_id="g")
        assert await durable.call({"text": "salt"}, context) == "SALT"


async def test_the_row_of_a_job_may_be_of_ones_own_making(jobs: Collection[Job]) -> None:
    def make(call: RequestedCall, generation_id: str) -> Job:
        return Job(id=f"own-{generation_id}", name=call.name, args=call.args, status="queued")

    job = make_async_tool(work, jobs, transform=make)

    handle = await job.call({"text": "a"}, ToolContext(idempotency_key="k", generation_id="g"))

    row = await jobs.find(handle["job_id"])
    assert row == Job(id="own-g", args={"text": "a"}, status="queued")


async def test_on_error_says_what_a_row_becomes(jobs: Collection[Job]) -> None:
    def give_up(row: Job, error: Exception) -> None:
        jobs.update(row.id, {"status": "given up", "outcome": str(error)})

    async with run_jobs(jobs, fail, on_executing=do_nothing, on_error=give_up):
        await jobs.insert(Job(id="a", args={"text": "x"}))
        [row] = await eventually(jobs, lambda rows: rows[0].status != "pending", within_ms=SOON_MS)

    assert row.status == "given up"
    assert "no luck" in row.outcome


async def test_on_error_says_what_a_request_becomes(jobs: Collection[Job]) -> None:
    order: list[str] = []

    def begin(row: Job) -> None:
        order.append("begun")

    def give_up(row: Job, error: Exception) -> None:
        order.append("given up")
        jobs.update(row.id, {"status": "given up", "outcome": str(error)})

    async with generate_jobs(jobs, fail_to_generate, on_executing=begin, on_error=give_up):
        await jobs.insert(Job(id="a"))
        [row] = await eventually(jobs, lambda rows: rows[0].status != "pending", within_ms=SOON_MS)

    assert (row.status, order) == ("given up", ["begun", "given up"])
    assert "no luck" in row.outcome


async def test_a_request_has_a_bound(jobs: Collection[Job]) -> None:
    async def hang(row: Job, ctx: ToolContext) -> None:
        await asyncio.Event().wait()

    def give_up(row: Job, error: Any) -> None:
        jobs.update(row.id, {"status": "given up", "outcome": error.code})

    async with generate_jobs(jobs, hang, timeout_ms=20, on_executing=do_nothing, on_error=give_up):
        await jobs.insert(Job(id="a"))
        [row] = await eventually(jobs, lambda rows: rows[0].status != "pending", within_ms=SOON_MS)

    assert row.outcome == "timeout"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": "a/b"}, "invalid_name"),
        ({"max_running": 0}, "invalid_bound"),
        ({"lease_ms": 0}, "invalid_bound"),
        ({"timeout_ms": 0}, "invalid_bound"),
        ({"grace_ms": -1}, "invalid_bound"),
        ({"late_results": "keep"}, "invalid_option"),
        ({"on_in_doubt": "guess"}, "invalid_option"),
        ({"placement": "there"}, "invalid_option"),
        ({"processes": 2}, "invalid_option"),
    ],
)
async def test_a_generation_effect_is_checked_like_an_executor(
    jobs: Collection[Job], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        generate_jobs(jobs, fail_to_generate, **options)

    assert raised.value.code == code


async def test_a_generation_effect_takes_what_an_executor_takes(db: Database) -> None:
    jobs = db.session(URL).collection("jobs", Job)
    options: dict[str, Any] = {
        "name": "texts",
        "on_executing": do_nothing,
        "on_complete": do_nothing,
        "on_error": do_nothing,
        "is_complete": do_nothing,
        "max_running": 3,
        "lease_ms": 4_000,
        "timeout_ms": 5_000,
        "grace_ms": 6,
        "retry": Retry(max_attempts=7),
        "late_results": "mark",
        "on_in_doubt": "park",
        "placement": "actor",
        "processes": 8,
        "version": "9",
        "ray_options": {"num_cpus": 0.5},
    }
    takes = inspect.signature(create_tool_execution_effect).parameters.keys()
    assert takes - {"query", "tools", "implementations", "database"} == options.keys()
    async with connect("local", durability="memory"):
        effect = generate_jobs(jobs, fail_to_generate, database=db, **options)
        definition = effect._definition
        assert effect in db._effects
        await effect.aclose()

    assert {name: getattr(definition, name) for name in options} == options


async def test_a_row_is_claimed_before_on_executing(db: Database, jobs: Collection[Job]) -> None:
    states: list[str] = []

    async def look(row: Job) -> None:
        _, rows = await db.site_of(URL).client.read(Filter(CLAIMS, URL))
        states.extend(record.state for each in rows if (record := decode_claim(each.value)))

    def end(row: Job, result: Any) -> None:
        jobs.update(row.id, {"status": "over"})

    async with run_jobs(jobs, make_loud, on_executing=look, on_complete=end):
        await jobs.insert(Job(id="a", args={"text": "x"}))
        await eventually(jobs, lambda rows: rows[0].status == "over", within_ms=SOON_MS)

    assert states == ["held"]


async def test_an_effect_has_the_name_that_it_is_given(jobs: Collection[Job]) -> None:
    async with run_jobs(jobs, fail, name="warehouse") as effect:
        [status] = await effect.status()

    assert status.name == "warehouse"


async def test_is_complete_says_what_has_ended(jobs: Collection[Job]) -> None:
    """A row that matches is left alone when the function says that it has ended."""

    def has_outcome(row: Job) -> bool:
        return row.outcome is not None

    def end(row: Job, result: Any) -> None:
        jobs.update(row.id, {"outcome": result})

    async with run_jobs(
        jobs,
        make_loud,
        on_executing=do_nothing,
        on_complete=end,
        is_complete=has_outcome,
    ):
        await jobs.insert(
            [Job(id="a", args={"text": "x"}, outcome="by hand"), Job(id="b", args={"text": "y"})]
        )
        rows = await eventually(jobs, lambda rows: rows[1].outcome is not None, within_ms=SOON_MS)

    assert [row.outcome for row in rows] == ["by hand", "Y"]


async def test_closing_waits_for_a_thread_only_so_long(
    jobs: Collection[Job], caplog: pytest.LogCaptureFixture
) -> None:
    entered, may_return = threading.Event(), threading.Event()

    def hang(text: str) -> None:
        entered.set()
        may_return.wait()

    effect = run_jobs(jobs, hang, on_executing=do_nothing, grace_ms=20)
    await jobs.insert(Job(id="a", args={"text": "x"}))
    await asyncio.to_thread(entered.wait)
    try:
        async with asyncio.timeout(SOON_MS / 1000):
            await effect.aclose()
    finally:
        may_return.set()

    assert "does not return" in caplog.text


# Databases, rows and queries.


async def test_store_options_reach_the_store(tmp_path: Path) -> None:
    async def segments(name: str, **options: int) -> int:
        async with connect("local", data_dir=tmp_path, database=name, store_options=options) as db:
            for number in range(4):
                await db.collection("rows").insert({"id": str(number), "text": "x" * 4_000})
        return len(list((tmp_path / name / "p0" / "log").glob("seg-*.log")))

    assert await segments("whole", reserve_bytes=0) == 1
    assert await segments("cut", reserve_bytes=0, segment_bytes=4_096) > 1


def test_a_relative_directory_is_refused_on_an_existing_cluster() -> None:
    plan = Plan("auto", Path("rows"), "default", 1, "local", {})
    with pytest.raises(ConfigError) as raised:
        check_shared_directory(plan)

    assert raised.value.code == "relative_data_dir"


async def test_a_row_is_deleted_only_if_the_condition_holds(tmp_path: Path) -> None:
    async with open_store(tmp_path) as store:
        rows = Process(store).collection("rows")
        await rows.insert({"id": "a", "open": True})

        with pytest.raises(ConflictError) as raised:
            await rows.delete("a", when=lambda r: eq(r.open, False))
        assert (raised.value.code, raised.value.current) == (
            "condition_failed",
            {"id": "a", "open": True},
        )
        await rows.delete("a", when=lambda r: eq(r.open, True))
        assert await rows.find("a") is None


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        ("inner_join", [("t1", "ann")]),
        ("left_join", [("t1", "ann"), ("t2", None)]),
        ("right_join", [(None, "bob"), ("t1", "ann")]),
        ("full_join", [(None, "bob"), ("t1", "ann"), ("t2", None)]),
    ],
)
async def test_each_kind_of_join_has_a_name_of_its_own(
    db: Database, kind: str, pairs: list[Any]
) -> None:
    tasks, users = db.session(URL).collection("tasks"), db.session(URL).collection("users")
    await tasks.insert([{"id": "t1", "by": "ann"}, {"id": "t2", "by": "cem"}])
    await users.insert([{"id": "ann"}, {"id": "bob"}])

    def are_partners(t: Ref, u: Ref) -> Expression:
        return eq(t.by, u.id)

    def joined(q: QueryRoot) -> Query[Any]:
        return getattr(q.from_(t=tasks), kind)(u=users, on=are_partners)

    found = await db.query(joined)

    def key(row: Any) -> Any:
        return row and row["id"]

    assert sorted(((key(row["t"]), key(row["u"])) for row in found), key=str) == sorted(
        pairs, key=str
    )


# Time.


async def test_the_time_of_the_loop_goes_on() -> None:
    clock = LoopClock()
    before = clock.now_ms()
    await clock.sleep_ms(5)

    assert clock.now_ms() >= before + 4


# Testing.


async def test_assertions_may_be_on_another_database(db: Database) -> None:
    rows = db.session(URL).collection("rows")
    await rows.insert({"id": "a"})

    def question(q: QueryRoot) -> Query[Any]:
        return q.from_(r=rows)

    async with connect("local", durability="memory"):
        await assert_rows(question, [{"id": "a"}], database=db)
        [row] = await eventually(question, bool, database=db)

    assert row == {"id": "a"}


async def test_a_database_for_a_test_takes_options() -> None:
    async with database(partitions=2) as db:
        assert len(await db.status()) == 2
