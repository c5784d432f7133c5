"""The command table: op → handlers, rate class, and whether it needs an identity.

``now`` is called on the pump's pass and must not wait. It returns the fields of
the reply (``None`` for an empty one), or ``ANSWERED`` when the answer is or
will be given otherwise, or ``WAIT`` when it has changed nothing and ``later``
must do it on the session's own task. Either raises ``BrokerError`` to refuse.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

from broker.auth.permissions import check_room, is_server_room, may_join, may_publish, may_see_presence
from broker.config import Rate, Rates
from broker.engine.base import HistoryPage, HistoryQuery
from broker.errors import BrokerError, ErrorCode
from broker.hub import presence
from broker.hub.rooms import Member, Room
from broker.protocol import messages
from broker.protocol.events import Event, Position, make_event
from broker.protocol.filters import Filter, check_tags, compile_filter
from broker.server import identity, joining, replies
from broker.server.calls import RunningCall

if TYPE_CHECKING:
    from broker.server.session import Session

HISTORY_BYTES: Final = 128 * 1024
"""Events in one ``history`` reply; half of what an outbox holds by default."""


class Mark:
    """A reply that is none."""


WAIT: Final = Mark()
ANSWERED: Final = Mark()

Reply = dict[str, Any] | Mark | None


class Command(NamedTuple):
    """One row of the table."""

    op: str
    now: Callable[[Session, Any], Reply]
    rate: str
    later: Callable[[Session, Any], Awaitable[Reply]] | None = None
    open: bool = False
    """Allowed before the session has authenticated."""


def _always_later(_session: Session, _message: Any) -> Reply:
    return WAIT


async def _auth(session: Session, message: messages.Auth) -> Reply:
    fields = await identity.authenticate(session, message.token)
    return fields if fields is not None else ANSWERED


def _membership(session: Session, room: str) -> Member:
    member = session.memberships.get(room)
    if member is None:
        check_room(room)
        raise BrokerError(ErrorCode.NOT_JOINED, f"not a member of {room}", room=room)
    return member


# -- join and leave -------------------------------------------------------------


def _check_join(session: Session, message: messages.Join) -> Filter | None:
    """Whether the session may; the compiled filter."""
    room = message.room
    options = session.context.config.options(room)
    check_room(room)
    may_join(session.identity, room, options)
    if message.presence:
        may_see_presence(session.identity, room, options)
    limit = session.context.config.limits.rooms_per_session
    joined = len(session.memberships) - identity.count_server_rooms(session)
    if joined >= limit and room not in session.memberships:
        raise BrokerError(ErrorCode.LIMIT_EXCEEDED, f"a session may be in {limit} rooms", room=room)
    return compile_filter(message.filter) if message.filter is not None else None


def _join_now(session: Session, message: messages.Join) -> Reply:
    filter_ = _check_join(session, message)
    return ANSWERED if joining.join_now(session, message, filter_) else WAIT


async def _join_later(session: Session, message: messages.Join) -> Reply:
    await joining.join_later(session, message, _check_join(session, message))
    return ANSWERED


def _leave(session: Session, message: messages.Leave) -> Reply:
    if is_server_room(message.room):
        raise BrokerError(
            ErrorCode.FORBIDDEN, f"room {message.room} belongs to the server", room=message.room
        )
    member = _membership(session, message.room)
    session.context.hub.fanout.settle(member.room)  # events from before the leave are still given
    session.context.hub.leave(member)
    return None


# -- publish --------------------------------------------------------------------


def _publish(session: Session, message: messages.Publish) -> Reply:
    context = session.context
    room = message.room
    options = context.config.options(room)
    check_room(room)
    may_publish(session.identity, room, options)
    event = make_event(
        room,
        message.event,
        message.data,
        context.wall(),
        user=session.user,
        publisher=session.user if session.user is not None else session.id,
        key=message.key,
        slot=message.slot,
        tags=check_tags(message.tags) if message.tags is not None else None,
        exclude=None if message.echo else session.id,
    )
    if len(event.body) > options.event_bytes:
        raise BrokerError(
            ErrorCode.TOO_LARGE, f"{len(event.body)} bytes; the room takes {options.event_bytes}", room=room
        )
    if not options.history:
        copying = context.hub.publish(event, options)
        if copying is None:
            session.answer(message.id, None, after_events=True)
        else:
            reply = session.start_publish()
            copying.then(lambda error: session.published(reply, message.id, error))
        return ANSWERED
    started = context.monotonic()
    reply = session.start_publish()
    context.hub.publish(event, options, partial(_stored, session, reply, message.id, started))
    return ANSWERED


def _stored(
    session: Session,
    reply: replies.Reply,
    identifier: int | str | None,
    started: float,
    outcome: Position | BrokerError,
) -> None:
    session.context.stages.commit.observe(session.context.monotonic() - started)
    session.published(reply, identifier, outcome)


# -- presence, positions, the past ----------------------------------------------


def _state(session: Session, message: messages.State) -> Reply:
    limit = session.context.config.limits.state_bytes
    member = _membership(session, message.room)
    try:
        size = len(orjson.dumps(message.state))
    except TypeError as error:
        raise BrokerError(
            ErrorCode.BAD_MESSAGE, f"state cannot be encoded: {error}", room=message.room
        ) from None
    if size > limit:
        raise BrokerError(
            ErrorCode.TOO_LARGE, f"state of {size} bytes; {limit} are allowed", room=message.room
        )
    session.context.hub.set_state(member, message.state)
    return None


def _presence_now(session: Session, message: messages.Presence) -> Reply:
    context = session.context
    check_room(message.room)
    may_see_presence(session.identity, message.room, context.config.options(message.room))
    if session.backlogged:
        return WAIT  # lists are long, and who does not read them must not pile them up
    room = context.hub.rooms.get(message.room)
    if room is None:
        return WAIT  # there may be somebody on other nodes
    return _presence_reply(room)


async def _presence_later(session: Session, message: messages.Presence) -> Reply:
    await session.drained()
    if session.backlogged:
        return ANSWERED
    context = session.context
    room = context.hub.rooms.get(message.room)
    if room is None:
        mates = await context.peers.mates(message.room)
        room = context.hub.rooms.get(message.room)
        if room is None:
            return {"members": presence.listing_of(mates), **presence.counts_of(mates)}
    return _presence_reply(room)


def _presence_reply(room: Room) -> Reply:
    return {"members": presence.listing(room), **presence.counts(room)}


def _ack(session: Session, message: messages.Ack) -> Reply:
    session.context.hub.acknowledge(_membership(session, message.room), message.offset)
    return None


def _check_history(session: Session, message: messages.History) -> HistoryQuery:
    room = message.room
    options = session.context.config.options(room)
    check_room(room)
    may_join(session.identity, room, options)
    if not options.history:
        raise BrokerError(ErrorCode.NOT_FOUND, f"room {room} keeps no history", room=room)
    given = [value is not None for value in (message.since, message.before, message.at)]
    if sum(given) != 1:
        raise BrokerError(ErrorCode.BAD_MESSAGE, "history takes one of since, before, at", room=room)
    since = message.since.position if message.since is not None else None
    return HistoryQuery(limit=message.limit, since=since, before=message.before, at=message.at)


def _history_now(session: Session, message: messages.History) -> Reply:
    query = _check_history(session, message)
    if session.backlogged:
        return WAIT  # as with presence
    page = session.context.engine.history_nowait(message.room, query)
    return _history_reply(message, page) if page is not None else WAIT


async def _history_later(session: Session, message: messages.History) -> Reply:
    query = _check_history(session, message)
    context = session.context
    await session.drained()
    page = await context.engine.history(message.room, query, context.hub.retention(message.room))
    return _history_reply(message, page)


def _history_reply(message: messages.History, page: HistoryPage) -> Reply:
    events, cut = _fit(page.events, newest=message.before is not None)
    reply: dict[str, Any] = {
        "room": message.room,
        "events": [orjson.Fragment(event.wire) for event in events],
        "epoch": page.top.epoch,
        "offset": page.top.offset,
        "more": page.more or cut,
    }
    if message.since is not None:
        reply["recovered"] = page.recovered
    return reply


def _fit(events: list[Event], *, newest: bool) -> tuple[list[Event], bool]:
    """As many events as one reply may hold, from the end that the reader starts at."""
    size = 0
    ordered = reversed(events) if newest else iter(events)
    kept: list[Event] = []
    for event in ordered:
        size += len(event.wire)
        if kept and size > HISTORY_BYTES:
            break
        kept.append(event)
    if newest:
        kept.reverse()
    return kept, len(kept) < len(events)


# -- calls and the rest ---------------------------------------------------------


def _call(session: Session, message: messages.Call) -> Reply:
    method = session.context.methods.find(message.method)
    if message.id is not None and any(call.message.id == message.id for call in session.calls):
        raise BrokerError(ErrorCode.CONFLICT, "a call with this id is running")
    if message.supersede is not None:
        for call in list(session.calls):
            if call.message.supersede == message.supersede:
                call.end(ErrorCode.SUPERSEDED)
    limit = session.context.config.limits.calls
    if limit and sum(call.code is None for call in session.calls) >= limit:
        raise BrokerError(ErrorCode.LIMIT_EXCEEDED, f"{limit} calls run already")
    session.start_call(RunningCall(method, message))
    return ANSWERED


def _cancel(session: Session, message: messages.Cancel) -> Reply:
    for call in session.calls:
        if call.message.id == message.call and message.call is not None:
            call.end(ErrorCode.CANCELLED)
            return None
    raise BrokerError(ErrorCode.NOT_FOUND, f"no call {message.call!r} is running")


def _dict(session: Session, message: messages.Dict) -> Reply:
    if session.connection.codec.kind != "zstd":
        raise BrokerError(ErrorCode.BAD_MESSAGE, "dictionaries need the subprotocol broker.v1.zstd")
    if session.context.dictionaries.get(message.dict) is None:
        raise BrokerError(ErrorCode.NOT_FOUND, f"there is no dictionary {message.dict}")
    session.use_dictionary(message.dict)
    return None


def _ping(session: Session, _message: messages.Ping) -> Reply:
    return {"ts": session.context.wall()}


COMMANDS: Final[dict[type, Command]] = {
    messages.Auth: Command("auth", _always_later, "auth", _auth, open=True),
    messages.Join: Command("join", _join_now, "join", _join_later),
    messages.Leave: Command("leave", _leave, "join"),
    messages.Publish: Command("publish", _publish, "publish"),
    messages.State: Command("state", _state, "state"),
    messages.Presence: Command("presence", _presence_now, "query", _presence_later),
    messages.History: Command("history", _history_now, "query", _history_later),
    messages.Ack: Command("ack", _ack, "state"),
    messages.Call: Command("call", _call, "call"),
    messages.Cancel: Command("cancel", _cancel, "call"),
    messages.Dict: Command("dict", _dict, "query"),
    messages.Ping: Command("ping", _ping, "query", open=True),
}


def authenticate_first() -> BrokerError:
    """What a session that has not authenticated is told."""
    return BrokerError(ErrorCode.UNAUTHENTICATED, "send auth with a token first")


def control_rates(limit: float) -> Rates:
    """Rates for control frames, ``limit`` a second."""
    return Rates(message=Rate(rate=limit, burst=max(1, int(limit))))
