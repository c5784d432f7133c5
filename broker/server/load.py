"""How busy the node is, as one figure from 0 to 1: for balancers, autoscalers and operators.

A node is as loaded as whatever it will run out of first, so the figure is the
largest of four parts, each a fraction of what can be had. It is taken once a
second by the clock; :class:`~broker.engine.peers.NodeInfo` carries it to the
other nodes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from broker.server.connection import Traffic
from broker.server.registry import Registry

LAG_SECONDS: Final = 0.1
"""A clock that ticks this late is called full: what people notice as slow begins here."""
LAG_MEMORY: Final = 5
"""Samples for which the worst lag counts. One full garbage collection should be seen, and soon forgotten."""


class Figures(NamedTuple):
    """One sample; every number is from 0 to 1."""

    load: float
    """The largest of the others."""
    connections: float
    """Open connections, of those that the node accepts."""
    cpu: float
    """CPU time of the process since the sample before, of one core: Python uses no more than that."""
    lag: float
    """The latest tick of the last seconds, of 100 ms."""
    outbox: float
    """Bytes queued for slow readers, of ``limits.process_outbox_bytes``."""


class Load:
    """Takes the figure. ``connections`` is how many the node accepts; ``cpu`` the process's CPU clock (s)."""

    def __init__(
        self,
        registry: Registry,
        traffic: Traffic,
        *,
        connections: int,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        self._registry = registry
        self._traffic = traffic
        self._connections = connections
        self._cpu = cpu
        self._burnt: float | None = None
        self._sampled_at = 0.0
        self._worst = 0.0
        self._lags: deque[float] = deque(maxlen=LAG_MEMORY)
        self.figures = Figures(0.0, 0.0, 0.0, 0.0, 0.0)
        """The last sample; all 0 before the first."""

    def tick(self, lag: float) -> None:
        """The clock ticked so many seconds late."""
        self._worst = max(self._worst, lag)

    def sample(self, now: float) -> None:
        """Take the figure; called about once a second with the monotonic time."""
        self._lags.append(self._worst)
        self._worst = 0.0
        connections = _fraction(self._registry.connections, self._connections)
        cpu = self._measure_cpu(now)
        lag = _fraction(max(self._lags), LAG_SECONDS)
        outbox = _fraction(self._traffic.queued, self._traffic.process_outbox_bytes)
        self.figures = Figures(max(connections, cpu, lag, outbox), connections, cpu, lag, outbox)

    def _measure_cpu(self, now: float) -> float:
        """CPU time since the last sample; nothing before there were two."""
        burnt, self._burnt = self._burnt, self._cpu()
        passed, self._sampled_at = now - self._sampled_at, now
        if burnt is None or passed <= 0:
            return 0.0
        return _fraction(self._burnt - burnt, passed)


def _fraction(part: float, whole: float) -> float:
    """``part`` of ``whole``, from 0 to 1, to three places: more would be noise."""
    return round(min(1.0, max(0.0, part / whole)), 3) if whole > 0 else 1.0
