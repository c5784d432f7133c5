"""Where faults happen: a broker, or several and their Redis, as processes that were started for it.

A *house* is one way to put them together. Every process is one that this module
started, in a session of its own, and is ended by its own id when the house is
left, whatever happened inside.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import redis
import trio

from tests.e2e.harness import ROOT, command, environment
from tests.faults.load import Endpoint
from tests.redis_server import RedisServer, free_port

READY: Final = 60.0
"""Seconds of real time after which a node that does not say "ready" fails the run."""
NAMES: Final = ("n1", "n2", "n3")

CONFIG: Final = """
dev = true
node = "{name}"
[server]
host = "127.0.0.1"
port = {port}
retry_after = 0.5     # the least that spreads a few dozen clients
[admin]
port = -1
[log]
level = "info"
[rooms.default]
history = 20000       # more than a round publishes: nothing is ever trimmed
[rooms.live]
history = 0
{store}
"""


class Node:
    """One broker process, again and again on one port."""

    def __init__(self, name: str, directory: Path, store: str) -> None:
        self.name = name
        self.endpoint = Endpoint("127.0.0.1", free_port())
        self._config = directory / f"{name}.toml"
        self._log = directory / f"{name}.log"
        self._config.write_text(CONFIG.format(name=name, port=self.endpoint.port, store=store))
        self._process: trio.Process | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and not ended by us."""
        return self._process is not None

    async def start(self) -> None:
        """Start it; it says "ready" before this returns."""
        with self._log.open("ab") as log:
            self._process = await trio.lowlevel.open_process(
                command("serve", "--config", str(self._config)),
                cwd=ROOT,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        with trio.move_on_after(READY):
            if (await self._process.stdout.receive_some()).startswith(b"ready "):
                return
        raise AssertionError(f"{self.name} did not start:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """kill -9, and wait for it."""
        self.signal(signal.SIGKILL)
        await self._gone()

    async def drain(self) -> int:
        """SIGTERM, and wait for it; the exit code."""
        self.signal(signal.SIGTERM)
        return await self._gone()

    async def _gone(self) -> int:
        assert self._process is not None
        code = await self._process.wait()
        self._process = None
        return code

    async def close(self) -> None:
        """End it, whatever state it is in."""
        if self._process is not None:
            with trio.CancelScope(shield=True):
                await self.kill()


class House:
    """What every house has. ``redis_is`` tells faults what they may assume."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where clients connect."""
        return [node.endpoint for node in self.nodes]

    @property
    def names(self) -> list[str]:
        """Of the nodes, in the same order."""
        return [node.name for node in self.nodes]

    async def start(self) -> None:
        """Start all nodes at once."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                if not node.running:
                    nursery.start_soon(node.start)

    async def close(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            await node.close()


class Alone(House):
    """One broker that keeps the past on its own disk."""


class Cluster(House):
    """Three nodes on one Redis that writes everything to disk before it answers."""

    def __init__(self, directory: Path, server: RedisServer, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.directory = directory
        self.redis = server

    @property
    def server(self) -> RedisServer:
        """The Redis that is the primary."""
        return self.redis

    def client(self) -> redis.Redis:
        """A client that is not one of the brokers'."""
        return self.server.client()

    def relaunch(self, **options: Any) -> None:
        """Start a Redis in place of one that was killed: same port, same directory, other options."""
        self.redis = RedisServer(self.directory, self.redis.port, **options)
        self.redis.start()


DURABLE: Final[dict[str, Any]] = {"appendonly": "yes", "appendfsync": "always"}
EVERY_SECOND: Final[dict[str, Any]] = {"appendonly": "yes", "appendfsync": "everysec"}


@asynccontextmanager
async def alone() -> AsyncIterator[Alone]:
    """A broker without others."""
    with directory() as where:
        house = Alone([Node("n1", where, f'[store]\ndata = "{where}/data"')])
        async with occupied(house):
            yield house


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """Nodes around a Redis."""
    with directory() as where:
        server = RedisServer(where, None, **DURABLE)
        server.start()
        nodes = [Node(name, where, f'[redis]\nurl = "{server.url}"') for name in NAMES]
        house = Cluster(where, server, nodes)
        try:
            async with occupied(house):
                yield house
        finally:
            house.redis.stop()


@asynccontextmanager
async def occupied(house: House) -> AsyncIterator[None]:
    """Nodes that run inside the block."""
    try:
        await house.start()
        yield
    finally:
        await house.close()


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="broker-faults-") as path:
        yield Path(path)
