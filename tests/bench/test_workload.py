from __future__ import annotations

import numpy as np

from bench.workload import even, inbound, many_rooms, one_room, silent


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
