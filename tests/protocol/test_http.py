"""The parser: what it reads, what it refuses and when, and that h11 agrees."""

from __future__ import annotations

import re

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.config import Limits
from broker.protocol.http import (
    SINGLE,
    Fault,
    Request,
    RequestError,
    healthz,
    not_found,
    parse_request,
    refuse,
    response,
    split_host,
    upgrade_required,
)
from broker.protocol.http_faults import METHOD_BYTES, REQUEST_LINE_BYTES

from .hostile_requests import BROWSER, HOSTILE, Hostile, upgrade

LIMITS = Limits()

Outcome = Request | tuple[int, Fault, str] | None


def outcome(data: bytes | bytearray, searched: int = 0, limits: Limits = LIMITS) -> Outcome:
    try:
        return parse_request(data, limits, searched)
    except RequestError as error:
        return error.status, error.code, error.reason


def fed(data: bytes, step: int, limits: Limits = LIMITS) -> Outcome:
    """The outcome of ``data`` that comes in pieces of ``step`` bytes."""
    buffer = bytearray()
    searched = 0
    result: Outcome = None
    for start in range(0, len(data), step):
        buffer += data[start : start + step]
        result = outcome(buffer, searched, limits)
        if result is not None:
            return result
        searched = len(buffer)
    return result


def parsed(data: bytes) -> Request:
    request = parse_request(data, LIMITS)
    assert request is not None
    return request


def refused(data: bytes, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(data, limits)
    return caught.value


_PIECES = [
    *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\r\n ", b"\0", b" ", b"\t", b":", b",", b"%", b"#", b"\xff"),
    *(b"Host: a\r\n", b"Content-Length: 0\r\n", b"Connection: close\r\n", b"X: y\r\n", b"HTTP/1.0"),
]


def variations() -> st.SearchStrategy[bytes]:
    """Good and hostile requests, some of them with bytes cut out, put in, doubled or replaced."""
    good = st.sampled_from([BROWSER, upgrade()])
    hostile = st.sampled_from([entry.data for entry in HOSTILE if len(entry.data) < 2000])
    pieces = st.binary(max_size=4) | st.sampled_from(_PIECES)
    edits = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 6), pieces), max_size=3)

    def edited(seed: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for position, dropped, piece in changes:
            at = position % (len(seed) + 1)
            seed = seed[:at] + piece + seed[at + dropped :]
        return seed

    return st.builds(edited, good | hostile, edits)


# What is read


def test_browser_request() -> None:
    request = parsed(BROWSER + b"\x81\x80abcd")
    assert (request.method, request.target, request.path, request.query) == ("GET", "/ws", "/ws", "")
    assert request.version == "1.1"
    assert len(request.fields) == len(request.headers) == 12
    assert request.fields[0] == ("Host", "broker.example.com:8765")
    assert request.headers["sec-websocket-version"] == "13"
    assert request.consumed == len(BROWSER)


def test_values_lose_outer_white_space_only() -> None:
    request = parsed(upgrade(extra=["A: \t b \t c\t ", "B:", "C:  ", "D:x"]))
    assert request.fields[-4:] == [("A", "b \t c"), ("B", ""), ("C", ""), ("D", "x")]


def test_repeated_fields_are_joined_in_order() -> None:
    request = parsed(upgrade(extra=["X: a", "x: b", "Y: c", "X: d"]))
    assert request.headers["x"] == "a, b, d"
    assert [value for name, value in request.fields if name.lower() == "x"] == ["a", "b", "d"]


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_single_fields(name: str) -> None:
    assert refused(upgrade(extra=[f"{name}: 0", f"{name.title()}: 0"])).code is Fault.DUPLICATE


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/ws?", "/ws", ""),
        ("/ws?a=%zz&b", "/ws", "a=%zz&b"),
        ("/ws?a?b", "/ws", "a?b"),
        ("/caf%C3%A9", "/café", ""),
        ("/a%2Fb%3Fc", "/a/b?c", ""),
        ("//x", "//x", ""),
        ("http://LOCALHOST:8765/ws?a", "/ws", "a"),
        ("wss://localhost:8765", "/", ""),
        ("http://localhost:8765?a", "/", "a"),
    ],
)
def test_targets(target: str, path: str, query: str) -> None:
    request = parsed(upgrade(line=f"GET {target} HTTP/1.1"))
    assert (request.target, request.path, request.query) == (target, path, query)


def test_http_1_0_needs_no_host() -> None:
    request = parsed(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (request.version, request.headers) == ("1.0", {})
    assert refused(b"GET /healthz HTTP/1.0\r\nHost: a b\r\n\r\n").code is Fault.HOST


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Example.COM", ("example.com", None)),
        ("a_b:1", ("a_b", 1)),
        ("example.com.", ("example.com.", None)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[0:0::1]:80", ("[::1]", 80)),
        ("a:65536", None),
        ("[1.2.3.4]", None),
        ("", None),
        ("a\n", None),
    ],
)
def test_hosts(value: str, expected: tuple[str, int | None] | None) -> None:
    assert split_host(value) == expected


# Limits


def test_request_line_limit_is_exact() -> None:
    longest = f"GET /{'a' * (REQUEST_LINE_BYTES - len('GET / HTTP/1.1'))} HTTP/1.1"
    assert isinstance(outcome(upgrade(line=longest)), Request)
    assert isinstance(fed(upgrade(line=longest), 1000), Request)
    too_long = upgrade(line=longest.replace("/a", "/aa"))
    assert refused(too_long).status == 414
    for cut in range(REQUEST_LINE_BYTES - 2, REQUEST_LINE_BYTES + 4):
        begun = outcome(too_long[:cut])
        assert begun is None if cut <= REQUEST_LINE_BYTES else begun == outcome(too_long)


def test_line_end_cut_at_the_limit() -> None:
    longest = f"GET /{'a' * (REQUEST_LINE_BYTES - len('GET / HTTP/1.1'))} HTTP/1.1"
    data = upgrade(line=longest)
    assert outcome(data[: REQUEST_LINE_BYTES + 1]) is None  # it ends in half a line end


def test_head_limit_is_exact() -> None:
    data = upgrade()
    assert isinstance(outcome(data + b"more", limits=Limits(request_bytes=len(data))), Request)
    for sent in (data, data + b"more", data[:-1]):
        assert refused(sent, Limits(request_bytes=len(data) - 1)).code is Fault.TOO_LARGE
    assert outcome(data[:-2], limits=Limits(request_bytes=len(data) - 1)) is None


def test_field_limit_is_exact() -> None:
    data = upgrade()
    count = len(parsed(data).fields)
    assert isinstance(outcome(data, limits=Limits(request_headers=count)), Request)
    assert refused(data, Limits(request_headers=count - 1)).status == 431
    assert refused(data[:-2], Limits(request_headers=count - 1)).status == 431  # before the blank line


def test_zero_means_no_limit() -> None:
    data = upgrade({"Cookie": "c" * 100_000}, extra=[f"X-{n}: y" for n in range(500)])
    assert isinstance(outcome(data, limits=Limits(request_bytes=0, request_headers=0)), Request)


# When it is refused


def first_refusal(data: bytes) -> int:
    """Length of the shortest refused prefix."""
    return next(cut for cut in range(len(data) + 1) if isinstance(outcome(data[:cut]), tuple))


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"\x16\x03\x01", 1),
        (b"\r\n", 2),
        (b" GET / HTTP/1.1", 1),
        (b"A" * 100, METHOD_BYTES + 1),
        (b"GET /\0", 6),
        (b"GET /\nHost", 6),
        (b"GET / HTTP/9.9\r\n", 16),
        (b"GET / HTTP/1.1\r\n folded", 17),
        (b"GET / HTTP/1.1\r\nHost : a", 21),
        (b"GET / HTTP/1.1\r\nHost\r", 21),
        (b"GET / HTTP/1.1\r\nHost: \x80", 23),
        (b"GET / HTTP/1.1\r\nHost: a\n\n", 24),
        (b"GET / HTTP/1.1\r\nHost: a\rX", 25),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\rX", 27),
    ],
)
def test_refused_at_the_first_bad_byte(data: bytes, at: int) -> None:
    assert first_refusal(data) == at
    assert outcome(data) == outcome(data[:at])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("X: \xe9", "not ASCII"),
        ("X: \0", "NUL"),
        ("X: \x01", "control character"),
        ("X: \x7f", "control character"),
        ("X: a\nY: b", "line feed without"),
        ("X: a\rb", "carriage return without"),
        ("X(: b", "illegal character"),
        ("X : b", "white space before the colon"),
        ("X", "no colon"),
        (": b", "empty name"),
        (" b", "folding"),
    ],
)
def test_reasons_say_what_is_wrong(line: str, words: str) -> None:
    error = refused(upgrade(extra=[line]))
    assert words in error.reason
    assert (error.status, error.code) == (400, Fault.HEADER)


@pytest.mark.parametrize("entry", HOSTILE, ids=lambda entry: entry.name)
def test_hostile_in_any_pieces(entry: Hostile) -> None:
    whole = outcome(entry.data)
    assert fed(entry.data, 1) == whole
    assert fed(entry.data, 7) == whole
    refused_at = None
    for cut in cuts(entry.data):
        begun = outcome(entry.data[:cut])
        assert begun is None or begun == whole
        if begun is None:
            assert refused_at is None  # a verdict is never taken back
            assert outcome(entry.data, searched=cut) == whole
        else:
            refused_at = cut


def cuts(data: bytes) -> list[int]:
    """Every place to cut ``data``; of a long one those at its ends and some between."""
    if len(data) < 1200:
        return list(range(len(data)))
    return [*range(100), *range(100, len(data) - 100, 797), *range(len(data) - 100, len(data))]


@given(st.binary(max_size=300))
@settings(deadline=None)
@example(b"")
def test_arbitrary_bytes(data: bytes) -> None:
    assert fed(data, 1) == outcome(data)


@given(variations(), st.integers(1, 100))
@settings(max_examples=300, deadline=None)
def test_variations_in_any_pieces(data: bytes, step: int) -> None:
    whole = outcome(data)
    assert outcome(bytearray(data)) == whole
    assert fed(data, step) == whole


@given(variations(), st.integers(1, 600), st.integers(1, 12))
@settings(deadline=None)
def test_verdict_does_not_depend_on_the_cut_under_tight_limits(data: bytes, size: int, count: int) -> None:
    limits = Limits(request_bytes=size, request_headers=count)
    assert fed(data, 1, limits) == outcome(data, limits=limits)


# Against h11


def read_by_h11(data: bytes) -> tuple[h11.Request, bytes] | None:
    """The request as h11 reads it, and what it leaves behind; ``None`` if it refuses or waits."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Request):
        return None
    return event, connection.trailing_data[0]


def check_against_h11(data: bytes) -> None:
    ours = outcome(data)
    theirs = read_by_h11(data)
    if isinstance(ours, Request):
        assert theirs is not None
        event, rest = theirs
        assert event.method == ours.method.encode()
        assert event.target == ours.target.encode()
        assert event.http_version == ours.version.encode()
        assert list(event.headers) == [(name.lower().encode(), value.encode()) for name, value in ours.fields]
        assert rest == data[ours.consumed :]
    elif theirs is not None:
        assert ours is not None
        event, rest = theirs
        assert is_documented(ours[1], event, data[: len(data) - len(rest)])


def is_documented(fault: Fault, event: h11.Request, head: bytes) -> bool:
    """Whether h11's reading of ``head`` shows the reason for which we are stricter."""
    line, _, fields = head.partition(b"\n")
    names = [name.decode() for name, _ in event.headers]
    headers = dict(event.headers)
    if fault is Fault.REQUEST_LINE:
        return not line.endswith(b"\r") or len(line) > REQUEST_LINE_BYTES or len(event.method) > METHOD_BYTES
    if fault is Fault.HEADER:
        return bool(re.search(rb"\r?\n[ \t]|[^\t\n\r -~]|(?<!\r)\n|\r(?!\n)", fields) or fields[:1] in b" \t")
    if fault is Fault.VERSION:
        return event.http_version not in {b"1.0", b"1.1"}
    if fault is Fault.DUPLICATE:
        raw = re.findall(r"^([^:\s]+):", head.decode("latin-1").lower(), re.MULTILINE)  # h11 merges lengths
        return any(raw.count(name) > 1 for name in SINGLE)
    if fault is Fault.BODY:
        # h11 makes one length of a list of equal ones
        listed = re.search(rb"\ncontent-length:[^\n]*,", head.lower())
        return bool(listed) or "transfer-encoding" in names or headers[b"content-length"] != b"0"
    if fault is Fault.HOST:
        return not re.fullmatch(rb"(\w(\w|-|\.(?!\.)){0,62})(:\d{1,4})?", headers[b"host"])
    if fault is Fault.TARGET:
        return b"#" in event.target or b"%" in event.target or not event.target.startswith(b"/")
    return fault is Fault.TOO_LARGE and (
        len(names) > LIMITS.request_headers or len(head) > LIMITS.request_bytes
    )


@pytest.mark.parametrize("entry", HOSTILE, ids=lambda entry: entry.name)
def test_h11_agrees_on_hostile(entry: Hostile) -> None:
    check_against_h11(entry.data)


@given(variations())
@settings(max_examples=500, deadline=None)
def test_h11_agrees_on_variations(data: bytes) -> None:
    check_against_h11(data)


_names = st.text(st.characters(max_codepoint=127), min_size=1, max_size=6) | st.sampled_from(
    ["Host", "host", "X", "Connection", "Content-Length", "Transfer-Encoding"]
)
_values = st.text(st.characters(max_codepoint=255), max_size=8) | st.sampled_from(
    ["a", "0", "a:80", "chunked", " b "]
)
_lines = st.builds(
    "{} {} HTTP/{}".format, st.sampled_from(["GET", "x"]), _values, st.sampled_from(["1.0", "1.1"])
)


@given(_lines, st.lists(st.builds("{}:{}".format, _names, _values), max_size=4), st.binary(max_size=9))
@settings(max_examples=500, deadline=None)
def test_h11_agrees_on_built_requests(line: str, fields: list[str], rest: bytes) -> None:
    head = "\r\n".join([line, "Host: a", *fields, "", ""])
    check_against_h11(head.encode("latin-1") + rest)


# Answers


def answered(data: bytes, method: str = "GET") -> tuple[h11.Response, bytes]:
    """``data`` as a client reads it: the response and its whole body; nothing may be left over."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    start = client.next_event()
    assert isinstance(start, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data == (b"", False)
    assert client.their_state is h11.MUST_CLOSE
    return start, body


def test_response() -> None:
    start, body = answered(response(200, "é", content_type="text/html", headers=[("X", "y")], now=0.0))
    assert (start.status_code, body) == (200, "é".encode())
    assert dict(start.headers) == {
        b"date": b"Thu, 01 Jan 1970 00:00:00 GMT",
        b"content-type": b"text/html",
        b"content-length": b"2",
        b"connection": b"close",
        b"x": b"y",
    }


def test_response_to_head_tells_the_length_alone() -> None:
    start, body = answered(response(200, b"abc", head=True), method="HEAD")
    assert (dict(start.headers)[b"content-length"], body) == (b"3", b"")


@pytest.mark.parametrize("status", [204, 304])
def test_response_that_has_no_body(status: int) -> None:
    start, body = answered(response(status, b"abc"))
    assert (dict(start.headers), body) == ({b"connection": b"close"}, b"")


def test_response_in_http_1_0() -> None:
    assert response(200, version="1.0").startswith(b"HTTP/1.0 200 OK\r\n")


@pytest.mark.parametrize("header", [("X", "a\r\nY: b"), ("X", "\n"), ("X Y", "a"), ("", "a"), ("X", "é")])
def test_response_header_cannot_break_out(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not a header"):
        response(200, headers=[header])


def test_refusals() -> None:
    start, body = answered(refuse(not_found()))
    assert (start.status_code, body) == (404, b"nothing here\n")
    start, _ = answered(refuse(upgrade_required(), head=True), method="HEAD")
    assert start.status_code == 426
    assert dict(start.headers).items() >= {
        (b"upgrade", b"websocket"),
        (b"connection", b"close, Upgrade"),
        (b"sec-websocket-version", b"13"),
    }


@pytest.mark.parametrize(("serving", "status", "body"), [(True, 200, b"ok\n"), (False, 503, b"draining\n")])
def test_healthz(serving: bool, status: int, body: bytes) -> None:
    start, sent = answered(healthz(serving=serving))
    assert (start.status_code, sent) == (status, body)
