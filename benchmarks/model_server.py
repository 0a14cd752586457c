"""A model provider on loopback that streams until it is left, and notes when that was."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from contextlib import closing, suppress
from typing import Any

TOKEN_INTERVAL_S = 0.005
_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n"
)


class ModelServer:
    """Speaks Chat Completions, for one stream a connection; meant for a process of its own.

    A message `tool NAME` is answered with a call of that tool, a tool's result with its text, and
    all else by words without end. Streams are known by the last user message.
    """

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._begun: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._closed: defaultdict[str, asyncio.Future[int]] = defaultdict(
            lambda: asyncio.get_running_loop().create_future()
        )
        self._open: set[str] = set()

    async def listen(self) -> int:
        """Serve from now on; returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def begun(self, name: str) -> None:
        """Return once the stream `name` has begun."""
        await self._begun[name].wait()

    async def closed_at(self, name: str) -> int:
        """Return when the client closed the stream, by the clock that all processes share (ns)."""
        return await self._closed[name]

    async def open_streams(self) -> list[str]:
        """Return the streams that are being read."""
        return sorted(self._open)

    async def answer(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError), closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            length = next(line for line in lines if line.startswith("content-length:"))
            body = json.loads(await reader.readexactly(int(length.partition(":")[2])))
            writer.write(_HEAD)
            await self._reply(body["messages"], reader, writer)

    async def _reply(
        self,
        messages: list[dict[str, Any]],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        last = messages[-1]
        text = str(last["content"])
        if last["role"] == "tool":
            _write(writer, {"content": text}, finish="stop")
            _end(writer)
        elif text.startswith("tool "):
            function = {"name": text.removeprefix("tool "), "arguments": "{}"}
            call = {"index": 0, "id": "call", "type": "function", "function": function}
            _write(writer, {"tool_calls": [call]}, finish="tool_calls")
            _end(writer)
        else:
            await self._stream(text, reader, writer)

    async def _stream(
        self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._open.add(name)
        leaving = asyncio.create_task(self._note_end(name, reader))
        try:
            while not leaving.done():
                _write(writer, {"content": "word "})
                self._begun[name].set()
                await asyncio.wait([leaving], timeout=TOKEN_INTERVAL_S)
        finally:
            self._open.discard(name)
            leaving.cancel()

    async def _note_end(self, name: str, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            # A client that waits for its answer says nothing more, so this is the end.
            await reader.read(1)
        self._closed[name].set_result(time.monotonic_ns())


def _write(writer: asyncio.StreamWriter, delta: dict[str, Any], finish: str | None = None) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    data = b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"
    _write_piece(writer, data)


def _write_piece(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _end(writer: asyncio.StreamWriter) -> None:
    _write_piece(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
