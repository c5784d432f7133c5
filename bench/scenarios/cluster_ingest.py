"""Events of backends: ``PUBLISH`` in Redis, delivered to sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.dialect import Backends
from bench.events import padded
from bench.plan import Pace
from bench.runner import Bench, Run, run
from bench.scenarios.base import Bar, setting
from bench.scenarios.clusters import THROUGHPUT, Throughput
from bench.workload import even, from_elsewhere, together


@dataclass(frozen=True, kw_only=True)
class ClusterIngest(Throughput):
    """Events of backends, pipelined into Redis, each for one room with one session of one node.

    The node has the servers' core to itself, Redis and the load share the other.
    """

    name: ClassVar = "cluster-ingest"
    columns: ClassVar = THROUGHPUT
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("rate", 40_000.0, at_least=True),
        Bar("p99", 500.0),
    )
    plot: ClassVar = "rate"

    rooms: int = setting(1_000, "Rooms, each with one session.")
    backends: int = setting(4, "Connections to Redis that publish in turn.")
    pipeline: int = setting(100, "Commands that a backend sends at once.")
    rate: float = setting(40_000.0, "Events a second.")
    size: int = setting(150, "Bytes of what a backend publishes.")

    def _at(self, bench: Bench, rate: float, seconds: float) -> Run:
        workload = from_elsewhere(
            self.rooms,
            self.rooms,
            self.backends,
            together(even(rate, seconds), self.pipeline),
            [padded(self.size, "bench:500")],
            sessions_at=0,
            senders_at=1,
            backends=True,
            gather=self.pipeline,
        )
        with Cluster(bench, ["node A"]) as cluster:
            return run(bench, cluster, Backends(), workload, Pace(), settle=0.5)
