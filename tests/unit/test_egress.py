"""Where others may have us send something: to public addresses, and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address

import httpx2
import pytest

from aidb_ray.errors import UnavailableError, WebhookError
from aidb_ray.lifecycle.egress import MAX_BODY, Egress, is_public

PUBLIC = "93.184.215.14"

NOT_PUBLIC = [
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1"),
    *("172.31.255.254", "192.168.1.1", "169.254.169.254", "169.254.0.1", "100.64.0.1"),
    *("192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1"),
    *("::127.0.0.1", "::7f00:1", "fe80::1", "fe80::1%1", "fc00::1", "fd12:3456::1", "ff02::1"),
    *("2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "100::1"),
]
REJECTED = [
    *(f"https://{each}/cb" for each in NOT_PUBLIC if ":" not in each),
    *(f"https://[{each}]/cb" for each in NOT_PUBLIC if ":" in each),
    # Written otherwise.
    *("https://127.1/", "https://127.0.1/", "https://2130706433/", "https://0x7f000001/"),
    *("https://0177.0.0.1/", "https://0x7f.0.0.1/", "https://127.0.0.1./", "https://10.0.0.1./"),
    *(
        "https://017700000001/",
        "https://0/",
        "https://00000.0/",
        "https://1/",
        "https://169.254.43518/",
    ),
    *("https://[::ffff:7f00:1]/", "https://[0:0:0:0:0:ffff:7f00:0001]/", "https://[::]:443/"),
    "https://\uff11\uff12\uff17.0.0.1/",
    "https://127\u30020\u30020\u30021/",
    "https://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3/",
    # Of this network.
    *("https://localhost/", "https://LOCALHOST/", "https://localhost./", "https://store/"),
    *("https://metadata/", "https://kubernetes/"),
    # Names that lead there.
    *("https://rebound.example/", "https://both.example/", "https://v6.example/cb"),
    *("https://metadata.example/latest", "https://mapped.example/", "https://nat64.example/"),
    # Neither https nor its port.
    *(
        "http://public.example/",
        "http://93.184.215.14/",
        "ftp://public.example/",
        "file:///etc/passwd",
    ),
    *(
        "gopher://public.example/",
        "javascript:alert(1)",
        "data:text/plain,x",
        "//public.example/",
        "",
    ),
    *("https://public.example:22/", "https://public.example:80/", "https://public.example:8443/"),
    *("https://public.example:0/", "https://public.example:65536/", "https://public.example:x/"),
    # With a user, or what is to look like one.
    *("https://user@10.0.0.1/", "https://user@public.example/", "https://a:b@public.example/"),
    *(
        "https://public.example@127.0.0.1/",
        "https://public.example:443@127.0.0.1/",
        "https://@127.0.0.1/",
    ),
    *("https://public.example\\@127.0.0.1/", "https://127.0.0.1#@public.example/"),
    *(
        "https://127.0.0.1?@public.example/",
        "https://127.0.0.1\t/",
        "https://127.0.0.1\n/",
        " https://[::1]/",
    ),
    *(
        "https:///cb",
        "https://",
        "https://public.example/\u0000",
        "https://" + "a" * 3_000 + ".example/",
    ),
    *("https://.example/", "https://public..example/", "https:127.0.0.1/", "https:/127.0.0.1/"),
]

NAMES = {
    "public.example": [PUBLIC],
    "rebound.example": ["127.0.0.1"],
    "both.example": [PUBLIC, "10.0.0.1"],
    "v6.example": ["fd00::1"],
    "metadata.example": ["169.254.169.254"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
}


class Lookups:
    """Answers like a name server, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in NAMES:
            return NAMES[host]
        try:
            return [str(ip_address(host))]
        except ValueError:
            raise OSError(f"no such name: {host}") from None


class Nothing(httpx2.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""


class Connections:
    """Takes the place of the network: notes where a connection would have gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.to: list[tuple[str, str, str]] = []

        async def handle(_: httpx2.AsyncHTTPTransport, request: httpx2.Request) -> httpx2.Response:
            name = str(request.extensions.get("sni_hostname"))
            self.to.append((request.url.host, request.headers["host"], name))
            elsewhere = {"location": "https://127.0.0.1/"}
            return httpx2.Response(302, headers=elsewhere, stream=Nothing())

        monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", handle)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def listening(answer: bytes) -> AsyncGenerator[tuple[str, list[bytes]]]:
    """Yield the origin of a real server, and what it was sent."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        body = await reader.readexactly(int(length)) if length else b""
        received.append(head + body)
        writer.write(answer)
        with suppress(ConnectionError):
            await writer.drain()
        await close(writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", received


def test_the_corpus_is_large() -> None:
    assert len(set(REJECTED)) == len(REJECTED) >= 100


@pytest.mark.parametrize("url", REJECTED)
async def test_nothing_is_sent_where_nobody_should_be_called(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, names = Connections(monkeypatch), Lookups()
    egress = Egress(resolve=names, allow=["http://127.0.0.1:1"])

    with pytest.raises((WebhookError, UnavailableError)) as raised:
        await egress.post(url, {"done": True}, token="secret")

    assert network.to == []
    assert "secret" not in str(raised.value)
    if isinstance(raised.value, WebhookError):
        assert (raised.value.code, raised.value.status) == ("webhook_url_rejected", 400)
    else:
        # It could be a name; nobody has it.
        assert set(names.asked).isdisjoint(NAMES)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ip_address(address))


async def test_the_connection_goes_to_the_address_that_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, answers = Connections(monkeypatch), [[PUBLIC], ["127.0.0.1"]]
    asked: list[str] = []

    async def rebind(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    egress = Egress(resolve=rebind)
    answer = await egress.post("https://public.example/cb?a=1", {})

    assert answer.status == 302, "a redirect is an answer, and not followed"
    assert network.to == [(PUBLIC, "public.example", "public.example")]
    assert asked == ["public.example"]
    with pytest.raises(WebhookError):
        await egress.post("https://public.example/cb", {})
    assert len(network.to) == 1


async def test_an_allowed_origin_is_asked_and_no_other_port_or_scheme_of_it() -> None:
    body = b'{"ok":true,"next_wake":false}'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with listening(head + body) as (origin, received):
        egress = Egress(allow=[origin])
        answer = await egress.post(f"{origin}/cb", {"wake_id": "w"}, token="t0k3n")
        assert (answer.status, answer.json()) == (200, {"ok": True, "next_wake": False})
        [request] = received
        assert request.startswith(b"POST /cb HTTP/1.1")
        assert b"Bearer t0k3n" in request
        assert request.endswith(b'{"wake_id":"w"}')
        port = origin.rpartition(":")[2]
        for url in (
            f"https://127.0.0.1:{port}/",
            f"http://127.0.0.2:{port}/",
            f"http://localhost:{port}/",
            f"http://user@127.0.0.1:{port}/",
            "http://127.0.0.1/",
        ):
            with pytest.raises(WebhookError):
                await egress.post(url, {})
        assert len(received) == 1


async def test_an_answer_is_taken_up_to_a_bound() -> None:
    async with listening(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (4 * MAX_BODY)) as (origin, _):
        answer = await Egress(allow=[origin]).get(origin)

    assert len(answer.body) == MAX_BODY
    assert answer.json() == {}


async def test_who_does_not_answer_is_not_waited_for() -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await close(writer)
        closed.set()

    closed = asyncio.Event()
    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(UnavailableError) as raised:
            await Egress(allow=[origin], timeout_ms=50).get(origin)
        await closed.wait()

    assert raised.value.outcome == "unknown"
