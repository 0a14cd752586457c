"""`openai_text`: any OpenAI-compatible server as a `TextAdapter`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2
import msgspec
import openai
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray.errors import ConfigError, ModelError
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.openai_events import ChatTranslator, ResponsesTranslator, Translator
from aidb_ray.models.openai_requests import chat_body, responses_body
from aidb_ray.models.sse import EventStreamParser
from aidb_ray.models.tools import Tool

log = logging.getLogger(__name__)

Api = Literal["responses", "chat"]

MAX_RETRY_WAIT_MS = 60_000
"""How long a request waits inside `stream`; a provider that asks for more gets its error raised."""

_DRAIN_MS = 250


@dataclass(frozen=True, slots=True)
class EnvKey:
    """Name of an environment variable with an API key, read in the process that asks."""

    name: str


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a server may keep us waiting, in milliseconds.

    Attributes:
        connect_ms: For a connection.
        first_token_ms: From the request to the first event of the answer, reasoning included.
        between_tokens_ms: For each next piece of the answer.
    """

    connect_ms: int = 5_000
    first_token_ms: int = 300_000
    between_tokens_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often and after which waits a request is sent again.

    The wait before attempt n is random between half and all of `first_ms * 2 ** n`, at most
    `most_ms`; a provider that names a wait is obeyed instead.
    """

    retries: int = 2
    first_ms: int = 500
    most_ms: int = 8_000

    def wait_ms(self, error: ModelError, attempt: int, chance: float) -> float | None:
        """Return how long to wait after failed `attempt` (from 0), None to give up.

        `chance` is between 0 and 1.
        """
        if not error.retryable or attempt >= self.retries:
            return None
        if error.retry_after_ms is not None:
            return error.retry_after_ms if error.retry_after_ms <= MAX_RETRY_WAIT_MS else None
        longest = min(self.first_ms * 2**attempt, self.most_ms)
        return longest * (0.5 + chance / 2)


class OpenAIText:
    """A model behind the Responses or the Chat Completions protocol, as `openai_text` makes it.

    A request that fails in a way that trying again can mend is sent again, but only while no
    event was yielded. It pickles, and connects anew in the other process; each event loop has
    connections of its own, which `aclose` closes.
    """

    def __init__(
        self,
        model: str,
        *,
        api: Api = "responses",
        base_url: str | None = None,
        api_key: str | EnvKey | None = None,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if api not in ("responses", "chat"):
            raise ConfigError(f"api is {api!r}; it must be 'responses' or 'chat'.")
        self._options = options or {}
        if taken := self._options.keys() & _OWN_FIELDS:
            raise ConfigError(f"The adapter sets {sorted(taken)} itself; leave them out.")
        self._model = model
        self._api: Api = api
        self._base_url = base_url
        self._api_key = api_key
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._transport = transport
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}
