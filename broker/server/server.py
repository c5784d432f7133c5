"""The client port: accept, handshake, and the life of each connection.

:meth:`Server._serve` is that life, top to bottom; each runs as one task in the
server's nursery and catches whatever happens in it, so that no connection can
end another (an exception in a child would cancel its siblings).
"""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import structlog
import trio

from broker.auth.claims import TokenRefused
from broker.config import Config
from broker.config import Server as Settings
from broker.errors import BrokerError, CloseCode, ErrorCode
from broker.protocol import http
from broker.protocol.codec import DEFLATE, JSON, ZSTD, Codec
from broker.protocol.frames import FrameDecoder
from broker.protocol.handshake import Upgrade, negotiate
from broker.protocol.http import Request
from broker.protocol.http_faults import Fault, RequestError
from broker.protocol.inflate import BoundedInflate
from broker.protocol.origin import OriginPolicy, bearer_token, check_origin, client_address, query_token
from broker.server import identity as identities
from broker.server.connection import Connection
from broker.server.context import Context
from broker.server.echo import serve_echo
from broker.server.listening import bind, close
from broker.server.rates import Bucket
from broker.server.session import Session

log = structlog.get_logger(__name__)

ACCEPTS: Final = 64
"""Connections accepted between two checkpoints."""
NOTSENT_BYTES: Final = 128 * 1024
"""``TCP_NOTSENT_LOWAT``: what the kernel may hold unsent for one client before we see it as slow.

Without it the kernel's buffer grows to megabytes for each slow reader. Trio's
streams use 16 KiB, which would make a backlog of every larger frame."""
LINGER_SECONDS: Final = 1.0
"""How long a refused client may take to read our answer before the socket is closed."""
LINGER_BYTES: Final = 64 * 1024
DRAIN_CHUNK: Final = 200
OUT_OF_RESOURCES_PAUSE: Final = 0.5
"""Seconds without accepting after EMFILE: the queue stays readable, so without a pause we would spin."""
OUT_OF_RESOURCES_SILENCE: Final = 60.0
"""Seconds after one such failure in which others are not logged: they come and go for as long as it lasts."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server:
    """Listens on the client port and owns every connection task."""

    def __init__(self, context: Context) -> None:
        config = context.config
        self._context = context
        self._settings: Settings = config.server
        self._origins = OriginPolicy.parse(config.server.origins)
        self._proxies = [ipaddress.ip_network(entry, strict=False) for entry in config.server.trusted_proxies]
        self._subprotocols = ["broker.v1.json"] + (["broker.v1.zstd"] if config.server.zstd else [])
        self._tls = make_tls_context(config.server)
        self._limit = connection_limit(config)
        self._nursery: trio.Nursery | None = None
        self._all_gone = trio.Event()
        self.draining = False

    # -- listening ----------------------------------------------------------------

    async def run(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept and serve until drained or cancelled. Owns the listeners."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in listeners:
                    nursery.start_soon(self._accept, listener)
                task_status.started()
        finally:
            for listener in listeners:
                listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        limits = self._context.config.limits
        bucket = None
        if limits.accepts:
            bucket = Bucket(limits.accepts, limits.accept_burst, self._context.monotonic())
        allowed = False
        silent_until = 0.0
        while True:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPTS):
                if bucket is not None and not allowed:
                    wait = bucket.take(self._context.monotonic())
                    if wait:
                        await trio.sleep(wait)  # the kernel's queue holds the others meanwhile
                        continue
                    allowed = True
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _OUT_OF_RESOURCES:
                        self._context.registry.refuse("descriptors")
                        now = self._context.monotonic()
                        if now >= silent_until:
                            log.warning("cannot accept: out of descriptors or memory", error=str(error))
                        silent_until = now + OUT_OF_RESOURCES_SILENCE
                        await trio.sleep(OUT_OF_RESOURCES_PAUSE)
                        break
                    continue  # the client gave up before we came (ECONNABORTED and its kind)
                allowed = False
                self._take_in(sock, str(address[0]))
            await trio.lowlevel.checkpoint()

    def _take_in(self, sock: socket.socket, peer: str) -> None:
        """Start a connection's life, or turn it away where there are too many."""
        registry = self._context.registry
        registry.accepted += 1
        sock.setblocking(False)
        if registry.connections >= self._limit:
            registry.refuse("connections")
            _turn_away(sock)
            return
        registry.connections += 1
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, sock, peer)

    # -- the life of a connection ---------------------------------------------------

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        """Handshake, session, end: one connection, whatever happens in it."""
        try:
            started = self._context.monotonic()
            serve: Callable[[], Awaitable[None]] | None = None
            with trio.move_on_after(self._settings.handshake_timeout) as deadline:
                try:
                    if self._tls is not None:
                        sock = await _start_tls(self._tls, sock)
                    serve = await self._shake_hands(sock, peer, started)
                except OSError:  # ssl.SSLError is one, too
                    self._context.registry.refuse("broken_handshake")
            if serve is not None:
                await serve()
            elif deadline.cancelled_caught:
                self._context.registry.refuse("handshake_timeout")
        except Exception:  # a fault of ours: it must not cancel the other connections
            self._context.registry.refuse("fault")
            log.exception("fault in a connection", peer=peer)
        finally:
            sock.close()
            self._context.registry.connections -= 1

    async def _shake_hands(
        self, sock: socket.socket, peer: str, started: float
    ) -> Callable[[], Awaitable[None]] | None:
        """Read the request and answer it; what to run next if it was upgraded."""
        try:
            request, rest = await self._read_request(sock)
            if request is None:
                return None
            address = client_address(request, peer, self._proxies)
            if request.path == "/ws":
                return self._upgrade(sock, request, rest, address, started)
            if request.path == "/echo" and self._settings.echo:
                return self._upgrade_echo(sock, request, rest)
            answer = self._page(request)
        except RequestError as error:
            self._context.registry.refuse(error.code)
            answer = http.refuse(error)
        await _send_and_linger(sock, answer)
        return None

    async def _read_request(self, sock: socket.socket) -> tuple[Request | None, bytes]:
        """The request, and what came after it; ``None`` if the client went away."""
        limits = self._context.config.limits
        buffer = b""
        while True:
            searched = len(buffer)
            try:
                data = sock.recv(limits.request_bytes)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(sock)
                continue
            if not data:
                return None, b""
            buffer = buffer + data if buffer else data
            request = http.parse_request(buffer, limits, searched)
            if request is not None:
                return request, buffer[request.consumed :]

    def _page(self, request: Request) -> bytes:
        """Answer what is no WebSocket."""
        head = request.method == "HEAD"
        if request.method not in {"GET", "HEAD"}:
            raise http.not_found()
        if request.path == "/healthz":
            return http.healthz(serving=not self.draining, head=head, version=request.version)
        kind, _, number = request.path[1:].partition("/")
        if kind == "dict" and number.isascii() and number.isdigit():
            dictionary = self._context.dictionaries.get(int(number[:10]))
            if dictionary is not None:
                return http.response(
                    200,
                    dictionary.raw,
                    content_type="application/octet-stream",
                    headers=_IMMUTABLE,
                    head=head,
                    version=request.version,
                )
        raise http.not_found()

    # -- upgrade --------------------------------------------------------------------

    def _upgrade(
        self, sock: socket.socket, request: Request, rest: bytes, address: str, started: float
    ) -> Callable[[], Awaitable[None]]:
        """Switch to WebSocket; the session's life follows."""
        context = self._context
        upgrade = negotiate(
            request, subprotocols_supported=self._subprotocols, deflate=self._settings.deflate
        )
        if not check_origin(request, self._origins):
            raise RequestError(403, Fault.ORIGIN, "this origin may not connect")
        if self.draining:
            raise RequestError(503, Fault.DRAINING, "this node is going away", _RETRY)
        if not context.registry.admit_stranger(address):
            raise RequestError(429, Fault.ADDRESS, "too many connections from here", _RETRY)
        token = bearer_token(request)
        if token is None and self._settings.query_token:
            token = query_token(request)
        session = Session(context, self._connection(sock, upgrade), address)
        return partial(self._run_session, session, upgrade, token, rest, started)

    def _connection(self, sock: socket.socket, upgrade: Upgrade) -> Connection:
        limits = self._context.config.limits
        inflate = partial(BoundedInflate, limits.inflated_bytes) if upgrade.deflate else None
        decoder = FrameDecoder(limits.message_bytes, limits.fragments, inflate)
        return Connection(sock, self._context.traffic, decoder, _codec(upgrade))

    async def _run_session(
        self, session: Session, upgrade: Upgrade, token: str | None, rest: bytes, started: float
    ) -> None:
        context = self._context
        connection = session.connection
        context.registry.open(session)
        try:
            connection.write(upgrade.response)
            rooms = await self._identify(session, token)
            if rooms is not None:
                connection.post(session.welcome(rooms))
                connection.flush_posts()
            connection.start(rest)
            context.stages.handshake.observe(context.monotonic() - started)
        except BaseException:
            context.hub.leave_all(session)
            connection.stop()
            self._forget(session, 1006)
            raise
        try:
            await session.run()
        finally:
            self._forget(session, session.ending or 1006)

    async def _identify(self, session: Session, token: str | None) -> dict[str, object] | None:
        """Who came, before ``welcome`` is said; ``None`` when the session is being ended."""
        try:
            if token is not None:
                return await identities.adopt(session, await identities.verify(session, token))
            if session.authenticated:
                return await identities.admit_anonymous(session)
        except TokenRefused as error:
            identities.turn_away(session, error)
        except BrokerError as error:
            full = error.code is ErrorCode.LIMIT_EXCEEDED
            session.disconnect(CloseCode.SESSION_LIMIT if full else CloseCode.INTERNAL, error.message)
        return {} if session.ending is None else None

    def _forget(self, session: Session, code: int) -> None:
        registry = self._context.registry
        registry.close(session, code)
        if self.draining and not registry.sessions:
            self._all_gone.set()

    def _upgrade_echo(
        self, sock: socket.socket, request: Request, rest: bytes
    ) -> Callable[[], Awaitable[None]]:
        upgrade = negotiate(request, subprotocols_supported=(), deflate=self._settings.deflate)
        if not check_origin(request, self._origins):
            raise RequestError(403, Fault.ORIGIN, "this origin may not connect")
        return partial(serve_echo, sock, self._context, _codec(upgrade), upgrade.response, rest)

    # -- drain ----------------------------------------------------------------------

    async def turn_out(self) -> int:
        """Upgrade no more, and ask every session to come back elsewhere; return how many were asked now.

        The port stays open: a load balancer is told 503 rather than nothing.
        Whoever was asked before is not asked again, so this may be repeated.
        """
        self.draining = True
        told = 0
        for number, session in enumerate(list(self._context.registry.sessions.values())):
            if session.ending is None:
                session.disconnect(CloseCode.DRAINING, "this node is going away")
                told += 1
            if number % DRAIN_CHUNK == DRAIN_CHUNK - 1:
                await trio.lowlevel.checkpoint()
        return told

    async def drain(self) -> None:
        """Turn everybody out, wait until they are gone, and end :meth:`run`.

        Bounded by the drain and close timeouts; what is left then is cut.
        """
        settings = self._settings
        await self.turn_out()
        if self._context.registry.sessions:
            with trio.move_on_after(settings.drain_timeout + settings.close_timeout):
                await self._all_gone.wait()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()


_RETRY = (("Retry-After", "5"),)
_IMMUTABLE = (("Cache-Control", "public, max-age=31536000, immutable"), ("Access-Control-Allow-Origin", "*"))


def _codec(upgrade: Upgrade) -> Codec:
    if upgrade.subprotocol == "broker.v1.zstd":
        return ZSTD
    return DEFLATE if upgrade.deflate else JSON


def _turn_away(sock: socket.socket) -> None:
    """Say that there are too many, without waiting: such a client is not worth a task."""
    with sock:
        try:
            sock.send(http.response(503, "too many connections\n", headers=_RETRY))
            sock.recv(LINGER_BYTES)  # closing with bytes unread could reset our answer away
        except OSError:
            pass


async def _send_and_linger(sock: socket.socket, answer: bytes) -> None:
    """Send an answer and let the client read it: closing at once could reset it away (RFC 9112 9.6)."""
    with trio.move_on_after(LINGER_SECONDS):
        view = memoryview(answer)
        while view:
            try:
                view = view[sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(sock)
        sock.shutdown(socket.SHUT_WR)
        left = LINGER_BYTES
        while left > 0:
            try:
                data = sock.recv(4096)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(sock)
                continue
            if not data:
                return
            left -= len(data)


async def _start_tls(context: ssl.SSLContext, sock: socket.socket) -> ssl.SSLSocket:
    """Do the TLS handshake on a non-blocking socket."""
    wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    try:
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(wrapped)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(wrapped)
            else:
                return wrapped
    except BaseException:
        wrapped.close()
        raise


def make_tls_context(settings: Settings) -> ssl.SSLContext | None:
    """TLS as configured; ``None`` for plain TCP."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A renegotiation would make a send wait for a read; TLS 1.3 has none.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    context.set_alpn_protocols(["http/1.1"])
    return context


def connection_limit(config: Config) -> int:
    """Connections this process may hold: as configured, else 90 % of its descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    granted = soft * 9 // 10
    return min(config.limits.connections or granted, granted)


def listen(settings: Settings, *, reuse_port: bool = False) -> list[socket.socket]:
    """Bound, listening, non-blocking sockets for the client port; ``reuse_port`` as in ``bind``.

    Options that accepted sockets inherit are set here once, which saves two
    system calls for each connection. Raises OSError.
    """
    listeners = bind(settings, reuse_port=reuse_port)
    try:
        for sock in listeners:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_BYTES)
            sock.listen(settings.backlog)
    except BaseException:
        close(listeners)
        raise
    return listeners
