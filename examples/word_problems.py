"""Solves word problems with an agent and a calculator, one durable conversation each.

    python -m examples.word_problems                           the problems that come with it
    python -m examples.word_problems --data test.jsonl         GSM8K, or any file of its form
    python -m examples.word_problems --kill-every 2            while its processes are killed

No key is needed: the model plays the reference solutions. Stop it at any time, even by SIGKILL; the
same command goes on where it was and repeats nothing that was finished. See it in
`word_problems_parts/witness.py` how that is known.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import aidb_ray
from aidb_ray import (
    Agent,
    AgentMessage,
    Database,
    Generation,
    TextAdapter,
    create_agent,
    durable_agent,
    eq,
    openai_text,
)
from aidb_ray.testing import ScriptedModel
from examples.word_problems_parts.killer import Killer
from examples.word_problems_parts.place import Place, join_words, name_task, open_place
from examples.word_problems_parts.player import Player, WitnessedModel, make_calculator
from examples.word_problems_parts.problems import Problem, load_problems, tokens_of
from examples.word_problems_parts.report import Found, judge, make_table

SESSIONS = "aidb://problems/*"
INSTRUCTIONS = (
    "Solve the problem step by step. Use the calculator for every calculation. "
    "Write the answer, a number alone, on the last line after '#### '."
)
# The longest solution of GSM8K calls the calculator 8 times; a real model may try again.
MAX_ROUNDS = 24
MAX_SHOWN = 20
KILLS_WANTED = 8


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: Path
    data_dir: Path | None
    address: str | None
    json: Path | None
    openai: str | None
    base_url: str | None
    break_calculator: bool
    kill_every: float | None
    tokens_per_second: float | None
    concurrency: int
    shards: int

    @property
    def ray_address(self) -> str:
        """The cluster to join, or empty for one of its own."""
        return self.address or os.environ.get("RAY_ADDRESS", "")

    @property
    def joins_cluster(self) -> bool:
        """Whether agents outlive this process."""
        return self.ray_address not in ("", "local")

    def open_place(self) -> Place:
        """Open the directory that belongs to these options.

        Without `data_dir`, each way of running has its own, so that the same command goes on and
        another starts afresh.
        """
        task = name_task(self.data, "broken" if self.break_calculator else "", self.openai or "")
        if self.data_dir:
            return open_place(self.data_dir, task)
        killing = f"kill-{self.kill_every:g}" if self.kill_every else ""
        name = join_words(task, killing, self.ray_address)
        return open_place(Path("out/word_problems", name), task)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="word_problems", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    shipped = Path(__file__).with_name("problems.jsonl")
    add("--data", type=Path, default=shipped, help="problems in GSM8K's JSONL form")
    add("--data-dir", type=Path, help="where rows and witnesses are kept (default: under out/)")
    add("--address", help="a Ray cluster to use (default: one of its own); 'local': without Ray")
    add("--json", type=Path, help="write the figures to this file")
    add("--openai", metavar="MODEL", help="ask this model instead of playing the references")
    add("--base-url", help="server of that model, if it is not OpenAI's")
    add("--break-calculator", action="store_true", help="let the calculator add 1 to each result")
    add("--kill-every", type=float, metavar="SECONDS", help="SIGKILL a random process so often")
    add(
        "--tokens-per-second",
        type=float,
        metavar="N",
        help=f"pace of a played reply (default: at once, or so slow that {KILLS_WANTED} kills fit)",
    )
    add("--concurrency", type=int, default=256, help="conversations at once")
    add("--shards", type=int, default=1, help="processes that the agent runs on")
    return Options(**vars(parser.parse_args(arguments)))


async def solve(options: Options, place: Place, console: Console) -> Found:
    """Have every problem answered and collect what is to be judged."""
    problems = load_problems(options.data)
    started_ns = time.monotonic_ns()
    async with aidb_ray.connect(
        options.address, data_dir=place.root, database=place.database
    ) as db:
        # Only now is a driver that was killed surely gone, with its cluster if that was its own.
        place.events.note(event="start", joined=options.joins_cluster)
        agent = create_solver(options, place, choose_pace(options, problems))
        await agent.ready()
        before = time.monotonic()
        await answer_all(problems, agent, db, options, place, console)
        seconds = time.monotonic() - before
        replies, tokens = await read_outcome(problems, agent, db)
    place.events.note(event="end")
    return Found(
        problems=problems,
        replies=replies,
        rounds=place.rounds.read(),
        calls=place.calls.read(),
        events=place.events.read(),
        answers=place.answers.read(),
        is_scripted=options.openai is None,
        tokens=tokens,
        started_ns=started_ns,
        seconds=seconds,
    )


def choose_pace(options: Options, problems: Sequence[Problem]) -> float | None:
    """Return how many tokens a second a played reply streams, None for no wait at all.

    Played at once, a small file is done before the first kill. So a run that kills is slowed to
    last for some kills, and rounds are in flight when they come.
    """
    if options.tokens_per_second or not options.kill_every:
        return options.tokens_per_second
    tokens = sum(len(tokens_of(problem.answer)) for problem in problems)
    at_once = max(1, min(options.concurrency, len(problems)))
    return tokens / at_once / (KILLS_WANTED * options.kill_every)


def create_solver(options: Options, place: Place, tokens_per_second: float | None) -> Agent:
    """Start the agent, or find it where it already runs."""
    data = options.data.resolve()
    adapter: TextAdapter = (
        openai_text(options.openai, base_url=options.base_url)
        if options.openai
        else ScriptedModel(Player(data), tokens_per_second=tokens_per_second)
    )
    calculator = make_calculator(place.calls, is_broken=options.break_calculator)
    return create_agent(
        durable_agent(
            name="solver",
            instructions=INSTRUCTIONS,
            adapter=WitnessedModel(adapter, place.rounds, data),
            tools=[calculator],
            stream_url=SESSIONS,
            max_iterations=MAX_ROUNDS,
            max_running=options.concurrency,
            shards=options.shards,
        )
    )


async def answer_all(
    problems: Sequence[Problem],
    agent: Agent,
    db: Database,
    options: Options,
    place: Place,
    console: Console,
) -> None:
    """Ask every question and wait for every reply; show how it goes."""
    slots = asyncio.Semaphore(options.concurrency)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]} right"),
        TimeElapsedColumn(),
        console=console,
    )
    bar = progress.add_task("answered", total=len(problems), right=0)
    right = 0

    async def ask(problem: Problem) -> None:
        nonlocal right
        async with slots:
            # The id makes asking again harmless: the first question and its reply are found.
            handle = agent.send(
                problem.question,
                session=problem.session,
                actor_id="student",
                message_id=problem.question_id,
            )
            reply = await handle.reply()
            place.answers.note(session=problem.session, key="answer")
        right += problem.is_solved_by(reply.content)
        progress.update(bar, advance=1, right=right)

    with progress:
        async with asyncio.TaskGroup() as tasks:
            killing = None
            if options.kill_every:
                killer = Killer(db.processes, place.events, options.kill_every)
                killing = tasks.create_task(killer.run())
            async with asyncio.TaskGroup() as asking:
                for problem in problems:
                    asking.create_task(ask(problem))
            if killing:
                killing.cancel()


async def read_outcome(
    problems: Sequence[Problem], agent: Agent, db: Database
) -> tuple[dict[str, list[str]], int]:
    """Return every reply by session, and the tokens of all finished rounds, from the rows."""
    messages = db.collection("messages", AgentMessage, session=SESSIONS)
    generations = db.collection("generations", Generation, session=SESSIONS)
    replies: list[AgentMessage] = await db.query(
        lambda q: q.from_(m=messages).where(lambda m: eq(m.actor_id, agent.name))
    )
    runs: list[Generation] = await db.query(lambda q: q.from_(g=generations))
    sessions = {problem.question_id: problem.session for problem in problems}
    by_session: dict[str, list[str]] = defaultdict(list)
    for reply in replies:
        question_id = str(reply.in_reply_to)
        by_session[sessions.get(question_id, question_id)].append(reply.content)
    return by_session, sum(run.usage.output_tokens for run in runs if run.usage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; 0 if all went as it must."""
    options = parse_options(arguments)
    console = Console(file=sys.stdout)
    try:
        place = options.open_place()
    except (OSError, ValueError) as error:
        console.print(f"word_problems: {error}", style="red")
        return 2
    with contextlib.ExitStack() as stack:
        if options.kill_every:
            # Ray announces each death at length on the standard output; the table counts them.
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        found = asyncio.run(solve(options, place, console))
    report, wrongs = judge(found)
    console.print(make_table(report, found, place.root))
    if options.json:
        report.write(options.json)
    for wrong in wrongs[:MAX_SHOWN]:
        console.print(wrong, style="red")
    if len(wrongs) > MAX_SHOWN:
        console.print(f"... and {len(wrongs) - MAX_SHOWN:,} more", style="red")
    must_be_right = not options.break_calculator and not options.openai
    return int(bool(wrongs) or (must_be_right and report.right < report.conversations))


if __name__ == "__main__":
    sys.exit(main())
