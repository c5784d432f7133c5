"""Every kind of Redis that ``redis.url`` can name, as real processes, and two brokers on one of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import redis
import trio
from redis.crc import key_slot

from broker.app import Broker
from broker.config import Admin
from broker.link.keys import Keys
from broker.link.layout import SLOTS
from tests.e2e.harness import OPEN, config
from tests.e2e.raw_client import RawClient
from tests.link.linked import order
from tests.link.sharded import Sharded, sharded
from tests.link.test_sentinel import guarded
from tests.link.test_tls import Authority, tls_server
from tests.redis_server import RedisServer, redis_server

PATIENCE = 20.0
"""Seconds of real time after which something that should have happened fails the test."""
QUICK: dict[str, Any] = {
    "connect_timeout": 1.0,
    "answer_timeout": 1.0,
    "probe_after": 1.0,
    "probe_timeout": 1.0,
    "reader_lease": 1.0,
    "sweep_interval": 0.5,
    "lifecycle_grace": 0.0,
}
"""Settings with which a fault is noticed soon, though not by a machine that is merely busy."""

ALLOWED = ("+@all", "-@dangerous", "+info", "+config|get")
"""As docs/cluster.md says, but for the prefix."""

_numbers = itertools.count(1)


class Kind:
    """A Redis, and how backends reach it. Tests of one kind share it; each has a prefix of its own."""

    def __init__(self, name: str, url: str, servers: Sequence[RedisServer]) -> None:
        self.name = name
        self.url = url
        self.servers = servers
        """Any of them takes what a backend publishes; the first one also what it stores, unless sharded."""

    def client(self) -> redis.Redis:
        """What a backend would use."""
        if self.name == "cluster":
            # Of what both clients have in common, which is all that tests need.
            return cast("redis.Redis", redis.RedisCluster("127.0.0.1", self.servers[0].port))
        return self.servers[0].client()


@contextmanager
def _tls(directory: Path) -> Iterator[Kind]:
    """And with a user that may do no more than the operator was told to allow."""
    with tls_server(Authority(directory)) as (server, url):
        with server.client() as client:
            order(client, "ACL", "SETUSER", "node", "on", ">hush", "~kind*", "&kind*", *ALLOWED)
        yield Kind("tls", url.replace("rediss://", "rediss://node:hush@"), [server])


@contextmanager
def _unix(directory: Path) -> Iterator[Kind]:
    path = directory / "redis.sock"
    with redis_server(unixsocket=str(path)) as server:
        yield Kind("unix", f"unix://{path}", [server])


@contextmanager
def _sentinel(_directory: Path) -> Iterator[Kind]:
    with guarded(1) as here:
        yield Kind("sentinel", here.url, [here.primary])


@contextmanager
def _cluster(_directory: Path) -> Iterator[Kind]:
    with sharded() as cluster:
        yield kind_of(cluster)


def kind_of(cluster: Sharded) -> Kind:
    """A Redis Cluster that runs."""
    return Kind("cluster", cluster.url, [node.server for node in cluster.primaries])


KINDS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Kind]]] = {
    "tls": _tls,
    "unix": _unix,
    "sentinel": _sentinel,
    "cluster": _cluster,
}


class Pair:
    """Two brokers on one Redis: ``a`` and ``b``."""

    def __init__(self, a: Broker, b: Broker) -> None:
        self.a = a
        self.b = b
        self.keys = Keys(a.config.redis.prefix)

    @property
    def both(self) -> tuple[Broker, Broker]:
        """Of them."""
        return self.a, self.b

    def link(self) -> list[dict[str, int]]:
        """What the link of each counts."""
        return [broker.counted()["link"] for broker in self.both]

    def generations(self) -> int:
        """How often any of them found another generation of the store."""
        return sum(broker.engine.statistics()["generations"] for broker in self.both)


def is_spread(keys: Keys) -> bool:
    """Whether what belongs to no room is spread over all shards of a cluster that has three equal ones."""
    names = (keys.leases, keys.publish, keys.rejected, keys.lifecycle, keys.departures, keys.writers)
    return {key_slot(name.encode()) * 3 // SLOTS for name in names} == {0, 1, 2}


@asynccontextmanager
async def pair(url: str, **settings: Any) -> AsyncIterator[Pair]:
    """Two nodes that know each other, and end in good order."""
    prefix = next(prefix for prefix in map("kind{}:".format, _numbers) if is_spread(Keys(prefix)))
    async with trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            brokers = []
            for name in ("a", "b"):
                broker = Broker(
                    config(
                        node=name,
                        redis={"url": url, "prefix": prefix, **QUICK, **settings},
                        rooms={"long": msgspec.structs.replace(OPEN, history=100_000)},
                        admin=Admin(port=0, open_on_loopback=True),
                    )
                )
                brokers.append(broker)
                await nursery.start(partial(broker.run))
            await until(lambda: all(len(broker.peers.nodes()) == 2 for broker in brokers))
            yield Pair(*brokers)
            for broker in brokers:
                broker.stop()


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; whoever calls has the deadline."""
    while not condition():  # noqa: ASYNC110 - the world outside sets no event
        await trio.sleep(0.005)  # not until all is quiet: under load it never is


async def joined(client: RawClient, *rooms: str, **fields: Any) -> None:
    """Join rooms."""
    for room in rooms:
        answer = await client.ask("join", room=room, **fields)
        assert answer["op"] == "ok", answer


async def operator(broker: Broker, method: str, path: str, **body: Any) -> Any:
    """Ask at the operators' port."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{broker.admin_port}", trust_env=False) as http:
        answer = await http.request(method, path, json=body or None)
        answer.raise_for_status()
        return answer.json()
