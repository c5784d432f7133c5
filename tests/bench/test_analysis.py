from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import analysis
from bench.analysis import Verdict, analyse
from bench.dialect import Broker
from bench.recording import Why
from tests.bench.recordings import Frame, recording, workload

TWO_IN_A_ROOM = workload([0, 0], [(0, 0), (0, 0), (0, 0)])


def check(frames: list[Frame]) -> Verdict:
    return analyse(TWO_IN_A_ROOM, recording(TWO_IN_A_ROOM, frames), Broker().read)


def test_complete_and_in_order() -> None:
    verdict = check([Frame(0, (0,)), Frame(1, (0, 1)), Frame(0, (1, 2)), Frame(1, (2,))])
    assert verdict.faults() == []
    assert (verdict.expected, verdict.arrived, verdict.frames) == (6, 6, 4)


def test_missing() -> None:
    verdict = check([Frame(0, (0, 1, 2)), Frame(1, (0, 2))])
    assert verdict.faults() == ["1 deliveries are missing"]


def test_duplicated() -> None:
    verdict = check([Frame(0, (0, 1, 2)), Frame(1, (0, 1, 1, 2))])
    assert verdict.faults() == ["1 deliveries came twice"]


def test_duplicate_does_not_hide_a_missing_one() -> None:
    verdict = check([Frame(0, (0, 1, 2)), Frame(1, (0, 0, 2))])
    assert (verdict.missing, verdict.duplicated) == (1, 1)


def test_reordered() -> None:
    verdict = check([Frame(0, (0, 1, 2)), Frame(1, (0, 2)), Frame(1, (1,))])
    assert verdict.faults() == ["1 deliveries are out of order"]


def test_publishers_may_overtake_each_other() -> None:
    load = workload([0], [(0, 0), (1, 0), (0, 0)])
    verdict = analyse(load, recording(load, [Frame(0, (1, 0, 2))]), Broker().read)
    assert verdict.faults() == []


def test_one_publisher_out_of_order_among_others() -> None:
    load = workload([0], [(0, 0), (1, 0), (0, 0)])
    verdict = analyse(load, recording(load, [Frame(0, (1, 2, 0))]), Broker().read)
    assert verdict.faults() == ["1 deliveries are out of order"]


def test_event_of_another_room() -> None:
    load = workload([0, 1], [(0, 0), (1, 1)])
    frames = [Frame(0, (0, 1)), Frame(1, (1,))]
    assert analyse(load, recording(load, frames), Broker().read).faults() == [
        "1 deliveries went to the wrong connection"
    ]


@pytest.mark.parametrize("number", [3, 9_999_999_999])
def test_event_that_nobody_published(number: int) -> None:
    verdict = check([Frame(0, (0, 1, 2)), Frame(1, (0, 1, 2, number))])
    assert verdict.foreign == 1


def test_connection_without_a_room_expects_nothing() -> None:
    load = workload([-1, 0], [(0, 0)])
    assert analyse(load, recording(load, [Frame(1, (0,))]), Broker().read).faults() == []


def test_unsent_publish_is_a_fault_but_not_missing() -> None:
    load = recording(TWO_IN_A_ROOM, [Frame(0, (0, 2)), Frame(1, (0, 2))], unsent=[1])
    verdict = analyse(TWO_IN_A_ROOM, load, Broker().read)
    assert verdict.faults() == ["1 publishes could not be sent"]
    assert verdict.expected == 4
    assert verdict.arrival() == pytest.approx(100 * 4 / 6)


def test_deaf_connection_is_not_held_to_account() -> None:
    load = workload([0, 0], [(0, 0)], deaf=[1])
    made = recording(load, [Frame(0, (0,))], raw=[(1, b'[{"op":"lost","room":"r","reason":"slow"}]')])
    made.outcomes["why"][1], made.outcomes["detail"][1] = Why.CLOSED, 4508
    verdict = analyse(load, made, Broker().read)
    assert verdict.faults() == []
    assert verdict.deaf_ended == Counter({"closed 4508": 1})
    assert verdict.deaf_notices == Counter({"lost slow": 1})


def test_notices_ends_and_broken_payloads_are_faults() -> None:
    raw = [(0, b'[{"op":"error","code":"rate_limited"}]'), (1, b"[{"), (1, b'[{"op":"event"}]')]
    made = recording(TWO_IN_A_ROOM, [Frame(0, (0, 1, 2)), Frame(1, (0, 1, 2))], raw=raw)
    made.outcomes["why"][1], made.outcomes["detail"][1] = Why.END_OF_FILE, 0
    assert analyse(TWO_IN_A_ROOM, made, Broker().read).faults() == [
        "2 payloads could not be decoded",
        "1 connections ended: end of file 0",
        "1 times the server said: error rate_limited",
    ]


def test_connections_never_ready_and_what_came_before_the_start() -> None:
    load = workload([0, 0], [])
    made = recording(load, [Frame(0, (), at=-1000)])
    made.outcomes["ready"][1] = 0
    verdict = analyse(load, made, Broker().read)
    assert verdict.faults() == ["1 connections never became ready"]
    assert verdict.frames == 0
    assert verdict.setup.tolist() == [2.0]


def test_latency_counts_from_the_intended_moment() -> None:
    # Publishes are 1 ms apart; the second is late although both came in one frame.
    verdict = check([Frame(0, (0, 1, 2), at=5_000_000), Frame(1, (0, 1, 2), at=2_000_000)])
    assert sorted(verdict.latency.tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert verdict.percentile(50) == [2.5]


@given(
    member=st.lists(st.integers(-1, 2), min_size=1, max_size=6),
    publishes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12),
    data=st.data(),
)
def test_agrees_with_plain_counting_whatever_the_portion(
    member: list[int], publishes: list[tuple[int, int]], data: st.DataObject
) -> None:
    load = workload(member, publishes)
    numbers = st.lists(st.integers(0, len(publishes)), max_size=4).map(tuple)
    drawn_frame = st.tuples(st.integers(0, len(member) - 1), numbers).map(lambda drawn: Frame(*drawn))
    frames = data.draw(st.lists(drawn_frame, max_size=12))
    portion = data.draw(st.integers(1, 20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "PORTION", portion)
        verdict = analyse(load, recording(load, frames), Broker().read)

    arrived: Counter[tuple[int, int]] = Counter()
    foreign = overtaken = 0
    last: dict[tuple[int, int], int] = {}
    for frame in frames:
        for number in frame.numbers:
            if number >= len(publishes) or publishes[number][1] != member[frame.connection]:
                foreign += 1
                continue
            arrived[frame.connection, number] += 1
            key = (frame.connection, publishes[number][0])
            overtaken += number < last.get(key, -1)
            last[key] = number
    expected = sum(room == of for room in member if room >= 0 for _, of in publishes)
    assert verdict.expected == expected
    assert verdict.missing == expected - len(arrived)
    assert verdict.duplicated == arrived.total() - len(arrived)
    assert verdict.foreign == foreign
    assert verdict.reordered == overtaken
