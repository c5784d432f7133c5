"""The hub among other nodes: what is told to them, what comes from them, which rooms are heard of."""

from __future__ import annotations

from typing import Any

import pytest

from broker.config import Limits
from broker.engine.peers import Mate
from broker.errors import BrokerError, ErrorCode
from broker.hub.hub import LINGER
from broker.hub.rooms import MemberState, Room
from broker.protocol.events import Event, Position, SessionId, make_event
from tests.hub.fakes import EPHEMERAL, KEPT, FakePeers, Node, with_options

BOARD = with_options(EPHEMERAL, last_value=True, history_ttl=60.0)
KEPT_DROP = with_options(KEPT, slow="drop")
KEPT_LATEST = with_options(KEPT, slow="latest")


def relayed(node: Node) -> list[tuple[str, float]]:
    """Room of each relayed event, and for how long it is to be remembered."""
    return [(event.room, remember) for event, remember in node.peers.relayed]


# -- events ----------------------------------------------------------------------------


def test_an_ephemeral_event_is_relayed_whether_anybody_is_here_or_not() -> None:
    node = Node()
    event = node.publish("live:1", "to nobody")
    sink = node.member("live:2")
    node.say("live:2", "here")
    assert relayed(node) == [("live:1", 0.0), ("live:2", 0.0)]
    assert node.peers.relayed[0][0] is event
    assert sink.data() == ["here"]


def test_other_nodes_are_told_before_the_members_here() -> None:
    node = Node()
    node.member("live:1")
    room = node.hub.rooms["live:1"]
    pending: list[int] = []

    class Watching(FakePeers):
        def relay(self, event: Event, *, remember: float = 0.0) -> None:
            pending.append(len(room.pending))

    node.hub._peers = Watching()
    node.publish("live:1", 1)
    assert (pending, len(room.pending)) == ([0], 1)


def test_stored_events_are_the_engines_to_spread() -> None:
    node = Node()
    node.member("kept:1")
    node.say("kept:1", 1)
    assert relayed(node) == []


@pytest.mark.parametrize(
    ("room", "slot", "remember"), [("board:1", "a", 60.0), ("board:1", None, 0.0), ("live:1", "a", 0.0)]
)
def test_only_the_newest_of_a_slot_is_to_be_remembered(room: str, slot: str | None, remember: float) -> None:
    node = Node(board=BOARD)
    node.publish(room, 1, slot=slot)
    assert relayed(node) == [(room, remember)]


def test_what_comes_from_elsewhere_is_delivered_and_goes_no_further() -> None:
    node = Node(board=BOARD)
    sink, other = node.member("live:1"), node.sink()
    node.join(other, "live:1", filter_={"eq": ["t", "a"]})
    node.fanout.flush()
    other.received()
    node.receive("live:1", 1, tags={"t": "a"})
    node.receive("live:1", 2, tags={"t": "b"})
    node.receive("live:9", "nobody is here")
    node.fanout.flush()
    assert (sink.data(), other.data()) == ([1, 2], [1])
    assert relayed(node) == []
    assert (node.hub.received, node.hub.published) == (2, 0)
    assert "live:9" not in node.hub.rooms


def test_slots_remember_what_comes_from_elsewhere() -> None:
    node = Node(board=BOARD)
    node.member("board:1")
    node.publish("board:1", "here", slot="a")
    node.receive("board:1", "there", slot="a")
    node.clock.now += 50
    sink = node.sink()
    node.join(sink, "board:1")
    node.fanout.flush()
    assert [message.get("data") for message in sink.received()] == [None, "there"]


def test_an_event_from_elsewhere_keeps_the_slots_of_an_empty_room() -> None:
    node = Node(board=BOARD)
    node.hub.leave_all(node.member("board:1"))
    node.receive("board:1", 1, slot="a")
    node.clock.now += 50
    node.receive("board:1", 2, slot="a")
    node.clock.now += 50
    node.hub.sweep_idle()
    assert "board:1" in node.hub.rooms


# -- ephemeral events in rooms with history ------------------------------------------------


def test_an_ephemeral_event_has_no_place_in_the_stream() -> None:
    node = Node(kept=with_options(KEPT, last_value=True))
    sink = node.member("kept:1")
    node.say("kept:1", "stored", slot="a")
    node.receive("kept:1", "passing", slot="a")
    node.say("kept:1", "stored, too")
    assert [(m["data"], m.get("offset")) for m in sink.received()] == [
        ("stored", 1),
        ("passing", None),
        ("stored, too", 2),
    ]
    room = node.hub.rooms["kept:1"]
    assert room.position == node.engine.stream("kept:1").top
    assert [event.offset for event in (room.slots or {}).values()] == [1]
    late = node.sink()
    node.join(late, "kept:1", tail=10)
    node.fanout.flush()
    assert [m.get("data") for m in late.received()][1:] == ["stored", "stored, too"]


def test_who_catches_up_does_not_get_it() -> None:
    node = Node()
    node.member("kept:1")
    node.say("kept:1", 1, 2)
    epoch = node.engine.stream("kept:1").epoch
    sink = node.sink()
    joining = node.start_join(sink, "kept:1", since=Position(epoch, 1))
    node.receive("kept:1", "passing")
    node.fanout.flush()
    joining.finish()
    node.receive("kept:1", "live")
    node.fanout.flush()
    assert [m["data"] for m in sink.received() if m["op"] == "event"] == [2, "live"]


def test_a_hole_that_begins_with_it_begins_after_the_stored_event_before_it() -> None:
    node = Node(kept=KEPT_DROP)
    slow, other = node.member("kept:1", limit=1), node.member("kept:1")
    node.say("kept:1", 1)
    slow.block()
    node.say("kept:1", 2)  # queued
    node.receive("kept:1", "passing")
    node.publish("kept:1", 3)
    node.fanout.flush()
    node.say("kept:1", 4)
    slow.drain()
    node.fanout.flush()
    *events, lost = slow.received()
    assert [event["data"] for event in events] == [1, 2]
    assert (lost["op"], lost["offset"], lost["count"]) == ("lost", 2, 2)
    assert other.data() == [1, 2, "passing", 3, 4]
    node.join(slow, "kept:1", since=Position(lost["epoch"], lost["offset"]))
    node.fanout.flush()
    reply, *events = slow.received()
    assert reply["recovered"]
    assert [event["data"] for event in events] == [3, 4]


def test_a_hole_of_nothing_else_is_told_without_a_number() -> None:
    node = Node(kept=KEPT_DROP)
    slow = node.member("kept:1", limit=1)
    node.say("kept:1", 1)
    slow.block()
    node.say("kept:1", 2)
    node.receive("kept:1", "passing")
    node.fanout.flush()
    slow.drain()
    node.fanout.flush()
    *_, lost = slow.received()
    assert (lost["op"], lost["offset"], lost.get("count")) == ("lost", 2, None)
    assert slow.memberships["kept:1"].status is MemberState.LOST


def test_the_policy_latest_holds_it_like_any_other() -> None:
    node = Node(kept=KEPT_LATEST)
    slow = node.member("kept:1", limit=1)
    slow.block()
    node.say("kept:1", "queued")
    node.say("kept:1", "older", slot="a")
    node.receive("kept:1", "newer", slot="a")
    node.fanout.flush()
    slow.drain()
    node.fanout.flush()
    node.hub.push_positions()
    node.fanout.flush()
    *events, position = slow.received()
    assert [event["data"] for event in events] == ["queued", "newer"]
    assert (position["op"], position["offset"]) == ("position", 2)


# -- the stream has moved ----------------------------------------------------------------


def test_another_stream_is_told_though_no_event_comes() -> None:
    node = Node(kept=with_options(KEPT_DROP, last_value=True, presence=True))
    sink = node.sink("ann", user="ann")
    node.join(sink, "kept:1")
    node.say("kept:1", 1, slot="a")
    room, member = node.hub.rooms["kept:1"], sink.memberships["kept:1"]
    old = node.hub.top(room)
    node.hub.acknowledge(member, 1)
    sink.received()
    node.engine.replace("kept:1")
    node.engine.move("kept:1")
    sink.drain()
    node.fanout.flush()
    assert sink.received() == [
        {"op": "lost", "room": "kept:1", "reason": "epoch", "epoch": old.epoch, "offset": 1}
    ]
    assert room.position == Position("epoch-2", 0)
    assert (room.slots, room.seen, member.seen) == (None, {}, 0)
    node.join(sink, "kept:1", since=old)
    node.say("kept:1", 2)
    node.hub.acknowledge(sink.memberships["kept:1"], 1)
    reply, event = sink.received()
    assert (reply["recovered"], event["offset"]) == (False, 1)


def test_events_that_will_not_come_are_told_as_lost() -> None:
    node = Node(kept=KEPT_DROP)
    sink = node.member("kept:1")
    node.say("kept:1", 1)
    node.engine.holding = True
    node.publish("kept:1", 2)
    node.publish("kept:1", 3)
    node.engine.move("kept:1")
    sink.drain()
    node.fanout.flush()
    event, lost = sink.received()
    assert (event["data"], lost["reason"], lost["offset"], lost["count"]) == (1, "gap", 1, 2)
    assert node.hub.top(node.hub.rooms["kept:1"]).offset == 3


def test_a_move_to_where_the_room_is_changes_nothing() -> None:
    node = Node(board=BOARD)
    sink = node.member("kept:1")
    node.say("kept:1", 1, 2)
    epoch = node.engine.stream("kept:1").epoch
    for room, offset in (("kept:1", 2), ("kept:1", 1), ("kept:9", 5), ("live:1", 5)):
        node.hub.moved(room, Position(epoch, offset))
    node.member("live:1")
    node.hub.moved("live:1", Position(epoch, 5))
    assert node.hub.rooms["live:1"].position is None
    node.say("kept:1", 3)
    assert sink.data() == [1, 2, 3]


def test_who_catches_up_while_the_stream_moves_is_told_when_it_gets_there() -> None:
    node = Node(kept=KEPT_DROP)
    node.member("kept:1")
    node.say("kept:1", 1, 2)
    epoch = node.engine.stream("kept:1").epoch
    sink = node.sink()
    joining = node.start_join(sink, "kept:1", since=Position(epoch, 1))
    page = joining.read()
    node.engine.replace("kept:1")
    node.engine.move("kept:1")
    assert page is not None
    joining.feed(page)
    joining.finish()
    node.fanout.flush()
    assert joining.reply is not None
    assert (joining.reply["epoch"], joining.reply["recovered"]) == ("epoch-2", False)
    assert sink.memberships["kept:1"].status is MemberState.LIVE


# -- which rooms are heard of ----------------------------------------------------------------


def test_a_room_of_which_nothing_is_heard_must_be_opened_first() -> None:
    node = Node()
    node.peers.far.add("live:1")
    assert node.hub.find("live:1") is None
    assert node.hub.rooms == {}
    with node.hub.opening("live:1"):
        node.peers.attachments.add("live:1")
        assert node.hub.find("live:1") is None  # whoever opens it has more to say about it
        room = node.hub.obtain("live:1", None)
    assert node.hub.find("live:1") is room


def test_a_room_that_is_forgotten_is_heard_of_no_more() -> None:
    node = Node()
    for room in ("live:1", "kept:1"):
        node.peers.attachments.add(room)
        node.hub.leave_all(node.member(room))
    node.clock.now += LINGER - 1
    node.hub.sweep_idle()
    assert node.peers.attachments == {"live:1", "kept:1"}
    node.clock.now += 1
    node.hub.sweep_idle()
    assert node.peers.attachments == set()


@pytest.mark.parametrize("room", ["live:1", "kept:1"])
def test_an_opening_that_comes_to_nothing_lets_go(room: str) -> None:
    node = Node()
    with node.hub.opening(room):
        node.peers.attachments.add(room)
        if room == "kept:1":
            node.engine.open_nowait(room)
    assert node.peers.attachments == set()
    assert node.engine.position(room) is None


def test_the_last_who_opens_a_room_lets_go_of_it() -> None:
    node = Node()
    with node.hub.opening("kept:1"):
        with node.hub.opening("kept:1"):
            node.peers.attachments.add("kept:1")
            node.engine.open_nowait("kept:1")
        assert node.peers.attachments == {"kept:1"}
        assert node.engine.position("kept:1") is not None
    assert node.peers.attachments == set()
    assert node.engine.position("kept:1") is None


def test_a_room_stays_while_somebody_opens_it() -> None:
    """A faster one has made it, and left it again; its stream must not be closed under the slower one."""
    node = Node()
    with node.hub.opening("kept:1"):
        node.peers.attachments.add("kept:1")
        node.hub.leave_all(node.member("kept:1"))
        node.clock.now += 2 * LINGER
        node.hub.sweep_idle()
        assert "kept:1" in node.hub.rooms
        assert node.engine.position("kept:1") is not None
    node.hub.sweep_idle()
    assert node.hub.rooms == {}
    assert node.peers.attachments == set()


def test_a_full_node_lets_go_of_what_it_cannot_take() -> None:
    node = Node(limits=Limits(rooms=1))
    node.member("live:1")
    with node.hub.opening("live:2"):
        node.peers.attachments.add("live:2")
        with pytest.raises(BrokerError) as refused:
            node.hub.obtain("live:2", None)
        assert refused.value.code is ErrorCode.LIMIT_EXCEEDED
    assert node.peers.attachments == set()


def event_of(room: str, data: Any, **fields: Any) -> Event:
    return make_event(room, "said", data, 0.0, **fields)


def slots(room: Room) -> dict[str, bytes]:
    return {slot: event.body for slot, event in (room.slots or {}).items()}


@pytest.mark.parametrize("by", ["publish", "receive"])
def test_what_comes_while_slots_are_read_is_newer(by: str) -> None:
    """Else the room would show the older one for good: the newer is not said again."""
    node = Node(board=BOARD)
    node.peers.far.add("board:1")
    say = node.publish if by == "publish" else node.receive
    with node.hub.opening("board:1"):
        newer = say("board:1", 2, slot="b")
        say("board:1", "without a slot")
        past = [event_of("board:1", 1, slot="b"), event_of("board:1", 1, slot="c")]
        room = node.hub.obtain("board:1", None, past)
    assert slots(room) == {"b": newer.body, "c": past[1].body}
    assert list(slots(room)) == ["c", "b"]


def test_slots_elsewhere_remembered_are_enough_where_nobody_is() -> None:
    node = Node(board=BOARD)
    node.peers.far.add("board:1")
    node.publish("board:1", 1, slot="a")
    assert node.hub.rooms == {}
    assert relayed(node) == [("board:1", 60.0)]


def test_nothing_passing_is_kept_for_the_slots_of_a_room_with_history() -> None:
    node = Node(kept=with_options(KEPT, last_value=True))
    with node.hub.opening("kept:1"):
        node.receive("kept:1", 1, slot="a")
        room = node.hub.obtain("kept:1", node.engine.open_nowait("kept:1"))
    assert room.slots is None


def test_members_that_are_told_while_a_room_is_opened_are_there() -> None:
    node = Node(chat=with_options(EPHEMERAL, presence=True))
    mate = Mate(SessionId("bob"), None, b"{}")
    for room in ("chat:1", "live:1"):
        with node.hub.opening(room):
            node.hub.know_mates(room, "n1", {mate.session: mate})
            node.hub.obtain(room, None)
    assert list(node.hub.rooms["chat:1"].mates or ()) == [mate]
    assert node.hub.rooms["live:1"].mates is None  # shows nobody
    node.hub.know_mates("chat:9", "n1", {mate.session: mate})  # of no interest here
