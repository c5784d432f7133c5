"""What a person sees, and what is kept: progress, a table, JSON, and plots."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from bench.runner import BUSY, DISTURBED, Sample
from bench.scenarios.base import Column, Scenario
from bench.summary import Judged, Spread, Summary, judge, summarise


class Terminal:
    """Progress on standard error: a bar on a terminal, a line per run elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            # It is drawn on the load client's core; often enough for a person is enough.
            refresh_per_second=4,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._step = ""

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, text: str) -> None:
        self._step = text
        self._progress.reset(self._task, description=text, total=None)
        if not self._console.is_terminal:
            self._console.print(f"  {text}")

    def phase(self, name: str, done: int, total: int) -> None:
        self._progress.update(
            self._task, description=f"{self._step}: {name}", completed=done, total=total or None
        )

    def note(self, text: str) -> None:
        self._console.print(f"  [yellow]{text}[/]" if self._console.is_terminal else f"  {text}")


@dataclasses.dataclass(slots=True)
class Result:
    """One scenario's outcome."""

    scenario: Scenario
    samples: list[Sample]
    summary: Summary
    bars: list[Judged]

    @classmethod
    def of(cls, scenario: Scenario, samples: list[Sample]) -> Result:
        summary = summarise(samples)
        return cls(scenario, samples, summary, judge(scenario.bars, summary))

    def as_json(self, where: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that was measured, and where."""
        return {
            "scenario": self.scenario.name,
            "settings": dataclasses.asdict(self.scenario),
            "machine": where,
            "summary": {
                subject: {key: spread._asdict() for key, spread in metrics.items()}
                for subject, metrics in self.summary.items()
            },
            "bars": [{"bar": bar.text(), "value": bar.value, "reached": bar.reached} for bar in self.bars],
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
        }


def show(result: Result) -> None:
    """The table, the bars and the faults, on standard output."""
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    repeats = 1 + max((sample.repeat for sample in result.samples), default=0)
    kind = f"median of {repeats}, min-max" if repeats > 1 else "one run"
    table = Table(title=f"{result.scenario.name} ({kind})", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("subject")
    for column in result.scenario.columns:
        table.add_column(column.heading, justify="right")
    for subject, metrics in result.summary.items():
        table.add_row(
            subject, *(_cell(metrics.get(column.key), column) for column in result.scenario.columns)
        )
    console.print(table)
    for bar in result.bars:
        if bar.value is None:
            console.print(f"  unknown  {bar.text()}  (not measured in this run)")
        else:
            console.print(
                f"  {'reached' if bar.reached else 'MISSED '}  {bar.text()}  (measured {bar.value:.3g})"
            )
    for text in warnings(result.samples):
        console.print(f"  ! {text}", markup=False)


def _cell(spread: Spread | None, column: Column) -> str:
    if spread is None:
        return "-"
    text = format(spread.median, column.format)
    low, high = format(spread.low, column.format), format(spread.high, column.format)
    return text if low == high else f"{text}\n{low}-{high}"


def warnings(samples: Sequence[Sample]) -> list[str]:
    """Faults of the runs, and doubts about them."""
    lines = [f"{sample.subject}: {fault}" for sample in samples for fault in sample.faults]
    disturbed = [sample for sample in samples if sample.metrics.get("disturbed", 0.0) > DISTURBED]
    if disturbed:
        worst = max(sample.metrics["disturbed"] for sample in disturbed)
        lines.append(
            f"others used up to {worst:.0f} % of the server's core in {len(disturbed)} runs: doubtful"
        )
    busy = max((sample.metrics.get("client_percent", 0.0) for sample in samples), default=0.0)
    if busy > BUSY:
        lines.append(f"the load client used up to {busy:.0f} % of its core: it may be what limits")
    shared = max((sample.metrics.get("shared", 0.0) for sample in samples), default=0.0)
    if shared > BUSY:
        lines.append(
            f"the core of the load client and Redis was busy up to {shared:.0f} %: it may be what limits"
        )
    late = max((sample.metrics.get("lag_p99", 0.0) for sample in samples), default=0.0)
    if late > 5.0:
        lines.append(f"the load client was up to {late:.0f} ms late (p99): latencies include that")
    return lines


def save(results: Sequence[Result], where: Mapping[str, Any], folder: Path, path: Path | None) -> None:
    """JSON and SVG of each result into ``folder``; all of them as one JSON into ``path`` if given."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [_finite(result.as_json(where)) for result in results]
    for result, document in zip(results, documents, strict=True):
        name = folder / result.scenario.name
        name.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        if result.summary:
            draw(result, name.with_suffix(".svg"), where)
    if path is not None:
        path.write_text(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def draw(result: Result, path: Path, where: Mapping[str, Any]) -> None:
    """The scenario's main figure as columns and, where there is one, its latency by percentile."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that only the end of a run needs

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "bench"  # the same result gives the same file
    from matplotlib import pyplot  # noqa: PLC0415

    curves = {sample.subject: sample.curve for sample in result.samples if sample.curve}
    figure, axes = pyplot.subplots(1, 2 if curves else 1, figsize=(11 if curves else 6, 4), squeeze=False)
    column = next(column for column in result.scenario.columns if column.key == result.scenario.plot)
    spreads = {
        subject: metrics[column.key] for subject, metrics in result.summary.items() if column.key in metrics
    }
    medians = [spread.median for spread in spreads.values()]
    errors = [[s.median - s.low for s in spreads.values()], [s.high - s.median for s in spreads.values()]]
    bars = axes[0][0].bar(list(spreads), medians, yerr=errors, capsize=4, color="#4477aa")
    axes[0][0].bar_label(bars, labels=[format(value, column.format) for value in medians], padding=3)
    axes[0][0].set_title(column.heading)
    axes[0][0].tick_params(axis="x", rotation=20)
    if curves:
        for subject, curve in curves.items():
            # Distance from 100 % on a logarithmic scale: the tail is what matters.
            points = [
                (100 - percentile, max(latency, 0.01)) for percentile, latency in curve if percentile < 100
            ]
            axes[0][1].plot(*zip(*points, strict=True), label=subject)
        axes[0][1].set(
            xscale="log", yscale="log", xlabel="slowest % of deliveries", ylabel="ms", title="latency"
        )
        axes[0][1].invert_xaxis()
        axes[0][1].grid(visible=True, which="both", alpha=0.3)
        axes[0][1].legend()
    figure.suptitle(
        f"{result.scenario.name} · {where['cpu']} · {where['kernel']} · {where['commit']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
