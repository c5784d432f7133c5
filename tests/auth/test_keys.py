from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.auth.keys import DEVELOPMENT_SECRET, MAX_FILE_BYTES, KeyRing, signing_key
from broker.config import Auth, Key
from broker.errors import ConfigurationError
from tests.auth.keypairs import SECRET, jwk, jwk_set, private_key, private_pem, public_pem


def ring(*keys: Key, dev: bool = False) -> KeyRing:
    return KeyRing(Auth(keys=keys), dev=dev, source="broker.toml")


def problem(*keys: Key) -> str:
    with pytest.raises(ConfigurationError) as caught:
        ring(*keys)
    assert caught.value.source == "broker.toml"
    assert SECRET not in str(caught.value)
    return f"{caught.value.key}: {caught.value.problem}; {caught.value.mend}"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], str]:
    def writer(content: bytes) -> str:
        path = tmp_path / "key"
        path.write_bytes(content)
        return str(path)

    return writer


Write = Callable[[bytes], str]


def secret_in(ring: KeyRing, kid: str | None = None) -> object:
    ((_, material),) = ring.candidates("HS256", kid)
    return material.public


def test_the_development_key_stands_in_only_in_dev_and_only_without_keys() -> None:
    assert len(DEVELOPMENT_SECRET) >= 32
    assert "development" in DEVELOPMENT_SECRET
    assert secret_in(ring(dev=True)) == DEVELOPMENT_SECRET.encode()
    assert ring().candidates("HS256", None) == []
    assert secret_in(ring(Key(algorithm="HS256", secret=SECRET), dev=True)) == SECRET.encode()


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"s" * 32, b"s" * 32),
        (b"s" * 32 + b"\n", b"s" * 32),
        (b"s" * 32 + b"\r\n", b"s" * 32),
        (bytes(range(128, 165)) + b"\n", bytes(range(128, 165)) + b"\n"),
        (b"\x01" * 32 + b"\n", b"\x01" * 32 + b"\n"),
    ],
)
def test_a_secret_in_a_file_ends_before_the_newline_if_it_is_text(
    write: Write, content: bytes, secret: bytes
) -> None:
    assert secret_in(ring(Key(algorithm="HS256", file=write(content)))) == secret


@pytest.mark.parametrize(
    ("secret", "reason"),
    [
        ("x" * 31, "31 bytes can be guessed"),
        ("", "empty"),
        (public_pem(private_key("RS256")).decode(), "this is PEM"),
        ("-----BEGIN " + "x" * 40, "this is PEM"),
        ("ssh-ed25519 " + "A" * 60, "a public key"),
        ('{"kty": "oct", "k": "' + "A" * 60 + '"}', "a JWK"),
    ],
)
def test_a_secret_that_is_none_is_refused(secret: str, reason: str) -> None:
    found = problem(Key(algorithm="HS256", secret=secret))
    assert found.startswith("auth.keys[0].secret: ")
    assert reason in found


def test_a_secret_file_with_a_public_key_is_refused(write: Write) -> None:
    assert "this is PEM" in problem(Key(algorithm="HS256", file=write(public_pem(private_key("ES256")))))


@pytest.mark.parametrize(
    ("algorithm", "kind"), [("RS256", "RS256"), ("ES256", "ES256"), ("EdDSA", "EdDSA"), ("EdDSA", "Ed448")]
)
def test_pem_files_public_and_private(write: Write, algorithm: Any, kind: str) -> None:
    key = private_key(kind)
    for pem, signs in ((public_pem(key), False), (private_pem(key), True)):
        entry = Key(algorithm=algorithm, file=write(pem), id="k1")
        ((rules, material),) = ring(entry).candidates(algorithm, "k1")
        assert rules is entry
        assert material.public == key.public_key()
        assert (material.private is not None) == signs
        assert ring(entry).candidates(algorithm, None) == []
        assert ring(entry).candidates("HS256", "k1") == []


@pytest.mark.parametrize(
    ("algorithm", "kind", "reason"),
    [
        ("RS256", "ES256", "RS256 needs an RSA key"),
        ("RS256", "RSA1024", "this is RSAPublicKey of 1024 bits"),
        ("ES256", "P384", "ES256 needs an elliptic curve key on P-256"),
        ("ES256", "EdDSA", "ES256 needs"),
        ("EdDSA", "RS256", "EdDSA needs an Ed25519 or Ed448 key"),
    ],
)
def test_a_key_must_fit_its_algorithm(write: Write, algorithm: Any, kind: str, reason: str) -> None:
    for pem in (public_pem(private_key(kind)), private_pem(private_key(kind))):
        assert reason in problem(Key(algorithm=algorithm, file=write(pem)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither a key in PEM nor a JWK set"),
        (b"\xff\xfe", "neither a key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n", "neither a key in PEM"),
        (private_pem(private_key("ES256"), b"pass"), "encrypted"),
        (b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "certificate"),
        (b"x" * (MAX_FILE_BYTES + 1), "larger than"),
        (b'{"keys": []}', "no key of this set is for ES256: it is empty"),
        (b'{"keys": 3}', "not a JWK set"),
        (jwk_set(jwk("RS256", "a")), "of another kind"),
        (jwk_set(jwk("P384", "a")), "no key of this set is for ES256"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(write: Write, content: bytes, reason: str) -> None:
    assert reason in problem(Key(algorithm="ES256", file=write(content)))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "No such file" in problem(Key(algorithm="ES256", file=str(tmp_path / "absent")))
    assert "Is a directory" in problem(Key(algorithm="ES256", file=str(tmp_path)))
    assert "null" in problem(Key(algorithm="ES256", file="a\0b"))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (Key(algorithm="RS256"), "auth.keys[1]: it has no key; set exactly one of secret, file, jwks"),
        (Key(algorithm="RS256", file="f", jwks="https://x"), "auth.keys[1]: file and jwks are set together"),
        (Key(algorithm="RS256", secret=SECRET), "auth.keys[1].secret: RS256 does not verify with a secret"),
        (Key(algorithm="HS256", jwks="https://x/"), "a secret behind a URL is none"),
        (Key(algorithm="RS256", jwks="ftp://x/"), "no address of a key set"),
        (Key(algorithm="RS256", jwks="https://"), "no address of a key set"),
        (Key(algorithm="RS256", jwks="https://[x/"), "no address of a key set"),
        (Key(algorithm="RS256", jwks="https://x:99999/"), "no address of a key set"),
        (Key(algorithm="RS256", jwks="https://u:p@x/"), "user name or password"),
        (Key(algorithm="RS256", jwks="https://x/", id="a"), "remove id = 'a'"),
    ],
)
def test_an_entry_that_makes_no_sense_is_named_with_its_place(key: Key, reason: str) -> None:
    assert reason in problem(Key(algorithm="HS256", secret=SECRET), key)


# ------------------------------------------------------------------ JWK sets


def test_a_set_in_a_file_finds_keys_by_id_and_passes_over_the_others(write: Write) -> None:
    members = [
        jwk("RS256", "a"),
        jwk("RS256", "b", 1),
        jwk("ES256", "c"),
        jwk("RSA1024", "weak"),
        jwk("RS256", "encrypts", use="enc"),
        jwk("RS256", "other", alg="RS512"),
        jwk("RS256", "wraps", key_ops=["wrapKey"]),
        jwk("RS256", "odd", key_ops=3),
        {"kty": "RSA", "kid": "broken", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": 5},
        {"kty": "martian", "kid": "m"},
        {},
        [],
        None,
    ]
    found = ring(Key(algorithm="RS256", file=write(jwk_set(*members))))
    kids = ["a", "b", "c", "weak", "encrypts", "other", "wraps", "odd", "broken", "m", None]
    assert [kid for kid in kids if found.candidates("RS256", kid)] == ["a", "b"]


def test_a_single_jwk_is_a_set_of_one_and_needs_no_name(write: Write) -> None:
    import json

    found = ring(Key(algorithm="EdDSA", file=write(json.dumps(jwk("EdDSA", "only")).encode())))
    assert len(found.candidates("EdDSA", None)) == 1
    assert len(found.candidates("EdDSA", "only")) == 1
    assert found.candidates("EdDSA", "else") == []


@pytest.mark.parametrize("k", [{}, {"k": 3}, {"k": ""}, {"k": "AAAA"}])
def test_a_secret_in_a_set_must_be_one(write: Write, k: dict[str, object]) -> None:
    content = jwk_set({"kty": "oct", "kid": "s", **k})
    assert "no key of this set is for HS256" in problem(Key(algorithm="HS256", file=write(content)))


def test_a_secret_in_a_set_is_used(write: Write) -> None:
    content = jwk_set({"kty": "oct", "kid": "s", "k": "c3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3M"})
    assert secret_in(ring(Key(algorithm="HS256", file=write(content))), "s") == b"s" * 32


def test_a_set_in_a_file_takes_no_id(write: Write) -> None:
    found = problem(Key(algorithm="RS256", file=write(jwk_set(jwk("RS256", "a"))), id="x"))
    assert "a JWK set names its own keys; remove id = 'x'" in found


# ------------------------------------------------------------------- signing


def test_the_first_key_that_can_sign_signs(write: Write, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(public_pem(private_key("RS256")))
    private = Key(algorithm="ES256", file=write(private_pem(private_key("ES256"))), id="mine")
    keys = (
        Key(algorithm="RS256", jwks="https://x/"),
        Key(algorithm="RS256", file=str(public)),
        private,
    )
    rules, material = signing_key(Auth(keys=keys), dev=False, source="broker.toml")
    assert rules is private
    assert material.kid == "mine"


def test_public_keys_alone_cannot_sign() -> None:
    with pytest.raises(ConfigurationError, match="no key here can sign"):
        signing_key(Auth(keys=(Key(algorithm="RS256", jwks="https://x/"),)), dev=True, source="f")
    with pytest.raises(ConfigurationError, match="there are no keys"):
        signing_key(Auth(), dev=False, source="f")
