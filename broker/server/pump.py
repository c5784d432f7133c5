"""One task that reads and flushes every socket of the node.

Theory. ``await sock.recv()`` for each of 10,000 sockets would arm and disarm
Trio's poll object and schedule a task for every message (67 µs a message with
wsproto, 31 with the fast frames; measured). Instead one level-triggered epoll
object holds every socket for its whole life, Trio watches only that object, and
a ready socket is read by a plain call (11 µs). A pass takes at most ``BATCH``
ready sockets and reads each once, then gives way to other tasks, so nobody
starves.

The pump knows nothing of WebSocket: a *channel* is what has a file number and
the two callbacks. Channels must leave the pump before their socket is closed.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Protocol

import structlog
import trio

from broker.server.gather import GATHER, Gathering
from broker.server.ticker import Ticker

log = structlog.get_logger(__name__)

BATCH = 256
"""Ready sockets handled between two checkpoints: a few milliseconds of work at most."""
READ = select.EPOLLIN | select.EPOLLRDHUP
WRITE = select.EPOLLOUT


class Channel(Protocol):
    """What the pump drives. No callback may wait."""

    def on_readable(self) -> None:
        """Bytes, the end of the stream, or an error can be read."""

    def on_writable(self) -> None:
        """The socket takes bytes again."""

    def on_fault(self) -> None:
        """One of the others raised: leave the pump."""


class Pump:
    """Owns the epoll object. ``after_pass`` is called after each pass over ready sockets."""

    def __init__(self, before_pass: Callable[[], None], after_pass: Callable[[], None]) -> None:
        self._epoll = select.epoll()
        self._channels: dict[int, Channel] = {}
        self._before_pass = before_pass
        self._after_pass = after_pass
        self.faults = 0
        """Exceptions that a channel raised."""
        self.passes = 0
        self.ready = 0
        """Ready sockets handled; ``ready / passes`` tells how well passes are filled."""

    def add(self, fileno: int, channel: Channel, interest: int = READ) -> None:
        """Watch a socket until :meth:`remove`. After the end of :meth:`run` nothing is watched any more."""
        if not self._epoll.closed:
            self._epoll.register(fileno, interest)
            self._channels[fileno] = channel

    def watch(self, fileno: int, interest: int) -> None:
        """Change what a socket is watched for. Unknown numbers are ignored."""
        if fileno in self._channels:
            self._epoll.modify(fileno, interest)

    def remove(self, fileno: int) -> None:
        """Stop watching; to be called before the socket is closed. Unknown numbers are ignored."""
        if self._channels.pop(fileno, None) is not None:
            self._epoll.unregister(fileno)

    def __contains__(self, fileno: int) -> bool:
        return fileno in self._channels

    def __len__(self) -> int:
        return len(self._channels)

    async def run(self) -> None:
        """Drive the channels until cancelled."""
        gathering = Gathering(trio.current_time())
        try:
            with Ticker(GATHER) as ticker:
                while True:
                    # Either is also where other tasks get their turn.
                    if gathering.active:
                        ticker.start()
                        await ticker.wait()
                    else:
                        ticker.stop()
                        await trio.lowlevel.wait_readable(self._epoll.fileno())
                    ready = self._epoll.poll(0, BATCH)
                    gathering.note(len(ready), trio.current_time())
                    self._pass(ready)
        finally:
            self._channels.clear()  # their owners end in the same moment, and call remove when it is closed
            self._epoll.close()

    def _pass(self, ready: list[tuple[int, int]]) -> None:
        channels = self._channels
        self._before_pass()
        for fileno, events in ready:
            channel = channels.get(fileno)
            if channel is None:
                continue  # removed earlier in this pass
            try:
                if events & WRITE:
                    channel.on_writable()
                    if not events & ~WRITE or fileno not in channels:
                        continue
                channel.on_readable()
            except Exception:  # a fault of ours, met by one client, must not end the others
                self.faults += 1
                log.exception("fault in a connection; it is dropped")
                channel.on_fault()
        self.passes += 1
        self.ready += len(ready)
        self._after_pass()
