"""Real keys, made once per test run, and tokens built by hand to say exactly what a test wants."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from broker.config import Auth, Key

SECRET = "a-secret-of-more-than-32-bytes-for-tests"
NOW = 1_800_000_000.0
ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")


@cache
def private_key(kind: str, number: int = 0) -> Any:
    """A private key; the same for the same arguments."""
    makers: dict[str, Any] = {
        "RS256": lambda: rsa.generate_private_key(65537, 2048),
        "RSA1024": lambda: rsa.generate_private_key(65537, 1024),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "Ed448": ed448.Ed448PrivateKey.generate,
    }
    return makers[kind]()


def private_pem(key: Any, password: bytes | None = None) -> bytes:
    protection: Any = serialization.NoEncryption()
    if password is not None:
        protection = serialization.BestAvailableEncryption(password)
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    return pem


def public_pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def jwk(kind: str, kid: str | None, number: int = 0, **more: object) -> dict[str, object]:
    """The public JWK of a key."""
    algorithm: Any = {"RS256": RSAAlgorithm, "RSA1024": RSAAlgorithm, "EdDSA": OKPAlgorithm}.get(
        kind, ECAlgorithm
    )
    found: dict[str, object] = algorithm.to_jwk(private_key(kind, number).public_key(), as_dict=True)
    found.pop("key_ops", None)
    if kid is not None:
        found["kid"] = kid
    return found | more


def jwk_set(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def key_for(algorithm: Any, directory: Path, **options: Any) -> Key:
    """A configured key that can sign: a secret, or a private PEM file."""
    if algorithm == "HS256":
        return Key(algorithm="HS256", secret=SECRET, **options)
    file = directory / f"{algorithm}.pem"
    file.write_bytes(private_pem(private_key(algorithm)))
    return Key(algorithm=algorithm, file=str(file), **options)


def secret_auth(**options: Any) -> Auth:
    return Auth(keys=(Key(algorithm="HS256", secret=SECRET, **options),))


def token(claims: object = None, *, algorithm: str = "HS256", number: int = 0, **header: object) -> str:
    """A token signed by PyJWT, good at :data:`NOW` unless ``claims`` say otherwise."""
    key: Any = SECRET if algorithm == "HS256" else private_key(algorithm, number)
    claims = {"sub": "42", "exp": int(NOW) + 3600} if claims is None else claims
    return jwt.PyJWS().encode(json.dumps(claims).encode(), key, algorithm, header or None)


def hand_made(header: bytes, payload: bytes, secret: bytes = SECRET.encode()) -> str:
    """A token of any bytes, with a correct HS256 signature: what a library would refuse to make."""
    signing_input = _b64(header) + b"." + _b64(payload)
    signature = hmac.new(secret, signing_input, hashlib.sha256).digest()
    return (signing_input + b"." + _b64(signature)).decode()


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
