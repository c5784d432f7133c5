from __future__ import annotations

import json
from pathlib import Path

from bench.report import Result, save, warnings
from bench.runner import Sample
from bench.scenarios import SCENARIOS
from bench.scenarios.base import Bar
from bench.scenarios.batched import best_rate
from bench.scenarios.fanout import FanOut
from bench.summary import Spread, judge, summarise

SAMPLES = [
    Sample("broker", 0, {"cpu_us": 5.0, "nothing": float("nan")}),
    Sample("ws", 0, {"cpu_us": 10.0}),
    Sample("broker", 1, {"cpu_us": 9.0}),
    Sample("broker", 2, {"cpu_us": 6.0}),
]


def test_medians_with_their_range() -> None:
    summary = summarise(SAMPLES)
    assert list(summary) == ["broker", "ws"]
    assert summary["broker"] == {"cpu_us": Spread(6.0, 5.0, 9.0)}


def test_bars() -> None:
    bars = [
        Bar("cpu_us", 0.75, versus="ws"),
        Bar("cpu_us", 0.5, versus="ws"),
        Bar("cpu_us", 6.0, at_least=True),
        Bar("cpu_us", 1.0, versus="floor"),
        Bar("p99", 1.0),
    ]
    judged = judge(bars, summarise(SAMPLES))
    assert [item.reached for item in judged] == [True, False, True, None, None]
    assert judged[0].value == 0.6
    assert judged[0].text() == "broker: cpu_us <= 0.75 of ws"


def test_best_rate_climbs_in_steps_and_refines() -> None:
    tried = []

    def attempt(rate: float) -> tuple[float, bool]:
        tried.append(rate)
        return rate * 2, rate <= 100

    rate, result = best_rate(attempt, 20.0)
    assert 100 / 1.08 < rate <= 100
    assert result == rate * 2
    assert max(tried) < 130


def test_best_rate_gives_a_second_chance() -> None:
    unlucky = iter([False])

    def attempt(rate: float) -> tuple[float, bool]:
        return rate, rate <= 30 and next(unlucky, True)

    assert best_rate(attempt, 20.0)[0] > 25


def test_best_rate_is_the_first_even_if_it_fails() -> None:
    assert best_rate(lambda rate: (rate, False), 20.0) == (20.0, 20.0)


def test_warnings_name_faults_and_doubts() -> None:
    sample = Sample(
        "ws",
        0,
        {"disturbed": 30.0, "lag_p99": 8.0, "client_percent": 95.0, "shared": 99.0},
        ["1 deliveries are missing"],
    )
    assert warnings([*SAMPLES, sample]) == [
        "ws: 1 deliveries are missing",
        "others used up to 30 % of the server's core in 1 runs: doubtful",
        "the load client used up to 95 % of its core: it may be what limits",
        "the core of the load client and Redis was busy up to 99 %: it may be what limits",
        "the load client was up to 8 ms late (p99): latencies include that",
    ]


def test_results_are_kept_as_json_and_svg(tmp_path: Path) -> None:
    scenario = FanOut()
    curve = [(float(point), 0.5) for point in range(101)]
    samples = [
        Sample("broker", 0, {"cpu_us": 5.0, "p50": float("nan")}, curve=curve),
        Sample("ws", 0, {"cpu_us": 9.0}),
    ]
    where = {"cpu": "a processor", "kernel": "1", "commit": "abc"}
    save([Result.of(scenario, samples)], where, tmp_path / "results", tmp_path / "out.json")
    kept = json.loads((tmp_path / "results" / "fanout.json").read_text())
    assert kept == json.loads((tmp_path / "out.json").read_text())
    assert kept["samples"][0]["metrics"] == {"cpu_us": 5.0, "p50": None}
    assert kept["settings"]["sessions"] == 1000
    assert "<svg" in (tmp_path / "results" / "fanout.svg").read_text()


def test_every_scenario_has_a_short_version_and_a_column_for_its_plot() -> None:
    for kind in SCENARIOS:
        assert kind.plot in [column.key for column in kind.columns]
        assert kind.short().name == kind.name
