"""Who is there: changes are gathered, and told once."""

from __future__ import annotations

from typing import Any

import pytest

from broker.config import RoomOptions
from broker.hub import presence
from broker.hub.presence import MAX_MEMBERS, PERSONAL_PUSHES
from tests.hub.fakes import FakeSink, Node

ROOM = "chat:1"
CHAT = RoomOptions(presence=True)


def chat() -> Node:
    return Node(chat=CHAT, closed=RoomOptions(presence=False), kept=RoomOptions(presence=True, history=10))


def watcher(node: Node, name: str = "watcher", room: str = ROOM) -> FakeSink:
    """A session that watches the room, and has seen what there was to see."""
    sink = node.sink(name)
    node.join(sink, room, watches=True)
    tick(node)
    sink.received()
    return sink


def come(node: Node, name: str, room: str = ROOM, **how: Any) -> FakeSink:
    sink = node.sink(name, user=f"user-{name}", info={"name": name})
    node.join(sink, room, **how)
    return sink


def tick(node: Node) -> None:
    node.hub.push_presence()
    node.fanout.flush()


def told(sink: FakeSink) -> list[dict[str, list[str]]]:
    """The pushes that came, members by their session."""
    return [
        {
            key: [member["session"] for member in message[key]]
            for key in ("joined", "left", "changed")
            if key in message
        }
        for message in sink.received()
        if message["op"] == "presence"
    ]


def test_a_member_is_what_the_contract_says() -> None:
    node = chat()
    watching = watcher(node, room="kept:1")
    ann = come(node, "ann", "kept:1")
    tick(node)
    [push] = watching.received()
    assert push == {
        "op": "presence",
        "room": "kept:1",
        "joined": [
            {
                "user": "user-ann",
                "session": "ann",
                "info": {"name": "ann"},
                "state": None,
                "joined_at": node.clock.now,
                "seen": 0,
            }
        ],
    }
    node.hub.set_state(ann.memberships["kept:1"], {"typing": True})
    node.say("kept:1", 1)
    node.hub.acknowledge(ann.memberships["kept:1"], 1)
    watching.received()
    tick(node)
    [push] = watching.received()
    [changed] = push["changed"]
    assert (changed["state"], changed["seen"]) == ({"typing": True}, 1)
    assert presence.listing(node.hub.rooms["kept:1"])[1] == changed


def test_changes_are_told_once_and_together() -> None:
    node = chat()
    watching = watcher(node)
    ann, bob = come(node, "ann"), come(node, "bob")
    tick(node)
    assert told(watching) == [{"joined": ["ann", "bob"]}]
    come(node, "cid")
    node.hub.leave_all(ann)
    for number in range(3):
        node.hub.set_state(bob.memberships[ROOM], {"n": number})
    tick(node)
    assert told(watching) == [{"joined": ["cid"], "left": ["ann"], "changed": ["bob"]}]
    tick(node)
    assert told(watching) == []


def test_who_came_and_went_between_two_ticks_is_not_mentioned() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    node.hub.set_state(ann.memberships[ROOM], {"n": 1})
    node.hub.leave_all(ann)
    tick(node)
    assert told(watching) == []


def test_who_went_and_came_between_two_ticks_has_changed() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    node.hub.set_state(ann.memberships[ROOM], {"n": 1})
    tick(node)
    watching.received()
    node.hub.leave_all(ann)
    node.join(ann, ROOM)
    tick(node)
    [push] = watching.received()
    assert [member["state"] for member in push["changed"]] == [None]
    node.hub.leave_all(ann)
    node.join(ann, ROOM)
    node.hub.leave_all(ann)
    tick(node)
    assert told(watching) == [{"left": ["ann"]}]


def test_a_presence_tick_between_leave_and_join_tells_both() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    tick(node)
    node.hub.leave_all(ann)
    tick(node)
    node.join(ann, ROOM)
    tick(node)
    assert told(watching) == [{"joined": ["ann"]}, {"left": ["ann"]}, {"joined": ["ann"]}]


def test_newcomers_do_not_see_themselves_nor_who_was_there() -> None:
    node = chat()
    come(node, "ann")
    bob = come(node, "bob", watches=True)
    come(node, "cid")
    dora = come(node, "dora", watches=True)
    tick(node)
    assert told(bob) == [{"joined": ["cid", "dora"]}]
    assert told(dora) == []


def test_in_a_storm_all_get_the_same() -> None:
    node = chat()
    watching = watcher(node)
    storm = [come(node, f"n{number}", watches=True) for number in range(PERSONAL_PUSHES + 1)]
    tick(node)
    names = [sink.id for sink in storm]
    assert told(watching) == [{"joined": names}]
    assert [told(sink) for sink in storm] == [[{"joined": names}]] * len(storm)


def test_up_to_the_limit_newcomers_are_told_one_by_one() -> None:
    node = chat()
    arrivals = [come(node, f"n{number}", watches=True) for number in range(PERSONAL_PUSHES)]
    tick(node)
    names = [sink.id for sink in arrivals]
    assert [told(sink) for sink in arrivals] == [
        *([{"joined": names[number + 1 :]}] for number in range(PERSONAL_PUSHES - 1)),
        [],
    ]


def test_lists_are_bounded_and_counts_are_not() -> None:
    node = chat()
    watching = watcher(node)
    for number in range(MAX_MEMBERS + 10):
        node.join(node.sink(user=f"user-{number % 7}"), ROOM)
    tick(node)
    [push] = told(watching)
    assert len(push["joined"]) == MAX_MEMBERS
    tick(node)
    [push] = told(watching)
    assert len(push["joined"]) == 10
    room = node.hub.rooms[ROOM]
    assert len(presence.listing(room)) == MAX_MEMBERS
    assert presence.counts(room) == {"sessions": MAX_MEMBERS + 11, "users": 7}  # the watcher is anonymous


def test_everybody_who_left_is_told_of_however_many_they_are() -> None:
    node = chat()
    crowd = [node.sink() for _ in range(2 * MAX_MEMBERS + 1)]
    for sink in crowd:
        node.join(sink, ROOM)
    watching = watcher(node)
    for sink in crowd:
        node.hub.leave_all(sink)
    gone: list[str] = []
    for size in (MAX_MEMBERS, MAX_MEMBERS, 1):
        tick(node)
        [push] = told(watching)
        assert len(push["left"]) == size
        gone += push["left"]
    assert gone == [sink.id for sink in crowd]
    tick(node)
    assert told(watching) == []


def test_who_goes_before_its_coming_was_told_is_told_to_those_who_saw_it() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    late = node.sink("late")
    node.join(late, ROOM, watches=True)
    assert [member["session"] for member in presence.listing(node.hub.rooms[ROOM])] == [
        "watcher",
        "ann",
        "late",
    ]
    node.hub.leave_all(ann)
    tick(node)
    assert told(late) == [{"left": ["ann"]}]
    assert told(watching) == [{"joined": ["late"], "left": ["ann"]}]
    bob = come(node, "bob")
    node.hub.leave_all(bob)
    tick(node)
    assert told(late) == []  # nobody was shown the members since the last push


def test_a_newcomer_that_was_listed_before_it_changed_is_told_the_change() -> None:
    """Found by a model: its coming is no news to who came later, so the change was none, either."""
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    late = node.sink("late")
    node.join(late, ROOM, watches=True)
    presence.listing(node.hub.rooms[ROOM])
    node.hub.set_state(ann.memberships[ROOM], {"n": 1})
    tick(node)
    _reply, push = late.received()
    assert [member["state"] for member in push["changed"]] == [{"n": 1}]
    assert told(watching) == [{"joined": ["ann", "late"]}]


def test_who_came_back_is_no_change_for_those_who_came_in_between() -> None:
    """Found by a model: they were not shown whom the change was of."""
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    tick(node)
    watching.received()
    node.hub.leave_all(ann)
    late = node.sink("late")
    node.join(late, ROOM, watches=True)
    presence.listing(node.hub.rooms[ROOM])
    node.join(ann, ROOM)
    tick(node)
    assert told(late) == [{"joined": ["ann"]}]
    assert told(watching) == [{"joined": ["late", "ann"]}]


def test_members_that_are_not_live_are_listed() -> None:
    node = chat()
    node.member("kept:1")
    node.say("kept:1", 1)
    sink = node.sink("ann")
    joining = node.start_join(sink, "kept:1", tail=1)
    room = node.hub.rooms["kept:1"]
    assert "ann" in [member["session"] for member in presence.listing(room)]
    node.hub.leave(joining.member)
    assert "ann" not in [member["session"] for member in presence.listing(room)]


def test_a_rejoin_keeps_state_seen_and_the_time_of_joining() -> None:
    node = chat()
    watching = watcher(node, room="kept:1")
    ann = come(node, "ann", "kept:1")
    node.say("kept:1", 1)
    node.hub.set_state(ann.memberships["kept:1"], {"n": 1})
    node.hub.acknowledge(ann.memberships["kept:1"], 1)
    tick(node)
    watching.received()
    joined_at = node.clock.now
    node.clock.now += 10
    node.join(ann, "kept:1")
    tick(node)
    assert told(watching) == []
    described = ann.memberships["kept:1"].describe()
    assert (described["state"], described["seen"], described["joined_at"]) == ({"n": 1}, 1, joined_at)


@pytest.mark.parametrize("first_tick", [True, False])
def test_a_change_before_a_rejoin_is_told_of_the_newer_membership(first_tick: bool) -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    if first_tick:
        tick(node)
        watching.received()
        node.hub.set_state(ann.memberships[ROOM], {"n": 1})
    node.join(ann, ROOM)
    node.hub.set_state(ann.memberships[ROOM], {"n": 2})
    tick(node)
    [push] = watching.received()
    [member] = push["changed"] if first_tick else push["joined"]
    assert member["state"] == {"n": 2}


def test_who_stops_watching_is_told_no_more() -> None:
    node = chat()
    watching = watcher(node)
    come(node, "ann")
    node.join(watching, ROOM)
    come(node, "bob")
    tick(node)
    assert told(watching) == []


def test_a_watcher_may_lose_the_right_to_watch() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    node.hub.unwatch(watching.memberships[ROOM])
    tick(node)
    assert told(watching) == []
    node.hub.leave_all(watching)
    node.hub.leave_all(ann)


def test_a_member_that_shows_something_else_has_changed() -> None:
    node = chat()
    watching = watcher(node)
    ann = come(node, "ann")
    tick(node)
    watching.received()
    ann.info = {"name": "Ann"}
    node.hub.introduce(ann.memberships[ROOM])
    tick(node)
    [push] = watching.received()
    assert [member["info"] for member in push["changed"]] == [{"name": "Ann"}]


def test_a_watcher_that_left_before_the_tick_is_told_nothing() -> None:
    node = chat()
    watching = watcher(node)
    come(node, "ann")
    node.hub.leave_all(watching)
    tick(node)
    assert watching.received() == []


def test_changes_that_nobody_watched_are_forgotten() -> None:
    node = chat()
    ann = come(node, "ann")
    come(node, "bob")
    node.hub.leave_all(ann)
    room = node.hub.rooms[ROOM]
    assert (room.joined, room.left, room.touched) == (None, None, None)
    assert told(watcher(node)) == []
    tick(node)


@pytest.mark.parametrize("room", ["closed:1", "all", "user:ann"])
def test_rooms_without_presence(room: str) -> None:
    node = Node(closed=RoomOptions(presence=False), user=RoomOptions(history=10), all=CHAT)
    watching = watcher(node, room=room)
    ann = come(node, "ann", room)
    node.hub.set_state(ann.memberships[room], {"n": 1})
    node.hub.leave_all(ann)
    tick(node)
    assert told(watching) == []
