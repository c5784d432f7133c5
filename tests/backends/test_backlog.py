"""The order of entries, whatever fails: a model of the stream, and every way things can go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.backends import backlog as limits
from broker.backends.backlog import START, Backlog, Item
from broker.protocol.events import Event


def item(identifier: str, room: str, size: int = 10) -> Item:
    return Item(identifier, Event(room, b"x" * size, 0.0), stored=True)


class World:
    """A stream, a backlog that works on it, and a store; the test decides what happens next."""

    def __init__(self, rooms: list[int]) -> None:
        self.stream = {f"{number}-0": f"r{room}" for number, room in enumerate(rooms, 1)}
        self.backlog = Backlog()
        self.on_way: list[Item] = []
        self.stored: list[tuple[str, str]] = []
        self.removing: list[list[str]] = []

    def read(self, count: int) -> None:
        def number(identifier: str) -> int:
            return int(identifier.partition("-")[0])

        after = number(self.backlog.cursor)
        found = [identifier for identifier in self.stream if number(identifier) > after]
        for identifier in found[: min(count, self.backlog.free)]:
            self.backlog.cursor = identifier
            if identifier not in self.backlog:
                ready = self.backlog.admit(item(identifier, self.stream[identifier]))
                if ready is not None:
                    self.on_way.append(ready)

    def settle(self, which: int) -> None:
        if self.on_way:
            one = self.on_way.pop(which % len(self.on_way))
            if (one.event.room, one.id) not in self.stored:  # the key
                self.stored.append((one.event.room, one.id))
            following = self.backlog.settle(one)
            if following is not None:
                self.on_way.append(following)

    def fail(self, which: int) -> None:
        if self.on_way:
            self.backlog.fail(self.on_way.pop(which % len(self.on_way)))

    def remove(self, *, works: bool) -> None:
        taken = self.backlog.take_settled()
        if works:
            for identifier in taken:
                del self.stream[identifier]
            self.backlog.removed(taken)
        else:
            self.backlog.not_removed(taken)

    def check(self) -> None:
        """One of each room is on its way, and every room is stored in order."""
        assert len({one.event.room for one in self.on_way}) == len(self.on_way)
        for room in {room for room, _ in self.stored}:
            numbers = [int(identifier[:-2]) for where, identifier in self.stored if where == room]
            assert numbers == sorted(set(numbers))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 6)),
        st.tuples(st.just("settle"), st.integers(0, 5)),
        st.tuples(st.just("settle"), st.integers(0, 5)),
        st.tuples(st.just("fail"), st.integers(0, 5)),
        st.tuples(st.just("remove"), st.integers(0, 1)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("abandon"), st.just(0)),
    ),
    max_size=60,
)


@given(st.lists(st.integers(0, 3), max_size=25), STEPS)
def test_each_room_is_stored_in_order_whatever_happens(
    rooms: list[int], steps: list[tuple[str, int]]
) -> None:
    world = World(rooms)
    for step, which in steps:
        match step:
            case "read":
                world.read(which)
            case "settle":
                world.settle(which)
            case "fail":
                world.fail(which)
            case "remove":
                world.remove(works=bool(which))
            case "restart":
                world.backlog.restart()
            case _:
                world.backlog.abandon()
        world.check()
    while world.stream:  # in the end nothing fails any more
        world.backlog.restart()
        world.read(len(rooms))
        while world.on_way:
            world.settle(0)
            world.check()
        world.remove(works=True)
    assert sorted(world.stored) == sorted((f"r{room}", f"{n}-0") for n, room in enumerate(rooms, 1))
    assert world.backlog.idle
    assert len(world.backlog) == 0


def test_reading_stops_when_the_window_is_full() -> None:
    backlog = Backlog()
    for number in range(limits.WINDOW):
        assert backlog.free == limits.WINDOW - number
        backlog.admit(item(f"{number}-0", "a"))
    assert backlog.free == 0


def test_reading_stops_when_much_memory_is_held() -> None:
    backlog = Backlog()
    one = item("1-0", "a", limits.WINDOW_BYTES)
    assert backlog.admit(one) is one
    assert backlog.free == 0
    backlog.settle(one)
    backlog.removed(backlog.take_settled())
    assert backlog.free == limits.WINDOW


def test_reading_stops_when_too_many_rooms_fail() -> None:
    backlog = Backlog()
    for number in range(limits.BLOCKED_ROOMS):
        one = item(f"{number}-0", f"room {number}")
        assert backlog.free > 0
        assert backlog.admit(one) is one
        backlog.fail(one)
    assert backlog.free == 0
    backlog.restart()
    assert backlog.free == limits.WINDOW


def test_reading_stops_when_much_was_skipped() -> None:
    backlog = Backlog()
    one = item("0-0", "a")
    backlog.admit(one)
    backlog.fail(one)
    for number in range(1, limits.SKIPPED + 1):
        assert backlog.free > 0
        assert backlog.admit(item(f"{number}-0", "a")) is None
    assert backlog.free == 0
    assert not backlog.idle


def test_a_rejected_entry_is_known_until_it_is_removed() -> None:
    backlog = Backlog()
    backlog.admit(item("0-0", "a"))
    backlog.hold("1-0")
    assert "1-0" in backlog
    assert len(backlog) == 2
    backlog.settle_held("1-0")
    assert backlog.settled == 1
    backlog.removed(backlog.take_settled())
    assert "1-0" not in backlog


def test_what_another_node_will_do_is_forgotten() -> None:
    backlog = Backlog()
    first, second, third = (item(f"{number}-0", "a") for number in range(3))
    assert backlog.admit(first) is first
    backlog.admit(second)
    backlog.admit(third)
    backlog.cursor = "2-0"
    backlog.abandon()
    assert [one.id in backlog for one in (first, second, third)] == [True, False, False]
    assert backlog.cursor == START
    assert backlog.settle(first) is None
