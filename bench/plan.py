"""A workload in a dialect, as the file that ``load.c`` reads: all that is sent is made before the run."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.dialect import Dialect
from bench.workload import SEQUENCE, Workload

_NONE = 0xFFFFFFFF
_STOPS_READING = 1
_SPEAKS_REDIS = 2
_DEAF_RECEIVE_BUFFER = 4096
"""Small (B), so that what a deaf client leaves unread waits in the server and not in the kernel."""

_CONNECTION = np.dtype(
    [(name, np.uint32) for name in ("request", "script", "final", "flags", "receive_buffer", "port")]
)
_PUBLISH = np.dtype([("at", np.uint64), ("connection", np.uint32), ("template", np.uint32)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How the load client goes about it. Times in seconds; 0 means unbounded for the first two."""

    connect_rate: float = 0.0
    in_flight: int = 256
    setup_timeout: float = 60.0
    lead: float = 0.1
    quiet: float = 0.3
    settle_timeout: float = 20.0
    sources: int = 1


class _Table:
    """Distinct texts, numbered."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, text: str) -> int:
        return self._numbers.setdefault(text, len(self._numbers))

    def pack(self) -> bytes:
        return b"".join(map(_pack_text, self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)


def write_plan(path: Path, workload: Workload, dialect: Dialect, ports: Sequence[int], pace: Pace) -> None:
    """Write the plan of ``workload`` against the servers on ``ports``, in the order of its ``place``."""
    messages, templates = _Table(), _Table()
    scripts = _scripts(workload, dialect, messages)
    connections = _connections(workload, scripts, dialect, messages, ports)
    publishes = _publishes(workload, dialect, templates)
    header = struct.pack(
        "=8s10I5Q",
        b"blplan2",
        pace.sources,
        workload.connections,
        len(ports),
        len(messages),
        len(scripts),
        len(templates),
        workload.publishes,
        pace.in_flight,
        dialect.engine_io,
        workload.gather,
        round(1e9 / pace.connect_rate) if pace.connect_rate else 0,
        *(
            round(seconds * 1e9)
            for seconds in (pace.setup_timeout, pace.lead, pace.quiet, pace.settle_timeout)
        ),
    )
    with path.open("wb") as file:
        file.write(_pad(header))
        for port in ports:
            file.write(_pack_text(_request(dialect, port)))
        file.write(messages.pack())
        file.write(templates.pack())
        for texts in scripts.values():
            file.write(_pad(struct.pack("=I", len(texts))))
            file.write(_pad(struct.pack(f"={len(texts)}I", *texts)))
        file.write(_pad(connections.tobytes()))
        file.write(_pad(publishes.tobytes()))


def _request(dialect: Dialect, port: int) -> str:
    lines = (
        f"GET {dialect.path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        # The key of RFC 6455 section 1.3; no server minds that all are the same.
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *dialect.headers,
    )
    return "\r\n".join(lines) + "\r\n\r\n"


def _scripts(workload: Workload, dialect: Dialect, messages: _Table) -> dict[int, list[int]]:
    """Room index → numbers of the texts that bring a connection there."""
    scripts = {}
    for room in np.unique(workload.member):
        name = workload.rooms[room] if room >= 0 else None
        scripts[int(room)] = [messages.add(text) for text in dialect.opening(name)]
    return scripts


def _connections(
    workload: Workload,
    scripts: dict[int, list[int]],
    dialect: Dialect,
    messages: _Table,
    ports: Sequence[int],
) -> np.ndarray:
    connections = np.zeros(workload.connections, dtype=_CONNECTION)
    numbers = {room: number for number, room in enumerate(scripts)}
    connections["script"] = [numbers[room] for room in workload.member.tolist()]
    place = np.zeros(workload.connections, dtype=np.int32) if workload.place is None else workload.place
    connections["request"] = place
    connections["port"] = np.array(ports, dtype=np.uint32)[place]
    connections["flags"][sorted(workload.backends)] |= _SPEAKS_REDIS
    connections["final"] = _NONE
    if workload.asks:
        connections["final"][np.unique(workload.publisher)] = messages.add(dialect.ask())
    deaf = sorted(workload.deaf)
    connections["flags"][deaf] |= _STOPS_READING
    connections["receive_buffer"][deaf] = _DEAF_RECEIVE_BUFFER
    return connections


def _publishes(workload: Workload, dialect: Dialect, templates: _Table) -> np.ndarray:
    body = np.arange(workload.publishes, dtype=np.int64) % max(1, len(workload.bodies))
    pairs, which = np.unique(np.stack([workload.room, body], axis=1), axis=0, return_inverse=True)
    texts = [dialect.publish(workload.rooms[room], workload.bodies[index]) for room, index in pairs.tolist()]
    numbers = np.array([templates.add(text) for text in texts], dtype=np.uint32)
    publishes = np.zeros(workload.publishes, dtype=_PUBLISH)
    publishes["at"] = workload.at
    publishes["connection"] = workload.publisher
    if len(numbers):
        publishes["template"] = numbers[which.reshape(-1)]
    return publishes


def _pack_text(text: str) -> bytes:
    mark = text.find(SEQUENCE)
    data = text.encode()
    # The mark counts bytes, not characters.
    offset = len(text[:mark].encode()) if mark >= 0 else _NONE
    return struct.pack("=II", len(data), offset) + _pad(data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
