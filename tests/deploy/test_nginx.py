"""config/deploy/nginx.conf with a real nginx: WebSocket through TLS, over nodes of which one drains."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import trio

from broker.config import Server
from tests.admin.fakes import Switchboard
from tests.admin.harness import cluster
from tests.deploy.nginx import CONF, Nginx, nginx
from tests.e2e.raw_client import RawClient, request

PROXIED = Server(port=0, trusted_proxies=("127.0.0.1",))


def test_nginx_finds_no_fault(tmp_path: Path) -> None:
    server = Nginx(tmp_path, [8765, 8775])
    done = subprocess.run(server.command("-t", "-q"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_idle_sessions_are_kept_longer_than_pings_take() -> None:
    text = CONF.read_text()
    server = Server()
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        (seconds,) = re.findall(rf"{name} (\d+)s;", text)
        assert float(seconds) > server.ping_interval * 1.1 + server.pong_timeout


async def ask(server: Nginx, path: str) -> tuple[int, bytes]:
    """One request: its status and all of its answer."""
    head = f"GET {path} HTTP/1.1\r\nHost: live.example.com\r\nConnection: close\r\n\r\n"
    async with await server.connect() as stream:
        await stream.send_all(head.encode())
        answer = b""
        while data := await stream.receive_some():
            answer += data
        return int(answer.split(b" ")[1]), answer


class Callers:
    """Clients that come through nginx; all are gone when the block ends."""

    def __init__(self, server: Nginx) -> None:
        self._server = server
        self._streams: list[trio.SSLStream[trio.SocketStream]] = []

    async def __aenter__(self) -> Callers:
        return self

    async def __aexit__(self, *_error: object) -> None:
        for stream in self._streams:
            await trio.aclose_forcefully(stream)

    async def call(self) -> RawClient:
        """Upgrade and be welcomed."""
        stream = await self._server.connect()
        self._streams.append(stream)
        client = RawClient(stream)
        headers = (("Origin", "https://localhost"), ("X-Forwarded-For", "198.51.100.7"))
        assert await client.upgrade(request(headers=headers)) == 101, client.head
        client.welcome = await client.next()
        return client


async def test_sessions_go_to_the_emptiest_node_and_never_to_one_that_drains(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with (
            cluster(Switchboard(), "n1", "n2", server=PROXIED) as (one, two),
            nginx(tmp_path, [one.broker.client_port, two.broker.client_port]) as server,
            Callers(server) as callers,
        ):
            clients = [await callers.call() for _ in range(4)]
            assert Counter(client.welcome["node"] for client in clients) == {"n1": 2, "n2": 2}
            await clients[0].ask("join", room="live")
            await clients[0].ask("publish", room="live", event="e", data="through")
            sessions = one.broker.context.registry.sessions.values()
            assert {session.address for session in sessions} == {"198.51.100.7"}, "nginx passes on who it is"
            async with two.http() as http:
                assert (await http.post("/api/drain", json={})).json()["told"] == 2
            late = [await callers.call() for _ in range(4)]
            assert {client.welcome["node"] for client in late} == {"n1"}


async def test_nothing_but_the_clients_port_can_be_reached(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with (
            cluster(Switchboard(), "n1", server=PROXIED) as (one,),
            nginx(tmp_path, [one.broker.client_port]) as server,
        ):
            assert (await ask(server, "/healthz"))[0] == 200
            assert (await ask(server, "/ws"))[0] == 426
            for path in ("/", "/api/stats", "/metrics", "/readyz", "/echo", "/ws/x", "//api/stats"):
                assert (await ask(server, path))[0] == 404, path
