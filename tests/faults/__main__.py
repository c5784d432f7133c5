"""``python -m tests.faults --rounds 20 --seed 1``: break a cluster again and again; the ledger must hold.

Prints the plan, one line for each round, and a table at the end. Exit 1 if any
promise was broken, with what clients saw.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import click
import trio

from tests.faults.faults import CATALOGUE
from tests.faults.namespaces import allowed
from tests.faults.plan import plan, steps
from tests.faults.rounds import Outcome, by_house, play

EVENTS = 600
"""Acknowledged before and after each fault; in `make test` a few less."""


def columns(outcome: Outcome) -> tuple[object, ...]:
    """A row of the table."""
    balance = outcome.balance
    return (
        outcome.step.number,
        outcome.step.fault.name,
        balance.acknowledged,
        balance.retried,
        balance.delivered + balance.whispered,
        balance.told,
        balance.closed,
        balance.holes,
        balance.duplicates,
        f"{outcome.slowest_answer:.1f}",
        f"{outcome.seconds:.0f}",
        "kept"
        if balance.good
        else ", ".join(f"{what} {count}" for what, count in balance.violations.items()),
    )


HEADS = (
    *("", "fault", "acknowledged", "retried", "delivered", "told", "closed", "holes", "duplicates"),
    *("slowest answer s", "s", "promises"),
)


def total(outcomes: list[Outcome]) -> tuple[object, ...]:
    """The last row."""
    rows = [columns(outcome) for outcome in outcomes]
    sums = [sum(int(str(row[index])) for row in rows) for index in range(2, 9)]
    slowest = max((outcome.slowest_answer for outcome in outcomes), default=0.0)
    broken = sum(not outcome.balance.good for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    verdict = f"broken in {broken}" if broken else "kept"
    return ("", f"{len(outcomes)} rounds", *sums, f"{slowest:.1f}", f"{seconds:.0f}", verdict)


def table(rows: list[tuple[object, ...]]) -> str:
    """For people and for Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=20, type=click.IntRange(1), help="Faults, each in a round of its own.")
@click.option("--seed", default=1, help="Of the plan, of the faults, and of the load.")
@click.option("--only", multiple=True, type=click.Choice(sorted(CATALOGUE)), help="These, instead of a plan.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the outcomes to this file.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and stop.")
@click.option("--namespaces/--no-namespaces", default=None, help="Cut networks. Default: where it may.")
def main(
    *,
    rounds: int,
    seed: int,
    only: tuple[str, ...],
    path: Path | None,
    only_plan: bool,
    namespaces: bool | None,
) -> None:
    """Break a cluster under load, in ROUNDS ways drawn from SEED; the ledger must hold."""
    may_cut = allowed() if namespaces is None else namespaces
    planned = steps(only, seed) if only else plan(rounds, seed, namespaces=may_cut)
    if not may_cut:
        click.echo("no network is cut: that needs root and the program ip")
    for step in planned:
        click.echo(f"{step.number:3}  {step.fault.name:20} {step.fault.what}")
    if only_plan:
        return
    click.echo()
    began, outcomes = time.monotonic(), list[Outcome]()

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        click.echo(outcome.line())
        for line in outcome.balance.evidence:
            click.echo(f"       {line}")

    for house, of_house in by_house(planned).items():
        trio.run(play, house, of_house, seed, tell, EVENTS)
    click.echo(f"\n{table([HEADS, ('---',) * len(HEADS), *map(columns, outcomes), total(outcomes)])}\n")
    broken = Counter[str]()
    for outcome in outcomes:
        broken.update(outcome.balance.violations)
    missing = len(planned) - len(outcomes)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "seed": seed,
            "rounds": [outcome.fields() for outcome in outcomes],
            "violations": dict(broken),
            "not_played": missing,
            "seconds": round(time.monotonic() - began, 1),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"written to {path}")
    if broken or missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
