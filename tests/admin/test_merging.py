"""Merged answers against the one node that would have everything."""

from __future__ import annotations

from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st

from broker.admin.merging import (
    Part,
    first_members,
    join_rooms,
    keep_first,
    latest,
    merge_fullest,
    merge_pages,
    total,
)
from broker.admin.models import MemberInfo, PositionInfo, RoomSummary
from broker.admin.paging import page, read_cursor, write_cursor

Rooms = dict[str, int]
"""Members by room, as one node has them."""

SMALL = st.text("abcä", max_size=3)
NODES = st.lists(st.dictionaries(SMALL, st.integers(1, 9), max_size=20), min_size=1, max_size=5)


def summary(name: str, members: int, **fields: Any) -> RoomSummary:
    given_fields = {"position": None, "slots": 0, "pending": 0, **fields}
    return RoomSummary(room=name, members=members, **given_fields)


def by_name(room: RoomSummary) -> tuple[str]:
    return (room.room,)


def by_members(room: RoomSummary) -> tuple[int, str]:
    return -room.members, room.room


def added_up(nodes: list[Rooms]) -> Rooms:
    """What one node with all of it would have."""
    found: Rooms = {}
    for rooms in nodes:
        for name, members in rooms.items():
            found[name] = found.get(name, 0) + members
    return found


async def pages(nodes: list[Rooms], limit: int) -> list[RoomSummary]:
    """Every page of the merged list, with the cursor going through its text form."""
    found: list[RoomSummary] = []
    after: tuple[Any, ...] | None = None
    while True:
        parts = []
        for rooms in nodes:
            things = iter([summary(name, members) for name, members in rooms.items()])
            chosen, following = await page(things, by_name, limit, after)
            parts.append(Part(chosen, following is not None))
        merged, last = merge_pages(parts, by_name, limit, join_rooms)
        assert len(merged) <= limit
        found += merged
        if last is None:
            return found
        assert len(merged) == limit, "only the last page may be short"
        after = read_cursor(write_cursor(last), tuple[str])


@given(NODES, st.integers(1, 7))
def test_pages_of_many_nodes_are_those_of_one_with_everything(nodes: list[Rooms], limit: int) -> None:
    merged = trio.run(pages, nodes, limit)
    alone = trio.run(pages, [added_up(nodes)], limit)
    assert [(room.room, room.members) for room in merged] == [(room.room, room.members) for room in alone]
    assert [(room.room, room.members) for room in merged] == sorted(added_up(nodes).items())


@given(NODES, st.integers(1, 7))
def test_the_fullest_are_those_of_one_with_everything(nodes: list[Rooms], limit: int) -> None:
    parts = [Part([summary(*room) for room in rooms.items()], False) for rooms in nodes]
    found: list[tuple[int, str]] = []
    after: tuple[int, str] | None = None
    while True:
        chosen, after = merge_fullest(parts, limit, after)
        assert len(chosen) <= limit
        found += [by_members(room) for room in chosen]
        if after is None:
            break
    assert found == sorted((-members, name) for name, members in added_up(nodes).items())


def test_nothing_is_told_beyond_what_every_node_has_told() -> None:
    """A node that has more behind ``c`` may have a ``d``, too: it must not be told without that."""
    full = Part([summary("a", 1), summary("c", 1)], True)
    last = Part([summary("b", 1), summary("d", 5)], False)
    merged, following = merge_pages([full, last], by_name, 2, join_rooms)
    assert [room.room for room in merged] == ["a", "b"]
    assert following == ("b",)
    merged, following = merge_pages([full, Part([summary("d", 5)], False)], by_name, 2, join_rooms)
    assert [room.room for room in merged] == ["a", "c"]
    assert following == ("c",)


def test_no_pages_are_the_last_page() -> None:
    assert merge_pages([], by_name, 5, keep_first) == ([], None)
    assert merge_pages([Part([], False)], by_name, 5, keep_first) == ([], None)
    assert merge_fullest([], 5, None) == ([], None)


def test_a_room_of_two_nodes_is_one() -> None:
    one = summary("a", 3, position=PositionInfo("e", 7), slots=2, pending=1)
    other = summary("a", 4, position=PositionInfo("e", 9), slots=1, pending=2)
    both = summary("a", 7, position=PositionInfo("e", 9), slots=2, pending=3)
    assert join_rooms(one, other) == join_rooms(other, one) == both


def test_the_latest_position() -> None:
    assert latest([None, PositionInfo("e", 0), PositionInfo("e", 3), None]) == PositionInfo("e", 3)
    assert latest([None]) is None


def test_members_are_listed_node_by_node_up_to_the_limit() -> None:
    def members(node: str, count: int) -> list[MemberInfo]:
        return [
            MemberInfo(
                node=node,
                user=None,
                session=str(number),
                info=None,
                state=None,
                joined_at=0.0,
                seen=0,
                status="live",
            )
            for number in range(count)
        ]

    listed = first_members([members("a", 2), members("b", 3), members("c", 4)], 4)
    assert [(each.node, each.session) for each in listed] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]


def test_numbers_are_added_at_any_depth_and_nothing_else_is() -> None:
    one = {"sessions": 2, "closes": {"1000": 1}, "ready": True, "who": "a", "lag": 0.5}
    other = {"sessions": 3, "closes": {"1000": 4, "4503": 9}, "ready": True, "who": "b", "lag": 0.25}
    assert total([one, other]) == {"sessions": 5, "closes": {"1000": 5, "4503": 9}, "lag": 0.75}
    assert total([{"x": None}, {}]) == {}
