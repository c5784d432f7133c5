"""The sequencer: any order of arrival, one order of departure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.events import Event, Position
from broker.streams.sequencer import AHEAD, RETIRED, Sequencer

EPOCH = "e.g"


def event(offset: int) -> Event:
    made = Event("deal:1", b"{}", 0.0)
    made.place(Position(EPOCH, offset))
    return made


def offer(sequencer: Sequencer, *offsets: int, now: float = 0.0) -> list[int]:
    """Offer events; offsets that passed."""
    passed: list[Event] = []
    for offset in offsets:
        sequencer.offer(event(offset), now, passed)
    return [one.offset for one in passed]


def hole(sequencer: Sequencer) -> tuple[int, float | None]:
    return sequencer.known_top, sequencer.hole_since


def at(offset: int) -> Sequencer:
    return Sequencer(Position(EPOCH, offset))


def test_what_is_next_passes_and_what_is_known_does_not() -> None:
    sequencer = at(4)
    assert offer(sequencer, 5, 6, 6, 5, 1, 7) == [5, 6, 7]
    assert sequencer.position == Position(EPOCH, 7)
    assert sequencer.hole_since is None


def test_what_lies_ahead_waits_for_the_hole() -> None:
    sequencer = at(0)
    assert offer(sequencer, 3, 2, now=5.0) == []
    assert (sequencer.hole_since, sorted(sequencer.ahead)) == (5.0, [2, 3])
    assert offer(sequencer, 1, now=6.0) == [1, 2, 3]
    assert (sequencer.hole_since, list(sequencer.ahead)) == (None, [])


def test_a_second_hole_is_as_young_as_its_discovery() -> None:
    sequencer = at(0)
    assert offer(sequencer, 2, 4, now=5.0) == []
    assert offer(sequencer, 1, now=9.0) == [1, 2]
    assert hole(sequencer) == (4, 9.0)
    assert offer(sequencer, 3, now=9.5) == [3, 4]
    assert hole(sequencer) == (4, None)


def test_an_event_of_which_only_the_offset_is_known_is_missed_too() -> None:
    sequencer = at(1)
    sequencer.expect(3, 5.0)
    sequencer.expect(2, 6.0)
    assert hole(sequencer) == (3, 5.0)
    assert offer(sequencer, 2, now=7.0) == [2]
    assert hole(sequencer) == (3, 7.0)
    assert offer(sequencer, 3, now=8.0) == [3]
    assert hole(sequencer) == (3, None)
    sequencer.expect(3, 9.0)
    assert hole(sequencer) == (3, None)


def test_what_cannot_be_had_is_skipped() -> None:
    sequencer = at(0)
    offer(sequencer, 3, 6, 7, now=5.0)
    passed: list[Event] = []
    sequencer.skip(5, 6.0, passed)
    assert [one.offset for one in passed] == [6, 7]
    assert (sequencer.position.offset, sequencer.hole_since, list(sequencer.ahead)) == (7, None, [])
    sequencer.skip(2, 6.0, passed)
    assert sequencer.position.offset == 7
    sequencer.skip(9, 6.0, passed)
    assert (sequencer.position.offset, sequencer.known_top) == (9, 9)


def test_only_so_much_is_kept() -> None:
    sequencer = at(0)
    offer(sequencer, *range(2, AHEAD + 12), now=5.0)
    assert len(sequencer.ahead) == AHEAD
    assert sequencer.dropped == 10
    assert len(offer(sequencer, 1, now=6.0)) == AHEAD + 1
    assert (sequencer.known_top, sequencer.hole_since) == (AHEAD + 11, 6.0)


def test_another_epoch_starts_anew_and_the_old_one_is_remembered() -> None:
    sequencer = at(3)
    offer(sequencer, 5)
    sequencer.restart(Position("e.h", 1))
    assert (sequencer.position, list(sequencer.ahead), sequencer.hole_since) == (("e.h", 1), [], None)
    assert sequencer.is_retired(EPOCH)
    assert not sequencer.is_retired("e.h")
    for number in range(RETIRED + 3):
        sequencer.restart(Position(f"e.{number}", 0))
    assert not sequencer.is_retired(EPOCH)
    assert sequencer.is_retired("e.5")


def test_going_back_within_an_epoch_retires_nothing() -> None:
    sequencer = at(3)
    sequencer.restart(Position(EPOCH, 1))
    assert not sequencer.is_retired(EPOCH)


@given(
    first=st.integers(0, 3),
    arrivals=st.lists(st.tuples(st.sampled_from(["offer", "expect"]), st.integers(1, 14)), max_size=60),
)
def test_any_order_of_arrival_gives_each_event_once_and_in_order(
    first: int, arrivals: list[tuple[str, int]]
) -> None:
    sequencer = at(first)
    passed: list[Event] = []
    came: set[int] = set()
    heard: set[int] = set()
    for now, (what, offset) in enumerate(arrivals):
        heard.add(offset)
        if what == "offer":
            came.add(offset)
            sequencer.offer(event(offset), now, passed)
        else:
            sequencer.expect(offset, now)
        top = first
        while top + 1 in came:
            top += 1
        assert [one.offset for one in passed] == list(range(first + 1, top + 1))
        assert sequencer.position.offset == top
        assert set(sequencer.ahead) == {offset for offset in came if offset > top}
        assert (sequencer.hole_since is not None) == any(offset > top for offset in heard)
    for offset in range(first + 1, 15):  # what a repair brings
        sequencer.offer(event(offset), 99, passed)
    assert [one.offset for one in passed] == list(range(first + 1, 15))
