"""One frozen snapshot of everything that is counted: behind ``/api/stats``, ``/metrics`` and the overview.

Counters live as plain integers where things happen; here they are read, all in
one moment, because nothing in :func:`statistics` waits.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from broker import __version__
from broker.admin.models import NodeAnswer
from broker.admin.node import Node
from broker.metrics import Histogram

_PAGE: Final = resource.getpagesize()


class Process(msgspec.Struct, frozen=True):
    """What the operating system and the interpreter say of this process."""

    pid: int
    rss_bytes: int
    cpu_seconds: float
    """User and system time."""
    descriptors: int
    descriptor_limit: int
    threads: int
    gc_collections: tuple[int, ...]
    """Collections of each generation so far."""


class PumpStatistics(msgspec.Struct, frozen=True):
    """The task that reads and flushes every socket."""

    passes: int
    ready: int
    """Ready sockets handled."""
    sockets: int


class TrafficStatistics(msgspec.Struct, frozen=True):
    """Bytes between the node and its clients."""

    bytes_read: int
    queued_bytes: int
    """In all outboxes now."""
    backlogs: int
    """Times a socket did not take a frame at once."""
    refused: int
    """Frames not taken because an outbox was full."""


class StageStatistics(msgspec.Struct, frozen=True):
    """Latency of one stage (s). Quantiles are buckets' upper bounds; ``None``: empty, or beyond the last."""

    count: int
    sum: float
    p50: float | None
    p90: float | None
    p99: float | None


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot. The mappings hold the counters and gauges of the part they are named after."""

    node: str
    version: str
    ready: bool
    started_at: float
    uptime: float
    hub: Mapping[str, Any]
    registry: Mapping[str, Any]
    engine: Mapping[str, Any]
    tokens: Mapping[str, Any]
    admin: Mapping[str, Any]
    peers: Mapping[str, Any]
    """What is counted of the other nodes; empty where there can be none."""
    cluster: Mapping[str, Any]
    """The same of the parts that only a node of a cluster has, by the part."""
    load: Mapping[str, float]
    """How busy the node is (0 to 1), and the parts of that."""
    mover: Mapping[str, int]
    """Sessions asked to move to other nodes."""
    pump: PumpStatistics
    traffic: TrafficStatistics
    stages: Mapping[str, StageStatistics]
    process: Process


class StatisticsPage(Statistics, frozen=True, kw_only=True):
    """The snapshot of the node that answers, and those of the others."""

    others: Mapping[str, Statistics]
    """By the names of the nodes."""
    totals: Mapping[str, Any]
    """``hub``, ``registry``, ``tokens``, ``traffic`` and ``mover`` of all that answered, added up."""
    nodes: list[NodeAnswer]
    partial: bool


class Recorded(msgspec.Struct, frozen=True):
    """A histogram as it stands."""

    bounds: list[float]
    counts: list[int]
    total: float

    def histogram(self) -> Histogram:
        """As it was."""
        found = Histogram(tuple(self.bounds))
        found.counts, found.total = list(self.counts), self.total
        return found


class Snapshot(msgspec.Struct, frozen=True):
    """A node's statistics with whole histograms, from which metrics can be made elsewhere."""

    statistics: Statistics
    histograms: Mapping[str, Recorded]

    def stages(self) -> dict[str, Histogram]:
        """The histogram of each stage."""
        return {name: recorded.histogram() for name, recorded in self.histograms.items()}


@runtime_checkable
class _Counting(Protocol):
    """Peers that count what they do."""

    def statistics(self) -> Mapping[str, Any]:
        """Counters and gauges by name."""


def read_process() -> Process:
    """Ask the system. On an older Linux with 10,000 descriptors this takes 20 ms: call it in a thread."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/statm", "rb") as statm:
        pages = int(statm.read().split()[1])
    return Process(
        pid=os.getpid(),
        rss_bytes=pages * _PAGE,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        descriptors=_descriptors(),
        descriptor_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        threads=threading.active_count(),
        gc_collections=tuple(generation["collections"] for generation in gc.get_stats()),
    )


def _descriptors() -> int:
    # Linux 6.2 and later tell the number as the directory's size; before, it must be read.
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))


def statistics(node: Node, process: Process, admin: Mapping[str, int]) -> Statistics:
    """The state of ``node`` now. ``admin`` are the counters of the operators' port itself."""
    context = node.context
    traffic = context.traffic
    peers = context.peers
    return Statistics(
        node=context.node,
        version=__version__,
        ready=is_ready(node),
        started_at=node.started_at,
        uptime=max(0.0, context.wall() - node.started_at),
        hub=context.hub.statistics(),
        registry=context.registry.statistics(),
        engine=context.engine.statistics(),
        tokens=context.verifier.statistics()._asdict(),
        admin=dict(admin),
        peers=peers.statistics() if isinstance(peers, _Counting) else {},
        cluster=node.counted(),
        load=node.load.figures._asdict(),
        mover=node.mover.statistics(),
        pump=PumpStatistics(node.pump.passes, node.pump.ready, len(node.pump)),
        traffic=TrafficStatistics(traffic.bytes_read, traffic.queued, traffic.backlogs, traffic.refused),
        stages={name: _stage(histogram) for name, histogram in context.stages.items()},
        process=process,
    )


def snapshot(node: Node, process: Process, admin: Mapping[str, int]) -> Snapshot:
    """The same with whole histograms."""
    return Snapshot(
        statistics(node, process, admin),
        {
            name: Recorded(list(histogram.bounds), list(histogram.counts), histogram.total)
            for name, histogram in node.context.stages.items()
        },
    )


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested statistics in one row: ``link_up`` for ``up`` of ``link``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}_{inner}", found) for inner, found in flat(value))
        else:
            yield name, value


def is_ready(node: Node) -> bool:
    """Whether clients should be sent here: not draining, and the engine can store."""
    return node.ready and not node.context.engine.statistics().get("failing", 0)


def _stage(histogram: Histogram) -> StageStatistics:
    return StageStatistics(
        histogram.count,
        histogram.total,
        histogram.quantile(0.5),
        histogram.quantile(0.9),
        histogram.quantile(0.99),
    )
