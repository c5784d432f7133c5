"""Joining a room: at once where memory suffices, on the session's task where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.engine.base import HistoryPage, HistoryQuery
from broker.errors import BrokerError
from broker.hub import presence
from broker.hub.fanout import FRAME_BYTES
from broker.hub.recovery import PAGE, CatchUp
from broker.hub.rooms import Room, Verdict
from broker.protocol import messages
from broker.protocol.events import Event, Position
from broker.protocol.filters import Filter

if TYPE_CHECKING:
    from broker.server.context import Context
    from broker.server.session import Session


def join_now(session: Session, message: messages.Join, filter_: Filter | None) -> bool:
    """Join a warm room whose missed events, if any were asked for, are in memory. False: wait."""
    context = session.context
    room = context.hub.find(message.room)
    if room is None or session.backlogged:
        return False
    past = since, tail = _past(room, message)
    query = _first_query(since, tail)
    page: HistoryPage | None = None
    if query is not None:
        page = context.engine.history_nowait(room.name, query)
        if page is None or page.more or (since is not None and tail and not page.recovered):
            return False
        if sum(len(event.wire) for event in page.events) > FRAME_BYTES:
            return False
    catch_up = _begin(session, room, message, filter_, past)
    if page is not None:
        for frame in catch_up.feed(page):
            if session.write(frame) == Verdict.FULL:
                catch_up.give_up()
                break
        assert catch_up.query() is None, "the memory of a warm room reaches up to its position"
    if room.slots:
        session.flush_answers()  # a snapshot may be large: the next one waits until it is read
    return True


async def join_later(session: Session, message: messages.Join, filter_: Filter | None) -> None:
    """Join any room, reading as much of the past as it takes."""
    context = session.context
    room = await open_room(session, message.room)
    if session.ending is not None:
        return
    catch_up = _begin(session, room, message, filter_, _past(room, message))
    member = session.memberships[room.name]
    retention = context.hub.retention(room.name)
    try:
        while (query := catch_up.query()) is not None:
            page = context.engine.history_nowait(room.name, query)
            if page is None:
                page = await context.engine.history(room.name, query, retention)
            for frame in catch_up.feed(page):
                await session.drained()
                if catch_up.cancelled or session.ending is not None:
                    return
                if session.write(frame) == Verdict.FULL:
                    catch_up.give_up()
                    return
    except BrokerError:
        if not catch_up.answered:
            context.hub.leave(member)
            raise
        context.hub.tell_lost(member, "gap")


async def open_room(session: Session, name: str) -> Room:
    """The room: its stream opened, its slots known, and heard of from other nodes."""
    context = session.context
    room = context.hub.find(name)
    while room is None:
        with context.hub.opening(name):
            room = await _open(context, name)
    return room


async def _open(context: Context, name: str) -> Room | None:
    """Attach first, so that nothing passes between what is read and what comes.

    ``None``: the engine has closed the stream again before we had read what we must.
    """
    hub, engine = context.hub, context.engine
    options = hub.options(name)
    slots = await context.peers.attach(name, slots=options.last_value and not options.history)
    if not options.history:
        return hub.obtain(name, None, slots)
    retention = hub.retention(name)
    position = await engine.open(name, retention)
    seen = await engine.acknowledgements(name) if options.presence else []
    past: list[Event] = []
    top = Position("", 0)
    while hub.needs_past(name) and top != position:  # again where events came while we read
        query = HistoryQuery(limit=options.history, tail=options.history)
        past, top, *_ = await engine.history(name, query, retention)
        position = engine.position(name) or top
    current = engine.position(name)
    return hub.obtain(name, current, past, seen) if current is not None else None


def _past(room: Room, message: messages.Join) -> tuple[Position | None, int]:
    """What of the past is asked for; nothing in an ephemeral room, which has none."""
    if not room.has_history:
        return None, 0
    since = message.since.position if message.since is not None else None
    return since, min(message.tail, room.options.history)


def _first_query(since: Position | None, tail: int) -> HistoryQuery | None:
    if since is not None:
        return HistoryQuery(limit=PAGE, since=since)
    return HistoryQuery(limit=tail, tail=tail) if tail else None


def _begin(
    session: Session,
    room: Room,
    message: messages.Join,
    filter_: Filter | None,
    past: tuple[Position | None, int],
) -> CatchUp:
    """Reserve the membership; the reply goes out when its position is known."""
    hub = session.context.hub
    if session.posts_wait or room.pending:
        # Earlier answers of this session wait for events that are pending. They, and the
        # events before this join, must go out before the reply.
        hub.fanout.flush()
    member = hub.join(session, room, filter_, watches=message.presence)

    def answer(position: Position | None, recovered: bool) -> None:
        fields: dict[str, Any] = {"room": room.name}
        if position is not None:
            fields |= {"epoch": position.epoch, "offset": position.offset}
        fields["recovered"] = recovered
        if message.presence:
            fields["members"] = presence.listing(room)
        session.answer(message.id, fields)

    since, tail = past
    return CatchUp(hub, member, since=since, tail=tail, answer=answer)
