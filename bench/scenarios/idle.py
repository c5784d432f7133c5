"""What a connection costs that does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import Bar, Column, Scenario, setting
from bench.scenarios.small_rooms import sources
from bench.workload import silent


@dataclass(frozen=True, kw_only=True)
class Idle(Scenario):
    """Resident memory per idle connection, after settling."""

    name: ClassVar = "idle"
    columns: ClassVar = (
        Column("bytes", "B/connection", ".0f"),
        Column("memory_rest", "MB at rest", ".1f"),
        Column("memory_ready", "MB connected", ".1f"),
    )
    bars: ClassVar = (Bar("bytes", 6_000.0), Bar("memory_rest", 60.0))
    plot: ClassVar = "bytes"

    connections: int = setting(10_000, "Connections.")
    connect_rate: float = setting(5_000.0, "Connections opened a second at most.")
    settle: float = setting(5.0, "Seconds between the last connect and the measurement.", short=3.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(bench.subjects(), lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        pace = Pace(connect_rate=self.connect_rate, sources=sources(self.connections))
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, silent(self.connections), pace, settle=self.settle)
        grown = done.memory_ready - done.memory_rest
        return done.sample(
            subject.label,
            repeat,
            bytes=grown / max(1, done.verdict.ready),
            memory_rest=done.memory_rest / 1e6,
            memory_ready=done.memory_ready / 1e6,
        )
