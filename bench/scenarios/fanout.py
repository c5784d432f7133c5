"""What one unbatched delivery costs: the broker against the bare system call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.events import padded
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.workload import one_room


@dataclass(frozen=True, kw_only=True)
class FanOut(Scenario):
    """CPU per delivery: one room, few publishes, so that each is a frame of its own to every session."""

    name: ClassVar = "fanout"
    columns: ClassVar = (Column("cpu_us", "CPU µs/delivery"), *LATENCY, ARRIVED)
    bars: ClassVar = (
        Bar("cpu_us", 1.20, versus="floor"),
        Bar("cpu_us", 0.75, versus="ws"),
        Bar("cpu_us", 0.55, versus="socketio"),
    )
    plot: ClassVar = "cpu_us"
    rivals: ClassVar = ("floor", "ws", "socketio")

    sessions: int = setting(1000, "Sessions in the room.")
    rate: float = setting(50.0, "Publishes a second; low, so that nothing gathers into batches.")
    size: int = setting(140, "Bytes of a frame's payload.")
    seconds: float = setting(8.0, "Length of each run.", short=4.0)

    def measure(self, bench: Bench) -> list[Sample]:
        return bench.alternate(
            bench.subjects(("broker", "floor", "ws", "socketio", "websockets")),
            lambda subject, repeat: self._one(bench, subject, repeat),
        )

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        workload = one_room(self.sessions, self.rate, self.seconds, [padded(self.size)])
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, workload, settle=0.5)
        verdict = done.verdict
        return done.sample(
            subject.label,
            repeat,
            cpu_us=done.cpu / 1e3 / max(1, verdict.arrived),
            arrived=verdict.arrival(),
            frames=verdict.frames,
            bytes_per_frame=verdict.payload_bytes / max(1, verdict.frames),
        )
