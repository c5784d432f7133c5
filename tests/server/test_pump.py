"""The pump reads and flushes what is ready, in turns, and survives the faults of others."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from broker.server.pump import BATCH, READ, WRITE, Pump


class Ear:
    """A channel that reads what comes, and notes it."""

    def __init__(self, pump: Pump) -> None:
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.pump = pump
        self.heard: list[bytes] = []
        self.writable = 0
        self.faults = 0
        self.fileno = self.ours.fileno()
        self.then: Callable[[], None] = lambda: None

    def on_readable(self) -> None:
        self.heard.append(self.ours.recv(100))
        self.then()

    def on_writable(self) -> None:
        self.writable += 1
        self.then()

    def on_fault(self) -> None:
        self.faults += 1
        self.pump.remove(self.fileno)

    def close(self) -> None:
        self.pump.remove(self.fileno)
        self.ours.close()
        self.peer.close()


class Rig:
    """A pump, the passes it made, and ears that are closed in the end."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pump = Pump(lambda: self.log.append("before"), lambda: self.log.append("after"))
        self.ears: list[Ear] = []

    def ear(self, interest: int = READ) -> Ear:
        ear = Ear(self.pump)
        self.ears.append(ear)
        self.pump.add(ear.fileno, ear, interest)
        return ear

    async def passed(self, passes: int) -> None:
        """Until the pump has made so many passes."""
        while self.pump.passes < passes:
            await trio.lowlevel.checkpoint()


@contextmanager
def closing() -> Iterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        for ear in rig.ears:
            ear.close()


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    with closing() as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.pump.run)
            await wait_all_tasks_blocked()
            yield rig
            nursery.cancel_scope.cancel()


async def test_what_is_ready_is_read_between_the_two_calls() -> None:
    async with running() as rig:
        one, two = rig.ear(), rig.ear()
        assert (len(rig.pump), one.fileno in rig.pump) == (2, True)
        one.peer.send(b"hello")
        await rig.passed(1)
        assert (one.heard, two.heard) == ([b"hello"], [])
        assert rig.log == ["before", "after"]
        assert (rig.pump.passes, rig.pump.ready) == (1, 1)


async def test_both_directions_in_one_pass() -> None:
    async with running() as rig:
        ear = rig.ear(READ | WRITE)
        ear.then = lambda: rig.pump.watch(ear.fileno, READ)
        ear.peer.send(b"x")
        await rig.passed(1)
        assert ear.writable == 1
        while not ear.heard:
            await trio.lowlevel.checkpoint()
        assert ear.heard == [b"x"]


async def test_writable_alone_does_not_read() -> None:
    async with running() as rig:
        ear = rig.ear(WRITE)
        ear.then = lambda: rig.pump.watch(ear.fileno, 0)
        await rig.passed(1)
        assert (ear.writable, ear.heard) == (1, [])
        ear.peer.send(b"x")  # nobody watches
        await wait_all_tasks_blocked()
        assert ear.heard == []


async def test_a_channel_that_leaves_when_it_is_writable_is_not_read() -> None:
    async with running() as rig:
        ear = rig.ear(READ | WRITE)
        ear.peer.send(b"x")
        ear.then = lambda: rig.pump.remove(ear.fileno)
        await rig.passed(1)
        assert (ear.writable, ear.heard) == (1, [])


async def test_a_channel_removed_in_the_same_pass_is_left_alone() -> None:
    async with running() as rig:
        ears = [rig.ear() for _ in range(2)]

        def remove_all() -> None:
            for ear in ears:
                rig.pump.remove(ear.fileno)

        for ear in ears:
            ear.then = remove_all
            ear.peer.send(b"x")
        await rig.passed(1)
        assert sorted(len(ear.heard) for ear in ears) == [0, 1]
        assert rig.pump.ready == 2


async def test_the_end_of_a_stream_is_readable() -> None:
    async with running() as rig:
        ear = rig.ear()
        ear.then = lambda: rig.pump.remove(ear.fileno)
        ear.peer.shutdown(socket.SHUT_WR)
        await rig.passed(1)
        assert ear.heard == [b""]


async def test_a_fault_costs_one_channel_and_is_logged() -> None:
    async with running() as rig:
        broken, other = rig.ear(), rig.ear()

        def fail() -> None:
            raise RuntimeError("a fault")

        broken.then = fail
        with capture_logs() as lines:
            broken.peer.send(b"x")
            other.peer.send(b"y")
            while not (broken.faults and other.heard):
                await trio.lowlevel.checkpoint()
        assert (rig.pump.faults, broken.faults, other.faults) == (1, 1, 0)
        assert broken.fileno not in rig.pump
        assert [line["log_level"] for line in lines] == ["error"]


async def test_a_pass_is_bounded_and_others_get_their_turn() -> None:
    async with running() as rig:
        ears = [rig.ear() for _ in range(BATCH + 20)]
        for ear in ears:
            ear.peer.send(b"x")
        others = 0
        while not all(ear.heard for ear in ears):
            await trio.lowlevel.checkpoint()
            others += 1
        assert rig.pump.passes >= 2
        assert others >= 2
        assert rig.pump.ready == len(ears)


async def test_after_the_end_everything_is_ignored() -> None:
    with closing() as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.pump.run)
            ear = rig.ear()
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert len(rig.pump) == 0
        rig.pump.remove(ear.fileno)
        rig.pump.watch(ear.fileno, WRITE)
        rig.pump.add(ear.fileno, ear)
        assert ear.fileno not in rig.pump


@pytest.mark.parametrize("number", [0, 99999])
def test_unknown_numbers_are_ignored(number: int) -> None:
    pump = Rig().pump
    pump.remove(number)
    pump.watch(number, READ)
