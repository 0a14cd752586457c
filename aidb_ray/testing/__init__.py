"""What agents are tested with: a scripted model, a clock, a database, crashes, and assertions."""

from __future__ import annotations

from aidb_ray.testing.clocks import Clock, FakeClock, LoopClock
from aidb_ray.testing.crashes import Crash, crash_at, crash_points
from aidb_ray.testing.databases import database
from aidb_ray.testing.rows import Expected, assert_rows, eventually
from aidb_ray.testing.scripted import CallTool, Part, Player, Reply, Say, ScriptedModel, Think

__all__ = [
    "CallTool",
    "Clock",
    "Crash",
    "Expected",
    "FakeClock",
    "LoopClock",
    "Part",
    "Player",
    "Reply",
    "Say",
    "ScriptedModel",
    "Think",
    "assert_rows",
    "crash_at",
    "crash_points",
    "database",
    "eventually",
]
