"""One connection, from the upgrade to its end: the shell around trio-websocket.

Requests and replies by id, and one writer. trio-websocket's peculiarities stop
here. :class:`Link` knows nothing of rooms; :mod:`broker.client.session` does.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import msgspec
import trio
import trio_websocket
import wsproto.utilities

from broker.client import wire
from broker.client.errors import ConnectFailed, ConnectionLost, RequestError
from broker.client.messages import Refusal

ABNORMAL = 1006
"""Close code for an end without a close frame (RFC 6455 section 7.4.1); never on the wire."""

RECEIVE_BYTES = 64 * 1024
"""Read from the socket at once; trio-websocket's 4 KiB would cut every batch in pieces."""

QUEUE = 64
"""Requests waiting for the socket; further ones wait before they get in line, and can be cancelled there."""

FOREIGN = (
    trio_websocket.ConnectionClosed,
    trio_websocket.HandshakeError,
    wsproto.utilities.ProtocolError,
    h11.ProtocolError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
)
"""What the libraries below raise when a connection breaks, some of it in trio-websocket's reader task."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL points to. ``secure`` is the TLS context of ``wss``."""

    host: str
    port: int
    resource: str
    secure: ssl.SSLContext | None

    @classmethod
    def parse(cls, url: str, context: ssl.SSLContext | None) -> Target:
        """Take a ``ws`` or ``wss`` URL apart. Raises :class:`ValueError`."""
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"{url!r} is not a ws:// or wss:// URL")
        secure = (context or ssl.create_default_context()) if parts.scheme == "wss" else None
        resource = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, parts.port or (443 if secure else 80), resource, secure)

    @property
    def authority(self) -> str:
        """The ``Host`` header (RFC 9110 section 7.2: without the port where it is the scheme's own)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    async def open(self) -> trio.abc.Stream:
        """Connect. Raises :class:`OSError`; TLS errors come with the first bytes."""
        if self.secure is None:
            return await trio.open_tcp_stream(self.host, self.port)
        return await trio.open_ssl_over_tcp_stream(
            self.host, self.port, ssl_context=self.secure, https_compatible=True
        )


class _Watched(trio.abc.Stream):
    """Tells when the peer hangs up.

    trio-websocket (0.12) waits for the upgrade for ever when the connection
    ends during it, which is just what happens while a broker restarts.
    """

    def __init__(self, stream: trio.abc.Stream, on_end: Callable[[], None]) -> None:
        self._stream = stream
        self._on_end = on_end
        self.cause = "it hung up"

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(max_bytes)
        except trio.BrokenResourceError as error:
            self.cause = str(error.__cause__ or error)
            self._on_end()
            raise
        if not data:
            self._on_end()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            self.cause = str(error.__cause__ or error)
            self._on_end()
            raise

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def upgrade(
    nursery: trio.Nursery,
    stream: trio.abc.Stream,
    target: Target,
    *,
    protocols: Iterable[str],
    headers: list[tuple[bytes, bytes]],
    max_frame: int,
) -> trio_websocket.WebSocketConnection:
    """Make ``stream`` a WebSocket; its reader runs in ``nursery``.

    Raises :class:`ConnectFailed` when the peer hangs up. A refusal by HTTP
    comes out of the nursery as :class:`trio_websocket.ConnectionRejected`.
    """
    with trio.CancelScope() as scope:
        watched = _Watched(stream, scope.cancel)
        return await trio_websocket.wrap_client_stream(
            nursery,
            watched,  # type: ignore[arg-type]  # annotated as a socket, used as any stream
            target.authority,
            target.resource,
            subprotocols=list(protocols),
            extra_headers=headers,
            max_message_size=max_frame,
            receive_buffer_size=RECEIVE_BYTES,
        )
    raise ConnectFailed(f"{target.authority} did not answer the upgrade: {watched.cause}")


class _Pending:
    """A request on its way."""

    __slots__ = ("done", "error", "on_ok", "reply")

    def __init__(self, on_ok: Callable[[dict[str, Any]], None] | None) -> None:
        self.done = trio.Event()
        self.on_ok = on_ok
        self.reply: dict[str, Any] = {}
        self.error: ConnectionLost | RequestError | None = None


class Link:
    """One open connection.

    Start :meth:`write` in a nursery, and take the broker's messages from
    :meth:`receive`; give replies to :meth:`settle`. ``max_message`` (bytes) and
    ``max_batch`` are the broker's, from its welcome.
    """

    def __init__(
        self,
        websocket: trio_websocket.WebSocketConnection,
        decoder: wire.Decoder,
        on_request: Callable[[], None],
    ) -> None:
        self.decoder = decoder
        self.max_message = 64 * 1024
        self.max_batch = 1
        self.frames = 0
        self.received_bytes = 0
        self._websocket = websocket
        self._on_request = on_request
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._lost: str | None = None
        self._closing: trio.Event | None = None
        self._outgoing, self._outbox = trio.open_memory_channel[bytes](QUEUE)

    @property
    def compressed(self) -> bool:
        """Whether the broker chose zstd."""
        return self._websocket.subprotocol == wire.ZSTD_PROTOCOL

    @property
    def awaiting(self) -> bool:
        """Whether anybody waits for a reply."""
        return bool(self._pending)

    @property
    def close_code(self) -> tuple[int, str]:
        """Code and reason of the close, once :meth:`receive` raised."""
        closed = self._websocket.closed
        return (ABNORMAL, "") if closed is None else (closed.code, closed.reason or "")

    async def receive(self) -> list[dict[str, Any]]:
        """The messages of the next frame.

        Raises :class:`ConnectionLost` at the end, :class:`wire.WireError` for nonsense.
        """
        try:
            frame = await self._websocket.get_message()
        except trio_websocket.ConnectionClosed:
            if self._closing is not None:
                # Raised as soon as we began to close. The closing handshake needs
                # the nursery, which ends with our caller.
                await self._closing.wait()
            raise ConnectionLost("the connection ended") from None
        self.frames += 1
        self.received_bytes += len(frame)
        return self.decoder.decode(frame)

    async def request(
        self, op: str, fields: dict[str, Any], on_ok: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Send a message and wait for its reply.

        ``on_ok`` is called with it by the reader, before it looks at the next
        message. A ``call`` that is given up is cancelled at the broker too.
        Raises :class:`RequestError`, :class:`ConnectionLost`.
        """
        if self._lost is not None:
            raise ConnectionLost(self._lost)
        self._last_id = identity = self._last_id + 1
        message = wire.encode({"op": op, "id": identity, **fields})
        if len(message) > self.max_message:
            # The broker would end the connection with 1009.
            raise RequestError("too_large", f"{len(message)} bytes where {self.max_message} are allowed")
        pending = self._pending[identity] = _Pending(on_ok)
        self._on_request()
        try:
            await self._outgoing.send(message)
            await pending.done.wait()
        except trio.BrokenResourceError:
            raise ConnectionLost("the connection ended before the request was sent") from None
        finally:
            given_up = self._pending.pop(identity, None) is not None
            if given_up and op == "call":
                self.send_nowait({"op": "cancel", "call": identity})
        if pending.error is not None:
            raise pending.error
        return pending.reply

    def settle(self, message: dict[str, Any]) -> bool:
        """Give a reply to whoever waits for it; ``False`` if nobody does (any more)."""
        identity = message.get("id")
        if not isinstance(identity, int) or identity not in self._pending:
            return False
        pending = self._pending[identity]
        if message["op"] == "ok":
            pending.reply = message
            if pending.on_ok is not None:
                pending.on_ok(message)
        else:
            refusal = msgspec.convert(message, Refusal)
            pending.error = RequestError(
                refusal.code,
                refusal.message,
                retry=refusal.retry,
                retry_after=refusal.retry_after,
                room=refusal.room,
            )
        # Last: had the reply been malformed, the request would fail with the link.
        del self._pending[identity]
        pending.done.set()
        return True

    def fail(self, why: str) -> None:
        """The connection is gone: so are all requests on it."""
        self._lost = why
        pending, self._pending = self._pending, {}
        for request in pending.values():
            request.error = ConnectionLost(why)
            request.done.set()

    async def write(self) -> None:
        """Send requests until the connection ends; those that gathered go in one frame.

        The one task that writes messages, because a cancelled ``send_all``
        leaves a torn frame, and requests may be cancelled at any time.
        """
        held: bytes | None = None
        with self._outbox:
            while True:
                messages = [held if held is not None else await self._outbox.receive()]
                held = self._gather(messages)
                try:
                    await self._websocket.send_message(wire.join(messages))
                except trio_websocket.ConnectionClosed:
                    return

    def _gather(self, messages: list[bytes]) -> bytes | None:
        """Add to ``messages`` what waits and fits into a frame; returns the first that did not fit."""
        size = len(messages[0]) + 2  # the brackets
        while len(messages) < self.max_batch:
            try:
                message = self._outbox.receive_nowait()
            except trio.WouldBlock:
                return None
            size += len(message) + 1  # the comma
            if size > self.max_message:
                return message
            messages.append(message)
        return None

    def send_nowait(self, message: dict[str, Any]) -> None:
        """Send a message that wants no reply, if there is room for it."""
        try:
            self._outgoing.send_nowait(wire.encode(message))
        except (trio.WouldBlock, trio.BrokenResourceError):
            pass  # a courtesy: the broker ends calls and memberships with the session anyway

    async def ping(self, on_pong: Callable[[], None]) -> None:
        """Ping the broker, and call ``on_pong`` when it answers."""
        try:
            await self._websocket.ping()
        except trio_websocket.ConnectionClosed:
            return  # the reader sees it too
        on_pong()

    async def close(self, code: int = 1000, reason: str = "", *, grace: float) -> None:
        """Close with a handshake of at most ``grace`` seconds."""
        self._closing = trio.Event()
        try:
            with trio.move_on_after(grace):
                await self._websocket.aclose(code, reason)
        finally:
            self._closing.set()
