"""What every scenario is: settings with their help, columns of its table, bars to reach, and a run."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from bench.runner import Bench, Sample


class Column(NamedTuple):
    """One measured quantity: its key in ``Sample.metrics``, heading with unit, and format."""

    key: str
    heading: str
    format: str = ".2f"


class Bar(NamedTuple):
    """A figure to reach: ``metric`` of ``subject`` at most (or at least) ``limit``.

    With ``versus``, the ratio to that subject's ``versus_metric`` (the same
    metric unless named) is held against the limit.
    """

    metric: str
    limit: float
    versus: str | None = None
    subject: str = "broker"
    at_least: bool = False
    versus_metric: str | None = None


def setting(default: Any, text: str, *, short: Any = None) -> Any:
    """A field of a scenario: its default, its help, and its value in a short run (``bench all``)."""
    return dataclasses.field(
        default=default, metadata={"help": text, "short": default if short is None else short}
    )


@dataclass(frozen=True, kw_only=True)
class Scenario(ABC):
    """One question. Fields are its settings; the docstring of a subclass is its help."""

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    bars: ClassVar[tuple[Bar, ...]] = ()
    plot: ClassVar[str]
    """The metric drawn as columns."""
    rivals: ClassVar[tuple[str, ...]] = ("ws", "socketio")
    """Whom a short run of everything compares with."""

    @abstractmethod
    def measure(self, bench: Bench) -> list[Sample]:
        """Run all subjects and return every sample."""

    @classmethod
    def short(cls) -> Self:
        """With the settings of a short run."""
        return cls(**{item.name: item.metadata["short"] for item in dataclasses.fields(cls)})


LATENCY = (Column("p50", "p50 ms"), Column("p99", "p99 ms"))
ARRIVED = Column("arrived", "arrived %", ".3f")


def percent(part: float, whole: float) -> float:
    """``part`` in percent of ``whole``; 100 of nothing."""
    return 100.0 * part / whole if whole else 100.0
