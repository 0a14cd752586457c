"""Requests to addresses that others have named: to public ones only, and nowhere else.

A name is resolved once, and the connection goes to exactly the address that was looked at; so a
name that answers otherwise the second time leads nowhere.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeAlias, cast

import httpx2
import msgspec

from aidb_ray.errors import UnavailableError, WebhookError

MAX_BODY = 64 << 10
TIMEOUT_MS = 10_000
MAX_URL = 2_048

Address: TypeAlias = IPv4Address | IPv6Address
Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]

# IPv6 addresses that lead to an IPv4 one.
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered; of a body at most `MAX_BODY` bytes are taken."""

    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object, an empty one if it is none."""
        try:
            found: Any = msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return {}
        return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


class Egress:
    """Gets and posts within bounds. Redirects are answers like others and not followed.

    Args:
        allow: Origins (`scheme://host:port`) that may be asked although they are not public or not
            `https`, exactly as URLs write them.
        resolve: Looks up a name; by default the system does.
    """

    def __init__(
        self,
        *,
        allow: Sequence[str] = (),
        timeout_ms: int = TIMEOUT_MS,
        resolve: Resolve | None = None,
    ) -> None:
        self._allowed = frozenset(_origin(_parse(each)) for each in allow)
        self._timeout_s = timeout_ms / 1000
        self._resolve = resolve or _look_up

    def check(self, url: str) -> None:
        """Refuse what can be seen to be wrong without asking anybody.

        Raises:
            WebhookError: `webhook_url_rejected`, 400.
        """
        parsed = _parse(url)
        if _origin(parsed) not in self._allowed:
            _check_public(parsed)

    async def get(self, url: str) -> Answer:
        """Ask for something.

        Raises:
            WebhookError: `webhook_url_rejected`, 400: nothing was sent.
            UnavailableError: outcome `unknown`.
        """
        return await self._send("GET", url, None, {})

    async def post(self, url: str, body: Mapping[str, Any], *, token: str = "") -> Answer:
        """Post JSON, with a bearer token that is written nowhere else. See `get`."""
        headers = {"content-type": "application/json"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        return await self._send("POST", url, msgspec.json.encode(body), headers)

    async def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        parsed = _parse(url)
        try:
            async with asyncio.timeout(self._timeout_s):
                address = await self._address_of(parsed)
                return await self._ask(method, parsed, address, body, headers)
        except (httpx2.HTTPError, OSError, TimeoutError) as error:
            # What the library says may hold the URL; nothing it says holds the token.
            raise UnavailableError(
                f"{parsed.host} did not answer: {type(error).__name__}.", outcome="unknown"
            ) from error

    async def _address_of(self, url: httpx2.URL) -> str:
        """Return the one address to connect to."""
        port = _port_of(url)
        is_allowed = _origin(url) in self._allowed
        if not is_allowed:
            _check_public(url)
        found = await self._resolve(url.host, port)
        if not found:
            raise OSError(f"{url.host} has no address")
        if not is_allowed:
            # One that is not public is enough: a name for both is made to deceive.
            for each in found:
                if not is_public(ip_address(each)):
                    raise _rejected(url, "leads to an address that is not public")
        return found[0]

    async def _ask(
        self,
        method: str,
        url: httpx2.URL,
        address: str,
        body: bytes | None,
        headers: Mapping[str, str],
    ) -> Answer:
        pinned = url.copy_with(host=address)
        host = url.host if url.port is None else f"{url.host}:{url.port}"
        async with httpx2.AsyncClient(trust_env=False, timeout=self._timeout_s) as client:
            request = client.build_request(
                method,
                pinned,
                content=body,
                headers={**headers, "host": host, "accept-encoding": "identity"},
                # The certificate is that of the name, whatever address it has.
                extensions={"sni_hostname": url.host},
            )
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                taken = bytearray()
                async for part in response.aiter_raw():
                    taken += part
                    if len(taken) > MAX_BODY:
                        del taken[MAX_BODY:]
                        break
            finally:
                await response.aclose()
        return Answer(response.status_code, bytes(taken))


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet at large, through whatever it is written as."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address.teredo is not None:
            return False
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFF_FFFF)
        if address in _NAT64_LOCAL or (inner is None and int(address) >> 32 == 0):
            return False
        if inner is not None:
            return is_public(inner)
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


async def _look_up(host: str, port: int) -> Sequence[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def _parse(url: str) -> httpx2.URL:
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable():
        raise _rejected(None, "is no URL that is called back")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise _rejected(None, "is no URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _rejected(None, "is neither http nor https")
    return parsed


def _check_public(url: httpx2.URL) -> None:
    if url.scheme != "https":
        raise _rejected(url, "is not https")
    if url.userinfo:
        raise _rejected(url, "names a user")
    if _port_of(url) != 443:
        raise _rejected(url, "has a port of its own")
    host = url.host.rstrip(".")
    if "." not in host and ":" not in host:
        raise _rejected(url, "is a name of this network")
    try:
        address = ip_address(host)
    except ValueError:
        # Not all that other programs read as an address is one here: no name ends in a number.
        if host.rpartition(".")[2][:1].isdigit():
            raise _rejected(url, "is no name") from None
        return
    if not is_public(address):
        raise _rejected(url, "is an address that is not public")


def _port_of(url: httpx2.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80


def _origin(url: httpx2.URL) -> tuple[str, str, int]:
    if url.userinfo:
        # Of no origin that anybody allowed.
        return "", "", 0
    return url.scheme, url.host, _port_of(url)


def _rejected(url: httpx2.URL | None, why: str) -> WebhookError:
    where = "The URL" if url is None else f"{url.scheme}://{url.host}"
    return WebhookError(f"{where} {why}.", code="webhook_url_rejected", status=400)
