"""Fetching zstd dictionaries: small, immutable files that the broker serves next to the WebSocket.

With h11 over the client's own kind of stream rather than with an HTTP library,
so that whatever leads to the broker (TLS settings, a proxy, a Unix socket)
leads to its dictionaries too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import h11
import trio

from broker.client.messages import Dictionary

SIZE_LIMIT = 1024 * 1024
"""Largest dictionary accepted (bytes). ``train-dict`` makes 16 KiB; zstd's own default is 110 KiB."""


class DictionaryError(Exception):
    """The dictionary could not be had; the session goes on without it."""


def wanted(dictionary: Dictionary, rooms: Iterable[str]) -> bool:
    """Whether any of ``rooms`` fits the pattern that the dictionary is for (``*`` stands for anything)."""
    fits = re.compile(re.escape(dictionary.rooms).replace(r"\*", ".*"), re.DOTALL).fullmatch
    return any(fits(room) for room in rooms)


async def fetch(stream: trio.abc.Stream, host: str, dictionary: Dictionary) -> bytes:
    """The verified content. ``host`` is the ``Host`` header.

    Raises :class:`DictionaryError`, also for an address on another host: what a
    broker says must not make the client connect elsewhere.
    """
    if not dictionary.url.startswith("/") or dictionary.url.startswith("//"):
        raise DictionaryError(f"{dictionary.url!r} is not a path on the broker")
    try:
        content = await _get(stream, host, dictionary.url)
    except (h11.ProtocolError, trio.BrokenResourceError) as error:
        raise DictionaryError(f"{dictionary.url}: {error}") from error
    if hashlib.sha256(content).hexdigest() != dictionary.sha256.lower():
        raise DictionaryError(f"{dictionary.url}: not the content that was announced")
    return content


async def _get(stream: trio.abc.Stream, host: str, path: str) -> bytes:
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="GET", target=path, headers=[("Host", host), ("Connection", "close")])
    await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    content = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                raise DictionaryError(f"{path}: HTTP {event.status_code}")
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > SIZE_LIMIT:
                raise DictionaryError(f"{path}: larger than {SIZE_LIMIT} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(content)
