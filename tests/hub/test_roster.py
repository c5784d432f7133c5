"""Who is where: what other nodes are told of members here, and watchers here of members there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from broker.config import RoomOptions
from broker.engine.peers import Mate
from broker.hub import presence
from broker.hub.presence import MAX_MEMBERS
from broker.hub.roster import PARTED_KEPT
from broker.protocol.events import SessionId, UserId
from tests.hub.fakes import FakeSink, Node
from tests.hub.test_presence import ROOM, chat, come, tick, told, watcher


def mate(session: str, user: str | None = None, state: object = None) -> Mate:
    """A member elsewhere."""
    fields = orjson.dumps({"session": session, "user": user, "state": state})
    return Mate(SessionId(session), UserId(user) if user is not None else None, fields)


def having(*mates: Mate) -> dict[SessionId, Mate]:
    return {each.session: each for each in mates}


def listed(node: Node, room: str = ROOM) -> list[str]:
    return [member["session"] for member in shown(node, room)]


def shown(node: Node, room: str = ROOM) -> list[dict[str, Any]]:
    """The members as clients see them."""
    members: list[dict[str, Any]] = orjson.loads(orjson.dumps(presence.listing(node.hub.rooms[room])))
    return members


# -- what is told to other nodes ------------------------------------------------------------


def touched(node: Node) -> list[tuple[str, str, str | None, bool]]:
    """Room, session, user, and whether it is still there, since the last look."""
    touches, node.peers.touches = node.peers.touches, []
    return [(room, session, user, member is not None) for room, session, user, member in touches]


def test_other_nodes_are_told_who_comes_changes_and_goes() -> None:
    node = chat()
    ann = come(node, "ann", "kept:1")
    member = ann.memberships["kept:1"]
    assert node.peers.touches == [("kept:1", "ann", "user-ann", member)]
    node.say("kept:1", 1)
    there = [("kept:1", "ann", "user-ann", True)]
    assert touched(node) == there
    node.hub.set_state(member, {"n": 1})
    assert touched(node) == there
    node.hub.acknowledge(member, 1)
    assert touched(node) == there
    node.hub.acknowledge(member, 1)
    assert touched(node) == []
    node.hub.introduce(member)
    assert touched(node) == there
    node.hub.leave(member)
    node.hub.leave(member)
    assert touched(node) == [("kept:1", "ann", "user-ann", False)]


def test_other_nodes_get_the_newer_membership_to_describe() -> None:
    node = chat()
    ann = come(node, "ann")
    node.join(ann, ROOM)
    assert node.peers.touches[-1][3] is ann.memberships[ROOM]


def test_where_nobody_is_shown_only_coming_and_going_is_of_interest() -> None:
    node = chat()
    ann = come(node, "ann", "closed:1")
    member = ann.memberships["closed:1"]
    touched(node)
    node.hub.set_state(member, {"n": 1})
    assert touched(node) == []
    node.hub.introduce(member)
    node.hub.leave(member)
    assert touched(node) == [("closed:1", "ann", "user-ann", True), ("closed:1", "ann", "user-ann", False)]


@pytest.mark.parametrize("room", ["all", "user:ann"])
def test_the_rooms_of_the_server_are_of_no_interest_elsewhere(room: str) -> None:
    node = Node(user=RoomOptions(history=10))
    ann = come(node, "ann", room)
    node.hub.introduce(ann.memberships[room])
    node.hub.leave_all(ann)
    assert touched(node) == []


# -- what is told to watchers ---------------------------------------------------------------


def test_members_elsewhere_are_told_like_those_here() -> None:
    node = chat()
    watching = watcher(node)
    bob = mate("bob", "b", {"n": 1})
    node.hub.know_mates(ROOM, "n1", having(bob))
    tick(node)
    [push] = watching.received()
    assert push == {"op": "presence", "room": ROOM, "joined": [orjson.loads(bob.fields)]}
    node.hub.change_mates(ROOM, "n1", [mate("cid")], [mate("bob", "b", {"n": 2})], [])
    tick(node)
    [push] = watching.received()
    assert [member["session"] for member in push["joined"]] == ["cid"]
    assert [member["state"] for member in push["changed"]] == [{"n": 2}]
    node.hub.change_mates(ROOM, "n1", [], [], [SessionId("bob")])
    node.hub.know_mates(ROOM, "n1", {})
    tick(node)
    assert told(watching) == [{"left": ["bob", "cid"]}]
    assert node.hub.rooms[ROOM].mates is None


def test_a_repeated_word_changes_nothing() -> None:
    node = chat()
    watching = watcher(node)
    bob, cid = mate("bob"), mate("cid")
    for _ in range(2):
        node.hub.know_mates(ROOM, "n1", having(bob, cid))
        node.hub.change_mates(ROOM, "n1", [bob], [cid], [SessionId("dora")])
        tick(node)
    node.hub.know_mates(ROOM, "n2", {})
    node.hub.change_mates(ROOM, "n2", [], [], [SessionId("bob")])
    tick(node)
    assert told(watching) == [{"joined": ["bob", "cid"]}]


def test_a_change_before_the_coming_was_told_is_told_with_it() -> None:
    node = chat()
    watching = watcher(node)
    node.hub.change_mates(ROOM, "n1", [mate("bob", state=1)], [], [])
    node.hub.change_mates(ROOM, "n1", [], [mate("bob", state=2)], [])
    tick(node)
    [push] = watching.received()
    assert [member["state"] for member in push["joined"]] == [2]


def test_a_session_that_two_nodes_have_is_shown_once_until_both_let_it_go() -> None:
    """A node that was frozen comes back under another id before the old one is given up."""
    node = chat()
    watching = watcher(node)
    bob = mate("bob", "b")
    node.hub.know_mates(ROOM, "old", having(bob))
    node.hub.know_mates(ROOM, "new", having(bob))
    tick(node)
    assert told(watching) == [{"joined": ["bob"]}]
    assert presence.counts(node.hub.rooms[ROOM]) == {"sessions": 2, "users": 1}
    assert listed(node) == ["watcher", "bob"]
    node.hub.know_mates(ROOM, "old", {})
    tick(node)
    assert told(watching) == []
    node.hub.know_mates(ROOM, "new", {})
    tick(node)
    assert told(watching) == [{"left": ["bob"]}]


def test_members_here_are_listed_first_and_all_are_counted() -> None:
    node = chat()
    node.hub.know_mates(ROOM, "n1", {})
    come(node, "ann")
    room = node.hub.rooms[ROOM]
    crowd = [mate(f"m{number}", f"u{number % 7}") for number in range(MAX_MEMBERS + 10)]
    node.hub.know_mates(ROOM, "n1", having(*crowd[:300]))
    node.hub.know_mates(ROOM, "n2", having(*crowd[300:], mate("anonymous")))
    assert listed(node) == ["ann", *(each.session for each in crowd[: MAX_MEMBERS - 1])]
    assert presence.counts(room) == {"sessions": MAX_MEMBERS + 12, "users": 8}
    assert presence.counts_of(crowd) == {"sessions": MAX_MEMBERS + 10, "users": 7}
    assert len(presence.listing_of(crowd)) == MAX_MEMBERS


def test_what_is_said_of_rooms_that_show_nobody_is_not_kept() -> None:
    node = chat()
    come(node, "ann", "closed:1")
    node.hub.know_mates("closed:1", "n1", having(mate("bob")))
    node.hub.change_mates("nowhere:1", "n1", [mate("bob")], [], [])
    assert node.hub.rooms["closed:1"].mates is None
    assert "nowhere:1" not in node.hub.rooms


def test_who_comes_from_elsewhere_and_goes_before_its_coming_was_told() -> None:
    node = chat()
    watching = watcher(node)
    node.hub.change_mates(ROOM, "n1", [mate("bob")], [], [])
    node.hub.change_mates(ROOM, "n1", [], [], [SessionId("bob")])
    tick(node)
    assert told(watching) == []


# -- nodes that drain -------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "elsewhere", "elsewhere, told as a whole"])
def test_nobody_sees_a_user_vanish_when_a_node_drains(where: str) -> None:
    node = chat()
    watching = watcher(node)
    node.hub.know_mates(ROOM, "old", having(mate("before", "user-ann"), mate("bob", "b")))
    tick(node)
    watching.received()
    node.hub.part_mates("old")
    tick(node)
    assert told(watching) == []
    assert listed(node) == ["watcher", "before", "bob"]
    if where == "here":
        come(node, "ann")
    elif where == "elsewhere":
        node.hub.change_mates(ROOM, "new", [mate("ann", "user-ann")], [], [])
    else:
        node.hub.know_mates(ROOM, "new", having(mate("ann", "user-ann")))
    tick(node)
    assert told(watching) == [{"joined": ["ann"], "left": ["before"]}]
    assert sorted(listed(node)) == ["ann", "bob", "watcher"]
    assert presence.counts(node.hub.rooms[ROOM]) == {"sessions": 3, "users": 2}
    node.hub.know_mates(ROOM, "old", {})
    tick(node)
    assert told(watching) == [{"left": ["bob"]}]


def test_each_arrival_takes_one_place() -> None:
    node = chat()
    watching = watcher(node)
    tabs = [mate(f"tab{number}", "user-ann") for number in range(3)]
    node.hub.know_mates(ROOM, "old", having(*tabs))
    node.hub.part_mates("old")
    tick(node)
    watching.received()
    gone: list[str] = []
    for name in ("ann", "bob"):
        sink = node.sink(name, user="user-ann")
        node.join(sink, ROOM)
        node.join(sink, ROOM)  # again, which is no arrival
        tick(node)
        [push] = told(watching)
        assert push["joined"] == [name]
        gone += push["left"]
        node.hub.know_mates(ROOM, "old", having(*tabs))  # as it is in the store, until the node is gone
        tick(node)
        assert told(watching) == []
    assert len(gone) == 2
    assert presence.counts(node.hub.rooms[ROOM]) == {"sessions": 4, "users": 1}
    node.hub.know_mates(ROOM, "old", {})
    tick(node)
    [push] = told(watching)
    assert sorted([*gone, *push["left"]]) == ["tab0", "tab1", "tab2"]


def test_strangers_and_newcomers_take_nobodys_place() -> None:
    node = chat()
    watching = watcher(node)
    node.hub.know_mates(ROOM, "old", having(mate("bob", "b"), mate("anonymous")))
    node.hub.part_mates("old")
    tick(node)
    watching.received()
    come(node, "ann")
    node.join(node.sink("stranger"), ROOM)
    node.hub.change_mates(ROOM, "old", [mate("late", "b")], [], [])  # heard of before, though told now
    tick(node)
    assert told(watching) == [{"joined": ["ann", "stranger", "late"]}]


def test_a_draining_node_that_still_tells_of_changes_is_heard() -> None:
    node = chat()
    watching = watcher(node)
    node.hub.know_mates(ROOM, "old", having(mate("one", "a"), mate("two", "b")))
    node.hub.part_mates("old")
    node.join(node.sink(user="c"), ROOM)
    tick(node)
    watching.received()
    node.hub.change_mates(ROOM, "old", [], [mate("one", "user-ann", {"n": 1})], [SessionId("two")])
    tick(node)
    assert told(watching) == [{"left": ["two"], "changed": ["one"]}]
    come(node, "ann")
    tick(node)
    assert told(watching) == [{"joined": ["ann"], "left": ["one"]}]


def test_a_room_that_is_opened_after_the_node_began_to_drain_knows_it_too() -> None:
    node = chat()
    node.hub.part_mates("old")
    with node.hub.opening(ROOM):
        node.hub.know_mates(ROOM, "old", having(mate("before", "user-ann")))
        node.hub.part_mates("older")
        node.hub.obtain(ROOM, None)
    watching = watcher(node)
    come(node, "ann")
    tick(node)
    assert told(watching) == [{"joined": ["ann"], "left": ["before"]}]


def test_nodes_that_drained_long_ago_are_forgotten() -> None:
    node = chat()
    for number in range(PARTED_KEPT + 2):
        node.hub.part_mates(f"n{number}")
    parted = node.hub._roster._parted
    assert len(parted) == PARTED_KEPT
    assert next(iter(parted)) == "n2"


def test_in_a_storm_nobody_is_told_gone_before_all_who_came_are_told() -> None:
    node = chat()
    watching = watcher(node)
    node.hub.know_mates(ROOM, "old", having(mate("before", "user-ann")))
    node.hub.part_mates("old")
    tick(node)
    watching.received()
    crowd = [mate(f"m{number}") for number in range(MAX_MEMBERS)]
    node.hub.change_mates(ROOM, "n1", crowd, [], [])
    come(node, "ann")
    tick(node)
    [push] = told(watching)
    assert (len(push["joined"]), "left" in push) == (MAX_MEMBERS, False)
    tick(node)
    assert told(watching) == [{"joined": ["ann"], "left": ["before"]}]


# -- a model of it all ---------------------------------------------------------------------------

NODES = ("n1", "n2", "n3")
SESSIONS = ("s1", "s2", "s3", "s4", "s5")
USERS = {"s1": "a", "s2": "a", "s3": "b", "s4": None, "s5": "c"}
HERE = {"ann": "a", "bob": "b", "cid": None}

nodes = st.sampled_from(NODES)
sessions = st.sampled_from(SESSIONS)
versions = st.integers(0, 2)


def some(session: str, version: int) -> Mate:
    return mate(session, USERS[session], version)


class PresenceFollower:
    """A watcher's list of members, as a client keeps it."""

    def __init__(self, sink: FakeSink, members: list[dict[str, Any]]) -> None:
        self.sink = sink
        self.members = {member["session"]: member for member in members}

    def listen(self) -> None:
        for message in self.sink.received():
            if message["op"] != "presence":
                continue
            assert any(message.get(key) for key in ("joined", "left", "changed")), "says nothing"
            for member in message.get("changed", ()):
                assert member["session"] in self.members, "changed, but never came"
            for member in (*message.get("joined", ()), *message.get("changed", ())):
                self.members[member["session"]] = member
            for member in message.get("left", ()):
                self.members.pop(member["session"], None)


class RosterMachine(RuleBasedStateMachine):
    """Nodes say what they like, members here come and go; every watcher has the members after a tick.

    P9, as far as the hub goes: what is shown follows what was said.
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = chat()
        self.there: dict[str, dict[SessionId, Mate]] = {name: {} for name in NODES}
        self.parted: set[str] = set()
        self.here: dict[str, FakeSink] = {}
        self.followers: list[PresenceFollower] = []
        self.watch()

    def _say(self, name: str, mates: Mapping[SessionId, Mate]) -> None:
        self.there[name] = dict(mates)

    @rule(name=nodes, mates=st.dictionaries(sessions, versions, max_size=4))
    def know(self, name: str, mates: dict[str, int]) -> None:
        self._say(name, having(*(some(*each) for each in mates.items())))
        self.node.hub.know_mates(ROOM, name, self.there[name])

    @rule(
        name=nodes,
        came=st.dictionaries(sessions, versions, max_size=2),
        changed=st.dictionaries(sessions, versions, max_size=2),
        went=st.lists(sessions, max_size=2),
    )
    def change(self, name: str, came: dict[str, int], changed: dict[str, int], went: list[str]) -> None:
        news = {**came, **changed}
        gone = [SessionId(session) for session in went if session not in news]
        mates = {session: one for session, one in self.there[name].items() if session not in gone}
        self._say(name, mates | having(*(some(*each) for each in news.items())))
        self.node.hub.change_mates(
            ROOM,
            name,
            [some(*each) for each in came.items() if each[0] not in changed],
            [some(*each) for each in changed.items()],
            gone,
        )

    @rule(name=st.sampled_from(NODES[:2]))
    def part(self, name: str) -> None:
        self.parted.add(name)
        self.node.hub.part_mates(name)

    @rule(name=st.sampled_from(sorted(HERE)), state=versions)
    def come_or_change(self, name: str, state: int) -> None:
        sink = self.here.get(name)
        if sink is None:
            sink = self.here[name] = self.node.sink(name, user=HERE[name])
            self.node.join(sink, ROOM)
        else:
            self.node.hub.set_state(sink.memberships[ROOM], {"n": state})

    @rule(name=st.sampled_from(sorted(HERE)))
    def go(self, name: str) -> None:
        if name in self.here:
            self.node.hub.leave_all(self.here.pop(name))

    @rule()
    def watch(self) -> None:
        sink = self.node.sink(f"watcher{len(self.followers)}")
        self.node.join(sink, ROOM, watches=True)
        self.followers.append(PresenceFollower(sink, shown(self.node)))

    @rule()
    def push(self) -> None:
        tick(self.node)
        members = {member["session"]: member for member in shown(self.node)}
        for follower in self.followers:
            follower.listen()
            assert follower.members == members

    @invariant()
    def shown_are_those_who_are_there(self) -> None:
        members = {member["session"]: member for member in shown(self.node)}
        assert presence.counts(self.node.hub.rooms[ROOM])["sessions"] == len(members)
        local = {*self.here, *(follower.sink.id for follower in self.followers)}
        said: dict[str, list[bytes]] = {}
        for mates in self.there.values():
            for each in mates.values():
                said.setdefault(each.session, []).append(each.fields)
        assert local <= set(members) <= local | set(said)
        hidden = set(said) - set(members)
        assert hidden <= {
            each for name in self.parted for each in self.there[name] if USERS[each] is not None
        }
        for session, fields in said.items():
            if session in members:
                assert orjson.dumps(members[session]) in fields

    def teardown(self) -> None:
        for name in NODES:
            self.node.hub.know_mates(ROOM, name, {})
        for sink in self.here.values():
            self.node.hub.leave_all(sink)
        self.push_to_the_end()

    def push_to_the_end(self) -> None:
        tick(self.node)
        names = {follower.sink.id for follower in self.followers}
        for follower in self.followers:
            follower.listen()
            assert set(follower.members) == names
        assert self.node.hub.rooms[ROOM].mates is None


TestRosterModel = RosterMachine.TestCase
TestRosterModel.settings = settings(max_examples=80, stateful_step_count=30)
