"""The upgrade: who gets it, on what terms, and that wsproto agrees."""

from __future__ import annotations

import re
from base64 import b64encode
from contextlib import suppress

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection
from wsproto.events import Request as WsprotoRequest
from wsproto.utilities import RemoteProtocolError

from broker.config import Limits
from broker.protocol.handshake import JSON, ZSTD, Upgrade, accepts_deflate, negotiate
from broker.protocol.http import Fault, Request, RequestError, parse_request, refuse

from .hostile_requests import ACCEPT, BROWSER, HOSTILE, UNFINISHED, Hostile, upgrade
from .test_http import variations

LIMITS = Limits()


def attempt(
    data: bytes, *, deflate: bool = True, supported: tuple[str, ...] = (JSON, ZSTD)
) -> Upgrade | RequestError | None:
    """What the request in ``data`` gets; ``None`` while it is incomplete."""
    try:
        request = parse_request(data, LIMITS)
        if request is None:
            return None
        return negotiate(request, subprotocols_supported=supported, deflate=deflate)
    except RequestError as error:
        return error


def upgraded(data: bytes, *, deflate: bool = True, supported: tuple[str, ...] = (JSON, ZSTD)) -> Upgrade:
    result = attempt(data, deflate=deflate, supported=supported)
    assert isinstance(result, Upgrade)
    return result


def refused(data: bytes, *, supported: tuple[str, ...] = (JSON, ZSTD)) -> RequestError:
    result = attempt(data, supported=supported)
    assert isinstance(result, RequestError)
    return result


def offering(protocols: str, extensions: str | None = None) -> bytes:
    return upgrade({"Sec-WebSocket-Protocol": protocols, "Sec-WebSocket-Extensions": extensions})


def answer_headers(data: bytes) -> dict[bytes, bytes]:
    """Headers of a 101 as h11's client reads it."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a"), ("Upgrade", "websocket")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    event = client.next_event()
    assert isinstance(event, h11.InformationalResponse)
    assert event.status_code == 101
    assert client.trailing_data == (b"", False)
    return dict(event.headers)


def test_plain_upgrade() -> None:
    result = upgraded(upgrade())
    assert (result.subprotocol, result.deflate) == ("", False)
    assert answer_headers(result.response) == {
        b"upgrade": b"websocket",
        b"connection": b"Upgrade",
        b"sec-websocket-accept": ACCEPT.encode(),
    }


def test_browser_upgrade() -> None:
    result = upgraded(BROWSER)
    assert result.deflate
    assert answer_headers(result.response)[b"sec-websocket-extensions"] == (
        b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
    )


@pytest.mark.parametrize("entry", HOSTILE, ids=lambda entry: entry.name)
def test_hostile(entry: Hostile) -> None:
    result = attempt(entry.data)
    if isinstance(result, RequestError):
        assert result.status == entry.status
        assert refuse(result).startswith(b"HTTP/1.1 %d " % entry.status)
    else:
        assert entry.status == (UNFINISHED if result is None else 101)


@given(st.binary(max_size=200) | variations(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_nothing_but_request_errors(data: bytes, deflate: bool) -> None:
    result = attempt(data, deflate=deflate)
    if isinstance(result, RequestError):
        assert 400 <= result.status <= 505
        assert refuse(result)
    elif result is not None:
        assert answer_headers(result.response)


_loose_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)


@given(
    st.dictionaries(st.sampled_from(["upgrade", "connection", "sec-websocket-protocol"]), _loose_text),
    _loose_text,
)
@settings(deadline=None)
def test_any_header_values(headers: dict[str, str], extensions: str) -> None:
    good = parse_request(upgrade(), LIMITS)
    assert good is not None
    merged = good.headers | headers | {"sec-websocket-extensions": extensions}
    request = Request("GET", "/ws", "/ws", "", "1.1", [], merged, 0)
    with suppress(RequestError):
        negotiate(request, subprotocols_supported=(JSON,), deflate=True)


# The ladder


def test_method_is_told() -> None:
    error = refused(upgrade(line="POST /ws HTTP/1.1"))
    assert (error.status, error.code, error.headers) == (405, Fault.METHOD, (("Allow", "GET"),))


@pytest.mark.parametrize("changes", [{"Upgrade": None}, {"Sec-WebSocket-Version": "12"}])
def test_426_says_what_would_do(changes: dict[str, str | None]) -> None:
    error = refused(upgrade(changes))
    assert error.status == 426
    assert set(error.headers) == {("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")}


@pytest.mark.parametrize("value", ["UPGRADE", "keep-alive, Upgrade", "keep-alive,upgrade", ", upgrade ,"])
def test_connection_is_a_list(value: str) -> None:
    assert upgraded(upgrade({"Connection": value})) == upgraded(upgrade())


def test_repeated_list_headers_count_as_one() -> None:
    data = upgrade({"Connection": "keep-alive"}, extra=["Connection: Upgrade"])
    assert upgraded(data) == upgraded(upgrade())
    data = upgrade(extra=["Sec-WebSocket-Protocol: other", f"Sec-WebSocket-Protocol: {ZSTD}"])
    assert upgraded(data).subprotocol == ZSTD


# Subprotocols


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (JSON, JSON),
        (ZSTD, ZSTD),
        (f"{ZSTD}, {JSON}", ZSTD),
        (f"{JSON},{ZSTD}", JSON),
        (f"mqtt, {ZSTD}", ZSTD),
        (f", {JSON},\t,", JSON),
        (f"a, b, c, d, e, f, g, {JSON}", JSON),
    ],
)
def test_first_supported_subprotocol_wins(offered: str, chosen: str) -> None:
    result = upgraded(offering(offered))
    assert result.subprotocol == chosen
    assert answer_headers(result.response)[b"sec-websocket-protocol"] == chosen.encode()


def test_subprotocols_that_are_switched_off() -> None:
    assert upgraded(offering(f"{ZSTD}, {JSON}"), supported=(JSON,)).subprotocol == JSON
    error = refused(offering(ZSTD), supported=(JSON,))
    assert (error.status, error.code) == (400, Fault.SUBPROTOCOL)


# permessage-deflate


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("permessage-deflate", True),
        ("permessage-deflate; client_max_window_bits", True),
        ("permessage-deflate ;client_max_window_bits = 8", True),
        ('permessage-deflate; client_max_window_bits="1\\0"', True),
        ("permessage-deflate; server_max_window_bits=15", True),
        ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", True),
        ("permessage-deflate; server_max_window_bits=10, permessage-deflate", True),
        ("x-webkit-deflate-frame, permessage-deflate", True),
        ('other; a="x,y;z", permessage-deflate', None),
        ('other; a="x\\"y", permessage-deflate', None),
        (", permessage-deflate ,", True),
        ("permessage-deflate; server_max_window_bits=14", False),
        ("permessage-deflate; server_max_window_bits", False),
        ("permessage-deflate; server_max_window_bits=015", False),
        ("permessage-deflate; server_max_window_bits=16", False),
        ("permessage-deflate; client_max_window_bits=7", False),
        ("permessage-deflate; client_max_window_bits=16", False),
        ("permessage-deflate; client_max_window_bits=08", False),
        ("permessage-deflate; server_no_context_takeover=1", False),
        ("permessage-deflate; client_no_context_takeover=true", False),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", False),
        ("permessage-deflate; unknown", False),
        ("Permessage-Deflate", False),
        ("permessage-bzip2", False),
        ("permessage-deflate permessage-deflate", None),
        ("permessage-deflate; server_max_window_bits=15=15", None),
        ('"permessage-deflate"', None),
        ("permessage-deflate;; client_max_window_bits", None),
        ("permessage-deflate, (", None),
        ("", None),
        (" , ", None),
    ],
)
def test_deflate_offers(value: str, accepted: bool | None) -> None:
    if accepted is None:
        with pytest.raises(RequestError) as caught:
            accepts_deflate(value)
        assert (caught.value.status, caught.value.code) == (400, Fault.EXTENSIONS)
    else:
        assert accepts_deflate(value) is accepted


def test_deflate_only_where_it_is_on_and_not_over_zstd() -> None:
    assert not upgraded(BROWSER, deflate=False).deflate
    assert upgraded(offering(JSON, "permessage-deflate")).deflate
    over_zstd = upgraded(offering(ZSTD, "permessage-deflate"))
    assert not over_zstd.deflate
    assert b"sec-websocket-extensions" not in answer_headers(over_zstd.response)


# Against wsproto


def read_by_wsproto(data: bytes, subprotocol: str) -> bytes | None:
    """wsproto's answer; ``None`` where it is known to differ from RFC 6455 or to break."""
    server = WSConnection(ConnectionType.SERVER)
    try:
        server.receive_data(data)
    except UnicodeError:
        assert b"xn--" in data.lower()  # it decodes Host as IDNA
        return None
    except RemoteProtocolError:
        lower = data.lower()
        # It takes Upgrade for a single token, and of several Connection headers only the last.
        assert (
            re.search(rb"\nupgrade:[^\r]*,", lower)
            or max(len(re.findall(rb"\n%b:" % name, lower)) for name in (b"connection", b"upgrade")) > 1
        )
        return None
    request = next(server.events())
    assert isinstance(request, WsprotoRequest)
    return server.send(AcceptConnection(subprotocol=subprotocol or None))


def check_against_wsproto(data: bytes) -> None:
    ours = attempt(data)
    if not isinstance(ours, Upgrade):
        return
    theirs = read_by_wsproto(data, ours.subprotocol)
    if theirs is not None:
        answer = answer_headers(ours.response)
        answer.pop(b"sec-websocket-extensions", None)
        assert answer == answer_headers(theirs)


@pytest.mark.parametrize("entry", HOSTILE, ids=lambda entry: entry.name)
def test_wsproto_agrees_on_hostile(entry: Hostile) -> None:
    check_against_wsproto(entry.data)


@given(variations())
@settings(max_examples=300, deadline=None)
def test_wsproto_agrees_on_variations(data: bytes) -> None:
    check_against_wsproto(data)


_offers = st.fixed_dictionaries(
    {},
    optional={
        "Host": st.sampled_from(["a", "[::1]:80", "a_b.c:1", "xn--caf-dma.example"]),
        "Upgrade": st.sampled_from(["websocket", "WebSocket", "WEBSOCKET", "h2c, websocket"]),
        "Connection": st.sampled_from(["upgrade", "Upgrade, keep-alive", "keep-alive,UPGRADE,,"]),
        "Sec-WebSocket-Key": st.binary(min_size=16, max_size=16).map(lambda raw: b64encode(raw).decode()),
        "Sec-WebSocket-Protocol": st.lists(
            st.sampled_from([JSON, ZSTD, "mqtt", "chat"]), min_size=1, max_size=4, unique=True
        ).map(", ".join),
        "Sec-WebSocket-Extensions": st.sampled_from(
            ["permessage-deflate", "x", "permessage-deflate; server_max_window_bits=9, permessage-deflate"]
        ),
    },
)


@given(_offers)
@settings(deadline=None)
def test_wsproto_agrees_on_good_requests(changes: dict[str, str | None]) -> None:
    check_against_wsproto(upgrade(changes))
