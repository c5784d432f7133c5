from __future__ import annotations

from itertools import cycle, islice

from hypothesis import given
from hypothesis import strategies as st

from broker.auth.failures import FORGET_SECONDS, FREE_FAILURES, MAX_DELAY, FailureDelay


def test_the_first_failures_are_free_then_each_doubles_up_to_the_limit() -> None:
    delays = FailureDelay()
    told = [delays.failed("192.0.2.1", 0.0) for _ in range(FREE_FAILURES + 7)]
    assert told == [0] * FREE_FAILURES + [0.25, 0.5, 1, 2, 4, 4, 4]
    assert told[-1] == MAX_DELAY


def test_the_delay_runs_out_and_the_address_is_forgotten() -> None:
    delays = FailureDelay()
    assert delays.delay("192.0.2.1", 0.0) == 0
    for _ in range(FREE_FAILURES + 2):
        delays.failed("192.0.2.1", 100.0)
    assert delays.delay("192.0.2.1", 100.0) == 0.5
    assert delays.delay("192.0.2.1", 100.4) > 0
    assert delays.delay("192.0.2.1", 100.5) == 0
    assert delays.delay("192.0.2.2", 100.0) == 0
    assert delays.failed("192.0.2.1", 100.0 + FORGET_SECONDS - 1) == 1
    assert delays.failed("192.0.2.1", 100.0 + 2 * FORGET_SECONDS) == 0


def test_sweep_drops_what_is_forgotten_and_nothing_else() -> None:
    delays = FailureDelay()
    delays.failed("192.0.2.1", 0.0)
    delays.failed("192.0.2.2", 10.0)
    delays.sweep(FORGET_SECONDS)
    assert len(delays) == 1
    delays.sweep(FORGET_SECONDS + 10)
    assert len(delays) == 0
    delays.sweep(FORGET_SECONDS + 11)


def test_ipv6_counts_by_network_and_a_mapped_address_as_ipv4() -> None:
    delays = FailureDelay()
    for host in islice(cycle(("2001:db8::1", "2001:db8::2", "2001:db8:0:0:ffff::3%eth0")), FREE_FAILURES):
        delays.failed(host, 0.0)
    assert delays.failed("2001:db8::4", 0.0) > 0
    assert delays.failed("2001:db8:0:1::1", 0.0) == 0
    for host in islice(cycle(("192.0.2.1", "::ffff:192.0.2.1")), FREE_FAILURES):
        delays.failed(host, 0.0)
    assert delays.failed("::ffff:192.0.2.1", 0.0) > 0


def test_an_address_that_is_none_counts_under_its_own_name() -> None:
    delays = FailureDelay()
    assert [delays.failed("unix", 0.0) for _ in range(FREE_FAILURES + 1)][-1] > 0


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 1000)), max_size=60))
def test_the_table_is_bounded_and_delays_stay_in_range(steps: list[tuple[str, float]]) -> None:
    delays = FailureDelay(capacity=4)
    now = 0.0
    for address, pause in steps:
        now += pause
        assert 0 <= delays.failed(address, now) <= MAX_DELAY
        assert 0 <= delays.delay(address, now) <= MAX_DELAY
        assert len(delays) <= 4


def test_the_address_refused_longest_ago_gives_way() -> None:
    delays = FailureDelay(capacity=2)
    for _ in range(FREE_FAILURES + 1):
        delays.failed("a", 0.0)
    delays.failed("b", 0.0)
    delays.failed("a", 0.0)
    delays.failed("c", 0.0)
    assert delays.delay("a", 0.0) > 0
