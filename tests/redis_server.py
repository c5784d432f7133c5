"""A real redis-server for tests: started on a free port, told what to do, ended by its own process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

MISSING = "redis-server is not installed: apt-get install redis-server (make test does it where it may)"
STARTUP = 15.0
"""Seconds of real time after which a server that does not answer fails the test."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RedisServer:
    """One redis-server process. ``options`` are those of redis.conf: ``RedisServer(appendonly="yes")``."""

    host = "127.0.0.1"
    """Where clients find it."""
    runner: tuple[str, ...] = ()
    """What runs the program, in its own place: ``ip netns exec NAME``."""

    def __init__(self, directory: Path, port: int | None = None, **options: Any) -> None:
        self.directory = directory
        self.port = port or free_port()
        self._options = {"save": "", "appendonly": "no", **options}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://{self.host}:{self.port}/0"

    @property
    def pid(self) -> int:
        """The process that runs now."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, on the port that it had before, and return when it answers."""
        program = shutil.which("redis-server")
        assert program is not None, MISSING
        line = [
            *self.runner,
            program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.directory),
        ]
        for name, value in self._options.items():
            line += [f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else map(str, value))]
        log = (self.directory / "redis.log").open("ab")
        with log:
            self._process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + STARTUP
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.exceptions.BusyLoadingError):
                with self.client() as client:
                    client.ping()
                return
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError((self.directory / "redis.log").read_text())
            time.sleep(0.01)

    def client(self, **options: Any) -> redis.Redis:
        """A client of its own, which does not repeat commands."""
        return redis.Redis(self.host, self.port, retry=Retry(NoBackoff(), 0), **options)

    def signal(self, number: int) -> None:
        """Send a signal to exactly this process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """kill -9, and wait for it."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it without closing anything."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever state it is in; nothing happens when it has ended."""
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        self._process.wait()
        self._process = None


@contextlib.contextmanager
def redis_server(port: int | None = None, **options: Any) -> Iterator[RedisServer]:
    """A server that runs inside the block."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        server = RedisServer(Path(directory), port, **options)
        server.start()
        try:
            yield server
        finally:
            server.stop()
