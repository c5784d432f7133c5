"""The operators' port as a server: bound once, guarded, restarted when it fails.

Hypercorn's Trio worker speaks HTTP; this module decides what may come of its
failures. A fault in one connection ends that connection. A fault of the whole
server is logged and the server started again with a growing pause, on the same
port, which stays bound meanwhile, so that nobody else takes it. Nothing but
cancellation ever leaves :meth:`AdminServer.run` once it has started. The bounds
of each connection are in :mod:`broker.admin.guard`.

Imported only where the port is on.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from typing import Any, Final, cast

import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

from broker.admin.api import OPERATIONS
from broker.admin.guard import GuardedStream
from broker.admin.node import Node
from broker.admin.operations import Operation
from broker.admin.web import Web
from broker.logs import Throttle

log = structlog.get_logger(__name__)

CONNECTIONS: Final = 64
"""Connections at once. An operator, a few scrapers and backends; each costs a descriptor and some 20 kB."""
BACKLOG: Final = 64
KEEP_ALIVE_SECONDS: Final = 15
FIRST_PAUSE: Final = 0.1
"""Seconds before the first restart; doubles with each, up to ``LAST_PAUSE``."""
LAST_PAUSE: Final = 30.0
STEADY_SECONDS: Final = 60.0
"""A server that ran this long starts anew with the first pause."""

_BUSY: Final = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class AdminServer:
    """Serves ``operations`` for ``node`` on the configured address."""

    def __init__(self, node: Node, operations: Sequence[Operation] = OPERATIONS) -> None:
        self._settings = node.context.config.admin
        self._web = Web(node, operations)
        self._app = ASGIWrapper(cast("Any", self._web))
        self._hypercorn = _hypercorn_config()
        self._streams: set[GuardedStream] = set()
        self._throttle = Throttle()
        self._listeners: list[socket.socket] = []

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started with the bound port. Raises OSError if that cannot be had."""
        self._listeners = bind(self._settings.host, self._settings.port)
        try:
            port = self._listeners[0].getsockname()[1]
            task_status.started(port)
            await self._supervise(port)
        finally:
            self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()

    # -- whole server -------------------------------------------------------------------

    async def _supervise(self, port: int) -> None:
        pause = FIRST_PAUSE
        while True:
            started = trio.current_time()
            try:
                if self._web.restarts:  # the sockets may be what failed
                    self._close()
                    self._listeners = bind(self._settings.host, port)
                await self._serve()
            except* Exception:  # whatever it is, the sessions must not hear of it
                if trio.current_time() - started >= STEADY_SECONDS:
                    pause = FIRST_PAUSE
                log.exception("the operators' port failed and starts again", pause=pause)
            self._web.restarts += 1
            await trio.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE)

    async def _serve(self) -> None:
        copies: list[trio.SocketListener] = []
        for listener in self._listeners:
            listener.listen(BACKLOG)
            copies.append(trio.SocketListener(trio.socket.from_stdlib_socket(listener.dup())))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._abort_at_the_end)
            await trio.serve_listeners(self._connection, copies)

    async def _abort_at_the_end(self) -> None:
        """Close what is open as soon as the server is cancelled: Hypercorn's writes are shielded."""
        try:
            await trio.sleep_forever()
        finally:
            for stream in list(self._streams):
                stream.abort()

    # -- one connection -------------------------------------------------------------------

    async def _connection(self, stream: trio.SocketStream) -> None:
        if len(self._streams) >= CONNECTIONS:
            await _turn_away(stream)
            return
        try:
            with trio.CancelScope() as scope:
                worker = WorkerContext(None)  # one each, so that each can be told apart that it ends
                await self._serve_connection(GuardedStream(stream, scope, worker.terminated.set), worker)
        except* Exception as group:  # contained: the other connections go on
            self._web.faults += 1
            missed = self._throttle.admit("connection", trio.current_time())
            if missed is not None:
                log.warning("a connection of the operators' port failed", exc_info=group, suppressed=missed)

    async def _serve_connection(self, stream: GuardedStream, worker: WorkerContext) -> None:
        self._streams.add(stream)
        self._web.connections += 1
        try:
            await TCPServer(
                self._app,
                self._hypercorn,
                worker,
                cast("LifespanState", ConnectionState(LifespanState())),
                cast("Any", stream),
            ).run()
        finally:
            self._streams.discard(stream)
            self._web.connections -= 1


async def _turn_away(stream: trio.SocketStream) -> None:
    with trio.move_on_after(1):
        try:
            await stream.send_all(_BUSY)
        except trio.BrokenResourceError:
            pass


def _hypercorn_config() -> HypercornConfig:
    config = HypercornConfig()
    config.accesslog = None
    # An existing logger is used as it is; else Hypercorn would attach a stream of its own.
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = KEEP_ALIVE_SECONDS
    return config


def bind(host: str, port: int) -> list[socket.socket]:
    """Bound sockets for every address of the host, one port for all. Raises OSError, naming the address."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in infos:
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = port or sock.getsockname()[1]
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise OSError(error.errno, f"admin port {host}:{port}: {error.strerror}") from None
    return sockets
