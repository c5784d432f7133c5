"""Targets, and the edges of one connection that no script of a whole session reaches."""

from __future__ import annotations

import ssl

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.client import ConnectFailed, ConnectionLost
from broker.client.link import QUEUE, Target
from tests.client.scripted_server import ScriptedServer, client_of, failure


@pytest.mark.parametrize(
    ("url", "host", "port", "resource", "authority"),
    [
        ("ws://broker.test/ws", "broker.test", 80, "/ws", "broker.test"),
        ("ws://broker.test", "broker.test", 80, "/", "broker.test"),
        ("ws://127.0.0.1:8765/ws?x=1&y", "127.0.0.1", 8765, "/ws?x=1&y", "127.0.0.1:8765"),
        ("wss://broker.test/ws", "broker.test", 443, "/ws", "broker.test"),
        ("wss://broker.test:80/ws", "broker.test", 80, "/ws", "broker.test:80"),
        ("ws://[::1]:8765/ws", "::1", 8765, "/ws", "[::1]:8765"),
    ],
)
def test_targets(url: str, host: str, port: int, resource: str, authority: str) -> None:
    target = Target.parse(url, None)
    assert (target.host, target.port, target.resource, target.authority) == (host, port, resource, authority)
    assert (target.secure is not None) == url.startswith("wss")


def test_a_tls_context_is_used_as_given() -> None:
    context = ssl.create_default_context()
    assert Target.parse("wss://broker.test", context).secure is context


class BrokenStream(trio.abc.Stream):
    """A connection that is gone before the first byte leaves."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("reset")

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError("reset")

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class BrokenOnReceive(BrokenStream):
    """A connection that takes the request, and is gone."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", [BrokenStream, BrokenOnReceive])
async def test_a_connection_reset_during_the_upgrade(
    autojump_clock: MockClock, kind: type[BrokenStream]
) -> None:
    async def script(server: ScriptedServer) -> None:
        pass

    async def open_stream() -> trio.abc.Stream:
        return kind()

    error = await failure(script, open_stream=open_stream)
    assert isinstance(error, ConnectFailed)
    assert "reset" in str(error)


async def test_requests_in_line_fail_with_the_connection(autojump_clock: MockClock) -> None:
    lost = 0

    async def script(server: ScriptedServer) -> None:
        peer = await server.accept(limits={"message": 65536, "batch": 1})
        await wait_all_tasks_blocked()
        await peer.drop()
        await (await server.accept()).gone()

    async with client_of(script, lockstep=True) as (client, _):

        async def call() -> None:
            nonlocal lost
            try:
                await client.call("x")
            except ConnectionLost:
                lost += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3 * QUEUE):
                nursery.start_soon(call)
        assert lost == 3 * QUEUE
        await trio.sleep(5)


async def test_a_cancelled_request_tears_no_frame(autojump_clock: MockClock) -> None:
    async def script(server: ScriptedServer) -> None:
        peer = await server.accept()
        await trio.sleep(3)
        await peer.expect("publish")  # the whole frame, although its sender is long gone
        await peer.ok(await peer.expect("ping"), ts=1)
        await peer.gone()

    async with client_of(script, lockstep=True) as (client, _):
        with trio.move_on_after(1):
            await client.publish("a", "e", "x" * 60_000)
        assert await client.ping() == 1
