"""Copies by rules: after the event itself, acknowledged together, never routed again."""

from __future__ import annotations

from typing import Any

import pytest

from broker.config import Config, Limits, RoomOptions, Route
from broker.engine.base import Done
from broker.errors import BrokerError, ErrorCode
from broker.hub.hub import Hub
from broker.hub.routing import NO_COPIES, Copying
from broker.protocol.events import Position, make_event
from broker.router import MAX_COPIES, Router
from tests.hub.fakes import EPHEMERAL, KEPT, START, FakePeers, ManualClock, MemoryEngine, PickyEncoder

BOARD = RoomOptions(presence=False, last_value=True)


class Routed:
    """A hub with rules, between a store and other nodes. ``kept:`` and ``log:`` have history."""

    def __init__(self, *routes: Route, rooms: int = 1000) -> None:
        config = Config(
            limits=Limits(rooms=rooms),
            rooms={"default": EPHEMERAL, "kept": KEPT, "log": KEPT, "board": BOARD},
            routes=routes,
        )
        self.engine = MemoryEngine()
        self.peers = FakePeers()
        clock = ManualClock()
        self.router = Router(config.routes, config.options)
        self.hub = Hub(
            config,
            self.engine,
            PickyEncoder(),
            peers=self.peers,
            monotonic=clock,
            wall=clock,
            wake=lambda: None,
            routing=self.router,
        )
        self.engine.connect(self.hub.deliver, self.hub.moved)

    def publish(self, room: str, data: Any = None, done: Done | None = None, **fields: Any) -> Copying | None:
        event = make_event(room, "won", data, START, publisher="ada", **fields)
        return self.hub.publish(event, self.hub.options(room), done)

    def stored(self, room: str) -> int:
        return len(self.engine.stream(room).events)

    @property
    def relayed(self) -> list[str]:
        return [event.room for event, _ in self.peers.relayed]


class Outcomes:
    """What was answered."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def __call__(self, outcome: Position | BrokerError | None) -> None:
        self.all.append(outcome)


def route(source: str, *to: str, **fields: Any) -> Route:
    return Route(source=(source,), to=to, **fields)


def test_an_event_is_acknowledged_once_its_copies_are_stored() -> None:
    node = Routed(route("kept:*", "log:{id}", "log:all", "live:{id}"))
    node.engine.holding = True
    outcomes = Outcomes()
    assert node.publish("kept:7", done=outcomes) is None
    assert (node.stored("kept:7"), node.stored("log:7"), node.relayed) == (1, 0, [])
    node.engine.release(1)
    assert (node.stored("log:7"), node.stored("log:all"), node.relayed) == (1, 1, ["live:7"])
    node.engine.release(1)
    assert outcomes.all == []
    node.engine.release(1)
    assert outcomes.all == [node.engine.stream("kept:7").top], "its own position"
    assert node.hub.published == 4


def test_an_ephemeral_event_is_acknowledged_once_its_copies_are_stored() -> None:
    node = Routed(route("live:*", "log:{id}", "other"))
    node.engine.holding = True
    copying = node.publish("live:7")
    assert copying is not None
    assert node.relayed == ["live:7", "other"]
    outcomes = Outcomes()
    copying.then(outcomes)
    assert outcomes.all == []
    node.engine.release()
    assert outcomes.all == [None]
    late = Outcomes()
    copying.then(late)
    assert late.all == [None]


def test_nothing_to_wait_for_where_no_rule_is_meant() -> None:
    node = Routed(route("live:*", "log:{id}", event=("lost",)))
    assert node.publish("live:7") is None
    assert node.publish("quiet:7") is None
    outcomes = Outcomes()
    assert node.publish("kept:7", done=outcomes) is None
    assert outcomes.all == [node.engine.stream("kept:7").top]


def test_copies_are_not_routed_again() -> None:
    node = Routed(route("live:*", "mid:{id}"), route("mid:*", "live:{id}", "log:{id}"))
    node.publish("live:7")
    assert node.relayed == ["live:7", "mid:7"]
    assert node.stored("log:7") == 0
    node.publish("mid:8")
    assert node.relayed == ["live:7", "mid:7", "mid:8", "live:8"]
    assert node.stored("log:8") == 1


def test_there_is_no_copy_of_what_was_not_stored() -> None:
    node = Routed(route("kept:*", "log:{id}", "live:{id}"))
    node.engine.failing = True
    outcomes = Outcomes()
    node.publish("kept:7", done=outcomes)
    (error,) = outcomes.all
    assert (error.code, error.room) == (ErrorCode.UNAVAILABLE, "kept:7")
    assert node.relayed == []


def test_the_first_error_of_a_copy_is_the_answer_and_a_retry_stores_nothing_twice() -> None:
    node = Routed(route("kept:*", "log:1", "log:2"))
    node.engine.holding = True
    outcomes = Outcomes()
    node.publish("kept:7", done=outcomes, key="k")
    node.engine.failing = True
    node.engine.release()
    (error,) = outcomes.all
    assert (error.code, error.room) == (ErrorCode.UNAVAILABLE, "log:1")
    node.engine.failing = node.engine.holding = False
    for _ in range(2):
        node.publish("kept:7", done=outcomes, key="k")
    top = Position(node.engine.stream("kept:7").epoch, 1)
    assert outcomes.all[1:] == [top, top]
    assert [node.stored(room) for room in ("kept:7", "log:1", "log:2")] == [1, 1, 1]


def test_a_copy_that_finds_no_place_is_an_error_and_not_the_end_of_the_others() -> None:
    node = Routed(route("live:*", "board:1", "log:1"), rooms=0)
    copying = node.publish("live:7", slot="card")
    assert copying is not None
    outcomes = Outcomes()
    copying.then(outcomes)
    (error,) = outcomes.all
    assert (error.code, error.room) == (ErrorCode.LIMIT_EXCEEDED, "board:1")
    assert node.stored("log:1") == 1


@pytest.mark.parametrize("room", ["kept:1", "live:1"])
def test_an_event_that_asks_for_too_much_is_refused_and_not_published(room: str) -> None:
    node = Routed(route(room, "x:{data.many}"))
    outcomes = Outcomes()
    copying = node.publish(room, {"many": list(range(MAX_COPIES + 1))}, done=outcomes)
    if copying is not None:
        copying.then(outcomes)
    (error,) = outcomes.all
    assert error.code == ErrorCode.LIMIT_EXCEEDED
    assert node.publish(room, {"many": list(range(MAX_COPIES + 1))}) is None or room == "live:1"
    assert (node.hub.published, node.stored("kept:1"), node.relayed) == (0, 0, [])


def test_what_is_heard_from_elsewhere_is_not_routed() -> None:
    """The node where it was published has done that; what backends say raw in a channel, nobody does."""
    node = Routed(route("live:*", "log:{id}"))
    node.hub.receive([make_event("live:7", "won", 1, START)])
    assert node.stored("log:7") == 0


def test_counters_are_the_routers() -> None:
    node = Routed(route("live:*", "log:{id}", "user:{user}"))
    node.publish("live:7")
    found = node.hub.statistics()
    assert {name: found[name] for name in NO_COPIES} == {
        "routed": 1, "route_missing": 1, "route_misfits": 0, "route_refused": 0,
    }  # fmt: skip
    assert NO_COPIES.keys() == node.router.statistics().keys()
