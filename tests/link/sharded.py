"""A real Redis Cluster: three primaries, with replicas when asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import redis

from tests.link.linked import order
from tests.redis_server import STARTUP, RedisServer, free_port, redis_server

NODE_TIMEOUT = 1000
"""Milliseconds after which nodes take a node for dead."""


def wait_for(condition: Callable[[], object]) -> None:
    """Wait in real time: nothing else runs while a cluster is being built."""
    end = time.monotonic() + 2 * STARTUP
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Node:
    """One node."""

    def __init__(self, server: RedisServer, bus: int) -> None:
        self.server = server
        self.bus = bus

    def order(self, *command: str | int) -> Any:
        with self.server.client(decode_responses=True) as client:
            client.response_callbacks.clear()  # words as Redis says them
            return order(client, *command)

    @property
    def id(self) -> str:
        return str(self.order("CLUSTER", "MYID"))

    def knows(self, name: str) -> bool:
        """Whether it has met a node."""
        return name in self.order("CLUSTER", "NODES")

    def follows(self) -> bool:
        """Whether it is a replica that has caught up."""
        return "master_link_status:up" in self.order("INFO", "replication")

    def slots(self) -> list[Any]:
        """What it says of who has which slots."""
        found: list[Any] = self.order("CLUSTER", "SLOTS")
        return found

    def is_well(self) -> bool:
        """Whether it finds the cluster complete."""
        with contextlib.suppress(redis.ConnectionError):
            return "cluster_state:ok" in self.order("CLUSTER", "INFO")
        return False


class Sharded:
    """Primaries have the slots in thirds; ``replicas[i]`` follows ``primaries[i]``."""

    def __init__(self, primaries: list[Node], replicas: list[Node]) -> None:
        self.primaries = primaries
        self.replicas = replicas
        self.nodes = primaries + replicas
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.server.port}" for node in primaries)

    def owner(self, slot: int) -> Node:
        """The primary that has ``slot`` by what the first living node says."""
        for node in self.nodes:
            with contextlib.suppress(redis.ConnectionError):
                for first, last, (_, port, *_), *_ in node.slots():
                    if first <= slot <= last:
                        return next(one for one in self.nodes if one.server.port == port)
        raise AssertionError(slot)

    def move(self, slot: int, target: Node) -> None:
        """Move a slot with all its keys, as an operator would, ending with everybody knowing."""
        source = self.owner(slot)
        self.begin_move(slot, target)
        while keys := source.order("CLUSTER", "GETKEYSINSLOT", slot, 100):
            for key in keys:
                source.order("MIGRATE", "127.0.0.1", target.server.port, key, 0, 5000)
        self.end_move(slot, target)

    def begin_move(self, slot: int, target: Node) -> None:
        source = self.owner(slot)
        target.order("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.order("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)

    def end_move(self, slot: int, target: Node) -> None:
        name = target.id
        for node in [target, *(one for one in self.primaries if one is not target)]:
            node.order("CLUSTER", "SETSLOT", slot, "NODE", name)


@contextmanager
def sharded(*, replicas: bool = False) -> Iterator[Sharded]:
    """A cluster that runs inside the block."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(6 if replicas else 3):
            bus = free_port()
            server = stack.enter_context(
                redis_server(
                    cluster_enabled="yes",
                    cluster_port=str(bus),
                    cluster_node_timeout=str(NODE_TIMEOUT),
                    cluster_replica_validity_factor="0",
                    repl_diskless_sync_delay="0",
                )
            )
            nodes.append(Node(server, bus))
        cluster = Sharded(nodes[:3], nodes[3:])
        for number, node in enumerate(cluster.primaries):
            # Distinct epochs from the start; else nodes have to settle who yields.
            node.order("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.order(
                "CLUSTER", "ADDSLOTSRANGE", number * 5461, (number + 1) * 5461 - 1 if number < 2 else 16383
            )
        for node in nodes[1:]:
            node.order("CLUSTER", "MEET", "127.0.0.1", nodes[0].server.port, nodes[0].bus)
        wait_for(lambda: all(node.is_well() for node in nodes))
        for replica, primary in zip(cluster.replicas, cluster.primaries, strict=False):
            wait_for(partial(replica.knows, primary.id))
            replica.order("CLUSTER", "REPLICATE", primary.id)
        wait_for(lambda: all(replica.follows() for replica in cluster.replicas))
        wait_for(lambda: all(len(node.slots()) == 3 for node in nodes))
        yield cluster
