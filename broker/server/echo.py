"""``/echo``: every message back as it came, through the same frames. For conformance tests."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any, Final

import trio

from broker.errors import CloseCode
from broker.hub.rooms import Verdict
from broker.protocol.codec import Codec
from broker.protocol.frames import CLOSE, FAIL, PING, PONG, FrameDecoder, encode_frame
from broker.protocol.inflate import BoundedInflate
from broker.server.connection import Connection
from broker.server.context import Context
from broker.server.wakeup import Wakeup

MESSAGE_BYTES: Final = 16 * 1024 * 1024
OUTBOX_BYTES: Final = 4 * MESSAGE_BYTES


class Echo:
    """The owner of one echoing connection."""

    def __init__(self, connection: Connection, context: Context) -> None:
        self._connection = connection
        self._encoder = context.encoder
        self._patience = context.config.server.write_timeout
        self._stalled_since = 0.0
        self._wakeup = Wakeup()
        self._over = False
        connection.owner = self
        connection.outbox_bytes = OUTBOX_BYTES
        connection.on_incoming = self._on_incoming
        connection.on_gone = self._end

    def _on_incoming(self, opcode: int, payload: Any) -> None:
        connection = self._connection
        if opcode in (CLOSE, FAIL):
            connection.close(*payload)
            self._end()
        elif opcode == PING and connection.outbox is None:  # who does not read gets no pongs either
            connection.push(encode_frame(PONG, payload))
        elif opcode not in (PING, PONG):
            frame = self._encoder.encode_echo(connection.codec, opcode, payload)
            if connection.write(frame) == Verdict.FULL:
                self.disconnect(CloseCode.SLOW_CONSUMER, "echoes are not read")

    def disconnect(self, code: CloseCode, reason: str) -> None:
        """End the connection."""
        self._connection.close(code, reason)
        self._end()

    def check_progress(self, now: float) -> None:
        """There is a backlog: end the connection if it has not moved for too long. Called every second."""
        connection = self._connection
        if connection.progress:
            connection.progress = False
            self._stalled_since = now
        elif now - self._stalled_since >= self._patience:
            self.disconnect(CloseCode.SLOW_CONSUMER, "queued bytes did not move")

    def direct_changed(self) -> None:
        """Nobody sends past an echo's connection."""

    def _end(self) -> None:
        self._over = True
        self._wakeup.set()

    async def run(self, close_timeout: float) -> None:
        """Echo until the connection ends."""
        while not self._over:
            await self._wakeup.wait()
        connection = self._connection
        with trio.move_on_after(close_timeout):
            while connection.outbox is not None and not connection.gone:
                connection.when_drained(self._wakeup.set)
                await self._wakeup.wait()
            if not connection.gone:
                connection.finish_writing()
            while not connection.gone:
                await self._wakeup.wait()


async def serve_echo(
    sock: socket.socket, context: Context, codec: Codec, response: bytes, rest: bytes
) -> None:
    """The life of an echoing connection."""
    inflate = partial(BoundedInflate, MESSAGE_BYTES) if codec.kind == "deflate" else None
    connection = Connection(sock, context.traffic, FrameDecoder(MESSAGE_BYTES, 0, inflate), codec)
    echo = Echo(connection, context)
    try:
        connection.write(response)
        connection.start(rest)
        await echo.run(context.config.server.close_timeout)
    finally:
        connection.stop()
