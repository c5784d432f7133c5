"""What can be wrong with a request, and the scan that finds the first of it.

Called by :mod:`broker.protocol.http` only after its fast path said no, or when
a head is still incomplete; so this file may take its time, but only linear time.

Theory. A verdict must not depend on how the bytes were cut. So the scan reports
the first offence *by position*: the verdict on a prefix is final, it stays the
verdict whatever follows, and each check looks no further than the byte that
decides it. That is also what refuses garbage at its first bad byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from broker.config import KIB, Limits

REQUEST_LINE_BYTES = 8 * KIB
"""RFC 9112 section 3 asks for at least 8,000; a token in the query fits, a flood does not."""

METHOD_BYTES = 16
"""After this many bytes something that is no HTTP (TLS, a stray protocol) has shown itself."""

HeaderList = Sequence[tuple[str, str]]

# Possessive quantifiers (``*+``) keep every pattern linear on hostile input.
TCHAR = r"[-!#$%&'*+.^_`|~0-9A-Za-z]"
"""RFC 9110 section 5.6.2, one character."""

REQUEST_LINE = re.compile(rf"({TCHAR}{{1,{METHOD_BYTES}}}+) ([!-~]++) HTTP/1\.([01])\r\n")

_METHOD_SO_FAR = re.compile(rf"{TCHAR}{{1,{METHOD_BYTES}}}+(?: |\Z)")
_OTHER_VERSION = re.compile(rf"{TCHAR}++ [!-~]++ HTTP/[0-9]\.[0-9]")
_FIELD_RUN = re.compile(rf"(?:{TCHAR}++:[\t -~]*+\r\n)*+")
_NAME = re.compile(rf"{TCHAR}*+")
_LINE_TEXT = re.compile(r"[ -~]*+")
_VALUE_TEXT = re.compile(r"[\t -~]*+")


class Fault(StrEnum):
    """Why a request was refused; the label under which refusals are counted."""

    REQUEST_LINE = "request_line"
    VERSION = "version"
    HEADER = "header"
    DUPLICATE = "duplicate_header"
    HOST = "host"
    TARGET = "target"
    BODY = "body"
    TOO_LARGE = "head_too_large"
    METHOD = "method"
    NOT_WEBSOCKET = "not_websocket"
    WEBSOCKET_VERSION = "websocket_version"
    KEY = "key"
    SUBPROTOCOL = "subprotocol"
    EXTENSIONS = "extensions"
    ORIGIN = "origin"
    DRAINING = "draining"
    ADDRESS = "address"
    NOT_FOUND = "not_found"


class RequestError(Exception):
    """A request that gets no upgrade. Answer with :func:`refuse`, then close.

    ``status`` is the HTTP answer, ``code`` the label to count it under,
    ``reason`` a sentence without client text, ``headers`` what the answer must carry.
    """

    def __init__(self, status: int, code: Fault, reason: str, headers: HeaderList = ()) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code
        self.reason = reason
        self.headers = headers


def too_many(fields: int, limits: Limits) -> bool:
    """Whether ``fields`` exceeds the limit (0: there is none)."""
    return 0 < limits.request_headers < fields


def first_offence(text: str, limits: Limits, *, lines_before: int) -> RequestError | None:
    """First thing wrong in ``text``, by position; ``None`` if more bytes may make it right.

    ``text`` starts at the beginning of a line and ``lines_before`` correct
    lines came before it. The verdict on a prefix is final: it stays the
    verdict whatever follows. Each check below therefore looks no further than
    the byte that decides it.
    """
    position = 0
    if lines_before == 0:
        end = text.find("\r\n")
        offence = _line_offence(text if end < 0 else text[:end], complete=end >= 0)
        if offence is not None or end < 0:
            return offence
        position = end + 2
        lines_before = 1
    run = _FIELD_RUN.match(text, position)
    assert run is not None  # it can match the empty string
    if too_many(lines_before - 1 + text.count("\n", position, run.end()), limits):
        return RequestError(431, Fault.TOO_LARGE, "too many header fields")
    return _field_offence(text, run.end())


def _line_offence(line: str, *, complete: bool) -> RequestError | None:
    """First thing wrong in a request line, whole or begun."""
    if not complete:
        line = line.removesuffix("\r")  # perhaps the first half of its end
        if not line:
            return None
    if _METHOD_SO_FAR.match(line) is None:
        return RequestError(400, Fault.REQUEST_LINE, "the first line does not start with an HTTP method")
    legal = _LINE_TEXT.match(line, 0, REQUEST_LINE_BYTES)
    assert legal is not None  # it can match the empty string
    if legal.end() < min(len(line), REQUEST_LINE_BYTES):
        return RequestError(400, Fault.REQUEST_LINE, f"{_name_byte(line[legal.end()])} in the request line")
    if len(line) > REQUEST_LINE_BYTES:
        return RequestError(414, Fault.REQUEST_LINE, "the request line is too long")
    if not complete or REQUEST_LINE.match(line + "\r\n"):
        return None
    if _OTHER_VERSION.fullmatch(line):
        return RequestError(505, Fault.VERSION, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return RequestError(400, Fault.REQUEST_LINE, "the request line is not 'METHOD target HTTP/1.1'")


def _field_offence(text: str, position: int) -> RequestError | None:
    """First thing wrong in the field line at ``position``, which is not a correct whole one."""
    if text.startswith((" ", "\t"), position):
        return RequestError(400, Fault.HEADER, "a header line starts with white space (folding is refused)")
    name = _NAME.match(text, position)
    assert name is not None  # it can match the empty string
    colon = name.end()
    rest = text[colon : colon + 2]
    if not rest:
        return None
    if rest[0] == ":" and colon > position:
        value = _VALUE_TEXT.match(text, colon + 1)
        assert value is not None  # it can match the empty string
        rest = text[value.end() : value.end() + 2]
        if rest in {"", "\r"}:
            return None
        return RequestError(400, Fault.HEADER, f"{_name_byte(rest[0])} in a header value")
    if colon == position and rest in {"\r", "\r\n"}:
        return None  # the blank line
    if rest[0] == ":":
        return RequestError(400, Fault.HEADER, "a header has an empty name")
    if rest[0] in " \t":
        return RequestError(400, Fault.HEADER, "white space before the colon of a header")
    if rest[0] == "\r":
        return RequestError(400, Fault.HEADER, "a header line has no colon")
    return RequestError(400, Fault.HEADER, f"{_name_byte(rest[0])} in a header name")


def _name_byte(char: str) -> str:
    """What a person would call an illegal byte."""
    match char:
        case "\n":
            return "a line feed without carriage return"
        case "\r":
            return "a carriage return without line feed"
        case "\0":
            return "a NUL byte"
    if char > "\x7f":
        return "a byte that is not ASCII"
    return "a control character" if char < " " or char == "\x7f" else "an illegal character"
