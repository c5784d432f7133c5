"""The bounds that Hypercorn lacks, around each connection of the operators' port.

Theory. Hypercorn trusts its clients more than a process full of other people's
sessions can afford. Found with version 0.18: a subprotocol header that is not
ASCII, or a byte sent right behind an upgrade request, raises out of its
connection handler and ends the whole server; it takes any number of
connections; it writes shielded from cancellation and without a deadline, so
that one client which does not read keeps a process from ending; a body that the
application does not want leaves its reader waiting for ever; and a connection
that its client has closed while idle is kept until its keep-alive time is over.

:class:`GuardedStream` stands between it and the socket. Every request must get
an answer within ``ANSWER_SECONDS`` of the last one, or the connection is cut,
whoever is to blame; every write has a deadline; unread input is bounded; an
answer that is given before the request was read still arrives. What is left,
an exception, is contained by the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

ANSWER_SECONDS: Final = 30.0
"""From one answer to the end of the next. Above the keep-alive time and every handler's deadline."""
WRITE_SECONDS: Final = 10.0
"""How long one write may take."""
REQUEST_BYTES: Final = 512 * 1024
"""Input read without an answer: head, the largest body, and what pipelining may add."""
LINGER_SECONDS: Final = 1.0
"""How long a closing connection reads on, so that the kernel's reset does not destroy our answer."""
LINGER_BYTES: Final = 4 * 1024 * 1024
_CHUNK: Final = 64 * 1024


class GuardedStream:
    """A client's stream, bounded.

    ``scope`` is the connection's; its deadline is moved here. ``on_end`` is
    called when the client has ended its half, to end what idly waits for more.
    """

    def __init__(
        self, stream: trio.SocketStream, scope: trio.CancelScope, on_end: Callable[[], Awaitable[None]]
    ) -> None:
        self._stream = stream
        self._scope = scope
        self._on_end = on_end
        self._unanswered = 0
        self._reading = False
        self._closing = trio.Event()
        self._drained = trio.Event()
        self.socket = stream.socket
        """Read by Hypercorn for the addresses of both ends."""
        scope.deadline = trio.current_time() + ANSWER_SECONDS

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes of the client; nothing more once it has sent too many without an answer."""
        if self._unanswered >= REQUEST_BYTES:
            await self._closing.wait()
        if self._closing.is_set():
            return b""
        self._reading = True
        try:
            data = await self._stream.receive_some(max_bytes)
            if self._closing.is_set():
                await self._discard()
                return b""
        finally:
            self._reading = False
            self._drained.set()
        self._unanswered += len(data)
        if not data:
            await self._on_end()
        return bytes(data)

    async def send_all(self, data: bytes) -> None:
        """Write within the deadline, whatever shields stand around."""
        with trio.move_on_after(WRITE_SECONDS) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            raise trio.BrokenResourceError("the client does not read")
        self._unanswered = 0
        self._scope.deadline = trio.current_time() + ANSWER_SECONDS

    async def send_eof(self) -> None:
        """Say that nothing more comes."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close once the client has read what was sent, or soon."""
        if not self._closing.is_set():
            self._closing.set()
            with trio.move_on_after(LINGER_SECONDS):
                await self._end_writing()
                if self._reading:
                    self._drained = trio.Event()
                    await self._drained.wait()
                else:
                    await self._discard()
        await self._stream.aclose()

    def abort(self) -> None:
        """Close at once; whoever waits on the socket wakes with an error."""
        self.socket.close()

    async def _end_writing(self) -> None:
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass

    async def _discard(self) -> None:
        """Read and forget until the client ends its half, too."""
        left = LINGER_BYTES
        try:
            while left > 0 and (data := await self._stream.receive_some(_CHUNK)):
                left -= len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
