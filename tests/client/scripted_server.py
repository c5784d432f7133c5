"""A server that follows a script: the broker's part, played over memory streams.

The client is tested against it under virtual time: every pause, deadline and
renewal happens exactly when it should, and no real time passes. A script is an
async function that accepts connections and says line by line what comes and
what is answered; a line that does not come fails the test.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
import trio
import trio.testing
import trio_websocket
import zstandard

from broker.client import Backoff, Client, connect

URL = "ws://broker.test/ws"

PATIENCE = 3600.0
"""How long a script may take (virtual seconds) before the test fails instead of hanging."""

Script = Callable[["ScriptedServer"], Awaitable[None]]


class TopOfTheRange(random.Random):
    """Jitter that always takes the longest wait."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


class Peer:
    """One accepted connection, seen from the server."""

    def __init__(self, websocket: trio_websocket.WebSocketConnection, headers: dict[str, str]) -> None:
        self.websocket = websocket
        self.headers = headers
        self.compressor = zstandard.ZstdCompressor(level=1)
        self._messages: deque[dict[str, Any]] = deque()

    async def receive(self) -> dict[str, Any]:
        """The client's next message."""
        while not self._messages:
            self._messages.extend(await self.next_frame())
        return self._messages.popleft()

    async def next_frame(self) -> list[dict[str, Any]]:
        """The messages of the client's next frame."""
        frame = orjson.loads(await self.websocket.get_message())
        return frame if isinstance(frame, list) else [frame]

    async def expect(self, op: str, **fields: Any) -> dict[str, Any]:
        """The next message, which must be ``op`` and carry ``fields``."""
        message = await self.receive()
        assert message["op"] == op, message
        assert {name: message.get(name) for name in fields} == fields, message
        return message

    async def send(self, *messages: dict[str, Any]) -> None:
        """One frame with ``messages``."""
        await self.send_raw(orjson.dumps(list(messages)))

    async def send_raw(self, body: bytes) -> None:
        """One frame with ``body``, in the codec of the connection."""
        if self.websocket.subprotocol == "broker.v1.zstd":
            await self.websocket.send_message(self.compressor.compress(body))
        else:
            await self.websocket.send_message(body.decode())

    async def ok(self, request: dict[str, Any], /, **fields: Any) -> None:
        await self.send({"op": "ok", "id": request["id"], **fields})

    async def refuse(self, request: dict[str, Any], code: str, /, **fields: Any) -> None:
        error = {"op": "error", "id": request["id"], "code": code, "message": "no", "retry": False}
        await self.send(error | fields)

    async def join(self, room: str, epoch: str = "e", offset: int = 0, **fields: Any) -> dict[str, Any]:
        """Expect a join of a room with history and let it succeed."""
        message = await self.expect("join", room=room)
        reply: dict[str, Any] = {"room": room, "epoch": epoch, "offset": offset, "recovered": False}
        await self.ok(message, **(reply | fields))
        return message

    async def bye(self, code: int, reason: str = "", retry_after: float | None = None) -> None:
        await self.send({"op": "bye", "code": code, "reason": reason, "retry_after": retry_after})
        await self.close(code, reason)

    async def close(self, code: int, reason: str = "") -> None:
        await self.websocket.aclose(code, reason)

    async def drop(self) -> None:
        """Break the connection without a word."""
        await trio.aclose_forcefully(self.websocket._stream)

    async def gone(self) -> int:
        """Wait for the client to close; returns its close code."""
        with pytest.raises(trio_websocket.ConnectionClosed) as closed:
            raise AssertionError(f"a message instead of the close: {await self.receive()}")
        assert closed.value.reason is not None
        return closed.value.reason.code


def event(room: str, offset: int | None = None, name: str = "e", data: Any = None) -> dict[str, Any]:
    """An ``event`` message."""
    message = {"op": "event", "room": room, "event": name, "data": data, "ts": 1.5}
    return message if offset is None else message | {"offset": offset}


class DeafServer:
    """Upgrades (RFC 6455 section 1.3), greets (section 5.2), and is never heard of again."""

    GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

    @classmethod
    async def greet(cls, stream: trio.abc.Stream, welcome: dict[str, Any]) -> None:
        request = bytes(await stream.receive_some())
        key = next(line for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        digest = hashlib.sha1(key.split(b":")[1].strip() + cls.GUID).digest()
        head = (
            b"HTTP/1.1 101 \r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n"
        )
        body = orjson.dumps([welcome])
        assert len(body) < 126
        await stream.send_all(head % base64.b64encode(digest) + bytes([0x81, len(body)]) + body)


class ScriptedServer:
    """Hands out streams to the client, and their other ends to the script.

    ``lockstep``: streams without any buffer, so that back-pressure is seen at once.
    """

    def __init__(self, nursery: trio.Nursery, *, lockstep: bool) -> None:
        self.dialled_at: list[float] = []
        self.unreachable = False
        self._nursery = nursery
        self._pair = trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](64)

    async def open_stream(self) -> trio.abc.Stream:
        """What the client opens instead of a TCP connection."""
        self.dialled_at.append(trio.current_time())
        if self.unreachable:
            raise ConnectionRefusedError("nobody there")
        ours, theirs = self._pair()
        await self._send.send(ours)
        return theirs

    async def stream(self) -> trio.abc.Stream:
        """The next connection, before anything was said."""
        return await self._receive.receive()

    async def request(self) -> trio_websocket.WebSocketRequest:
        """The next connection's wish to upgrade."""
        return await trio_websocket.wrap_server_stream(self._nursery, await self.stream())

    async def accept(self, *, welcome: bool = True, **fields: Any) -> Peer:
        """Upgrade the next connection, and greet it with a ``welcome`` that carries ``fields``."""
        request = await self.request()
        protocol = next(iter(request.proposed_subprotocols), None)
        websocket = await request.accept(subprotocol=protocol)
        peer = Peer(websocket, {name.decode(): value.decode() for name, value in request.headers})
        if welcome:
            greeting: dict[str, Any] = {
                "op": "welcome",
                "protocol": 1,
                "session": f"s{len(self.dialled_at)}",
                "user": None,
                "expires": None,
                "node": "n1",
                "server": "test",
                "ping": 25,
                "limits": {"message": 65536, "batch": 256, "rooms": 128, "state": 2048},
                "rooms": {},
            }
            await peer.send(greeting | fields)
        return peer


@asynccontextmanager
async def performing(script: Script, *, lockstep: bool = False) -> AsyncIterator[ScriptedServer]:
    """Run ``script``; on the way out, it must come to its end, and no task may be left."""
    tasks = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as streams:
        server = ScriptedServer(streams, lockstep=lockstep)
        async with trio.open_nursery() as stage:

            async def perform() -> None:
                with trio.fail_after(PATIENCE):
                    await script(server)

            stage.start_soon(perform)
            yield server
        streams.cancel_scope.cancel()
    assert trio.lowlevel.current_statistics().tasks_living == tasks


WAITS = Backoff(base=1.0, cap=8.0, stable=10.0, rng=TopOfTheRange())
"""1, 2, 4, 8, 8, … seconds."""


def options_for(server: ScriptedServer, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``connect`` that lead to ``server``."""
    return {"open_stream": server.open_stream, "backoff": WAITS, "zstd": False} | options


@asynccontextmanager
async def client_of(
    script: Script, *, lockstep: bool = False, **options: Any
) -> AsyncIterator[tuple[Client, ScriptedServer]]:
    """A client connected to a server that follows ``script``."""
    async with (
        performing(script, lockstep=lockstep) as server,
        connect(URL, **options_for(server, options)) as client,
    ):
        yield client, server


async def no_script(server: ScriptedServer) -> None:
    """Nothing comes, and nothing is answered."""


async def failure(script: Script, **options: Any) -> Exception:
    """What connecting raises; the script must still come to its end."""
    async with performing(script) as server:
        with pytest.raises(Exception) as caught:  # whatever it is, the test looks at it
            async with connect(URL, **options_for(server, options)):
                pass
    return caught.value
