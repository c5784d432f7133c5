from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.admin.access import NO_ACCESS, Access, is_loopback
from broker.config import Admin
from broker.errors import BrokerError, ErrorCode

Header = tuple[bytes, bytes]
HOST: Header = (b"host", b"127.0.0.1:8766")
GOOD: Header = (b"authorization", b"Bearer secret")

CLOSED = Access(Admin())
TOKEN = Access(Admin(token="secret"))
OPEN = Access(Admin(open_on_loopback=True))
BOTH = Access(Admin(token="secret", open_on_loopback=True))


def verdict(access: Access, headers: list[Header], peer: str | None = "127.0.0.1") -> str:
    try:
        access.check(headers, peer)
    except BrokerError as error:
        return error.code
    return "in"


@pytest.mark.parametrize(
    ("access", "headers", "peer", "expected"),
    [
        # a token is always enough, wherever it comes from
        (TOKEN, [HOST, GOOD], "127.0.0.1", "in"),
        (TOKEN, [GOOD], "203.0.113.7", "in"),
        (TOKEN, [(b"authorization", b"bearer   secret ")], "203.0.113.7", "in"),
        (BOTH, [GOOD, (b"x-forwarded-for", b"203.0.113.7")], "127.0.0.1", "in"),
        # and a wrong one never, not even where none is needed
        (TOKEN, [HOST], "127.0.0.1", "unauthenticated"),
        (TOKEN, [HOST, (b"authorization", b"Bearer Secret")], "127.0.0.1", "unauthenticated"),
        (TOKEN, [HOST, (b"authorization", b"Basic secret")], "127.0.0.1", "unauthenticated"),
        (TOKEN, [HOST, (b"authorization", b"Bearer")], "127.0.0.1", "unauthenticated"),
        (TOKEN, [HOST, (b"authorization", "Bearer sécret".encode())], "127.0.0.1", "unauthenticated"),
        (TOKEN, [GOOD, GOOD], "127.0.0.1", "unauthenticated"),
        (BOTH, [HOST, (b"authorization", b"Bearer wrong")], "127.0.0.1", "unauthenticated"),
        (OPEN, [HOST, (b"authorization", b"Bearer ")], "127.0.0.1", "unauthenticated"),
        # without a token and without open access there is no way in
        (CLOSED, [HOST], "127.0.0.1", "unauthenticated"),
        (CLOSED, [HOST, (b"authorization", b"Bearer ")], "127.0.0.1", "unauthenticated"),
        # open access: this machine, by its own name, from its own page, with nothing in between
        (OPEN, [HOST], "127.0.0.1", "in"),
        (OPEN, [(b"host", b"localhost")], "::1", "in"),
        (OPEN, [(b"host", b"LocalHost:9999")], "::ffff:127.0.0.1", "in"),
        (OPEN, [(b"host", b"[::1]:8766")], "127.8.8.8", "in"),
        (OPEN, [HOST, (b"origin", b"http://127.0.0.1:8766")], "127.0.0.1", "in"),
        (BOTH, [HOST], "127.0.0.1", "in"),
        (OPEN, [HOST], "203.0.113.7", "forbidden"),
        (OPEN, [HOST], None, "forbidden"),
        (OPEN, [HOST], "unix:", "forbidden"),
        (OPEN, [], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, HOST], "127.0.0.1", "forbidden"),
        (OPEN, [(b"host", b"evil.example:8766")], "127.0.0.1", "forbidden"),
        (OPEN, [(b"host", b"127.0.0.1.evil.example")], "127.0.0.1", "forbidden"),
        (OPEN, [(b"host", b"localhost.evil.example")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"origin", b"http://evil.example")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"origin", b"http://127.0.0.1:3000")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"origin", b"https://127.0.0.1:8766")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"origin", b"null")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"forwarded", b"for=203.0.113.7")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"x-forwarded-for", b"203.0.113.7")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"x-forwarded-host", b"localhost")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"x-real-ip", b"127.0.0.1")], "127.0.0.1", "forbidden"),
        (OPEN, [HOST, (b"via", b"1.1 proxy")], "127.0.0.1", "forbidden"),
    ],
)
def test_who_comes_in(access: Access, headers: list[Header], peer: str | None, expected: str) -> None:
    assert verdict(access, headers, peer) == expected


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"host", b"origin", b"authorization", b"forwarded", b"x-forwarded-for", b"accept"]),
        st.one_of(
            st.binary(max_size=20), st.sampled_from([b"localhost", b"127.0.0.1:1", b"Bearer x", b"null"])
        ),
    ),
    max_size=6,
)
PEERS = st.one_of(st.none(), st.ip_addresses().map(str), st.just("127.0.0.1"), st.text(max_size=9))


@given(HEADERS, PEERS)
def test_without_the_token_only_open_access_lets_anybody_in(headers: list[Header], peer: str | None) -> None:
    assert verdict(CLOSED, headers, peer) == "unauthenticated"
    assert verdict(TOKEN, headers, peer) == "unauthenticated"
    if verdict(OPEN, headers, peer) == "in":
        names = [name for name, _ in headers]
        assert is_loopback(peer)
        assert names.count(b"host") == 1
        assert not {b"forwarded", b"x-forwarded-for", b"authorization"} & set(names)


def test_who_cannot_come_in_at_all_is_told_what_to_configure() -> None:
    with pytest.raises(BrokerError) as caught:
        CLOSED.check([HOST], "127.0.0.1")
    assert caught.value.message == NO_ACCESS
    assert "admin.token" in NO_ACCESS
    assert "admin.open_on_loopback" in NO_ACCESS


def test_an_open_port_says_which_rule_was_broken() -> None:
    with pytest.raises(BrokerError, match="a proxy stands before it \\(x-forwarded-for\\)") as caught:
        OPEN.check([HOST, (b"x-forwarded-for", b"203.0.113.7")], "127.0.0.1")
    assert caught.value.code is ErrorCode.FORBIDDEN
