"""Answers of several nodes made one. Pure: lists in, lists out.

Theory. A page must be the same whether one node has all rooms or each of ten
has some. Every node gives its own page after the cursor, sorted, and says
whether it has more behind it. What lies above the last key of a page that has
more behind it is not known to be complete: its node may have something there,
too. So the merged list is cut at the smallest such key. Nothing is lost by
that: the page that cuts holds as many keys below its last as were asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from broker.admin.models import MemberInfo, PositionInfo, RoomSummary

T = TypeVar("T")


class Part(NamedTuple):
    """One node's page: ``things`` in the order of their keys; ``more`` follows behind the last."""

    things: Sequence[Any]
    more: bool


def merge_pages(
    parts: Iterable[Part], key: Callable[[T], tuple[Any, ...]], limit: int, join: Callable[[T, T], T]
) -> tuple[list[T], tuple[Any, ...] | None]:
    """The first ``limit`` things of all pages, and the key to go on from (``None`` on the last page).

    Each page was asked for with the same cursor and with ``limit``. Things with
    the same key, of several nodes, are one: ``join`` makes them so.
    """
    found: dict[tuple[Any, ...], T] = {}
    ends = []
    for part in parts:
        for thing in part.things:
            place = key(thing)
            found[place] = join(found[place], thing) if place in found else thing
        if part.more:
            ends.append(key(part.things[-1]))
    end = min(ends, default=None)
    complete = sorted(place for place in found if end is None or place <= end)
    chosen = complete[:limit]
    following = chosen[-1] if len(chosen) < len(found) or end is not None else None
    return [found[place] for place in chosen], following


def merge_fullest(
    parts: Iterable[Part], limit: int, after: tuple[int, str] | None
) -> tuple[list[RoomSummary], tuple[int, str] | None]:
    """The rooms with the most members, of each node's fullest; summed, and paged through as a whole.

    Exact while every node's list is its whole list. Else a room that is small
    everywhere may be counted too low, or be missing: its members on a node
    whose list it does not reach are not known.
    """
    found: dict[str, RoomSummary] = {}
    for part in parts:
        for room in part.things:
            known = found.get(room.room)
            found[room.room] = room if known is None else join_rooms(known, room)
    places = ((-room.members, name) for name, room in found.items())
    best = heapq.nsmallest(limit + 1, (place for place in places if after is None or place > after))
    chosen = best[:limit]
    return [found[name] for _, name in chosen], chosen[-1] if len(best) > limit else None


def join_rooms(one: RoomSummary, other: RoomSummary) -> RoomSummary:
    """One room as two nodes have it."""
    return RoomSummary(
        room=one.room,
        members=one.members + other.members,
        position=latest((one.position, other.position)),
        slots=max(one.slots, other.slots),
        pending=one.pending + other.pending,
    )


def latest(positions: Iterable[PositionInfo | None]) -> PositionInfo | None:
    """The furthest position that a node has reached. Epochs differ only for the moment of a change."""
    return max((each for each in positions if each is not None), key=lambda each: each.offset, default=None)


def keep_first(one: T, _other: T) -> T:
    """For things that only one node can have."""
    return one


def first_members(parts: Iterable[Sequence[MemberInfo]], limit: int) -> list[MemberInfo]:
    """Members of a room for a list, node by node."""
    found: list[MemberInfo] = []
    for members in parts:
        found += members[: limit - len(found)]
    return found


def total(parts: Sequence[Any]) -> Any:
    """Numbers of the same name added up, at any depth; what is no number is left out."""
    if all(isinstance(part, dict) for part in parts):
        names = dict.fromkeys(name for part in parts for name in part)
        sums = {name: total([part[name] for part in parts if name in part]) for name in names}
        return {name: value for name, value in sums.items() if value is not None}
    numbers = [part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)]
    return sum(numbers) if numbers else None
