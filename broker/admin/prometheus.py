"""The snapshot as Prometheus reads it. Nothing is kept here: every scrape reads plain integers.

Names follow the conventions (https://prometheus.io/docs/practices/naming/):
``broker_`` first, the unit last, ``_total`` for what only grows.
``docs/admin.md`` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from broker.admin.statistics import Statistics, flat
from broker.metrics import Histogram

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
"""Our names and labels need nothing newer, and every scraper reads it."""

HUB: Final = {
    "published": ("published_events", "Events published on this node"),
    "received": ("received_events", "Ephemeral events that came from other nodes and from backends"),
    "routed": ("routed_events", "Copies of events made by the rules of the configuration"),
    "route_missing": ("route_missing", "Copies not made because the event lacks what names their room"),
    "route_misfits": (
        "route_misfits",
        "Copies not made because of their size, or of what would name their room",
    ),
    "route_refused": ("route_refused", "Events not published because they ask for too many copies"),
    "deliveries": ("deliveries", "Events handed to sockets, counted for each receiver"),
    "frames": ("frames_sent", "Frames handed to sockets"),
    "batches": ("batches", "Batches encoded and sent"),
    "dropped": ("dropped_events", "Events that sessions missed because they read too slowly"),
    "superseded": ("superseded_events", "Events replaced by a newer one of their slot before they were sent"),
    "lost_told": ("lost_messages", "Times a session was told that events are missing"),
    "encodings_failed": ("encoding_failures", "Batches that could not be encoded"),
    "fanout_faults": ("fanout_faults", "Faults of ours while events were sent"),
    "raw_bytes": ("raw_bytes", "Bytes of batches before compression"),
    "encoded_bytes": ("encoded_bytes", "Bytes of batches as they were sent, counted once for all receivers"),
}
TOKENS: Final = {
    "verified": ("tokens_verified", "Tokens whose signature was checked and found good"),
    "from_cache": ("tokens_from_cache", "Tokens known from before"),
    "refused": ("tokens_refused", "Tokens refused"),
    "key_fetches": ("key_fetches", "Key sets fetched"),
    "key_fetch_failures": ("key_fetch_failures", "Key sets that could not be fetched"),
}
ENGINE_GAUGES: Final = frozenset(
    {"rooms_open", "ring_events", "waiting", "largest_batch", "failing", "keys", "reading", "rooms"}
    | {"witnesses"}
)
"""Numbers of an engine that can fall; every other only grows."""
PEERS_GAUGES: Final = frozenset({"nodes", "settled", "attached", "mates", "member_rooms", "relay_waiting"})
"""The same of what is counted about other nodes."""
CLUSTER_GAUGES: Final = frozenset(
    {"link_up", "link_shards", "link_channels", "link_pending", "interest_rooms", "interest_released"}
    | {"lifecycle_waiting", "reader_reading", "reader_waiting", "reader_working", "reader_blocked_rooms"}
)
"""The same of the parts that only a node of a cluster has."""
LOAD: Final = {
    "load": ("load", "How busy the node is, from 0 to 1: the largest of the parts"),
    "connections": ("load_connections", "Open connections, of those that are accepted"),
    "cpu": ("load_cpu", "CPU time of the last second, of one core"),
    "lag": ("load_lag", "The latest tick of the last seconds, of 100 ms"),
    "outbox": ("load_outbox", "Bytes queued for slow readers, of their limit"),
}


class BrokerCollector(Collector):
    """Metrics of one snapshot."""

    def __init__(self, found: Statistics, stages: Mapping[str, Histogram]) -> None:
        self._found = found
        self._stages = stages

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order of the documentation."""
        found = self._found
        yield InfoMetricFamily("broker", "Who this is", {"node": found.node, "version": found.version})
        yield gauge("ready", "1 while new clients are welcome", found.ready)
        for part, (name, text) in LOAD.items():
            yield gauge(name, text, found.load[part])
        yield from self._sessions(found.registry)
        yield gauge("rooms", "Rooms alive on this node", found.hub["rooms"])
        yield from _counters(HUB, found.hub)
        yield from self._wire()
        yield from _numbered("engine", "Engine", found.engine, ENGINE_GAUGES)
        yield from _numbered("peers", "Other nodes", found.peers, PEERS_GAUGES)
        yield from _numbered("cluster", "Cluster", dict(flat(found.cluster)), CLUSTER_GAUGES)
        yield counter("moved_sessions", "Sessions asked to move to other nodes", found.mover["moved"])
        yield gauge("moving_sessions", "Sessions that will be asked to move", found.mover["waiting"])
        yield from _counters(TOKENS, found.tokens)
        yield from self._latencies()
        yield from _admin(found.admin)
        yield from self._process()

    def _sessions(self, registry: Mapping[str, Any]) -> Iterator[Metric]:
        yield gauge("connections", "Open sockets, handshakes included", registry["connections"])
        yield gauge("sessions", "Open sessions", registry["sessions"])
        yield gauge("users", "Users with at least one session here", registry["users"])
        yield gauge("unauthenticated", "Connections without an identity", registry["strangers"])
        yield counter("accepted_connections", "Connections accepted", registry["accepted"])
        yield counter("opened_sessions", "Sessions begun", registry["opened"])
        yield labelled("closed_sessions", "Sessions ended, by close code", "code", registry["closes"])
        yield labelled(
            "refused_connections", "Connections and handshakes turned away", "reason", registry["refused"]
        )
        yield labelled("errors", "Error replies, by code", "code", registry["errors"])

    def _wire(self) -> Iterator[Metric]:
        traffic, pump = self._found.traffic, self._found.pump
        yield counter("read_bytes", "Bytes read from clients", traffic.bytes_read)
        yield gauge("outbox_bytes", "Bytes queued for clients that read slowly", traffic.queued_bytes)
        yield counter("backlogs", "Times a socket did not take a frame at once", traffic.backlogs)
        yield counter("outbox_full", "Frames not taken because an outbox was full", traffic.refused)
        yield counter("pump_passes", "Passes over ready sockets", pump.passes)
        yield counter("pump_ready_sockets", "Ready sockets handled", pump.ready)

    def _latencies(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "broker_stage_seconds", "Latency of each stage of a message's journey", labels=["stage"]
        )
        for name, histogram in self._stages.items():
            if name != "loop_lag":
                family.add_metric([name], buckets(histogram), histogram.total)
        yield family
        lag = self._stages["loop_lag"]
        yield HistogramMetricFamily(
            "broker_loop_lag_seconds", "How late the clock's tick came", buckets(lag), lag.total
        )

    def _process(self) -> Iterator[Metric]:
        process = self._found.process
        # The names that every Prometheus client uses, so that common dashboards find them.
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size", process.rss_bytes)
        yield CounterMetricFamily("process_cpu_seconds", "User and system CPU time", process.cpu_seconds)
        yield GaugeMetricFamily("process_open_fds", "Open file descriptors", process.descriptors)
        yield GaugeMetricFamily("process_max_fds", "Limit of file descriptors", process.descriptor_limit)
        yield GaugeMetricFamily(
            "process_start_time_seconds", "Unix time of the start", self._found.started_at
        )
        family = CounterMetricFamily(
            "python_gc_collections", "Collections of each generation", labels=["generation"]
        )
        for generation, count in enumerate(process.gc_collections):
            family.add_metric([str(generation)], count)
        yield family


class WorkersCollector(Collector):
    """Metrics of several processes that one port answers for; each sample says whose it is.

    ``up`` are the names of all workers, and whether they have answered.
    """

    def __init__(self, collectors: Mapping[str, BrokerCollector], up: Mapping[str, bool]) -> None:
        self._collectors = collectors
        self._up = up

    def collect(self) -> Iterator[Metric]:
        """Every family once, with the samples of all."""
        families: dict[str, Metric] = {}
        for worker, collector in self._collectors.items():
            for metric in collector.collect():
                samples = [each._replace(labels={"worker": worker, **each.labels}) for each in metric.samples]
                family = families.setdefault(metric.name, metric)
                family.samples = samples if family is metric else [*family.samples, *samples]
        yield from families.values()
        answered = GaugeMetricFamily("broker_worker_up", "1 if the worker has answered", labels=["worker"])
        for worker, up in self._up.items():
            answered.add_metric([worker], float(up))
        yield answered


def exposition(collector: Collector) -> bytes:
    """The text of ``/metrics`` in the format that :data:`CONTENT_TYPE` names."""
    return generate_latest(collector)


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, with ``+Inf`` last, as Prometheus wants them."""
    found: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        total += count
        found.append((repr(bound), total))
    found.append(("+Inf", total + histogram.counts[-1]))
    return found


def gauge(name: str, text: str, value: float) -> Metric:
    """A number that rises and falls."""
    return GaugeMetricFamily(f"broker_{name}", text, float(value))


def counter(name: str, text: str, value: float) -> Metric:
    """A number that only grows; ``_total`` is added to its name."""
    return CounterMetricFamily(f"broker_{name}", text, value)


def labelled(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    """One counter for each value of a label."""
    family = CounterMetricFamily(f"broker_{name}", text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _counters(names: Mapping[str, tuple[str, str]], values: Mapping[str, Any]) -> Iterator[Metric]:
    for key, (name, text) in names.items():
        yield counter(name, text, values[key])


def _numbered(part: str, title: str, values: Mapping[str, Any], gauges: frozenset[str]) -> Iterator[Metric]:
    """What a part counts under names of its own; all of them are told."""
    for name, value in _numbers(values):
        if name in gauges:
            yield gauge(f"{part}_{name}", f"{title}: {name.replace('_', ' ')}, now", value)
        else:
            yield counter(f"{part}_{name}", f"{title}: {name.replace('_', ' ')}, since the start", value)


def _admin(values: Mapping[str, Any]) -> Iterator[Metric]:
    for name, value in _numbers(values):
        if name == "connections":
            yield gauge("admin_connections", "Open connections of this port", value)
        else:
            yield counter(f"admin_{name}", f"This port: {name.replace('_', ' ')}, since the start", value)


def _numbers(values: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    return ((name, value) for name, value in values.items() if isinstance(value, (int, float)))
