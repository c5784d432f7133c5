from __future__ import annotations

import numpy as np

from bench.workload import even, from_elsewhere, in_turn, inbound, many_rooms, one_room, silent, together


def test_even_spacing() -> None:
    assert even(4, 1).tolist() == [0, 250_000_000, 500_000_000, 750_000_000]


def test_one_room() -> None:
    load = one_room(3, 10, 1, ["{}"], deaf=frozenset({2}))
    assert (load.connections, load.publishes) == (3, 10)
    assert set(load.member.tolist()) == {0}


def test_many_rooms_publish_in_turn_and_only_where_they_are_members() -> None:
    load = many_rooms(40, 10, 100, 1, ["{}"])
    assert np.array_equal(load.member[load.publisher], load.room)
    assert np.bincount(load.room).tolist() == [10] * 10
    assert len(set(load.publisher.tolist())) == 40


def test_inbound_has_no_listeners_and_ends_with_a_question() -> None:
    load = inbound(5, 10, 1, ["{}"])
    assert load.asks
    assert set(load.member.tolist()) == {-1}
    assert load.rooms[0].startswith("quiet:")


def test_silent() -> None:
    assert (silent(7).connections, silent(7).publishes) == (7, 0)


def test_from_elsewhere_senders_are_on_another_server_and_take_turns_by_their_batch() -> None:
    load = from_elsewhere(4, 2, 3, even(10, 0.8), ["{}"], sessions_at=1, senders_at=0, gather=2)
    assert load.place is not None
    assert load.place.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert load.member.tolist() == [0, 1, 0, 1, -1, -1, -1]
    assert load.publisher.tolist() == [4, 4, 5, 5, 6, 6, 4, 4]
    assert load.room.tolist() == [0, 1] * 4
    assert not load.backends


def test_backends_are_the_senders() -> None:
    load = from_elsewhere(2, 2, 2, even(10, 1), ["{}"], sessions_at=0, senders_at=1, backends=True)
    assert load.backends == {2, 3}


def test_in_turn_each_publishes_into_a_room_of_its_own() -> None:
    load = in_turn(3, even(10, 0.5), ["{}"], "kept")
    assert load.rooms == ["kept:0", "kept:1", "kept:2"]
    assert load.publisher.tolist() == load.room.tolist() == [0, 1, 2, 0, 1]
    assert load.member.tolist() == [0, 1, 2]


def test_together() -> None:
    assert together(even(4, 1), 3).tolist() == [0, 0, 0, 750_000_000]


def test_elsewhere_and_unsaid() -> None:
    load = one_room(3, 10, 1, ["{}"]).on(1).unsaid()
    assert load.place is not None
    assert load.place.tolist() == [1, 1, 1]
    assert (load.connections, load.publishes, load.rooms) == (3, 0, ["bench:room"])
