"""Rounds: the load runs, something breaks, it is mended, everything comes to rest, the ledger is judged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random
from typing import Any, Final, NamedTuple

import redis
import trio

from tests.faults import houses
from tests.faults.backend import Backend
from tests.faults.faults import Fault
from tests.faults.ledger import Balance, Ledger, Verdict
from tests.faults.load import PATIENCE, Load

EVENTS: Final = 100
"""Acknowledged before something breaks, so that it breaks in full flight, and again after it is mended."""

HOUSES: Final[dict[type[houses.House], Callable[[], AbstractAsyncContextManager[houses.House]]]] = {
    houses.Alone: houses.alone,
    houses.Cluster: houses.cluster,
    houses.Proxied: houses.proxied,
    houses.Watched: houses.watched,
    houses.Strict: houses.strict,
    houses.Divided: houses.divided,
}


class Step(NamedTuple):
    """One round of a plan."""

    number: int
    fault: Fault
    seed: str


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to."""

    step: Step
    balance: Balance
    seconds: float
    slowest_answer: float
    """Seconds that the slowest answer to a publish took, of any kind."""
    put_off: int
    """Answers "not now"."""
    logs: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the nodes said last, where a promise was broken."""

    def line(self) -> str:
        """For people."""
        one = self.balance
        broken = ", ".join(f"{what}: {count}" for what, count in one.violations.items())
        return (
            f"{self.step.number:3}  {self.step.fault.name:20} acknowledged {one.acknowledged:5}  "
            f"delivered {one.delivered + one.whispered:6}  told {one.told:3}  holes {one.holes}  "
            f"duplicates {one.duplicates}  {f'BROKEN {broken}' if broken else 'kept'}"
        )

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {
            "round": self.step.number,
            "fault": self.step.fault.name,
            "seed": self.step.seed,
            "seconds": round(self.seconds, 2),
            "slowest_answer": round(self.slowest_answer, 3),
            "put_off": self.put_off,
            **dataclasses.asdict(self.balance),
            "logs": self.logs,
        }


def by_house(steps: Iterable[Step]) -> dict[type[houses.House], list[Step]]:
    """Steps that can share one running house."""
    found: dict[type[houses.House], list[Step]] = {}
    for step in steps:
        found.setdefault(step.fault.house, []).append(step)
    return found


async def play(
    house_type: type[houses.House],
    steps: Sequence[Step],
    seed: int,
    tell: Callable[[Outcome], None],
    events: int = EVENTS,
) -> None:
    """All rounds of one house, one after the other. Ends early after a round that did not come to rest."""
    async with HOUSES[house_type]() as house, loaded(house, seed) as load:
        for step in steps:
            outcome = await play_one(house, load, step, events)
            tell(outcome)
            if outcome.balance.of(Verdict.UNFINISHED):
                return


@asynccontextmanager
async def loaded(house: houses.House, seed: int) -> AsyncIterator[Load]:
    """A load on the house."""
    load = Load(Ledger(), house.endpoints, seed=seed)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(PATIENCE) as patience:
            await nursery.start(load.run)
        if patience.cancelled_caught:
            words = "\n\n".join(node.last_words() for node in house.nodes)
            raise AssertionError(f"not everybody could join:\n{words}")
        if house.store() is not None:
            nursery.start_soon(Backend(load, house.store).run)
        yield load
        nursery.cancel_scope.cancel()


async def play_one(house: houses.House, load: Load, step: Step, events: int) -> Outcome:
    """One round."""
    began = time.monotonic()
    load.begin(may_tell=step.fault.tells, may_close=step.fault.closes)
    try:
        with trio.move_on_after(PATIENCE):
            await load.flow(events)
            await step.fault.happen(house, Random(step.seed))
            await load.flow(events)
    except (AssertionError, redis.RedisError, OSError) as error:
        load.ledger.failed(f"{type(error).__name__}: {error}")
    tops = await load.settle()
    await load.count_members(house.names)
    if step.fault.keeps:
        await load.read_back(tops)
    balance = load.ledger.balance(tops=tops)
    logs = {} if balance.good else {node.name: node.last_words() for node in house.nodes}
    return Outcome(step, balance, time.monotonic() - began, load.slowest_answer, load.put_off, logs)
