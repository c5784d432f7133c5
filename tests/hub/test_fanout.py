"""Rounds: order, groups, chunks, windows and posts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.hub import fanout
from broker.hub.fanout import CHUNK, FRAME_BYTES, SAMPLE, cut, send_all
from broker.protocol.codec import JSON, ZSTD
from broker.protocol.events import Event, Position
from broker.protocol.messages import encode_op
from tests.hub.fakes import EPHEMERAL, KEPT, POISON, FakeSink, FakeSocket, Node, with_options

DROP = with_options(EPHEMERAL, slow="drop")
KEPT_DROP = with_options(KEPT, slow="drop")
LATEST = with_options(EPHEMERAL, slow="latest")
WINDOW = with_options(EPHEMERAL, batch_window=0.5)
KEPT_WINDOW = with_options(KEPT, batch_window=0.5)

EMEA = {"eq": ["region", "EMEA"]}


def crowd(node: Node, size: int, room: str = "live:1", **options: Any) -> list[FakeSink]:
    return [node.member(room, **options) for _ in range(size)]


# -- rounds ----------------------------------------------------------------------


def test_nothing_is_sent_before_a_round() -> None:
    node = Node()
    sink = node.member()
    node.publish("live:1", 1)
    assert node.fanout.busy
    assert sink.received() == []
    node.fanout.step()
    assert sink.data() == [1]
    assert not node.fanout.busy


def test_events_keep_their_order_in_a_room_and_in_a_session() -> None:
    node = Node()
    sink = node.member("live:1")
    node.join(sink, "live:2")
    node.fanout.flush()
    sink.received()
    for number in range(6):
        node.publish(f"live:{1 + number % 2}", number)
    node.fanout.flush()
    messages = sink.received()
    assert [m["data"] for m in messages if m["room"] == "live:1"] == [0, 2, 4]
    assert [m["data"] for m in messages if m["room"] == "live:2"] == [1, 3, 5]


def test_what_gathers_is_one_batch_encoded_once() -> None:
    node = Node()
    sinks = crowd(node, 3)
    node.encoder.encoded.clear()
    node.say("live:1", 1, 2, 3)
    assert [sink.data() for sink in sinks] == [[1, 2, 3]] * 3
    assert [len(sink.frames[-1]) for sink in sinks] == [3] * 3
    assert len(node.encoder.encoded) == 1
    assert (node.fanout.batches, node.fanout.frames, node.fanout.deliveries) == (1, 3, 9)


def test_each_codec_and_filter_is_encoded_once() -> None:
    node = Node()
    groups: list[dict[str, Any]] = [{}, {"codec": ZSTD}, {}, {}]
    filters = [None, None, EMEA, {"eq": ["region", "EMEA"]}]
    sinks = []
    for options, filter_ in zip(groups * 2, filters * 2, strict=True):
        sink = node.sink(**options)
        node.join(sink, "live:1", filter_=filter_)
        node.fanout.flush()
        sink.received()
        sinks.append(sink)
    node.encoder.encoded.clear()
    node.say("live:1", "here", tags={"region": "EMEA"})
    assert [sink.data() for sink in sinks] == [["here"]] * 8
    assert [codec for codec, _ in node.encoder.encoded] == [JSON, ZSTD, JSON]


def test_a_filter_that_hides_all_sends_nothing_and_owes_a_position() -> None:
    node = Node()
    watcher = node.sink()
    node.join(watcher, "kept:1", filter_=EMEA)
    node.fanout.flush()
    watcher.received()
    node.say("kept:1", 1, 2)
    assert watcher.received() == []
    node.say("kept:1", "seen", tags={"region": "EMEA"})
    assert watcher.data() == ["seen"]
    node.hub.push_positions()
    node.fanout.flush()
    [position] = watcher.received()
    assert (position["op"], position["offset"]) == ("position", 3)


def test_a_filter_chooses_within_a_batch() -> None:
    node = Node()
    watcher = node.sink()
    node.join(watcher, "live:1", filter_=EMEA)
    node.fanout.flush()
    watcher.received()
    for number in range(4):
        node.publish("live:1", number, tags={"region": "EMEA" if number % 2 else "APAC"})
    node.fanout.flush()
    assert watcher.data() == [1, 3]


def test_groups_that_hide_all_give_way_too() -> None:
    node = Node()
    for number in range(CHUNK + 1):
        node.join(node.sink(), "live:1", filter_={"eq": ["n", number]})
    node.fanout.flush()
    node.publish("live:1", 1)
    assert node.fanout.step()


def test_the_driver_is_woken_once_and_not_while_it_runs() -> None:
    node = Node()
    node.member()
    node.wakes = 0
    node.publish("live:1", 1)
    node.publish("live:1", 2)
    assert node.wakes == 1
    node.fanout.flush()
    node.fanout.driven = True
    node.publish("live:1", 3)
    node.sinks[0].post(encode_op("ok"))
    assert node.wakes == 1
    node.fanout.driven = False
    node.fanout.flush()
    node.sinks[0].post(encode_op("ok"))
    assert node.wakes == 2


def test_a_round_inside_a_round_is_refused() -> None:
    node = Node()
    sink = node.member(user="u")
    node.fanout.running = True
    with pytest.raises(AssertionError):
        node.fanout.step()
    assert sink.received() == []


# -- pieces and chunks -------------------------------------------------------------


def test_a_batch_is_cut_so_that_no_frame_is_too_large() -> None:
    node = Node()
    sink = node.member()
    size = FRAME_BYTES // 3
    node.say("live:1", *["x" * size] * 5)
    assert sink.data() == ["x" * size] * 5
    assert [len(frame) for frame in sink.frames[-3:]] == [2, 2, 1]


@given(st.lists(st.integers(min_value=1, max_value=FRAME_BYTES + 10), max_size=20))
def test_pieces_are_full_and_in_order(sizes: list[int]) -> None:
    events = [Event("live:1", b"x" * size, 0.0) for size in sizes]
    pieces = list(cut(events))
    assert [event for piece in pieces for event in piece] == events
    assert all(pieces)
    for piece, following in zip(pieces, [*pieces, []][1:], strict=True):
        size = sum(len(event.wire) for event in piece)
        assert size <= FRAME_BYTES or len(piece) == 1
        if following:
            assert size + len(following[0].wire) > FRAME_BYTES


def test_large_rooms_give_way_between_chunks() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK + 1)
    node.publish("live:1", 1)
    steps = [node.fanout.step()]
    reached = [sink.data() for sink in sinks].count([1])
    assert reached == CHUNK
    while steps[-1]:
        steps.append(node.fanout.step())
    assert len(steps) == 3
    assert sum(bool(sink.socket.sends) for sink in sinks) == len(sinks)


def test_a_large_latest_room_gives_way() -> None:
    node = Node(latest=LATEST)
    crowd(node, 2 * CHUNK, "latest:1", direct=False)
    node.publish("latest:1", 1)
    assert node.fanout.step()


def test_large_rooms_begin_elsewhere_each_time() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK)
    first = []
    for number in range(2):
        node.publish("live:1", number)
        node.fanout.step()
        first.append({sink.id for sink in sinks if sink.received()})
        node.fanout.flush()
        for sink in sinks:
            sink.received()
    assert first[0].isdisjoint(first[1])


@pytest.mark.parametrize("direct", [True, False])
def test_who_leaves_between_chunks_gets_nothing_more(direct: bool) -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK, direct=direct)
    node.publish("live:1", 1)
    node.fanout.step()
    sent = [sink for sink in sinks if sink.received()]
    waiting = [sink for sink in sinks if sink not in sent]
    for sink in [*sent[:5], *waiting[:5]]:
        node.hub.leave_all(sink)
    node.fanout.flush()
    assert [sink.received() for sink in waiting[:5]] == [[]] * 5
    assert [sink.data() for sink in waiting[5:]] == [[1]] * (CHUNK - 5)
    assert [sink.received() for sink in sent] == [[]] * CHUNK


def test_who_joins_between_chunks_gets_what_is_published_after() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK, "kept:1")
    node.publish("kept:1", 1)
    node.fanout.step()
    late = node.sink()
    node.join(late, "kept:1")
    node.publish("kept:1", 2)
    node.fanout.flush()
    [reply, event] = late.received()
    assert (reply["offset"], event["offset"]) == (1, 2)
    assert [sink.data() for sink in sinks] == [[1, 2]] * len(sinks)


def test_a_newcomer_in_a_group_whose_turn_comes_gets_nothing_old() -> None:
    """The group of the late member is served after the one that is being served now."""
    node = Node()
    crowd(node, 2 * CHUNK, "kept:1")
    node.member("kept:1", codec=ZSTD)
    node.publish("kept:1", 1)
    node.fanout.step()
    late = node.sink(codec=ZSTD)
    node.join(late, "kept:1")
    node.say("kept:1", 2)
    assert [m.get("offset") for m in late.received()] == [1, 2]  # the reply's, and the event's


def test_who_rejoins_between_pieces_gets_each_event_once() -> None:
    """Under another codec the second membership stands in a group that has yet to be served."""
    node = Node()
    sinks = crowd(node, 2 * CHUNK, "kept:1")
    node.member("kept:1", codec=ZSTD)
    size = FRAME_BYTES // 2
    for _ in range(3):
        node.publish("kept:1", "x" * size)
    node.fanout.step()
    again = sinks[0]
    again.codec = ZSTD
    node.join(again, "kept:1", since=Position(node.engine.stream("kept:1").epoch, 0))
    node.say("kept:1", "new")
    offsets = [m["offset"] for m in again.received() if m["op"] == "event"]
    first = offsets[: offsets.index(3) + 1]
    assert first == [1, 2, 3]  # what was pending went to the first membership
    assert offsets[3:] == [1, 2, 3, 4]  # and the second asked for everything again


def test_regrouping_between_chunks_neither_loses_nor_doubles() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK)
    node.member(codec=ZSTD)
    node.publish("live:1", 1)
    node.fanout.step()
    for sink in (sinks[0], sinks[-1]):
        sink.codec = ZSTD
        node.hub.regroup(sink)
    node.say("live:1", 2)
    assert [sink.data() for sink in (sinks[0], sinks[-1])] == [[1, 2]] * 2


def test_who_falls_behind_between_chunks_is_written_to_behind_its_backlog() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK)
    node.publish("live:1", 1)
    node.fanout.step()
    slow = next(sink for sink in sinks if not sink.received())
    slow.block(3)
    slow.write(b"\x81\x06[9,10]")
    node.fanout.flush()
    slow.drain()
    slow.socket.taken[:8] = b""
    assert slow.data() == [1]


@given(st.data())
def test_no_event_is_doubled_missed_or_late_whatever_happens_between_chunks(data: st.DataObject) -> None:
    """Members with two codecs; between steps they join, leave, come back, and block."""
    chunk = 2
    original, fanout.CHUNK = fanout.CHUNK, chunk
    try:
        node = Node(kept=KEPT_DROP)
        wanted: dict[FakeSink, list[int]] = {}
        got: dict[FakeSink, list[int]] = {}
        told: set[FakeSink] = set()

        def look(sink: FakeSink) -> None:
            for message in sink.received():
                if message["op"] == "event":
                    got.setdefault(sink, []).append(message["offset"])
                elif message["op"] == "lost":
                    told.add(sink)

        published = 0
        for _ in range(data.draw(st.integers(1, 30))):
            members = [sink for sink in node.sinks if sink.memberships]
            action = data.draw(
                st.sampled_from(["join", "publish", "publish", "step", "leave", "block", "drain"])
            )
            if action == "join":
                sink = node.sink(codec=data.draw(st.sampled_from([JSON, ZSTD])), limit=300)
                node.join(sink, "kept:1")
                wanted[sink] = []
            elif action == "publish":
                published += 1
                node.publish("kept:1", "x" * data.draw(st.sampled_from([1, FRAME_BYTES])))
                for sink in members:
                    wanted[sink].append(published)
            elif action == "step":
                node.fanout.step()
            elif members:
                sink = data.draw(st.sampled_from(members))
                if action == "leave":
                    node.fanout.settle(sink.memberships["kept:1"].room)
                    node.hub.leave_all(sink)
                elif action == "block":
                    sink.block(data.draw(st.integers(0, 200)))
                else:
                    sink.drain()
        node.fanout.flush()
        for sink in node.sinks:
            sink.drain()
        node.fanout.flush()
        for sink in node.sinks:
            look(sink)
            offsets = got.get(sink, [])
            if sink in told or not sink.memberships:  # who leaves while it is behind is told nothing
                assert offsets == wanted[sink][: len(offsets)]
            else:
                assert offsets == wanted[sink]
    finally:
        fanout.CHUNK = original


# -- echo: false --------------------------------------------------------------------


@pytest.mark.parametrize("room", ["live:1", "kept:1"])
def test_only_the_publisher_misses_its_echo_and_the_others_share_one_frame(room: str) -> None:
    node = Node()
    publisher, *others = crowd(node, 3, room)
    node.encoder.encoded.clear()
    node.publish(room, "mine", exclude=publisher.id)
    node.publish(room, "theirs")
    node.fanout.flush()
    assert publisher.data() == ["theirs"]
    assert [sink.data() for sink in others] == [["mine", "theirs"]] * 2
    assert len(node.encoder.encoded) == 2


def test_who_alone_is_left_out_costs_no_encoding() -> None:
    node = Node()
    publisher = node.member("kept:1")
    elsewhere = node.sink("gone")
    node.encoder.encoded.clear()
    node.publish("kept:1", 1, exclude=publisher.id)
    node.publish("kept:1", 2, exclude=publisher.id)
    node.fanout.flush()
    assert node.encoder.encoded == []
    node.publish("kept:1", 3, exclude=elsewhere.id)
    node.fanout.flush()
    assert publisher.data() == [3]
    node.hub.push_positions()
    node.fanout.flush()
    assert [message["offset"] for message in publisher.received()] == [3]


def test_who_left_meanwhile_gets_no_selection_of_its_own() -> None:
    node = Node()
    publisher, *_ = crowd(node, 2 * CHUNK)
    node.publish("live:1", "mine", exclude=publisher.id)
    node.publish("live:1", "theirs")
    node.fanout.step()
    node.hub.leave_all(publisher)
    node.fanout.flush()
    assert publisher.received() == []


def test_a_selection_that_cannot_be_encoded_is_lost_for_its_publisher_alone() -> None:
    node = Node(kept=KEPT)
    publisher, other = crowd(node, 2, "kept:1")
    node.publish("kept:1", POISON, exclude=other.id)
    node.publish("kept:1", "fine", exclude=publisher.id)
    node.fanout.flush()
    assert other.data() == ["fine"]
    publisher.drain()
    node.fanout.flush()
    [lost] = publisher.received()
    assert (lost["op"], lost["reason"], lost["offset"]) == ("lost", "gap", 0)


# -- what cannot be encoded ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "fields"), [("live:1", {"count": 2}), ("kept:1", {"count": 2, "offset": 0})]
)
def test_a_batch_that_cannot_be_encoded_is_told_as_lost(room: str, fields: dict[str, Any]) -> None:
    node = Node()
    poor, rich = node.member(room), node.member("live:2")
    node.publish(room, "fine")
    node.publish(room, POISON)
    node.publish("live:2", "on")
    node.fanout.flush()
    assert rich.data() == ["on"]
    poor.drain()
    node.fanout.flush()
    [lost] = poor.received()
    assert lost["reason"] == "gap"
    assert lost.items() >= fields.items()
    assert poor.closed is None
    assert node.fanout.encodings_failed == 1
    node.say(room, "next")
    assert poor.data() == (["next"] if room == "live:1" else [])


class TornSink(FakeSink):
    """A session with a fault of ours in it."""

    def write(self, frame: bytes) -> int:
        raise RuntimeError("a fault")


def test_a_fault_costs_one_batch_and_is_told() -> None:
    node = Node(kept=KEPT)
    before, after = node.member("kept:1"), node.member("kept:2")
    torn = TornSink(node.hub, "torn", direct=False)
    node.hub.go_live(node.hub.join(torn, node.hub.rooms["kept:1"]))
    publisher = node.member("kept:3")
    node.publish_as(publisher, "kept:3", "mine")
    node.publish("kept:1", 1)
    node.publish("kept:2", 2)
    node.fanout.flush()
    assert node.fanout.faults == 1
    assert after.data() == [2]
    assert [m["op"] for m in publisher.received()] == ["event", "ok"]
    before.drain()
    node.fanout.flush()
    assert [m["op"] for m in before.received()] == ["lost"]
    assert not node.hub.rooms["kept:1"].dirty


class TornEncoderSink(FakeSink):
    """A session whose answers cannot be flushed."""

    def flush_posts(self, *, after_events: bool = False) -> None:
        raise RuntimeError("a fault")


def test_a_fault_outside_a_batch_costs_that_session_its_turn() -> None:
    node = Node()
    torn = TornEncoderSink(node.hub, "torn")
    other = node.member()
    torn.post(encode_op("ok"))
    other.post(encode_op("ok"))
    node.fanout.flush()
    assert node.fanout.faults == 1
    assert [m["op"] for m in other.received()] == ["ok"]


# -- posts --------------------------------------------------------------------------------


def test_replies_come_in_order_in_one_frame() -> None:
    node = Node()
    sink = node.member()
    for number in range(3):
        sink.post(encode_op("ok", id=number))
    node.fanout.flush()
    assert [message["id"] for message in sink.received()] == [0, 1, 2]
    assert len(sink.frames[-1]) == 3


def test_what_is_said_between_chunks_precedes_events_that_are_not_on_their_way() -> None:
    node = Node()
    crowd(node, 2 * CHUNK)
    sink = node.member("live:2")
    node.publish("live:1", "before")
    node.publish("live:2", "after")
    node.fanout.step()
    sink.post(encode_op("ok"))
    node.fanout.flush()
    assert [message["op"] for message in sink.received()] == ["ok", "event"]


def test_an_answer_that_waits_for_events_comes_after_them_and_the_others_behind_it() -> None:
    node = Node()
    sink = node.member("kept:1")
    sink.post(encode_op("ok", of="before"))
    node.publish_as(sink, "kept:1", "mine")
    sink.post(encode_op("ok", of="behind"))
    node.fanout.flush()
    said = [message.get("data") or message["of"] for message in sink.received()]
    assert said == ["before", "mine", "mine", "behind"]


def test_a_join_reply_precedes_any_event_even_behind_an_answer_that_waits() -> None:
    node = Node()
    sink = node.member("kept:1")
    node.publish_as(sink, "kept:1", "mine")
    node.join(sink, "live:1")
    node.publish("live:1", "live")
    node.publish_as(sink, "live:1", "again")
    node.fanout.flush()
    said = [(m["op"], m.get("data") or m.get("of") or m["room"]) for m in sink.received()]
    assert said == [
        ("event", "mine"),
        ("ok", "mine"),
        ("ok", "live:1"),
        ("event", "live"),
        ("event", "again"),
        ("ok", "again"),
    ]


def test_a_busy_room_does_not_keep_answers_waiting() -> None:
    """Each chunk of a large room meets a new event, so that it never falls quiet."""
    node = Node()
    crowd(node, 2 * CHUNK)
    asking = node.sink()
    node.publish("live:1", 0)
    node.publish_as(asking, "live:1", "question")
    steps = 0
    while not asking.received():
        node.publish("live:1", "more")
        node.fanout.step()
        steps += 1
        assert steps < 10
    assert node.fanout.busy


def test_an_answer_given_while_its_room_is_served_waits_for_the_next_round() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK, "kept:1")
    asking = sinks[0]
    node.publish_as(asking, "kept:1", "first")
    node.fanout.step()
    node.publish_as(asking, "kept:1", "second")
    asking.post(encode_op("ok", of="third"))
    node.fanout.flush()
    said = [(m["op"], m.get("data") or m["of"]) for m in asking.received()]
    assert said == [
        ("event", "first"),
        ("ok", "first"),
        ("event", "second"),
        ("ok", "second"),
        ("ok", "third"),
    ]


def test_what_is_said_behind_a_sealed_answer_goes_with_it() -> None:
    node = Node()
    sinks = crowd(node, 2 * CHUNK, "kept:1")
    node.publish_as(sinks[0], "kept:1", "first")
    node.fanout.step()
    sinks[0].post(encode_op("ok", of="second"))
    node.fanout.flush()
    assert [m["of"] for m in sinks[0].received() if m["op"] == "ok"] == ["first", "second"]


# -- batch windows --------------------------------------------------------------------------


def test_a_window_gathers_events_until_it_has_passed() -> None:
    node = Node(slow=WINDOW)
    sink = node.member("slow:1")
    node.wakes = 0
    assert node.fanout.due() == math.inf
    node.publish("slow:1", 1)
    assert node.fanout.due() == node.clock.now + 0.5
    assert node.wakes == 1  # the driver must sleep shorter
    assert not node.fanout.busy
    node.clock.now += 0.25
    node.publish("slow:1", 2)
    assert not node.fanout.step()
    assert sink.received() == []
    node.clock.now += 0.25
    node.fanout.step()
    assert sink.data() == [1, 2]
    assert node.fanout.due() == math.inf


def test_windows_end_in_order_and_only_a_sooner_one_wakes_the_driver() -> None:
    node = Node(slow=WINDOW, slower=with_options(WINDOW, batch_window=1.0))
    sinks = [node.member(room) for room in ("slower:1", "slow:1", "slow:2")]
    node.wakes = 0
    for room in ("slower:1", "slow:1", "slow:2"):
        node.publish(room, room)
    assert node.wakes == 2
    node.clock.now += 0.5
    node.fanout.step()
    assert [sink.data() for sink in sinks] == [[], ["slow:1"], ["slow:2"]]
    assert node.fanout.due() == node.clock.now + 0.5


def test_other_rooms_do_not_wait_for_a_window() -> None:
    node = Node(slow=WINDOW)
    slow, live = node.member("slow:1"), node.member("live:1")
    node.publish("slow:1", 1)
    node.say_now("live:1", 2)
    assert (slow.received(), live.data()) == ([], [2])


def test_flush_and_a_join_end_windows() -> None:
    node = Node(slow=KEPT_WINDOW)
    sink = node.member("slow:1")
    node.publish("slow:1", 1)
    node.fanout.flush()
    assert sink.data() == [1]
    node.publish("slow:1", 2)
    late = node.sink()
    node.join(late, "slow:1")
    assert sink.data() == [2]
    node.publish("slow:1", 3)
    node.fanout.flush()
    assert [m["offset"] for m in late.received()] == [2, 3]


def test_an_answer_in_a_room_with_history_ends_the_window_of_its_publisher() -> None:
    node = Node(slow=KEPT_WINDOW)
    member, stranger, other = node.member("slow:1"), node.sink(), node.member("slow:2")
    node.publish("slow:2", "unrelated")
    node.publish_as(stranger, "slow:1", "from outside")
    node.fanout.step()
    assert [m["op"] for m in stranger.received()] == ["ok"]  # no event of its own to wait for
    assert member.received() == []
    node.publish_as(member, "slow:1", "from inside")
    node.fanout.step()
    assert [m["op"] for m in member.received()] == ["event", "event", "ok"]
    assert other.received() == []
    assert node.fanout.due() < math.inf


def test_an_answer_in_an_ephemeral_room_does_not_end_its_window() -> None:
    node = Node(slow=WINDOW)
    member = node.member("slow:1")
    node.publish_as(member, "slow:1", 1)
    node.fanout.step()
    assert [m["op"] for m in member.received()] == ["ok"]
    node.clock.now += 0.5
    node.fanout.step()
    assert member.data() == [1]


# -- the hot loop -----------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["takes", "short", "full", "broken"]), max_size=8))
def test_send_all_tells_whom_the_careful_way_must_see_to(kinds: list[str]) -> None:
    sockets = []
    for kind in kinds:
        socket = FakeSocket()
        socket.capacity = {"short": 3, "full": 0}.get(kind)
        socket.broken = kind == "broken"
        sockets.append(socket)
    expected = {"short": 3, "full": 0, "broken": -1}
    short = send_all(sockets, b"frame")
    assert short == [
        (socket, expected[kind]) for socket, kind in zip(sockets, kinds, strict=True) if kind != "takes"
    ]


def test_direct_and_asked_members_get_the_same() -> None:
    node = Node()
    direct, asked = node.member(), node.member(direct=False)
    node.say("live:1", 1)
    for sink in (direct, asked):
        sink.block(10)
        node.say("live:1", 2)
        sink.drain()
    node.say("live:1", 3)
    assert direct.data() == asked.data() == [1, 2, 2, 3]
    assert bytes(direct.socket.taken) == bytes(asked.socket.taken)


def test_a_frame_that_was_not_taken_is_not_counted() -> None:
    node = Node(drop=DROP)
    slow, broken = node.member("drop:1", limit=1), node.member("drop:1")
    slow.block()
    broken.socket.broken = True
    node.say("drop:1", 1)
    assert (node.fanout.frames, node.fanout.deliveries) == (1, 1)
    node.say("drop:1", 2)
    assert (node.fanout.frames, node.fanout.deliveries) == (1, 1)


def test_one_batch_in_some_has_its_latency_measured() -> None:
    node = Node()
    node.member()
    measured: list[float] = []
    node.fanout._sent = measured.append
    for _ in range(SAMPLE):
        node.say("live:1", 1)
    assert measured == [node.clock.now]
