"""A real nginx with config/deploy/nginx.conf, in front of nodes of a test."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

CONF = Path(__file__).parents[2] / "config" / "deploy" / "nginx.conf"
SERVERS = "        server 127.0.0.1:8765 max_fails=2 fail_timeout=5s;\n" + (
    "        server 127.0.0.1:8775 max_fails=2 fail_timeout=5s;\n"
)
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def program() -> str:
    """Where nginx is; skips the test where it is not."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    found = shutil.which("nginx", path=path)
    if found is None:
        pytest.skip("nginx is not here (Debian: apt-get install nginx-light)")
    return found


class Nginx:
    """The file as it stands, but for places: ports, certificates and what is written."""

    def __init__(self, folder: Path, nodes: Sequence[int]) -> None:
        self.program = program()
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        authority = trustme.CA()
        issued = authority.issue_cert("live.example.com")
        issued.private_key_pem.write_to_path(folder / "broker.key")
        issued.cert_chain_pems[0].write_to_path(folder / "broker.crt")
        self._trust = ssl.create_default_context()
        authority.configure_trust(self._trust)
        places = "".join(f"    {name}_temp_path {folder}/{name};\n" for name in TEMPORARY)
        servers = "".join(f"        server 127.0.0.1:{port} max_fails=2 fail_timeout=5s;\n" for port in nodes)
        text = CONF.read_text()
        for here, there in (
            ("user www-data;\n", ""),
            ("/run/nginx.pid", f"{folder}/nginx.pid"),
            ("worker_processes auto", "worker_processes 1"),
            ("worker_rlimit_nofile 100000", "worker_rlimit_nofile 1024"),
            ("worker_connections 40000", "worker_connections 512"),
            ("http {\n", "http {\n" + places),
            ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("/etc/nginx/broker.", f"{folder}/broker."),
            (SERVERS, servers),
        ):
            assert here in text, f"nginx.conf has no {here!r} any more"
            text = text.replace(here, there)
        self.conf = folder / "nginx.conf"
        self.conf.write_text(text)

    def command(self, *options: str) -> list[str]:
        """nginx with this file, saying what it has to say on standard error."""
        where = ["-p", str(self.folder), "-c", str(self.conf), "-e", "stderr"]
        return [self.program, *where, *options]

    async def connect(self) -> trio.SSLStream[trio.SocketStream]:
        """A TLS connection through it."""
        plain = await trio.open_tcp_stream("127.0.0.1", self.port)
        stream = trio.SSLStream(plain, self._trust, server_hostname="live.example.com", https_compatible=True)
        await stream.do_handshake()
        return stream


@asynccontextmanager
async def nginx(folder: Path, nodes: Sequence[int]) -> AsyncIterator[Nginx]:
    """nginx that answers; ended with the block."""
    server = Nginx(folder, nodes)
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        process = await trio.lowlevel.open_process(
            server.command("-g", "daemon off;"), stderr=said, stdin=subprocess.DEVNULL
        )
    finally:
        os.close(said)
    try:
        with trio.fail_after(20):
            await _answering(server, process)
        yield server
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()


async def _answering(server: Nginx, process: trio.Process) -> None:
    while True:
        assert process.poll() is None, (server.folder / "said").read_text()
        try:
            (await trio.open_tcp_stream("127.0.0.1", server.port)).socket.close()
        except OSError:
            await trio.sleep(0.02)
        else:
            return
