"""Where faults happen: a broker, or several and their Redis, as processes that were started for it.

A *house* is one way to put them together. Every process is one that was
started here, in a session of its own, and is ended by its own id when the house
is left, whatever happened inside.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import redis
import trio

from tests.faults.load import Endpoint
from tests.faults.namespaces import Namespace, namespace
from tests.faults.nodes import Node
from tests.faults.sentinels import SERVICE, Sentinel
from tests.link.proxy import Proxy, proxy_to
from tests.redis_server import RedisServer

NAMES: Final = ("n1", "n2", "n3")
DURABLE: Final[dict[str, Any]] = {
    "appendonly": "yes",
    "appendfsync": "always",
    "repl_diskless_sync_delay": "0",
}
EVERY_SECOND: Final[dict[str, Any]] = {"appendonly": "yes", "appendfsync": "everysec"}


class House:
    """What every house has."""

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

    def store(self) -> RedisServer | None:
        """The Redis that backends hand events in at; may block for a moment."""
        return None

    async def start(self) -> None:
        """Start all nodes that do not run."""
        async with trio.open_nursery() as nursery:
            for node in self.nodes:
                if not node.running:
                    nursery.start_soon(node.start)

    @asynccontextmanager
    async def occupied(self) -> AsyncIterator[None]:
        """Nodes run inside the block."""
        try:
            await self.start()
            yield
        finally:
            for node in self.nodes:
                await node.close()


class Alone(House):
    """One broker that keeps the past on its own disk."""


class Cluster(House):
    """Three nodes on one Redis, which writes everything to disk before it answers."""

    def __init__(self, server: RedisServer, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.redis = server

    def store(self) -> RedisServer:
        """The one."""
        return self.redis

    def relaunch(self, **options: Any) -> None:
        """Start a Redis in place of one that was killed: same port, same directory, other options."""
        self.redis = RedisServer(self.redis.directory, self.redis.port, **options)
        self.redis.start()


class Proxied(Cluster):
    """The same, but each node reaches Redis through a proxy of its own, which may misbehave."""

    def __init__(self, server: RedisServer, nodes: Sequence[Node], proxies: Sequence[Proxy]) -> None:
        super().__init__(server, nodes)
        self.proxies = proxies


class Divided(House):
    """The same, but Redis is in a network of its own, with a cable to each node that can be pulled."""

    def __init__(self, network: Namespace, server: RedisServer, nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.network = network
        self.redis = server

    def store(self) -> RedisServer:
        """The one, by the cable of the first node."""
        return self.redis


class Watched(House):
    """Three nodes on a primary and its replica, with three Sentinels over them."""

    def __init__(self, servers: list[RedisServer], nodes: Sequence[Node]) -> None:
        super().__init__(nodes)
        self.servers = servers

    def store(self) -> RedisServer:
        """The primary; the first one while there is none."""
        return next(
            (server for server in self.servers if role_of(server)["role"] == "master"), self.servers[0]
        )

    def primary(self) -> RedisServer:
        """The one that takes writes now."""
        return self._with_role("master")

    def replica(self) -> RedisServer:
        """The other one."""
        return self._with_role("slave")

    def stop_servers(self) -> None:
        """End both."""
        for server in self.servers:
            server.stop()

    def _with_role(self, role: str) -> RedisServer:
        for server in self.servers:
            if role_of(server)["role"] == role:
                return server
        raise AssertionError(f"none of the two is {role}")

    async def returns_as_replica(self, server: RedisServer) -> None:
        """Start one that was killed, as the replica of the other one; return when it has caught up."""
        (other,) = (one for one in self.servers if one is not server)
        again = RedisServer(server.directory, server.port, replicaof=["127.0.0.1", other.port], **DURABLE)
        self.servers[self.servers.index(server)] = again
        await trio.to_thread.run_sync(again.start)
        await caught_up(again)


class Strict(Watched):
    """The same, where nothing is acknowledged before primary and replica have it."""


def role_of(server: RedisServer) -> dict[str, Any]:
    """What it says of its replication; nothing while it does not answer."""
    with server.client(socket_timeout=1.0) as client:
        try:
            return dict(client.info("replication"))
        except redis.RedisError:
            return {"role": None}


async def caught_up(replica: RedisServer) -> None:
    """Return once it follows a primary; whoever calls has the deadline."""
    while True:
        said = role_of(replica)
        if said["role"] == "slave" and said["master_link_status"] == "up":
            return
        await trio.sleep(0.05)


# -- building them --------------------------------------------------------------------------------


@asynccontextmanager
async def alone() -> AsyncIterator[Alone]:
    """A broker without others."""
    with directory() as where:
        house = Alone([Node("n1", where, f'[store]\ndata = "{where}/data"')])
        async with house.occupied():
            yield house


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """Nodes around a Redis."""
    with directory() as where:
        server = RedisServer(where, None, **DURABLE)
        server.start()
        house = Cluster(server, [Node(name, where, on(server.url)) for name in NAMES])
        try:
            async with house.occupied():
                yield house
        finally:
            house.redis.stop()


@asynccontextmanager
async def proxied() -> AsyncIterator[Proxied]:
    """Nodes, each with a proxy before Redis."""
    with directory() as where, contextlib.ExitStack() as servers:
        server = RedisServer(where, None, **DURABLE)
        servers.callback(server.stop)
        server.start()
        async with contextlib.AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(proxy_to(server.port)) for _ in NAMES]
            nodes = [Node(name, where, on(proxy.url)) for name, proxy in zip(NAMES, proxies, strict=True)]
            house = Proxied(server, nodes, proxies)
            async with house.occupied():
                yield house


@asynccontextmanager
async def strict() -> AsyncIterator[Strict]:
    """Nodes that find their Redis by Sentinels, and wait for its replica."""
    async with watched(Strict, "replicas = 1") as house:
        assert isinstance(house, Strict)
        yield house


@asynccontextmanager
async def watched(kind: type[Watched] = Watched, *settings: str) -> AsyncIterator[Watched]:
    """Nodes that find their Redis by Sentinels. ``settings`` of ``[redis]`` besides."""
    with directory() as where, contextlib.ExitStack() as stack:
        for name in ("a", "b"):
            (where / name).mkdir()
        first = RedisServer(where / "a", None, **DURABLE)
        second = RedisServer(where / "b", None, replicaof=["127.0.0.1", first.port], **DURABLE)
        house = kind([first, second], [])
        stack.callback(house.stop_servers)
        first.start()
        second.start()
        await caught_up(second)
        sentinels = [Sentinel(where / f"sentinel-{number}", first.port) for number in range(3)]
        for sentinel in sentinels:
            stack.callback(sentinel.stop)
            sentinel.start()
        for sentinel in sentinels:
            await sentinel.knows_all(len(sentinels))
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        store = on(f"redis+sentinel://{hosts}/{SERVICE}", *settings)
        house.nodes = [Node(name, where, store) for name in NAMES]
        async with house.occupied():
            yield house


@asynccontextmanager
async def divided() -> AsyncIterator[Divided]:
    """Nodes with a cable each to Redis. Only for root."""
    with directory() as where, namespace(len(NAMES)) as network:
        server = network.redis(where, **DURABLE)
        server.start()
        try:
            nodes = [
                Node(name, where, on(f"redis://{address}:{server.port}/0"))
                for name, address in zip(NAMES, network.addresses, strict=True)
            ]
            house = Divided(network, server, nodes)
            async with house.occupied():
                yield house
        finally:
            server.stop()


def on(url: str, *settings: str) -> str:
    """Configuration of a node on the Redis at ``url``."""
    return "\n".join(["[redis]", f'url = "{url}"', *settings])


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="broker-faults-", ignore_cleanup_errors=True) as path:
        yield Path(path)
