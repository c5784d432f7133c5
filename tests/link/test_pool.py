"""Connections for calls, without a Redis: how the pool ends."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from broker.link.base import LinkDown
from broker.link.lane import Lane
from broker.link.pool import Pool


async def dial() -> Lane:
    await trio.sleep_forever()
    raise AssertionError("only a cancellation ends it")


@pytest.mark.parametrize("steps", range(6))
async def test_who_asks_while_the_pool_ends_is_told_so(steps: int) -> None:
    """However far the end has come."""
    pool = Pool(dial)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            with pytest.raises(LinkDown):
                await pool.ask(b"")
    with pytest.raises(LinkDown, match="ended"):
        await pool.ask(b"")
