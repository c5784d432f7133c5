"""A storm: everybody comes back at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import Bar, Column, Scenario, setting
from bench.scenarios.small_rooms import sources
from bench.workload import silent


@dataclass(frozen=True, kw_only=True)
class Connect(Scenario):
    """CPU per connection, handshake and welcome included, and whether a storm loses any."""

    name: ClassVar = "connect"
    columns: ClassVar = (
        Column("cpu_us", "CPU µs/connect", ".0f"),
        Column("lost", "lost", ".0f"),
        Column("rate", "connects/s", ".0f"),
        Column("setup_p50", "p50 ms", ".0f"),
        Column("setup_p99", "p99 ms", ".0f"),
    )
    bars: ClassVar = (
        Bar("cpu_us", 1.4, versus="ws"),
        Bar("cpu_us", 0.8, versus="socketio"),
        Bar("lost", 0.0),
    )
    plot: ClassVar = "cpu_us"

    connections: int = setting(10_000, "Connections.")
    in_flight: int = setting(0, "How many may be on their way at once; 0: all of them.")

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(bench.subjects(), lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        pace = Pace(in_flight=self.in_flight, sources=sources(self.connections), setup_timeout=90.0)
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, silent(self.connections), pace)
        verdict, recording = done.verdict, done.recording
        p50, p99 = np.percentile(verdict.setup, [50, 99]) if verdict.ready else (np.nan, np.nan)
        return done.sample(
            subject.label,
            repeat,
            cpu_us=done.cpu_setup / 1e3 / self.connections,
            lost=self.connections - verdict.ready,
            rate=verdict.ready / ((recording.setup_ended - recording.setup_started) / 1e9),
            setup_p50=float(p50),
            setup_p99=float(p99),
        )
