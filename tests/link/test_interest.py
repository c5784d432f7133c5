"""Which rooms a node listens to: on a link that only remembers, with a clock of our own."""

from __future__ import annotations

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from broker.link.interest import RELEASE_AFTER, Interest
from broker.link.keys import Keys
from tests.link.linked import RememberingLink, linked
from tests.redis_server import RedisServer

KEYS = Keys("broker:")


def build() -> tuple[RememberingLink, Interest]:
    link = RememberingLink()
    return link, Interest(link, KEYS)


def channels(*rooms: str) -> dict[str, bool]:
    return {KEYS.live(room): True for room in rooms} | {KEYS.backend(room): False for room in rooms}


async def test_a_room_is_two_channels_and_both_lead_back() -> None:
    link, interest = build()
    interest.want("a", "engine")
    interest.want("{b}", "engine")
    assert link.wanted == channels("a", "{b}")
    assert interest.find(KEYS.live("{b}")) == ("live", "{b}")
    assert interest.find(KEYS.backend("a")) == ("backend", "a")
    assert interest.find(KEYS.live("c")) is None
    assert list(interest.rooms()) == ["a", "{b}"]


async def test_a_room_is_let_go_late_and_only_when_nobody_wants_it(mock_clock: MockClock) -> None:
    link, interest = build()
    interest.want("a", "engine")
    interest.want("a", "peers")
    interest.release("a", "engine")
    interest.release("a", "engine")
    interest.release("a", "nobody")
    interest.sweep(trio.current_time() + 10 * RELEASE_AFTER)
    assert link.wanted == channels("a")
    interest.release("a", "peers")
    assert list(interest.rooms()) == []
    mock_clock.jump(RELEASE_AFTER * 0.9)
    interest.sweep(trio.current_time())
    assert link.wanted == channels("a")
    assert interest.find(KEYS.live("a")) == ("live", "a"), "messages still come in"
    mock_clock.jump(RELEASE_AFTER * 0.2)
    interest.sweep(trio.current_time())
    assert link.wanted == {}
    assert interest.find(KEYS.live("a")) is None


async def test_flapping_costs_nothing(mock_clock: MockClock) -> None:
    link, interest = build()
    for _ in range(10):
        interest.want("a", "engine")
        interest.release("a", "engine")
        mock_clock.jump(RELEASE_AFTER / 2)
        interest.sweep(trio.current_time())
    interest.want("a", "engine")
    mock_clock.jump(RELEASE_AFTER * 2)
    interest.sweep(trio.current_time())
    assert link.wanted == channels("a")
    assert link.commands == 2
    assert interest.statistics() == {"rooms": 1, "released": 0}


async def test_the_sweeper_sweeps(autojump_clock: MockClock) -> None:
    link, interest = build()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(interest.run)
        for room in ("a", "b"):
            interest.want(room, "peers")
            interest.release(room, "peers")
        interest.want("b", "engine")
        await trio.sleep(2 * RELEASE_AFTER)
        assert link.wanted == channels("b")
        nursery.cancel_scope.cancel()


async def test_waiting_is_for_both_channels_and_ends_when_the_link_goes_down() -> None:
    link, interest = build()
    answers: list[bool] = []

    async def wait(room: str) -> None:
        answers.append(await interest.wait(room))

    interest.want("a", "engine")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        await wait_all_tasks_blocked()
        link.confirm(KEYS.live("a"))
        await wait_all_tasks_blocked()
        assert (answers, interest.hears("a")) == ([], False)
        link.confirm(KEYS.backend("a"))
        await wait_all_tasks_blocked()
        assert (answers, interest.hears("a")) == ([True], True)
        interest.want("b", "engine")
        nursery.start_soon(wait, "b")
        await wait_all_tasks_blocked()
        link.fall()
    assert answers == [True, False]
    assert not await interest.wait("a")


STEPS = st.lists(
    st.tuples(st.sampled_from(["want", "release", "sweep"]), st.sampled_from("abc"), st.sampled_from("ep")),
    max_size=60,
)


@given(STEPS)
def test_both_directions_agree_whatever_happens(steps: list[tuple[str, str, str]]) -> None:
    async def main() -> None:
        link, interest = build()
        model: set[tuple[str, str]] = set()
        for what, room, holder in steps:
            if what == "want":
                interest.want(room, holder)
                model.add((room, holder))
            elif what == "release":
                interest.release(room, holder)
                model.discard((room, holder))
            else:
                clock.jump(RELEASE_AFTER)
                interest.sweep(trio.current_time())
            wanted = {room for room, _ in model}
            assert set(interest.rooms()) == wanted
            assert channels(*wanted).items() <= link.wanted.items()
            assert all(interest.find(channel) is not None for channel in link.wanted)
            if what == "sweep":
                assert link.wanted == channels(*wanted)

    clock = MockClock()
    trio.run(main, clock=clock)


async def test_rooms_are_heard_through_redis(redis_at: RedisServer) -> None:
    async with linked(redis_at.url) as here:
        interest = Interest(here.link, KEYS)
        interest.want("a", "engine")
        assert await interest.wait("a")
        with redis_at.client() as client:
            assert client.publish(KEYS.backend("a"), "x") == 1
            assert client.publish(KEYS.live("a"), "y") == 1
        await here.round_trip("end")
        assert [(interest.find(channel), data) for channel, data in here.messages][:-1] == [
            (("backend", "a"), b"x"),
            (("live", "a"), b"y"),
        ]
