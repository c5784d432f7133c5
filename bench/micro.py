"""Microbenchmarks of the tricks on the hot paths: what each is worth against the plain way.

``python -m bench.micro [frames|decode|encode|handshake|sends]``. Microseconds of
CPU, the best of several runs, for that is the one least disturbed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import orjson
import wsproto.frame_protocol as wsproto_frames
from wsproto import WSConnection
from wsproto.connection import Connection, ConnectionType

from broker.config import Limits
from broker.protocol import handshake, http
from broker.protocol.events import make_event
from broker.protocol.frames import FrameDecoder, unmask
from broker.protocol.messages import decode

MESSAGE = orjson.dumps(
    {
        "op": "publish",
        "room": "deal:1742",
        "event": "deal-updated",
        "data": {"id": 1742, "stage": "won", "amount": 1234.5, "owner": "Jane Doe", "note": "signed"},
    }
)
MASK = b"\x37\xfa\x21\x3d"
SESSIONS = 1000
ROUNDS = 60


def best(function: Callable[[], object], number: int = 20_000) -> float:
    """Microseconds for one call."""
    return min(timeit.repeat(function, number=number, repeat=5)) / number * 1e6


def frames() -> Iterator[tuple[str, float]]:
    """One small masked text frame, from bytes to message."""
    frame = bytes([0x81, 0xFE, *len(MESSAGE).to_bytes(2, "big")]) + MASK + unmask(MESSAGE, MASK)
    fast = FrameDecoder(65536, 64)
    slow = Connection(ConnectionType.SERVER)

    def by_wsproto() -> object:
        slow.receive_data(frame)
        return list(slow.events())

    yield "fast lane", best(lambda: fast.feed(frame))
    yield "wsproto", best(by_wsproto)
    yield "unmask by one big integer", best(lambda: unmask(MESSAGE, MASK))
    yield "unmask by wsproto", best(lambda: wsproto_frames.XorMaskerSimple(MASK).process(bytearray(MESSAGE)))


def decoding() -> Iterator[tuple[str, float]]:
    """One publish, from JSON to a checked message."""
    yield "typed decode, with checks", best(lambda: decode(MESSAGE, 256))
    yield "orjson.loads alone, without checks", best(lambda: orjson.loads(MESSAGE))


def encoding() -> Iterator[tuple[str, float]]:
    """One event, from data to the bytes that everybody gets."""
    data = orjson.loads(MESSAGE)["data"]
    yield "make_event", best(lambda: make_event("deal:1742", "deal-updated", data, 1.5))


def upgrades() -> Iterator[tuple[str, float]]:
    """One browser's upgrade request, from bytes to the answer."""
    request = (
        b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:8765\r\nConnection: Upgrade\r\nPragma: no-cache\r\n"
        b"Cache-Control: no-cache\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) Chrome/140.0\r\n"
        b"Upgrade: websocket\r\nOrigin: http://127.0.0.1:8765\r\nSec-WebSocket-Version: 13\r\n"
        b"Accept-Encoding: gzip, deflate, br\r\nAccept-Language: en-US,en;q=0.9\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
    )
    limits = Limits()

    def ours() -> object:
        parsed = http.parse_request(request, limits)
        assert parsed is not None
        return handshake.negotiate(parsed, subprotocols_supported=("broker.v1.json",), deflate=True)

    def by_wsproto() -> object:
        connection = WSConnection(ConnectionType.SERVER)
        connection.receive_data(request)
        return list(connection.events())

    yield "ours, with the answer", best(ours, 5_000)
    yield "wsproto, without the answer", best(by_wsproto, 2_000)


class Plain:
    """What a send would walk through: three objects between a member and its socket.

    ``ballast`` keeps them as far apart in memory as a session's other parts do.
    """

    __slots__ = ("ballast", "clear", "next", "socket")

    def __init__(self, following: Plain | None, sock: socket.socket) -> None:
        self.next = following
        self.socket = sock
        self.clear = True
        self.ballast: list[dict[str, object]] = [{} for _ in range(8)]


@contextmanager
def reading_peer(count: int) -> Iterator[list[socket.socket]]:
    """``count`` connected sockets whose other ends are read by a child on another core."""
    with socket.create_server(("127.0.0.1", 0), backlog=count) as server:
        child = os.fork()
        if child == 0:
            _drain(server.getsockname(), count)
        sockets = [server.accept()[0] for _ in range(count)]
        try:
            for sock in sockets:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sockets
        finally:
            for sock in sockets:
                sock.close()
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)


def _drain(address: tuple[str, int], count: int) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    poll = select.epoll()
    peers = {}
    for _ in range(count):
        peer = socket.create_connection(address)
        peer.setblocking(False)
        peers[peer.fileno()] = peer
        poll.register(peer.fileno(), select.EPOLLIN)
    while True:
        for fileno, _ in poll.poll():
            if not peers[fileno].recv(65536):
                os._exit(0)


def sends() -> Iterator[tuple[str, float]]:
    """The same 140 B to 1,000 sockets; the kernel's part is in every figure."""
    frame = bytes(142)
    with reading_peer(SESSIONS) as sockets:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        filenos = [sock.fileno() for sock in sockets]
        chains = [_chain(sock) for sock in sockets]

        def by_sockets() -> None:
            for sock in sockets:
                sock.send(frame)

        def by_filenos() -> None:
            write = os.write
            for fileno in filenos:
                write(fileno, frame)

        def by_objects() -> None:
            for member in chains:
                session = member.next
                connection = session.next if session is not None else None
                if connection is not None and connection.clear:
                    connection.socket.send(frame)

        ways = {
            "socket objects (as the fan-out does)": by_sockets,
            "os.write on descriptors": by_filenos,
            "member, session, connection, socket": by_objects,
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                time.sleep(0.005)  # let the reader catch up, so that no socket is full
                began = time.thread_time()
                way()
                taken[name].append((time.thread_time() - began) / SESSIONS * 1e6)
    for name, values in taken.items():
        yield name, sorted(values)[len(values) // 2]


def _chain(sock: socket.socket) -> Plain:
    return Plain(Plain(Plain(None, sock), sock), sock)


BENCHMARKS = {
    "frames": frames,
    "decode": decoding,
    "encode": encoding,
    "handshake": upgrades,
    "sends": sends,
}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.stderr.write(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}\n")
        return 2
    for name in names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        print(f"{name}: {(benchmark.__doc__ or '').splitlines()[0]}")
        for what, microseconds in benchmark():
            print(f"  {microseconds:8.2f} µs  {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
