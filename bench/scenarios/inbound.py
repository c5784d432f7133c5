"""What it costs to receive: many publishers, nobody listening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.events import padded
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import Bar, Column, Scenario, setting
from bench.workload import inbound


@dataclass(frozen=True, kw_only=True)
class Inbound(Scenario):
    """CPU per message received: publishes into rooms that nobody joined.

    Every connection ends with a question whose answer proves that the server
    handled all of its messages before; peers parse each with JSON.parse. Much of
    the cost is per wake-up of the server, so others on its core make it cheaper:
    compare runs with a like number of messages per wake.
    """

    name: ClassVar = "inbound"
    columns: ClassVar = (
        Column("cpu_us", "CPU µs/message"),
        Column("cpu_percent", "CPU %", ".1f"),
        Column("per_wake", "messages/wake", ".1f"),
        Column("drained_ms", "drained ms after the last", ".1f"),
    )
    bars: ClassVar = (Bar("cpu_us", 1.0, versus="ws"), Bar("cpu_us", 0.6, versus="socketio"))
    plot: ClassVar = "cpu_us"

    connections: int = setting(200, "Connections that publish in turn.")
    rate: float = setting(20_000.0, "Publishes a second, over all connections.")
    size: int = setting(140, "Bytes of the event the message would become.")
    seconds: float = setting(6.0, "Length of each run.", short=3.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(bench.subjects(), lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        workload = inbound(self.connections, self.rate, self.seconds, [padded(self.size)])
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, workload, settle=0.5)
        recording = done.recording
        return done.sample(
            subject.label,
            repeat,
            cpu_us=done.cpu / 1e3 / workload.publishes,
            cpu_percent=done.cpu / 1e7 / done.seconds,
            drained_ms=(recording.last_data - recording.published) / 1e6,
            per_wake=workload.publishes / max(1, done.wakes),
            lag_p99=done.lag(),
        )
