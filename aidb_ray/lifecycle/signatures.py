"""Who sent a webhook: checked on its raw bytes, before anything of them is parsed.

Source: Durable Streams PROTOCOL.md §6 (`t=,kid=,ed25519=`), its earlier draft (`t=,sha256=`), and
Standard Webhooks (`webhook-id`, `webhook-timestamp`, `v1,`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aidb_ray.errors import AidbError, ConfigError, WebhookError
from aidb_ray.lifecycle.egress import Egress
from aidb_ray.lifecycle.replays import ReplayCache

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

logger = logging.getLogger(__name__)

TOLERANCE_MS = 300_000
KEYS_FRESH_MS = 300_000
KEYS_RETRY_MS = 10_000
"""How soon keys are fetched again for one that is not among them."""
MAX_HEADER = 4_096
MAX_SECRETS = 8
MAX_KEYS = 64

_ED25519 = re.compile(r"t=(\d{1,12}),kid=([\w.-]{1,128}),ed25519=([A-Za-z0-9_-]{86})", re.ASCII)
_DRAFT = re.compile(r"t=(\d{1,12}),sha256=([0-9a-f]{64})", re.ASCII)
_STANDARD_ID = re.compile(r"[!-~]{1,256}", re.ASCII)
_STANDARD_TIME = re.compile(r"\d{1,12}", re.ASCII)

_FROM_URL = str.maketrans("-_", "+/")

Clock = Callable[[], float]


class Verifier(Protocol):
    """Checks who sent a webhook; a coroutine function with these parameters will do as well."""

    async def __call__(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Return if the request is what its sender signed, just now, for the first time.

        Raises:
            WebhookError: 401: `signature_invalid`; `timestamp_out_of_range`; `unknown_key`;
                `replayed`.
        """
        ...


def hmac_sha256(
    secret: str | bytes | Sequence[str | bytes],
    *,
    tolerance_ms: int = TOLERANCE_MS,
    clock: Clock = time.time,
) -> Verifier:
    """Return a check by a shared secret: of Standard Webhooks, or `t=...,sha256=...`.

    Args:
        secret: 24 to 64 bytes, `whsec_` and base64, or text as it is; several while one replaces
            another.
        tolerance_ms: How far the sender's clock may be off, either way.
        clock: The time in seconds since 1970.

    Raises:
        ConfigError: `invalid_secret`.
    """
    given = [secret] if isinstance(secret, str | bytes) else list(secret)
    if not 1 <= len(given) <= MAX_SECRETS:
        raise ConfigError(f"Give 1 to {MAX_SECRETS} secrets.", code="invalid_secret")
    return _Hmac([_secret_of(each) for each in given], tolerance_ms, clock)


def ed25519_jwks(
    url: str,
    *,
    tolerance_ms: int = TOLERANCE_MS,
    allow: Sequence[str] = (),
    clock: Clock = time.time,
) -> Verifier:
    """Return a check by the public keys that the sender publishes, Ed25519 only.

    Keys are fetched when the first request comes and every 5 minutes; for a key that is not among
    them once more, at most every 10 seconds.

    Args:
        url: Of the key set, `https`.
        tolerance_ms: How far the sender's clock may be off, either way.
        allow: Origins, such as `http://127.0.0.1:4437`, that may be asked although they are not
            public.
        clock: The time in seconds since 1970.

    Raises:
        WebhookError: `webhook_url_rejected`: keys are not fetched from there.
        ConfigError: `missing_extra`: `aidb-ray[gateway]` is not installed.
    """
    if find_spec("cryptography") is None:
        raise ConfigError(
            "Checking signatures needs the extra `aidb-ray[gateway]`.", code="missing_extra"
        )
    return _Ed25519(_KeySet(url, Egress(allow=allow), clock), tolerance_ms, clock)


class _Signed:
    """A request whose signature was found to be right, until its time and newness were checked."""

    def __init__(self, tolerance_ms: int, clock: Clock) -> None:
        self._tolerance_ms = tolerance_ms
        self._clock = clock
        self._replays = ReplayCache(2 * tolerance_ms)

    def accept(self, signed_at: int, identity: bytes) -> None:
        now_ms = round(self._clock() * 1000)
        if abs(now_ms - signed_at * 1000) > self._tolerance_ms:
            raise WebhookError(
                "The request was signed too long ago, or the clocks differ.",
                code="timestamp_out_of_range",
                status=401,
            )
        self._replays.check(hashlib.sha256(identity).digest(), now_ms)


class _Hmac:
    def __init__(self, secrets: Sequence[bytes], tolerance_ms: int, clock: Clock) -> None:
        self._secrets = secrets
        self._signed = _Signed(tolerance_ms, clock)

    def __repr__(self) -> str:
        return "<hmac_sha256>"

    async def __call__(self, body: bytes, headers: Mapping[str, str]) -> None:
        given = _header(headers, "webhook-signature")
        message_id = _header(headers, "webhook-id", required=False)
        if message_id is None:
            found = _DRAFT.fullmatch(given)
            if found is None:
                raise _invalid()
            stamp, signatures = found[1], [bytes.fromhex(found[2])]
            message = f"{stamp}.".encode() + body
        else:
            stamp = _header(headers, "webhook-timestamp")
            if not (_STANDARD_ID.fullmatch(message_id) and _STANDARD_TIME.fullmatch(stamp)):
                raise _invalid()
            signatures = _standard_signatures(given)
            message = f"{message_id}.{stamp}.".encode() + body
        expected = [hmac.digest(secret, message, "sha256") for secret in self._secrets]
        # Each is compared with each, however early one fits.
        fits = [hmac.compare_digest(one, other) for one in expected for other in signatures]
        if not any(fits):
            raise _invalid()
        self._signed.accept(int(stamp), message)


class _Ed25519:
    def __init__(self, keys: _KeySet, tolerance_ms: int, clock: Clock) -> None:
        self._keys = keys
        self._signed = _Signed(tolerance_ms, clock)

    def __repr__(self) -> str:
        return f"<ed25519_jwks {self._keys.url}>"

    async def __call__(self, body: bytes, headers: Mapping[str, str]) -> None:
        from cryptography.exceptions import InvalidSignature

        found = _ED25519.fullmatch(_header(headers, "webhook-signature"))
        if found is None:
            raise _invalid()
        stamp, key_id, encoded = found.groups()
        signature = _from_base64url(encoded)
        key = await self._keys.find(key_id)
        message = f"{stamp}.".encode() + body
        try:
            key.verify(signature, message)
        except InvalidSignature:
            raise _invalid() from None
        self._signed.accept(int(stamp), signature)


class _Jwk(msgspec.Struct, frozen=True):
    kty: str = ""
    crv: str = ""
    kid: str = ""
    x: str = ""
    use: str = "sig"
    alg: str = "EdDSA"


class _Jwks(msgspec.Struct, frozen=True):
    keys: list[_Jwk]


_decode_jwks = msgspec.json.Decoder(_Jwks).decode


class _KeySet:
    """The keys that a sender publishes, as fetched last."""

    def __init__(self, url: str, egress: Egress, clock: Clock) -> None:
        egress.check(url)
        self.url = url
        self._egress = egress
        self._clock = clock
        # Those that were fetched last; they stay while newer ones cannot be.
        self._keys: dict[str, Ed25519PublicKey] | None = None
        self._fetched_at_ms: int | None = None
        self._fetching = asyncio.Lock()

    async def find(self, key_id: str) -> Ed25519PublicKey:
        """Return a key.

        Raises:
            WebhookError: `unknown_key`, 401; `keys_unavailable`, 503: they cannot be fetched.
        """
        if self._is_due(key_id):
            async with self._fetching:
                if self._is_due(key_id):
                    await self._fetch()
        if self._keys is None:
            raise WebhookError(
                "The sender's keys cannot be fetched now.", code="keys_unavailable", status=503
            )
        key = self._keys.get(key_id)
        if key is None:
            raise WebhookError("The signing key is not known.", code="unknown_key", status=401)
        return key

    def _is_due(self, key_id: str) -> bool:
        if self._fetched_at_ms is None:
            return True
        age_ms = self._clock() * 1000 - self._fetched_at_ms
        return age_ms > (KEYS_FRESH_MS if key_id in (self._keys or ()) else KEYS_RETRY_MS)

    async def _fetch(self) -> None:
        try:
            answer = await self._egress.get(self.url)
            found = _decode_jwks(answer.body).keys[:MAX_KEYS] if answer.status == 200 else None
        except (msgspec.DecodeError, AidbError) as error:
            logger.warning("keys of %s cannot be fetched: %s", self.url, error)
            found = None
        # What cannot be fetched is not asked for again at once either.
        self._fetched_at_ms = round(self._clock() * 1000)
        if found is not None:
            self._keys = {key.kid: loaded for key in found if (loaded := _load(key)) is not None}


def _load(key: _Jwk) -> Ed25519PublicKey | None:
    """Return a key that may sign webhooks; others of the set are none of ours."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    is_ours = (key.kty, key.crv, key.use) == ("OKP", "Ed25519", "sig")
    if not is_ours or key.alg not in ("EdDSA", "Ed25519"):
        return None
    try:
        return Ed25519PublicKey.from_public_bytes(_from_base64url(key.x))
    except (ValueError, WebhookError):
        return None


def _header(headers: Mapping[str, str], name: str, *, required: bool = True) -> Any:
    """Return a header that came once; None if it did not and need not."""
    found = [value for key, value in headers.items() if key.lower() == name]
    if not found and not required:
        return None
    if len(found) != 1 or len(found[0]) > MAX_HEADER:
        raise _invalid()
    return found[0]


def _standard_signatures(given: str) -> list[bytes]:
    found: list[bytes] = []
    for part in given.split(" ")[:MAX_SECRETS]:
        version, _, encoded = part.partition(",")
        if version == "v1":
            found.append(_from_base64(encoded))
    return found


def _secret_of(given: str | bytes) -> bytes:
    secret = given if isinstance(given, bytes) else given.encode()
    if secret.startswith(b"whsec_"):
        try:
            secret = base64.b64decode(secret.removeprefix(b"whsec_"), validate=True)
        except binascii.Error as error:
            raise ConfigError(
                "After `whsec_` a secret is base64.", code="invalid_secret"
            ) from error
    if not 24 <= len(secret) <= 64:
        raise ConfigError("A secret has 24 to 64 bytes.", code="invalid_secret")
    return secret


def _from_base64url(text: str) -> bytes:
    return _from_base64((text + "=" * (-len(text) % 4)).translate(_FROM_URL))


def _from_base64(text: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        raise _invalid() from None
    # Its last letter has bits that stand for nothing: of several texts one is right.
    if base64.b64encode(value).decode() != text:
        raise _invalid()
    return value


def _invalid() -> WebhookError:
    return WebhookError("The signature does not fit.", code="signature_invalid", status=401)
