"""What the scenarios of several nodes have in common: what each process costs."""

from __future__ import annotations

from collections.abc import Mapping

from bench.runner import Run
from bench.scenarios.base import Column

COSTS = (
    Column("a_us", "A µs"),
    Column("b_us", "B µs"),
    Column("redis_us", "Redis µs"),
    Column("shared", "shared core %", ".0f"),
    Column("a_mb", "A MB", ".0f"),
    Column("b_mb", "B MB", ".0f"),
    Column("redis_mb", "Redis MB", ".0f"),
)
"""CPU of each process per item, its memory at the end, and how busy the core was that several share."""


def costs(done: Run, items: int) -> dict[str, float]:
    """The metrics of :data:`COSTS`."""
    return {"shared": done.shared, **per_item(done.by_process, done.memory_by_process, items)}


def per_item(cpu: Mapping[str, int], memory: Mapping[str, int], items: int) -> dict[str, float]:
    """CPU (ns) and memory (B) by process, as metrics: µs per item, and MB."""
    metrics = {}
    for name, used in cpu.items():
        short = name.removeprefix("node ").lower()
        metrics[f"{short}_us"] = used / 1e3 / items
        metrics[f"{short}_mb"] = memory[name] / 1e6
    return metrics
