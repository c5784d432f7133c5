"""The hub: which rooms live, who is told what, and a model of it all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.config import Limits, RoomOptions
from broker.engine.base import Seen
from broker.errors import BrokerError, ErrorCode
from broker.hub.hub import LINGER
from broker.hub.rooms import MemberState
from broker.protocol.codec import DEFLATE, JSON, ZSTD, Codec
from broker.protocol.events import Event, Position
from tests.hub.fakes import EPHEMERAL, KEPT, FakeSink, Node, with_options
from tests.hub.followers import Client, Follower, HistoryFollower, LatestFollower, LiveFollower

BOARD = with_options(EPHEMERAL, last_value=True, history_ttl=60.0)


def pass_time(node: Node, seconds: float) -> None:
    node.clock.now += seconds
    node.hub.sweep_idle()


# -- which rooms live ------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"slot": "a"}])
def test_publishing_to_nobody_costs_no_room(fields: dict[str, Any]) -> None:
    node = Node(board=BOARD)
    node.publish("live:1", 1, **fields)
    node.publish("board:1", 1)
    assert node.hub.rooms == {}
    assert node.hub.published == 2


def test_last_value_keeps_its_room_as_long_as_it_remembers() -> None:
    node = Node(board=BOARD)
    node.publish("board:1", 1, slot="a")
    pass_time(node, 59)
    node.publish("board:1", 2, slot="a")
    pass_time(node, 59)
    sink = node.sink()
    node.join(sink, "board:1")
    node.fanout.flush()
    assert [message.get("data") for message in sink.received()] == [None, 2]
    node.hub.leave_all(sink)
    pass_time(node, 59)
    assert "board:1" in node.hub.rooms
    pass_time(node, 1)
    assert node.hub.rooms == {}


@pytest.mark.parametrize("room", ["live:1", "kept:1"])
def test_an_empty_room_lingers_then_goes(room: str) -> None:
    node = Node()
    sink = node.member(room)
    node.hub.leave_all(sink)
    pass_time(node, LINGER - 1)
    assert room in node.hub.rooms
    pass_time(node, 1)
    assert node.hub.rooms == {}
    assert node.engine.position(room) is None
    pass_time(node, LINGER)


def test_members_that_come_back_find_the_room_warm() -> None:
    node = Node()
    sink = node.member("kept:1")
    room = node.hub.rooms["kept:1"]
    node.hub.leave_all(sink)
    pass_time(node, LINGER - 1)
    node.join(sink, "kept:1")
    pass_time(node, LINGER)
    assert node.hub.rooms["kept:1"] is room
    assert node.engine.position("kept:1") is not None
    node.hub.leave_all(sink)
    pass_time(node, LINGER - 1)
    assert "kept:1" in node.hub.rooms


def test_the_last_leave_meets_the_first_join() -> None:
    """In one moment: the room that is swept must not be the room that is joined."""
    node = Node()
    old, new = node.member("kept:1"), node.sink()
    node.hub.leave_all(old)
    node.clock.now += LINGER
    joining = node.start_join(new, "kept:1", tail=1)
    node.hub.sweep_idle()
    joining.finish()
    node.say("kept:1", 1)
    assert [message["op"] for message in new.received()] == ["ok", "event"]


def test_a_room_that_was_swept_is_another_room() -> None:
    node = Node()
    first = node.member("kept:1")
    node.say("kept:1", 1)
    node.hub.leave_all(first)
    pass_time(node, LINGER)
    node.say("kept:1", 2)  # stored, delivered to nobody
    second = node.member("kept:1")
    node.say("kept:1", 3)
    assert second.data() == [3]
    assert node.hub.top(node.hub.rooms["kept:1"]).offset == 3


def test_what_nobody_joined_after_all_goes_too() -> None:
    node = Node()
    node.hub.obtain("kept:1", node.engine.open_nowait("kept:1"))
    pass_time(node, LINGER)
    assert node.hub.rooms == {}
    assert node.engine.position("kept:1") is None


def test_a_room_with_unsent_events_stays_until_they_are_sent() -> None:
    node = Node()
    sink = node.member()
    node.publish("live:1", 1)
    node.hub.leave_all(sink)
    pass_time(node, LINGER)
    assert "live:1" in node.hub.rooms
    node.fanout.flush()
    pass_time(node, 0)
    assert node.hub.rooms == {}


def test_a_node_is_full_of_rooms_at_its_limit() -> None:
    node = Node(limits=Limits(rooms=2), board=BOARD)
    node.member("live:1")
    node.member("live:2")
    with pytest.raises(BrokerError) as refused:
        node.join(node.sink(), "live:3")
    assert (refused.value.code, refused.value.room) == (ErrorCode.LIMIT_EXCEEDED, "live:3")
    with pytest.raises(BrokerError):
        node.publish("board:1", 1, slot="a")
    node.publish("live:3", "to nobody")
    node.member("live:2")


def test_rooms_have_the_options_of_their_namespace() -> None:
    node = Node()
    assert node.hub.options("kept:1") is node.hub.options("kept") is KEPT
    assert node.hub.retention("kept:1") == (KEPT.history, KEPT.history_ttl)


def test_a_room_is_made_once_whoever_opened_it() -> None:
    node = Node(board=with_options(KEPT, last_value=True))
    room = node.hub.obtain("kept:1", node.engine.open_nowait("kept:1"))
    assert node.hub.obtain("kept:1", Position("another", 5)) is room
    assert [node.hub.needs_past(name) for name in ("board:1", "kept:1", "live:1")] == [True, False, False]


# -- publishing ---------------------------------------------------------------------------


def test_a_publish_is_answered_once_it_is_stored() -> None:
    node = Node()
    sink = node.member("kept:1")
    answers: list[Any] = []
    node.engine.holding = True
    node.publish("kept:1", 1, done=answers.append)
    assert (answers, sink.received()) == ([], [])
    node.engine.release()
    node.fanout.flush()
    assert answers == [Position(node.engine.stream("kept:1").epoch, 1)]
    assert sink.data() == [1]


def test_a_publish_that_is_not_stored_reaches_nobody() -> None:
    node = Node()
    sink = node.member("kept:1")
    answers: list[Any] = []
    node.engine.failing = True
    node.publish("kept:1", 1, done=answers.append)
    node.fanout.flush()
    assert [answer.code for answer in answers] == [ErrorCode.UNAVAILABLE]
    assert sink.received() == []


def test_a_key_stores_once_and_answers_alike() -> None:
    node = Node()
    sink = node.member("kept:1")
    answers: list[Any] = []
    for _ in range(2):
        node.publish("kept:1", 1, key="k", publisher="ann", done=answers.append)
    node.publish("kept:1", 2, key="k", publisher="bob")
    node.fanout.flush()
    assert answers[0] == answers[1]
    assert sink.data() == [1, 2]


def test_samples_are_offered_where_the_namespace_opted_in() -> None:
    node = Node(deal=RoomOptions(record=True))
    event = node.publish("deal:7", 1)
    node.publish("live:1", 1)
    assert node.sampled == [("deal", event.body)]


# -- what the engine delivers ---------------------------------------------------------------


def stored(node: Node, room: str, position: Position, data: Any = None) -> Event:
    event = Event(room, b'{"op":"event","room":"%b","data":"x"}' % room.encode(), 0.0)
    event.place(position)
    return event


def test_events_known_already_are_ignored() -> None:
    node = Node()
    sink = node.member("kept:1")
    node.say("kept:1", 1, 2)
    past = node.engine.past[node.engine.stream("kept:1").epoch]
    node.engine.deliver(list(past))
    node.fanout.flush()
    assert sink.data() == [1, 2]


def test_events_of_rooms_that_nobody_is_in_are_ignored() -> None:
    node = Node()
    node.member("live:1")
    node.hub.deliver([stored(node, "kept:1", Position("e", 1)), stored(node, "live:1", Position("e", 1))])
    node.hub.deliver([Event("live:1", b"{}", 0.0)])
    assert not node.fanout.busy


def test_a_replaced_stream_is_told_to_all_who_follow_it() -> None:
    node = Node(kept=with_options(KEPT, last_value=True))
    sinks = [node.member("kept:1"), node.member("kept:1", codec=ZSTD)]
    elsewhere = node.member("kept:2")
    node.say("kept:1", 1, 2, slot="a")
    node.publish("kept:1", 3)
    for sink in sinks:
        sink.received()
    old = node.engine.stream("kept:1").epoch
    node.engine.replace("kept:1")
    node.say("kept:1", "new")
    for sink in sinks:
        sink.drain()
    node.fanout.flush()
    for sink in sinks:
        event, lost = sink.received()
        assert event["data"] == 3
        assert lost == {"op": "lost", "room": "kept:1", "reason": "epoch", "epoch": old, "offset": 3}
    node.say("kept:1", "newer")
    assert [sink.received() for sink in (*sinks, elsewhere)] == [[]] * 3
    late = node.sink()
    node.join(late, "kept:1")
    node.fanout.flush()
    [reply] = late.received()  # and no slot of the past
    assert reply["offset"] == 2


def test_a_hole_in_what_is_delivered_is_told() -> None:
    node = Node()
    sink = node.member("kept:1")
    node.say("kept:1", 1)
    epoch = node.engine.stream("kept:1").epoch
    sink.received()
    node.hub.deliver([stored(node, "kept:1", Position(epoch, 4))])
    sink.drain()
    node.fanout.flush()
    [lost] = sink.received()
    assert (lost["reason"], lost["offset"], lost["count"]) == ("gap", 1, 3)
    assert sink.memberships["kept:1"].status is MemberState.LOST


def test_what_latest_holds_dies_with_its_stream() -> None:
    node = Node(kept=with_options(KEPT, slow="latest"))
    sink = node.member("kept:1", limit=1)
    node.say("kept:1", 1)
    old = node.engine.stream("kept:1").epoch
    sink.block()
    node.say("kept:1", 2, slot="a")
    node.say("kept:1", 3, slot="a")
    node.engine.replace("kept:1")
    node.say("kept:1", "new")
    sink.drain()
    node.fanout.flush()
    *events, lost = sink.received()
    assert [event["data"] for event in events] == [1, 2]
    assert (lost["epoch"], lost["offset"]) == (old, 2)


# -- leaving, taking away, regrouping ---------------------------------------------------------


def test_taking_away_says_so_and_ends_it() -> None:
    node = Node()
    sink = node.member()
    node.publish("live:1", 1)
    node.hub.take_away(sink.memberships["live:1"], ErrorCode.FORBIDDEN)
    node.say("live:1", 2)
    assert sink.received() == [{"op": "left", "room": "live:1", "code": "forbidden"}]


def test_a_session_that_is_gone_is_nowhere() -> None:
    node = Node()
    sink = node.member("live:1")
    for room in ("live:2", "kept:1"):
        node.join(sink, room, watches=True)
    node.hub.leave_all(sink)
    node.hub.leave_all(sink)
    assert sink.memberships == {}
    assert all(not room.members and not room.watchers for room in node.hub.rooms.values())


def test_a_loaded_dictionary_moves_a_session_into_other_groups() -> None:
    node = Node()
    sink, other = node.member("live:1", codec=ZSTD), node.member("live:1", codec=ZSTD)
    node.join(sink, "kept:1")
    stalled = node.start_join(sink, "kept:2", tail=1)
    node.publish("live:1", 1)
    with_dictionary = Codec("zstd", 7)
    sink.codecs["live:1"] = with_dictionary
    node.hub.regroup(sink)
    node.say("live:1", 2)
    assert [m["data"] for m in sink.received() if m["op"] == "event"] == other.data() == [1, 2]
    assert {codec for codec, _ in node.encoder.encoded} == {ZSTD, with_dictionary}
    assert stalled.member.status is MemberState.CATCHING_UP


def test_regrouping_finds_out_who_is_too_slow() -> None:
    node = Node(drop=with_options(EPHEMERAL, slow="drop"))
    sink = node.member("drop:1", limit=1)
    sink.block()
    node.say("drop:1", 1)
    node.publish("drop:1", 2)
    node.hub.regroup(sink)
    assert sink.memberships["drop:1"].status is MemberState.SUSPENDED
    sink.drain()
    node.fanout.flush()
    assert [message["op"] for message in sink.received()] == ["event", "lost"]


def test_regrouping_does_not_forget_an_owed_position() -> None:
    node = Node()
    sink = node.sink(codec=ZSTD)
    node.join(sink, "kept:1", filter_={"exists": "n"})
    node.say("kept:1", "hidden")
    sink.received()
    sink.codec = DEFLATE
    node.hub.regroup(sink)
    sink.codec = JSON
    node.hub.push_positions()
    node.fanout.flush()
    assert [message["op"] for message in sink.received()] == ["position"]


# -- positions -----------------------------------------------------------------------------------


def test_positions_are_told_only_to_those_from_whom_events_were_hidden() -> None:
    node = Node()
    filtered, unfiltered, publisher = node.sink(), node.member("kept:1"), node.member("kept:1")
    node.join(filtered, "kept:1", filter_={"exists": "n"})
    node.fanout.flush()
    filtered.received()
    epoch = node.engine.stream("kept:1").epoch
    node.publish("kept:1", 1, exclude=publisher.id)
    node.publish("kept:1", 2, exclude=publisher.id)
    node.hub.push_positions()
    node.fanout.flush()
    position = {"op": "position", "room": "kept:1", "epoch": epoch, "offset": 2}
    assert filtered.received() == publisher.received() == [position]
    assert unfiltered.data() == [1, 2]
    node.hub.push_positions()
    node.say("kept:1", 3, tags={"n": 1})
    node.hub.push_positions()
    assert filtered.data() == [3]


def test_positions_are_not_told_where_there_are_none_or_to_who_is_not_live() -> None:
    node = Node()
    filtered = node.sink()
    node.join(filtered, "live:1", filter_={"exists": "n"})
    node.join(filtered, "kept:1", filter_={"exists": "n"})
    node.say("live:1", 1)
    node.say("kept:1", 1)
    filtered.received()
    room = node.hub.rooms["kept:1"]
    member = filtered.memberships["kept:1"]
    node.fanout.hid_members[member] = None
    room.set_apart(member, MemberState.SUSPENDED)
    node.hub.push_positions()
    node.fanout.flush()
    assert filtered.received() == []


# -- acknowledgements ------------------------------------------------------------------------------


async def test_acknowledged_positions_only_grow() -> None:
    node = Node()
    known, anonymous = node.member("kept:1", user="ann"), node.member("kept:1")
    node.say("kept:1", 1, 2, 3)
    member = known.memberships["kept:1"]
    for offset in (2, 1, 0, 2):
        node.hub.acknowledge(member, offset)
    node.hub.acknowledge(anonymous.memberships["kept:1"], 3)
    assert member.seen == 2
    assert sorted(await node.hub.seen("kept:1")) == sorted(
        [Seen("ann", 2, node.clock.now), Seen(anonymous.id, 3, node.clock.now)]
    )


def test_users_find_what_they_had_seen_anonymous_sessions_do_not() -> None:
    node = Node()
    node.say("kept:1", 1, 2, 3)
    position = node.engine.open_nowait("kept:1")
    seen = [Seen("ann", 2, 0.0), Seen("bob", 9, 0.0), Seen("s-1", 3, 0.0)]
    node.hub.obtain("kept:1", position, seen=seen)
    ann, bob = node.member("kept:1", user="ann"), node.member("kept:1", user="bob")
    stranger = node.member("kept:1", "s-1")
    members = [sink.memberships["kept:1"] for sink in (ann, bob, stranger)]
    assert [member.seen for member in members] == [2, 3, 0]  # nobody has seen what is yet to come
    node.hub.acknowledge(members[0], 3)
    node.hub.leave_all(ann)
    node.join(ann, "kept:1")
    assert ann.memberships["kept:1"].seen == 3
    node.engine.replace("kept:1")
    node.say("kept:1", "new")
    assert node.member("kept:1", user="ann").memberships["kept:1"].seen == 0


@pytest.mark.parametrize(("room", "offset"), [("live:1", 0), ("kept:1", 2)])
def test_what_cannot_have_been_seen_is_refused(room: str, offset: int) -> None:
    node = Node()
    sink = node.member(room)
    node.say(room, 1)
    with pytest.raises(BrokerError) as refused:
        node.hub.acknowledge(sink.memberships[room], offset)
    assert (refused.value.code, refused.value.room) == (ErrorCode.BAD_MESSAGE, room)


def test_statistics_are_plain_numbers() -> None:
    node = Node()
    node.member()
    node.say("live:1", 1)
    statistics = node.hub.statistics()
    assert all(type(value) is int for value in statistics.values())
    assert (statistics["rooms"], statistics["published"], statistics["deliveries"]) == (1, 1, 1)


# -- a model of it all -----------------------------------------------------------------------------

ROOMS: dict[str, type[Follower]] = {
    "live:1": LiveFollower,
    "drop:1": LiveFollower,
    "window:1": LiveFollower,
    "latest:1": LatestFollower,
    "kept:1": HistoryFollower,
    "keptwindow:1": HistoryFollower,
}
LIMIT = 600


class HubMachine(RuleBasedStateMachine):
    """Clients that come, go, and read at random; followers check what each is told.

    P1: in order and at most once. P2: no silent hole after a join with ``since``.
    P7: nobody costs more than its outbox, and who reads has everything after a round.
    """

    def __init__(self) -> None:
        super().__init__()
        drop = with_options(EPHEMERAL, slow="drop")
        kept = with_options(KEPT, slow="drop", history=8)
        self.node = Node(
            drop=drop,
            window=with_options(drop, batch_window=0.5),
            latest=with_options(EPHEMERAL, slow="latest"),
            kept=kept,
            keptwindow=with_options(kept, batch_window=0.5),
        )
        self.clients: list[Client] = []
        self.published = 0

    def _client(self, which: int) -> Client | None:
        return self.clients[which % len(self.clients)] if self.clients else None

    @rule(tag=st.sampled_from([None, None, "a"]), codec=st.sampled_from([JSON, ZSTD]), direct=st.booleans())
    def connect(self, tag: str | None, codec: Codec, direct: bool) -> None:
        self.clients.append(Client(self.node, tag, codec=codec, direct=direct, limit=LIMIT))

    @rule(which=st.integers(0, 9), room=st.sampled_from(sorted(ROOMS)), since=st.booleans())
    def join(self, which: int, room: str, since: bool) -> None:
        client = self._client(which)
        if client is not None and client.sink.closed is None:
            client.join(room, ROOMS[room], since=since).finish()

    @rule(which=st.integers(0, 9), room=st.sampled_from(sorted(ROOMS)))
    def leave(self, which: int, room: str) -> None:
        client = self._client(which)
        if client is not None:
            client.leave(room)

    @rule(which=st.integers(0, 9))
    def vanish(self, which: int) -> None:
        client = self._client(which)
        if client is not None:
            self.node.hub.leave_all(client.sink)
            self.clients.remove(client)

    @rule(
        room=st.sampled_from(sorted(ROOMS)),
        tag=st.sampled_from("ab"),
        slot=st.sampled_from([None, "x", "y"]),
        by=st.none() | st.integers(0, 9),
    )
    def publish(self, room: str, tag: str, slot: str | None, by: int | None) -> None:
        self.published += 1
        client = self._client(by) if by is not None and ROOMS[room] is HistoryFollower else None
        exclude = client.sink.id if client is not None else None
        event = self.node.publish(room, self.published, tags={"t": tag}, slot=slot, exclude=exclude)
        self._published(room, event)

    def _published(self, room: str, event: Event) -> None:
        for client in self.clients:
            follower = client.followers.get(room)
            if room in client.sink.memberships and isinstance(follower, LiveFollower | LatestFollower):
                follower.published(self.published, event)

    @rule(
        room=st.sampled_from(sorted(ROOMS)),
        tag=st.sampled_from("ab"),
        slot=st.sampled_from([None, "x", "y"]),
    )
    def receive(self, room: str, tag: str, slot: str | None) -> None:
        """An ephemeral event comes from another node, also into a room with history."""
        self.published += 1
        here = self.node.hub.rooms.get(room)
        position = here.position if here is not None else None
        data = [self.published, position.offset] if position is not None else self.published
        event = self.node.receive(room, data, tags={"t": tag}, slot=slot)
        self._published(room, event)

    @rule(room=st.sampled_from(["kept:1", "keptwindow:1"]), replaced=st.booleans())
    def move(self, room: str, replaced: bool) -> None:
        """The store has more, or another stream, and the engine tells nothing but that."""
        engine = self.node.engine
        if engine.position(room) is None:
            return
        if replaced:
            engine.replace(room)
        engine.holding = True
        self.node.publish(room, 0, tags={"t": "a"})
        engine.holding = False
        engine.move(room)
        for client in self.clients:
            if not client.sink.backlogged:  # told soon, for it waits for nothing
                client.sink.drain(client.sink.socket.capacity)

    @rule()
    def step(self) -> None:
        self.node.fanout.step()

    @rule()
    def flush(self) -> None:
        self.node.fanout.flush()
        self._all_who_read_have_everything()

    @rule(seconds=st.sampled_from([0.1, 0.5, LINGER]))
    def wait(self, seconds: float) -> None:
        self.node.clock.now += seconds
        self.node.fanout.step()
        self.node.hub.push_presence()
        self.node.hub.push_positions()
        self.node.hub.sweep_idle()

    @rule(which=st.integers(0, 9), capacity=st.integers(0, 2000))
    def block(self, which: int, capacity: int) -> None:
        client = self._client(which)
        if client is not None:
            client.sink.block(capacity)

    @rule(which=st.integers(0, 9), capacity=st.none() | st.integers(0, 2000))
    def drain(self, which: int, capacity: int | None) -> None:
        client = self._client(which)
        if client is not None:
            client.sink.drain(capacity)

    def _all_who_read_have_everything(self) -> None:
        for client in self.clients:
            client.listen()
            if client.sink.socket.capacity is None and client.sink.closed is None:
                client.caught_up()

    @invariant()
    def what_was_told_holds(self) -> None:
        for client in self.clients:
            client.listen()

    @invariant()
    def a_slow_session_costs_its_outbox(self) -> None:
        largest = max((len(frame.events()) for frame in self._held()), default=0)
        assert largest <= 3  # two slots, and the events without one
        for client in self.clients:
            # One frame is taken whatever its size while nothing is queued, and so is the close.
            assert len(client.sink.outbox) <= LIMIT + 2000

    def _held(self) -> list[Any]:
        members = [m for client in self.clients for m in client.sink.memberships.values()]
        return [member.held for member in members if member.held is not None]

    @invariant()
    def both_directions_of_every_index_agree(self) -> None:
        for room in self.node.hub.rooms.values():
            members = list(room.everybody())
            assert len(members) == room.members
            for member in members:
                assert member.sink.memberships[room.name] is member
                assert (member.group is None) == (member in room.apart)
                assert (member.status is MemberState.LIVE) == (member.group is not None)
            for key, group in room.groups.items():
                assert group.members
                assert (group.codec, group.filter) == key
            assert room.dirty or not room.pending
        for client in self.clients:
            for name in client.sink.memberships:
                assert name in self.node.hub.rooms

    def teardown(self) -> None:
        for client in self.clients:
            client.sink.drain()
        for _ in range(2):  # what resumes posts again
            self.node.fanout.flush()
            for client in self.clients:
                client.sink.drain()
        self.node.fanout.flush()
        self._all_who_read_have_everything()
        for client in self.clients:
            self.node.hub.leave_all(client.sink)
        for _ in range(2):
            self.node.clock.now += 10 * LINGER
            self.node.hub.sweep_idle()
        assert self.node.hub.rooms == {}


TestHubModel = HubMachine.TestCase
TestHubModel.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_fake_sink_is_what_the_hub_takes_for_a_session() -> None:
    """The model checks the hub only as far as the fake is honest: frames are whole and in order."""
    sink: FakeSink = Node().member()
    sink.block(3)
    assert sink.write(b"\x81\x02[]") == 0
    assert (bytes(sink.socket.taken), bytes(sink.outbox)) == (b"\x81\x02[", b"]")
    sink.drain()
    assert sink.received() == []
