"""Streams alone, without a client."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from broker.client import Closed, Event, Presence
from broker.client.messages import Joined
from broker.client.rooms import Room, Stream
from broker.protocol.events import Position


class Leaver:
    """An owner that only notes who was left."""

    def __init__(self) -> None:
        self.left: list[Room] = []

    async def leave(self, room: Room) -> None:
        self.left.append(room)


def stream(limit: int = 3) -> tuple[Stream, list[str]]:
    calls: list[str] = []
    return Stream(limit, lambda: calls.append("space")), calls


def numbered(number: int) -> Event:
    return Event(room="a", name="e", ts=0.0, offset=number)


async def test_items_come_in_order_and_events_alone_on_request() -> None:
    one, _ = stream()
    presence = Presence(room="a")
    for item in (numbered(1), presence, numbered(2), presence, numbered(3)):
        one.put(item)
    one.end(None)
    assert await anext(one) == numbered(1)
    assert await anext(one.items()) == presence
    assert [event async for event in one] == [numbered(2), numbered(3)]


async def test_the_rest_is_read_before_the_end_is_told() -> None:
    one, calls = stream()
    one.put(numbered(1))
    one.end(Closed(4403, "out"))
    one.end(None)
    one.put(numbered(2))
    assert calls == ["space"]
    assert await anext(one) == numbered(1)
    for _ in range(2):
        with pytest.raises(Closed):
            await anext(one)


async def test_full_is_told_and_so_is_the_space_after_it() -> None:
    one, calls = stream(limit=2)
    one.put(numbered(1))
    assert not one.full(overdraft=False)
    one.put(numbered(2))
    assert one.full(overdraft=False)
    assert not one.full(overdraft=True)
    await anext(one)
    assert calls == ["space"]
    await anext(one)
    assert calls == ["space"]


async def test_several_readers_share_the_items() -> None:
    one, _ = stream()
    got: list[int | None] = []

    async def read() -> None:
        got.extend([event.offset async for event in one])

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await wait_all_tasks_blocked()
        for number in range(10):
            one.put(numbered(number))
        await wait_all_tasks_blocked()
        one.end(None)
    assert sorted(got, key=str) == list(range(10))


async def test_a_cancelled_reader_loses_nothing() -> None:
    one, _ = stream()
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(one)
    one.put(numbered(1))
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(one)
    assert scope.cancelled_caught
    assert await anext(one) == numbered(1)


async def test_a_reader_that_always_finds_something_can_be_cancelled() -> None:
    one, _ = stream(limit=10**6)
    for number in range(1000):
        one.put(numbered(number))
    seen = 0
    with trio.CancelScope() as scope:
        async for _ in one:
            seen += 1
            if seen == 5:
                scope.cancel()
    assert seen == 5


@given(
    st.lists(st.tuples(st.sampled_from(["joined", "recovered", "event"]), st.integers(0, 100)), max_size=30)
)
def test_the_position_moves_back_only_by_a_join(steps: list[tuple[str, int]]) -> None:
    room = Room("a", Leaver(), 3, lambda: None, tail=5)
    for step, offset in steps:
        before = room.position
        if step == "event":
            room.advance(offset)
            if before is None:
                assert room.position is None
            else:
                assert room.position == Position("e", max(before.offset, offset))
        elif step == "recovered":
            room.position = before or Position("e", 0)
            room.joined(Joined(epoch="e", offset=offset, recovered=True))
            assert room.position == (before or Position("e", 0))
        else:
            room.joined(Joined(epoch="e", offset=offset))
            assert room.position == Position("e", max(0, offset - 5))  # the tail is still to come


async def test_an_ephemeral_room_has_no_position() -> None:
    leaver = Leaver()
    room = Room("a", leaver, 3, lambda: None)
    room.joined(Joined())
    room.advance(3)
    assert room.position is None
    assert room.wish() == {"room": "a"}
    await room.leave()
    assert leaver.left == [room]
