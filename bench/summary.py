"""From samples to statements: medians with their range, and whether each bar is reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.runner import Sample
from bench.scenarios.base import Bar


class Spread(NamedTuple):
    """A metric over the repeats of one subject."""

    median: float
    low: float
    high: float


class Judged(NamedTuple):
    """A bar, what was measured for it (``None``: nothing to judge by), and whether it is reached."""

    bar: Bar
    value: float | None
    reached: bool | None

    def text(self) -> str:
        """The bar in words: ``cpu_us <= 0.75 of ws``."""
        bar = self.bar
        sign = ">=" if bar.at_least else "<="
        against = f" of {bar.versus}" if bar.versus else ""
        return f"{bar.subject}: {bar.metric} {sign} {bar.limit:g}{against}"


Summary = Mapping[str, Mapping[str, Spread]]
"""Subject → metric → spread."""


def summarise(samples: Sequence[Sample]) -> dict[str, dict[str, Spread]]:
    """Medians and ranges, in the order the subjects first appear; values that are no numbers are left out."""
    summary: dict[str, dict[str, Spread]] = {}
    for subject in dict.fromkeys(sample.subject for sample in samples):
        values: dict[str, list[float]] = {}
        for sample in samples:
            if sample.subject == subject:
                for key, value in sample.metrics.items():
                    values.setdefault(key, []).append(value)
        summary[subject] = {
            key: Spread(statistics.median(numbers), min(numbers), max(numbers))
            for key, numbers in (
                (key, [n for n in all_ if not math.isnan(n)]) for key, all_ in values.items()
            )
            if numbers
        }
    return summary


def judge(bars: Sequence[Bar], summary: Summary) -> list[Judged]:
    """Each bar against the medians."""
    return [_judge(bar, summary) for bar in bars]


def _judge(bar: Bar, summary: Summary) -> Judged:
    own = summary.get(bar.subject, {}).get(bar.metric)
    if own is None:
        return Judged(bar, None, None)
    value = own.median
    if bar.versus is not None:
        other = summary.get(bar.versus, {}).get(bar.versus_metric or bar.metric)
        if other is None or other.median == 0:
            return Judged(bar, None, None)
        value /= other.median
    return Judged(bar, value, value >= bar.limit if bar.at_least else value <= bar.limit)
