"""What a verified payload says: its claims become an identity, or a refusal that says why.

PyJWT would check the registered claims as well, but it reads the system's
clock, takes ``"exp": "1"`` for a number, and lets JSON through that a client's
parser chokes on (``NaN``, lone surrogates, endless nesting).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import orjson

from broker.auth.permissions import NO_GRANTS, Grants, Identity, valid_user
from broker.config import KIB, Key
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import UserId

MAX_INFO_BYTES: Final = 2 * KIB
"""Claim ``info`` as JSON; it is repeated for every member of a presence list, like ``state``."""

MAX_INFO_DEPTH: Final = 32
"""Nesting of ``info``. Messages may nest 64 deep, and ``info`` travels inside of them."""


class TokenRefused(BrokerError):  # noqa: N818 - named for what the client is told
    """A token that does not identify anybody.

    ``reason`` is safe to show: it never quotes the token's claims or signature.
    ``expired``: it was genuine once, so the client should come back with a new
    one (4501); otherwise it must not come back with this one (4401).
    """

    def __init__(self, reason: str, *, expired: bool = False) -> None:
        super().__init__(ErrorCode.UNAUTHENTICATED, f"token refused: {reason}")
        self.reason = reason
        self.expired = expired


class _Claims(msgspec.Struct, frozen=True):
    """The claims we know, RFC 7519 section 4.1 and our own. Others are ignored."""

    sub: str
    exp: float
    nbf: float | None = None
    iss: str | None = None
    aud: str | list[str] | None = None
    info: Any = None
    rooms: Any = None


def identity_of(payload: bytes, rules: Key, now: float, leeway: float) -> Identity:
    """Who ``payload`` identifies, if it keeps the ``rules`` of the key that signed it.

    ``now`` is Unix time, ``leeway`` the seconds tolerated in ``exp`` and ``nbf``.
    Raises :class:`TokenRefused`.
    """
    try:
        claims = msgspec.convert(orjson.loads(payload), _Claims)
    except orjson.JSONDecodeError:
        raise TokenRefused("its claims are not JSON that every client can read") from None
    except msgspec.ValidationError as error:  # tells types and places, never values
        raise TokenRefused(f"its claims: {error}") from None
    identity = Identity(UserId(claims.sub), claims.exp, claims.info, _grants(claims))
    if has_expired(identity, now, leeway):
        raise TokenRefused("it has expired", expired=True)
    if claims.nbf is not None and now < claims.nbf - leeway:
        raise TokenRefused("it is not valid yet (nbf)")
    if rules.issuer is not None and claims.iss != rules.issuer:
        raise TokenRefused("its iss is not the configured issuer")
    audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud or []
    if rules.audience is not None and rules.audience not in audience:
        raise TokenRefused("its aud does not name the configured audience")
    if not valid_user(claims.sub):
        raise TokenRefused("its sub is no user id: 'user:' and it must make a room's name")
    _check_info(claims.info)
    return identity


def has_expired(identity: Identity, now: float, leeway: float) -> bool:
    """Whether the token of ``identity`` is no longer good at ``now`` (Unix seconds)."""
    assert identity.expires is not None
    return now >= identity.expires + leeway


def _grants(claims: _Claims) -> Grants:
    if claims.rooms is None:
        return NO_GRANTS
    try:
        return Grants.from_claim(claims.rooms)
    except ValueError as error:
        raise TokenRefused(str(error)) from None


def _check_info(info: Any) -> None:
    if info is None:
        return
    if _nests_deeper(info, MAX_INFO_DEPTH):
        raise TokenRefused(f"its info nests deeper than {MAX_INFO_DEPTH}")
    size = len(orjson.dumps(info))
    if size > MAX_INFO_BYTES:
        raise TokenRefused(f"its info is {size} bytes of JSON, at most {MAX_INFO_BYTES} are allowed")


def _nests_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(children) and (levels == 0 or any(_nests_deeper(child, levels - 1) for child in children))
