"""What the scenarios of several nodes share: the costs of each process, the search for a best rate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench.runner import Bench, Run, Sample, Subject
from bench.scenarios.base import ARRIVED, LATENCY, Column, Scenario, setting
from bench.scenarios.batched import best_rate

_MEMORY = (
    Column("a_mb", "A MB", ".0f"),
    Column("b_mb", "B MB", ".0f"),
    Column("redis_mb", "Redis MB", ".0f"),
)

COSTS = (
    Column("a_us", "A µs"),
    Column("b_us", "B µs"),
    Column("redis_us", "Redis µs"),
    Column("shared", "shared core %", ".0f"),
    *_MEMORY,
)
"""CPU of each process per item, how busy the core was that several share, and memory at the end."""

THROUGHPUT = (Column("rate", "per second", ",.0f"), ARRIVED, *LATENCY, *COSTS)

_STEP_BACK = 4.0
"""Where not even the rate of the bar is reached, the search begins at this part of it."""

BEST = " best"
"""Stands behind the name of a subject that was driven as far as it goes."""


def costs(done: Run, items: int) -> dict[str, float]:
    """The metrics of :data:`COSTS`."""
    return {"shared": done.shared, **per_item(done.by_process, done.memory_by_process, items)}


def per_item(cpu: Mapping[str, int], memory: Mapping[str, int], items: int) -> dict[str, float]:
    """CPU (ns) and memory (B) by process, as metrics: µs per item, and MB."""
    metrics = {}
    for name, used in cpu.items():
        short = name.removeprefix("node ").lower()
        metrics[f"{short}_us"] = used / 1e3 / items
        metrics[f"{short}_mb"] = memory[name] / 1e6
    return metrics


@dataclass(frozen=True, kw_only=True)
class Throughput(Scenario):
    """At the rate of the bar, and then in steps up to the highest rate at which nothing is lost or late."""

    rivals: ClassVar = ()

    rate: float
    limit: float = setting(
        500.0, "Milliseconds that the 99th percentile may take in the search for the best rate."
    )
    step_seconds: float = setting(4.0, "Length of each step of the search; 0 leaves it out.", short=0.0)
    seconds: float = setting(6.0, "Length of the run at `rate`.", short=3.0)

    @abstractmethod
    def _at(self, bench: Bench, rate: float, seconds: float) -> Run:
        """One run at ``rate`` items a second."""

    def measure(self, bench: Bench) -> list[Sample]:
        subjects = []
        for subject in bench.subjects(("broker",)):
            subjects.append(subject)
            if self.step_seconds:
                subjects.append(subject._replace(label=subject.label + BEST))
        return bench.alternate(subjects, lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        if subject.label.endswith(BEST):
            rate, done = self._search(bench, subject)
        else:
            rate, done = self.rate, self._at(bench, self.rate, self.seconds)
        published = len(done.recording.sent_at)
        arrived = done.verdict.arrival()
        return done.sample(subject.label, repeat, rate=rate, arrived=arrived, **costs(done, published))

    def _search(self, bench: Bench, subject: Subject) -> tuple[float, Run]:
        def attempt(rate: float) -> tuple[Run, bool]:
            bench.display.step(f"{subject.label}: trying {rate:,.0f}/s")
            done = self._at(bench, rate, self.step_seconds)
            return done, not done.verdict.faults() and done.verdict.percentile(99)[0] < self.limit

        best = best_rate(attempt, self.rate)
        return best if not best[1].verdict.faults() else best_rate(attempt, self.rate / _STEP_BACK)
