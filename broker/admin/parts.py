"""What one node contributes to an answer about all of them: one function for each question.

Each takes the node and typed parameters, and gives a typed answer, which goes
to another node as JSON (:mod:`broker.admin.questions`) or stays here. ``None``
says that the node has nothing to do with what was asked. Imported by every
node of a cluster, also by those without an operators' port: nothing of HTTP here.
"""

from __future__ import annotations

import heapq
from itertools import islice
from typing import Any, Final

import msgspec
import trio

from broker.admin.merging import Part
from broker.admin.models import (
    MAX_PAGE,
    Disconnect,
    Input,
    MemberInfo,
    Membership,
    PositionInfo,
    RoomsQuery,
    RoomSummary,
    SessionDetail,
    SessionInfo,
    SessionsQuery,
)
from broker.admin.models_nodes import Drained, LoadFigure, LoadParts, Rebalance, Rebalanced
from broker.admin.node import Node
from broker.admin.paging import page, read_cursor
from broker.admin.statistics import Snapshot, read_process, snapshot
from broker.auth.permissions import user_room
from broker.hub import presence
from broker.hub.rooms import Member, MemberState, Room
from broker.protocol.events import Position, SessionId, UserId
from broker.server.session import Session

MAX_LISTED: Final = 500
"""Members, acknowledgements or sessions listed inside one answer; the counts beside them are of all."""


# -- parameters ---------------------------------------------------------------------


class Nothing(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing needs to be said."""


class Named(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The name of a room, a session or a user."""

    name: str


class OfNode(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An order for the node of this name alone."""

    node: str


class OfGroup(Input, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question to the workers of one machine; ``None``: to every node."""

    group: str | None = None


class NodeRebalance(OfNode, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Move a share of the sessions of the node of this name."""

    share: float
    over: float


# -- rooms --------------------------------------------------------------------------


class RoomsPart(msgspec.Struct, frozen=True, kw_only=True):
    """One node's page of rooms."""

    rooms: list[RoomSummary]
    more: bool
    total: int

    def part(self) -> Part:
        """For merging."""
        return Part(self.rooms, self.more)


class RoomPart(msgspec.Struct, frozen=True, kw_only=True):
    """One node's share of a room."""

    summary: RoomSummary
    users: int
    """Different users among its own members."""
    users_everywhere: int
    """As far as it knows of the others' members."""
    listed: list[MemberInfo]
    watchers: int


async def rooms(node: Node, query: RoomsQuery) -> RoomsPart:
    """Rooms by name, or the fullest first."""
    found = node.context.hub.rooms
    things = iter(list(found.values()))

    def by_name(room: Room) -> tuple[str] | None:
        return (room.name,) if room.name.startswith(query.prefix) else None

    def by_members(room: Room) -> tuple[int, str] | None:
        return (-room.members, room.name) if room.name.startswith(query.prefix) else None

    following: tuple[Any, ...] | None
    if query.sort == "name":
        chosen, following = await page(things, by_name, query.limit, read_cursor(query.after, tuple[str]))
    else:
        after = read_cursor(query.after, tuple[int, str])
        chosen, following = await page(things, by_members, query.limit, after)
    return RoomsPart(rooms=[summarize(room) for room in chosen], more=following is not None, total=len(found))


async def fullest_rooms(node: Node, query: RoomsQuery) -> RoomsPart:
    """The fullest rooms from the start, as many as an answer holds."""
    return await rooms(node, msgspec.structs.replace(query, after=None, limit=MAX_PAGE, sort="members"))


def summarize(room: Room) -> RoomSummary:
    """A room's line in a list, as this node has it."""
    return RoomSummary(
        room=room.name,
        members=room.members,
        position=position_info(room.position),
        slots=len(room.slots or ()),
        pending=len(room.pending),
    )


def position_info(position: Position | None) -> PositionInfo | None:
    """A position as it is told."""
    return PositionInfo(*position) if position is not None else None


async def room(node: Node, wanted: Named) -> RoomPart | None:
    """The room's members here."""
    await trio.lowlevel.checkpoint()
    found = node.context.hub.rooms.get(wanted.name)
    if found is None:
        return None
    users = {member.sink.user for member in found.everybody()}
    users.discard(None)
    return RoomPart(
        summary=summarize(found),
        users=len(users),
        users_everywhere=presence.counts(found)["users"],
        listed=[
            msgspec.convert(
                {**member.describe(), "status": _status(member), "node": node.context.node}, MemberInfo
            )
            for member in islice(found.everybody(), MAX_LISTED)
        ],
        watchers=len(found.watchers),
    )


def _status(member: Member) -> str:
    return MemberState(member.status).name.lower()


# -- sessions and users ---------------------------------------------------------------


class SessionsPart(msgspec.Struct, frozen=True, kw_only=True):
    """One node's page of sessions."""

    sessions: list[SessionInfo]
    more: bool
    total: int

    def part(self) -> Part:
        """For merging."""
        return Part(self.sessions, self.more)


class UserPart(msgspec.Struct, frozen=True, kw_only=True):
    """One node's sessions of a user."""

    sessions: list[SessionInfo]
    session_count: int
    position: PositionInfo | None


async def sessions(node: Node, query: SessionsQuery) -> SessionsPart:
    """Sessions, oldest first."""

    def key(session: Session) -> tuple[float, str] | None:
        if query.user is not None and session.user != query.user:
            return None
        if query.room is not None and query.room not in session.memberships:
            return None
        if query.address is not None and session.address != query.address:
            return None
        return session.connected_at, session.id

    after = read_cursor(query.after, tuple[float, str])
    chosen, following = await page(iter(_candidates(node, query)), key, query.limit, after)
    return SessionsPart(
        sessions=[_describe(node, each) for each in chosen],
        more=following is not None,
        total=len(node.context.registry.sessions),
    )


def _candidates(node: Node, query: SessionsQuery) -> list[Session]:
    """The shortest list that holds every session asked for."""
    registry = node.context.registry
    if query.user is not None:
        return registry.of_user(query.user)
    if query.room is not None and query.room not in node.context.hub.rooms:
        return []
    return list(registry.sessions.values())


def _describe(node: Node, session: Session) -> SessionInfo:
    return msgspec.convert({**session.describe(), "node": node.context.node}, SessionInfo)


async def session(node: Node, wanted: Named) -> SessionDetail | None:
    """One session and its rooms."""
    await trio.lowlevel.checkpoint()
    found = node.context.registry.sessions.get(SessionId(wanted.name))
    if found is None:
        return None
    members = sorted(found.memberships.values(), key=lambda member: member.room.name)
    return SessionDetail(
        **msgspec.structs.asdict(_describe(node, found)),
        memberships=[_membership(member) for member in members],
    )


def _membership(member: Member) -> Membership:
    position = member.room.position
    if member.status is not MemberState.LIVE:
        position = member.reached or position
    return Membership(
        room=member.room.name,
        status=_status(member),
        joined_at=member.joined_at,
        seen=member.seen,
        position=position_info(position),
        filtered=member.filter is not None,
        watches_presence=member.watches,
    )


async def user(node: Node, wanted: Named) -> UserPart:
    """A user's sessions here, and the position of the room that reaches them all."""
    await trio.lowlevel.checkpoint()
    context = node.context
    theirs = context.registry.of_user(wanted.name)
    alive = context.hub.rooms.get(user_room(UserId(wanted.name)))
    oldest = heapq.nsmallest(MAX_LISTED, theirs, key=lambda each: (each.connected_at, each.id))
    return UserPart(
        sessions=[_describe(node, each) for each in oldest],
        session_count=len(theirs),
        position=position_info(alive.position) if alive is not None else None,
    )


class EndedPart(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a wish to end sessions: whether they are here, and how many were told so now."""

    found: bool
    ended: int


async def disconnect(node: Node, wish: Disconnect) -> EndedPart:
    """End a session, or all sessions of a user here, in good order."""
    await trio.lowlevel.checkpoint()
    registry = node.context.registry
    if wish.user is not None:
        chosen = registry.of_user(wish.user)
    else:
        session = registry.sessions.get(SessionId(wish.session or ""))
        chosen = [session] if session is not None else []
    ended = 0
    for each in chosen:
        if each.ending is None:
            each.disconnect(wish.code, wish.reason)
            ended += 1
    return EndedPart(found=bool(chosen), ended=ended)


# -- the node itself --------------------------------------------------------------------


async def statistics(node: Node, wanted: OfGroup) -> Snapshot | None:
    """All counters, if the node is of the group."""
    if wanted.group is not None and node.context.peers.nodes()[0].group != wanted.group:
        await trio.lowlevel.checkpoint()
        return None
    return snapshot(node, await trio.to_thread.run_sync(read_process), {})


async def load(node: Node, _nothing: Nothing) -> LoadFigure:
    """How busy the node was in the last second."""
    await trio.lowlevel.checkpoint()
    figures = node.load.figures
    parts = LoadParts(
        connections=figures.connections, cpu=figures.cpu, lag=figures.lag, outbox=figures.outbox
    )
    return LoadFigure(load=figures.load, parts=parts)


async def drain(node: Node, order: OfNode) -> Drained | None:
    """Empty the node, if it is the one that is meant."""
    if order.node != node.context.node:
        await trio.lowlevel.checkpoint()
        return None
    return Drained(node=order.node, told=await node.drain())


async def rebalance(node: Node, order: NodeRebalance) -> Rebalanced | None:
    """Begin to move some of the sessions, if the node is the one that is meant."""
    await trio.lowlevel.checkpoint()
    if order.node != node.context.node:
        return None
    moving = node.mover.order(order.share, order.over, node.context.monotonic())
    return Rebalanced(node=order.node, moving=moving, over=order.over)


def rebalance_of(name: str, body: Rebalance) -> NodeRebalance:
    """The order that an operator's wish becomes."""
    return NodeRebalance(node=name, share=body.share, over=body.over)
