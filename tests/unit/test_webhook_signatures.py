"""Who sent a webhook: what was signed is taken once, and nothing that differs in a bit."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aidb_ray.errors import ConfigError, WebhookError
from aidb_ray.lifecycle.signatures import Verifier, ed25519_jwks, hmac_sha256

NOW = 1_800_000_000
SECRET = b"a secret of at least 24 bytes"
BODY = b'{"wake_id":"w_1","generation":1,"streams":[{"path":"sessions/1"}]}'
RECORDED = json.loads(
    (Path(__file__).parent.parent / "fixtures" / "durable_streams_wake.json").read_text("utf-8")
)

Headers = dict[str, str]


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Keys:
    """A server of keys that counts what it is asked."""

    def __init__(self, **keys: Ed25519PrivateKey) -> None:
        self.keys = keys
        self.extra: list[Mapping[str, Any]] = []
        self.asked = 0
        self.status = 200
        self.origin = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        keys = [
            {"kty": "OKP", "crv": "Ed25519", "kid": kid, "x": public_of(key), "alg": "EdDSA"}
            for kid, key in self.keys.items()
        ]
        body = json.dumps({"keys": [*keys, *self.extra]}).encode()
        head = f"HTTP/1.1 {self.status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(keys: Keys) -> AsyncGenerator[str]:
    server = await asyncio.start_server(keys.answer, "127.0.0.1", 0)
    async with server:
        keys.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield f"{keys.origin}/jwks.json"


def public_of(key: Ed25519PrivateKey) -> str:
    return to_text(key.public_key().public_bytes_raw())


def to_text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def sign_ed25519(key: Ed25519PrivateKey, kid: str = "k1", at: int = NOW) -> Headers:
    signature = to_text(key.sign(f"{at}.".encode() + BODY))
    return {"webhook-signature": f"t={at},kid={kid},ed25519={signature}"}


def sign_draft(at: int = NOW, secret: bytes = SECRET) -> Headers:
    digest = hmac.new(secret, f"{at}.".encode() + BODY, "sha256").hexdigest()
    return {"Webhook-Signature": f"t={at},sha256={digest}"}


def sign_standard(at: int = NOW, secret: bytes = SECRET) -> Headers:
    digest = hmac.digest(secret, f"msg_1.{at}.".encode() + BODY, "sha256")
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


async def refused(verify: Verifier, body: bytes, headers: Mapping[str, str]) -> str:
    with pytest.raises(WebhookError) as raised:
        await verify(body, headers)
    assert SECRET.decode() not in str(raised.value)
    return f"{raised.value.status} {raised.value.code}"


# What is taken.


async def test_a_wake_that_a_real_server_signed_is_taken() -> None:
    at = int(RECORDED["signature"].partition(",")[0].removeprefix("t="))
    keys = Keys()
    keys.extra = RECORDED["jwks"]["keys"]
    async with serving(keys) as url:
        verify = ed25519_jwks(url, allow=[keys.origin], clock=Clock(at + 2))
        headers = {"webhook-signature": RECORDED["signature"]}
        body = RECORDED["body"].encode()
        changed = body.replace(b"sub-1", b"sub-2")
        assert await refused(verify, changed, headers) == "401 signature_invalid"
        await verify(body, headers)


@pytest.mark.parametrize("sign", [sign_draft, sign_standard])
async def test_what_a_secret_signed_is_taken_once(sign: Callable[..., Headers]) -> None:
    verify = hmac_sha256(SECRET, clock=Clock())

    await verify(BODY, sign())

    assert await refused(verify, BODY, sign()) == "401 replayed"
    await verify(BODY, sign(NOW + 1))


async def test_a_secret_may_be_replaced_by_another() -> None:
    encoded = "whsec_" + base64.b64encode(b"x" * 32).decode()
    verify = hmac_sha256([SECRET.decode(), encoded], clock=Clock())

    await verify(BODY, sign_standard())
    await verify(BODY, sign_standard(NOW - 1, b"x" * 32))
    assert await refused(verify, BODY, sign_standard(NOW, b"y" * 32)) == "401 signature_invalid"


@pytest.mark.parametrize("secret", ["short", b"x" * 65, "whsec_???", [], ["x" * 30] * 9])
def test_a_secret_that_is_none_is_refused(secret: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        hmac_sha256(secret)
    assert raised.value.code == "invalid_secret"


@pytest.mark.parametrize("off", [-301, 301, -600])
async def test_what_was_signed_long_ago_or_in_the_future_is_refused(off: int) -> None:
    key = Ed25519PrivateKey.generate()
    keys = Keys(k1=key)
    async with serving(keys) as url:
        for verify, headers in (
            (hmac_sha256(SECRET, clock=Clock()), sign_draft(NOW + off)),
            (hmac_sha256(SECRET, clock=Clock()), sign_standard(NOW + off)),
            (
                ed25519_jwks(url, allow=[keys.origin], clock=Clock()),
                sign_ed25519(key, at=NOW + off),
            ),
        ):
            assert await refused(verify, BODY, headers) == "401 timestamp_out_of_range"


# Keys.


async def test_keys_are_fetched_once_and_again_for_one_that_is_not_known() -> None:
    first, second = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    keys, clock = Keys(k1=first), Clock()
    async with serving(keys) as url:
        verify = ed25519_jwks(url, allow=[keys.origin], clock=clock)
        await asyncio.gather(*(verify(BODY, sign_ed25519(first, at=NOW - n)) for n in range(10)))
        assert keys.asked == 1

        keys.keys["k2"] = second
        assert await refused(verify, BODY, sign_ed25519(second, "k2")) == "401 unknown_key"
        clock.now += 11
        await verify(BODY, sign_ed25519(second, "k2"))
        for _ in range(10):
            assert await refused(verify, BODY, sign_ed25519(second, "k3")) == "401 unknown_key"
        assert keys.asked == 2
        clock.now += 301
        await verify(BODY, sign_ed25519(first, at=NOW + 312))
        assert keys.asked == 3
        keys.status = 500
        clock.now += 301
        await verify(BODY, sign_ed25519(first, at=NOW + 613))
        assert keys.asked == 4


async def test_without_keys_nothing_is_taken() -> None:
    key = Ed25519PrivateKey.generate()
    keys, clock = Keys(k1=key), Clock()
    async with serving(keys) as url:
        keys.status = 503
        verify = ed25519_jwks(url, allow=[keys.origin], clock=clock)
        for _ in range(3):
            assert await refused(verify, BODY, sign_ed25519(key)) == "503 keys_unavailable"
        assert keys.asked == 1
        keys.status = 200
        clock.now += 11
        await verify(BODY, sign_ed25519(key))


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "EC"},
        {"crv": "X25519"},
        {"use": "enc"},
        {"alg": "none"},
        {"alg": "HS256"},
        {"x": ""},
        {"x": "AAAA"},
    ],
)
async def test_a_key_of_another_kind_signs_nothing(change: dict[str, str]) -> None:
    key = Ed25519PrivateKey.generate()
    keys = Keys()
    given = {"kty": "OKP", "crv": "Ed25519", "kid": "k1", "x": public_of(key), "alg": "EdDSA"}
    keys.extra = [{**given, **change}]
    async with serving(keys) as url:
        verify = ed25519_jwks(url, allow=[keys.origin], clock=Clock())
        assert await refused(verify, BODY, sign_ed25519(key)) == "401 unknown_key"


@pytest.mark.parametrize("url", ["http://example.com/jwks", "https://127.0.0.1/", "ftp://x.y/"])
def test_keys_are_not_fetched_from_anywhere(url: str) -> None:
    with pytest.raises(WebhookError) as raised:
        ed25519_jwks(url)
    assert (raised.value.code, raised.value.status) == ("webhook_url_rejected", 400)


# What is not taken.

WRONG_HEADERS: list[Headers] = [
    {},
    {"webhook-signature": ""},
    {"webhook-signature": "alg:none"},
    {"webhook-signature": f"t={NOW}"},
    {"webhook-signature": f"t={NOW},sha256="},
    {"webhook-signature": f"t={NOW},sha256={'0' * 64}"},
    {"webhook-signature": "x" * 100_000},
    {**sign_draft(), "webhook-signature": sign_draft()["Webhook-Signature"]},
    {"webhook-signature": sign_draft()["Webhook-Signature"] + ","},
    {"webhook-signature": sign_draft()["Webhook-Signature"].upper()},
    {**sign_standard(), "webhook-id": "msg_2"},
    {**sign_standard(), "webhook-id": ""},
    {**sign_standard(), "webhook-timestamp": f"{NOW}.0"},
    {**sign_standard(), "webhook-timestamp": f" {NOW}"},
    {**sign_standard(), "webhook-signature": "v1,"},
    {**sign_standard(), "webhook-signature": sign_standard()["webhook-signature"][3:]},
    {**sign_standard(), "webhook-signature": "v2" + sign_standard()["webhook-signature"][2:]},
]


@pytest.mark.parametrize("headers", WRONG_HEADERS, ids=range(len(WRONG_HEADERS)))
async def test_headers_that_do_not_fit_are_refused(headers: Headers) -> None:
    verify = hmac_sha256(SECRET, clock=Clock())

    assert await refused(verify, BODY, headers) == "401 signature_invalid"


def mutate(random: Random, body: bytes, headers: Headers) -> tuple[bytes, Headers]:
    """Return the request with one thing changed, which nobody signed."""
    name = random.choice(list(headers))
    value = headers[name]
    match random.randrange(6):
        case 0:
            at = random.randrange(len(body))
            flipped = body[at] ^ (1 << random.randrange(8))
            return body[:at] + bytes([flipped]) + body[at + 1 :], headers
        case 1:
            return body[: random.randrange(len(body))], headers
        case 2:
            return body + random.randbytes(random.randint(1, 8)), headers
        case 3:
            at = random.randrange(len(value))
            other = chr(ord(value[at]) ^ (1 << random.randrange(7)))
            return body, {**headers, name: value[:at] + other + value[at + 1 :]}
        case 4:
            return body, {**headers, name: value[: random.randrange(len(value))]}
        case _:
            at = random.randrange(len(value) + 1)
            added = random.choice("0123456789abcdefABCDEF+/=-_., \t\n\0")
            return body, {**headers, name: value[:at] + added + value[at:]}


@pytest.mark.parametrize("kind", ["ed25519", "draft", "standard"])
async def test_of_ten_thousand_changed_requests_none_is_taken(kind: str) -> None:
    random = Random(kind)
    key = Ed25519PrivateKey.generate()
    keys = Keys(k1=key)
    async with serving(keys) as url:
        signed: Headers
        if kind == "ed25519":
            verify = ed25519_jwks(url, allow=[keys.origin], clock=Clock())
            signed = sign_ed25519(key)
        else:
            verify = hmac_sha256(SECRET, clock=Clock())
            signed = sign_draft() if kind == "draft" else sign_standard()
        refusals: set[str] = set()
        tried = 0
        while tried < 10_000:
            body, headers = mutate(random, BODY, signed)
            if (body, headers) == (BODY, signed):
                continue
            tried += 1
            try:
                await verify(body, headers)
            except WebhookError as error:
                refusals.add(f"{error.status} {error.code}")
            else:
                pytest.fail(f"taken: {body!r} {headers}")
        assert refusals - {"401 unknown_key"} == {"401 signature_invalid"}
        # What was refused was not remembered: the request itself is still taken.
        await verify(BODY, signed)
