"""One big room under load: how far batching carries, and where the others end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from bench.dialect import Broker
from bench.events import varied
from bench.plan import Pace
from bench.runner import Bench, Run, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.workload import one_room

Result = TypeVar("Result")

_BODIES = 500
"""Different texts, so that zstd cannot shrink a batch to one of them."""

_STEP = 1.25
_FINE_STEP = 1.08


@dataclass(frozen=True, kw_only=True)
class Batched(Scenario):
    """Millions of deliveries a second in one room, against each peer's best rate without loss.

    The broker is held at two rates, plain and with zstd; peers are driven up
    in steps until something is lost or the 99th percentile passes the limit.
    """

    name: ClassVar = "batched"
    columns: ClassVar = (
        Column("deliveries", "deliveries/s", ",.0f"),
        ARRIVED,
        *LATENCY,
        Column("cpu_percent", "CPU %", ".1f"),
        Column("batch", "events/frame", ".1f"),
    )
    bars: ClassVar = (
        Bar("arrived", 100.0, at_least=True),
        Bar("p99", 50.0),
        Bar("arrived", 100.0, subject="broker zstd", at_least=True),
        Bar("p99", 80.0, subject="broker zstd"),
        Bar("deliveries", 50.0, subject="broker zstd", versus="socketio", at_least=True),
    )
    plot: ClassVar = "deliveries"
    rivals: ClassVar = ("socketio",)

    sessions: int = setting(1000, "Sessions in the room.")
    rate: float = setting(2_000.0, "Publishes a second to the broker without compression; 0 leaves this out.")
    zstd_rate: float = setting(4_000.0, "Publishes a second to the broker with zstd; 0 leaves this out.")
    size: int = setting(140, "Bytes of a single event's payload.")
    limit: float = setting(60.0, "Milliseconds that a peer's 99th percentile may take.")
    first_rate: float = setting(20.0, "Publishes a second at which the search for a peer's best begins.")
    step_seconds: float = setting(4.0, "Length of each step of the search.", short=3.0)
    seconds: float = setting(8.0, "Length of each run of the broker.", short=4.0)

    def measure(self, bench: Bench) -> list[Sample]:
        subjects = []
        for subject in bench.subjects():
            if subject.server != "broker":
                subjects.append(subject)
                continue
            if self.rate:
                subjects.append(subject)
            if self.zstd_rate:
                subjects.append(Subject("broker zstd", "broker", Broker("zstd")))
        return bench.alternate(subjects, lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        if subject.server == "broker":
            rate = self.rate if subject.label == "broker" else self.zstd_rate
            done = self._at(bench, subject, rate, self.seconds)
        else:
            rate, done = self._search(bench, subject)
        return self._sample(subject, repeat, rate, done)

    def _sample(self, subject: Subject, repeat: int, rate: float, done: Run) -> Sample:
        verdict = done.verdict
        events = verdict.arrived + verdict.duplicated
        return done.sample(
            subject.label,
            repeat,
            publishes=rate,
            deliveries=rate * self.sessions,
            arrived=verdict.arrival(),
            cpu_percent=done.cpu / 1e7 / done.seconds,
            batch=events / max(1, verdict.frames),
            wire_bytes=verdict.payload_bytes / max(1, events),
        )

    def _at(self, bench: Bench, subject: Subject, rate: float, seconds: float) -> Run:
        workload = one_room(self.sessions, rate, seconds, varied(_BODIES, self.size, seed=1))
        with bench.server(subject) as server:
            return run(bench, server, subject.dialect, workload, Pace(settle_timeout=30.0), settle=0.3)

    def _search(self, bench: Bench, subject: Subject) -> tuple[float, Run]:
        """A peer's best rate, and its run there. If even the first rate fails: that run, faults and all."""

        def attempt(rate: float) -> tuple[Run, bool]:
            bench.display.step(f"{subject.label}: trying {rate * self.sessions:,.0f} deliveries/s")
            done = self._at(bench, subject, rate, self.step_seconds)
            return done, not done.verdict.faults() and done.verdict.percentile(99)[0] < self.limit

        return best_rate(attempt, self.first_rate)


def best_rate(attempt: Callable[[float], tuple[Result, bool]], first: float) -> tuple[float, Result]:
    """The highest rate that passes: up by quarters until one fails twice, then finer from the last good one.

    ``attempt(rate)`` returns a result and whether it passed. A rate is given a
    second chance, so that one disturbance does not end the climb in the
    subject's disfavour. Returns the first attempt if it fails.
    """
    result, passed = _twice(attempt, first)
    best = first, result
    for step in (_STEP, _FINE_STEP):
        while passed:
            rate = best[0] * step
            result, passed = _twice(attempt, rate)
            if passed:
                best = rate, result
        passed = step == _STEP and best[0] > first
    return best


def _twice(attempt: Callable[[float], tuple[Result, bool]], rate: float) -> tuple[Result, bool]:
    result, passed = attempt(rate)
    return (result, passed) if passed else attempt(rate)
