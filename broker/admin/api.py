"""The endpoints, and the table that names them all."""

from __future__ import annotations

import heapq
from itertools import islice
from typing import Any, Final

import msgspec

from broker.admin import overview, prometheus, publishing
from broker.admin.models import (
    Broadcast,
    BroadcastResult,
    Disconnect,
    Disconnected,
    Health,
    Placed,
    Publish,
    RoomDetail,
    RoomPage,
    RoomsQuery,
    SessionDetail,
    SessionPage,
    SessionsQuery,
    UserDetail,
)
from broker.admin.operations import Call, Operation, Raw
from broker.admin.paging import page, read_cursor, write_cursor
from broker.admin.publishing import Content
from broker.admin.statistics import Statistics, is_ready
from broker.auth.permissions import check_room, user_room, valid_user
from broker.engine.base import HistoryQuery
from broker.errors import BrokerError, ErrorCode
from broker.hub import presence
from broker.hub.rooms import Member, MemberState, Room
from broker.protocol.events import Position, SessionId, UserId
from broker.server.session import Session

MAX_LISTED: Final = 500
"""Members, acknowledgements or sessions listed inside one answer; the counts beside them are of all."""

# -- health and numbers -----------------------------------------------------------


async def health(_call: Call) -> Any:
    """The process answers; that is all."""
    return Health()


async def readiness(call: Call) -> Any:
    """Whether a balancer should send clients here."""
    if not is_ready(call.node):
        raise BrokerError(ErrorCode.UNAVAILABLE, "not ready")
    return Health()


async def stats(call: Call) -> Any:
    """One snapshot of all counters."""
    return await call.statistics()


async def metrics(call: Call) -> Any:
    """The same for Prometheus."""
    text = prometheus.exposition(await call.statistics(), call.node.context.stages)
    return Raw(text, prometheus.CONTENT_TYPE, {})


async def document(call: Call) -> Any:
    """OpenAPI 3.1 of what stands here."""
    return call.document


async def page_for_people(call: Call) -> Any:
    """The overview."""
    return Raw(overview.page(await call.statistics()), "text/html; charset=utf-8", overview.HEADERS)


# -- rooms --------------------------------------------------------------------------


async def rooms(call: Call) -> Any:
    """List rooms, by name or the fullest first."""
    query: RoomsQuery = call.query
    found = call.node.context.hub.rooms
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
    return {
        "rooms": [_summary(room) for room in chosen],
        "total": len(found),
        "next": write_cursor(following),
    }


def _summary(room: Room) -> dict[str, Any]:
    return {
        "room": room.name,
        "members": room.members,
        "position": _position(room.position),
        "slots": len(room.slots or ()),
        "pending": len(room.pending),
    }


def _position(position: Position | None) -> dict[str, Any] | None:
    return position._asdict() if position is not None else None


async def room(call: Call) -> Any:
    """One room: options, members, and who has seen what, also of those who left."""
    name = call.path["room"]
    check_room(name)
    hub = call.node.context.hub
    options = hub.options(name)
    seen = await hub.seen(name) if options.history else []
    found = hub.rooms.get(name)
    if found is None:
        if not seen:
            raise BrokerError(ErrorCode.NOT_FOUND, "nobody on this node is in this room", room=name)
        # Acknowledgements prove that there is a stream; asking for one that is not would create it.
        history = await call.node.context.engine.history(
            name, HistoryQuery(limit=1, tail=1), hub.retention(name)
        )
        found = Room(name, options, history.top)
        alive = False
    else:
        alive = True
    latest = heapq.nlargest(MAX_LISTED, seen, key=lambda entry: entry.ts)
    return {
        **_summary(found),
        "alive": alive,
        "options": msgspec.to_builtins(options),
        "users": presence.counts(found)["users"],
        "listed": [
            {**member.describe(), "status": _status(member)}
            for member in islice(found.everybody(), MAX_LISTED)
        ],
        "watchers": len(found.watchers),
        "seen": [entry._asdict() for entry in latest],
        "seen_total": len(seen),
    }


def _status(member: Member) -> str:
    return MemberState(member.status).name.lower()


# -- sessions and users ---------------------------------------------------------------


async def sessions(call: Call) -> Any:
    """List sessions, oldest first."""
    query: SessionsQuery = call.query
    registry = call.node.context.registry
    things = _candidates(call, query)

    def key(session: Session) -> tuple[float, str] | None:
        if query.user is not None and session.user != query.user:
            return None
        if query.room is not None and query.room not in session.memberships:
            return None
        if query.address is not None and session.address != query.address:
            return None
        return session.connected_at, session.id

    after = read_cursor(query.after, tuple[float, str])
    chosen, following = await page(iter(things), key, query.limit, after)
    return {
        "sessions": [session.describe() for session in chosen],
        "total": len(registry.sessions),
        "next": write_cursor(following),
    }


def _candidates(call: Call, query: SessionsQuery) -> list[Session]:
    """The shortest list that holds every session asked for."""
    registry = call.node.context.registry
    if query.user is not None:
        return registry.of_user(query.user)
    if query.room is not None and query.room not in call.node.context.hub.rooms:
        return []
    return list(registry.sessions.values())


async def session(call: Call) -> Any:
    """One session and its rooms."""
    found = call.node.context.registry.sessions.get(SessionId(call.path["id"]))
    if found is None:
        raise BrokerError(ErrorCode.NOT_FOUND, "no such session on this node")
    members = sorted(found.memberships.values(), key=lambda member: member.room.name)
    return {**found.describe(), "memberships": [_membership(member) for member in members]}


def _membership(member: Member) -> dict[str, Any]:
    position = member.room.position
    if member.status is not MemberState.LIVE:
        position = member.reached or position
    return {
        "room": member.room.name,
        "status": _status(member),
        "joined_at": member.joined_at,
        "seen": member.seen,
        "position": _position(position),
        "filtered": member.filter is not None,
        "watches_presence": member.watches,
    }


async def user(call: Call) -> Any:
    """One user's sessions here, and the position of the room that reaches them all."""
    name = call.path["id"]
    if not valid_user(name):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "not a user's id")
    context = call.node.context
    theirs = context.registry.of_user(name)
    own = user_room(UserId(name))
    alive = context.hub.rooms.get(own)
    oldest = heapq.nsmallest(MAX_LISTED, theirs, key=lambda each: (each.connected_at, each.id))
    return {
        "user": name,
        "sessions": [each.describe() for each in oldest],
        "session_count": len(theirs),
        "room": own,
        "position": _position(alive.position) if alive is not None else None,
    }


# -- acts -------------------------------------------------------------------------------


async def publish(call: Call) -> Any:
    """Publish one event; the answer comes once it is stored as durably as the engine stores."""
    body: Publish = call.body
    content = Content(body.event, body.data, body.key, body.slot, body.tags)
    position = await publishing.publish(call.node, body.room, content)
    return Placed(*position) if position is not None else Placed()


async def broadcast(call: Call) -> Any:
    """Publish one event in many rooms; the answer tells of each."""
    body: Broadcast = call.body
    content = Content(body.event, body.data, body.key, body.slot, body.tags)
    results = await publishing.broadcast(call.node, body.rooms, content)
    good = sum(result.ok for result in results)
    return BroadcastResult(results=results, published=good, failed=len(results) - good)


async def disconnect(call: Call) -> Any:
    """End a session, or all sessions of a user, in good order."""
    body: Disconnect = call.body
    registry = call.node.context.registry
    if (body.session is None) == (body.user is None):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "give session or user, and only one of them")
    if body.user is not None:
        chosen = registry.of_user(body.user)
    else:
        found = registry.sessions.get(SessionId(body.session or ""))
        if found is None:
            raise BrokerError(ErrorCode.NOT_FOUND, "no such session on this node")
        chosen = [found]
    ended = 0
    for each in chosen:
        if each.ending is None:
            each.disconnect(body.code, body.reason)
            ended += 1
    return Disconnected(ended)


_PUBLISHING = (ErrorCode.BAD_ROOM, ErrorCode.LIMIT_EXCEEDED)

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation("GET", "/healthz", "health", "Whether the process answers", health, Health, open=True),
    Operation(
        "GET", "/readyz", "readiness", "Whether clients should be sent here", readiness, Health, open=True
    ),
    Operation("GET", "/", "overview", "A page for people", page_for_people, None, media="text/html"),
    Operation("GET", "/metrics", "metrics", "Metrics for Prometheus", metrics, None, media="text/plain"),
    Operation("GET", "/openapi.json", "document", "This document", document, dict[str, Any]),
    Operation("GET", "/api/stats", "stats", "One snapshot of all counters", stats, Statistics),
    Operation("GET", "/api/rooms", "rooms", "List rooms", rooms, RoomPage, query=RoomsQuery),
    Operation(
        "GET",
        "/api/rooms/{room}",
        "room",
        "One room, its members, and who has seen what",
        room,
        RoomDetail,
        errors=(ErrorCode.BAD_ROOM, ErrorCode.NOT_FOUND),
    ),
    Operation(
        "GET", "/api/sessions", "sessions", "List sessions", sessions, SessionPage, query=SessionsQuery
    ),
    Operation(
        "GET",
        "/api/sessions/{id}",
        "session",
        "One session and its rooms",
        session,
        SessionDetail,
        errors=(ErrorCode.NOT_FOUND,),
    ),
    Operation("GET", "/api/users/{id}", "user", "One user's sessions", user, UserDetail),
    Operation(
        "POST",
        "/api/publish",
        "publish",
        "Publish an event; answered once it is stored",
        publish,
        Placed,
        body=Publish,
        errors=_PUBLISHING,
    ),
    Operation(
        "POST",
        "/api/broadcast",
        "broadcast",
        "Publish an event in many rooms",
        broadcast,
        BroadcastResult,
        body=Broadcast,
    ),
    Operation(
        "POST",
        "/api/disconnect",
        "disconnect",
        "End a session, or all of a user",
        disconnect,
        Disconnected,
        body=Disconnect,
        errors=(ErrorCode.NOT_FOUND,),
    ),
)
