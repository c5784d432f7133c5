"""Deadlines: never early, at most a second late, nobody forgotten."""

from __future__ import annotations

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from broker.server.wheel import AFTER_FAULT, Wheel

times = st.floats(0, 100, allow_nan=False)


class Alarm:
    """Rings at ``due`` and, where there are, at later times; notes when it was asked."""

    def __init__(self, *later: float) -> None:
        self.asked: list[float] = []
        self._later = list(later)

    def tick(self, now: float) -> float | None:
        self.asked.append(now)
        return self._later.pop(0) if self._later else None


class Broken:
    """Raises when it is asked."""

    asked = 0

    def tick(self, _now: float) -> float | None:
        self.asked += 1
        raise RuntimeError("a fault")


def test_each_is_asked_when_its_second_has_come() -> None:
    wheel, alarms = Wheel(), [Alarm() for _ in range(4)]
    for alarm, when in zip(alarms, (0.5, 1.0, 1.1, 3.0), strict=True):
        wheel.add(alarm, when)
    for now in (0.9, 1.0, 1.5, 2.0, 2.9, 3.5):
        wheel.advance(now)
    assert [alarm.asked for alarm in alarms] == [[1.0], [1.0], [2.0], [3.5]]
    assert len(wheel) == 0


def test_what_is_overdue_is_asked_at_the_next_tick_not_in_this_one() -> None:
    wheel, alarm = Wheel(), Alarm(1.0, 1.0)
    wheel.add(alarm, 5.0)
    wheel.advance(5.0)
    assert (alarm.asked, len(wheel)) == ([5.0], 1)
    wheel.advance(5.5)
    assert alarm.asked == [5.0]
    wheel.advance(6.0)
    wheel.advance(7.0)
    assert (alarm.asked, len(wheel)) == ([5.0, 6.0, 7.0], 0)


def test_late_ticks_ask_in_the_order_of_deadlines() -> None:
    wheel = Wheel()
    order: list[int] = []

    class Named(Alarm):
        def __init__(self, name: int) -> None:
            super().__init__()
            self._name = name

        def tick(self, now: float) -> float | None:
            order.append(self._name)
            return super().tick(now)

    for when in (3, 1, 2):
        wheel.add(Named(when), when)
    wheel.advance(10)
    assert order == [1, 2, 3]


def test_a_fault_harms_nobody_else_and_is_asked_again_later() -> None:
    wheel, broken, alarm = Wheel(), Broken(), Alarm()
    wheel.add(broken, 1)
    wheel.add(alarm, 1)
    wheel.advance(1)
    assert (alarm.asked, wheel.faults, len(wheel)) == ([1], 1, 1)
    wheel.advance(AFTER_FAULT)
    assert broken.asked == 1
    wheel.advance(1 + AFTER_FAULT)
    assert broken.asked == 2


@given(st.lists(times), st.lists(times))
def test_never_early_and_never_forgotten(deadlines: list[float], ticks: list[float]) -> None:
    wheel = Wheel()
    alarms = [(when, Alarm()) for when in deadlines]
    for when, alarm in alarms:
        wheel.add(alarm, when)
    for now in sorted(ticks):
        wheel.advance(now)
        assert len(wheel) == sum(not alarm.asked for _, alarm in alarms)
    for when, alarm in alarms:
        due = [now for now in sorted(ticks) if now >= ceil(when)]
        assert alarm.asked == due[:1]
