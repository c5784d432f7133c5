"""Members, groups and snapshots: both directions of every index change together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from broker.hub.rooms import Group, Held, Member, MemberState, Room, Snapshot
from broker.protocol.codec import JSON, ZSTD
from broker.protocol.events import Event, Position
from broker.protocol.filters import compile_filter
from tests.hub.fakes import EPHEMERAL, FakeSink, Node, with_options


def make_room() -> Room:
    return Room("live:1", with_options(EPHEMERAL, slots=2), None)


def enter(room: Room, sink: FakeSink, **how: object) -> Member:
    filter_ = compile_filter(how["filter_"]) if "filter_" in how else None
    member = Member(sink, room, filter_, bool(how.get("watches")), 5.0)
    room.enter(member)
    return member


def test_a_member_enters_apart_then_stands_in_a_group_then_leaves() -> None:
    room, sink = make_room(), Node().sink(user="ann")
    member = enter(room, sink, watches=True)
    assert member.status is MemberState.CATCHING_UP
    assert (list(room.apart), room.members, list(room.watchers)) == ([member], 1, [member])
    assert sink.memberships == {"live:1": member}
    room.make_live(member)
    assert member.group is not None
    assert (list(room.apart), list(member.group.members)) == ([], [member])
    assert list(room.everybody()) == [member]
    room.exit(member)
    assert (room.groups, room.apart, room.members, room.watchers) == ({}, {}, 0, {})
    assert sink.memberships == {}
    assert member.group is None


def test_leaving_does_not_end_a_newer_membership() -> None:
    room, sink = make_room(), Node().sink()
    old, new = enter(room, sink), enter(room, sink)
    room.exit(old)
    assert sink.memberships == {"live:1": new}
    assert room.members == 1


def test_equal_filters_and_codecs_share_a_group() -> None:
    room, node = make_room(), Node()
    sinks = [node.sink(codec=codec) for codec in (JSON, JSON, ZSTD, JSON)]
    filters = [{"eq": ["a", 1]}, {"eq": ["a", 1.0]}, {"eq": ["a", 1]}, {"eq": ["a", 2]}]
    members = [enter(room, sink, filter_=filter_) for sink, filter_ in zip(sinks, filters, strict=True)]
    for member in members:
        room.make_live(member)
    groups = [member.group for member in members]
    assert groups[0] is groups[1]
    assert len({id(group) for group in groups}) == len(room.groups) == 3


def test_set_apart_drops_empty_groups_and_is_harmless_twice() -> None:
    room, sink = make_room(), Node().sink()
    member = enter(room, sink)
    room.make_live(member)
    room.set_apart(member, MemberState.SUSPENDED)
    room.set_apart(member, MemberState.LOST)
    assert (room.groups, list(room.apart), member.status) == ({}, [member], MemberState.LOST)


def test_who_waits_for_the_hub_leaves_that_list_too() -> None:
    room, node = make_room(), Node()
    first, second = enter(room, node.sink()), enter(room, node.sink())
    room.ahead = {first: None}
    room.exit(first)
    room.exit(second)
    assert room.ahead == {}


def test_a_snapshot_tells_direct_sinks_from_others_and_never_changes() -> None:
    node, group, room = Node(), Group(JSON, None), make_room()
    sinks = [node.sink(direct=direct) for direct in (True, False, True)]
    members = [enter(room, sink) for sink in sinks]
    for member in members:
        group.members[member] = None
    snapshot = group.snapshot()
    assert group.snapshot() is snapshot
    assert snapshot.direct == [members[0], members[2]]
    assert snapshot.sockets == [sinks[0].socket, sinks[2].socket]
    assert list(snapshot) == [members[1], members[0], members[2]]
    assert (len(snapshot), len(Snapshot(()))) == (3, 0)
    group.changed()
    assert group.snapshot() is not snapshot


def test_everybody_is_listed_whatever_their_state() -> None:
    room, node = make_room(), Node()
    members = [enter(room, node.sink()) for _ in range(3)]
    room.make_live(members[1])
    assert set(room.everybody()) == set(members)


def event(slot: str | None, size: int = 1) -> Event:
    return Event("live:1", b"x" * size, 0.0, slot=slot)


def test_the_oldest_slot_gives_way() -> None:
    room = make_room()
    room.remember(event(None))
    assert room.slots is None
    events = [event(slot) for slot in ("a", "b", "a", "c")]
    for each in events:
        room.remember(each)
    assert room.slots == {"a": events[2], "c": events[3]}


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.integers(1, 9))))
def test_what_is_held_is_the_newest_of_each_slot_in_order(said: list[tuple[str | None, int]]) -> None:
    held = Held()
    events = [event(slot, size) for slot, size in said]
    replaced = sum(held.put(each) for each in events)
    newest = {each.slot: each for each in events}
    assert sorted(map(id, held.events())) == sorted(map(id, newest.values()))
    assert held.events() == [each for each in events if newest[each.slot] is each]
    assert replaced == len(events) - len(newest)
    assert held.size == sum(len(each.wire) for each in held.events())


def test_history_is_a_matter_of_position() -> None:
    assert not make_room().has_history
    assert Room("kept:1", EPHEMERAL, Position("e", 0)).has_history
