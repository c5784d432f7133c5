"""From a token to an identity, and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from broker.auth.claims import TokenRefused
from broker.auth.permissions import Identity, may_join, may_see_presence, user_room
from broker.errors import BrokerError, CloseCode
from broker.hub.rooms import ALL_ROOM, Room
from broker.protocol.events import UserId
from broker.server.joining import open_room

if TYPE_CHECKING:
    from broker.server.session import Session


MARGIN = 0.5
"""Seconds before the deadline of a session without identity at which a refusal is told at the latest:
after it the client would be told that no token came."""


async def authenticate(session: Session, token: str) -> dict[str, Any] | None:
    """Serve ``auth``: fields of the reply, or ``None`` when the session is being ended.

    A token that is refused ends a session without identity; a failed renewal
    leaves the session as it was.
    """
    try:
        identity = await verify(session, token)
    except TokenRefused as error:
        if session.authenticated:
            raise
        turn_away(session, error)
        return None
    rooms = await adopt(session, identity)
    if rooms is None:
        return None
    return {"user": session.user, "expires": identity.expires, "rooms": rooms}


def turn_away(session: Session, error: TokenRefused) -> None:
    """End a session whose token identifies nobody, or nobody any more."""
    code = CloseCode.TOKEN_EXPIRED if error.expired else CloseCode.TOKEN_REFUSED
    session.disconnect(code, error.message)


async def verify(session: Session, token: str) -> Identity:
    """Who the token identifies. A refusal is answered the later the more came from the address."""
    context = session.context
    try:
        return context.verifier.verify_nowait(token) or await context.verifier.verify(token)
    except TokenRefused as error:
        if not error.expired and not context.config.dev:
            hold = context.failures.failed(session.address, context.monotonic())
            await trio.sleep(min(hold, max(0.0, session.time_to_authenticate - MARGIN)))
        raise


async def adopt(session: Session, identity: Identity) -> dict[str, Any] | None:
    """Make ``identity`` the session's own and join the server's rooms for it.

    Returns the positions of those with history; ``None`` when the session is
    ending. Raises ``conflict`` for another user's token, and ``unavailable`` or
    ``limit_exceeded`` if a room cannot be opened; then nothing has changed.
    """
    user = identity.user
    await _open_server_rooms(session, user)
    if session.ending is not None:
        return None
    # From here on nothing waits: limits hold, and no event comes before what the caller says next.
    if user is not None and session.user is None and not session.context.registry.has_place(user):
        session.disconnect(CloseCode.SESSION_LIMIT, f"user {user} has too many sessions")
        return None
    session.identify(identity)
    _recheck_rooms(session)
    return _join_server_rooms(session)


async def admit_anonymous(session: Session) -> dict[str, Any] | None:
    """The same for a session that may stay anonymous."""
    await _open_server_rooms(session, None)
    if session.ending is not None:
        return None
    session.context.registry.admit(session)
    return _join_server_rooms(session)


def count_server_rooms(session: Session) -> int:
    """How many of the session's rooms it did not ask for."""
    if ALL_ROOM not in session.memberships:
        return 0
    return 1 if session.user is None else 2


def _server_rooms(user: UserId | None) -> list[str]:
    return [ALL_ROOM] if user is None else [ALL_ROOM, user_room(user)]


async def _open_server_rooms(session: Session, user: UserId | None) -> None:
    """Return when all are warm in the same moment."""
    hub = session.context.hub
    names = _server_rooms(user)
    while session.ending is None:
        cold = next((name for name in names if hub.find(name) is None), None)
        if cold is None:
            return
        await open_room(session, cold)


def _join_server_rooms(session: Session) -> dict[str, Any]:
    """Join ``all``, and the user's own room; return the positions of those with history."""
    hub = session.context.hub
    positions: dict[str, Any] = {}
    for name in _server_rooms(session.user):
        room = hub.find(name)
        assert room is not None, "opened before"
        if name not in session.memberships:
            hub.go_live(hub.join(session, room))
        if room.position is not None:
            positions[name] = room.position._asdict()
    return positions


def _recheck_rooms(session: Session) -> None:
    """A renewed token may allow less: take away what it does not name any more."""
    hub = session.context.hub
    for member in list(session.memberships.values()):
        room = member.room
        if room.name == ALL_ROOM:
            continue
        try:
            may_join(session.identity, room.name, room.options)
        except BrokerError as error:
            hub.take_away(member, error.code)
            continue
        hub.introduce(member)
        if member.watches and not _may_watch(session, room):
            hub.unwatch(member)


def _may_watch(session: Session, room: Room) -> bool:
    try:
        may_see_presence(session.identity, room.name, room.options)
    except BrokerError:
        return False
    return True
