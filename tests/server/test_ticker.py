"""Ticks come while it is started, and are waited for like a socket."""

from __future__ import annotations

import os

import pytest
import trio

from broker.server.ticker import Ticker


async def test_it_ticks_again_and_again() -> None:
    with Ticker(0.001) as ticker, trio.fail_after(5):
        ticker.start()
        for _ in range(3):
            await ticker.wait()


async def test_it_can_be_stopped_and_started() -> None:
    with Ticker(0.001) as ticker, trio.fail_after(5):
        for _ in range(3):
            ticker.start()
            ticker.start()
            await ticker.wait()
            ticker.stop()
            ticker.stop()
        with trio.move_on_after(0.01) as patience:
            await ticker.wait()
        assert patience.cancelled_caught


async def test_a_wait_given_up_loses_no_tick() -> None:
    with Ticker(0.02) as ticker, trio.fail_after(5):
        ticker.start()
        with trio.CancelScope() as scope:
            scope.cancel()
            await ticker.wait()
        await ticker.wait()


def test_its_descriptor_goes_with_it() -> None:
    before = os.listdir("/proc/self/fd")
    with Ticker(0.5):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert os.listdir("/proc/self/fd") == before


def test_a_period_it_cannot_keep_is_refused() -> None:
    with Ticker(2.0) as ticker, pytest.raises(OSError, match="Invalid argument"):
        ticker.start()
