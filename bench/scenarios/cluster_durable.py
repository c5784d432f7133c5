"""Publishes that are stored in Redis before they are acknowledged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.dialect import Acknowledged
from bench.events import padded
from bench.runner import Bench, Run, run
from bench.scenarios.base import Bar, setting
from bench.scenarios.clusters import THROUGHPUT, Throughput
from bench.workload import even, in_turn


@dataclass(frozen=True, kw_only=True)
class ClusterDurable(Throughput):
    """Durable publishes from clients of one node: whether all are acknowledged, and how soon.

    Each connection publishes into a room of its own, which keeps history; many are under way at
    once. The node has the servers' core to itself, Redis and the load share the other.
    """

    name: ClassVar = "cluster-durable"
    columns: ClassVar = THROUGHPUT
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("rate", 8_000.0, at_least=True),
        Bar("p99", 50.0),
    )
    plot: ClassVar = "rate"

    connections: int = setting(200, "Connections that publish in turn.")
    rate: float = setting(8_000.0, "Publishes a second, over all connections.")
    size: int = setting(140, "Bytes of the event a publish becomes.")

    def _at(self, bench: Bench, rate: float, seconds: float) -> Run:
        workload = in_turn(
            self.connections,
            even(rate, seconds),
            [padded(self.size)],
            "kept",
        )
        publishers = Acknowledged()
        with Cluster(bench, ["node A"]) as cluster:
            done = run(bench, cluster, publishers, workload, settle=0.5)
            tops = cluster.redis.tops(workload.rooms)
        acknowledged = publishers.stored_in(workload).keys()
        stored = {(room, at + 1) for room, top in zip(workload.rooms, tops, strict=True) for at in range(top)}
        done.verdict.unstored = len(publishers.offsets) - len(acknowledged & stored)
        done.verdict.unacknowledged = len(stored - acknowledged)
        return done
