"""What agents promise, shown in one process: `connect("local", durability="memory")`."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from aidb_ray import (
    Agent,
    AgentMessage,
    CallTool,
    ConfigError,
    ConflictError,
    Database,
    FencedError,
    Generation,
    History,
    ModelError,
    ModelMessage,
    Retry,
    RunCancelledError,
    ScriptedModel,
    Tool,
    ToolCall,
    ToolContext,
    UsageLimits,
    connect,
    create_agent,
    durable_agent,
    eq,
    tool,
)
from aidb_ray.agents.agent import create_agent as _create
from aidb_ray.agents.shard import AgentActor
from aidb_ray.contracts import utc_now

URL = "aidb://echo/1"
SOON_MS = 20_000
