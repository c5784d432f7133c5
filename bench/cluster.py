"""Several nodes on a real redis-server: who runs on which core, started and stopped together."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import redis

from bench.runner import Bench
from bench.servers import Process, Server, ServerError
from bench.tools import Unavailable
from broker.config import Redis as Settings
from broker.link.keys import Keys

_START_TIMEOUT = 15.0
_PREFIX = Settings().prefix

REDIS = "redis"
"""What the process is called in the tables."""


class Redis(Process):
    """A redis-server on a free port that keeps nothing on disk."""

    def __init__(self, core: int | None) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise Unavailable("redis-server was not found: install it (Debian: apt-get install redis-server)")
        self._folder = tempfile.TemporaryDirectory(prefix="bench-redis-")
        self.port = _free_port()
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": self._folder.name,
            "save": "",
            "appendonly": "no",
            # As docs/cluster.md recommends it.
            "client-output-buffer-limit": "pubsub 256mb 64mb 60",
        }
        command = [program]
        for name, value in settings.items():
            command += [f"--{name}", value]
        super().__init__(REDIS, core, command)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """For ``--redis``."""
        return f"redis://127.0.0.1:{self.port}/0"

    def tops(self, rooms: Sequence[str]) -> list[int]:
        """Offset of the newest stored event of each room."""
        keys = Keys(_PREFIX)
        with redis.Redis(port=self.port) as asking, asking.pipeline(transaction=False) as pipeline:
            for room in rooms:
                pipeline.hget(keys.meta(room), "offset")
            return [int(offset or 0) for offset in pipeline.execute()]

    def stop(self) -> None:
        super().stop()
        self._folder.cleanup()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            self.check()
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1) as asking,
            ):
                asking.sendall(b"PING\r\n")
                if asking.recv(64).startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise ServerError(f"redis-server was not ready within {_START_TIMEOUT:.0f} s")


class Cluster:
    """Nodes on a Redis of their own. A context manager: leaving it stops all.

    One node has the servers' core to itself, the last of ``names``; the others
    run on the load client's core, together with Redis.
    """

    def __init__(self, bench: Bench, names: Sequence[str]) -> None:
        self.nodes: list[Server] = []
        self.killed: list[Server] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.redis = stack.enter_context(Redis(bench.client_core))
            for name in names:
                core = bench.server_core if name == names[-1] else bench.client_core
                server = Server("broker", core, ["--redis", self.redis.url, "--node", name], name)
                self.nodes.append(stack.enter_context(server))
            self._stack = stack.pop_all()

    @property
    def ports(self) -> Sequence[int]:
        """Of the nodes, then of Redis."""
        return [*(node.port for node in self.nodes), self.redis.port]

    @property
    def processes(self) -> Sequence[Process]:
        """Nodes that have not been killed, and Redis."""
        return [*(node for node in self.nodes if node not in self.killed), self.redis]

    def kill(self, node: Server) -> None:
        """SIGKILL to one of the nodes, which is measured no more."""
        self.killed.append(node)
        node.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])
