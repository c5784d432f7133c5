"""The plan of a long run: which faults, in which order, from a seed. The same seed, the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tests.faults.faults import CATALOGUE
from tests.faults.houses import Divided
from tests.faults.rounds import Step


def plan(rounds: int, seed: int, *, namespaces: bool) -> list[Step]:
    """``rounds`` steps: every fault once before any comes twice, shuffled, then put together by house.

    Steps of one house share one run of it, so that one fault meets what the
    one before has left. Without ``namespaces``, no network is cut.
    """
    random = Random(seed)
    names = [name for name, one in CATALOGUE.items() if namespaces or one.house is not Divided]
    drawn: list[str] = []
    while len(drawn) < rounds:
        drawn += random.sample(names, len(names))
    houses = list(dict.fromkeys(CATALOGUE[name].house for name in drawn[:rounds]))
    ordered = sorted(drawn[:rounds], key=lambda name: houses.index(CATALOGUE[name].house))
    return steps(ordered, seed)


def steps(names: Sequence[str], seed: int) -> list[Step]:
    """A plan made by hand."""
    return [Step(number, CATALOGUE[name], f"{seed}/{number}/{name}") for number, name in enumerate(names, 1)]
