"""One task, woken cheaply and never in vain."""

from __future__ import annotations

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from broker.server.wakeup import Wakeup


async def test_a_set_before_the_wait_is_not_lost_and_counts_once() -> None:
    wakeup = Wakeup()
    wakeup.set()
    wakeup.set()
    with assert_checkpoints():
        await wakeup.wait()
    with trio.move_on_after(0) as scope:
        await wakeup.wait()
    assert scope.cancelled_caught


async def test_a_waiting_task_is_woken_once_for_each_set(nursery: trio.Nursery) -> None:
    wakeup = Wakeup()
    woken = 0

    async def wait() -> None:
        nonlocal woken
        while True:
            await wakeup.wait()
            woken += 1

    nursery.start_soon(wait)
    for expected in (1, 2):
        await wait_all_tasks_blocked()
        wakeup.set()
        await wait_all_tasks_blocked()
        assert woken == expected
    nursery.cancel_scope.cancel()


async def test_a_set_after_the_wakeup_and_before_the_task_runs_is_kept(nursery: trio.Nursery) -> None:
    wakeup = Wakeup()
    woken = trio.Event()

    async def wait_twice() -> None:
        await wakeup.wait()
        await wakeup.wait()
        woken.set()

    nursery.start_soon(wait_twice)
    await wait_all_tasks_blocked()
    wakeup.set()
    wakeup.set()
    await woken.wait()


async def test_a_cancelled_wait_leaves_it_usable() -> None:
    wakeup = Wakeup()
    with trio.CancelScope() as scope:
        scope.cancel()
        await wakeup.wait()
    wakeup.set()
    await wakeup.wait()


async def test_a_cancelled_wait_does_not_swallow_a_set() -> None:
    wakeup = Wakeup()
    wakeup.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await wakeup.wait()
    assert scope.cancelled_caught
    await wakeup.wait()


async def test_two_tasks_may_not_wait(nursery: trio.Nursery) -> None:
    wakeup = Wakeup()
    nursery.start_soon(wakeup.wait)
    await wait_all_tasks_blocked()
    with pytest.raises(AssertionError):
        await wakeup.wait()
    wakeup.set()
