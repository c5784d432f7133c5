"""An ordinary day: many connections in many small rooms, a steady stream of events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.events import padded
from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.workload import many_rooms

_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class SmallRooms(Scenario):
    """10,000 connections in 1,000 rooms: whether all arrives, how soon, at what CPU and memory."""

    name: ClassVar = "small-rooms"
    columns: ClassVar = (
        ARRIVED,
        *LATENCY,
        Column("cpu_percent", "CPU %", ".1f"),
        Column("memory_rest", "MB at rest", ".1f"),
        Column("memory_ready", "MB connected", ".1f"),
        Column("memory_end", "MB at the end", ".1f"),
    )
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("p99", 5.0),
        Bar("cpu_percent", 0.85, versus="ws"),
        Bar("cpu_percent", 0.60, versus="socketio"),
        Bar("memory_end", 120.0),
        Bar("memory_rest", 60.0),
    )
    plot: ClassVar = "cpu_percent"

    connections: int = setting(10_000, "Connections, spread evenly over the rooms.")
    rooms: int = setting(1_000, "Rooms.")
    rate: float = setting(1_667.0, "Publishes a second, over all rooms; 1,667 is 100,000 a minute.")
    size: int = setting(140, "Bytes of a frame's payload.")
    connect_rate: float = setting(5_000.0, "Connections opened a second at most.")
    seconds: float = setting(10.0, "Length of each run.", short=5.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(bench.subjects(), lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        body = padded(self.size, "bench:500")
        workload = many_rooms(self.connections, self.rooms, self.rate, self.seconds, [body])
        pace = Pace(connect_rate=self.connect_rate, sources=sources(self.connections))
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, workload, pace, settle=1.0)
        return done.sample(
            subject.label,
            repeat,
            arrived=done.verdict.arrival(),
            cpu_percent=done.cpu / 1e7 / done.seconds,
            memory_rest=done.memory_rest / _MB,
            memory_ready=done.memory_ready / _MB,
            memory_end=done.memory_end / _MB,
        )


def sources(connections: int) -> int:
    """Loopback addresses to connect from: one reaches a port from about 28,000 of its own."""
    return 1 + connections // 25_000
