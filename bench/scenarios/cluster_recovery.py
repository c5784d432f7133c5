"""A node dies: its sessions come to the other one and get what they missed."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bench.analysis import analyse
from bench.cluster import Cluster
from bench.dialect import Acknowledged, Broker, Positions, Returning, joined_at
from bench.events import padded
from bench.load import LoadError
from bench.plan import Pace
from bench.recording import Recording
from bench.runner import Bench, Meter, Sample, Subject, load_client, run
from bench.scenarios.base import ARRIVED, Bar, Column, Scenario, setting
from bench.scenarios.clusters import per_item
from bench.workload import Workload, even, in_turn

_TIMEOUT = 60.0
_JOIN_RATE = 5_000.0
"""Connections a second while nothing is measured yet."""


@dataclass(frozen=True, kw_only=True)
class ClusterRecovery(Scenario):
    """A node is killed; its sessions come to the other all at once, with ``since``, and miss nothing.

    They join on node A, which gets SIGKILL. While they are away, every room is published to through
    node B; then all connect to node B at the same moment. Node B has the servers' core to itself;
    node A, Redis and the load share the other.
    """

    name: ClassVar = "cluster-recovery"
    columns: ClassVar = (
        ARRIVED,
        Column("twice", "twice", ".0f"),
        Column("seconds", "s to recover", ".2f"),
        Column("since_kill", "s since the kill", ".2f"),
        Column("p50", "joined p50 ms", ".0f"),
        Column("p99", "joined p99 ms", ".0f"),
        Column("b_us", "B µs/session", ".0f"),
        Column("redis_us", "Redis µs/session", ".0f"),
        Column("b_mb", "B MB", ".0f"),
        Column("redis_mb", "Redis MB", ".0f"),
    )
    bars: ClassVar = (Bar("arrived", 100.0, at_least=True), Bar("twice", 0.0), Bar("since_kill", 15.0))
    plot: ClassVar = "seconds"
    rivals: ClassVar = ()

    connections: int = setting(5_000, "Sessions of the node that dies, spread evenly over the rooms.")
    rooms: int = setting(500, "Rooms, which keep history.")
    missed: int = setting(20, "Events of each room that its sessions miss.")
    rate: float = setting(5_000.0, "Publishes a second while they are away.")
    size: int = setting(140, "Bytes of a single event's payload.")

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(
            bench.subjects(("broker",)), lambda subject, repeat: self._one(bench, subject, repeat)
        )

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        at = even(self.rate, self.rooms * self.missed / self.rate)
        published = in_turn(self.rooms, at, [padded(self.size)], "kept")
        sessions = dataclasses.replace(
            published,
            member=(np.arange(self.connections) % self.rooms).astype(np.int32),
            at=np.zeros_like(at),
        )
        with Cluster(bench, ["node A", "node B"]) as cluster:
            positions, killed = _lose(bench, cluster, sessions)
            publishers = Acknowledged()
            missed = run(bench, cluster, publishers, published.on(1))
            returning = Returning(positions, publishers.stored_in(published))
            recording, metrics = _come_back(bench, cluster, sessions, returning)
        # What is recovered comes while connections are being set up, so that is when the run starts.
        started, sent_at = recording.setup_started, missed.recording.sent_at
        verdict = analyse(
            sessions, dataclasses.replace(recording, started=started, sent_at=sent_at), returning.read
        )
        p50, p99 = np.percentile(verdict.setup, [50, 99]) if verdict.ready else (np.nan, np.nan)
        metrics |= {
            "arrived": verdict.arrival(),
            "twice": float(verdict.duplicated),
            "seconds": (recording.last_data - started) / 1e9,
            "since_kill": recording.last_data / 1e9 - killed,
            "p50": float(p50),
            "p99": float(p99),
        }
        return Sample(subject.label, repeat, metrics, missed.verdict.faults() + verdict.faults())


def _lose(bench: Bench, cluster: Cluster, sessions: Workload) -> tuple[Positions, float]:
    """Join on node A and kill it. Returns where the rooms were then, and when that was (s)."""
    dialect, pace = Broker(), Pace(connect_rate=_JOIN_RATE, setup_timeout=_TIMEOUT)
    with load_client(bench, cluster, dialect, sessions.unsaid().on(0), pace) as client:
        ready, all_of_them = client.wait("ready", 2 * _TIMEOUT)
        killed = time.monotonic()
        cluster.kill(cluster.nodes[0])
        recording = client.finish()
    if ready < all_of_them:
        raise LoadError(f"only {ready} of {all_of_them} sessions joined before the kill")
    return joined_at(recording), killed


def _come_back(
    bench: Bench, cluster: Cluster, sessions: Workload, returning: Returning
) -> tuple[Recording, dict[str, float]]:
    """Connect all of them to node B at once. Returns what came, and what that cost a session."""
    meter, pace = Meter(bench, cluster), Pace(in_flight=0, setup_timeout=_TIMEOUT, quiet=1.0)
    before = meter.read()
    with load_client(bench, cluster, returning, sessions.unsaid().on(1), pace) as client:
        client.wait("ready", 2 * _TIMEOUT)
        client.go()  # there is nothing to publish: it waits until nothing comes any more
        client.wait("done", 2 * _TIMEOUT)
        used, memory = meter.read().cpu_since(before), meter.memories()
        recording = client.finish()
    return recording, per_item(used, memory, sessions.connections)
