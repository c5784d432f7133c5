"""Connections for calls, without a Redis: how the pool ends."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from broker.link.base import LinkDown
from broker.link.lane import Lane
from broker.link.pool import Pool


async def test_who_asks_while_the_pool_ends_is_told_so() -> None:
    dialing = trio.Event()
    refused: list[str] = []

    async def dial() -> Lane:
        dialing.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True), pytest.raises(LinkDown) as refusal:
                await pool.ask(b"")
            refused.append(str(refusal.value))
        raise AssertionError("it was cancelled")

    pool = Pool(dial)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def run() -> None:
            with scope:
                await pool.run()

        async def ask() -> None:
            with pytest.raises(LinkDown):
                await pool.ask(b"")

        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask)
        await dialing.wait()
        scope.cancel()
    assert refused == ["the link has ended"]
    with pytest.raises(LinkDown):
        await pool.ask(b"")
