"""From node to node, as fast as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.events import padded
from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.scenarios.clusters import COSTS, costs
from bench.workload import even, from_elsewhere, together


@dataclass(frozen=True, kw_only=True)
class ClusterLink(Scenario):
    """Ephemeral events published by clients of node A, delivered to ten sessions each on node B.

    Node B has the servers' core to itself; node A, Redis and the load share the other.
    """

    name: ClassVar = "cluster-link"
    columns: ClassVar = (Column("rate", "events/s", ",.0f"), ARRIVED, *LATENCY, *COSTS)
    bars: ClassVar = (Bar("arrived", 100.0, at_least=True), Bar("rate", 50_000.0, at_least=True))
    plot: ClassVar = "rate"
    rivals: ClassVar = ()

    connections: int = setting(1_000, "Sessions on node B, spread evenly over the rooms.")
    rooms: int = setting(100, "Rooms.")
    publishers: int = setting(20, "Connections to node A that publish in turn.")
    batch: int = setting(100, "Messages that a publisher sends as one array.")
    rate: float = setting(50_000.0, "Events a second.")
    size: int = setting(140, "Bytes of a single event's payload.")
    seconds: float = setting(6.0, "Length of each run.", short=3.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(
            bench.subjects(("broker",)), lambda subject, repeat: self._one(bench, subject, repeat)
        )

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        workload = from_elsewhere(
            self.connections,
            self.rooms,
            self.publishers,
            together(even(self.rate, self.seconds), self.batch),
            [padded(self.size, "bench:50")],
            senders_at=0,
            sessions_at=1,
            gather=self.batch,
        )
        with Cluster(bench, ["node A", "node B"]) as cluster:
            done = run(bench, cluster, subject.dialect, workload, Pace(), settle=0.5)
        return done.sample(
            subject.label,
            repeat,
            rate=self.rate,
            arrived=done.verdict.arrival(),
            **costs(done, workload.publishes),
        )
