"""From node to node, as fast as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.dialect import Broker
from bench.events import padded
from bench.plan import Pace
from bench.runner import Bench, Run, run
from bench.scenarios.base import Bar, setting
from bench.scenarios.clusters import THROUGHPUT, Throughput
from bench.workload import even, from_elsewhere, together


@dataclass(frozen=True, kw_only=True)
class ClusterLink(Throughput):
    """Ephemeral events published by clients of node A, delivered to ten sessions each on node B.

    Node B has the servers' core to itself; node A, Redis and the load share the other.
    """

    name: ClassVar = "cluster-link"
    columns: ClassVar = THROUGHPUT
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("rate", 50_000.0, at_least=True),
        Bar("p99", 500.0),
    )
    plot: ClassVar = "rate"

    connections: int = setting(1_000, "Sessions on node B, spread evenly over the rooms.")
    rooms: int = setting(100, "Rooms.")
    publishers: int = setting(20, "Connections to node A that publish in turn.")
    batch: int = setting(100, "Messages that a publisher sends as one array.")
    rate: float = setting(50_000.0, "Events a second.")
    size: int = setting(140, "Bytes of a single event's payload.")

    def _at(self, bench: Bench, rate: float, seconds: float) -> Run:
        workload = from_elsewhere(
            self.connections,
            self.rooms,
            self.publishers,
            together(even(rate, seconds), self.batch),
            [padded(self.size, "bench:50")],
            senders_at=0,
            sessions_at=1,
            gather=self.batch,
        )
        with Cluster(bench, ["node A", "node B"]) as cluster:
            return run(bench, cluster, Broker(), workload, Pace(), settle=0.5)
