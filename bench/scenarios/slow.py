"""One client that reads nothing, among others that do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bench.events import padded
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, LATENCY, Bar, Column, Scenario, setting
from bench.workload import one_room


@dataclass(frozen=True, kw_only=True)
class Slow(Scenario):
    """Whether a session that reads nothing costs memory without bound, or delays the others.

    Each subject runs with and without it; the difference of the memory peaks
    is the deaf session's, the kernel's buffers apart.
    """

    name: ClassVar = "slow"
    columns: ClassVar = (
        ARRIVED,
        *LATENCY,
        Column("grown_kb", "KB grown under load", ".0f"),
        Column("deaf_told", "deaf one told or closed", ".0f"),
    )
    bars: ClassVar = (
        Bar("arrived", 100.0, subject="broker + deaf", at_least=True),
        Bar("p99", 1.5, subject="broker + deaf", versus="broker"),
        Bar("deaf_told", 1.0, subject="broker + deaf", at_least=True),
    )
    plot: ClassVar = "p99"
    rivals: ClassVar = ("ws",)

    sessions: int = setting(200, "Sessions that read.")
    rate: float = setting(400.0, "Publishes a second.")
    size: int = setting(2_000, "Bytes of an event's payload; large, so that buffers fill soon.")
    seconds: float = setting(15.0, "Length of each run.", short=10.0)

    def measure(self, bench: Bench) -> list[Sample]:
        subjects = []
        for subject in bench.subjects():
            subjects += [subject, subject._replace(label=f"{subject.label} + deaf")]
        return bench.alternate(subjects, lambda subject, repeat: self._one(bench, subject, repeat))

    def _one(self, bench: Bench, subject: Subject, repeat: int) -> Sample:
        deaf = frozenset({self.sessions}) if subject.label.endswith("deaf") else frozenset[int]()
        workload = one_room(
            self.sessions + len(deaf), self.rate, self.seconds, [padded(self.size)], deaf=deaf
        )
        with bench.server(subject) as server:
            done = run(bench, server, subject.dialect, workload, settle=0.5)
        verdict = done.verdict
        told = sum(verdict.deaf_ended.values()) + sum(verdict.deaf_notices.values())
        for what, count in (verdict.deaf_ended + verdict.deaf_notices).items():
            bench.display.note(f"{subject.label}: the deaf one: {what} ({count})")
        return done.sample(
            subject.label,
            repeat,
            arrived=verdict.arrival(),
            grown_kb=(done.memory_peak - done.memory_ready) / 1024,
            deaf_told=float(told > 0) if deaf else float("nan"),
        )
