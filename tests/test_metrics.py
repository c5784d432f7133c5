"""Histograms: counted as Prometheus counts, quantiles that never promise too little."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.metrics import SECONDS, Histogram, Stages

VALUES = st.one_of(st.floats(0, 20), st.sampled_from(SECONDS))
BOUNDS = st.lists(st.floats(0, 20), min_size=1, max_size=6, unique=True).map(lambda b: tuple(sorted(b)))


@given(st.lists(VALUES, max_size=50), BOUNDS | st.just(SECONDS))
def test_values_are_counted_at_or_below_their_bound(values: list[float], bounds: tuple[float, ...]) -> None:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    assert histogram.count == len(values)
    assert histogram.total == pytest.approx(sum(values))
    for number, bound in enumerate(bounds, 1):
        assert sum(histogram.counts[:number]) == sum(value <= bound for value in values)


@given(
    st.lists(VALUES, min_size=1, max_size=50),
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
)
def test_a_quantile_is_the_bound_of_the_bucket_it_lies_in(values: list[float], fraction: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    exact = sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]
    assert histogram.quantile(fraction) == next((bound for bound in SECONDS if exact <= bound), None)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_an_empty_histogram_has_no_quantiles(fraction: float) -> None:
    assert Histogram().quantile(fraction) is None


def test_what_lies_beyond_the_last_bound_has_no_upper_one() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 0, 1]
    assert histogram.quantile(0.5) == 1.0
    assert histogram.quantile(0.99) is None


def test_each_stage_has_a_histogram_of_its_own() -> None:
    stages = Stages()
    stages.handle.observe(0.5)
    counts = {name: histogram.count for name, histogram in stages.items()}
    assert counts == {"commit": 0, "fanout": 0, "handle": 1, "handshake": 0, "loop_lag": 0}
