"""One HTTP/1.x request as bytes, strictly, and the few answers we give that are not an upgrade.

Called by the connection's handshake, which owns the socket and the deadline.

Theory. The client port needs a sliver of HTTP: a head, no body, one request
per connection. A general parser spends its time on what we refuse anyway, so
this one is ours: one search for the blank line, one regular expression for the
request line, one ``findall`` for all fields. That path only says yes or no; the
reason for a no comes from the scan in :mod:`broker.protocol.http_faults`, in
the same words however the bytes were cut.

What is accepted here, h11 accepts with the same method, target and fields. We
are stricter than h11 (and, where noted, than RFC 9112) in this and nothing else:

* line folding, bare LF, and every byte but HTAB and 0x20-0x7E in the head;
* a request line above 8 KiB, a head above ``request_bytes``, more than
  ``request_headers`` fields, a method above 16 bytes;
* versions other than 1.0 and 1.1;
* ``Host`` that is not a DNS name (``_`` allowed) or an IP address, with a port;
* repeated fields that must be single (:data:`SINGLE`);
* bodies: ``Content-Length`` above 0, any ``Transfer-Encoding``;
* targets with a fragment, a broken escape or an escaped control character, in
  authority or asterisk form, or absolute for another host than ``Host``.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from email.utils import formatdate
from http import HTTPStatus
from typing import Literal
from urllib.parse import unquote_to_bytes

import msgspec

from broker.config import Limits
from broker.protocol.http_faults import (
    REQUEST_LINE,
    REQUEST_LINE_BYTES,
    TCHAR,
    Fault,
    HeaderList,
    RequestError,
    first_offence,
    too_many,
)

__all__ = [
    "Fault",
    "Request",
    "RequestError",
    "Version",
    "healthz",
    "not_found",
    "parse_request",
    "refuse",
    "response",
    "split_host",
    "upgrade_required",
]

SINGLE = frozenset(
    {
        "host",
        "origin",
        "authorization",
        "content-length",
        "transfer-encoding",
        "sec-websocket-key",
        "sec-websocket-version",
    }
)
"""Fields on which two readers of a request could disagree if they came twice."""

Version = Literal["1.0", "1.1"]


class Request(msgspec.Struct, frozen=True):
    """A head that passed every check.

    ``target`` is as sent; ``path`` its decoded path; ``query`` raw, without ``?``.
    ``fields`` keeps names and order as sent; ``headers`` maps lowercased names
    to values, repeated fields joined by ``", "`` (RFC 9110 section 5.3).
    ``consumed`` bytes of the buffer were the head; what follows is already
    the WebSocket stream, since a client may send frames early.
    """

    method: str
    target: str
    path: str
    query: str
    version: Version
    fields: list[tuple[str, str]]
    headers: dict[str, str]
    consumed: int


_FIELD = re.compile(rf"^({TCHAR}++):[ \t]*+((?>[!-~](?:[\t -~]*[!-~])?)?)[ \t]*+\r\n", re.MULTILINE)

_LABEL = r"[A-Za-z0-9_-]{1,63}+"
_HOST = re.compile(rf"({_LABEL}(?:\.{_LABEL})*+\.?|\[[0-9A-Fa-f:.]{{2,45}}+\])(?::([0-9]{{1,5}}))?")
_ZERO = re.compile(r"0{1,20}")  # h11's bound on digits
_DIGITS = re.compile(r"[0-9]++")
_ABSOLUTE = re.compile(r"(?i:https?|wss?)://([^/?#]++)(.*)")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def parse_request(buffer: bytes | bytearray, limits: Limits, searched: int = 0) -> Request | None:
    """Read one request head from the start of ``buffer``.

    ``None``: all well so far, call again with the same buffer and more bytes
    behind; ``searched`` is then the length of the buffer at the last such call
    and saves looking at old bytes again. Raises :class:`RequestError` as soon
    as no further byte could mend the request, and nothing else, whatever the bytes.
    """
    ceiling = limits.request_bytes or sys.maxsize
    end = buffer.find(b"\r\n\r\n", max(0, searched - 3), ceiling)
    if end < 0:
        _check_unfinished(buffer, limits, ceiling, searched)
        return None
    # latin-1 cannot fail; the patterns then refuse whatever is not ASCII.
    text = buffer[: end + 2].decode("latin-1")
    line = REQUEST_LINE.match(text)
    if line is None or line.end() > REQUEST_LINE_BYTES + 2:
        raise _offence(text, limits)
    fields: list[tuple[str, str]] = _FIELD.findall(text, line.end())
    # Each match starts after a LF and holds exactly one; as many as there are
    # LFs means that they cover the head without a gap.
    if len(fields) != text.count("\n") - 1 or too_many(len(fields), limits):
        raise _offence(text, limits)
    headers = {name.lower(): value for name, value in fields}
    if len(headers) != len(fields):
        headers = _join_repeated(fields)
    method, target, minor = line.groups()
    version: Version = "1.1" if minor == "1" else "1.0"
    _check_host(headers, version)
    if "content-length" in headers or "transfer-encoding" in headers:
        _refuse_body(headers)
    path, query = _split_target(target, headers)
    return Request(method, target, path, query, version, fields, headers, end + 4)


def _check_unfinished(buffer: bytes | bytearray, limits: Limits, ceiling: int, searched: int) -> None:
    """Raise if what came so far cannot become a request any more."""
    # Lines that ended before ``searched`` were scanned by an earlier call.
    start = buffer.rfind(b"\n", 0, min(searched, ceiling)) + 1
    offence = first_offence(
        buffer[start:ceiling].decode("latin-1"), limits, lines_before=buffer.count(b"\n", 0, start)
    )
    if offence is not None:
        raise offence
    if len(buffer) >= ceiling:
        raise RequestError(431, Fault.TOO_LARGE, "the request head is too large")


def _offence(head: str, limits: Limits) -> RequestError:
    """The reason why the fast path said no to a complete ``head``."""
    return first_offence(head, limits, lines_before=0) or RequestError(
        400, Fault.REQUEST_LINE, "this is no HTTP request"
    )


def _join_repeated(fields: list[tuple[str, str]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, value in fields:
        name = raw_name.lower()
        if name not in headers:
            headers[name] = value
        elif name in SINGLE:
            raise RequestError(400, Fault.DUPLICATE, f"more than one {name} header")
        else:
            headers[name] += ", " + value
    return headers


def _check_host(headers: dict[str, str], version: str) -> None:
    host = headers.get("host")
    if host is None:
        if version == "1.1":  # RFC 9112 section 3.2; health checks still use 1.0 without it
            raise RequestError(400, Fault.HOST, "the Host header is missing")
    elif split_host(host) is None:
        raise RequestError(400, Fault.HOST, "the Host header is malformed")


def split_host(value: str) -> tuple[str, int | None] | None:
    """``host[:port]`` as (normalised host, port), or ``None`` if malformed.

    Names are lowercased; an IPv6 address keeps its brackets and is compressed.
    Labels are not read as IDNA: nothing here needs it, and decoders of it raise.
    """
    match = _HOST.fullmatch(value)
    if match is None:
        return None
    host, digits = match.groups()
    port = int(digits) if digits else None
    if port is not None and port > 65535:
        return None
    if host[0] == "[":
        try:
            return f"[{ipaddress.IPv6Address(host[1:-1])}]", port
        except ValueError:
            return None
    return host.lower(), port


def _refuse_body(headers: dict[str, str]) -> None:
    """Bodies end here: two readers who frame one differently are how requests get smuggled."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if length is not None:
            raise RequestError(400, Fault.BODY, "both Content-Length and Transfer-Encoding")
        raise RequestError(413, Fault.BODY, "requests with a body are refused here")
    assert length is not None
    if _ZERO.fullmatch(length):
        return
    if _DIGITS.fullmatch(length):
        raise RequestError(413, Fault.BODY, "requests with a body are refused here")
    raise RequestError(400, Fault.BODY, "the Content-Length header is malformed")


def _split_target(target: str, headers: dict[str, str]) -> tuple[str, str]:
    """Decoded path and raw query of a request target."""
    if target[0] != "/":
        target = _origin_form(target, headers)
    path, _, query = target.partition("?")
    if "#" in target:
        raise RequestError(400, Fault.TARGET, "the request target has a fragment")
    if "%" not in path:
        return path, query
    if _BAD_ESCAPE.search(path):
        raise RequestError(400, Fault.TARGET, "a broken escape in the path")
    try:
        path = unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise RequestError(400, Fault.TARGET, "the path is not UTF-8") from None
    if _CONTROL.search(path):
        raise RequestError(400, Fault.TARGET, "an escaped control character in the path")
    return path, query


def _origin_form(target: str, headers: dict[str, str]) -> str:
    """Turn an absolute target into its path and query.

    RFC 9112 section 3.2.2 has us accept the form and believe it over ``Host``.
    We accept it only where the two agree: then nothing that compares ``Host``
    (the origin check does) can be led astray.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise RequestError(400, Fault.TARGET, "the request target is not a path")
    authority, rest = match.groups()
    if authority.lower() != headers.get("host", "").lower():
        raise RequestError(400, Fault.TARGET, "the request target and the Host header name different hosts")
    return rest if rest.startswith("/") else "/" + rest


def response(
    status: int,
    body: bytes | str = b"",
    *,
    content_type: str = "text/plain; charset=utf-8",
    headers: HeaderList = (),
    head: bool = False,
    version: Version = "1.1",
    now: float | None = None,
) -> bytes:
    """Bytes of a complete answer, after which the connection is to be closed.

    ``head``: the request was HEAD, so the length is told and the body withheld.
    ``now`` (Unix seconds) becomes ``Date``. Raises ValueError on a header that
    would break out of its line; no client text belongs there.
    """
    if isinstance(body, str):
        body = body.encode()
    lines = [f"HTTP/{version} {status} {HTTPStatus(status).phrase}"]
    if now is not None:
        lines.append(f"Date: {formatdate(now, usegmt=True)}")
    bodiless = status < 200 or status in {204, 304}  # RFC 9110 section 8.6
    if not bodiless:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    # A sender of Upgrade must name it in Connection too (RFC 9110 section 7.8).
    upgrades = any(name.lower() == "upgrade" for name, _ in headers)
    lines.append("Connection: close, Upgrade" if upgrades else "Connection: close")
    for name, value in headers:
        if not _FIELD.fullmatch(f"{name}: {value}\r\n"):
            raise ValueError(f"not a header: {name!r}: {value!r}")
        lines.append(f"{name}: {value}")
    start = "\r\n".join([*lines, "", ""]).encode("ascii")
    return start if head or bodiless else start + body


def refuse(
    error: RequestError, *, head: bool = False, version: Version = "1.1", now: float | None = None
) -> bytes:
    """The answer that ``error`` suggests."""
    return response(
        error.status, f"{error.reason}\n", headers=error.headers, head=head, version=version, now=now
    )


def not_found() -> RequestError:
    """Nothing lives at this path."""
    return RequestError(404, Fault.NOT_FOUND, "nothing here")


def upgrade_required(reason: str = "this is a WebSocket endpoint") -> RequestError:
    """RFC 9110 section 15.5.22 asks for ``Upgrade`` in it, RFC 6455 section 4.4 for the version."""
    return RequestError(
        426, Fault.NOT_WEBSOCKET, reason, (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
    )


def healthz(*, serving: bool = True, head: bool = False, version: Version = "1.1") -> bytes:
    """Answer to a load balancer: 200 while connections are welcome, else 503."""
    status, body = (200, "ok\n") if serving else (503, "draining\n")
    return response(status, body, headers=(("Cache-Control", "no-store"),), head=head, version=version)
