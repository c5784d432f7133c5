"""Requests that a client port must survive, with the answer each must get.

Used by the tests of the parser and of the upgrade, and over real sockets by the
end-to-end tests. Every entry is aimed at ``/ws`` of a broker in its default
configuration, which supports both subprotocols.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""What RFC 6455 section 1.3 answers to :data:`KEY`."""

UNFINISHED = 0
"""In place of a status: nothing is wrong yet, so only the handshake's deadline ends it."""

_GOOD: dict[str, str | None] = {
    "Host": "localhost:8765",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def upgrade(
    changes: dict[str, str | None] | None = None,
    *,
    line: str = "GET /ws HTTP/1.1",
    extra: Iterable[str] = (),
) -> bytes:
    """A good upgrade request after ``changes`` (``None`` drops a header), ``extra`` lines at its end."""
    headers = _GOOD | (changes or {})
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None), *extra]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


BROWSER = upgrade(
    {
        "Host": "broker.example.com:8765",
        "Connection": "keep-alive, Upgrade",
        "Origin": "http://broker.example.com:8765",
        "Pragma": "no-cache",
        "Cache-Control": "no-cache",
        "User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Safari/537.36",
        "Accept-Encoding": "gzip, deflate, br, zstd",
        "Accept-Language": "en-US,en;q=0.9",
        "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
    }
)
"""What a browser sends: about 500 bytes, 12 fields."""


class Hostile(NamedTuple):
    """``data`` as it goes over the wire; ``status`` of the answer, or :data:`UNFINISHED`."""

    name: str
    data: bytes
    status: int


def _deflate(parameters: str) -> bytes:
    return upgrade({"Sec-WebSocket-Extensions": f"permessage-deflate{parameters}"})


def _header(line: str) -> bytes:
    return upgrade(extra=[line])


_NOT_HTTP = [
    Hostile("nothing", b"", UNFINISHED),
    Hostile("half a method", b"GE", UNFINISHED),
    Hostile("half a line ending", b"GET /ws HTTP/1.1\r", UNFINISHED),
    Hostile("no blank line", upgrade()[:-2], UNFINISHED),
    Hostile("half a blank line", upgrade()[:-1], UNFINISHED),
    Hostile("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
    Hostile("SSH banner", b"SSH-2.0-OpenSSH_9.6\r\n", 400),
    Hostile("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    Hostile("SOCKS", b"\x05\x01\x00", 400),
    Hostile("redis inline", b"*1\r\n$4\r\nPING\r\n", 400),
    Hostile("NULs", bytes(64), 400),
    Hostile("one endless word", b"A" * 4096, 400),
    Hostile("blank lines first", b"\r\n\r\n" + upgrade(), 400),
    Hostile("line feeds only", upgrade().replace(b"\r\n", b"\n"), 400),
    Hostile("carriage returns only", upgrade().replace(b"\r\n", b"\r"), 400),
    Hostile("a frame without a handshake", b"\x81\x85abcd\x09\x07\x0f\x08\x0e", 400),
]

_REQUEST_LINES = [
    Hostile("HTTP/0.9", b"GET /ws\r\n\r\n", 400),
    Hostile("version 0.9 by name", upgrade(line="GET /ws HTTP/0.9"), 505),
    Hostile("version 1.2", upgrade(line="GET /ws HTTP/1.2"), 505),
    Hostile("version 3.0", upgrade(line="GET /ws HTTP/3.0"), 505),
    Hostile("version 1.10", upgrade(line="GET /ws HTTP/1.10"), 400),
    Hostile("lower case version", upgrade(line="GET /ws http/1.1"), 400),
    Hostile("version 1.0", upgrade(line="GET /ws HTTP/1.0"), 426),
    Hostile("no target", upgrade(line="GET HTTP/1.1"), 400),
    Hostile("two spaces", upgrade(line="GET  /ws HTTP/1.1"), 400),
    Hostile("tabs", upgrade(line="GET\t/ws\tHTTP/1.1"), 400),
    Hostile("trailing space", upgrade(line="GET /ws HTTP/1.1 "), 400),
    Hostile("leading space", upgrade(line=" GET /ws HTTP/1.1"), 400),
    Hostile("space in target", upgrade(line="GET /w s HTTP/1.1"), 400),
    Hostile("NUL in target", upgrade(line="GET /w\0s HTTP/1.1"), 400),
    Hostile("non-ASCII target", upgrade(line="GET /w\xe9 HTTP/1.1"), 400),
    Hostile("DEL in target", upgrade(line="GET /w\x7f HTTP/1.1"), 400),
    Hostile("bare CR in line", upgrade(line="GET /ws\rX HTTP/1.1"), 400),
    Hostile("bare LF in line", upgrade(line="GET /ws HTTP/1.1\nX: y"), 400),
    Hostile("brace in method", upgrade(line="G{T /ws HTTP/1.1"), 400),
    Hostile("long method", upgrade(line="GETGETGETGETGETGET /ws HTTP/1.1"), 400),
    Hostile("long target", upgrade(line=f"GET /{'a' * 8192} HTTP/1.1"), 414),
    Hostile("endless target", b"GET /" + b"a" * 20_000, 414),
    Hostile("POST", upgrade(line="POST /ws HTTP/1.1"), 405),
    Hostile("HEAD", upgrade(line="HEAD /ws HTTP/1.1"), 405),
    Hostile("lower case method", upgrade(line="get /ws HTTP/1.1"), 405),
    Hostile("asterisk", upgrade(line="OPTIONS * HTTP/1.1"), 400),
    Hostile("authority form", upgrade(line="CONNECT localhost:8765 HTTP/1.1"), 400),
    Hostile("absolute form, same host", upgrade(line="GET http://localhost:8765/ws HTTP/1.1"), 101),
    Hostile("absolute form, other host", upgrade(line="GET http://evil.example/ws HTTP/1.1"), 400),
    Hostile("absolute form, user info", upgrade(line="GET http://a@localhost:8765/ws HTTP/1.1"), 400),
    Hostile("absolute form, no host", upgrade(line="GET http:///ws HTTP/1.1"), 400),
    Hostile("absolute form, other scheme", upgrade(line="GET file:///ws HTTP/1.1"), 400),
    Hostile("fragment", upgrade(line="GET /ws#x HTTP/1.1"), 400),
    Hostile("fragment in query", upgrade(line="GET /ws?a#x HTTP/1.1"), 400),
    Hostile("half an escape", upgrade(line="GET /ws%2 HTTP/1.1"), 400),
    Hostile("bad escape", upgrade(line="GET /ws%zz HTTP/1.1"), 400),
    Hostile("escaped NUL", upgrade(line="GET /ws%00 HTTP/1.1"), 400),
    Hostile("escaped line end", upgrade(line="GET /ws%0d%0aX:y HTTP/1.1"), 400),
    Hostile("overlong UTF-8 in path", upgrade(line="GET /ws%c0%af HTTP/1.1"), 400),
    Hostile("surrogate in path", upgrade(line="GET /ws%ed%a0%80 HTTP/1.1"), 400),
]

_FIELDS = [
    Hostile("folding", _header("X: a\r\n b"), 400),
    Hostile("folded first line", b"GET /ws HTTP/1.1\r\n X: y\r\n\r\n", 400),
    Hostile("space before colon", _header("X : y"), 400),
    Hostile("tab before colon", _header("X\t: y"), 400),
    Hostile("no colon", _header("X"), 400),
    Hostile("empty name", _header(": y"), 400),
    Hostile("parenthesis in name", _header("X(y): z"), 400),
    Hostile("NUL in name", _header("X\0: y"), 400),
    Hostile("non-ASCII name", _header("X\xe9: y"), 400),
    Hostile("NUL in value", _header("X: a\0b"), 400),
    Hostile("control in value", _header("X: a\x01b"), 400),
    Hostile("escape sequence in value", _header("User-Agent: \x1b[31m"), 400),
    Hostile("DEL in value", _header("X: a\x7fb"), 400),
    Hostile("non-ASCII value", _header("X: \xff"), 400),
    Hostile("vertical tab in value", _header("X: a\x0bb"), 400),
    Hostile("bare CR in value", _header("X: a\rb"), 400),
    Hostile("bare CR at end of value", _header("X: a\r\r\n"), 400),
    Hostile("bare LF in value", _header("X: a\nY: b"), 400),
    Hostile("bare CR in name", _header("X\ry: z"), 400),
    Hostile("a head that ends in LF LF", b"GET /ws HTTP/1.1\r\nHost: a\n\n", 400),
    Hostile("many fields", upgrade(extra=[f"X-{n}: y" for n in range(100)]), 431),
    Hostile("endless fields", b"GET /ws HTTP/1.1\r\n" + b"a:\r\n" * 5000, 431),
    Hostile("large head", upgrade({"Cookie": "c" * 20_000}), 431),
    Hostile("endless value", b"GET /ws HTTP/1.1\r\nX: " + b"a" * 20_000, 431),
    Hostile("blanks to back-track over", b"GET /ws HTTP/1.1\r\nX:" + b" " * 16_000 + b"\0\r\n\r\n", 400),
    Hostile("words to back-track over", b"GET /ws HTTP/1.1\r\nX:" + b" a" * 8_000 + b"\0\r\n\r\n", 400),
    Hostile("garbage after a good start", b"GET /ws HTTP/1.1\r\nHost: a\r\n\x00\xff\x00\xff", 400),
]

_HOSTS = [
    Hostile("no Host", upgrade({"Host": None}), 400),
    Hostile("two Hosts", upgrade(extra=["Host: localhost:8765"]), 400),
    Hostile("two Hosts, other case", upgrade(extra=["hOST: evil.example"]), 400),
    Hostile("empty Host", upgrade({"Host": ""}), 400),
    Hostile("Host with a path", upgrade({"Host": "localhost/ws"}), 400),
    Hostile("Host with user info", upgrade({"Host": "a@localhost"}), 400),
    Hostile("Host with a space", upgrade({"Host": "local host"}), 400),
    Hostile("a list of Hosts", upgrade({"Host": "a, b"}), 400),
    Hostile("Host with an empty label", upgrade({"Host": "a..b"}), 400),
    Hostile("Host with a long label", upgrade({"Host": "a" * 64 + ".example"}), 400),
    Hostile("non-ASCII Host", upgrade({"Host": "caf\xe9"}), 400),
    Hostile("Host with a broken IDNA label", upgrade({"Host": "xn--zz-_"}), 101),
    Hostile("Host port of letters", upgrade({"Host": "localhost:http"}), 400),
    Hostile("Host port without bound", upgrade({"Host": "localhost:99999"}), 400),
    Hostile("Host port without digits", upgrade({"Host": "localhost:"}), 400),
    Hostile("broken IPv6 Host", upgrade({"Host": "[::1"}), 400),
    Hostile("impossible IPv6 Host", upgrade({"Host": "[1::2::3]:80"}), 400),
    Hostile("IPv6 Host", upgrade({"Host": "[::1]:8765"}), 101),
]

_BODIES = [
    Hostile("Content-Length 0", _header("Content-Length: 0"), 101),
    Hostile("Content-Length 5", _header("Content-Length: 5") + b"hello", 413),
    Hostile("two Content-Lengths", upgrade(extra=["Content-Length: 0", "Content-Length: 5"]), 400),
    Hostile("a list of Content-Lengths", _header("Content-Length: 0, 0"), 400),
    Hostile("negative Content-Length", _header("Content-Length: -1"), 400),
    Hostile("signed Content-Length", _header("Content-Length: +0"), 400),
    Hostile("huge Content-Length", _header("Content-Length: " + "9" * 5000), 413),
    Hostile("endless zero", _header("Content-Length: " + "0" * 5000), 413),
    Hostile("chunked", _header("Transfer-Encoding: chunked") + b"0\r\n\r\n", 413),
    Hostile("unknown coding", _header("Transfer-Encoding: xchunked"), 413),
    Hostile("smuggling", upgrade(extra=["Content-Length: 4", "Transfer-Encoding: chunked"]), 400),
    Hostile("two codings", upgrade(extra=["Transfer-Encoding: chunked", "Transfer-Encoding: x"]), 400),
]

_HANDSHAKES = [
    Hostile("no Upgrade", upgrade({"Upgrade": None}), 426),
    Hostile("other Upgrade", upgrade({"Upgrade": "h2c"}), 426),
    Hostile("Upgrade of another name", upgrade({"Upgrade": "websockets"}), 426),
    Hostile("Upgrade in a list", upgrade({"Upgrade": "h2c, WebSocket"}), 101),
    Hostile("no Connection", upgrade({"Connection": None}), 426),
    Hostile("Connection: close", upgrade({"Connection": "close"}), 426),
    Hostile("non-ASCII Connection", upgrade({"Connection": "Upgrade, \xe9"}), 400),
    Hostile("no key", upgrade({"Sec-WebSocket-Key": None}), 400),
    Hostile("empty key", upgrade({"Sec-WebSocket-Key": ""}), 400),
    Hostile("short key", upgrade({"Sec-WebSocket-Key": "dGhlIHNhbXBsZQ=="}), 400),
    Hostile("long key", upgrade({"Sec-WebSocket-Key": "A" * 22 + "====" * 1000}), 400),
    Hostile("key that is not base64", upgrade({"Sec-WebSocket-Key": "!" * 22 + "=="}), 400),
    Hostile("URL-safe base64 key", upgrade({"Sec-WebSocket-Key": "-" * 22 + "=="}), 400),
    Hostile("two keys", upgrade(extra=[f"Sec-WebSocket-Key: {KEY}"]), 400),
    Hostile("no version", upgrade({"Sec-WebSocket-Version": None}), 426),
    Hostile("old version", upgrade({"Sec-WebSocket-Version": "8"}), 426),
    Hostile("two versions", upgrade(extra=["Sec-WebSocket-Version: 8"]), 400),
    Hostile("a list of versions", upgrade({"Sec-WebSocket-Version": "13, 8"}), 426),
    Hostile("two Origins", upgrade(extra=["Origin: http://a", "Origin: http://b"]), 400),
    Hostile("two tokens", upgrade(extra=["Authorization: Bearer a", "Authorization: Bearer b"]), 400),
    Hostile("unknown subprotocol", upgrade({"Sec-WebSocket-Protocol": "mqtt"}), 400),
    Hostile("empty subprotocol", upgrade({"Sec-WebSocket-Protocol": ""}), 400),
    Hostile("only commas", upgrade({"Sec-WebSocket-Protocol": ", ,"}), 400),
    Hostile("subprotocol with a space", upgrade({"Sec-WebSocket-Protocol": "broker v1"}), 400),
    Hostile("subprotocol with a separator", upgrade({"Sec-WebSocket-Protocol": "broker/v1"}), 400),
    Hostile("non-ASCII subprotocol", upgrade({"Sec-WebSocket-Protocol": "caf\xe9"}), 400),
    Hostile("the same subprotocol twice", upgrade({"Sec-WebSocket-Protocol": "a, a, broker.v1.json"}), 400),
    Hostile(
        "nine subprotocols",
        upgrade({"Sec-WebSocket-Protocol": "a, b, c, d, e, f, g, h, broker.v1.json"}),
        400,
    ),
]

_EXTENSIONS = [
    Hostile("empty extensions", upgrade({"Sec-WebSocket-Extensions": ""}), 400),
    Hostile("only commas in extensions", upgrade({"Sec-WebSocket-Extensions": ",,"}), 400),
    Hostile("extension without a name", upgrade({"Sec-WebSocket-Extensions": "; a"}), 400),
    Hostile("two names", upgrade({"Sec-WebSocket-Extensions": "a b"}), 400),
    Hostile("non-ASCII extension", upgrade({"Sec-WebSocket-Extensions": "permessage-deflat\xe9"}), 400),
    Hostile("parameter without a name", _deflate("; =1"), 400),
    Hostile("parameter that ends early", _deflate(";"), 400),
    Hostile("value that ends early", _deflate("; server_max_window_bits="), 400),
    Hostile("quote without end", _deflate('; client_max_window_bits="10'), 400),
    Hostile("quote of no token", _deflate('; client_max_window_bits="1 0"'), 400),
    Hostile("empty quote", _deflate('; client_max_window_bits=""'), 400),
    Hostile("escapes without end", _deflate('; a="' + "\\a" * 4000), 400),
    Hostile("letters for bits", _deflate("; server_max_window_bits=abc"), 101),
    Hostile("letters for client bits", _deflate("; client_max_window_bits=abc"), 101),
    Hostile("too many bits", _deflate("; client_max_window_bits=99"), 101),
    Hostile("superscript bits", _deflate("; client_max_window_bits=\xb2"), 400),
    Hostile("endless bits", _deflate("; client_max_window_bits=" + "9" * 5000), 101),
    Hostile("unknown parameter", _deflate("; wbits=15"), 101),
    Hostile("parameter twice", _deflate("; client_max_window_bits; client_max_window_bits"), 101),
    Hostile("many offers", upgrade({"Sec-WebSocket-Extensions": ",".join(["a;b=c"] * 1000)}), 101),
]

HOSTILE: tuple[Hostile, ...] = (
    *_NOT_HTTP,
    *_REQUEST_LINES,
    *_FIELDS,
    *_HOSTS,
    *_BODIES,
    *_HANDSHAKES,
    *_EXTENSIONS,
)
