"""Gathering begins with the rate, ends with it, and learns from clients that wait for answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.server.gather import FIRST_HOLD, GATHER, LONGEST_HOLD, WINDOW, WORTH, Gathering

STEP = 1.25 * WINDOW
"""A little more than a window, so that rounding decides nothing."""
BUSY = round(WORTH * STEP / GATHER) + 1
"""Ready sockets in one window from which on gathering is worth it."""


def test_few_ready_sockets_never_wait() -> None:
    gathering = Gathering(0.0)
    for window in range(1, 100):
        gathering.note(BUSY - 2, window * STEP)
        assert not gathering.active


def test_many_ready_sockets_gather_until_they_become_few() -> None:
    gathering = Gathering(0.0)
    said = []
    for ready, now in ((BUSY - 2, STEP / 2), (3, STEP), (BUSY, 2 * STEP), (0, 3 * STEP)):
        gathering.note(ready, now)
        said.append(gathering.active)
    # Half a window proves nothing; then they gather, until they become few.
    assert said == [False, True, True, False]


def test_a_trial_that_failed_is_repeated_later_each_time() -> None:
    gathering = Gathering(0.0)
    now, waits = 0.0, []
    for _ in range(9):
        ended = now
        while not gathering.active:
            now += STEP
            gathering.note(BUSY, now)
        waits.append(now - ended)
        now += STEP
        gathering.note(1, now)  # made to wait, they sent nothing more
    assert waits[0] <= 2 * STEP
    for number, wait in enumerate(waits[1:]):
        hold = min(FIRST_HOLD * 2**number, LONGEST_HOLD)
        assert hold - 2 * STEP <= wait <= hold + 2 * STEP


def test_success_forgets_failures() -> None:
    gathering = Gathering(0.0)
    gathering.note(BUSY, STEP)
    gathering.note(0, 2 * STEP)
    now = 2 * STEP + FIRST_HOLD
    gathering.note(2 * round(BUSY * FIRST_HOLD / STEP), now)
    assert gathering.active
    gathering.note(2 * BUSY, now + STEP)
    gathering.note(0, now + 2 * STEP)
    after = now + 2 * STEP + FIRST_HOLD
    gathering.note(2 * round(BUSY * FIRST_HOLD / STEP), after)
    assert gathering.active


def test_clients_that_wait_for_answers_are_left_alone() -> None:
    gathering = Gathering(0.0)
    gathering.note(10 * BUSY, STEP)
    assert gathering.active
    gathering.note(2 * BUSY, 2 * STEP)  # still many, but they came faster when nothing made them wait
    assert not gathering.active


@given(st.lists(st.tuples(st.integers(0, 256), st.floats(0.0, 0.1)), max_size=200))
def test_active_only_after_a_window_above_the_rate(passes: list[tuple[int, float]]) -> None:
    gathering = Gathering(0.0)
    now = 0.0
    total = 0
    for ready, step in passes:
        now += step
        total += ready
        gathering.note(ready, now)
        if gathering.active:
            assert total >= WORTH * WINDOW / GATHER * 0.999
