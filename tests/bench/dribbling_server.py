"""A server of one connection that says what it is told, cut into pieces, and keeps what it hears."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType

UPGRADED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def frame(payload: bytes, head: int = 0x81) -> bytes:
    """A server's frame; ``head`` is its first byte (default: a whole text)."""
    if len(payload) < 126:
        return bytes([head, len(payload)]) + payload
    if len(payload) < 65536:
        return struct.pack("!BBH", head, 126, len(payload)) + payload
    return struct.pack("!BBQ", head, 127, len(payload)) + payload


class DribblingServer:
    """Answers the upgrade, then sends ``pieces`` one by one; ``heard`` are the client's frames, unmasked.

    Ends when the client closes.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.port: int = self._listener.getsockname()[1]
        self.heard: list[tuple[int, bytes]] = []
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> DribblingServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(30)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(30)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            said = b""
            while b"\r\n\r\n" not in said:
                said += connection.recv(4096)
            for piece in self._pieces:
                connection.sendall(piece)
            said = said.partition(b"\r\n\r\n")[2]
            while more := connection.recv(4096):
                said += more
        self._hear(said)

    def _hear(self, said: bytes) -> None:
        while said:
            length = said[1] & 0x7F
            assert said[1] & 0x80, "a client masks"
            assert length < 126, "only short frames are understood here"
            mask, payload = said[2:6], said[6 : 6 + length]
            self.heard.append((said[0], bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))))
            said = said[6 + length :]
