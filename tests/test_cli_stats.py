"""``broker stats`` against a small HTTP server that answers what it is told to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.cli import broker
from broker.cli_options import Exit
from broker.cli_stats import flatten, per_second

FOUND = {"hub": {"rooms": 1234, "ratio": 0.25, "open": True}, "node": "a b", "\x1b[31m": None}


class AdminPort(ThreadingHTTPServer):
    """Answers ``GET /api/stats`` with what it holds; remembers tokens."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.body: bytes = json.dumps(FOUND).encode()
        self.tokens: list[str | None] = []
        self.paths: list[str] = []
        self.asked_twice = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: AdminPort

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers["authorization"])
        self.server.paths.append(self.path)
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)
        if len(self.server.paths) >= 2:
            self.server.asked_twice.set()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Keep the test's output clean."""


@pytest.fixture
def admin() -> Iterator[AdminPort]:
    with AdminPort() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def stats(*args: str, **env: str) -> Result:
    return CliRunner().invoke(broker, ["stats", *args], env={"BROKER_ADMIN_TOKEN": None, **env})


def test_statistics_as_lines(admin: AdminPort) -> None:
    result = stats("--admin", admin.url + "/")
    assert result.exit_code == Exit.OK
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()] == [
        ["hub.rooms", "1,234"],
        ["hub.ratio", "0.25"],
        ["hub.open", "true"],
        ["node", '"a b"'],
        ['"\\u001b[31m"', "null"],
    ]
    assert (admin.paths, admin.tokens) == (["/api/stats"], [None])


def test_statistics_as_json(admin: AdminPort) -> None:
    result = stats("--admin", admin.url, "--json", "--admin-token", "t")
    assert json.loads(result.stdout) == FOUND
    assert admin.tokens == ["Bearer t"]


def test_the_token_comes_from_the_environment(admin: AdminPort) -> None:
    stats("--admin", admin.url, BROKER_ADMIN_TOKEN="e")
    assert admin.tokens == ["Bearer e"]


@pytest.mark.parametrize(
    ("status", "body", "code", "sentence"),
    [
        (401, b"{}", Exit.REFUSED, "not allowed (401); give --admin-token"),
        (403, b"{}", Exit.REFUSED, "not allowed (403)"),
        (503, b'{"code": "unavailable", "message": "draining"}', Exit.FAILED, "draining (503)"),
        (200, b"<html>", Exit.FAILED, '"not the admin port of a broker" (200)'),
        (200, b"[]", Exit.FAILED, '"not the admin port of a broker" (200)'),
        (200, b"\xff", Exit.FAILED, '"not the admin port of a broker" (200)'),
    ],
)
def test_refusals(status: int, body: bytes, code: Exit, sentence: str, admin: AdminPort) -> None:
    admin.status, admin.body = status, body
    result = stats("--admin", admin.url)
    assert result.exit_code == code
    assert sentence in result.stderr
    assert result.stdout == ""


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        result = stats("--admin", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == Exit.UNREACHABLE
    assert "/api/stats: " in result.stderr


@pytest.mark.parametrize("url", ["http://[", "ftp://127.0.0.1:1", "127.0.0.1"])
def test_an_address_that_is_none(url: str) -> None:
    assert stats("--admin", url).exit_code in {Exit.USAGE, Exit.UNREACHABLE}


@pytest.mark.parametrize("where", ["pipe", "terminal"])
def test_watching_asks_again_and_ctrl_c_ends_it_quietly(where: str, admin: AdminPort) -> None:
    leader, follower = os.openpty() if where == "terminal" else os.pipe()
    command = [sys.executable, "-m", "broker", "stats", "--admin", admin.url, "--watch", "--every", "0.1"]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE)
    try:
        assert admin.asked_twice.wait(30)
        process.send_signal(2)
        _, complaint = process.communicate(timeout=30)
        assert (process.returncode, complaint.strip()) == (Exit.INTERRUPTED, b"")
        assert b"hub.rooms" in os.read(leader, 65536)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def test_rates() -> None:
    assert per_second(1, 3, 2.0) == "+1.0"
    assert per_second(3, 1, 2.0) == "-1.0"
    assert per_second(1, 1, 2.0) == ""
    assert per_second(None, 1, 2.0) == ""
    assert per_second(False, True, 2.0) == ""
    assert per_second(1, 3, 0.0) == ""


def test_flattening() -> None:
    assert list(flatten({"a": {"b": 1, "c": {}}, "d": [1]})) == [("a.b", 1), ("d", [1])]
