from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.auth import tokens
from broker.auth.keys import DEVELOPMENT_SECRET
from broker.auth.permissions import Grants
from broker.auth.tokens import MAX_TOKEN_BYTES, TokenRefused, TokenVerifier, sign
from broker.config import Auth, Key
from broker.errors import BrokerError, ConfigurationError, ErrorCode
from tests.auth.keypairs import (
    ALGORITHMS,
    NOW,
    SECRET,
    hand_made,
    key_for,
    private_key,
    public_pem,
    secret_auth,
    token,
)

EXP = int(NOW) + 3600
HS256 = b'{"alg":"HS256"}'


class WallClock:
    """Unix time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def verifier(auth: Auth | None = None, *, clock: WallClock | None = None, dev: bool = False) -> TokenVerifier:
    return TokenVerifier(secret_auth() if auth is None else auth, dev=dev, wall_clock=clock or WallClock())


def refused(text: str, verify: TokenVerifier | None = None) -> TokenRefused:
    with pytest.raises(TokenRefused) as caught:
        (verify or verifier()).verify_nowait(text)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    for part in text.split("."):
        assert len(part) < 8 or part not in str(caught.value)
    return caught.value


# ----------------------------------------------------------------- accepted


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_every_algorithm_with_a_real_key(algorithm: str, tmp_path: Path) -> None:
    auth = Auth(keys=(key_for(algorithm, tmp_path, id="k1", issuer="crm", audience="broker"),))
    rooms = {"join": ["deal:*"]}
    text = sign(auth, "42", ttl=60, info={"name": "Ada"}, rooms=rooms, now=NOW)
    verify = verifier(auth)
    identity = await verify.verify(text)
    assert identity == verify.verify_nowait(text)
    assert (identity.user, identity.expires, identity.info) == ("42", NOW + 60, {"name": "Ada"})
    assert identity.grants == Grants.from_claim(rooms)
    assert jwt.get_unverified_header(text) == {"alg": algorithm, "kid": "k1", "typ": "JWT"}
    payload, _, signature = text.partition(".")[2].rpartition(".")
    other = "A" if signature[0] != "A" else "B"
    assert "signature" in refused(f"{text.split('.')[0]}.{payload}.{other}{signature[1:]}", verify).reason


def test_a_token_of_anybody_else_is_accepted_by_the_same_rules() -> None:
    identity = verifier().verify_nowait(token())
    assert identity is not None
    assert identity.user == "42"
    assert identity.grants == Grants()


def test_the_development_key_signs_and_verifies_in_dev_only() -> None:
    text = sign(Auth(), "42", ttl=60, dev=True, now=NOW)
    assert verifier(Auth(), dev=True).verify_nowait(text) is not None
    assert "no keys" in refused(text, verifier(Auth())).reason
    assert "signature" in refused(text).reason
    assert jwt.PyJWS().decode(text, DEVELOPMENT_SECRET, algorithms=["HS256"])


# -------------------------------------------------- whose signature it is


def test_a_public_key_never_passes_for_a_secret(tmp_path: Path) -> None:
    """RFC 8725 section 2.1: HS256 over the RSA public key, which everybody has."""
    auth = Auth(keys=(key_for("RS256", tmp_path),))
    pem = public_pem(private_key("RS256"))
    text = hand_made(HS256, json.dumps({"sub": "42", "exp": EXP}).encode(), pem)
    assert "alg is not that of the configured keys (RS256)" in refused(text, verifier(auth)).reason
    both = Auth(keys=(*auth.keys, *secret_auth().keys))
    assert "signature" in refused(text, verifier(both)).reason


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", "HS384", "hs256", "RS256", "HS256 "])
def test_an_algorithm_that_is_not_the_pinned_one_is_refused(algorithm: str) -> None:
    header = json.dumps({"alg": algorithm}).encode()
    signed = hand_made(header, json.dumps({"sub": "42", "exp": EXP}).encode())
    for text in (signed, signed.rpartition(".")[0] + "."):
        assert "alg is not that of the configured keys" in refused(text).reason


def test_an_algorithm_of_another_curve_or_hash_does_not_verify(tmp_path: Path) -> None:
    auth = Auth(keys=(key_for("ES256", tmp_path),))
    assert "alg is not" in refused(token(algorithm="RS256"), verifier(auth)).reason
    assert "signature" in refused(token(algorithm="ES256", number=1), verifier(auth)).reason


def test_key_ids_choose_the_key() -> None:
    named = secret_auth(id="a")
    assert verifier(named).verify_nowait(token(kid="a")) is not None
    assert "no configured key has the id (kid) 'b'" in refused(token(kid="b"), verifier(named)).reason
    assert "it names no key" in refused(token(), verifier(named)).reason
    assert "no configured key has the id (kid) 'a'" in refused(token(kid="a")).reason
    shown = refused(token(kid="\n\u202e" + "x" * 500)).reason
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) < 120


def test_one_key_may_serve_two_audiences() -> None:
    auth = Auth(keys=tuple(Key(algorithm="HS256", secret=SECRET, audience=name) for name in ("web", "app")))
    claims = {"sub": "42", "exp": EXP}
    assert verifier(auth).verify_nowait(token(claims | {"aud": "web"})) is not None
    assert verifier(auth).verify_nowait(token(claims | {"aud": "app"})) is not None
    assert "aud" in refused(token(claims | {"aud": "else"}), verifier(auth)).reason


@pytest.mark.parametrize("crit", [["exp"], ["b64"], [], None, "x"])
def test_critical_extensions_are_refused_even_those_pyjwt_knows(crit: object) -> None:
    header = json.dumps({"alg": "HS256", "crit": crit, "b64": True, "exp": 1}).encode()
    assert "crit" in refused(hand_made(header, json.dumps({"sub": "42", "exp": EXP}).encode())).reason


# ------------------------------------------------------------- what it says


@pytest.mark.parametrize(("past", "good"), [(-1, True), (0, True), (4.9, True), (5, False), (3600, False)])
def test_expiry_with_leeway(past: float, good: bool) -> None:
    text = token({"sub": "42", "exp": NOW - past})
    if good:
        assert verifier().verify_nowait(text) is not None
    else:
        error = refused(text)
        assert error.expired
        assert error.reason == "it has expired"


@pytest.mark.parametrize(("ahead", "good"), [(-10, True), (0, True), (5, True), (5.1, False), (3600, False)])
def test_not_before_with_leeway(ahead: float, good: bool) -> None:
    text = token({"sub": "42", "exp": EXP, "nbf": NOW + ahead})
    if good:
        assert verifier().verify_nowait(text) is not None
    else:
        error = refused(text)
        assert "nbf" in error.reason
        assert not error.expired


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"sub": "42"}, "missing required field `exp`"),
        ({"sub": "42", "exp": None}, "`$.exp`"),
        ({"sub": "42", "exp": str(EXP)}, "`$.exp`"),
        ({"sub": "42", "exp": True}, "`$.exp`"),
        ({"sub": "42", "exp": [EXP]}, "`$.exp`"),
        ({"sub": "42", "exp": EXP, "nbf": "0"}, "`$.nbf`"),
        ({"exp": EXP}, "missing required field `sub`"),
        ({"sub": 42, "exp": EXP}, "`$.sub`"),
        ({"sub": "", "exp": EXP}, "its sub is no user id"),
        ({"sub": "a*", "exp": EXP}, "its sub is no user id"),
        ({"sub": "a\n", "exp": EXP}, "its sub is no user id"),
        ({"sub": "x" * 196, "exp": EXP}, "its sub is no user id"),
        ({"sub": "42", "exp": EXP, "iss": 5}, "`$.iss`"),
        ({"sub": "42", "exp": EXP, "aud": [5]}, "`$.aud[0]`"),
        ({"sub": "42", "exp": EXP, "aud": {"a": 1}}, "`$.aud`"),
        ({"sub": "42", "exp": EXP, "rooms": []}, "claim rooms"),
        ({"sub": "42", "exp": EXP, "rooms": {"join": "deal:*"}}, "claim rooms"),
        ({"sub": "42", "exp": EXP, "rooms": {"join": ["a\n"]}}, "claim rooms.join: pattern 1"),
        ({"sub": "42", "exp": EXP, "info": "x" * 2047}, "its info is 2049 bytes"),
        ([], "Expected `object`, got `array`"),
        ("x", "Expected `object`, got `str`"),
    ],
)
def test_bad_claims_are_refused_with_their_reason(claims: object, reason: str) -> None:
    error = refused(token(claims))
    assert reason in error.reason
    assert not error.expired


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"sub":"42","exp":NaN}', "not JSON that every client can read"),
        (b'{"sub":"42","exp":1e999}', "not JSON that every client can read"),
        (b'{"sub":"42","exp":9e9,"info":"\\ud800"}', "not JSON that every client can read"),
        (b'{"sub":"42","exp":9e9,"info":Infinity}', "not JSON that every client can read"),
        (b'{"sub":"4\xff","exp":9e9}', "not JSON that every client can read"),
        (b'{"sub":"42","exp":9e9,"info":' + b"[" * 2000 + b"]" * 2000 + b"}", "not JSON that every"),
        (b'{"sub":"42","exp":9e9,"info":' + b"[" * 900 + b"1" + b"]" * 900 + b"}", "nests deeper than 32"),
        (b'{"sub":"42","exp":9e9,"info":' + b"[" * 34 + b"]" * 34 + b"}", "nests deeper than 32"),
        (b'{"sub":"42","exp":9e9,"rooms":' + b"[" * 900 + b"]" * 900 + b"}", "claim rooms"),
        (b"", "not JSON"),
    ],
)
def test_payloads_that_would_break_a_clients_parser_are_refused(payload: bytes, reason: str) -> None:
    assert reason in refused(hand_made(HS256, payload)).reason


def test_info_may_nest_and_may_be_null() -> None:
    deep = b'{"sub":"42","exp":9e9,"info":' + b"[" * 33 + b"]" * 33 + b"}"
    assert verifier().verify_nowait(hand_made(HS256, deep)) is not None
    identity = verifier().verify_nowait(token({"sub": "42", "exp": EXP, "info": None, "nbf": None}))
    assert identity is not None
    assert identity.info is None


@pytest.mark.parametrize(
    ("aud", "good"),
    [("broker", True), (["x", "broker"], True), ("else", False), (["x"], False), ([], False), (None, False)],
)
def test_audience_where_configured(aud: object, good: bool) -> None:
    text = token({"sub": "42", "exp": EXP, "aud": aud})
    assert verifier().verify_nowait(text) is not None
    if good:
        assert verifier(secret_auth(audience="broker")).verify_nowait(text) is not None
    else:
        assert "aud" in refused(text, verifier(secret_auth(audience="broker"))).reason


def test_issuer_where_configured() -> None:
    auth = secret_auth(issuer="https://crm")
    claims = {"sub": "42", "exp": EXP}
    assert verifier(auth).verify_nowait(token(claims | {"iss": "https://crm"})) is not None
    for text in (token(claims), token(claims | {"iss": "https://crm/"})):
        assert "iss" in refused(text, verifier(auth)).reason


# ------------------------------------------------------------ what is no token


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        "a.b.c.d.e",
        "!!.!!.!!",
        "e30.e30.",
        "bnVsbA..",
        "\u00e9.b.c",
        "\ud800.b.c",
    ],
)
def test_what_is_no_token_is_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize(
    "header", [b"[]", b"1", b'{"alg":1}', b'{"alg":"HS256","kid":7}', b"{}", b"\xff", b"[" * 3000]
)
def test_a_header_that_is_none_is_refused(header: bytes) -> None:
    assert "header" in refused(hand_made(header, b"{}")).reason


def test_base64_must_be_exact() -> None:
    text = token()
    for broken in (text.replace(".", "=.", 1), text + "!", "!" + text, text.replace(".", ".\n", 1)):
        refused(broken)


def test_a_huge_token_is_refused_by_its_length_alone() -> None:
    assert "longer than 8192" in refused("a" * (MAX_TOKEN_BYTES + 1)).reason
    assert "longer" not in refused("a" * MAX_TOKEN_BYTES).reason


@given(
    st.text(st.characters(codec=None), max_size=60) | st.from_regex(r"[\w-]{0,30}\.[\w-]{0,30}\.[\w-]{0,30}")
)
def test_no_text_does_anything_but_be_refused(text: str) -> None:
    with pytest.raises(TokenRefused):
        verifier().verify_nowait(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["sub", "exp", "nbf", "iss", "aud", "info", "rooms", "alg", "kid", "crit", "b64"])
objects = st.dictionaries(names, json_values, max_size=6)


@given(objects, objects)
def test_no_signed_json_does_anything_but_identify_or_be_refused(
    header: dict[str, Any], claims: dict[str, Any]
) -> None:
    text = hand_made(json.dumps({"alg": "HS256"} | header).encode(), json.dumps(claims).encode())
    try:
        identity = verifier().verify_nowait(text)
    except TokenRefused as error:
        assert error.reason.isprintable()  # noqa: PT017 - either outcome is right
    else:
        assert identity is not None
        assert identity.user


# ------------------------------------------------------------------- the cache


def test_a_token_seen_before_is_not_verified_again_until_it_expires() -> None:
    clock = WallClock()
    verify = verifier(clock=clock)
    text = token({"sub": "42", "exp": NOW + 60})
    first = verify.verify_nowait(text)
    assert verify.verify_nowait(text) is first
    assert verify.statistics()[:4] == (1, 1, 0, 1)
    clock.now = NOW + 65
    assert refused(text, verify).expired
    assert refused(text, verify).expired
    assert verify.statistics()[:4] == (1, 1, 2, 0)


def test_refused_tokens_are_not_remembered() -> None:
    verify = verifier()
    for _ in range(3):
        refused(token({"sub": "42"}), verify)
    assert verify.statistics()[:4] == (0, 0, 3, 0)


def test_the_cache_is_bounded_and_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHED_IDENTITIES", 2)
    verify = verifier()
    one, two, three = (token({"sub": user, "exp": EXP}) for user in "123")
    for text in (one, two, one, three, one):
        verify.verify_nowait(text)
    assert verify.statistics()[:4] == (3, 2, 0, 2)
    verify.verify_nowait(two)
    assert verify.statistics().verified == 4


# --------------------------------------------------------------------- signing


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"user": ""}, "its sub is no user id"),
        ({"user": "a*"}, "its sub is no user id"),
        ({"user": "\ud800"}, "would be refused"),
        ({"ttl": 0}, "ttl must be"),
        ({"ttl": -1}, "ttl must be"),
        ({"ttl": float("inf")}, "ttl must be"),
        ({"ttl": float("nan")}, "ttl must be"),
        ({"rooms": {"join": "deal:*"}}, "claim rooms"),
        ({"info": "x" * 3000}, "its info is"),
        ({"info": {1, 2}}, "would be refused"),
        ({"rooms": {"join": ["x" * 190 + str(n) for n in range(60)]}}, "at most 8192"),
    ],
)
def test_a_token_that_would_be_refused_is_not_signed(arguments: dict[str, Any], reason: str) -> None:
    every: dict[str, Any] = {"user": "42", "ttl": 60, "now": NOW} | arguments
    with pytest.raises(ValueError, match=reason):
        sign(secret_auth(), **every)


def test_public_keys_cannot_sign(tmp_path: Path) -> None:
    file = tmp_path / "public.pem"
    file.write_bytes(public_pem(private_key("RS256")))
    with pytest.raises(ConfigurationError, match=r"broker\.toml: auth\.keys: no key here can sign a token"):
        sign(Auth(keys=(Key(algorithm="RS256", file=str(file)),)), "42", ttl=60, source="broker.toml")


def test_a_token_signed_now_is_good_now() -> None:
    identity = TokenVerifier(secret_auth(), dev=False).verify_nowait(sign(secret_auth(), "42", ttl=60))
    assert identity is not None


def test_a_refusal_is_an_error_of_the_catalogue() -> None:
    assert isinstance(TokenRefused("x"), BrokerError)
    assert str(TokenRefused("x")) == "token refused: x"
    assert not TokenRefused("x").retry


def test_the_hand_made_tokens_of_these_tests_are_what_pyjwt_makes() -> None:
    head, payload, signature = token().split(".")
    expected = hmac.new(SECRET.encode(), f"{head}.{payload}".encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "=") == expected
