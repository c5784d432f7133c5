"""Token buckets: a burst at once, the rate in the long run, and an honest wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Rate, Rates
from broker.server.rates import Bucket, RateLimiter


def test_a_burst_then_the_rate() -> None:
    bucket = Bucket(2.0, 3.0, 100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(100.25) == 0.25
    assert bucket.take(100.5) == 0.0
    assert bucket.take(100.5) == 0.5


def test_a_bucket_holds_no_more_than_its_burst() -> None:
    bucket = Bucket(10.0, 2.0, 0.0)
    assert [bucket.take(1000.0) for _ in range(3)] == [0.0, 0.0, 0.1]


@given(
    rate=st.floats(0.01, 1e6),
    burst=st.integers(1, 1000),
    steps=st.lists(st.floats(0, 10), max_size=60),
)
def test_never_more_than_burst_and_rate_allow(rate: float, burst: int, steps: list[float]) -> None:
    bucket = Bucket(rate, burst, 0.0)
    now, taken = 0.0, 0
    for step in steps:
        now += step
        wait = bucket.take(now)
        assert 0.0 <= wait <= 1.0 / rate * 1.000001
        taken += not wait
        assert taken <= (burst + now * rate) * 1.000001 + 0.001


@given(rate=st.floats(0.01, 1e5), burst=st.integers(1, 5), start=st.floats(0, 1e6))
def test_who_waits_as_told_is_let_in(rate: float, burst: int, start: float) -> None:
    bucket = Bucket(rate, burst, start)
    now = start
    for _ in range(burst + 3):
        wait = bucket.take(now)
        if wait:
            now += wait
            assert bucket.take(now) == 0.0


def test_each_class_has_a_bucket_of_its_own() -> None:
    limiter = RateLimiter(Rates(publish=Rate(rate=1, burst=1), join=Rate(rate=1, burst=2)))
    assert [limiter.take("publish", 0.0), limiter.take("publish", 0.0)] == [0.0, 1.0]
    assert [limiter.take("join", 0.0) for _ in range(3)] == [0.0, 0.0, 1.0]


def test_a_bucket_begins_full_when_it_is_first_used() -> None:
    limiter = RateLimiter(Rates(publish=Rate(rate=1, burst=1)))
    assert limiter.take("publish", 500.0) == 0.0


def test_no_rate_is_no_limit() -> None:
    limiter = RateLimiter(Rates(call=Rate(rate=0, burst=1)))
    assert not any(limiter.take("call", 0.0) for _ in range(1000))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_users_buckets_are_larger(factor: float) -> None:
    limiter = RateLimiter(Rates(query=Rate(rate=1, burst=10)), factor)
    taken = sum(not limiter.take("query", 0.0) for _ in range(100))
    assert taken == 10 * factor
    assert limiter.take("query", 0.0) == 1.0 / factor
