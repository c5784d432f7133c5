"""The one file that knows PyJWT and cryptography: key material in, verified payloads out.

Foreign exceptions stop here. Keys are checked when they are loaded, so that
verifying only has to verify; PyJWT would merely warn about a weak one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import jwt
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey, Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from jwt.algorithms import HMACAlgorithm

from broker.auth.material import KeyProblem, Material

if TYPE_CHECKING:
    from broker.auth.material import PrivateKey, PublicKey

MIN_SECRET_BYTES: Final = 32
"""As long as the hash, RFC 7518 section 3.2."""

MIN_RSA_BITS: Final = 2048
"""RFC 7518 section 3.3."""

MAX_RSA_BITS: Final = 16384
"""OpenSSL verifies nothing larger (``OPENSSL_RSA_MAX_MODULUS_BITS``)."""

MAX_SET_KEYS: Final = 64
"""Keys of a set that are looked at; a bound against nonsense, far above a rotation's two or three."""

_PRIVATE: Final = (RSAPrivateKey, EllipticCurvePrivateKey, Ed25519PrivateKey, Ed448PrivateKey)

# One per algorithm, each knowing only its own: whatever a header says, no other code can run.
_JWS: Final[Mapping[str, jwt.PyJWS]] = {
    algorithm: jwt.PyJWS(algorithms=[algorithm]) for algorithm in ("HS256", "RS256", "ES256", "EdDSA")
}


class BadSignature(Exception):  # noqa: N818 - an outcome, told apart by type
    """The key did not sign the token."""


class Malformed(Exception):  # noqa: N818 - the same
    """Not a signed token at all."""


def payload_of(token: str, algorithm: str, key: PublicKey) -> bytes:
    """The payload of ``token`` if ``key`` signed it with ``algorithm``.

    Raises :class:`BadSignature` or :class:`Malformed`. Says nothing about claims.
    """
    try:
        payload: bytes = _JWS[algorithm].decode_complete(token, key, algorithms=[algorithm])["payload"]
    except jwt.InvalidSignatureError:
        raise BadSignature from None
    except (jwt.PyJWTError, ValueError):
        raise Malformed from None
    return payload


def signed(payload: bytes, algorithm: str, key: PrivateKey, kid: str | None) -> str:
    """``payload`` as a signed token."""
    return _JWS[algorithm].encode(payload, key, algorithm, {"kid": kid} if kid is not None else None)


def from_secret(secret: bytes, kid: str | None) -> Material:
    """An HS256 secret. Raises :class:`~broker.auth.material.KeyProblem`."""
    if b"-----BEGIN" in secret:
        # The classic confusion: a public key taken for a secret lets everyone who has it sign.
        raise KeyProblem("HS256 needs a secret, this is PEM", "set algorithm to the kind of this key")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise KeyProblem(
            "HS256 needs a secret, this is a public key, a JWK or empty", "make one: openssl rand -hex 32"
        ) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyProblem(
            f"a secret of {len(secret)} bytes can be guessed; HS256 takes at least {MIN_SECRET_BYTES}",
            "make one: openssl rand -hex 32",
        )
    return Material(kid, secret, secret)


def from_pem(algorithm: str, pem: bytes, kid: str | None) -> Material:
    """A public or private key in PEM. Raises :class:`~broker.auth.material.KeyProblem`."""
    if b"-----BEGIN CERTIFICATE" in pem:
        raise KeyProblem("this is a certificate", "take its key: openssl x509 -pubkey -noout -in FILE")
    try:
        key: object
        if b"PRIVATE KEY-----" in pem:
            key = load_pem_private_key(pem, password=None)
        else:
            key = load_pem_public_key(pem)
    except TypeError:
        raise KeyProblem("the key is encrypted", "remove its passphrase: openssl pkey -in FILE") from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyProblem(
            "neither a key in PEM nor a JWK set", "give one that begins with -----BEGIN PUBLIC KEY-----"
        ) from None
    return _material(algorithm, key, kid)


def looks_like_jwk(content: bytes) -> bool:
    """Whether ``content`` is a JWK or a set of them, rather than PEM or a secret."""
    try:
        parsed = orjson.loads(content)
    except orjson.JSONDecodeError:
        return False
    return isinstance(parsed, dict) and ("keys" in parsed or "kty" in parsed)


def from_jwk_set(algorithm: str, content: bytes) -> tuple[Material, ...]:
    """The keys of a JWK set (or of one JWK) that fit ``algorithm``.

    Members that do not fit are passed over, as RFC 7517 section 5 asks: a set
    may hold keys for other purposes. Raises :class:`~broker.auth.material.KeyProblem`
    if none is left.
    """
    try:
        parsed = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise KeyProblem("not JSON", "it must be a JWK set, RFC 7517 section 5") from None
    members = parsed.get("keys", [parsed]) if isinstance(parsed, dict) else None
    if not isinstance(members, list):
        raise KeyProblem("not a JWK set", 'it must be an object with a list "keys", RFC 7517 section 5')
    keys = []
    passed_over = "it is empty"
    for jwk in members[:MAX_SET_KEYS]:
        try:
            keys.append(_from_jwk(algorithm, jwk))
        except KeyProblem as problem:
            passed_over = problem.problem
    if not keys:
        raise KeyProblem(f"no key of this set is for {algorithm}: {passed_over}", "correct set or algorithm")
    return tuple(keys)


def _from_jwk(algorithm: str, jwk: object) -> Material:
    if not isinstance(jwk, dict):
        raise KeyProblem("a member is no object", "")
    kid = jwk.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise KeyProblem("a kid is no string", "")
    if jwk.get("use", "sig") != "sig" or jwk.get("alg", algorithm) != algorithm:
        raise KeyProblem("its keys are for another use or algorithm", "")
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or not ("verify" in operations or "sign" in operations):
        raise KeyProblem("its keys are for other operations", "")
    try:
        key: Any = jwt.PyJWK(jwk, algorithm).key
    except (jwt.PyJWTError, UnsupportedAlgorithm, KeyError, TypeError, ValueError):
        # KeyError: PyJWT 2.15 lets that of an "oct" key without "k" through.
        raise KeyProblem("its keys are of another kind, or broken", "") from None
    if isinstance(key, bytes):
        return from_secret(key, kid)
    return _material(algorithm, key, kid)


_FITS: Final[Mapping[str, tuple[str, Callable[[object], bool]]]] = {
    "RS256": (
        f"an RSA key of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits",
        lambda key: isinstance(key, RSAPublicKey) and MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS,
    ),
    "ES256": (
        "an elliptic curve key on P-256",
        lambda key: isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1),
    ),
    "EdDSA": (
        "an Ed25519 or Ed448 key",
        lambda key: isinstance(key, Ed25519PublicKey | Ed448PublicKey),
    ),
}


def _material(algorithm: str, key: Any, kid: str | None) -> Material:
    private = key if isinstance(key, _PRIVATE) else None
    public = key.public_key() if hasattr(key, "public_key") else key
    wanted, fits = _FITS[algorithm]
    if not fits(public):
        size = f" of {public.key_size} bits" if hasattr(public, "key_size") else ""
        kind = type(public).__name__.lstrip("_")
        raise KeyProblem(f"{algorithm} needs {wanted}, this is {kind}{size}", "set the algorithm of this key")
    return Material(kid, public, private)
