"""Clients that nobody here wrote: `websockets`, picows, Node's own; over TCP and TLS, with deflate.

asyncio clients run in a thread, Node as a process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import picows
import pytest
import trio
import trustme
import websockets.asyncio.client
import websockets.exceptions
import zstandard

from tests.e2e.harness import CONFIG, config, jump, running, until
from tests.e2e.raw_client import RawClient, connected, frame, request, tcp

LARGE = 40_000


async def in_thread(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine in a loop of asyncio: trio-asyncio, once imported, would put in one of its own."""

    def run() -> Any:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            return runner.run(main())

    return await trio.to_thread.run_sync(run)


class Talker:
    """A little comfort around `websockets`."""

    def __init__(self, socket: websockets.asyncio.client.ClientConnection) -> None:
        self.socket = socket
        self.waiting: list[dict[str, Any]] = []

    async def next(self) -> dict[str, Any]:
        while not self.waiting:
            received = await self.socket.recv()
            if isinstance(received, bytes):
                received = zstandard.ZstdDecompressor().decompress(received)
            self.waiting += json.loads(received)
        return self.waiting.pop(0)

    async def ask(self, **message: Any) -> dict[str, Any]:
        await self.socket.send(json.dumps({"id": 1, **message}, ensure_ascii=False))
        kept: list[dict[str, Any]] = []
        while True:
            found = await self.next()
            if found.get("id") == 1:
                self.waiting = kept + self.waiting
                return found
            kept.append(found)


async def converse(url: str, **options: Any) -> str:
    """Join, publish large and small, read it all back, close in good order; what was agreed."""
    async with websockets.asyncio.client.connect(url, max_size=None, **options) as socket:
        talker = Talker(socket)
        assert (await talker.next())["op"] == "welcome"
        assert (await talker.ask(op="join", room="deal:1"))["op"] == "ok"
        for size in (1, 200, LARGE):
            await talker.ask(op="publish", room="deal:1", event="e", data="äb" * (size // 2))
            assert (await talker.next())["data"] == "äb" * (size // 2)
        await (await socket.ping(b"hello"))
        agreed = [str(extension.name) for extension in socket.protocol.extensions]
        agreed.append(str(socket.subprotocol))
    assert socket.close_code == 1000
    return " ".join(agreed)


@pytest.mark.parametrize(
    ("options", "agreed"),
    [
        ({"compression": None}, "None"),
        ({}, "permessage-deflate None"),
        ({"subprotocols": ["broker.v1.json"], "compression": None}, "broker.v1.json"),
        ({"subprotocols": ["broker.v1.zstd"], "compression": None}, "broker.v1.zstd"),
        ({"subprotocols": ["broker.v1.zstd", "broker.v1.json"]}, "broker.v1.zstd"),
        ({"subprotocols": ["broker.v1.json", "broker.v1.zstd"]}, "permessage-deflate broker.v1.json"),
    ],
)
async def test_websockets(options: dict[str, Any], agreed: str) -> None:
    async with running() as broker:
        url = f"ws://127.0.0.1:{broker.client_port}/ws"
        assert await in_thread(lambda: converse(url, **options)) == agreed


async def test_websockets_is_told_why() -> None:
    async def refused(url: str, **options: Any) -> int:
        async with websockets.asyncio.client.connect(url, **options) as socket:
            await socket.wait_closed()
            assert socket.close_code is not None
            return socket.close_code

    async def turned_away(url: str, **options: Any) -> int:
        try:
            async with websockets.asyncio.client.connect(url, **options):
                return 101
        except websockets.exceptions.InvalidStatus as answer:
            return answer.response.status_code

    async with running() as broker:
        base = f"ws://127.0.0.1:{broker.client_port}"
        headers = {"Authorization": "Bearer nonsense"}
        assert await in_thread(lambda: refused(f"{base}/ws", additional_headers=headers)) == 4401
        assert await in_thread(lambda: turned_away(f"{base}/nowhere")) == 404
        assert await in_thread(lambda: turned_away(f"{base}/ws", origin="https://evil.example")) == 403
        assert await in_thread(lambda: turned_away(f"{base}/ws", subprotocols=["mqtt"])) == 400


class Listener(picows.WSListener):
    """Joins and publishes; ends when its own event has come back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        for message in (
            {"op": "join", "room": "deal:1", "id": 1},
            {"op": "publish", "room": "deal:1", "event": "e", "data": "x" * LARGE, "id": 2},
        ):
            transport.send(picows.WSMsgType.TEXT, json.dumps(message).encode())

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.TEXT:
            self.seen += json.loads(frame.get_payload_as_bytes())
            if any(message.get("id") == 2 for message in self.seen):
                transport.send_close(picows.WSCloseCode.OK)
        elif frame.msg_type == picows.WSMsgType.CLOSE:
            transport.disconnect()


async def test_picows() -> None:
    async def talk(url: str) -> list[dict[str, Any]]:
        transport, listener = await picows.ws_connect(Listener, url)
        await transport.wait_disconnected()
        assert isinstance(listener, Listener)
        return listener.seen

    async with running() as broker:
        seen = await in_thread(lambda: talk(f"ws://127.0.0.1:{broker.client_port}/ws"))
        assert [message["op"] for message in seen] == ["welcome", "ok", "event", "ok"]
        assert seen[2]["data"] == "x" * LARGE


NODE = """
const socket = new WebSocket(process.argv[1], ["broker.v1.json"]);
socket.onmessage = ({ data }) => {
  for (const message of JSON.parse(data)) {
    if (message.op === "welcome") {
      socket.send(JSON.stringify([{ op: "join", room: "deal:1", id: 1 },
        { op: "publish", room: "deal:1", event: "e", data: "ä".repeat(20000), id: 2 }]));
    } else if (message.op === "event") {
      console.log(message.data.length);
    } else if (message.id === 2) {
      socket.close(1000, "done");
    }
  }
};
socket.onclose = ({ code, wasClean }) => console.log(code, wasClean);
"""


def node_with_websocket() -> list[str] | None:
    """How to start a Node that has a WebSocket of its own."""
    node = shutil.which("node")
    if node is None:
        return None
    for options in ([], ["--experimental-websocket"]):
        found = subprocess.run(
            [node, *options, "-p", "typeof WebSocket"], capture_output=True, text=True, check=False
        )
        if found.stdout.strip() == "function":
            return [node, *options]
    return None


async def test_node() -> None:
    node = node_with_websocket()
    if node is None:
        pytest.skip("needs Node 20.10 or later, which has a WebSocket of its own")
    async with running() as broker:
        url = f"ws://127.0.0.1:{broker.client_port}/ws"
        # It warns on standard error that its WebSocket is experimental.
        ended = await trio.run_process([*node, "-e", NODE, url], capture_stdout=True, capture_stderr=True)
        assert ended.stdout.decode().split("\n") == ["20000", "1000 true", ""]


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ssl.SSLContext]:
    authority = trustme.CA()
    folder = tmp_path_factory.mktemp("tls")
    server = authority.issue_cert("127.0.0.1", "localhost")
    cert, key = folder / "cert.pem", folder / "key.pem"
    for number, blob in enumerate(server.cert_chain_pems):
        blob.write_to_path(cert, append=number > 0)
    server.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return cert, key, trusting


Certificates = tuple[Path, Path, ssl.SSLContext]


def with_tls(certificates: Certificates, **tables: Any) -> Any:
    cert, key, _ = certificates
    return config(server={"tls_cert": str(cert), "tls_key": str(key)}, **tables)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_with_websockets(certificates: Certificates, version: ssl.TLSVersion) -> None:
    trusting = certificates[2]
    trusting.minimum_version, trusting.maximum_version = ssl.TLSVersion.TLSv1_2, version
    async with running(with_tls(certificates)) as broker:
        assert broker.ready_line().startswith("ready wss://")
        url = f"wss://localhost:{broker.client_port}/ws"
        agreed = await in_thread(lambda: converse(url, ssl=trusting))
        assert agreed == "permessage-deflate None"
    trusting.maximum_version = ssl.TLSVersion.TLSv1_3


async def test_large_messages_over_tls_in_both_directions(certificates: Certificates) -> None:
    async def echo(url: str) -> None:
        async with websockets.asyncio.client.connect(
            url, ssl=certificates[2], max_size=None, compression=None
        ) as socket:
            for size in (16_383, 16_384, 16_385, 65_536, 5_000_000):
                await socket.send(b"\x5a" * size)
                assert await socket.recv() == b"\x5a" * size

    async with running(with_tls(certificates)) as broker:
        await in_thread(lambda: echo(f"wss://localhost:{broker.client_port}/echo"))


async def tls(port: int, certificates: Certificates) -> trio.SSLStream[trio.SocketStream]:
    sock = trio.socket.socket()
    sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
    await sock.connect(("127.0.0.1", port))
    return trio.SSLStream(trio.SocketStream(sock), certificates[2], server_hostname="localhost")


@pytest.mark.parametrize("room", ["deal:1", "live:1"])
async def test_a_slow_reader_over_tls_gets_all_of_it(certificates: Certificates, room: str) -> None:
    """Short writes, records that OpenSSL holds back, and a backlog, yet every byte in its place."""
    settings = with_tls(certificates, limits={"outbox_bytes": 8 << 20})
    async with running(settings) as broker:
        reader = RawClient(await tls(broker.client_port, certificates))
        talker = RawClient(await tls(broker.client_port, certificates))
        for client in (reader, talker):
            assert await client.upgrade(request()) == 101
            await client.next()
        await reader.ask("join", room=room)
        for number in range(60):
            await talker.ask("publish", room=room, event="e", data=[number, "z" * 50_000])
        assert broker.traffic.queued > 0
        for number in range(60):
            assert (await reader.event())["data"][0] == number
        for client in (reader, talker):
            await client.close()


async def test_a_deaf_reader_over_tls_is_bounded_and_ends(certificates: Certificates) -> None:
    settings = with_tls(certificates, limits={"outbox_bytes": 65_536})
    async with running(settings) as broker:
        reader = RawClient(await tls(broker.client_port, certificates))
        talker = RawClient(await tls(broker.client_port, certificates))
        for client in (reader, talker):
            assert await client.upgrade(request()) == 101
            await client.next()
        await reader.ask("join", room="live:1")
        while not broker.traffic.refused:
            await talker.ask("publish", room="live:1", event="e", data="z" * 10_000)
            assert broker.traffic.queued < 100_000
        jump(CONFIG.server.close_timeout + 0.1)
        await until(lambda: broker.context.registry.closes.get(4508) == 1)
        await talker.close()
        await trio.aclose_forcefully(reader.stream)


async def test_many_small_messages_in_one_record_over_tls(certificates: Certificates) -> None:
    async with running(with_tls(certificates)) as broker:
        client = RawClient(await tls(broker.client_port, certificates))
        assert await client.upgrade(request()) == 101
        await client.next()
        text = b'{"op":"ping","id":%d}'
        await client.send_bytes(b"".join(frame(1, text % number) for number in range(500)))
        for number in range(500):
            assert (await client.next())["id"] == number
        await client.close()


async def test_small_request_limit_over_tls_reads_on(certificates: Certificates) -> None:
    """A record may hold more than was read of it; the poll object cannot see that."""
    settings = with_tls(certificates, limits={"request_bytes": 256})
    async with running(settings) as broker:
        client = RawClient(await tls(broker.client_port, certificates))
        early = b"".join(frame(1, b'{"op":"ping","id":%d}' % number) for number in range(100))
        assert await client.upgrade(request() + early) == 101
        await client.next()
        for number in range(100):
            assert (await client.next())["id"] == number
        await client.close()


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(100)])
async def test_who_cannot_shake_hands_over_tls_ends(certificates: Certificates, hello: bytes) -> None:
    async with running(with_tls(certificates)) as broker, await tcp(broker.client_port) as stream:
        await stream.send_all(hello)
        await until(lambda: broker.context.registry.accepted == 1)
        jump(CONFIG.server.handshake_timeout + 0.1)
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        await until(lambda: sum(broker.context.registry.refused.values()) == 1)


async def test_a_plain_and_a_foreign_client_in_one_room() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        await client.ask("join", room="deal:1")
        await in_thread(lambda: converse(f"ws://127.0.0.1:{broker.client_port}/ws"))
        assert [len(event["data"]) for event in await client.take(3)] == [0, 200, LARGE]
