"""One run of one workload against one server: phases, and what each cost the server.

All scenarios go through :func:`run`, so that every subject is measured in the
same way at the same moments.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from bench.analysis import Verdict, analyse
from bench.dialect import Broker, Dialect, SocketIO
from bench.load import LoadClient, LoadError
from bench.plan import Pace, write_plan
from bench.recording import Recording
from bench.servers import Server, ServerError
from bench.tools import CACHE, Unavailable
from bench.workload import Workload

_CURVE = (*range(100), 99.5, 99.9, 100)
"""Percentiles kept for the plots."""

BUSY = 90.0
"""Percent of its core from which on the load client may be what limits a run."""

DISTURBED = 5.0
"""Percent of the server's core that others may use before a sample is marked."""


class Subject(NamedTuple):
    """Who is measured: a label for the tables, the server to start, the language to speak."""

    label: str
    server: str
    dialect: Dialect


class Display(Protocol):
    """What the runs tell a person."""

    def step(self, text: str) -> None:
        """A run begins."""

    def phase(self, name: str, done: int, total: int) -> None:
        """It has got this far."""

    def note(self, text: str) -> None:
        """Something to know that is no result."""


@dataclass(slots=True)
class Sample:
    """What one run measured; ``curve`` holds latencies (ms) at the percentiles of the plots."""

    subject: str
    repeat: int
    metrics: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Run:
    """Costs of one run. CPU in ns, memory in bytes, ``seconds`` is the length of the schedule."""

    verdict: Verdict
    recording: Recording
    seconds: float
    cpu_setup: int
    cpu: int
    memory_rest: int
    memory_ready: int
    memory_end: int
    memory_peak: int
    wakes: int
    """How often the server slept and woke while publishing went on."""
    client_cpu: int
    """Of the load client, while publishing."""
    disturbed: float
    """Percent of the server's core that went to anything else (other processes, the hypervisor)."""

    def sample(self, subject: str, repeat: int, **metrics: float) -> Sample:
        """A sample with the latencies and the faults of this run, and ``metrics``."""
        values = {"disturbed": self.disturbed, **metrics}
        curve: list[tuple[float, float]] = []
        if len(self.verdict.latency):
            p50, p99, p999 = self.verdict.percentile(50, 99, 99.9)
            values = {"p50": p50, "p99": p99, "p99.9": p999, "lag_p99": self.lag(), **values}
            values["client_percent"] = self.client_cpu / 1e7 / self.seconds
            curve = list(zip(_CURVE, self.verdict.percentile(*_CURVE), strict=True))
        return Sample(subject, repeat, values, self.verdict.faults(), curve)

    def lag(self) -> float:
        """How late the load client was with its 99th percentile of publishes (ms)."""
        lag = sorted(self.verdict.lag.tolist())
        return float(lag[int(len(lag) * 0.99)]) if lag else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how often things are run, and against whom."""

    display: Display
    versus: tuple[str, ...] = ()
    repeat: int = 1
    server_core: int | None = 0
    client_core: int | None = 1
    with_broker: bool = True
    skipped: set[str] = field(default_factory=set)

    def subjects(self, able: Sequence[str] = ("broker", "ws", "socketio", "websockets")) -> list[Subject]:
        """The broker and those it is compared with, as far as they are ``able`` to take part."""
        names = (["broker"] if self.with_broker else []) + list(self.versus)
        subjects = []
        for name in names:
            if name in able:
                subjects.append(Subject(name, name, SocketIO() if name == "socketio" else Broker()))
            else:
                self.skip(name, "takes no part in this scenario")
        return subjects

    def skip(self, name: str, why: str) -> None:
        """Say once that a subject is left out."""
        if name not in self.skipped:
            self.skipped.add(name)
            self.display.note(f"{name} skipped: {why}")

    def alternate(
        self, subjects: Sequence[Subject], measure: Callable[[Subject, int], Sample]
    ) -> list[Sample]:
        """Measure all subjects in turn, ``repeat`` times, every other time in reverse order.

        Machines drift; side by side the drift is everybody's. A subject that
        fails gives a sample with the fault; one that is not available is skipped.
        """
        samples = []
        for repeat in range(self.repeat):
            for subject in subjects if repeat % 2 == 0 else reversed(subjects):
                if subject.label in self.skipped:
                    continue
                self.display.step(f"{subject.label} ({repeat + 1}/{self.repeat})")
                try:
                    samples.append(measure(subject, repeat))
                except Unavailable as error:
                    self.skip(subject.label, error.message)
                except (ServerError, LoadError) as error:
                    samples.append(Sample(subject.label, repeat, faults=[str(error)]))
        return samples

    def server(self, subject: Subject, extra: list[str] | None = None) -> Server:
        """Start a subject on the servers' core."""
        return Server(subject.server, self.server_core, extra)


def run(
    bench: Bench,
    server: Server,
    dialect: Dialect,
    workload: Workload,
    pace: Pace | None = None,
    *,
    settle: float = 0.0,
) -> Run:
    """Run ``workload`` against ``server``; ``settle`` seconds pass between setup and publishing.

    Raises :class:`~bench.load.LoadError` or :class:`~bench.servers.ServerError`.
    """
    pace = pace or Pace()
    plan = CACHE / f"plan-{os.getpid()}"
    peak = memory_rest = server.memory()
    seconds = float(workload.at[-1]) / 1e9 if workload.publishes else 0.0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal peak
        bench.display.phase(name, done, total)
        if name != "setup":
            server.check()
            peak = max(peak, server.memory())

    try:
        write_plan(plan, workload, dialect, server.port, pace)
        before = _core_busy(bench.server_core), time.monotonic(), server.cpu()
        with LoadClient(plan, bench.client_core, progress) as client:
            client.wait("ready", pace.setup_timeout + 10)
            cpu_ready = server.cpu()
            _wait(settle, server)
            memory_ready = server.memory()
            cpu_start, client_start, wakes = server.cpu(), client.cpu(), server.wakes()
            if workload.publishes:
                client.go()
                client.wait("done", pace.lead + seconds + 2 * pace.settle_timeout + 10)
            cpu_end, memory_end = server.cpu(), server.memory()
            client_cpu, wakes = client.cpu() - client_start, server.wakes() - wakes
            after = _core_busy(bench.server_core), time.monotonic(), cpu_end
            recording = client.finish()
    except LoadError:
        server.check()
        raise
    finally:
        plan.unlink(missing_ok=True)
    server.check()
    bench.display.phase("check", 0, 0)
    return Run(
        verdict=analyse(workload, recording, dialect.read),
        recording=recording,
        seconds=max(seconds, 1e-9),
        cpu_setup=cpu_ready - before[2],
        cpu=cpu_end - cpu_start,
        memory_rest=memory_rest,
        memory_ready=memory_ready,
        memory_end=memory_end,
        memory_peak=max(peak, memory_ready, memory_end),
        wakes=wakes,
        client_cpu=client_cpu,
        disturbed=_others(before, after),
    )


def _wait(seconds: float, server: Server) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        server.check()
        time.sleep(min(left, 0.5))


def _core_busy(core: int | None) -> float:
    """Seconds that a core has been busy, time stolen by the hypervisor included."""
    label = "cpu" if core is None else f"cpu{core}"
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == label:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _others(before: tuple[float, float, int], after: tuple[float, float, int]) -> float:
    busy, wall, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, 100 * (busy - own / 1e9) / wall)
