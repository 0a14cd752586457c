"""`openai_text`: any OpenAI-compatible server as a `TextAdapter`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2
import msgspec
import openai
from ag_ui.core import Event
from pydantic import BaseModel

from aidb_ray.errors import ConfigError, ModelError
from aidb_ray.models.base import ModelMessage
from aidb_ray.models.openai_events import (
    ChatTranslator,
    ResponsesTranslator,
    Translator,
    provider_error,
)
from aidb_ray.models.openai_requests import chat_body, responses_body
from aidb_ray.models.sse import EventStreamParser
from aidb_ray.models.tools import Tool

log = logging.getLogger(__name__)

Api = Literal["responses", "chat"]

MAX_RETRY_WAIT_MS = 60_000
"""How long a request waits inside `stream`; a provider that asks for more gets its error raised."""

# What the adapter fills in itself.
_OWN_FIELDS = frozenset({"model", "messages", "input", "instructions", "tools", "stream", "n"})
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
        api: Api,
        base_url: str | None = None,
        api_key: str | EnvKey | None = None,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        prefill: Mapping[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if api not in ("responses", "chat"):
            raise ConfigError(f"api is {api!r}; it must be 'responses' or 'chat'.")
        self._options = options or {}
        self._prefill = dict(prefill or {})
        if taken := (self._options.keys() | self._prefill.keys()) & _OWN_FIELDS:
            raise ConfigError(f"The adapter sets {sorted(taken)} itself; leave them out.")
        self._model = model
        self._api: Api = api
        self._base_url = base_url
        self._api_key = api_key
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._transport = transport
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self._api_key, str):
            raise ConfigError(
                "An API key given as text stays in its process. Set it as an environment "
                "variable where the agent runs, and pass api_key=EnvKey('NAME').",
                code="secret_not_portable",
            )
        return {**self.__dict__, "_clients": {}}

    def __repr__(self) -> str:
        return f"OpenAIText({self._model!r}, api={self._api!r}, base_url={self._base_url!r})"

    def fingerprint(self) -> str:
        """Return what decides the answers: model, protocol, server and options, without keys."""
        asked = [self._model, self._api, self._base_url, self._options]
        if self._prefill:
            asked.append(self._prefill)
        return msgspec.json.encode(asked, order="sorted", enc_hook=repr).decode()

    def check(self) -> None:
        """Raise if this process has no key for the server; nothing is sent.

        Raises:
            ConfigError: `missing_api_key`.
        """
        self._key()

    async def aclose(self) -> None:
        """Close the connections of this event loop; a later request opens new ones."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    async def stream(
        self,
        messages: Sequence[ModelMessage],
        *,
        tools: Sequence[Tool] = (),
        system_prompts: Sequence[str] = (),
        output_schema: type[BaseModel] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """See `TextAdapter.stream`.

        Raises:
            ConfigError: `missing_api_key`: the environment has no key for this server.
            ModelError: with code `rate_limited`, `server_error`, `connection`, `timeout`,
                `truncated` or `malformed`, which trying again may mend; `unauthorized`,
                `invalid_request`, `insufficient_quota`, `context_length_exceeded` and others,
                which it will not.
        """
        make_body = responses_body if self._api == "responses" else chat_body
        body = _merge(make_body(messages, tools, system_prompts, output_schema), self._options)
        if messages and messages[-1].role == "assistant":
            body = _merge(body, self._prefill)
        attempt = 0
        while True:
            has_spoken = False
            try:
                async with aclosing(self._answer(body)) as batches:
                    async for events in batches:
                        has_spoken = True
                        for event in events:
                            yield event
            except ModelError as error:
                wait_ms = self._backoff.wait_ms(error, attempt, random.random())  # noqa: S311
                if has_spoken or wait_ms is None:
                    raise
                log.info("Model request failed and is sent again.", extra={"code": error.code})
            else:
                return
            attempt += 1
            await asyncio.sleep(wait_ms / 1_000)

    async def _answer(self, body: dict[str, Any]) -> AsyncGenerator[list[Event], None]:
        """Send one request and yield the events of each piece of its answer."""
        translator: Translator
        translator = ResponsesTranslator() if self._api == "responses" else ChatTranslator()
        parser = EventStreamParser()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeouts.first_token_ms / 1_000
        has_answered = has_begun = False
        try:
            async with AsyncExitStack() as request:
                async with asyncio.timeout_at(deadline):
                    pieces = await request.enter_async_context(self._send(body))
                has_answered = True
                while not translator.is_done:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(pieces, None)
                    if piece is None:
                        yield translator.end()
                        return
                    payloads = parser.feed(piece)
                    events = _translate(translator, payloads)
                    if events:
                        has_begun = True
                        yield events
                    # The time that the reader took is not the server's.
                    if has_begun and payloads:
                        deadline = clock() + self._timeouts.between_tokens_ms / 1_000
                await _drain(pieces)
        except (TimeoutError, httpx2.TimeoutException, openai.APITimeoutError) as error:
            what = "next piece" if has_begun else "first token"
            raise ModelError(
                f"{self._model!r} took too long for its {what}.", code="timeout", retryable=True
            ) from error
        except openai.APIStatusError as error:
            raise self._without_key(status_error(error, datetime.now(UTC))) from error
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            code = "truncated" if has_answered else "connection"
            raise ModelError(
                f"The connection to {self._model!r} failed: {error.__cause__ or error!r}.",
                code=code,
                retryable=True,
            ) from error

    @asynccontextmanager
    async def _send(self, body: dict[str, Any]) -> AsyncGenerator[AsyncIterator[bytes], None]:
        client = self._client()
        # As its own parameters the SDK would check each message of the history against its
        # types: 22 ms for 100 messages, 0.5 ms in this way.
        if self._api == "responses":
            sending = client.responses.with_streaming_response.create(
                model=self._model, stream=True, extra_body=body
            )
        else:
            sending = client.chat.completions.with_streaming_response.create(
                model=self._model, messages=[], stream=True, extra_body=body
            )
        async with sending as response:
            yield response.iter_bytes()

    def _client(self) -> openai.AsyncOpenAI:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            self._clients = {
                other: kept for other, kept in self._clients.items() if not other.is_closed()
            }
            # Reading is bounded by `_answer`, which knows what it waits for.
            timeout = httpx2.Timeout(None, connect=self._timeouts.connect_ms / 1_000)
            client = openai.AsyncOpenAI(
                api_key=self._key(),
                base_url=self._base_url,
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultAsyncHttpxClient(
                    timeout=timeout, transport=self._transport
                ),
            )
            self._clients[loop] = client
        return client

    def _key(self) -> str:
        if isinstance(self._api_key, str):
            return self._api_key
        name = "OPENAI_API_KEY" if self._api_key is None else self._api_key.name
        key = os.environ.get(name)
        if key:
            return key
        if self._api_key is None and (self._base_url or os.environ.get("OPENAI_BASE_URL")):
            # Servers of one's own seldom want a key, but the protocol has a place for it.
            return "none"
        raise ConfigError(
            f"There is no API key: the environment variable {name} is not set in this process.",
            code="missing_api_key",
        )

    def _without_key(self, error: ModelError) -> ModelError:
        """Take the key out of a message, where some servers repeat it."""
        key = self._key()
        message = str(error)
        if len(key) >= 8 and key in message:
            error.args = (message.replace(key, "***"),)
        return error


def openai_text(
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | EnvKey | None = None,
    api: Api = "responses",
    timeouts: Timeouts | None = None,
    backoff: Backoff | None = None,
    prefill: Mapping[str, Any] | None = None,
    **options: Any,
) -> OpenAIText:
    """Return an adapter for `model`; nothing is opened or read before it is asked.

    The key is taken from `OPENAI_API_KEY`, or from the variable that an `EnvKey` names, in the
    process that asks. A key given as text is held as a secret and does not leave this process.
    Without `base_url` the server is `OPENAI_BASE_URL` or OpenAI's. Further `options` go into
    each request as they are (`temperature`, `reasoning`, ...); None takes a field out. Those of
    `prefill` go only into requests whose last message is an assistant's, so that the server goes
    on with it; vLLM wants `{"continue_final_message": True, "add_generation_prompt": False}`.

    Raises:
        ConfigError: an option is one that the adapter sets itself.
    """
    return OpenAIText(
        model,
        api=api,
        base_url=base_url,
        api_key=api_key,
        timeouts=timeouts,
        backoff=backoff,
        prefill=prefill,
        options=options,
    )


def status_error(error: openai.APIStatusError, now: datetime) -> ModelError:
    """Return the error for an answer that is not a stream but a refusal."""
    headers = error.response.headers
    reported = provider_error(error.body, status=error.status_code)
    retryable = {"true": True, "false": False}.get(
        headers.get("x-should-retry", ""), reported.retryable
    )
    return ModelError(
        f"HTTP {error.status_code}: {reported}",
        code=reported.code,
        retryable=retryable,
        status=error.status_code,
        retry_after_ms=parse_retry_after(headers, now),
    )


def parse_retry_after(headers: Mapping[str, str], now: datetime) -> int | None:
    """Return how many milliseconds the server asks us to wait, None if it does not say."""
    for name, unit_ms in (("retry-after-ms", 1), ("retry-after", 1_000)):
        with suppress(ValueError, OverflowError):
            return max(0, int(float(headers.get(name, "")) * unit_ms))
    with suppress(ValueError):
        until = parsedate_to_datetime(headers.get("retry-after", ""))
        # HTTP dates are in UTC, even where they leave out to say so.
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0, int((until - now).total_seconds() * 1_000))
    return None


def _translate(translator: Translator, payloads: list[bytes]) -> list[Event]:
    events: list[Event] = []
    for payload in payloads:
        events += translator.translate(payload)
        if translator.is_done:
            break
    return events


def _merge(body: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    merged = dict(body)
    for name, value in options.items():
        own = merged.get(name)
        merged[name] = (
            {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
        )
    return {name: value for name, value in merged.items() if value is not None}


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    # A connection is used again only if its answer was read to the end. There is nothing more
    # to come, so a server that keeps it open is not worth waiting for.
    with suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(_DRAIN_MS / 1_000):
            async for _ in pieces:
                pass
