"""The endpoints, and the table that names them all."""

from __future__ import annotations

import heapq
from functools import reduce
from typing import Any, Final

import msgspec
from prometheus_client.registry import Collector

from broker.admin import nodes, overview, prometheus, publishing
from broker.admin.merging import (
    first_members,
    join_rooms,
    keep_first,
    latest,
    merge_fullest,
    merge_pages,
    total,
)
from broker.admin.models import (
    Broadcast,
    BroadcastResult,
    Disconnect,
    Disconnected,
    Health,
    LocalQuery,
    NodeAnswer,
    Placed,
    Publish,
    RoomDetail,
    RoomPage,
    RoomsQuery,
    RoomSummary,
    SeenInfo,
    SessionDetail,
    SessionInfo,
    SessionPage,
    SessionsQuery,
    UserDetail,
)
from broker.admin.models_nodes import Drain, Drained, LoadPage, NodesPage, Rebalance, Rebalanced
from broker.admin.operations import Call, Operation, Raw
from broker.admin.paging import read_cursor, write_cursor
from broker.admin.parts import MAX_LISTED, Named, OfGroup, summarize
from broker.admin.prometheus import BrokerCollector, WorkersCollector
from broker.admin.publishing import Content
from broker.admin.questions import (
    DISCONNECT,
    FULLEST,
    ROOM,
    ROOMS,
    SESSION,
    SESSIONS,
    STATISTICS,
    USER,
    Heard,
    hear,
    hear_others,
)
from broker.admin.statistics import Snapshot, Statistics, StatisticsPage, is_ready
from broker.auth.permissions import check_room, user_room, valid_user
from broker.engine.base import HistoryQuery
from broker.errors import BrokerError, ErrorCode
from broker.hub.rooms import Room
from broker.protocol.events import UserId

SUMMED: Final = ("hub", "registry", "tokens", "traffic", "mover")
"""Parts of the statistics whose numbers mean something when those of several nodes are added."""

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
    """One snapshot of all counters, with those of the other nodes."""
    own = await call.statistics()
    heard: Heard[Snapshot | None] = Heard([], [])
    if not call.query.local:
        heard = await hear_others(call.node, STATISTICS, OfGroup())
    others = {name: answer.statistics for name, answer in heard.found if answer is not None}
    return StatisticsPage(
        **msgspec.structs.asdict(own),
        others=others,
        totals=_totals([own, *others.values()]) if others else {},
        nodes=[NodeAnswer(node=own.node), *heard.nodes],
        partial=heard.partial,
    )


def _totals(snapshots: list[Statistics]) -> dict[str, Any]:
    parts = msgspec.to_builtins(snapshots)
    return {name: total([part[name] for part in parts]) for name in SUMMED}


async def metrics(call: Call) -> Any:
    """The same for Prometheus; where this port speaks for several workers, of all of them."""
    node = call.node
    own = BrokerCollector(await call.statistics(), dict(node.context.stages.items()))
    here = node.context.peers.nodes()[0]
    collector: Collector = own
    if here.group:
        heard = await hear_others(node, STATISTICS, OfGroup(group=here.group))
        workers = {here.name: own}
        for name, answer in heard.found:
            if answer is not None:
                workers[name] = BrokerCollector(answer.statistics, answer.stages())
        group = [each.name for each in node.context.peers.nodes() if each.group == here.group]
        collector = WorkersCollector(workers, {name: name in workers for name in group})
    return Raw(prometheus.exposition(collector), prometheus.CONTENT_TYPE, {})


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
    spread = not query.local and len(call.node.context.peers.nodes()) > 1
    following: tuple[Any, ...] | None
    if query.sort == "members" and spread:
        after = read_cursor(query.after, tuple[int, str])
        heard = await hear(call.node, FULLEST, query)
        chosen, following = merge_fullest([each.part() for each in heard.answers], query.limit, after)
    else:
        heard = await hear(call.node, ROOMS, query, local=query.local)
        key = _by_members if query.sort == "members" else _by_name
        chosen, following = merge_pages([each.part() for each in heard.answers], key, query.limit, join_rooms)
    return RoomPage(
        rooms=chosen,
        total=sum(each.total for each in heard.answers),
        next=write_cursor(following),
        nodes=heard.nodes,
        partial=heard.partial,
    )


def _by_name(room: RoomSummary) -> tuple[str]:
    return (room.room,)


def _by_members(room: RoomSummary) -> tuple[int, str]:
    return (-room.members, room.room)


async def room(call: Call) -> Any:
    """One room: options, members, and who has seen what, also of those who left."""
    name = call.path["room"]
    check_room(name)
    hub = call.node.context.hub
    options = hub.options(name)
    seen = await hub.seen(name) if options.history else []
    heard = await hear(call.node, ROOM, Named(name=name), local=call.query.local)
    found = [answer for answer in heard.answers if answer is not None]
    summaries = [each.summary for each in found]
    if not found:
        if not seen:
            raise _nowhere(heard, "nobody is in this room", room=name)
        # Acknowledgements prove that there is a stream; asking for one that is not would create it.
        history = await call.node.context.engine.history(
            name, HistoryQuery(limit=1, tail=1), hub.retention(name)
        )
        summaries.append(summarize(Room(name, options, history.top)))
    newest = heapq.nlargest(MAX_LISTED, seen, key=lambda entry: entry.ts)
    return RoomDetail(
        **msgspec.structs.asdict(reduce(join_rooms, summaries)),
        alive=bool(found),
        options=msgspec.to_builtins(options),
        users=max((max(each.users, each.users_everywhere) for each in found), default=0),
        listed=first_members((each.listed for each in found), MAX_LISTED),
        watchers=sum(each.watchers for each in found),
        seen=[SeenInfo(*entry) for entry in newest],
        seen_total=len(seen),
        nodes=heard.nodes,
        partial=heard.partial,
    )


def _nowhere(heard: Heard[Any], problem: str, *, room: str | None = None) -> BrokerError:
    """What was looked for is nowhere; or it is not known, because a node did not answer."""
    if heard.partial:
        return BrokerError(
            ErrorCode.UNAVAILABLE, f"{problem} as far as is known; {heard.silent()}", room=room
        )
    return BrokerError(ErrorCode.NOT_FOUND, problem, room=room)


# -- sessions and users ---------------------------------------------------------------


async def sessions(call: Call) -> Any:
    """List sessions, oldest first."""
    query: SessionsQuery = call.query
    heard = await hear(call.node, SESSIONS, query, local=query.local)
    chosen, following = merge_pages([each.part() for each in heard.answers], _by_age, query.limit, keep_first)
    return SessionPage(
        sessions=chosen,
        total=sum(each.total for each in heard.answers),
        next=write_cursor(following),
        nodes=heard.nodes,
        partial=heard.partial,
    )


def _by_age(session: SessionInfo) -> tuple[float, str]:
    return session.connected_at, session.session


async def session(call: Call) -> Any:
    """One session and its rooms, wherever it is."""
    wanted = Named(name=call.path["id"])
    heard = await hear(call.node, SESSION, wanted, local=True)
    if heard.answers == [None] and not call.query.local:
        heard = await hear_others(call.node, SESSION, wanted)
    for found in heard.answers:
        if found is not None:
            return found
    raise _nowhere(heard, "no such session")


async def user(call: Call) -> Any:
    """One user's sessions, and the position of the room that reaches them all."""
    name = call.path["id"]
    if not valid_user(name):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "not a user's id")
    heard = await hear(call.node, USER, Named(name=name), local=call.query.local)
    everywhere = (each for answer in heard.answers for each in answer.sessions)
    return UserDetail(
        user=name,
        sessions=heapq.nsmallest(MAX_LISTED, everywhere, key=_by_age),
        session_count=sum(each.session_count for each in heard.answers),
        room=user_room(UserId(name)),
        position=latest(each.position for each in heard.answers),
        nodes=heard.nodes,
        partial=heard.partial,
    )


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
    if (body.session is None) == (body.user is None):
        raise BrokerError(ErrorCode.BAD_MESSAGE, "give session or user, and only one of them")
    heard = await hear(call.node, DISCONNECT, body, local=True)
    if body.user is not None or not heard.answers[0].found:  # a session is in one place only
        heard = heard.joined(await hear_others(call.node, DISCONNECT, body))
    if body.session is not None and not any(each.found for each in heard.answers):
        raise _nowhere(heard, "no such session")
    return Disconnected(
        disconnected=sum(each.ended for each in heard.answers), nodes=heard.nodes, partial=heard.partial
    )


_PUBLISHING = (ErrorCode.BAD_ROOM, ErrorCode.LIMIT_EXCEEDED)

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation("GET", "/healthz", "health", "Whether the process answers", health, Health, open=True),
    Operation(
        "GET", "/readyz", "readiness", "Whether clients should be sent here", readiness, Health, open=True
    ),
    Operation("GET", "/", "overview", "A page for people", page_for_people, None, media="text/html"),
    Operation("GET", "/metrics", "metrics", "Metrics for Prometheus", metrics, None, media="text/plain"),
    Operation("GET", "/openapi.json", "document", "This document", document, dict[str, Any]),
    Operation(
        "GET", "/api/stats", "stats", "One snapshot of all counters", stats, StatisticsPage, query=LocalQuery
    ),
    Operation("GET", "/api/rooms", "rooms", "List rooms", rooms, RoomPage, query=RoomsQuery),
    Operation(
        "GET",
        "/api/rooms/{room}",
        "room",
        "One room, its members, and who has seen what",
        room,
        RoomDetail,
        query=LocalQuery,
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
        query=LocalQuery,
        errors=(ErrorCode.NOT_FOUND,),
    ),
    Operation("GET", "/api/users/{id}", "user", "One user's sessions", user, UserDetail, query=LocalQuery),
    Operation("GET", "/api/nodes", "nodes", "The nodes that are alive", nodes.nodes, NodesPage),
    Operation("GET", "/api/load", "load", "How busy each node is", nodes.load, LoadPage, query=LocalQuery),
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
    Operation(
        "POST",
        "/api/drain",
        "drain",
        "Empty a node before it is stopped",
        nodes.drain,
        Drained,
        body=Drain,
        errors=(ErrorCode.NOT_FOUND,),
    ),
    Operation(
        "POST",
        "/api/rebalance",
        "rebalance",
        "Ask a share of a node's sessions to move",
        nodes.rebalance,
        Rebalanced,
        body=Rebalance,
        errors=(ErrorCode.NOT_FOUND,),
    ),
)
