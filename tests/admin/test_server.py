"""A fault, a crash, a stall, a flood at the operators' port: the sessions must not notice."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog.testing
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker import logs
from broker.admin import server as admin_server
from broker.admin import web
from broker.admin.api import OPERATIONS
from broker.admin.guard import ANSWER_SECONDS
from broker.admin.models import Health
from broker.admin.operations import Call, Operation
from broker.admin.server import bind
from broker.app import Broker
from broker.auth.failures import FREE_FAILURES
from broker.config import Admin
from tests.admin.harness import TOKEN, Client, Running, config, raw, running

UPGRADE = (
    b"GET /api/stats HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
CRASHES = {
    "a byte behind an upgrade": UPGRADE + b"\r\nX",
    "a body with an upgrade": UPGRADE + b"Content-Length: 5\r\n\r\nhello",
    "a subprotocol that is not ASCII": UPGRADE + b"Sec-WebSocket-Protocol: \xff\r\n\r\n",
}
"""Each raised out of Hypercorn 0.18's connection handler, and so ended its server."""


@asynccontextmanager
async def undisturbed(node: Running) -> AsyncIterator[Client]:
    """A session that must be there, in order and without a hole, when the block has ended."""
    async with node.session() as session:
        await session.ask("join", room="deal:1")
        first = await session.ask("publish", room="deal:1", event="before", data=1)
        yield session
        second = await session.ask("publish", room="deal:1", event="after", data=2)
        assert second["offset"] == first["offset"] + 1
        assert list(node.broker.context.registry.sessions) == [session.id]


# -- connections that fail -------------------------------------------------------------


@pytest.mark.parametrize("name", CRASHES)
async def test_what_ends_hypercorn_ends_one_connection_here(name: str) -> None:
    with structlog.testing.capture_logs() as lines:
        async with running() as node, node.http() as http, undisturbed(node):
            before = (await http.get("/api/stats")).json()["admin"]
            for _ in range(3):
                await raw(node.port, CRASHES[name])
            after = (await http.get("/api/stats")).json()["admin"]  # on the connection it had
        assert after["restarts"] == before["restarts"] == 0
        assert len([entry for entry in lines if "connection" in entry["event"]]) <= 1


async def test_a_contained_fault_is_counted_and_logged_once() -> None:
    with structlog.testing.capture_logs() as lines:
        async with running() as node, node.http() as http, undisturbed(node):
            for _ in range(5):
                await raw(node.port, CRASHES["a subprotocol that is not ASCII"])
            await _faults(http, 5)
        (entry,) = [entry for entry in lines if entry["log_level"] == "warning"]
        assert entry["event"] == "a connection of the operators' port failed"


async def _faults(http: httpx.AsyncClient, wanted: int) -> None:
    """Wait until that many were counted: a connection is closed a little before its fault is."""
    while (await http.get("/api/stats")).json()["admin"]["faults"] != wanted:
        await trio.lowlevel.checkpoint()


async def test_a_websocket_is_refused() -> None:
    async with running() as node:
        assert b" 403 " in await raw(node.port, UPGRADE + b"\r\n")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 40,
        b"GET /%ff%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /api/publish HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
    ],
)
async def test_garbage_is_answered_or_cut(request_: bytes) -> None:
    async with running() as node, node.http() as http, undisturbed(node):
        async with await trio.open_tcp_stream("127.0.0.1", node.port) as stream:
            try:
                await stream.send_all(request_)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        assert (await http.get("/healthz")).status_code == 200


async def test_further_connections_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "CONNECTIONS", 2)
    async with running() as node, undisturbed(node):
        async with (
            await trio.open_tcp_stream("127.0.0.1", node.port),
            await trio.open_tcp_stream("127.0.0.1", node.port),
        ):
            assert b" 503 " in await raw(node.port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while b" 200 " not in answer:  # as soon as the server has seen them go
            answer = await raw(node.port, b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")


async def test_a_client_that_sends_nothing_is_cut(mock_clock: MockClock) -> None:
    async with running() as node, await trio.open_tcp_stream("127.0.0.1", node.port) as silent:
        await silent.send_all(b"GET /healthz HT")
        await _connections(node, 1)
        mock_clock.jump(ANSWER_SECONDS + 1)
        assert await silent.receive_some() == b""


async def _connections(node: Running, wanted: int) -> None:
    """Wait until the port has that many, as another one would be told; it does not count itself."""
    async with node.http() as http:
        while (await http.get("/api/stats")).json()["admin"]["connections"] - 1 != wanted:
            await trio.lowlevel.checkpoint()


# -- handlers that fail ------------------------------------------------------------------


async def _raise(_call: Call) -> Any:
    raise RuntimeError("an injected fault")


class Stall:
    """A handler that never answers, and says when it was entered."""

    def __init__(self) -> None:
        self.entered = 0

    async def __call__(self, _call: Call) -> Any:
        self.entered += 1
        await trio.sleep_forever()


def operations(handler: Any, *, body: type | None = None) -> tuple[Operation, ...]:
    method: Any = "POST" if body is not None else "GET"
    return (*OPERATIONS, Operation(method, "/api/faulty", "faulty", "Faulty", handler, Health, body=body))


async def test_a_fault_in_a_handler_is_an_answer() -> None:
    with structlog.testing.capture_logs() as lines:
        async with running(operations=operations(_raise)) as node, node.http() as http, undisturbed(node):
            answer = await http.get("/api/faulty")
            assert (answer.status_code, answer.json()["code"]) == (500, "internal")
            assert "injected" not in answer.text  # for the log, not for the client
            assert (await http.get("/api/stats")).json()["admin"]["faults"] == 1
        (entry,) = [entry for entry in lines if entry["log_level"] == "error"]
        assert entry["operation"] == "faulty"


async def test_a_handler_that_stalls_ends_in_time(mock_clock: MockClock) -> None:
    stall = Stall()
    async with (
        running(operations=operations(stall)) as node,
        node.http() as http,
        undisturbed(node),
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            answer = await http.get("/api/faulty", timeout=None)
            assert (answer.status_code, answer.json()["code"]) == (504, "timeout")
            nursery.cancel_scope.cancel()

        nursery.start_soon(ask)
        while not stall.entered:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(web.REQUEST_SECONDS)


async def test_stalled_handlers_leave_health_and_sessions_alone() -> None:
    stall = Stall()
    async with (
        running(operations=operations(stall)) as node,
        node.http() as http,
        undisturbed(node),
        trio.open_nursery() as nursery,
    ):
        for _ in range(web.CONCURRENT):
            nursery.start_soon(raw, node.port, _get("/api/faulty"))
        while stall.entered < web.CONCURRENT:
            await trio.lowlevel.checkpoint()
        answer = await http.get("/api/stats")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"] == "1"
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        nursery.cancel_scope.cancel()


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()


async def test_wrong_tokens_are_answered_later_and_later(autojump_clock: MockClock) -> None:
    async with running() as node, node.http(token="guess") as guesser:
        waits = []
        for _ in range(FREE_FAILURES + 3):
            started = trio.current_time()
            assert (await guesser.get("/api/stats", timeout=None)).status_code == 401
            waits.append(trio.current_time() - started)
        async with node.http() as operator:
            started = trio.current_time()
            assert (await operator.get("/openapi.json")).status_code == 200
            assert trio.current_time() == started
    assert waits == pytest.approx([0.0] * FREE_FAILURES + [0.25, 0.5, 1.0])


# -- bodies ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [web.BODY_BYTES + 1, 3_000_000])
async def test_a_body_that_is_too_large_is_refused_and_read_away(size: int) -> None:
    async with running() as node, undisturbed(node):
        head = (
            b"POST /api/publish HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer let-me-in\r\n"
            b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size
        )
        answer = await raw(node.port, head + b" " * size)
        assert b" 413 " in answer
        assert b'"too_large"' in answer


async def test_a_body_that_never_ends_is_refused() -> None:
    async with running() as node, undisturbed(node):
        head = (
            b"POST /api/publish HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer let-me-in\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        async with await trio.open_tcp_stream("127.0.0.1", node.port) as stream:
            await stream.send_all(head)
            async with trio.open_nursery() as nursery:

                async def flood() -> None:
                    try:
                        while True:
                            await stream.send_all(b"3e8\r\n%b\r\n" % (b" " * 1000))
                    except trio.BrokenResourceError:
                        pass

                nursery.start_soon(flood)
                assert b" 413 " in await stream.receive_some()
                nursery.cancel_scope.cancel()


async def test_a_client_that_leaves_within_its_body_is_no_fault() -> None:
    async with running() as node, node.http() as http, undisturbed(node):
        async with await trio.open_tcp_stream("127.0.0.1", node.port) as stream:
            await stream.send_all(
                b"POST /api/publish HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer let-me-in\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            await _connections(node, 1)
        await _connections(node, 0)
        assert (await http.get("/api/stats")).json()["admin"]["faults"] == 0


# -- the whole server --------------------------------------------------------------------


def stop_listening(port: int) -> int:
    """Break every listening socket of this process on ``port``, as a fault of the system would."""
    broken = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        with copy:
            try:
                listens = copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and copy.getsockname()[1] == port:
                    copy.shutdown(socket.SHUT_RDWR)
                    broken += 1
            except OSError:
                continue
    return broken


async def test_a_server_that_crashes_starts_again_on_its_port(mock_clock: MockClock) -> None:
    pauses: list[float] = []
    with structlog.testing.capture_logs() as lines:
        async with running() as node, undisturbed(node):
            for steady in (0.0, 5.0, admin_server.STEADY_SECONDS):  # a long good run is forgiven
                mock_clock.jump(steady)
                assert stop_listening(node.port)
                while len(pauses) == len(found := [entry for entry in lines if "pause" in entry]):
                    await trio.lowlevel.checkpoint()
                pauses.append(found[-1]["pause"])
                mock_clock.jump(pauses[-1] + 0.1)
                await wait_all_tasks_blocked()
                async with node.http() as http:  # waits in the socket's queue until it is served
                    assert (await http.get("/api/stats")).json()["admin"]["restarts"] == len(pauses)
    assert pauses == [0.1, 0.2, 0.1]


async def test_a_client_that_does_not_read_does_not_hold_the_end() -> None:
    """Hypercorn's writes are shielded: without the guard this test would never end."""

    async def much(_call: Call) -> Any:
        return "x" * 30_000_000

    async with running(operations=operations(much)) as node:
        stream = await trio.open_tcp_stream("127.0.0.1", node.port)
        await stream.send_all(_get("/api/faulty"))
        await stream.receive_some(100)
        await wait_all_tasks_blocked()
    await stream.aclose()


# -- binding -------------------------------------------------------------------------------


async def test_the_broker_runs_its_port_and_names_it() -> None:
    broker = Broker(config())
    async with trio.open_nursery() as nursery:
        await nursery.start(broker.run)
        assert broker.admin_port > 0
        async with Running(broker, broker.admin_port).http() as http:
            assert (await http.get("/api/stats")).json()["node"] == "test-node"
        nursery.cancel_scope.cancel()


def test_a_port_that_is_taken_is_named() -> None:
    (first,) = bind("127.0.0.1", 0)
    with first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"admin port 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


def test_a_name_with_several_addresses_has_one_port() -> None:
    sockets = bind("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    finally:
        for sock in sockets:
            sock.close()


async def test_open_on_loopback_end_to_end() -> None:
    async with running(config(Admin(port=0, open_on_loopback=True))) as node, node.http(token=None) as http:
        assert (await http.get("/api/stats")).status_code == 200
        for headers in (
            {"host": "evil.example"},
            {"origin": "http://evil.example"},
            {"x-forwarded-for": "203.0.113.7"},
        ):
            answer = await http.get("/api/stats", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_nothing_is_written_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logs.configure("info", "json")
    try:
        async with running(operations=operations(_raise)) as node, node.http() as http:
            for path in ("/api/stats", "/nothing", "/api/faulty"):
                await http.get(path)
            await raw(node.port, CRASHES["a subprotocol that is not ASCII"])
            await _faults(http, 2)
    finally:
        structlog.reset_defaults()
        root.handlers[:] = handlers
        root.setLevel(level)
    written = capfd.readouterr()
    assert written.out == ""
    assert len(written.err.splitlines()) == 2  # the two faults, one line each
