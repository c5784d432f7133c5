"""What happens by the clock, in virtual time."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.app import Broker
from broker.clock import HOUSEKEEPING, POSITIONS, RAMP, SECOND, TICK
from broker.protocol.dictionaries import FOLDER
from tests.e2e.harness import config


class Diary:
    """Writes down when a sweep was called, and passes the call on."""

    def __init__(self, owner: Any, method: str) -> None:
        self.times: list[float] = []
        self._call = getattr(owner, method)
        setattr(owner, method, self)

    def __call__(self, *arguments: Any) -> Any:
        self.times.append(round(trio.current_time(), 3))
        return self._call(*arguments)


@asynccontextmanager
async def ticking(data: Path | None = None) -> AsyncIterator[Broker]:
    """Only the clock of a broker runs."""
    broker = Broker(config(store={"data": str(data) if data is not None else None}))
    async with trio.open_nursery() as nursery:
        yield broker
        nursery.cancel_scope.cancel()


async def run_clock(broker: Broker, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await broker.clock.run()


async def test_each_sweep_has_its_interval(autojump_clock: MockClock) -> None:
    async with ticking() as broker:
        began = round(trio.current_time(), 3)
        presence = Diary(broker.hub, "push_presence")
        positions = Diary(broker.hub, "push_positions")
        idle = Diary(broker.hub, "sweep_idle")
        await run_clock(broker, POSITIONS * 2 + TICK * 3)
        assert len(presence.times) in {102, 103}
        assert [round(time - began) for time in positions.times] == [5, 10]
        assert 9 <= len(idle.times) <= 10


async def test_late_ticks_are_not_caught_up(mock_clock: MockClock) -> None:
    """After a stall each sweep is done once, and the stall is seen as loop lag."""
    async with ticking() as broker, trio.open_nursery() as nursery:
        presence = Diary(broker.hub, "push_presence")
        idle = Diary(broker.hub, "sweep_idle")
        nursery.start_soon(broker.clock.run)
        await wait_all_tasks_blocked()
        mock_clock.jump(20.0)
        await wait_all_tasks_blocked()
        assert len(idle.times) == 1
        assert len(presence.times) <= 2
        assert broker.context.stages.loop_lag.total >= 19.8
        mock_clock.jump(SECOND + TICK)
        await wait_all_tasks_blocked()
        assert len(idle.times) == 2
        nursery.cancel_scope.cancel()


async def test_a_dictionary_that_cannot_be_used_is_told_once(tmp_path: Path, mock_clock: MockClock) -> None:
    async with ticking(tmp_path) as broker, trio.open_nursery() as nursery:
        folder = tmp_path / FOLDER
        folder.mkdir(exist_ok=True)
        (folder / "broken.json").write_text("{")
        with structlog.testing.capture_logs() as logs:
            nursery.start_soon(broker.clock.run)
            for _ in range(3):
                await wait_all_tasks_blocked(0.01)
                mock_clock.jump(HOUSEKEEPING + TICK)
                await wait_all_tasks_blocked(0.05)
        told = [entry for entry in logs if entry["event"] == "dictionary left aside"]
        assert len(told) == 1
        assert "broken.json" in told[0]["problem"]
        nursery.cancel_scope.cancel()


async def test_after_a_ramp_what_lives_is_taken_out_of_the_collectors_sight(
    autojump_clock: MockClock,
) -> None:
    async with ticking() as broker:
        gc.unfreeze()
        broker.context.registry.opened = RAMP - 1
        await run_clock(broker, HOUSEKEEPING + 1)
        assert gc.get_freeze_count() == 0
        broker.context.registry.opened = RAMP
        await run_clock(broker, HOUSEKEEPING + 1)
        assert gc.get_freeze_count() > 0
        gc.unfreeze()
