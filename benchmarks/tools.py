"""Durable turns a second with a tool call in each."""

from __future__ import annotations

from collections.abc import Sequence

from aidb_ray import ModelMessage, tool
from aidb_ray.testing import CallTool
from benchmarks.harness import Figure, Rig
from benchmarks.turns import FULL, QUICK, TOKENS, Sizes, measure_turns

__all__ = ["FULL", "QUICK", "measure"]


@tool
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def measure(rig: Rig, sizes: Sizes) -> list[Figure]:
    """Measure turns of two model rounds, with a call between them whose result is said."""
    turn = "a tool call, then a reply of 20 tokens"
    return await measure_turns(rig, sizes, call_then_speak, turn, tools=[add])


def call_then_speak(conversation: Sequence[ModelMessage]) -> CallTool | list[str]:
    """Call the tool when asked, and say what it returned."""
    last = conversation[-1]
    if last.role != "tool":
        return CallTool("add", {"a": 40, "b": 2})
    if last.content != "42":
        raise AssertionError(f"the tool's answer is {last.content!r}")
    return [f"{last.content} ", *["ok "] * (TOKENS - 1)]
