"""A TCP proxy that misbehaves on request: it delays, cuts at any byte, freezes, and loses one direction.

``Proxy.faults`` is read on every chunk, so that a test may change its mind at
any time; ``seed`` makes random cuts repeat.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio


@dataclass
class Direction:
    """What happens to bytes on their way in one direction."""

    frozen: bool = False
    """They are not even read: the sender's and our own kernel buffers fill."""
    lost: bool = False
    """They are read and forgotten."""
    delay: float = 0.0
    """Seconds before each chunk goes on."""
    cut_after: int | None = None
    """So many bytes of a connection opened from now on pass; then both of its sides are closed."""


@dataclass
class Faults:
    """The two directions."""

    requests: Direction = field(default_factory=Direction)
    replies: Direction = field(default_factory=Direction)
    refuse: bool = False
    """New connections are closed at once."""
    mute: bytes | None = None
    """A connection whose first requests held this gets no more replies; the others do."""


class Proxy:
    """Listens on ``port`` and passes everything on to ``target_port``, both on loopback."""

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.target_port = target_port
        self.port = 0
        self.faults = Faults()
        self.connections = 0
        """Taken so far."""
        self.open = 0
        self.random = random.Random(seed)
        self._scopes: set[trio.CancelScope] = set()

    @property
    def url(self) -> str:
        """The Redis behind the proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    def drop(self) -> None:
        """Close every connection that is open now."""
        for scope in list(self._scopes):
            scope.cancel()

    def heal(self) -> None:
        """Behave from now on."""
        self.faults = Faults()

    async def serve(self, client: trio.SocketStream) -> None:
        """One connection."""
        self.connections += 1
        self.open += 1
        try:
            async with client:
                if self.faults.refuse:
                    return
                server = await trio.open_tcp_stream("127.0.0.1", self.target_port)
                async with server:
                    with trio.CancelScope() as scope:
                        self._scopes.add(scope)
                        try:
                            said = bytearray()
                            async with trio.open_nursery() as nursery:
                                nursery.start_soon(self._pass_on, client, server, "requests", scope, said)
                                nursery.start_soon(self._pass_on, server, client, "replies", scope, said)
                        finally:
                            self._scopes.discard(scope)
        except OSError:
            pass  # the target is away: the client finds its connection closed
        finally:
            self.open -= 1

    async def _thawed(self, name: str) -> None:
        while getattr(self.faults, name).frozen:  # noqa: ASYNC110 - a test sets a plain attribute
            await trio.sleep(0.005)

    async def _pass_on(
        self,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        name: str,
        scope: trio.CancelScope,
        said: bytearray,
    ) -> None:
        left = getattr(self.faults, name).cut_after
        try:
            while True:
                await self._thawed(name)
                data = await source.receive_some(65536)
                direction: Direction = getattr(self.faults, name)
                await self._thawed(name)
                if direction.delay:
                    await trio.sleep(direction.delay)
                if left is not None:
                    data, left = data[:left], left - len(data)
                if name == "requests" and len(said) < 4096:
                    said += data
                muted = name == "replies" and self.faults.mute is not None and self.faults.mute in said
                if data and not direction.lost and not muted:
                    await sink.send_all(data)
                if not data or (left is not None and left <= 0):
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


@asynccontextmanager
async def proxy_to(target_port: int, seed: int = 0) -> AsyncIterator[Proxy]:
    """A proxy that runs inside the block."""
    proxy = Proxy(target_port, seed)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, proxy.serve, listeners)
        try:
            yield proxy
        finally:
            nursery.cancel_scope.cancel()
