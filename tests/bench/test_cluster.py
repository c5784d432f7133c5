"""The scenarios of several nodes, as small as they can be: real processes, but no time is judged."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.analysis import Verdict
from bench.runner import Bench, Reading, Run
from bench.scenarios.base import Scenario
from bench.scenarios.cluster_durable import ClusterDurable
from bench.scenarios.cluster_ingest import ClusterIngest
from bench.scenarios.cluster_link import ClusterLink
from bench.scenarios.cluster_recovery import ClusterRecovery
from bench.scenarios.cluster_rooms import ClusterRooms
from bench.scenarios.clusters import per_item
from bench.summary import judge, summarise
from bench.tools import CACHE
from tests.bench.recordings import recording, workload

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler"),
    pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux"),
]


class Unseen:
    """Shows nothing, keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        pass

    def phase(self, name: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def unpinned(display: Unseen) -> Bench:
    CACHE.mkdir(parents=True, exist_ok=True)
    return Bench(display=display, server_core=None, client_core=None)


@pytest.mark.parametrize(
    ("scenario", "processes"),
    [
        (ClusterRooms(connections=6, rooms=2, publishers=2, rate=100, seconds=0.2), "a b redis"),
        (ClusterDurable(connections=3, rate=100, seconds=0.2, step_seconds=0), "a redis"),
        (ClusterIngest(rooms=4, backends=2, pipeline=3, rate=100, seconds=0.2, step_seconds=0), "a redis"),
        (
            ClusterLink(connections=6, rooms=2, publishers=2, batch=3, rate=100, seconds=0.2, step_seconds=0),
            "a b redis",
        ),
        (ClusterRecovery(connections=6, rooms=2, missed=3, rate=100), "b redis"),
    ],
    ids=["rooms", "durable", "ingest", "link", "recovery"],
)
def test_all_arrives_and_every_process_has_its_costs(scenario: Scenario, processes: str) -> None:
    samples = scenario.measure(unpinned(Unseen()))
    assert [sample.faults for sample in samples] == [[]]
    metrics = samples[0].metrics
    assert metrics["arrived"] == 100.0
    for name in processes.split():
        assert metrics[f"{name}_us"] > 0
        assert metrics[f"{name}_mb"] > 0
    assert all(bar.value is not None for bar in judge(scenario.bars, summarise(samples)))


def test_without_a_redis_server_a_scenario_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    display = Unseen()
    assert ClusterRooms().measure(unpinned(display)) == []
    assert display.notes == [
        "broker skipped: redis-server was not found: install it (Debian: apt-get install redis-server)"
    ]


def test_a_node_that_does_not_start_takes_redis_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_BROKER", "sh -c 'exit 3'")
    before = children()
    [sample] = ClusterRooms().measure(unpinned(Unseen()))
    assert sample.faults[0].startswith("node A did not start")
    assert children() == before


def children() -> set[str]:
    """Processes that this thread has started and that are still there."""
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


@dataclass(frozen=True, kw_only=True)
class Bounded(ClusterDurable):
    """Loses everything above a rate; nothing is started."""

    rate: float = 100.0
    most: float = 1_000.0

    def _at(self, bench: Bench, rate: float, seconds: float) -> Run:
        arrived = 10 if rate <= self.most else 0
        verdict = Verdict(connections=1, ready=1, intended=10, expected=10, arrived=arrived)
        verdict.missing = 10 - arrived
        verdict.latency = np.ones(10, dtype=np.float32)
        return Run(
            verdict=verdict,
            recording=dataclasses.replace(NOTHING, sent_at=np.ones(10, dtype=np.uint64)),
            seconds=seconds,
            cpu_setup=0,
            cpu=0,
            memory_rest=0,
            memory_ready=0,
            memory_end=0,
            memory_peak=0,
            wakes=0,
            client_cpu=0,
            disturbed=0.0,
            shared=0.0,
        )


NOTHING = recording(workload([0], []), [])


@pytest.mark.parametrize("most", [1_000.0, 40.0])
def test_the_best_rate_is_looked_for_above_the_bar_or_below(most: float) -> None:
    at_bar, best = Bounded(most=most).measure(unpinned(Unseen()))
    assert (at_bar.subject, at_bar.metrics["rate"]) == ("broker", 100.0)
    assert best.subject == "broker best"
    assert most / 1.1 < best.metrics["rate"] <= most
    assert best.faults == []


def test_in_a_short_run_nothing_is_looked_for() -> None:
    assert [sample.subject for sample in Bounded(step_seconds=0).measure(unpinned(Unseen()))] == ["broker"]


def test_what_others_used_of_a_core_is_what_is_left_of_it() -> None:
    before = Reading(at=10.0, cpu={"a": 0, "b": 0}, on_core=0, wakes=0, server_core=5.0, client_core=1.0)
    after = Reading(
        at=12.0,
        cpu={"a": 10**9, "b": 3 * 10**9},
        on_core=10**9,
        wakes=0,
        server_core=6.5,
        client_core=2.0,
    )
    assert after.others_since(before) == 25.0
    assert after.shared_since(before) == 50.0
    assert after.cpu_since(before) == {"a": 10**9, "b": 3 * 10**9}


def test_costs_are_told_per_item_and_by_short_names() -> None:
    assert per_item({"node A": 6_000, "redis": 2_000}, {"node A": 3_000_000, "redis": 1_000_000}, 2) == {
        "a_us": 3.0,
        "a_mb": 3.0,
        "redis_us": 1.0,
        "redis_mb": 1.0,
    }
