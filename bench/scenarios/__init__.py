"""The questions the benchmark asks, one file each; ``SCENARIOS`` in the order of a whole run."""

from __future__ import annotations

from bench.scenarios.base import Bar, Column, Scenario
from bench.scenarios.batched import Batched
from bench.scenarios.cluster_durable import ClusterDurable
from bench.scenarios.cluster_ingest import ClusterIngest
from bench.scenarios.cluster_link import ClusterLink
from bench.scenarios.cluster_recovery import ClusterRecovery
from bench.scenarios.cluster_rooms import ClusterRooms
from bench.scenarios.compression import Compression
from bench.scenarios.connect import Connect
from bench.scenarios.fanout import FanOut
from bench.scenarios.idle import Idle
from bench.scenarios.inbound import Inbound
from bench.scenarios.slow import Slow
from bench.scenarios.small_rooms import SmallRooms

SCENARIOS: tuple[type[Scenario], ...] = (
    FanOut,
    Batched,
    SmallRooms,
    Inbound,
    Connect,
    Idle,
    Compression,
    Slow,
    ClusterRooms,
    ClusterDurable,
    ClusterIngest,
    ClusterLink,
    ClusterRecovery,
)

__all__ = ["SCENARIOS", "Bar", "Column", "Scenario"]
