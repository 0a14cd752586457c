from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import aidb_ray

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("[01]*.py"))

pytestmark = pytest.mark.ray


def output_in_docstring(name: str) -> str:
    """Return what the docstring says that the example prints."""
    source = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    _, command, shown = docstring.partition(f"$ python -m examples.{name}\n")
    assert command, f"the docstring of {name} shows no output"
    return textwrap.dedent(shown) + "\n"


def run_example(name: str, directory: Path) -> str:
    """Run an example as its docstring says, in a directory of its own; return what it prints."""
    environment = {key: os.environ[key] for key in os.environ if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-W", "error", "-m", f"examples.{name}"]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    # Ray itself tells of a process that was killed, between the lines of the example.
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if "(raylet)" not in line)


def test_there_is_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_its_docstring_says(name: str, tmp_path: Path) -> None:
    assert run_example(name, tmp_path) == output_in_docstring(name)


async def test_the_chat_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        await asyncio.to_thread(run_example, "01_chat", tmp_path)

    async with aidb_ray.connect("local", data_dir=tmp_path / ".aidb") as db:
        messages = db.session("aidb://chat/1").messages
        said = await db.query(lambda q: q.from_(m=messages).order_by(lambda m: m.created_at))
    assert [message.role for message in said] == ["user", "assistant"] * 4
    assert said[0].content == said[4].content
    assert said[3].content == said[7].content
