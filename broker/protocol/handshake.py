"""The WebSocket upgrade: from a parsed request to the bytes of the 101 (RFC 6455 section 4.2).

Called by the server's handshake once routing, origin and limits said yes. The
order of the checks is the order in which a person would want to be told.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Collection
from hashlib import sha1

import msgspec

from broker.protocol.http import Fault, Request, RequestError, upgrade_required
from broker.protocol.http_faults import TCHAR
from broker.protocol.origin import OriginPolicy, bearer_token, check_origin, client_address, query_token

__all__ = [
    "JSON",
    "ZSTD",
    "OriginPolicy",
    "Upgrade",
    "accept_token",
    "accepts_deflate",
    "bearer_token",
    "check_origin",
    "client_address",
    "negotiate",
    "query_token",
]

JSON = "broker.v1.json"
ZSTD = "broker.v1.zstd"
"""Frames of this subprotocol are compressed already, so it never gets permessage-deflate."""

OFFERED_SUBPROTOCOLS = 8
"""More than any client has a use for; each is compared."""

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: Upgrade\r\n"
    b"%b%bSec-WebSocket-Accept: %b\r\n\r\n"
)
_DEFLATE_ANSWER = (
    b"Sec-WebSocket-Extensions: permessage-deflate; "
    b"server_no_context_takeover; client_no_context_takeover\r\n"
)
_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # base64 of 16 bytes
_TOKEN = re.compile(rf"{TCHAR}++")
_QUOTED = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_PARAMETER = re.compile(rf"[ \t]*+;[ \t]*+({TCHAR}++)(?:[ \t]*+=[ \t]*+({TCHAR}++|{_QUOTED}))?")
_COMMA = re.compile(r"[ \t]*+(?:,[ \t]*+|\Z)")
_WINDOW_BITS = re.compile(r"[89]|1[0-5]")
_ESCAPED = re.compile(r"\\(.)")


class Upgrade(msgspec.Struct, frozen=True):
    """What was agreed on. Send ``response``, and only then frames.

    ``subprotocol`` is empty if the client offered none: it then speaks JSON.
    ``deflate``: permessage-deflate, without context takeover in either direction.
    """

    subprotocol: str
    deflate: bool
    response: bytes


def negotiate(request: Request, *, subprotocols_supported: Collection[str], deflate: bool) -> Upgrade:
    """Agree to the upgrade that ``request`` asks for, or raise :class:`RequestError`.

    Of the subprotocols that the client offers the first that is supported
    wins; if none is, the upgrade is refused, because a client that offered some
    must fail a connection without one. ``deflate``: whether compression is on here.
    """
    headers = request.headers
    if request.method != "GET":
        raise RequestError(405, Fault.METHOD, "a WebSocket is opened with GET", (("Allow", "GET"),))
    if request.version != "1.1":  # RFC 9110 section 7.8: Upgrade means nothing in 1.0
        raise upgrade_required("a WebSocket is opened with HTTP/1.1")
    if not _lists(headers.get("upgrade", ""), "websocket"):
        raise upgrade_required()
    if not _lists(headers.get("connection", ""), "upgrade"):
        raise upgrade_required("the Connection header does not say 'Upgrade' (does a proxy drop it?)")
    if headers.get("sec-websocket-version") != "13":
        raise RequestError(
            426,
            Fault.WEBSOCKET_VERSION,
            "only version 13 of WebSocket is spoken here",
            upgrade_required().headers,
        )
    key = headers.get("sec-websocket-key", "")
    if not _KEY.fullmatch(key):
        raise RequestError(400, Fault.KEY, "Sec-WebSocket-Key is not the base64 of 16 bytes")
    offered = headers.get("sec-websocket-protocol")
    subprotocol = "" if offered is None else _choose(offered, subprotocols_supported)
    extensions = headers.get("sec-websocket-extensions")
    compress = extensions is not None and accepts_deflate(extensions) and deflate and subprotocol != ZSTD
    answer = _ANSWER % (
        b"Sec-WebSocket-Protocol: %b\r\n" % subprotocol.encode("ascii") if subprotocol else b"",
        _DEFLATE_ANSWER if compress else b"",
        accept_token(key),
    )
    return Upgrade(subprotocol, compress, answer)


def accept_token(key: str) -> bytes:
    """``Sec-WebSocket-Accept`` for ``key`` (RFC 6455 section 4.2.2, step 5)."""
    digest = sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()
    return b2a_base64(digest, newline=False)


def _lists(value: str, token: str) -> bool:
    """Whether a comma-separated header names ``token`` (given in lower case)."""
    value = value.lower()
    return value == token or any(item.strip(" \t") == token for item in value.split(","))


def _choose(offered: str, supported: Collection[str]) -> str:
    """First offered subprotocol that is supported."""
    # A list may have empty elements (RFC 9110 section 5.6.1.2), but not only such.
    names = [name for item in offered.split(",") if (name := item.strip(" \t"))]
    if not names or not all(map(_TOKEN.fullmatch, names)):
        raise RequestError(400, Fault.SUBPROTOCOL, "Sec-WebSocket-Protocol is malformed")
    if len(names) > OFFERED_SUBPROTOCOLS:
        raise RequestError(400, Fault.SUBPROTOCOL, "too many subprotocols offered")
    if len(set(names)) != len(names):  # RFC 6455 section 4.1, item 10
        raise RequestError(400, Fault.SUBPROTOCOL, "a subprotocol is offered twice")
    for name in names:
        if name in supported:
            return name
    raise RequestError(400, Fault.SUBPROTOCOL, "none of the offered subprotocols is supported")


def accepts_deflate(value: str) -> bool:
    """Whether ``Sec-WebSocket-Extensions`` holds an offer of permessage-deflate that we can meet.

    We always answer with both ``no_context_takeover`` parameters, which every
    offer allows (RFC 7692 sections 7.1.1.1 and 7.1.1.2). Raises :class:`RequestError` on
    a header that breaks the grammar of RFC 6455 section 9.1; an offer that is
    merely unacceptable is declined, and the next one considered.
    """
    known = _COMMON_OFFERS.get(value)
    if known is not None:
        return known
    return any(_meets(name, parameters) for name, parameters in _parse_extensions(value))


def _parse_extensions(value: str) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Offers in order, each a name and its parameters; a parameter without ``=`` has ``None``."""
    offers = []
    position = 0
    while position < len(value):
        if separator := _COMMA.match(value, position):  # an empty element
            position = separator.end()
            continue
        name = _TOKEN.match(value, position)
        if name is None:
            raise _malformed_extensions()
        position = name.end()
        parameters: list[tuple[str, str | None]] = []
        while match := _PARAMETER.match(value, position):
            parameters.append((match[1], _unquote(match[2])))
            position = match.end()
        separator = _COMMA.match(value, position)
        if separator is None:
            raise _malformed_extensions()
        position = separator.end()
        offers.append((name[0], parameters))
    if not offers:
        raise _malformed_extensions()
    return offers


def _unquote(text: str | None) -> str | None:
    """Parameter value without its quotes; what was quoted must be a token too (RFC 6455 section 9.1)."""
    if text is None or text[0] != '"':
        return text
    text = _ESCAPED.sub(r"\1", text[1:-1])
    if not _TOKEN.fullmatch(text):
        raise _malformed_extensions()
    return text


def _malformed_extensions() -> RequestError:
    return RequestError(400, Fault.EXTENSIONS, "Sec-WebSocket-Extensions is malformed")


def _meets(name: str, parameters: list[tuple[str, str | None]]) -> bool:
    """Whether one offer is permessage-deflate in a form that we can meet.

    RFC 7692 section 7 has us decline unknown parameters, invalid values and repetitions.
    """
    if name != "permessage-deflate" or len({parameter for parameter, _ in parameters}) != len(parameters):
        return False
    for parameter, value in parameters:
        match parameter:
            case "server_no_context_takeover" | "client_no_context_takeover":
                if value is not None:
                    return False
            case "client_max_window_bits":
                # A hint (section 7.1.2.2). We inflate with the largest window, so any size will do.
                if value is not None and not _WINDOW_BITS.fullmatch(value):
                    return False
            case "server_max_window_bits":
                # A smaller window would need a compressor for this client alone, and
                # frames are compressed once for all. 15 is what we use.
                if value != "15":
                    return False
            case _:
                return False
    return True


_COMMON_OFFERS: dict[str, bool] = {}
for _offer in (
    "permessage-deflate; client_max_window_bits",  # Chrome, Safari, Node `ws`, Python `websockets`
    "permessage-deflate",  # Firefox
):
    _COMMON_OFFERS[_offer] = accepts_deflate(_offer)
