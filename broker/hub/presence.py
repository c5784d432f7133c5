"""Who is in a room, told in changes that are gathered before they are sent.

A change is noted on the room; the next presence tick turns what was noted into
one ``presence`` message for those who asked to watch. Somebody who came and
went between two ticks is not mentioned, unless somebody was shown the members
in between, and many changes of one member are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import orjson

from broker.engine.peers import Mate
from broker.hub.rooms import ALL_ROOM, USER_PREFIX, Left, Member, Room, Shown
from broker.protocol.events import SessionId
from broker.protocol.messages import encode_op

MAX_MEMBERS = 500
"""Members listed in one reply or push; the counts beside it are of all."""
PERSONAL_PUSHES = 32
"""Up to this many newcomers in one tick get a push without themselves; in a storm all get the same."""

_Noted = TypeVar("_Noted")


def of_server(room: Room) -> bool:
    """Whether it is one of the server's own rooms, which show nobody and are of no interest elsewhere."""
    return room.name == ALL_ROOM or room.name.startswith(USER_PREFIX)


def has_presence(room: Room) -> bool:
    """Whether the room shows its members: not the server's own rooms, and not where it is turned off."""
    return room.options.presence and not of_server(room)


def note_joined(room: Room, session: SessionId, shown: Shown) -> None:
    """Somebody came."""
    left = room.left.pop(session, None) if room.left is not None else None
    if left is not None and left.known and not room.shown:
        return note_changed(room, session, shown)  # went and came back within one tick
    if room.joined is None:
        room.joined = {}
    room.joined[session] = shown
    return None


def note_left(room: Room, session: SessionId, shown: Shown) -> None:
    """Somebody went."""
    if room.touched is not None:
        room.touched.pop(session, None)
    known = room.joined is None or room.joined.pop(session, None) is None
    if not known and not room.shown:
        return
    if room.left is None:
        room.left = {}
    room.left[session] = Left(_describe(shown), known)


def note_changed(room: Room, session: SessionId, shown: Shown) -> None:
    """What somebody shows, or up to where it has acknowledged, changed."""
    if room.joined is not None and session in room.joined:
        room.joined[session] = shown
        if not room.shown:
            return  # nobody has seen how it was
    if room.touched is None:
        room.touched = {}
    room.touched[session] = shown


def listing(room: Room) -> list[Any]:
    """The members as clients see them, those here first, at most ``MAX_MEMBERS``."""
    # Whoever was shown a newcomer must be told when it goes; and when one who had gone is back.
    room.shown = bool(room.joined or room.left)
    here = [member.describe() for member in islice(room.everybody(), MAX_MEMBERS)]
    return here + listing_of(room.mates or (), MAX_MEMBERS - len(here))


def listing_of(mates: Iterable[Mate], limit: int = MAX_MEMBERS) -> list[Any]:
    """The same of members on other nodes alone."""
    return [_describe(mate) for mate in islice(mates, limit)]


def counts(room: Room) -> dict[str, int]:
    """How many sessions on all nodes, and how many different users among them (an anonymous one is none)."""
    users = {member.sink.user for member in room.everybody()}
    sessions = room.members
    for mate in room.mates or ():
        sessions += 1
        users.add(mate.user)
    users.discard(None)
    return {"sessions": sessions, "users": len(users)}


def counts_of(mates: Iterable[Mate]) -> dict[str, int]:
    """The same of members on other nodes alone."""
    users = [mate.user for mate in mates]
    return {"sessions": len(users), "users": len(set(users) - {None})}


def _describe(shown: Shown) -> Any:
    return orjson.Fragment(shown.fields) if isinstance(shown, Mate) else shown.describe()


def pushes(room: Room) -> Iterator[tuple[Member, bytes]]:
    """What to tell whom of the changes since the last tick; forgets them.

    Changes beyond ``MAX_MEMBERS`` of a kind stay noted for the next tick: a
    watcher that is never told who left would keep them in its list for ever.
    """
    joined, room.joined = _first(room.joined)
    # All who came are told before anybody who went: it may be one user, back on another node.
    left, room.left = _first(room.left) if room.joined is None else ({}, room.left)
    touched, room.touched = _first(room.touched)
    room.shown = room.shown and bool(room.joined or room.left)
    watchers = room.watchers
    if not watchers or not (joined or left or touched):
        return
    gone = [one.fields for one in left.values()]
    changed = {session: _describe(shown) for session, shown in touched.items()}
    came = {session: _describe(shown) for session, shown in joined.items()}
    untold = {*came, *(room.joined or ())}
    news = [fields for session, fields in changed.items() if session not in untold]
    shared = _encode(room.name, list(came.values()), gone, news)
    personal = len(came) <= PERSONAL_PUSHES
    for watcher in list(watchers):
        if personal and watcher.sink.id in came:
            # Its join reply listed everybody who was there before, as they were then.
            others = list(came)
            later = others[others.index(watcher.sink.id) + 1 :]
            news = [fields for session, fields in changed.items() if session not in later]
            own = _encode(room.name, [came[session] for session in later], gone, news)
            if own is not None:
                yield watcher, own
        elif shared is not None:
            yield watcher, shared


def _first(
    noted: dict[SessionId, _Noted] | None,
) -> tuple[dict[SessionId, _Noted], dict[SessionId, _Noted] | None]:
    """As many as one push may hold, and what remains."""
    if noted is None or len(noted) <= MAX_MEMBERS:
        return noted or {}, None
    items = iter(noted.items())
    return dict(islice(items, MAX_MEMBERS)), dict(items)


def _encode(room: str, joined: list[Any], left: list[Any], changed: list[Any]) -> bytes | None:
    fields: dict[str, Any] = {}
    for name, members in (("joined", joined), ("left", left), ("changed", changed)):
        if members:
            fields[name] = members
    return encode_op("presence", room=room, **fields) if fields else None
