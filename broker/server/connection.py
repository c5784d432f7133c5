"""One socket after the handshake: bytes in, frames out.

What the outside hands over goes straight to the socket while it takes it; the
rest waits in an outbox that exists only while there is a backlog. Messages to
this one client are posted and leave together as one frame at the end of the
round. See ``docs/slow-consumers.md`` for what happens at the limits.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

from broker.errors import CloseCode
from broker.hub.rooms import Verdict
from broker.protocol.codec import Codec, Encoder
from broker.protocol.frames import FrameDecoder, encode_close
from broker.protocol.messages import batch
from broker.protocol.outbox import Outbox
from broker.server.pump import READ, WRITE, Pump

READ_BYTES: Final = 16 * 1024
"""Read at once. Larger buffers cost more to make than they save for small messages."""
FLUSHES: Final = 8
"""Sends in one go when a backlog drains, so that one fast reader does not hold the pump."""


class Traffic:
    """What all connections of a node share: the encoder, limits, and counters."""

    def __init__(
        self,
        pump: Pump,
        encoder: Encoder,
        posted: Callable[..., None],
        *,
        outbox_bytes: int,
        process_outbox_bytes: int,
    ) -> None:
        self.pump = pump
        self.encoder = encoder
        self.posted = posted
        """Called with a connection's owner, and ``after_events``, when it has posts to flush."""
        self.outbox_bytes = outbox_bytes
        self.process_outbox_bytes = process_outbox_bytes or 2**63
        self.queued = 0
        """Bytes in all outboxes now."""
        self.behind: dict[Connection, None] = {}
        """Connections with an outbox."""
        self.backlogs = 0
        """Times a socket did not take a frame at once."""
        self.refused = 0
        """Frames not taken because an outbox was full."""
        self.bytes_read = 0


class Connection:
    """The wire side of a session.

    ``on_incoming(opcode, payload)`` is called for every message that comes in,
    ``on_gone()`` once when the connection ends without our doing, ``owner`` is
    whom the fan-out flushes. All three are set before :meth:`start`.
    """

    __slots__ = (
        "_plain",
        "_posts",
        "_posts_after",
        "_posts_sealed",
        "_traffic",
        "_want_drained",
        "clear",
        "closing",
        "codec",
        "decoder",
        "fileno",
        "gone",
        "heard",
        "interest",
        "on_gone",
        "on_incoming",
        "outbox",
        "outbox_bytes",
        "owner",
        "progress",
        "sock",
    )

    def __init__(self, sock: socket.socket, traffic: Traffic, decoder: FrameDecoder, codec: Codec) -> None:
        self.sock = sock
        self.fileno = sock.fileno()
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._traffic = traffic
        self.decoder = decoder
        self.codec = codec
        self.outbox: Outbox | None = None
        self.outbox_bytes = traffic.outbox_bytes
        self._posts: list[bytes] | None = None
        self._posts_after: list[bytes] | None = None
        self._posts_sealed: list[bytes] | None = None
        self._want_drained: Callable[[], None] | None = None
        self.clear = True
        """Nothing is queued, nothing ends: a frame may go straight to the socket."""
        self.closing = False
        """Our close frame is on its way; nothing may follow it."""
        self.gone = False
        """The peer is gone or the socket broken; writes are ignored."""
        self.heard = True
        """Bytes came since somebody last set this to false."""
        self.progress = True
        """The backlog moved since somebody last set this to false."""
        self.interest = 0
        self.on_incoming: Callable[[int, Any], None] = _nobody
        self.on_gone: Callable[[], None] = _nobody
        self.owner: Any = None

    def start(self, received: bytes = b"") -> None:
        """Let the pump drive this connection. What could not be sent before waits until now.

        ``received`` are bytes that came already.
        """
        self.interest |= READ
        if not self.gone:
            self._traffic.pump.add(self.fileno, self, self.interest)
        if received:
            self.receive(received)
        if not self._plain:
            self._read_pending(cast("ssl.SSLSocket", self.sock))

    @property
    def started(self) -> bool:
        """Whether the pump drives this connection."""
        return self.fileno in self._traffic.pump

    def stop(self) -> None:
        """Leave the pump and close the socket. Safe to call twice."""
        self._traffic.pump.remove(self.fileno)
        self.gone = True
        self.clear = False
        self._forget_backlog()
        self.sock.close()
        # Owner and connection hold each other: part them, so that nothing waits for the collector.
        self.owner = None
        self.on_incoming = self.on_gone = _nobody
        self._want_drained = None

    # -- out --------------------------------------------------------------------

    @property
    def direct(self) -> socket.socket | None:
        """The socket, while whole frames may be sent to it directly."""
        return self.sock if self.clear and self._plain else None

    def write(self, frame: bytes) -> int:
        """Send one whole frame, or queue it behind what is queued; see :class:`Verdict`."""
        if self._posts is not None:
            self.flush_posts()
        if self.clear:
            try:
                sent = self.sock.send(frame)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                sent = 0
            except OSError:
                sent = -1
            return Verdict.TAKEN if sent == len(frame) else self.sent(frame, sent)
        if self.gone or self.closing or self.outbox is None:
            return Verdict.CLOSED
        traffic = self._traffic
        size = len(frame)
        full = self.outbox.size + size > self.outbox_bytes
        if full or traffic.queued + size > traffic.process_outbox_bytes:
            traffic.refused += 1
            return Verdict.FULL
        self.outbox.push(frame)
        traffic.queued += size
        return Verdict.TAKEN

    def sent(self, frame: bytes, size: int) -> int:
        """The socket took only ``size`` bytes of ``frame``: queue the rest. -1: it is broken."""
        if size < 0:
            self._lose()
            return Verdict.CLOSED
        outbox = self.outbox = Outbox()
        outbox.push(frame, size)
        traffic = self._traffic
        traffic.queued += outbox.size
        traffic.behind[self] = None
        traffic.backlogs += 1
        self.progress = True
        self._set_clear(False)
        self._watch(self.interest | WRITE)
        return Verdict.TAKEN

    def _set_clear(self, clear: bool) -> None:
        if clear != self.clear:
            self.clear = clear
            if self.owner is not None:
                self.owner.direct_changed()

    def push(self, frame: bytes) -> None:
        """Send or queue a control frame whatever the limits say: it is small, and the only one."""
        if self.gone or self.closing:
            return
        if self.outbox is None:
            self.write(frame)
        else:
            self.outbox.push(frame)
            self._traffic.queued += len(frame)

    def post(self, message: bytes, *, after_events: bool = False) -> None:
        """Queue one message for the end of this round; see :class:`~broker.hub.rooms.Sink`.

        Behind one that waits for events all wait, for answers come in order.
        """
        if self.gone or self.closing:
            return
        if self._posts_after is not None:
            self._posts_after.append(message)
        elif after_events:
            self._posts_after = [message]
            self._traffic.posted(self.owner, after_events=True)
        elif self._posts_sealed is not None:
            self._posts_sealed.append(message)
        elif self._posts is not None:
            self._posts.append(message)
        else:
            self._posts = [message]
            self._traffic.posted(self.owner, after_events=False)

    @property
    def posts_wait(self) -> bool:
        """Whether answers wait for events that are pending in rooms."""
        return self._posts_after is not None or self._posts_sealed is not None

    def seal_posts(self) -> None:
        """Let go of what waits for events once this round is over, but not of what comes meanwhile."""
        if self._posts_after is not None:
            self._posts_sealed = (self._posts_sealed or []) + self._posts_after
            self._posts_after = None

    def flush_posts(self, *, after_events: bool = False) -> None:
        """Send the posted messages, as one frame of each kind."""
        posts, self._posts = self._posts, None
        if posts is not None:
            self._write_posts(posts)
        if after_events:
            posts, self._posts_sealed = self._posts_sealed, None
            if posts is not None:
                self._write_posts(posts)

    def _write_posts(self, posts: list[bytes]) -> None:
        try:
            frame = self._traffic.encoder.encode(self.codec, batch(posts))
        except Exception as error:  # a fault of ours ends this session, not the fan-out
            self.owner.fault("post", error)
            self.owner.disconnect(CloseCode.INTERNAL, "a fault of the server")
            return
        if self.write(frame) == Verdict.FULL:
            # Answers cannot be dropped as events can: who asks and does not read is too slow.
            self.owner.disconnect(CloseCode.SLOW_CONSUMER, "too slow to read its answers")

    def close(self, code: int, reason: str = "") -> None:
        """Send a close frame after everything queued; nothing is sent after it."""
        self.push(encode_close(code, reason))
        self.closing = True
        self._set_clear(False)

    def finish_writing(self) -> None:
        """End our half of the stream; the peer's end of file will follow."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._lose()

    def abandon_backlog(self) -> None:
        """Forget queued frames but for one that is half sent, to end with a slow reader soon."""
        if self.outbox is not None:
            self._traffic.queued -= self.outbox.keep_first()

    def _end_backlog(self) -> None:
        self.outbox = None
        del self._traffic.behind[self]

    def _forget_backlog(self) -> None:
        if self.outbox is not None:
            self._traffic.queued -= self.outbox.size
            self._end_backlog()
        self._posts = self._posts_after = self._posts_sealed = None

    def when_drained(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once nothing is queued; soon if nothing is now."""
        self._want_drained = callback
        if self.outbox is None and not self.gone:
            # Through the pump: the socket is writable, so it will say so.
            self._watch(self.interest | WRITE)

    def on_writable(self) -> None:
        """Flush the backlog as far as the socket takes it."""
        outbox = self.outbox
        if outbox is not None:
            traffic = self._traffic
            for _ in range(FLUSHES):
                chunk = outbox.peek()
                try:
                    sent = self.sock.send(chunk)
                except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    return
                except OSError:
                    self._lose()
                    return
                outbox.advance(sent)
                traffic.queued -= sent
                self.progress = True
                if not outbox.size:
                    break
                if sent < len(chunk):
                    return
            else:
                return
            self._end_backlog()
            self._set_clear(not self.closing)
        self._watch(self.interest & ~WRITE)
        if self._want_drained is not None:
            callback, self._want_drained = self._want_drained, None
            callback()

    # -- in ---------------------------------------------------------------------

    def on_readable(self) -> None:
        """Read once and hand on what is complete."""
        try:
            data = self.sock.recv(READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self._lose()
            return
        if not data:
            self._lose()
            return
        self.receive(data)
        if not self._plain:
            self._read_pending(cast("ssl.SSLSocket", self.sock))

    def _read_pending(self, sock: ssl.SSLSocket) -> None:
        # A TLS record may hold more than we read; the poll object cannot see that.
        while not self.gone and self.interest & READ and sock.pending():
            try:
                data = sock.recv(READ_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError:
                self._lose()
                return
            self.receive(data)

    def receive(self, data: bytes) -> None:
        """Take bytes that came from the peer."""
        self.heard = True
        self._traffic.bytes_read += len(data)
        for opcode, payload in self.decoder.feed(data):
            self.on_incoming(opcode, payload)
            if self.gone:
                return

    def pause_reading(self) -> None:
        """Read no more: the peer feels TCP's back-pressure."""
        if self.interest & READ:
            self._watch(self.interest & ~READ)

    def resume_reading(self) -> None:
        """Read again."""
        if not self.interest & READ:
            self._watch(self.interest | READ)
            if not self._plain:
                self._read_pending(cast("ssl.SSLSocket", self.sock))

    def _watch(self, interest: int) -> None:
        if interest != self.interest and not self.gone:
            self.interest = interest
            self._traffic.pump.watch(self.fileno, interest)

    def on_fault(self) -> None:
        """We failed on what this peer sent: it is as good as gone."""
        self._lose()

    def _lose(self) -> None:
        """The peer is gone."""
        if self.gone:
            return
        self.gone = True
        self._set_clear(False)
        self._traffic.pump.remove(self.fileno)
        self._forget_backlog()
        self.on_gone()


def _nobody(*_arguments: Any) -> None:
    """Before an owner is there, and after."""
