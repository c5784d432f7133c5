"""Publishes that are stored in Redis before they are acknowledged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.cluster import Cluster
from bench.dialect import Acknowledged
from bench.events import padded
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.scenarios.clusters import COSTS, costs
from bench.workload import even, in_turn


@dataclass(frozen=True, kw_only=True)
class ClusterDurable(Scenario):
    """Durable publishes from clients of one node: whether all are acknowledged, and how soon.

    Each connection publishes into a room of its own, which keeps history; many are under way at
    once. The node has the servers' core to itself, Redis and the load share the other.
    """

    name: ClassVar = "cluster-durable"
    columns: ClassVar = (Column("rate", "publishes/s", ",.0f"), ARRIVED, *LATENCY, *COSTS)
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("rate", 8_000.0, at_least=True),
        Bar("p99", 50.0),
    )
    plot: ClassVar = "p99"
    rivals: ClassVar = ()

    connections: int = setting(200, "Connections that publish in turn.")
    rate: float = setting(8_000.0, "Publishes a second, over all connections.")
    size: int = setting(140, "Bytes of the event a publish becomes.")
    seconds: float = setting(6.0, "Length of each run.", short=3.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(
            bench.subjects(("broker",)), lambda subject, repeat: self._one(bench, subject, repeat)
        )

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        workload = in_turn(
            self.connections,
            even(self.rate, self.seconds),
            [padded(self.size).replace("##########", "n")],
            "kept",
        )
        with Cluster(bench, ["node A"]) as cluster:
            done = run(bench, cluster, Acknowledged(), workload, settle=0.5)
        return done.sample(
            subject.label,
            repeat,
            rate=self.rate,
            arrived=done.verdict.arrival(),
            **costs(done, workload.publishes),
        )
