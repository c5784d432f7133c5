"""One connection to Redis after its handshake: bytes out, and replies in, in bulk.

redis-py opens the connection and authenticates. Then its asyncio transport gets
a new protocol, this one: whatever the kernel has is read at once into one large
buffer and handed to a hiredis reader, and the subclass drains that reader in
one loop. No asyncio task runs per read, and none per command (58 µs a message
read one by one with redis-py, below 3 µs so).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis
import trio

from broker.link.base import LinkDown, LinkError
from broker.link.counts import Counts
from broker.logs import get_logger

log = get_logger(__name__)

NOTHING: Final = object()
"""What the reader answers when no whole reply is left in it."""

READ_BYTES: Final = 256 * 1024
"""Taken from the kernel at once: what its default receive buffer holds and a little more."""

# One for all connections: a read is fed to its hiredis reader before anything else can run.
_buffer = bytearray(READ_BYTES)

# asyncio's TLS reads into slices of what it is given: those of a bytearray are copies, and what is read
# into them is lost (CPython 3.11).
_view = memoryview(_buffer)


class Connection(asyncio.BufferedProtocol):
    """A connection in use. Subclasses take replies in ``_received`` and clean up in ``_lost``."""

    def __init__(self, name: str, counts: Counts) -> None:
        self.name = name
        """What it is for, in logs."""
        self.gone = trio.Event()
        """Set when it is over; ``why`` says how it ended."""
        self.why: str | None = None
        self.reads = 0
        """Reads so far: whoever looks twice sees whether anything came in between."""
        self.full = False
        """Whether the kernel takes no more for now."""
        self._counts = counts
        self._writer: asyncio.StreamWriter | None = None
        # Error replies become instances of LinkError, also inside of arrays; only a
        # reply that is one at the top belongs to a command.
        reader = hiredis.Reader(replyError=LinkError, notEnoughData=NOTHING)
        self._gets = reader.gets
        # It takes any buffer, whatever its stub says.
        self._feed = cast("Callable[[bytearray, int, int], None]", reader.feed)

    def attach(self, writer: asyncio.StreamWriter) -> None:
        """Take over what redis-py opened. The writer is kept: it would close the transport when collected."""
        self._writer = writer
        writer.transport.set_protocol(self)

    def release(self) -> asyncio.StreamWriter:
        """Give the connection away, to ``attach`` it elsewhere; nothing may be under way."""
        writer = self._writer
        if writer is None:
            raise LinkDown(self.why or "never connected")
        self._writer = None
        self.why = "given away"
        self.gone.set()
        return writer

    def write(self, data: bytes) -> None:
        """Send bytes. The caller respects ``full``."""
        if self._writer is not None:
            self._writer.transport.write(data)

    def close(self, why: str) -> None:
        """Give it up; whoever waits for an answer on it is told at once."""
        writer = self._writer
        if writer is None:
            return
        self._writer = None
        self.why = why
        # Nothing worth flushing: who gives up a connection does not trust it. abort() also ends a TLS
        # connection whose other side is silent.
        writer.transport.abort()
        self._lost(why)
        self.gone.set()

    def _received(self, gets: Callable[[], Any]) -> None:
        """Take replies by ``gets()`` until it answers ``NOTHING``."""
        raise NotImplementedError

    def _lost(self, why: str) -> None:
        """The connection is over."""
        raise NotImplementedError

    # -- what asyncio calls ---------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: D102 - asyncio's interface
        return _view

    def buffer_updated(self, nbytes: int) -> None:  # noqa: D102
        if self._writer is None:
            return
        self.reads += 1
        try:
            self._feed(_buffer, 0, nbytes)
            self._received(self._gets)
        except hiredis.ProtocolError as error:
            self.close(f"this is not Redis's protocol: {error}")
        except Exception as error:
            # A callback that must not raise did. The replies behind it cannot be trusted to anybody.
            self._counts.callback_failures += 1
            log.exception("redis reply failed", connection=self.name)
            self.close(f"a reply could not be handled: {type(error).__name__}")

    def eof_received(self) -> None:  # noqa: D102
        self.close("closed by Redis")

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self.close("closed" if exc is None else str(exc) or type(exc).__name__)

    def pause_writing(self) -> None:  # noqa: D102
        self.full = True

    def resume_writing(self) -> None:  # noqa: D102
        self.full = False
