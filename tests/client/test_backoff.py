from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.client import Backoff
from tests.client.scripted_server import TopOfTheRange


@given(st.integers(0, 10**6), st.floats(0.01, 10), st.floats(1, 4), st.floats(0.01, 100))
def test_full_jitter_between_zero_and_the_bound(attempt: int, base: float, factor: float, cap: float) -> None:
    delay = Backoff(base=base, factor=factor, cap=cap).delay(attempt)
    assert 0 <= delay <= cap
    if attempt == 0:
        assert delay <= base


def test_the_bound_doubles_up_to_the_cap() -> None:
    backoff = Backoff(base=0.5, cap=5.0, rng=TopOfTheRange())
    assert [backoff.delay(attempt) for attempt in range(6)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
