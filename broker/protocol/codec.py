"""From a JSON batch to the frame that a session's codec wants. No IO.

A frame is encoded at most once for each (codec, dictionary) among those it is
meant for, and the same bytes object goes to every socket. What the codecs cost
and save: ``docs/wire.md``.
"""

from __future__ import annotations

import zlib
from typing import Final, Literal, NamedTuple

import zstandard

from broker.config import Wire
from broker.protocol.dictionaries import Dictionaries
from broker.protocol.frames import BINARY, TEXT, encode_frame


class Codec(NamedTuple):
    """How one session wants its frames; ``dictionary`` is 0 for none."""

    kind: Literal["json", "deflate", "zstd"]
    dictionary: int = 0


JSON: Final = Codec("json")
DEFLATE: Final = Codec("deflate")
ZSTD: Final = Codec("zstd")

_DEFLATE_TAIL = b"\x00\x00\xff\xff"
"""What a sync flush ends with and RFC 7692 section 7.2.1 cuts off."""


class Encoder:
    """Encodes payloads (JSON arrays) into frames."""

    def __init__(self, wire: Wire, dictionaries: Dictionaries) -> None:
        self._wire = wire
        self._dictionaries = dictionaries
        self._plain = zstandard.ZstdCompressor(
            level=wire.zstd_level, write_content_size=True, write_checksum=False
        )
        self._with_dictionary: dict[int, zstandard.ZstdCompressor] = {}
        self.raw_bytes = 0
        """Bytes of JSON that went in."""
        self.encoded_bytes = 0
        """Bytes of frames that came out (once each, however many sessions got them)."""

    def encode(self, codec: Codec, payload: bytes) -> bytes:
        """One whole frame that carries ``payload``."""
        if codec.kind == "json":
            frame = encode_frame(TEXT, payload)
        elif codec.kind == "zstd":
            frame = encode_frame(BINARY, self._compressor(codec, payload).compress(payload))
        else:
            frame = self._deflate(TEXT, payload)
        self.raw_bytes += len(payload)
        self.encoded_bytes += len(frame)
        return frame

    def _compressor(self, codec: Codec, payload: bytes) -> zstandard.ZstdCompressor:
        if not codec.dictionary or len(payload) > self._wire.dictionary_max_bytes:
            return self._plain
        compressor = self._with_dictionary.get(codec.dictionary)
        if compressor is None:
            dictionary = self._dictionaries.get(codec.dictionary)
            assert dictionary is not None, "a loaded dictionary stays"
            compressor = zstandard.ZstdCompressor(
                level=self._wire.zstd_level,
                dict_data=dictionary.compression,
                write_content_size=True,
                write_checksum=False,
                write_dict_id=True,
            )
            self._with_dictionary[codec.dictionary] = compressor
        return compressor

    def encode_echo(self, codec: Codec, opcode: int, payload: bytes) -> bytes:
        """A frame that carries ``payload`` back as the kind of message it came in."""
        return self._deflate(opcode, payload) if codec.kind == "deflate" else encode_frame(opcode, payload)

    def _deflate(self, opcode: int, payload: bytes) -> bytes:
        # Both sides agreed to no_context_takeover, so each message stands alone
        # and may be shared between sessions, or left as it is.
        if len(payload) < self._wire.deflate_min_bytes:
            return encode_frame(opcode, payload)
        deflate = zlib.compressobj(self._wire.deflate_level, zlib.DEFLATED, -15)
        squeezed = deflate.compress(payload) + deflate.flush(zlib.Z_SYNC_FLUSH)
        return encode_frame(opcode, squeezed.removesuffix(_DEFLATE_TAIL), compressed=True)
