"""Bounded decompression of what clients send. No IO.

A few kilobytes can stand for gigabytes, so nothing here ever produces more than
the limit and one byte, whatever the input claims, and whether it comes whole,
in fragments, or byte by byte. Two forms exist: a binary message of
``broker.v1.zstd`` (:class:`ZstdReader`) and permessage-deflate
(:class:`BoundedInflate`, RFC 7692), which wsproto calls frame by frame.

Both tell the same two verdicts about content. *Too big* (close 1009): what the
peer sent may be sound, but stands for more than we take. *Invalid* (close
1007): it is not what was agreed upon.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import zstandard
from wsproto.extensions import Extension
from wsproto.frame_protocol import CloseReason, FrameDecoder, FrameProtocol, Opcode, RsvBits

from broker.errors import CloseCode

__all__ = ["BoundedInflate", "InflateError", "ZstdReader"]

DictionaryLookup = Callable[[int], zstandard.ZstdCompressionDict | None]
"""From a Dictionary_ID to the dictionary, or ``None`` for a foreign one."""

MAX_WINDOW_BYTES: Final = 8 * 1024 * 1024
"""Largest zstd window: what RFC 8878 section 3.1.1.1.2 asks every decoder to support."""
MAX_STREAMS: Final = 64
"""Deflate streams within one message. One per fragment is the most that a sane client makes; a
hostile one ends a stream every two bytes, and each costs a new inflater."""


class InflateError(Exception):
    """A message that cannot be, or will not be, decompressed.

    ``reason`` is for the close frame and the log; the connection has to end
    with :attr:`close_code`.
    """

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.too_large = too_large

    @property
    def close_code(self) -> CloseCode:
        """1009 for what is too large, 1007 for everything else."""
        return CloseCode.TOO_BIG if self.too_large else CloseCode.INVALID_DATA


# -- zstd ---------------------------------------------------------------------

_EMPTY_BODIES: Final = {False: b"\x01\x00\x00", True: b"\x01\x00\x00\x99\xe9\xd8\x51"}
"""What follows the header of an empty frame, without and with checksum: one last raw block of no bytes."""


class ZstdReader:
    """Reads binary messages of ``broker.v1.zstd``: one zstd frame each, of stated size.

    Holds no state between messages, so one reader serves every session of a
    thread (a decompression context takes about 95 kB). ``max_bytes`` bounds
    the content. ``dictionaries`` finds dictionaries by id; they must not change.
    """

    __slots__ = ("_by_dictionary", "_dictionaries", "_max_bytes", "_plain")

    def __init__(self, max_bytes: int, dictionaries: DictionaryLookup) -> None:
        self._max_bytes = max_bytes
        self._dictionaries = dictionaries
        self._plain = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._by_dictionary: dict[int, zstandard.ZstdDecompressor] = {}

    def decompress(self, frame: bytes) -> bytes:
        """The content of one frame, at most ``max_bytes``.

        Raises :class:`InflateError`: *too large* for the stated content size or
        the window, else *invalid* (not a zstd frame, a skippable one, size not
        stated, unknown dictionary, truncated, corrupt, wrong checksum, or
        anything after the frame).
        """
        # The header first: with a stated size python-zstandard allocates that
        # much and ignores max_output_size (0.25: 2 kB became 64 MiB).
        if not frame.startswith(zstandard.FRAME_HEADER):
            raise InflateError("not a zstd frame")  # among them skippable frames, which carry no content
        try:
            header = zstandard.get_frame_parameters(frame)
        except zstandard.ZstdError:
            raise InflateError("zstd frame header is broken") from None
        size = header.content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise InflateError("zstd frame does not state its content size")
        if size > self._max_bytes:
            raise InflateError(f"zstd content above {self._max_bytes} bytes", too_large=True)
        if header.window_size > MAX_WINDOW_BYTES:
            raise InflateError(f"zstd window above {MAX_WINDOW_BYTES} bytes", too_large=True)
        if size == 0:
            # For these python-zstandard returns at once, without a look at the rest.
            if frame[zstandard.frame_header_size(frame) :] != _EMPTY_BODIES[header.has_checksum]:
                raise InflateError("zstd frame is corrupt")
            return b""
        decompressor = self._decompressor(header.dict_id)
        try:
            return decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise InflateError(f"zstd frame is corrupt: {error}") from None

    def _decompressor(self, dictionary_id: int) -> zstandard.ZstdDecompressor:
        if not dictionary_id:
            return self._plain
        found = self._by_dictionary.get(dictionary_id)
        if found is None:
            dictionary = self._dictionaries(dictionary_id)
            if dictionary is None:
                raise InflateError(f"unknown zstd dictionary {dictionary_id}")
            found = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=MAX_WINDOW_BYTES)
            self._by_dictionary[dictionary_id] = found
        return found


# -- permessage-deflate ---------------------------------------------------------

_SYNC_TAIL: Final = b"\x00\x00\xff\xff"
"""The end of a sync flush, which the sender cuts off (RFC 7692 section 7.2.1)."""
_FINAL_BLOCK: Final = b"\x03\x00"
"""An empty last block: fed after the tail, it ends the stream if and only if a block was due there."""


class BoundedInflate(Extension):
    """The receiving half of permessage-deflate, for one connection of a server.

    For a connection whose handshake was answered with both
    ``no_context_takeover`` parameters (negotiation is the handshake's part; an
    instance is always enabled, and never offers or accepts). ``max_bytes``
    bounds one message after inflating, over all of its fragments. Messages
    without RSV1 pass through untouched, and so does everything outbound.

    A verdict is returned to wsproto as ``MESSAGE_TOO_BIG``,
    ``INVALID_FRAME_PAYLOAD_DATA`` or ``PROTOCOL_ERROR``; after it the
    connection ends and no further call is made.
    """

    name = "permessage-deflate"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._header = (Opcode.CLOSE, False)  # opcode and RSV1 of the current frame
        self._begun = True  # a payload, perhaps an empty one, has followed that header
        self._in_message = False  # between the first frame of a data message and the end of its last
        self._inflater: _Inflater | None = None  # of the current message, if that is compressed

    def enabled(self) -> bool:
        """Always: it is only made where the handshake agreed on it."""
        return True

    def offer(self) -> bool:
        """Nothing: only clients offer."""
        return False

    def frame_inbound_header(
        self,
        proto: FrameDecoder | FrameProtocol,
        opcode: Opcode,
        rsv: RsvBits,
        payload_length: int,
    ) -> CloseReason | RsvBits:
        """Check a header; RSV1 is allowed on the first frame of a data message only (RFC 7692 section 6).

        wsproto (1.3) repeats this call when the header was there but its
        masking key was not, so it must not move on by itself: the frame begins
        with its payload, which wsproto hands over even when it is empty.
        """
        if not opcode.iscontrol() and (opcode is Opcode.CONTINUATION) is not self._in_message:
            # wsproto would say so as well, but only after we had inflated the frame.
            return CloseReason.PROTOCOL_ERROR
        if rsv.rsv1 and (opcode.iscontrol() or opcode is Opcode.CONTINUATION):
            return CloseReason.PROTOCOL_ERROR
        self._header = (opcode, rsv.rsv1)
        self._begun = False
        return RsvBits(rsv.rsv1, False, False)

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        """Inflate the next bytes of the current frame."""
        opcode, compressed = self._header
        if not self._begun:
            self._begun = True
            if opcode in (Opcode.TEXT, Opcode.BINARY):
                self._in_message = True
                self._inflater = _Inflater(self._max_bytes) if compressed else None
        if opcode.iscontrol() or self._inflater is None:
            return data
        try:
            return self._inflater.feed(data)
        except InflateError as error:
            return _verdict(error)

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        """End a frame; with the last one of a message comes what the inflater still held."""
        if self._header[0].iscontrol() or not fin:
            return None
        inflater, self._inflater = self._inflater, None
        self._in_message = False
        if inflater is None:
            return None
        try:
            return inflater.finish()
        except InflateError as error:
            return _verdict(error)


def _verdict(error: InflateError) -> CloseReason:
    return CloseReason.MESSAGE_TOO_BIG if error.too_large else CloseReason.INVALID_FRAME_PAYLOAD_DATA


class _Inflater:
    """One compressed message."""

    __slots__ = ("_left", "_max_bytes", "_started", "_streams", "_zlib")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._streams = 1
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)  # reads every smaller window too
        self._started = False  # the current stream has been given a byte

    def feed(self, data: bytes) -> bytes:
        """The next part of the message. Raises :class:`InflateError`."""
        if not data:
            return b""
        parts = [self._inflate(data)]
        # A block marked as final ends a zlib stream, but not the message: it
        # goes on with another block (RFC 7692 section 7.2.3.5).
        while self._zlib.eof:
            rest = self._zlib.unused_data
            self._streams += 1
            if self._streams > MAX_STREAMS:
                raise InflateError(f"more than {MAX_STREAMS} deflate streams in one message")
            self._zlib = zlib.decompressobj(-zlib.MAX_WBITS)
            self._started = False
            if not rest:
                break
            parts.append(self._inflate(rest))
        return b"".join(parts)

    def finish(self) -> bytes:
        """The last part. Raises :class:`InflateError`, also if the message was cut short."""
        if not self._started:
            # No byte at all, or none after a final block: senders that emit
            # this lack the one empty block that the RFC asks for, and are read
            # by every other implementation.
            return b""
        part = self._inflate(_SYNC_TAIL + _FINAL_BLOCK)
        if not self._zlib.eof or self._zlib.unused_data:
            raise InflateError("deflate data is truncated")
        return part

    def _inflate(self, data: bytes) -> bytes:
        self._started = True
        try:
            # One byte above the limit tells "too big" from "exactly full". Any
            # output shorter than asked for also means that all input was used.
            part = self._zlib.decompress(data, self._left + 1)
        except zlib.error as error:
            raise InflateError(f"deflate data is corrupt: {error}") from None
        self._left -= len(part)
        if self._left < 0:
            raise InflateError(f"message above {self._max_bytes} bytes after inflating", too_large=True)
        return part
