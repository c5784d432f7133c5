"""A real broker with its real operators' port, on ephemeral ports, and clients of both."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import trio
import trio_websocket

from broker.admin import questions
from broker.admin.api import OPERATIONS
from broker.admin.operations import Operation
from broker.admin.server import AdminServer
from broker.app import Broker
from broker.auth.tokens import sign
from broker.config import Admin, Auth, Config, Key, Limits, RoomOptions, Server
from broker.engine.peers import Peers
from tests.admin.fakes import Line, Switchboard

TOKEN = "let-me-in"
OPEN = RoomOptions(join="anyone", publish="anyone")
AUTH = Auth(anonymous=True, keys=(Key(algorithm="HS256", secret="0123456789abcdef0123456789abcdef"),))
ROOMS = {
    "default": OPEN,
    "deal": RoomOptions(join="anyone", publish="anyone", history=100),
    "board": RoomOptions(join="anyone", publish="anyone", last_value=True),
    "tiny": RoomOptions(join="anyone", publish="anyone", event_bytes=200),
}


def config(admin: Admin | None = None, **changes: Any) -> Config:
    """Open rooms, ephemeral ports, and a known admin token."""
    settings: dict[str, Any] = {
        "node": "test-node",
        "server": Server(port=0),
        "limits": Limits(accepts=0),
        "auth": AUTH,
        "rooms": ROOMS,
        "admin": admin or Admin(port=0, token=TOKEN),
        **changes,
    }
    return Config(**settings)


class SeparatePort:
    """A broker that runs without its operators' port, for one that is started beside it."""

    def __init__(self, settings: Config, peers: Peers | None = None) -> None:
        without = msgspec.structs.replace(settings, admin=Admin(port=-1))
        self.broker = Broker(without)
        self.context = replace(self.broker.context, config=settings, peers=peers or self.broker.peers)
        self.pump = self.broker.pump
        self.load = self.broker.load
        self.mover = self.broker.mover
        self.started_at = self.broker.started_at

    @property
    def ready(self) -> bool:
        return self.broker.ready

    async def drain(self) -> int:
        return await self.broker.drain()

    def counted(self) -> Mapping[str, Any]:
        faked = isinstance(self.context.peers, Line)
        return {"link": {"up": 1, "commands": 7}} if faked else self.broker.counted()


class Running:
    """A broker that runs, its operators' port, and ways to talk to both."""

    def __init__(self, broker: Broker, port: int) -> None:
        self.broker = broker
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def http(self, token: str | None = TOKEN) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False) as client:
            yield client

    @asynccontextmanager
    async def session(self, user: str | None = None) -> AsyncIterator[Client]:
        headers = []
        if user is not None:
            headers = [(b"authorization", b"Bearer " + sign(AUTH, user, ttl=3600).encode())]
        # With a stream of our own: the library leaves one open whose other end closed first.
        async with (
            await trio.open_tcp_stream("127.0.0.1", self.broker.client_port) as stream,
            trio.open_nursery() as nursery,
        ):
            socket = await trio_websocket.wrap_client_stream(
                nursery, stream, "localhost", "/ws", extra_headers=headers
            )
            client = Client(socket)
            client.welcome = await client.next("welcome")
            yield client
            await socket.aclose()
            nursery.cancel_scope.cancel()


class Client:
    """A WebSocket client nobody here wrote, with batches taken apart."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._socket = socket
        self._waiting: list[dict[str, Any]] = []
        self.welcome: dict[str, Any] = {}

    @property
    def id(self) -> str:
        return str(self.welcome["session"])

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        await self._socket.send_message(json.dumps({"op": op, "id": 1, **fields}))
        answer = await self.receive()
        while answer.get("id") != 1:
            answer = await self.receive()
        return answer

    async def receive(self) -> dict[str, Any]:
        while not self._waiting:
            self._waiting = json.loads(await self._socket.get_message())
        return self._waiting.pop(0)

    async def next(self, op: str) -> dict[str, Any]:
        while (message := await self.receive())["op"] != op:
            pass
        return message

    async def close_code(self) -> int:
        reason = None
        while reason is None:
            try:
                await self._socket.get_message()
            except trio_websocket.ConnectionClosed as closed:
                reason = closed.reason
        return int(reason.code)


@asynccontextmanager
async def running(
    settings: Config | None = None, operations: Sequence[Operation] = OPERATIONS
) -> AsyncIterator[Running]:
    """Run a broker and its operators' port until the block ends; nothing of it is left after."""
    node = SeparatePort(settings or config())
    async with trio.open_nursery() as nursery:
        await nursery.start(node.broker.run)
        port = await nursery.start(AdminServer(node, operations).run)
        yield Running(node.broker, port)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def cluster(
    switchboard: Switchboard, *names: str, group: str = "", **changes: Any
) -> AsyncIterator[list[Running]]:
    """Brokers of these names that ask each other, each with an operators' port; workers if in a group."""
    async with trio.open_nursery() as nursery:
        found = []
        for name in names:
            settings = config(**{"node": name, **changes})
            line = switchboard.line(name, group)
            node = SeparatePort(settings, line)
            line.describes(node.broker.peers.nodes)
            questions.serve(node)
            await nursery.start(node.broker.run)
            found.append(Running(node.broker, await nursery.start(AdminServer(node).run)))
        yield found
        nursery.cancel_scope.cancel()


async def raw(port: int, request: bytes) -> bytes:
    """Send bytes as they are, and read until the other end closes."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        answer = b""
        try:
            while data := await stream.receive_some():
                answer += data
        except trio.BrokenResourceError:
            pass
        return answer
