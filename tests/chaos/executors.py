"""Executors that share a queue of tool calls while they are killed, one after the other.

python -m tests.chaos.executors --calls 5000 --processes 8 --every 2

Half of the calls have an effect that honours the idempotency key, half have one that does not.
What runs writes a ledger, by which is judged: what was killed, what it held, and what came twice.
Prints what happened, and fails if anything was lost, done twice or stuck.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from aidb_ray import (
    Collection,
    Database,
    Effect,
    ToolCall,
    ToolContext,
    and_,
    connect,
    create_tool_execution_effect,
    eq,
    synced,
    tool,
)
from aidb_ray.runtime import connect_cluster
from aidb_ray.store.changes import Filter
from aidb_ray.store.claims import CLAIMS, decode_claim
from aidb_ray.store.collection import Change

LEASE_MS = 3_000
SLACK_MS = 2_000
SOON_S = 600


class Line(NamedTuple):
    """One line of the ledger."""

    what: str
    key: str
    attempt: int
    pid: int
    at: float


class Ledger:
    """What really happened, written by whoever does it; a file, so that it survives them."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "ledger"

    def write(self, what: str, key: str, attempt: int) -> None:
        line = json.dumps([what, key, attempt, os.getpid(), time.monotonic()]) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    def lines(self) -> Iterator[Line]:
        if self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                yield Line(*json.loads(line))

    def do_once(self, key: str) -> bool:
        """Have an effect that knows its idempotency key: False if it was had before."""
        name = blake2b(key.encode(), digest_size=16).hexdigest()
        try:
            os.close(os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True


@tool
async def pay(directory: str, ms: int, ctx: ToolContext) -> int:
    """Have an effect once, whatever happens."""
    ledger = Ledger(directory)
    ledger.write("start", ctx.idempotency_key, ctx.attempt)
    if ledger.do_once(ctx.idempotency_key):
        ledger.write("effect", ctx.idempotency_key, ctx.attempt)
    await asyncio.sleep(ms / 1000)
    ledger.write("end", ctx.idempotency_key, ctx.attempt)
    return ctx.attempt


@tool
async def send(directory: str, ms: int, ctx: ToolContext) -> int:
    """Have an effect each time."""
    ledger = Ledger(directory)
    ledger.write("start", ctx.idempotency_key, ctx.attempt)
    ledger.write("effect", ctx.idempotency_key, ctx.attempt)
    await asyncio.sleep(ms / 1000)
    ledger.write("end", ctx.idempotency_key, ctx.attempt)
    return ctx.attempt


@dataclass
class Report:
    """What happened.

    Attributes:
        kills: Processes killed while they ran at least one call.
        held: Calls that were in flight at those kills.
        twice: Calls whose effect came more than once, of those that do not honour their key.
        longest_ms: Longest time from a kill to the next attempt of a call it hit.
        wrong: What should not be.
    """

    calls: int = 0
    completed: int = 0
    kills: int = 0
    held: int = 0
    repeated: int = 0
    twice: int = 0
    longest_ms: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list[str])


class Killer:
    """Kills the process of a call that runs, now and then."""

    def __init__(self, ledger: Ledger, rng: random.Random) -> None:
        self.killed: dict[int, float] = {}
        self._ledger = ledger
        self._rng = rng

    async def kill_every(self, seconds: float, at_most: int) -> None:
        while len(self.killed) < at_most:
            await asyncio.sleep(seconds)
            self.kill_one()

    def kill_one(self) -> None:
        running = Counter[int]()
        for line in self._ledger.lines():
            running[line.pid] += {"start": 1, "end": -1}.get(line.what, 0)
        pids = [pid for pid, count in running.items() if count > 0 and pid not in self.killed]
        self._rng.shuffle(pids)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.killed[pid] = time.monotonic()
            return


async def run(
    db: Database,
    directory: Path,
    *,
    calls: int,
    processes: int,
    every_s: float,
    max_kills: int,
    max_running: int,
    ms: tuple[int, int],
    seed: int,
) -> Report:
    """Run the calls under kills and judge what happened."""
    rng = random.Random(seed)
    rows = db.session("aidb://chaos/1").tool_calls
    completions = Counter[str]()
    all_done = asyncio.Event()

    def hear(changes: list[Change[ToolCall]]) -> None:
        for change in changes:
            was = change.before is not None and change.before.status.is_terminal
            if change.after is not None and change.after.status.is_terminal and not was:
                completions[change.key] += 1
        if len(completions) == calls:
            all_done.set()

    subscribed = rows.subscribe(hear)
    await subscribed.ready()
    effect = start(rows, processes, max_running)
    await effect.ready()
    began = time.monotonic()
    for first in range(0, calls, 500):
        await rows.insert(
            [
                {
                    "id": f"call-{n}",
                    "generation_id": "chaos",
                    "name": "pay" if n % 2 else "send",
                    "args": {"directory": str(directory), "ms": rng.randint(*ms)},
                }
                for n in range(first, min(first + 500, calls))
            ]
        )
    killer = Killer(Ledger(directory), rng)
    killing = asyncio.create_task(killer.kill_every(every_s, max_kills))
    try:
        async with asyncio.timeout(SOON_S):
            await all_done.wait()
    finally:
        killing.cancel()
        await asyncio.wait([killing])
    found = await db.query(lambda q: q.from_(r=rows))
    report = judge(found, completions, killer.killed, Ledger(directory))
    report.seconds = round(time.monotonic() - began, 1)
    report.wrong += await claims_left(db)
    subscribed.close()
    await effect.aclose()
    return report


def start(rows: Collection[ToolCall], processes: int, max_running: int) -> Effect:
    return create_tool_execution_effect(
        query=lambda q: q.from_(tc=rows).where(
            lambda tc: and_(eq(tc.status, "pending"), synced(tc))
        ),
        tools=[pay, send],
        processes=processes,
        max_running=max_running,
        lease_ms=LEASE_MS,
        ray_options={"num_cpus": 0},
    )


async def claims_left(db: Database) -> list[str]:
    _, rows = await db.partitions[0].client.read(Filter(CLAIMS, "aidb://chaos/1"))
    records = [decode_claim(row.value) for row in rows]
    return [f"{each.row} is {each.state} at the end" for each in records if each.state != "done"]


def judge(
    rows: list[ToolCall], completions: Counter[str], killed: dict[int, float], ledger: Ledger
) -> Report:
    """Compare what the rows say with what the ledger says."""
    report = Report(calls=len(rows), completed=sum(r.status == "completed" for r in rows))
    lines = list(ledger.lines())
    ended = {(line.key, line.attempt): line.at for line in lines if line.what == "end"}
    starts = [line for line in lines if line.what == "start"]
    accepted = {(f"aidb://chaos/1/tool_calls/{row.id}", row.attempt) for row in rows}
    # In flight: its process was killed before its end was written, which the tool may have reached.
    cut = {
        (line.key, line.attempt): killed[line.pid]
        for line in starts
        if line.pid in killed
        and (line.key, line.attempt) not in accepted
        and killed[line.pid] - ended.get((line.key, line.attempt), killed[line.pid]) < 1
    }
    hit = {line.pid for line in starts if (line.key, line.attempt) in cut}
    report.kills, report.held = len(hit), len(cut)
    effects = Counter((line.key) for line in lines if line.what == "effect")
    started = {(line.key, line.attempt): line.at for line in starts}
    for row in rows:
        key = f"aidb://chaos/1/tool_calls/{row.id}"
        if row.status != "completed" or completions[row.id] != 1:
            report.wrong.append(f"{row.id} is {row.status} after {completions[row.id]} ends")
        if effects[key] > 1:
            report.twice += 1
            if row.name == "pay":
                report.wrong.append(f"{row.id} had its effect {effects[key]} times")
            elif not row.in_doubt:
                report.wrong.append(f"{row.id} came twice and is not marked")
            elif not any(each == key for each, _ in cut):
                report.wrong.append(f"{row.id} came twice, but was not in flight at a kill")
        report.repeated += row.attempt > 1
    for (key, attempt), at in cut.items():
        later = [t for (k, a), t in started.items() if k == key and a > attempt]
        if not later:
            # Its end may have been written in the moment before its process died.
            continue
        waited_ms = round((min(later) - at) * 1000)
        report.longest_ms = max(report.longest_ms, waited_ms)
        if waited_ms > LEASE_MS + SLACK_MS:
            report.wrong.append(f"{key} was stuck for {waited_ms} ms")
    return report


async def main(arguments: argparse.Namespace) -> int:
    with TemporaryDirectory() as directory:
        ledger = Path(directory) / "ledger"
        ledger.mkdir()
        cluster = await connect_cluster(num_cpus=2)
        async with connect(data_dir=Path(directory) / "data") as db:
            report = await run(
                db,
                ledger,
                calls=arguments.calls,
                processes=arguments.processes,
                every_s=arguments.every,
                max_kills=arguments.max_kills,
                max_running=arguments.max_running,
                ms=(50, 500),
                seed=arguments.seed,
            )
        await cluster.close()
    print(json.dumps({"seed": arguments.seed, **asdict(report)}, indent=1))  # noqa: T201
    return 1 if report.wrong or not report.kills else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between kills")
    parser.add_argument("--max-kills", type=int, default=1_000)
    parser.add_argument("--max-running", type=int, default=2, help="calls at once a process")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    given: Any = parse()
    raise SystemExit(asyncio.run(main(given)))
