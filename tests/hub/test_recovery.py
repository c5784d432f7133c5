"""From the past to live: every event once and in order, or told that it is not so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from broker.engine.base import HistoryPage
from broker.errors import ErrorCode
from broker.hub import recovery
from broker.hub.fanout import FRAME_BYTES
from broker.hub.recovery import PAGE
from broker.protocol.codec import ZSTD
from broker.protocol.events import Position
from tests.hub.fakes import KEPT, POISON, FakeSink, Joining, Node, with_options
from tests.hub.followers import Client

ROOM = "kept:1"
LONG = with_options(KEPT, history=10_000)
BOARD = with_options(KEPT, last_value=True)


def filled(count: int, **rooms: Any) -> Node:
    """A node whose room has ``count`` events and one member, who keeps it warm."""
    node = Node(**rooms)
    node.member(ROOM)
    for number in range(count):
        node.publish(ROOM, number + 1)
    node.fanout.flush()
    return node


def at(node: Node, offset: int) -> Position:
    return Position(node.engine.stream(ROOM).epoch, offset)


def story(node: Node, sink: FakeSink) -> list[Any]:
    """What reached the client: offsets of events, and (op, …) of what was said beside them."""
    node.fanout.flush()
    told: list[Any] = []
    for message in sink.received():
        if message["op"] == "event":
            told.append(message["offset"])
        elif message["op"] == "ok":
            told.append(("joined", message["offset"], message["recovered"]))
        else:
            told.append((message["op"], message.get("reason"), message.get("offset")))
    return told


# -- since -----------------------------------------------------------------------------


def test_without_since_or_tail_live_begins_at_the_top() -> None:
    node = filled(3)
    sink = node.sink()
    node.join(sink, ROOM)
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 3, False), 4]


def test_an_ephemeral_room_has_no_position() -> None:
    node = Node()
    sink = node.sink()
    node.join(sink, "live:1", since=Position("epoch-1", 3), tail=5)
    node.say("live:1", 1)
    reply, event = sink.received()
    assert (reply["op"], reply["recovered"]) == ("ok", False)
    assert "offset" not in reply
    assert "offset" not in event


@pytest.mark.parametrize("since", range(4))
def test_since_brings_every_missed_event_then_live_ones(since: int) -> None:
    node = filled(3)
    sink = node.sink()
    node.join(sink, ROOM, since=at(node, since))
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 3, True), *range(since + 1, 5)]


def test_many_pages_and_large_events() -> None:
    node = filled(2 * PAGE + 3, kept=LONG)
    node.publish(ROOM, "x" * FRAME_BYTES)
    node.publish(ROOM, "x" * FRAME_BYTES)
    sink = node.sink()
    node.join(sink, ROOM, since=at(node, 0))
    top = 2 * PAGE + 5
    assert story(node, sink) == [("joined", top, True), *range(1, top + 1)]
    assert len(node.engine.queries) == 3


@pytest.mark.parametrize(
    "since",
    [Position("another", 2), Position("epoch-1", 9), Position("epoch-1", 1)],
    ids=["epoch", "beyond", "trimmed"],
)
@pytest.mark.parametrize("tail", [0, 2])
def test_what_cannot_be_recovered_is_said_and_the_tail_follows(since: Position, tail: int) -> None:
    node = filled(5)
    node.engine.trim(ROOM, 2)
    sink = node.sink()
    node.join(sink, ROOM, since=since, tail=tail)
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 5, False), *range(6 - tail, 7)]


def test_tail_gives_the_newest() -> None:
    node = filled(5)
    sink = node.sink()
    node.join(sink, ROOM, tail=2)
    assert story(node, sink) == [("joined", 5, False), 4, 5]
    node.join(sink, ROOM, since=at(node, 4), tail=2)
    assert story(node, sink) == [("joined", 5, True), 5]


def test_a_tail_read_before_the_newest_event_is_still_the_newest() -> None:
    node = filled(3)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, tail=2)
    page = joining.read()
    assert page is not None
    node.publish(ROOM, 4)
    joining.feed(page)
    joining.finish()
    assert story(node, sink) == [("joined", 4, False), 3, 4]


def test_tail_of_an_empty_room() -> None:
    node = filled(0)
    sink = node.sink()
    node.join(sink, ROOM, tail=2)
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 0, False), 1]


def test_a_filter_that_hid_all_missed_events() -> None:
    node = filled(3)
    sink = node.sink()
    node.join(sink, ROOM, since=at(node, 0), filter_={"exists": "n"})
    assert story(node, sink) == [("joined", 3, True)]
    node.say(ROOM, "shown", tags={"n": 1})
    assert story(node, sink) == [4]
    node.hub.push_positions()
    assert story(node, sink) == [("position", None, 4)]


def test_the_past_comes_in_the_sessions_codec() -> None:
    node = filled(2)
    sink = node.sink(codec=ZSTD)
    node.join(sink, ROOM, since=at(node, 0))
    assert story(node, sink) == [("joined", 2, True), 1, 2]


# -- pages that are older or newer than the hub -----------------------------------------


def test_the_store_knows_more_than_was_delivered() -> None:
    node = filled(2)
    node.engine.holding = True
    node.publish(ROOM, 3)
    sink = node.sink()
    node.join(sink, ROOM, since=at(node, 0))
    assert story(node, sink) == [("joined", 2, True), 1, 2]
    node.engine.release()
    assert story(node, sink) == [3]


def test_a_page_from_before_the_newest_events_is_no_loss() -> None:
    node = filled(2)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 2))
    page = joining.read()
    assert page is not None
    node.publish(ROOM, 3)
    joining.feed(page)
    joining.finish()
    node.say(ROOM, 4)
    assert story(node, sink) == [("joined", 3, True), 3, 4]


def test_a_client_that_saw_what_the_page_does_not_know_is_no_stranger() -> None:
    node = filled(2)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 3))
    page = joining.read()
    assert page is not None
    assert not page.recovered
    node.publish(ROOM, 3)
    joining.feed(page)
    assert joining.reply is None
    joining.finish()
    assert story(node, sink) == [("joined", 3, True)]


def test_a_store_that_forgot_what_it_delivered_is_not_asked_for_ever() -> None:
    node = filled(3)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 1))
    assert joining.read() is not None
    joining.feed(HistoryPage([], at(node, 1), recovered=True, more=False))
    assert joining.read() is None
    assert story(node, sink) == [("joined", 3, True), ("lost", "gap", 1)]


def test_a_client_ahead_of_the_hub_gets_nothing_twice() -> None:
    """It was told by another node; the store has the events, this node was not given them yet."""
    node = filled(2)
    node.engine.holding = True
    for number in (3, 4, 5):
        node.publish(ROOM, number)
    ahead = [node.sink() for _ in range(3)]
    for sink, offset in zip(ahead, (3, 4, 4), strict=True):
        node.join(sink, ROOM, since=at(node, offset))
    node.hub.leave_all(ahead[2])
    node.engine.release(2)
    assert story(node, ahead[0]) == [("joined", 3, True), 4]
    node.engine.release()
    assert story(node, ahead[0]) == [5]
    assert story(node, ahead[1]) == [("joined", 4, True), 5]
    assert story(node, ahead[2]) == [("joined", 4, True)]


def test_a_client_ahead_of_a_stream_that_is_replaced_is_told() -> None:
    node = filled(2)
    node.engine.holding = True
    node.publish(ROOM, 3)
    since = at(node, 3)
    sink = node.sink()
    node.join(sink, ROOM, since=since)
    node.engine.replace(ROOM)
    node.engine.forget()
    node.engine.holding = False
    node.say(ROOM, "new")
    sink.drain()
    node.fanout.flush()
    reply, lost = sink.received()
    assert reply["recovered"]
    assert (lost["reason"], lost["epoch"], lost["offset"]) == ("epoch", since.epoch, 3)
    assert "count" not in lost
    node.say(ROOM, "newer")
    assert sink.received() == []


def test_who_is_behind_when_the_stream_is_replaced_is_told_where_it_stood() -> None:
    node = filled(2, kept=with_options(KEPT, slow="drop"))
    sink = node.sink(limit=1)
    node.join(sink, ROOM)
    node.fanout.flush()
    old = at(node, 2)
    sink.block()
    node.say(ROOM, 3)
    node.say(ROOM, 4)
    replaced(node)
    sink.drain()
    node.fanout.flush()
    *_, lost = sink.received()
    assert Position(lost["epoch"], lost["offset"]) == old._replace(offset=3)


def test_a_tail_that_the_hub_was_not_given_comes_live() -> None:
    node = filled(2)
    node.engine.holding = True
    node.publish(ROOM, 3)
    node.publish(ROOM, 4)
    sink = node.sink()
    node.join(sink, ROOM, tail=1)
    node.engine.release()
    assert story(node, sink) == [("joined", 2, False), 3, 4]


# -- trimmed and replaced on the way -------------------------------------------------------


@pytest.mark.parametrize("floor", [PAGE + 1, 2 * PAGE])
def test_trimmed_while_it_was_read(floor: int) -> None:
    node = filled(2 * PAGE, kept=LONG)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 0))
    page = joining.read()
    assert page is not None
    joining.feed(page)
    node.engine.trim(ROOM, floor)
    joining.finish()
    node.say(ROOM, "live")
    assert story(node, sink) == [
        ("joined", 2 * PAGE, True),
        *range(1, PAGE + 1),
        ("lost", "trimmed", PAGE),
    ]


def replaced(node: Node) -> None:
    node.engine.replace(ROOM)
    for number in range(5):
        node.publish(ROOM, f"new-{number}")
    node.fanout.flush()


def test_replaced_between_two_pages() -> None:
    node = filled(2 * PAGE, kept=LONG)
    sink = node.sink()
    old = at(node, PAGE)
    joining = node.start_join(sink, ROOM, since=at(node, 0))
    page = joining.read()
    assert page is not None
    joining.feed(page)
    replaced(node)
    joining.finish()
    node.fanout.flush()
    *_, lost = sink.received()
    assert (lost["reason"], Position(lost["epoch"], lost["offset"])) == ("epoch", old)


def test_replaced_while_a_frame_was_written() -> None:
    """The new stream is shorter than the cursor: that must not pass for having met it."""
    node = filled(20)
    sink = node.sink()
    old = at(node, 20)
    joining = node.start_join(sink, ROOM, since=at(node, 0))
    page = joining.read()
    assert page is not None
    frames = joining.frames(page)
    assert next(frames)
    replaced(node)
    assert list(frames) == []
    assert joining.read() is None
    node.fanout.flush()
    *_, lost = sink.received()
    assert (lost["reason"], Position(lost["epoch"], lost["offset"])) == ("epoch", old)
    node.say(ROOM, "live")
    assert story(node, sink) == []


def test_replaced_in_the_store_before_the_hub_heard_of_it() -> None:
    node = filled(3)
    since = at(node, 1)
    sink, tail, top = node.sink(), node.sink(), node.sink()
    node.engine.holding = True
    replaced(node)
    node.join(sink, ROOM, since=since)
    node.join(tail, ROOM, tail=2)
    node.join(top, ROOM)
    assert story(node, sink) == [("joined", 3, False)]
    assert story(node, tail) == [("joined", 3, False)]
    node.engine.release()
    for member in (sink, tail):
        member.drain()
        assert story(node, member) == [("lost", "epoch", 3)]


def test_replaced_in_the_store_while_it_was_read() -> None:
    node = filled(2 * PAGE, kept=LONG)
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 0))
    page = joining.read()
    assert page is not None
    joining.feed(page)
    node.engine.holding = True
    replaced(node)
    joining.finish()
    assert story(node, sink)[-1] == ("lost", "epoch", PAGE)
    node.engine.release()
    assert story(node, sink) == []


# -- leaves, rejoins, ends in the middle ----------------------------------------------------


def stalled(node: Node) -> tuple[FakeSink, Joining, HistoryPage]:
    sink = node.sink()
    joining = node.start_join(sink, ROOM, since=at(node, 0))
    page = joining.read()
    assert page is not None
    return sink, joining, page


def test_closed_during_the_join() -> None:
    node = filled(3)
    sink, joining, page = stalled(node)
    node.hub.leave_all(sink)
    joining.feed(page)
    assert joining.read() is None
    assert joining.catch_up.cancelled
    node.say(ROOM, "live")
    assert sink.received() == []
    assert node.hub.rooms[ROOM].members == 1


def test_closed_while_a_frame_was_written() -> None:
    node = filled(3)
    sink, joining, page = stalled(node)
    frames = joining.frames(page)
    next(frames)
    node.hub.leave_all(sink)
    assert list(frames) == []
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 3, True), 1, 2, 3]


def test_left_and_joined_again_during_a_stalled_join() -> None:
    node = filled(3)
    sink, first, page = stalled(node)
    node.hub.leave(first.member)
    second = node.start_join(sink, ROOM, since=at(node, 1))
    first.feed(page)
    assert first.reply is None
    second.finish()
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 3, True), 2, 3, 4]


def test_a_second_join_ends_the_first() -> None:
    node = filled(3)
    sink, first, page = stalled(node)
    frames = first.frames(page)
    next(frames)
    node.join(sink, ROOM)
    assert list(frames) == []
    node.say(ROOM, "live")
    assert story(node, sink) == [("joined", 3, True), 1, 2, 3, ("joined", 3, False), 4]


def test_two_closers() -> None:
    node = filled(1)
    sink, joining, _ = stalled(node)
    node.hub.take_away(joining.member, ErrorCode.FORBIDDEN)
    node.hub.leave(joining.member)
    node.hub.leave_all(sink)
    node.hub.tell_lost(joining.member, "gap")
    assert node.hub.rooms[ROOM].members == 1
    node.fanout.flush()
    assert sink.received() == [{"op": "left", "room": ROOM, "code": "forbidden"}]


def test_a_frame_that_is_not_taken_is_told_after_the_backlog() -> None:
    node = filled(3)
    sink, joining, page = stalled(node)
    sink.limit = 150
    sink.block()
    assert list(joining.frames(page)) == [False]
    assert joining.read() is None
    node.say(ROOM, "live")
    sink.drain()
    assert story(node, sink)[-1] == ("lost", "slow", 0)


def test_what_cannot_be_encoded_is_told() -> None:
    node = filled(1)
    size = FRAME_BYTES // 2
    node.publish(ROOM, "x" * size)
    node.publish(ROOM, "x" * size)
    node.publish(ROOM, POISON + "x" * size)
    sink = node.sink()
    node.join(sink, ROOM, since=at(node, 0))
    assert story(node, sink) == [("joined", 4, True), 1, 2, 3, ("lost", "gap", 3)]
    assert node.fanout.encodings_failed == 2  # the warm member's, too


# -- the newest of each slot -------------------------------------------------------------------


@pytest.mark.parametrize("history", [0, 100])
def test_last_value_begins_with_the_newest_of_each_slot(history: int) -> None:
    node = Node(kept=with_options(BOARD, history=history))
    node.member(ROOM)
    for number in range(3):
        node.publish(ROOM, f"a{number}", slot="a")
        node.publish(ROOM, f"b{number}", slot="b")
        node.publish(ROOM, "loose")
    node.publish(ROOM, "a3", slot="a")
    sink = node.sink()
    node.join(sink, ROOM)
    node.say(ROOM, "live", slot="a")
    reply, *events = sink.received()
    assert reply["op"] == "ok"
    assert [event["data"] for event in events] == ["b2", "a3", "live"]


def test_slots_heed_the_filter_and_their_number() -> None:
    node = Node(kept=with_options(BOARD, history=0, slots=2))
    node.member(ROOM)
    for slot in "abc":
        node.say(ROOM, slot, slot=slot, tags={"s": slot})
    everything, some = node.sink(), node.sink()
    node.join(everything, ROOM)
    node.join(some, ROOM, filter_={"eq": ["s", "c"]})
    node.fanout.flush()
    assert [message.get("data") for message in everything.received()] == [None, "b", "c"]
    assert [message.get("data") for message in some.received()] == [None, "c"]


def test_slots_beside_a_tail_come_once() -> None:
    node = Node(kept=BOARD)
    node.member(ROOM)
    for number in range(3):
        node.say(ROOM, f"a{number}", slot="a")
        node.say(ROOM, f"b{number}", slot=f"b{number}")
    sink = node.sink()
    node.join(sink, ROOM, tail=2)
    assert story(node, sink) == [("joined", 6, False), 2, 4, 5, 6]
    node.join(sink, ROOM, since=at(node, 5))
    assert story(node, sink) == [("joined", 6, True), 6]


def test_slots_are_read_again_from_the_past() -> None:
    node = Node(kept=BOARD)
    node.engine.open_nowait(ROOM)
    for number in range(3):
        node.publish(ROOM, number, slot="a")
    assert node.hub.find(ROOM) is None  # it is open, but its slots are not known
    sink = node.sink()
    node.join(sink, ROOM)
    assert story(node, sink) == [("joined", 3, False), 3]


# -- any interleaving -----------------------------------------------------------------------------


class Interleaving:
    """One room, a few clients whose joins are driven step by step, and a store that lags and forgets."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.node = Node(kept=with_options(KEPT, history=data.draw(st.sampled_from([4, 50])), slow="drop"))
        self.node.member(ROOM)  # keeps it warm
        self.clients = [Client(self.node, tag, limit=400) for tag in (None, "a")]
        self.drives: dict[Client, Iterator[None]] = {}

    def actions(self) -> dict[str, Any]:
        return {
            "publish": self.publish,
            "publish more": self.publish,
            "release": self.release,
            "join": self.join,
            "drive": self.drive,
            "drive more": self.drive,
            "step": self.node.fanout.step,
            "leave": self.leave,
            "trim": self.trim,
            "replace": self.replace,
            "hold": self.hold,
            "block": self.block,
            "drain": self.drain,
            "positions": self.node.hub.push_positions,
        }

    def publish(self) -> None:
        tag = self.data.draw(st.sampled_from("ab"))
        exclude = self.client().sink.id if self.data.draw(st.booleans()) else None
        self.node.publish(ROOM, "x" * 20, tags={"t": tag}, exclude=exclude)

    def release(self) -> None:
        self.node.engine.release(self.data.draw(st.integers(0, self.node.engine.undelivered)))

    def hold(self) -> None:
        self.node.engine.holding = not self.node.engine.holding
        if not self.node.engine.holding:
            self.node.engine.release()

    def trim(self) -> None:
        self.node.engine.trim(ROOM, self.data.draw(st.integers(0, 6)))

    def replace(self) -> None:
        if not self.node.engine.undelivered:  # a store that was replaced delivers nothing old
            self.node.engine.replace(ROOM)

    def client(self) -> Client:
        return self.data.draw(st.sampled_from(self.clients))

    def join(self) -> None:
        client = self.client()
        since, tail = self.data.draw(st.booleans()), self.data.draw(st.sampled_from([0, 0, 2]))
        self.drives[client] = self._drive(client.join(ROOM, since=since, tail=tail))

    def _drive(self, joining: Joining) -> Iterator[None]:
        while (page := joining.read()) is not None:
            yield
            for taken in joining.frames(page):
                if taken:
                    yield

    def drive(self) -> None:
        client = self.client()
        next(self.drives.get(client, iter(())), None)

    def leave(self) -> None:
        self.client().leave(ROOM)

    def block(self) -> None:
        self.client().sink.block(self.data.draw(st.integers(0, 300)))

    def drain(self) -> None:
        self.client().sink.drain()

    def check(self) -> None:
        for client in self.clients:
            client.listen()

    def finish(self) -> None:
        self.node.engine.holding = False
        self.node.engine.release()
        for client in self.clients:
            client.sink.drain()
            for _ in self.drives.get(client, ()):
                client.sink.drain()
        for _ in range(2):
            self.node.fanout.flush()
            for client in self.clients:
                client.sink.drain()
        self.node.fanout.flush()
        self.check()
        for client in self.clients:
            if client.sink.closed is None:
                client.caught_up()


@settings(max_examples=400)
@given(st.data())
def test_never_a_silent_hole_never_twice(data: st.DataObject) -> None:
    room = Interleaving(data)
    actions = room.actions()
    original, recovery.PAGE = recovery.PAGE, 2
    try:
        for name in data.draw(st.lists(st.sampled_from(sorted(actions)), min_size=10, max_size=40)):
            note(name)
            actions[name]()
            room.check()
        room.finish()
    finally:
        recovery.PAGE = original
