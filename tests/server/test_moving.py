from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.config import Limits, Rates
from broker.errors import CloseCode
from broker.protocol.events import SessionId
from broker.server.moving import CHUNK, Mover
from broker.server.registry import Registry
from tests.e2e.harness import CONFIG, running, until
from tests.e2e.raw_client import connected
from tests.hub.fakes import FakePeers


class Traveller:
    """A session that only notes when it was asked to go."""

    def __init__(self, name: str, diary: list[tuple[float, str]]) -> None:
        self.id = SessionId(name)
        self.ending: int | None = None
        self._diary = diary

    def disconnect(self, code: CloseCode, _reason: str) -> None:
        assert self.ending is None
        assert code is CloseCode.DRAINING
        self.ending = code
        self._diary.append((trio.current_time(), self.id))


class Station:
    """A mover that runs, with so many sessions."""

    def __init__(self, sessions: int) -> None:
        self.diary: list[tuple[float, str]] = []
        self.travellers = [Traveller(str(number), self.diary) for number in range(sessions)]
        registry = Registry(Limits(), Rates(), FakePeers())
        registry.sessions = cast("Any", {each.id: each for each in self.travellers})
        self.mover = Mover(registry)
        self.began = trio.current_time()

    def order(self, share: float, over: float) -> int:
        self.began = trio.current_time()
        return self.mover.order(share, over, self.began)

    def times(self) -> list[float]:
        return [round(time - self.began, 3) for time, _ in self.diary]


@asynccontextmanager
async def station(sessions: int) -> AsyncIterator[Station]:
    async with trio.open_nursery() as nursery:
        found = Station(sessions)
        nursery.start_soon(found.mover.run)
        await wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


async def test_a_share_is_asked_evenly_over_the_time(autojump_clock: MockClock) -> None:
    async with station(100) as here:
        assert here.order(0.3, 30.0) == 30
        await trio.sleep(60)
        assert len({name for _, name in here.diary}) == 30
        assert [round(time) for time in here.times()] == list(range(30))
        assert here.mover.statistics() == {"orders": 1, "moved": 30, "waiting": 0}


async def test_in_no_time_all_are_asked_at_once(autojump_clock: MockClock) -> None:
    async with station(CHUNK * 2 + 7) as here:
        assert here.order(1.0, 0.0) == CHUNK * 2 + 7
        await wait_all_tasks_blocked()
        assert here.times() == [0.0] * (CHUNK * 2 + 7)


async def test_many_are_asked_in_small_groups(autojump_clock: MockClock) -> None:
    async with station(1000) as here:
        here.order(1.0, 10.0)
        await trio.sleep(5)
        assert 490 <= len(here.diary) <= 520
        await trio.sleep(6)
        assert len(here.diary) == 1000
        assert len(set(here.times())) <= 101


async def test_a_new_order_replaces_the_one_under_way(autojump_clock: MockClock) -> None:
    async with station(100) as here:
        here.order(1.0, 100.0)
        await trio.sleep(9.5)
        assert len(here.diary) == 10
        assert here.order(0.5, 0.0) == 45  # of those who are still here
        await wait_all_tasks_blocked()
        assert len(here.diary) == 55
        await trio.sleep(200)
        assert len(here.diary) == 55
        assert here.mover.statistics() == {"orders": 2, "moved": 55, "waiting": 0}


async def test_nobody_ends_what_is_under_way(autojump_clock: MockClock) -> None:
    async with station(10) as here:
        here.order(1.0, 10.0)
        await trio.sleep(2.5)
        assert here.order(0.0, 10.0) == 0
        await trio.sleep(60)
        assert len(here.diary) == 3


async def test_who_has_gone_meanwhile_is_not_asked(autojump_clock: MockClock) -> None:
    async with station(4) as here:
        here.order(1.0, 8.0)
        await trio.sleep(1)
        for each in here.travellers:
            each.ending = each.ending or 1000
        await trio.sleep(20)
        assert here.mover.moved == 1


async def test_a_session_that_moves_is_told_when_to_come_back() -> None:
    async with running(CONFIG) as broker, connected(broker.client_port) as client:
        assert broker.mover.order(1.0, 5.0, trio.current_time()) == 1
        bye, code = await client.ended_with()
        assert bye is not None
        assert (bye["code"], code, 0 < bye["retry_after"] <= 10) == (4503, 4503, True)
        await until(lambda: not broker.context.registry.sessions)
        assert broker.ready
