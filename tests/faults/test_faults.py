"""Every fault once, under load, and the ledger of each must hold. Takes about three minutes.

``make faults`` does the same for longer, in an order drawn from a seed, and cuts networks too.
"""

from __future__ import annotations

import dataclasses
import shutil
from random import Random

import pytest
import trio

from tests.faults.faults import CATALOGUE, Fault
from tests.faults.houses import Alone, Cluster, House, Proxied, Strict, Watched
from tests.faults.ledger import Verdict
from tests.faults.plan import plan, steps
from tests.faults.rounds import Outcome, Step, play

SEED = 1
EACH = 60.0
"""Seconds of real time on average for one fault, after which a test that hangs fails. About six are usual."""


@pytest.mark.parametrize(
    "house", [Alone, Cluster, Proxied, Watched, Strict], ids=lambda house: house.__name__
)
async def test_promises_hold_under_every_fault(house: type[House]) -> None:
    planned = steps([name for name, one in CATALOGUE.items() if one.house is house], SEED)
    outcomes: list[Outcome] = []
    with trio.fail_after(EACH * len(planned)):
        await play(house, planned, SEED, outcomes.append)
    broken = [
        "\n      ".join([outcome.line(), *outcome.balance.evidence])
        for outcome in outcomes
        if not outcome.balance.good
    ]
    assert not broken, "\n".join(["", *broken])
    assert len(outcomes) == len(planned)
    for outcome in outcomes:
        assert outcome.balance.acknowledged > 0
        assert outcome.balance.delivered > outcome.balance.acknowledged, "several sessions to a room"


# -- the harness itself: a broker that breaks promises is caught ------------------------------------


async def caught(fault: Fault) -> Outcome:
    """What one round with this fault comes to."""
    outcomes: list[Outcome] = []
    with trio.fail_after(2 * EACH):
        await play(fault.house, [Step(1, fault, "caught")], SEED, outcomes.append)
    return outcomes[0]


async def forget_everything(house: Alone, _random: Random) -> None:
    """The disk is gone, which no restart may come to."""
    (node,) = house.nodes
    await node.kill()
    shutil.rmtree(node.directory / "data")
    await node.start()


async def test_a_store_that_forgets_is_caught() -> None:
    excused = Fault("forget", Alone, "", tells=False, closes=True, keeps=False, happen=forget_everything)
    outcome = await caught(excused)
    assert outcome.balance.of(Verdict.TOLD) > 0
    assert not outcome.balance.good
    assert "BROKEN told without cause" in outcome.line()
    told = await caught(dataclasses.replace(excused, tells=True))
    assert told.balance.good, "what is excused is no fault"
    assert told.balance.told > 0


async def test_a_closed_socket_is_caught() -> None:
    restarted = dataclasses.replace(CATALOGUE["broker-restarted"], closes=False)
    outcome = await caught(restarted)
    assert set(outcome.balance.violations) == {Verdict.CLOSED.value}
    assert outcome.fields()["violations"] == outcome.balance.violations


async def end_badly(house: Alone, _random: Random) -> None:
    """Like a node that does not come back."""
    assert house.nodes[0].name == "elsewhere", "it did not come back"


async def test_a_fault_that_cannot_be_mended_is_told() -> None:
    outcome = await caught(
        Fault("badly", Alone, "", tells=False, closes=False, keeps=False, happen=end_badly)
    )
    assert outcome.balance.violations == {Verdict.UNFINISHED.value: 1}
    assert "it did not come back" in outcome.balance.evidence[0]
    assert "ready" in outcome.logs["n1"]


# -- the plan ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan(20, 7, namespaces=True) == plan(20, 7, namespaces=True)
    assert plan(20, 7, namespaces=True) != plan(20, 8, namespaces=True)


def test_a_plan_of_enough_rounds_has_every_fault() -> None:
    whole = plan(len(CATALOGUE), 1, namespaces=True)
    assert {step.fault.name for step in whole} == set(CATALOGUE)
    without = plan(60, 1, namespaces=False)
    assert len(without) == 60
    assert not any(step.fault.name.endswith("cut-off") for step in without)


def test_every_fault_says_what_it_is() -> None:
    assert all(one.what.endswith(".") for one in CATALOGUE.values())
