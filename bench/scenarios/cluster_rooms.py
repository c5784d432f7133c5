"""An ordinary day of two nodes: who publishes is on one, who listens on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.events import padded
from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Scenario, setting
from bench.scenarios.clusters import COSTS, costs
from bench.scenarios.small_rooms import sources
from bench.workload import even, from_elsewhere


@dataclass(frozen=True, kw_only=True)
class ClusterRooms(Scenario):
    """Published on node A, delivered on node B: 10,000 sessions in 1,000 ephemeral rooms.

    Node B has the servers' core to itself; node A, Redis and the load share the other.
    """

    name: ClassVar = "cluster-rooms"
    columns: ClassVar = (ARRIVED, *LATENCY, *COSTS)
    bars: ClassVar = (Bar("arrived", 100.0, at_least=True), Bar("p99", 10.0))
    plot: ClassVar = "p99"
    rivals: ClassVar = ()

    connections: int = setting(10_000, "Sessions on node B, spread evenly over the rooms.")
    rooms: int = setting(1_000, "Rooms.")
    publishers: int = setting(200, "Connections to node A that publish in turn.")
    rate: float = setting(1_667.0, "Publishes a second, over all rooms; 1,667 is 100,000 a minute.")
    size: int = setting(140, "Bytes of a frame's payload.")
    connect_rate: float = setting(5_000.0, "Connections opened a second at most.")
    seconds: float = setting(10.0, "Length of each run.", short=5.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(
            bench.subjects(("broker",)), lambda subject, repeat: self._one(bench, subject, repeat)
        )

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        workload = from_elsewhere(
            self.connections,
            self.rooms,
            self.publishers,
            even(self.rate, self.seconds),
            [padded(self.size, "bench:500")],
            senders_at=0,
            sessions_at=1,
        )
        pace = Pace(connect_rate=self.connect_rate, sources=sources(self.connections))
        with Cluster(bench, ["node A", "node B"]) as cluster:
            done = run(bench, cluster, subject.dialect, workload, pace, settle=1.0)
        return done.sample(
            subject.label, repeat, arrived=done.verdict.arrival(), **costs(done, workload.publishes)
        )
