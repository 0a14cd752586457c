"""Measures, prints a table, writes a file: `python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aidb_ray import AidbError, ConfigError
from benchmarks import (
    cancel,
    chunks,
    effects,
    latency,
    queries,
    recovery,
    replay,
    rows,
    tools,
    turns,
)
from benchmarks.harness import (
    Benchmark,
    Figure,
    Rig,
    choose_directory,
    describe_machine,
    describe_versions,
)

BENCHMARKS: dict[str, Benchmark[Any]] = {
    "rows": Benchmark(rows.measure, rows.FULL, rows.QUICK),
    "latency": Benchmark(latency.measure, latency.FULL, latency.QUICK),
    "cancel": Benchmark(cancel.measure, cancel.FULL, cancel.QUICK),
    "turns": Benchmark(turns.measure, turns.FULL, turns.QUICK),
    "tools": Benchmark(tools.measure, tools.FULL, tools.QUICK),
    "effects": Benchmark(effects.measure, effects.FULL, effects.QUICK),
    "chunks": Benchmark(chunks.measure, chunks.FULL, chunks.QUICK),
    "replay": Benchmark(replay.measure, replay.FULL, replay.QUICK),
    "queries": Benchmark(queries.measure, queries.FULL, queries.QUICK),
    "recovery": Benchmark(recovery.measure, recovery.FULL, recovery.QUICK),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if it could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="little work, rough figures")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="a directory on the disk to measure (default: here)"
    )
    options = parser.parse_args(arguments)
    console = Console()
    try:
        directory = choose_directory(options.dir)
    except ConfigError as error:
        console.print(str(error), style="red")
        return 2
    if options.name == "all":
        return run_all(directory, options.json, is_quick=options.quick)
    # Figures are of a cluster that has nothing else to do, so of none that runs already.
    os.environ.pop("RAY_ADDRESS", None)
    benchmark = BENCHMARKS[options.name]
    sizes = benchmark.quick if options.quick else benchmark.full
    figures = asyncio.run(benchmark.measure(Rig(directory), sizes))
    machine, versions = describe_machine(directory), describe_versions()
    console.print(make_table(options.name, figures, machine))
    if options.json:
        report = {
            "name": options.name,
            "machine": machine,
            "versions": versions,
            "figures": {figure.name: figure.value for figure in figures},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


def run_all(directory: Path, target: Path | None, *, is_quick: bool) -> int:
    """Run every benchmark in a process and a cluster of its own; the file gets a list."""
    reports: list[Any] = []
    with tempfile.TemporaryDirectory(dir=directory) as place:
        for name in BENCHMARKS:
            part = Path(place, f"{name}.json")
            command = [sys.executable, "-m", "benchmarks", name, "--json", str(part)]
            command += ["--dir", str(directory), *(["--quick"] if is_quick else [])]
            if code := subprocess.run(command, check=False).returncode:  # noqa: S603  Our own.
                return code
            reports.append(json.loads(part.read_text("utf-8")))
    if target:
        target.write_text(json.dumps(reports, indent=2) + "\n", "utf-8")
    return 0


def make_table(name: str, figures: Sequence[Figure], machine: dict[str, Any]) -> Table:
    """Return the figures for people."""
    place = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['filesystem']}"
    table = Table(title=name, caption=place)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it is")
    for figure in figures:
        table.add_row(figure.name, format_value(figure.value), figure.about)
    return table


def format_value(value: float) -> str:
    """Return a number with as many digits as it deserves."""
    if isinstance(value, int) or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AidbError as error:
        sys.exit(str(error))
