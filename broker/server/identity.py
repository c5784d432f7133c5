"""From a token to an identity, and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from broker.auth.claims import TokenRefused
from broker.auth.permissions import Identity, may_join, user_room
from broker.errors import BrokerError, CloseCode, ErrorCode
from broker.hub.rooms import ALL_ROOM
from broker.server.joining import open_room

if TYPE_CHECKING:
    from broker.server.session import Session


async def authenticate(session: Session, token: str) -> dict[str, Any] | None:
    """Serve ``auth``: fields of the reply, or ``None`` when the session is being ended.

    A token that is refused ends a session without identity (4401); a failed
    renewal leaves the session as it was.
    """
    try:
        identity = await verify(session, token)
    except TokenRefused as error:
        if session.authenticated:
            raise
        session.disconnect(CloseCode.TOKEN_REFUSED, error.message)
        return None
    rooms = await adopt(session, identity)
    if rooms is None:
        return None
    return {"user": session.user, "expires": identity.expires, "rooms": rooms}


async def verify(session: Session, token: str) -> Identity:
    """Who the token identifies. A refusal is answered the later the more came from the address."""
    context = session.context
    try:
        return context.verifier.verify_nowait(token) or await context.verifier.verify(token)
    except TokenRefused as error:
        if not error.expired:
            await trio.sleep(context.failures.failed(session.address, context.monotonic()))
        raise


async def adopt(session: Session, identity: Identity) -> dict[str, Any] | None:
    """Make ``identity`` the session's own and join the server's rooms for it.

    Returns the positions of those with history; ``None`` when the session must
    end. Raises ``conflict`` for another user's token.
    """
    user = identity.user
    if user is not None and session.user is None and not session.context.registry.has_place(user):
        session.disconnect(CloseCode.SESSION_LIMIT, f"user {user} has too many sessions")
        return None
    session.identify(identity)
    _recheck_rooms(session)
    rooms = await join_server_rooms(session)
    return rooms if session.ending is None else None


async def join_server_rooms(session: Session) -> dict[str, Any]:
    """Join ``all``, and the user's own room; return the positions of those with history."""
    hub = session.context.hub
    names = [ALL_ROOM]
    if session.user is not None:
        names.append(user_room(session.user))
    positions: dict[str, Any] = {}
    for name in names:
        room = hub.find(name)
        if room is None:
            try:
                room = await open_room(session, name)
            except BrokerError as error:
                if error.code is ErrorCode.UNAVAILABLE:
                    session.disconnect(CloseCode.INTERNAL, "the store is not available")
                    return {}
                raise
            if session.ending is not None:
                return {}
        if name not in session.memberships:
            hub.go_live(hub.join(session, room))
        if room.position is not None:
            positions[name] = room.position._asdict()
    return positions


def _recheck_rooms(session: Session) -> None:
    """A renewed token may allow less: take away what it does not name any more."""
    for member in list(session.memberships.values()):
        room = member.room
        if room.name == ALL_ROOM:
            continue
        try:
            may_join(session.identity, room.name, room.options)
        except BrokerError as error:
            session.context.hub.take_away(member, error.code)
