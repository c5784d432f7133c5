from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from broker.config import Limits, Rates
from broker.server.connection import Traffic
from broker.server.load import LAG_MEMORY, Figures, Load
from broker.server.registry import Registry
from tests.hub.fakes import FakePeers


class Machine:
    """Whatever a load is measured of, set by hand."""

    def __init__(self, *, connections: int = 100, outbox: int = 1000) -> None:
        self.registry = Registry(Limits(), Rates(), FakePeers())
        self.traffic = Traffic(cast("Any", None), cast("Any", None), cast("Any", None), outbox_bytes=0,
                               process_outbox_bytes=outbox)  # fmt: skip
        self.burnt = 0.0
        self.load = Load(self.registry, self.traffic, connections=connections, cpu=lambda: self.burnt)
        self.load.sample(0.0)

    def second(self, now: float, cpu: float = 0.0) -> Figures:
        self.burnt += cpu
        self.load.sample(now)
        return self.load.figures


def test_an_idle_node_has_none() -> None:
    assert Machine().second(1.0) == Figures(0, 0, 0, 0, 0)


def test_the_figure_is_the_largest_part() -> None:
    machine = Machine()
    machine.registry.connections = 20
    assert machine.second(1.0, cpu=0.3) == Figures(0.3, 0.2, 0.3, 0, 0)
    machine.traffic.queued = 450
    assert machine.second(3.0, cpu=0.4) == Figures(0.45, 0.2, 0.2, 0, 0.45)
    machine.load.tick(0.05)
    machine.load.tick(0.001)
    assert machine.second(4.0) == Figures(0.5, 0.2, 0, 0.5, 0.45)


def test_a_late_tick_is_remembered_for_some_samples() -> None:
    machine = Machine()
    machine.load.tick(0.09)
    seen = [machine.second(float(number)).lag for number in range(1, LAG_MEMORY + 2)]
    assert seen == [0.9] * LAG_MEMORY + [0.0]


def test_before_two_samples_there_is_no_cpu() -> None:
    machine = Machine()
    fresh = Load(machine.registry, machine.traffic, connections=1, cpu=lambda: 1000.0)
    fresh.sample(5.0)
    assert fresh.figures.cpu == 0
    fresh.sample(5.0)  # a clock that stands still divides nothing
    assert fresh.figures.cpu == 0


def test_without_a_limit_the_outbox_is_never_full() -> None:
    machine = Machine(outbox=0)
    machine.traffic.queued = 10**9
    assert machine.second(1.0).outbox == 0


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**12),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
    st.floats(0.001, 100),
)
def test_every_part_is_a_fraction(
    connections: int, queued: int, cpu: float, lag: float, passed: float
) -> None:
    machine = Machine()
    machine.registry.connections = connections
    machine.traffic.queued = queued
    machine.load.tick(lag)
    found = machine.second(passed, cpu)
    assert all(0 <= part <= 1 for part in found)
    assert found.load == max(found[1:])
