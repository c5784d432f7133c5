"""The client port itself: listening, limits of the system, TLS settings, faults of connection tasks."""

from __future__ import annotations

import errno
import resource
import socket
import ssl
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from broker.config import Server as Settings
from broker.server.server import OUT_OF_RESOURCES_PAUSE, connection_limit, listen, make_tls_context
from tests.e2e.harness import config, jump, running, until
from tests.e2e.raw_client import RawClient, connected, opened, request, tcp


class StarvedListener:
    """A listener whose ``accept`` fails as long as the test says so."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.failure: int | None = None
        self.tries = 0

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()

    def accept(self) -> Any:
        self.tries += 1
        if self.failure is not None:
            raise OSError(self.failure, "as the test wants it")
        return self._listener.accept()


@pytest.mark.parametrize("failure", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_accept_backs_off_without_descriptors(failure: int) -> None:
    async with running() as broker:
        (real,) = listen(Settings(port=0))
        listener = StarvedListener(real)
        listener.failure = failure
        port = real.getsockname()[1]
        async with trio.open_nursery() as nursery:
            with structlog.testing.capture_logs() as logs:
                nursery.start_soon(broker.server._accept, cast("socket.socket", listener))
                async with await tcp(port):
                    for tries in range(1, 6):
                        await until(partial(_tried, listener, tries))
                        await wait_all_tasks_blocked(0.01)
                        assert listener.tries == tries, "once for each pause"
                        jump(OUT_OF_RESOURCES_PAUSE)
                    assert broker.context.registry.refused["descriptors"] == 5
                    listener.failure = None
                    await until(lambda: broker.context.registry.connections == 1)
            nursery.cancel_scope.cancel()
        assert [entry["log_level"] for entry in logs if "cannot accept" in entry["event"]] == ["warning"]
        real.close()


def _tried(listener: StarvedListener, times: int) -> bool:
    return listener.tries >= times


async def test_clients_that_gave_up_before_accept_cost_nothing() -> None:
    async with running() as broker:
        (real,) = listen(Settings(port=0))
        listener = StarvedListener(real)
        listener.failure = errno.ECONNABORTED
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.server._accept, cast("socket.socket", listener))
            async with await tcp(real.getsockname()[1]):
                await until(lambda: listener.tries > 3)
                listener.failure = None
                await until(lambda: broker.context.registry.connections == 1)
            nursery.cancel_scope.cancel()
        real.close()


async def test_a_fault_in_one_connection_ends_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as broker, connected(broker.client_port) as good:

        def broken(*_arguments: Any, **_options: Any) -> None:
            raise ZeroDivisionError("a fault of ours")

        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.setattr("broker.server.server.negotiate", broken)
            async with await tcp(broker.client_port) as stream:
                await stream.send_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
                assert await stream.receive_some() == b""
        assert broker.context.registry.refused == {"fault": 1}
        assert [entry["event"] for entry in logs] == ["fault in a connection"]
        assert (await good.ask("ping"))["op"] == "ok"


async def test_a_fault_before_welcome_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as broker:

        async def broken(*_arguments: Any) -> None:
            raise ZeroDivisionError("a fault of ours")

        monkeypatch.setattr("broker.server.identity.admit_anonymous", broken)
        async with opened(broker.client_port) as client:
            assert (await client.end()).code == 1006
        await until(lambda: broker.context.registry.closes == {1006: 1})


# -- what it stands on ----------------------------------------------------------------------------


def test_connections_are_limited_by_descriptors() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    granted = soft * 9 // 10
    assert connection_limit(config()) == granted
    assert connection_limit(config(limits={"connections": 10})) == 10
    assert connection_limit(config(limits={"connections": 100_000_000})) == granted
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft, "all that the system grants"


def test_every_address_of_the_host_gets_the_same_port() -> None:
    listeners = listen(Settings(host="localhost", port=0))
    try:
        assert len({sock.getsockname()[1] for sock in listeners}) == 1
        for sock in listeners:
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        for sock in listeners:
            sock.close()


def test_a_port_in_use_leaves_no_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, pytest.raises(OSError, match="in use"):
        listen(Settings(port=holder.getsockname()[1]))


def test_without_a_certificate_there_is_no_tls() -> None:
    assert make_tls_context(Settings()) is None


def test_tls_is_modern(tmp_path: Path) -> None:
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    both = str(tmp_path / "both.pem")
    context = make_tls_context(Settings(tls_cert=both, tls_key=both))
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION


# -- drain ------------------------------------------------------------------------


async def test_everybody_is_turned_out_once_and_the_port_stays_open() -> None:
    async with (
        running(config(server={"drain_timeout": 3600.0})) as broker,
        connected(broker.client_port) as one,
        connected(broker.client_port) as other,
    ):
        welcoming = [broker.ready]
        assert await broker.drain() == 2
        welcoming.append(broker.ready)
        assert welcoming == [True, False]
        assert await broker.drain() == 0  # nobody is told twice
        for client in (one, other):
            bye, code = await client.ended_with()
            assert bye is not None
            assert (bye["code"], code, bye["retry_after"] > 0) == (4503, 4503, True)
        await until(lambda: not broker.context.registry.sessions)
        async with await tcp(broker.client_port) as stream:
            assert await RawClient(stream).upgrade(request()) == 503


async def test_other_nodes_hear_of_a_drain_once_and_before_the_sessions_do() -> None:
    async with running() as broker, connected(broker.client_port) as client:
        endings = []

        async def part() -> None:
            await trio.lowlevel.checkpoint()
            endings.append([session.ending for session in broker.context.registry.sessions.values()])

        broker.peers.part = part  # type: ignore[method-assign]  # a node alone has nobody to tell
        await broker.drain()
        await broker.drain()
        assert (await client.ended_with())[1] == 4503
        await until(lambda: not broker.context.registry.sessions)
        broker.stop()
    assert endings == [[None]]
