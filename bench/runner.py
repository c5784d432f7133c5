"""One run of one workload against one server: phases, and what each cost the server.

All scenarios go through :func:`run`, so that every subject is measured in the
same way at the same moments.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from bench.analysis import Verdict, analyse
from bench.dialect import Broker, Dialect, SocketIO
from bench.load import LoadClient, LoadError, Progress
from bench.plan import Pace, write_plan
from bench.recording import Recording
from bench.servers import Measured, Server, ServerError
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
    shared: float
    """Percent that the load client's core was busy, with it and with whatever runs there."""
    by_process: Mapping[str, int] = field(default_factory=dict)
    """CPU while publishing, process by process."""
    memory_by_process: Mapping[str, int] = field(default_factory=dict)
    """Memory at the end, process by process."""

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
    server: Measured,
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
    meter = Meter(bench, server)
    peak = memory_rest = meter.memory()
    seconds = float(workload.at[-1]) / 1e9 if workload.publishes else 0.0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal peak
        bench.display.phase(name, done, total)
        if name != "setup":
            meter.check()
            peak = max(peak, meter.memory())

    try:
        before = meter.read()
        with load_client(bench, server, dialect, workload, pace, progress) as client:
            client.wait("ready", pace.setup_timeout + 10)
            ready = meter.read()
            _wait(settle, meter)
            memory_ready = meter.memory()
            start, client_start = meter.read(), client.cpu()
            if workload.publishes:
                client.go()
                client.wait("done", pace.lead + seconds + 2 * pace.settle_timeout + 10)
            end, memory_end = meter.read(), meter.memories()
            client_cpu = client.cpu() - client_start
            recording = client.finish()
    except LoadError:
        meter.check()
        raise
    meter.check()
    bench.display.phase("check", 0, 0)
    return Run(
        verdict=analyse(workload, recording, dialect.read),
        recording=recording,
        seconds=max(seconds, 1e-9),
        cpu_setup=ready.total - before.total,
        cpu=end.total - start.total,
        memory_rest=memory_rest,
        memory_ready=memory_ready,
        memory_end=sum(memory_end.values()),
        memory_peak=max(peak, memory_ready, sum(memory_end.values())),
        wakes=end.wakes - start.wakes,
        client_cpu=client_cpu,
        disturbed=end.others_since(before),
        shared=end.shared_since(start),
        by_process=end.cpu_since(start),
        memory_by_process=memory_end,
    )


@contextlib.contextmanager
def load_client(  # noqa: PLR0917 - all that makes a plan, and who looks on
    bench: Bench,
    server: Measured,
    dialect: Dialect,
    workload: Workload,
    pace: Pace,
    progress: Progress | None = None,
) -> Iterator[LoadClient]:
    """The load client at work on ``workload``; it ends with the block."""
    plan = CACHE / f"plan-{os.getpid()}"
    try:
        write_plan(plan, workload, dialect, server.ports, pace)
        with LoadClient(plan, bench.client_core, progress or bench.display.phase) as client:
            yield client
    finally:
        plan.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What had been used up at one moment: CPU in ns, cores in seconds."""

    at: float
    cpu: Mapping[str, int]
    on_core: int
    """CPU of those processes that run on the servers' core."""
    wakes: int
    server_core: float
    client_core: float

    @property
    def total(self) -> int:
        """CPU of all processes."""
        return sum(self.cpu.values())

    def cpu_since(self, before: Reading) -> dict[str, int]:
        """CPU of each process that was there before (ns)."""
        return {name: self.cpu[name] - used for name, used in before.cpu.items()}

    def others_since(self, before: Reading) -> float:
        """Percent of the servers' core that went to anything but the processes measured."""
        own = (self.on_core - before.on_core) / 1e9
        return max(0.0, 100 * (self.server_core - before.server_core - own) / (self.at - before.at))

    def shared_since(self, before: Reading) -> float:
        """Percent that the load client's core was busy."""
        return 100 * (self.client_core - before.client_core) / max(1e-9, self.at - before.at)


class Meter:
    """Reads what the processes of a run have used."""

    def __init__(self, bench: Bench, measured: Measured) -> None:
        self._bench = bench
        self._processes = measured.processes

    def check(self) -> None:
        """Raise :class:`ServerError` if one of them is no longer running."""
        for process in self._processes:
            process.check()

    def memories(self) -> dict[str, int]:
        """Resident memory of each (B)."""
        return {process.name: process.memory() for process in self._processes}

    def memory(self) -> int:
        """Resident memory of all (B)."""
        return sum(self.memories().values())

    def read(self) -> Reading:
        """Now."""
        cpu = {process.name: process.cpu() for process in self._processes}
        core = self._bench.server_core
        return Reading(
            at=time.monotonic(),
            cpu=cpu,
            on_core=sum(cpu[process.name] for process in self._processes if process.core == core),
            wakes=sum(process.wakes() for process in self._processes),
            server_core=_core_busy(core),
            client_core=_core_busy(self._bench.client_core),
        )


def _wait(seconds: float, meter: Meter) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        meter.check()
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
