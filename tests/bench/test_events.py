from __future__ import annotations

import orjson
import pytest

from bench.events import crm_bodies, padded, varied
from bench.workload import SEQUENCE


@pytest.mark.parametrize("size", [140, 2000])
def test_padded_makes_an_event_of_the_size(size: int) -> None:
    event = {"op": "event", "room": "bench:room", "event": "update", "data": orjson.loads(padded(size))}
    assert len(orjson.dumps([{**event, "ts": 1732388598.123456}])) == size


def test_varied_are_of_the_size_and_differ() -> None:
    bodies = varied(50, 140, seed=1)
    assert {len(body) for body in bodies} == {len(padded(140))}
    assert len(set(bodies)) == 50
    assert all(orjson.loads(body)["n"] == SEQUENCE for body in bodies)


def test_padded_has_a_least_size() -> None:
    assert orjson.loads(padded(1)) == {"n": SEQUENCE, "v": ""}


def test_crm_bodies_repeat_by_seed_and_each_hold_one_number() -> None:
    bodies = crm_bodies(200, seed=1)
    assert bodies == crm_bodies(200, seed=1)
    assert bodies != crm_bodies(200, seed=2)
    assert all(body.count(SEQUENCE) == 1 and orjson.loads(body)["type"] for body in bodies)
