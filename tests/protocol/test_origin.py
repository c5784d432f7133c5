"""Origins, addresses behind proxies, tokens."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.protocol.http import Request, RequestError
from broker.protocol.origin import OriginPolicy, bearer_token, check_origin, client_address, query_token


def request(headers: dict[str, str] | None = None, *, query: str = "") -> Request:
    headers = {"host": "app.example.com"} | (headers or {})
    return Request("GET", "/ws", "/ws", query, "1.1", list(headers.items()), headers, 0)


def may_connect(origin: str | None, *entries: str, host: str = "app.example.com") -> bool:
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    return check_origin(request(headers), OriginPolicy.parse(entries))


# Origin


@pytest.mark.parametrize("entries", [(), ("loopback",), ("https://a.example",)])
def test_no_origin_is_no_browser(entries: tuple[str, ...]) -> None:
    assert may_connect(None, *entries)


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        ("https://app.example.com", "app.example.com", True),
        ("http://app.example.com", "app.example.com", True),
        ("https://APP.example.com", "App.Example.Com", True),
        ("https://app.example.com:443", "app.example.com", True),
        ("https://app.example.com", "app.example.com:443", True),
        ("http://localhost:8765", "localhost:8765", True),
        ("http://[::1]:8765", "[0::1]:8765", True),
        ("http://app.example.com", "app.example.com:443", False),
        ("https://app.example.com:8443", "app.example.com", False),
        ("http://localhost:3000", "localhost:8765", False),
        ("https://evil.example", "app.example.com", False),
        ("https://app.example.com.evil.example", "app.example.com", False),
        ("ftp://app.example.com", "app.example.com", False),
        ("null", "app.example.com", False),
        ("", "app.example.com", False),
        ("app.example.com", "app.example.com", False),
        ("https://app.example.com/", "app.example.com", False),
        ("https://app.example.com https://evil.example", "app.example.com", False),
        ("https://user@app.example.com", "app.example.com", False),
    ],
)
def test_empty_list_means_same_host(origin: str, host: str, allowed: bool) -> None:
    assert may_connect(origin, host=host) is allowed


def test_same_host_needs_a_host() -> None:
    lonely = Request("GET", "/ws", "/ws", "", "1.0", [], {"origin": "http://a"}, 0)
    assert not check_origin(lonely, OriginPolicy.parse(()))


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://a.example", True),
        ("HTTPS://A.example:443", True),
        ("http://b.example:8080", True),
        ("app://shell", True),
        ("http://a.example", False),
        ("https://a.example:444", False),
        ("http://b.example", False),
        ("https://x.a.example", False),
        ("https://app.example.com", False),  # the list replaces the same host
        ("http://localhost", False),
        ("null", False),
    ],
)
def test_list_is_exact(origin: str, allowed: bool) -> None:
    assert may_connect(origin, "https://a.example", "http://B.example:8080", "app://shell") is allowed


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("https://localhost", True),
        ("http://127.0.0.1:1", True),
        ("http://127.8.9.10", True),
        ("http://[::1]:5173", True),
        ("http://[0:0:0:0:0:0:0:1]", True),
        ("http://127.evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://128.0.0.1", False),
        ("app://localhost", False),
        ("https://app.example.com", False),
    ],
)
def test_loopback(origin: str, allowed: bool) -> None:
    assert may_connect(origin, "loopback") is allowed


def test_words_of_the_list() -> None:
    assert may_connect("null", "null")
    assert may_connect("https://evil.example", "*")
    assert may_connect("https://a.example", "loopback", "https://a.example")


@pytest.mark.parametrize("entry", ["a.example", "https://a.example/", "https://*.a.example", "Loopback", ""])
def test_bad_entry_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is not an origin") as caught:
        OriginPolicy.parse(["loopback", entry])
    assert repr(entry) in str(caught.value)


@given(
    st.text(st.characters(max_codepoint=127), max_size=40),
    st.text(st.characters(max_codepoint=127), max_size=20),
)
@settings(deadline=None)
def test_any_origin(origin: str, host: str) -> None:
    assert not may_connect(origin, "https://a.example") or "a.example" in origin.lower()
    may_connect(origin, host=host)
    may_connect("http://" + origin, "loopback")


# Tokens


@pytest.mark.parametrize(
    ("value", "token"),
    [
        (None, None),
        ("", None),
        ("Basic YTpi", None),
        ("Bearer a.b.c", "a.b.c"),
        ("bEARER   a.b.c", "a.b.c"),
        ("Bearer\ta", "a"),
        ("Bearer", ""),
        ("Bearer a b", "a b"),
        ("Bearera", None),
    ],
)
def test_bearer_token(value: str | None, token: str | None) -> None:
    assert bearer_token(request({} if value is None else {"authorization": value})) == token


@pytest.mark.parametrize(
    ("query", "token"),
    [
        ("", None),
        ("a=b", None),
        ("mytoken=x", None),
        ("token", None),
        ("token=", ""),
        ("a=b&token=x.y-z_&c", "x.y-z_"),
        ("token=a%2Bb%3D", "a+b="),
        ("token=%zz%ff", "%zz\ufffd"),
    ],
)
def test_query_token(query: str, token: str | None) -> None:
    assert query_token(request(query=query)) == token


def test_two_query_tokens() -> None:
    with pytest.raises(RequestError, match="more than one token"):
        query_token(request(query="token=a&token=b"))


# Addresses

PROXIES = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", "1.1.1.1", "203.0.113.9"),  # not a proxy of ours
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", "9.9.9.9, 1.1.1.1", "1.1.1.1"),  # the left one is the client's invention
        ("10.0.0.1", "1.1.1.1, 10.0.0.2 ,\t10.0.0.3", "1.1.1.1"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),  # all trusted: the furthest
        ("10.0.0.1", "1.1.1.1:5000", "1.1.1.1"),
        ("10.0.0.1", "[2001:db8::1]:5000", "2001:db8::1"),
        ("10.0.0.1", "2001:DB8:0::1", "2001:db8::1"),
        ("10.0.0.1", "1.1.1.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, junk, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "1.1.1.1, ", "10.0.0.1"),
        ("10.0.0.1", "999.1.1.1", "10.0.0.1"),
        ("fd00::1", "::ffff:1.1.1.1", "1.1.1.1"),
        ("::ffff:10.0.0.1", "1.1.1.1", "1.1.1.1"),
        ("", "1.1.1.1", ""),
    ],
)
def test_client_address(peer: str, forwarded: str | None, address: str) -> None:
    headers = {} if forwarded is None else {"x-forwarded-for": forwarded}
    assert client_address(request(headers), peer, PROXIES) == address


def test_nobody_is_trusted_by_default() -> None:
    assert client_address(request({"x-forwarded-for": "1.1.1.1"}), "127.0.0.1", ()) == "127.0.0.1"
    assert client_address(request(), "::ffff:1.2.3.4", ()) == "1.2.3.4"


@given(st.text(st.characters(max_codepoint=127), max_size=60))
@settings(deadline=None)
def test_any_forwarded_for(value: str) -> None:
    assert client_address(request({"x-forwarded-for": value}), "10.0.0.1", PROXIES)
