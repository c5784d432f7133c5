"""RFC 6455 frames: bytes in, messages out; payloads in, frames out. No IO.

Theory. Nearly every frame a client sends is whole, unfragmented, masked, with
no reserved bit: the *fast lane* takes those apart with a handful of slices
(0.9 µs for 150 B where wsproto takes 7.5, ``python -m bench.micro frames``).
Everything else goes to the *slow lane*, which is wsproto, the authority on what
is legal: fragments, frames cut by the network, close frames, compressed frames,
and every violation. wsproto's object is built when first needed and dropped at
the next message boundary, so an idle connection holds none; that loses nothing,
because permessage-deflate is only ever agreed with both
``no_context_takeover`` parameters.

What wsproto does not do is bound anything. A small tracker therefore walks the
frame headers beside it and refuses a declared length or a number of fragments
above the limits before a byte of the payload is kept (``docs/limits.md``).
Except for those limits both lanes give the same answer on every input; the
property tests feed both.
"""

from __future__ import annotations

from typing import Any, Final

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.extensions import Extension

from broker.errors import CloseCode

TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA
FAIL: Final = -1
"""Not an opcode: the peer broke the protocol; the payload is ``(code, reason)``."""

Incoming = tuple[int, Any]
"""``(TEXT | BINARY | PING | PONG, bytes)`` or ``(CLOSE | FAIL, (code, reason))``.

TEXT is valid UTF-8. After CLOSE or FAIL nothing follows. A CLOSE without a
code carries 1005."""

_REPEATED = [int.from_bytes(b"\1\0\0\0" * words, "little") for words in range(257)]
"""``mask * _REPEATED[n]`` is the mask repeated n times, as one integer."""

_NO_STATUS = 1005


def unmask(payload: bytes, mask: bytes) -> bytes:
    """Exclusive-or ``payload`` with the repeated 4-byte ``mask`` (RFC 6455 section 5.3).

    Done on one big integer: 0.45 µs for 150 B, where wsproto's masker takes 1.2 µs.
    """
    size = len(payload)
    words = (size + 3) >> 2
    if words < len(_REPEATED):
        whole = int.from_bytes(mask, "little") * _REPEATED[words]
        return (int.from_bytes(payload, "little") ^ whole).to_bytes(words << 2, "little")[:size]
    key = int.from_bytes((mask * words)[:size], "little")
    return (int.from_bytes(payload, "little") ^ key).to_bytes(size, "little")


def encode_frame(opcode: int, payload: bytes, *, compressed: bool = False) -> bytes:
    """One whole, unmasked frame, as a server sends it."""
    first = 0x80 | opcode | (0x40 if compressed else 0)
    size = len(payload)
    if size < 126:
        return b"%c%c%b" % (first, size, payload)
    if size < 65536:
        return b"%c\x7e%b%b" % (first, size.to_bytes(2, "big"), payload)
    return b"%c\x7f%b%b" % (first, size.to_bytes(8, "big"), payload)


def encode_close(code: int, reason: str = "") -> bytes:
    """A close frame. ``reason`` is cut to what a control frame holds (123 bytes)."""
    if code == _NO_STATUS:
        return encode_frame(CLOSE, b"")
    text = reason.encode()[:123].decode(errors="ignore").encode()
    return encode_frame(CLOSE, code.to_bytes(2, "big") + text)


class FrameDecoder:
    """Takes the bytes of one connection apart.

    ``max_bytes`` bounds a message as it comes over the wire, ``max_fragments``
    the frames it may come in (0: any number), both told as 1009. ``inflate``
    makes the extension that reads compressed frames, where one was agreed.
    """

    __slots__ = (
        "_fragments",
        "_head",
        "_in_message",
        "_inflate",
        "_left",
        "_max_bytes",
        "_max_fragments",
        "_message",
        "_message_bytes",
        "_slow",
        "done",
    )

    def __init__(self, max_bytes: int, max_fragments: int, inflate: type[Extension] | Any = None) -> None:
        self._max_bytes = max_bytes
        self._max_fragments = max_fragments
        self._inflate = inflate
        self._slow: Connection | None = None
        self.done = False
        """A CLOSE or FAIL was returned; later bytes are ignored."""

    def feed(self, data: bytes) -> list[Incoming]:
        """Messages that ``data`` completes, in order. The caller answers pings and closes.

        Never raises: a violation is a FAIL with the close code to answer with.
        """
        incoming: list[Incoming] = []
        position = 0
        size = len(data)
        while position < size and not self.done:
            if self._slow is None:
                position = self._feed_fast(data, position, size, incoming)
                if position == size:
                    break
                self._enter_slow_lane()
            position = self._feed_slow(data, position, incoming)
        return incoming

    def _feed_fast(self, data: bytes, position: int, size: int, incoming: list[Incoming]) -> int:
        """Take whole simple frames; return where the first other one begins."""
        max_bytes = self._max_bytes
        while position + 6 <= size:
            first = data[position]
            length = data[position + 1] - 0x80  # negative: not masked, which wsproto will refuse
            if length < 0:
                return position
            start = position + 6
            if length > 125:
                if length == 127 or start + 2 > size or first > 0x82:
                    return position
                length = data[position + 2] << 8 | data[position + 3]
                start += 2
                if length < 126:
                    return position
            end = start + length
            if end > size or length > max_bytes:
                return position
            if first == 0x81:
                payload = unmask(data[start:end], data[start - 4 : start])
                if not payload.isascii() and not _is_utf8(payload):
                    self._fail(CloseCode.INVALID_DATA, "text that is not UTF-8", incoming)
                    return size
                incoming.append((TEXT, payload))
            elif first == 0x82:
                incoming.append((BINARY, unmask(data[start:end], data[start - 4 : start])))
            elif first in (0x89, 0x8A):
                incoming.append((first & 0x0F, unmask(data[start:end], data[start - 4 : start])))
            else:
                return position
            position = end
        return position

    # -- the slow lane ------------------------------------------------------

    def _enter_slow_lane(self) -> None:
        extensions = [self._inflate()] if self._inflate is not None else []
        self._slow = Connection(ConnectionType.SERVER, extensions)
        self._head = bytearray()  # header bytes of the current frame
        self._left = -1  # its payload bytes still to come; -1: header incomplete
        self._in_message = False
        self._message_bytes = 0
        self._fragments = 0
        # One buffer: wsproto makes a part of every piece the network cuts, and a
        # list of one-byte parts took 43 times the message (64 KiB: 2.8 MB).
        self._message = bytearray()

    def _feed_slow(self, data: bytes, position: int, incoming: list[Incoming]) -> int:
        """Feed wsproto up to the end of the current frame at most; return the new position."""
        slow = self._slow
        assert slow is not None
        if self._left < 0:
            end = position + _missing(self._head, data, position)
            piece = data[position:end]
            self._head += piece
            slow.receive_data(piece)
            self._left = _payload_length(self._head)
            # wsproto's verdict on a header comes before ours, so that the code does
            # not depend on how the bytes were cut. An empty last frame ends its
            # message right here, even one that is above the limits.
            ended: list[Incoming] = []
            self._collect(slow, ended)
            excess = self._excess() if self._left >= 0 and not self.done else ""
            if excess:
                self._fail(CloseCode.TOO_BIG, excess, incoming)
            else:
                incoming += ended
        else:
            end = min(len(data), position + self._left)
            self._left -= end - position
            slow.receive_data(data[position:end])
            self._collect(slow, incoming)
        if self._left == 0 and not self.done:
            self._end_frame()
        return end

    def _excess(self) -> str:
        """Hold the declared length and the number of frames against the limits; say what is above."""
        if self._head[0] & 0x08:
            return ""
        self._in_message = True
        self._message_bytes += self._left
        self._fragments += 1
        if self._message_bytes > self._max_bytes:
            return f"message above {self._max_bytes} bytes"
        if self._max_fragments and self._fragments > self._max_fragments:
            return f"message in more than {self._max_fragments} fragments"
        return ""

    def _end_frame(self) -> None:
        first = self._head[0]
        self._head.clear()
        self._left = -1
        if first & 0x08 == 0 and first & 0x80:
            self._in_message = False
        if not self._in_message:
            self._slow = None  # at a boundary wsproto holds no state that we need, and nor do we

    def _collect(self, slow: Connection, incoming: list[Incoming]) -> None:
        for event in slow.events():
            if isinstance(event, TextMessage):
                self._message += event.data.encode()
                if event.message_finished:
                    incoming.append((TEXT, self._take_message()))
            elif isinstance(event, BytesMessage):
                self._message += event.data
                if event.message_finished:
                    incoming.append((BINARY, self._take_message()))
            elif isinstance(event, Ping):
                incoming.append((PING, bytes(event.payload)))
            elif isinstance(event, Pong):
                incoming.append((PONG, bytes(event.payload)))
            elif isinstance(event, CloseConnection):
                if slow.state is ConnectionState.REMOTE_CLOSING:
                    incoming.append((CLOSE, (int(event.code), event.reason or "")))
                    self.done = True
                    self._slow = None
                else:
                    self._fail(CloseCode(int(event.code)), event.reason or "protocol error", incoming)
                return

    def _take_message(self) -> bytes:
        message = bytes(self._message)
        self._message.clear()  # an idle connection keeps no memory of it
        return message

    def _fail(self, code: CloseCode, reason: str, incoming: list[Incoming]) -> None:
        incoming.append((FAIL, (code, reason)))
        self.done = True
        self._slow = None


def _is_utf8(payload: bytes) -> bool:
    try:
        payload.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header_size(first_two: bytes | bytearray) -> int:
    length = first_two[1] & 0x7F
    extended = 2 if length == 126 else 8 if length == 127 else 0
    return 2 + extended + (4 if first_two[1] & 0x80 else 0)


def _missing(head: bytearray, data: bytes, position: int) -> int:
    """How many bytes from ``data[position:]`` the header can use: at most to its own end."""
    available = len(data) - position
    if len(head) < 2:
        if len(head) + available < 2:
            return available
        size = _header_size((head + data[position : position + 2])[:2])
    else:
        size = _header_size(head)
    return min(available, size - len(head))


def _payload_length(head: bytearray) -> int:
    """Declared length of a whole header, -1 while it is incomplete."""
    if len(head) < 2 or len(head) < _header_size(head):
        return -1
    length = head[1] & 0x7F
    if length == 126:
        return int.from_bytes(head[2:4], "big")
    if length == 127:
        return int.from_bytes(head[2:10], "big")
    return length
