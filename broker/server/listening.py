"""Addresses of the client port: bound here, by the broker and by the supervisor of its workers."""

from __future__ import annotations

import socket

from broker.config import Server
from broker.errors import ConfigurationError


def bind(settings: Server, *, reuse_port: bool = False) -> list[socket.socket]:
    """Bound, non-blocking sockets for every address of ``server.host``, on one port.

    ``reuse_port``: processes of the same user may bind it as well, each with
    this option; the kernel spreads connections over those that listen.
    Raises OSError.
    """
    bound: list[socket.socket] = []
    infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        port = settings.port
        for family, kind, protocol, _, address in infos:
            sock = socket.socket(family, kind, protocol)
            bound.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = port or sock.getsockname()[1]  # the same one on every address of the host
    except BaseException:
        close(bound)
        raise
    return bound


def close(sockets: list[socket.socket]) -> None:
    """Close them all."""
    for sock in sockets:
        sock.close()


def cannot_listen(settings: Server, error: OSError) -> ConfigurationError:
    """The reason why there is no socket, which is the operator's to mend."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return ConfigurationError(
        "configuration",
        "server.port",
        f"cannot listen on {host}:{settings.port}: {error.strerror or error}",
        "give another server.host or server.port (0 lets the system choose), or stop who holds it",
    )
