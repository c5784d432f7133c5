"""Histograms cheap enough for the hot path. Counters elsewhere are plain integers, read at scrape."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds for latencies: from a tenth of a millisecond to ten seconds."""


class Histogram:
    """Counts of values at or below fixed bounds, in the way Prometheus counts them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """One for each bound, not cumulative, and one for what lies beyond the last."""
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        """Count ``value`` (0.2 µs)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values observed."""
        return sum(self.counts)

    def quantile(self, fraction: float) -> float | None:
        """Upper bound of the bucket that holds this quantile; ``None`` if empty or beyond the last."""
        wanted = fraction * self.count
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if seen and seen >= wanted:
                return bound
        return None


class Stages:
    """Latency of each stage of a message's journey, in seconds. Sampled where named so."""

    __slots__ = ("commit", "fanout", "handle", "handshake", "loop_lag")

    def __init__(self) -> None:
        self.handshake = Histogram()
        """From accept to ``welcome``."""
        self.handle = Histogram()
        """From a frame's bytes to the end of its handler; one frame in 64."""
        self.commit = Histogram()
        """From a publish to its storage."""
        self.fanout = Histogram()
        """From an event's timestamp until its batch was sent to all of a group; one batch in 16."""
        self.loop_lag = Histogram()
        """How late the clock's tick came: what every task waits at worst."""

    def items(self) -> list[tuple[str, Histogram]]:
        """Name and histogram of each stage."""
        return [(name, getattr(self, name)) for name in self.__slots__]
