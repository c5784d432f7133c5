"""From a frame to messages and back. No IO.

A frame from the broker is a JSON array, plain or as one zstd frame. The limits
here protect the client from a broker, or whoever poses as one, as the broker's
protect it from clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import zstandard

JSON_PROTOCOL = "broker.v1.json"
ZSTD_PROTOCOL = "broker.v1.zstd"

WINDOW_LIMIT = 8 * 1024 * 1024
"""Largest zstd window accepted (bytes); RFC 8878 section 3.1.1.1.2 recommends decoders to support 8 MiB."""


class WireError(Exception):
    """The frame is not what the protocol says; the connection cannot go on."""


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as JSON. Raises :class:`TypeError` for what JSON cannot say."""
    return orjson.dumps(message)


def join(messages: list[bytes]) -> str:
    """Encoded messages as the text of one frame."""
    body = messages[0] if len(messages) == 1 else b"[%b]" % b",".join(messages)
    return body.decode()


class Decoder:
    """Turns frames into messages; knows the dictionaries of one connection.

    ``limit``: largest decompressed frame (bytes).
    """

    __slots__ = ("_by_dictionary", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_dictionary = {0: zstandard.ZstdDecompressor(max_window_size=WINDOW_LIMIT)}

    def add_dictionary(self, content: bytes, expected_id: int) -> None:
        """Use a dictionary for frames that name it. Raises :class:`WireError` if it is not that one."""
        dictionary = zstandard.ZstdCompressionDict(content)
        if dictionary.dict_id() != expected_id:
            raise WireError(f"dictionary {expected_id} calls itself {dictionary.dict_id()}")
        self._by_dictionary[expected_id] = zstandard.ZstdDecompressor(
            dict_data=dictionary, max_window_size=WINDOW_LIMIT
        )

    def decode(self, frame: str | bytes) -> list[dict[str, Any]]:
        """The messages of one frame. Raises :class:`WireError`."""
        try:
            messages = orjson.loads(frame if isinstance(frame, str) else self._inflate(frame))
        except orjson.JSONDecodeError as error:
            raise WireError(f"not JSON: {error}") from None
        if not isinstance(messages, list):
            raise WireError("a frame must hold an array of messages")
        for message in messages:
            if not isinstance(message, dict):
                raise WireError("a message must be an object")
        return messages

    def _inflate(self, frame: bytes) -> bytes:
        try:
            # zstandard ignores max_output_size when the frame states its content
            # size (2 kB became 64 MiB with 0.25), so the header is read first.
            size = zstandard.frame_content_size(frame)
            if not 0 <= size <= self._limit:
                raise WireError("content size unknown" if size < 0 else f"{size} bytes in one frame")
            dictionary = zstandard.get_frame_parameters(frame).dict_id
            decompressor = self._by_dictionary.get(dictionary)
            if decompressor is None:
                raise WireError(f"compressed with dictionary {dictionary}, which was not loaded")
            return decompressor.decompress(frame, max_output_size=self._limit, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError(f"not one zstd frame: {error}") from None
