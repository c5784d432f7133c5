"""Opening a room, with a writer that answers when the test says so."""

from __future__ import annotations

import trio
import trio.testing

from broker.engine.base import Retention
from broker.engine.batch import Close, Open, Request
from broker.engine.open_rooms import OpenRooms
from broker.protocol.events import Position

KEEP = Retention(10, 60.0)
TOP = Position("e", 3)


class PaperWriter:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request, urgent: bool) -> None:
        assert urgent is isinstance(request, Open)
        self.requests.append(request)

    def answer(self) -> None:
        """Say that the last room asked for is there."""
        request = self.requests[-1]
        assert isinstance(request, Open)
        request.finished(TOP, None)


async def test_a_cancelled_opener_leaves_the_room_to_the_others() -> None:
    writer = PaperWriter()
    rooms = OpenRooms(4, writer)
    got: list[Position] = []

    async def join(scope: trio.CancelScope) -> None:
        with scope:
            got.append((await rooms.open("deal:1", KEEP)).top)

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(join, scope)
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        writer.answer()
    assert got == [TOP, TOP]
    assert len(rooms) == 1


async def test_an_answer_that_crosses_the_cancellation_opens_nothing() -> None:
    writer = PaperWriter()
    rooms = OpenRooms(4, writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rooms.open, "deal:1", KEEP)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        writer.answer()  # before the opener has run again
    assert len(rooms) == 0
    assert [type(request) for request in writer.requests] == [Open, Close]


async def test_an_answer_after_everybody_has_gone_opens_nothing() -> None:
    writer = PaperWriter()
    rooms = OpenRooms(4, writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rooms.open, "deal:1", KEEP)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    writer.answer()
    assert len(rooms) == 0
    assert [type(request) for request in writer.requests] == [Open, Close]


async def test_a_crossing_close_makes_the_waiters_open_again() -> None:
    writer = PaperWriter()
    rooms = OpenRooms(4, writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rooms.open, "deal:1", KEEP)
        await trio.testing.wait_all_tasks_blocked()
        writer.answer()
        rooms.close("deal:1")
        await trio.testing.wait_all_tasks_blocked()
        writer.answer()
    assert [type(request) for request in writer.requests] == [Open, Close, Open]
    assert rooms.get("deal:1") is not None
