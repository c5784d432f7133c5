"""Members that cannot follow: disconnected, told what is lost, or given the latest."""

from __future__ import annotations

from broker.config import Limits
from broker.errors import CloseCode
from broker.hub.rooms import MemberState
from broker.protocol.events import Event, Position
from tests.hub.fakes import EPHEMERAL, KEPT, POISON, FakeSink, Node, with_options

DROP = with_options(EPHEMERAL, slow="drop")
KEPT_DROP = with_options(KEPT, slow="drop")
LATEST = with_options(EPHEMERAL, slow="latest")
KEPT_LATEST = with_options(KEPT, slow="latest")


# -- members that cannot keep up ------------------------------------------------------


def slow_member(node: Node, room: str, limit: int = 200) -> FakeSink:
    """A member that reads nothing any more, with an outbox that is nearly full."""
    sink = node.member(room, limit=limit)
    sink.block()
    return sink


def fill(node: Node, sink: FakeSink, room: str) -> int:
    """Publish until ``sink`` has no more place; returns the number of events that it took."""
    member = sink.memberships[room]
    taken = 0
    while member.status is MemberState.LIVE and sink.closed is None and member.held is None:
        node.say(room, f"fill-{taken}")
        taken += 1
    return taken - 1


def test_a_slow_consumer_is_disconnected_where_the_policy_says_so() -> None:
    node = Node()
    slow, other = slow_member(node, "live:1"), node.member("live:1")
    taken = fill(node, slow, "live:1")
    assert slow.closed == (CloseCode.SLOW_CONSUMER, "too slow for room live:1")
    assert len(other.data()) == taken + 1
    node.say("live:1", "on")
    assert other.data() == ["on"]


def test_drop_in_an_ephemeral_room_tells_how_many_are_lost_and_goes_on() -> None:
    node = Node(drop=DROP)
    slow, other = slow_member(node, "drop:1"), node.member("drop:1")
    taken = fill(node, slow, "drop:1")
    node.say("drop:1", "missed", "too")
    slow.drain()
    node.say("drop:1", "on")
    assert len(other.data()) == taken + 4
    *before, lost, after = slow.received()
    assert [message["data"] for message in before] == [f"fill-{number}" for number in range(taken)]
    assert lost == {"op": "lost", "room": "drop:1", "reason": "slow", "count": 3}
    assert after["data"] == "on"
    assert (node.hub.slow.dropped, node.hub.slow.lost_told) == (3, 1)


def test_drop_in_a_room_with_history_tells_the_last_position_and_waits_for_a_join() -> None:
    node = Node(kept=KEPT_DROP)
    slow = slow_member(node, "kept:1")
    taken = fill(node, slow, "kept:1")
    node.say("kept:1", "missed")
    slow.drain()
    node.say("kept:1", "not yet")
    *_, lost = slow.received()
    epoch = node.engine.stream("kept:1").epoch
    assert lost == {
        "op": "lost",
        "room": "kept:1",
        "reason": "slow",
        "epoch": epoch,
        "offset": taken,
        "count": 2,
    }
    node.join(slow, "kept:1", since=Position(epoch, lost["offset"]))
    node.fanout.flush()
    reply, *events = slow.received()
    assert reply["recovered"]
    assert [event["offset"] for event in events] == [taken + 1, taken + 2, taken + 3]
    node.say("kept:1", "live")
    assert slow.data() == ["live"]


def test_a_filter_makes_the_number_unknown() -> None:
    node = Node(drop=DROP)
    slow = node.sink(limit=1)
    node.join(slow, "drop:1", filter_={"exists": "n"})
    node.fanout.flush()
    slow.received()
    slow.block()
    for number in range(3):
        node.say("drop:1", number, tags={"n": number})
    slow.drain()
    node.fanout.flush()
    *_, lost = slow.received()
    assert lost == {"op": "lost", "room": "drop:1", "reason": "slow"}


def test_lost_precedes_what_comes_live_even_behind_an_answer_that_waits() -> None:
    node = Node(drop=DROP, kept=KEPT)
    slow = slow_member(node, "drop:1")
    node.join(slow, "kept:1")
    fill(node, slow, "drop:1")
    node.publish_as(slow, "kept:1", "mine")
    slow.drain()
    node.say("drop:1", "on")
    ops = [(m["op"], m.get("data")) for m in slow.received()]
    assert ops[-4:] == [("event", "mine"), ("ok", None), ("lost", None), ("event", "on")]


def test_who_left_while_it_was_behind_is_told_nothing() -> None:
    node = Node(drop=DROP)
    slow = slow_member(node, "drop:1")
    fill(node, slow, "drop:1")
    member = slow.memberships["drop:1"]
    node.hub.leave(member)
    node.hub.tell_lost(member, "slow")
    slow.drain()
    node.fanout.flush()
    assert "lost" not in {message["op"] for message in slow.received()}


def test_a_broken_socket_is_the_edges_business() -> None:
    node = Node(drop=DROP)
    broken, other = node.member("drop:1"), node.member("drop:1")
    broken.socket.broken = True
    node.say("drop:1", 1)
    node.say("drop:1", 2)
    assert other.data() == [1, 2]
    assert broken.closed is not None
    assert broken.memberships["drop:1"].status is MemberState.LIVE


# -- the latest of each slot ------------------------------------------------------------


def test_latest_holds_the_newest_of_each_slot_and_releases_them_in_order() -> None:
    node = Node(latest=LATEST)
    slow, other = slow_member(node, "latest:1"), node.member("latest:1")
    node.say("latest:1", "queued")
    for number in range(3):
        node.say("latest:1", f"a{number}", slot="a")
        node.say("latest:1", f"b{number}", slot="b")
    node.say("latest:1", "a3", slot="a")
    node.say("latest:1", "loose", "end")
    slow.drain()
    assert slow.data() == ["queued", "b2", "a3", "end"]
    assert len(other.data()) == 10
    assert node.hub.slow.superseded == 6
    node.say("latest:1", "on")
    assert slow.data() == ["on"]


def test_latest_holds_again_when_the_release_is_not_taken() -> None:
    node = Node(latest=LATEST)
    slow = slow_member(node, "latest:1", limit=10)
    node.join(slow, "latest:2")
    node.say("latest:1", "queued")
    node.say("latest:1", "first", slot="a")
    node.say("latest:2", "second", slot="a")
    slow.received()
    slow.drain(len(slow.outbox))
    assert slow.backlogged  # the first release filled the socket again, so the second was not taken
    node.say("latest:2", "third", slot="a")
    slow.drain()
    assert [m["data"] for m in slow.received() if m["op"] == "event"] == ["queued", "first", "third"]
    assert all(member.held is None for member in slow.memberships.values())


def test_latest_owes_a_position_for_what_was_superseded() -> None:
    node = Node(latest=KEPT_LATEST)
    slow = slow_member(node, "latest:1")
    for number in range(4):
        node.say("latest:1", number, slot="a")
    node.hub.push_positions()
    slow.drain()
    node.hub.push_positions()
    node.fanout.flush()
    *events, position = slow.received()
    assert [event["data"] for event in events] == [0, 3]
    assert (position["op"], position["offset"]) == ("position", 4)


def test_latest_asks_for_a_backlog_not_for_a_plain_socket() -> None:
    node = Node(latest=LATEST)
    sink = node.member("latest:1", direct=False)
    node.say("latest:1", 1, slot="a")
    node.say("latest:1", 2, slot="a")
    assert sink.data() == [1, 2]


def test_latest_heeds_echo_false() -> None:
    node = Node(latest=LATEST)
    slow = slow_member(node, "latest:1")
    node.say("latest:1", "queued")
    node.say("latest:1", "old", slot="a")
    node.publish("latest:1", "mine", slot="a", exclude=slow.id)
    node.publish("latest:1", "theirs", slot="b")
    node.fanout.flush()
    slow.drain()
    assert slow.data() == ["queued", "old", "theirs"]


def test_what_latest_holds_is_bounded_by_the_outbox_limit() -> None:
    node = Node(latest=LATEST, limits=Limits(outbox_bytes=1000))
    slow = slow_member(node, "latest:1")
    node.say("latest:1", "queued")
    for number in range(20):
        node.say("latest:1", number, slot=f"slot-{number}")
        held = slow.memberships["latest:1"].held
        assert held is None or held.size <= 1000
    slow.drain()
    node.say("latest:1", "on")
    queued, lost, on = slow.received()
    assert (queued["data"], lost["op"], lost["count"], on["data"]) == ("queued", "lost", 20, "on")


def test_latest_tells_what_cannot_be_encoded_on_release() -> None:
    node = Node(latest=LATEST)
    slow = slow_member(node, "latest:1")
    other = node.sink()
    node.join(other, "latest:1", filter_={"exists": "n"})
    node.say("latest:1", "queued")
    slow.memberships["latest:1"].held = None
    node.say("latest:1", "held", slot="a")
    node.hub.slow._hold(slow.memberships["latest:1"], [_poisoned("latest:1")])
    slow.drain()
    node.say("latest:1", "on")
    assert [m["op"] for m in slow.received()] == ["event", "lost", "event"]


def _poisoned(room: str) -> Event:
    return Event(room, b'{"op":"event","data":"poison"}', 0.0, slot="b")


def test_a_spoiled_batch_ends_what_latest_holds() -> None:
    node = Node(latest=KEPT_LATEST)
    slow = slow_member(node, "latest:1")
    node.say("latest:1", "queued")
    node.say("latest:1", "held", slot="a")
    node.say("latest:1", POISON, slot="a")
    slow.drain()
    node.fanout.flush()
    queued, lost = slow.received()
    assert (queued["data"], lost["op"], lost["offset"]) == ("queued", "lost", 1)
