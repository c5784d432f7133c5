"""From a token to an :class:`~broker.auth.permissions.Identity`, or a refusal that says why.

The ladder, cheapest rung first: length and shape, the cache, the header, the
key, the signature (:mod:`broker.auth.crypto`), the claims (:mod:`broker.auth.claims`).

CPU per token of 260 to 560 bytes (CPython 3.11 on a shared 2-core VM, median of
five runs; read them as ratios): from the cache 0.9 µs; verified HS256 32, RS256
49, ES256 76, EdDSA 87 µs. A bad signature costs as much as a good one. A storm
of 10,000 distinct HS256 tokens took 0.30 s when none was known, and 9 ms when
all were.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import orjson
import trio

from broker.auth.claims import TokenRefused, has_expired, identity_of
from broker.auth.keys import KeyRing, signing_key
from broker.auth.material import Material
from broker.auth.permissions import Identity
from broker.config import KIB, Auth, Key
from broker.errors import BrokerError, ErrorCode

__all__ = ["KeysUnavailable", "TokenRefused", "TokenStatistics", "TokenVerifier", "sign"]

MAX_TOKEN_BYTES: Final = 8 * KIB
"""Tokens travel in a header, and proxies commonly allow 8 KiB for one."""

CACHED_IDENTITIES: Final = 16_384
"""Tokens whose verification is remembered, about 600 bytes each; enough for 10,000 sessions."""

_SHOWN_KID = 40
"""Characters of an unknown key id that are repeated, escaped."""


class KeysUnavailable(BrokerError):  # noqa: N818 - named for what the client is told
    """The key that a token names may exist, but its set cannot be fetched now.

    Not the token's fault: the client should come back after ``retry_after`` s.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(
            ErrorCode.UNAVAILABLE,
            "the issuer's key set does not hold this token's key, and cannot be fetched again right now",
            retry_after=retry_after,
        )


class TokenStatistics(NamedTuple):
    """Counters since the start; ``identities`` is how many verified tokens are remembered now."""

    verified: int
    from_cache: int
    refused: int
    identities: int
    key_fetches: int
    key_fetch_failures: int


class _Header(NamedTuple):
    algorithm: str
    kid: str | None


class TokenVerifier:
    """Verifies tokens against the configured keys, and remembers those it has seen.

    Run :meth:`run` in a nursery for as long as tokens come. ``source`` names
    the configuration in errors; ``wall_clock`` is Unix time in seconds. Reads
    key files; raises :class:`~broker.errors.ConfigurationError` for a bad key.
    """

    def __init__(
        self,
        auth: Auth,
        *,
        dev: bool,
        wall_clock: Callable[[], float] = time.time,
        source: str = "configuration",
    ) -> None:
        self._ring = KeyRing(auth, dev=dev, source=source)
        self._leeway = auth.leeway
        self._wall_clock = wall_clock
        self._seen: OrderedDict[bytes, Identity] = OrderedDict()  # least recently used first
        self._verified = self._from_cache = self._refused = 0

    async def run(self) -> None:
        """Keep key sets behind URLs fresh until cancelled; return at once where none is configured."""
        await self._ring.run(self._seen.clear)

    def verify_nowait(self, token: str) -> Identity | None:
        """Who ``token`` identifies; ``None`` if a key set must be fetched first: then :meth:`verify` it.

        Raises :class:`TokenRefused`, or :class:`KeysUnavailable` if a key set
        is needed and must not be fetched again yet.
        """
        return self._verify(token, asked=False)

    async def verify(self, token: str) -> Identity:
        """Who ``token`` identifies. Waits at most for one fetch of the key sets, about 10 s.

        Raises :class:`TokenRefused`, or :class:`KeysUnavailable` if the fetch
        failed, was not allowed yet, or :meth:`run` is not running.
        """
        identity = self._verify(token, asked=False)
        if identity is None:
            header = _header(token)
            async with trio.open_nursery() as nursery:
                for remote in self._ring.outdated(header.algorithm, header.kid):
                    nursery.start_soon(remote.refresh)
            identity = self._verify(token, asked=True)
            assert identity is not None
        return identity

    def statistics(self) -> TokenStatistics:
        """A snapshot of the counters."""
        return TokenStatistics(
            self._verified,
            self._from_cache,
            self._refused,
            len(self._seen),
            sum(remote.fetches for remote in self._ring.remotes),
            sum(remote.failures for remote in self._ring.remotes),
        )

    def _verify(self, token: str, *, asked: bool) -> Identity | None:
        try:
            return self._ladder(token, asked=asked)
        except TokenRefused:
            self._refused += 1
            raise

    def _ladder(self, token: str, *, asked: bool) -> Identity | None:
        if len(token) > MAX_TOKEN_BYTES:
            raise TokenRefused(f"it is longer than {MAX_TOKEN_BYTES} bytes")
        if not token.isascii():
            raise TokenRefused("it is not a signed JWT")
        digest = hashlib.sha256(token.encode()).digest()
        now = self._wall_clock()
        known = self._seen.get(digest)
        if known is not None:
            if has_expired(known, now, self._leeway):
                del self._seen[digest]
                raise TokenRefused("it has expired", expired=True)
            self._seen.move_to_end(digest)
            self._from_cache += 1
            return known
        header = _header(token)
        identity = self._match(token, header, now)
        if identity is None:
            self._no_key(header, asked=asked)
            return None
        self._verified += 1
        self._seen[digest] = identity
        if len(self._seen) > CACHED_IDENTITIES:
            self._seen.popitem(last=False)
        return identity

    def _match(self, token: str, header: _Header, now: float) -> Identity | None:
        """The identity, by the first key that signed ``token`` and whose rules it keeps.

        ``None`` if no key signed it; raises :class:`TokenRefused` if none of those that did lets it pass.
        """
        from broker.auth import crypto  # noqa: PLC0415 - 11 MB that a broker without tokens never needs

        refusal: TokenRefused | None = None
        for rules, material in self._ring.candidates(header.algorithm, header.kid):
            try:
                payload = crypto.payload_of(token, rules.algorithm, material.public)
                return identity_of(payload, rules, now, self._leeway)
            except crypto.BadSignature:
                continue
            except crypto.Malformed:
                raise TokenRefused("it is not a signed JWT") from None
            except TokenRefused as error:  # one key may serve two entries with different audiences
                refusal = error
        if refusal is not None:
            raise refusal
        return None

    def _no_key(self, header: _Header, *, asked: bool) -> None:
        """Return if fetching a key set may help; else raise what it comes to. ``asked``: it was fetched."""
        outdated = self._ring.outdated(header.algorithm, header.kid)
        if asked and not all(remote.fetched for remote in outdated):
            raise KeysUnavailable(max(1.0, *(remote.retry_in(trio.current_time()) for remote in outdated)))
        if outdated and not asked:
            wait = max(remote.retry_in(trio.current_time()) for remote in outdated)
            if wait > 0:
                raise KeysUnavailable(wait)
            return
        algorithms = self._ring.algorithms
        if not algorithms:
            raise TokenRefused("this broker has no keys to verify tokens with (auth.keys)")
        if header.algorithm not in algorithms:
            raise TokenRefused(f"its alg is not that of the configured keys ({', '.join(algorithms)})")
        if self._ring.candidates(header.algorithm, header.kid):
            raise TokenRefused("its signature does not match")
        if header.kid is None:
            raise TokenRefused("it names no key (kid), and every configured key has an id")
        raise TokenRefused(f"no configured key has the id (kid) {header.kid[:_SHOWN_KID]!a}")


def sign(
    auth: Auth,
    user: str,
    *,
    ttl: float,
    info: Any = None,
    rooms: dict[str, list[str]] | None = None,
    dev: bool = False,
    now: float | None = None,
    source: str = "configuration",
) -> str:
    """A token for ``user``, good for ``ttl`` seconds from ``now`` (Unix time, by default the present).

    Signed by the first configured key that can, or the development key; a
    verifier with the same configuration accepts it. Raises
    :class:`~broker.errors.ConfigurationError` if no key can sign, and
    :class:`ValueError` with a sentence if an argument would make a token that
    is refused.
    """
    rules, material = signing_key(auth, dev=dev, source=source)
    issued = time.time() if now is None else now
    if not 0 < ttl < math.inf:
        raise ValueError("ttl must be a positive number of seconds")
    claims: dict[str, Any] = {"sub": user, "iat": int(issued), "exp": math.ceil(issued + ttl)}
    optional = {"iss": rules.issuer, "aud": rules.audience, "info": info, "rooms": rooms}
    claims.update((name, value) for name, value in optional.items() if value is not None)
    token = _signed(claims, rules, material)
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(
            f"the token would be {len(token)} bytes long, at most {MAX_TOKEN_BYTES} are accepted"
        )
    return token


def _signed(claims: dict[str, Any], rules: Key, material: Material) -> str:
    from broker.auth import crypto  # noqa: PLC0415 - as above

    assert material.private is not None
    try:
        payload = orjson.dumps(claims)
        identity_of(payload, rules, claims["iat"], leeway=0)
    except (TypeError, TokenRefused) as error:
        reason = error.reason if isinstance(error, TokenRefused) else str(error)
        raise ValueError(f"such a token would be refused: {reason}") from None
    return crypto.signed(payload, rules.algorithm, material.private, material.kid)


# ------------------------------------------------------------------- parsing


def _header(token: str) -> _Header:
    """The header, unverified: good for choosing among keys and for nothing else."""
    if token.count(".") != 2:
        raise TokenRefused("it is not a signed JWT (three parts joined by dots)")
    segment = token.partition(".")[0]
    try:
        header = orjson.loads(base64.urlsafe_b64decode(segment + "=="))
    except (binascii.Error, orjson.JSONDecodeError):
        raise TokenRefused("its header is not JSON in base64url") from None
    if not isinstance(header, dict):
        raise TokenRefused("its header is not a JSON object")
    if "crit" in header:
        # RFC 7515 section 4.1.11: who does not understand an extension must refuse; we understand none.
        raise TokenRefused("it has a critical header extension (crit)")
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str) or not (kid is None or isinstance(kid, str)):
        raise TokenRefused("its header needs a string alg, and a string kid if it has one")
    return _Header(algorithm, kid)
