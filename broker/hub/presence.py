"""Who is in a room, told in changes that are gathered before they are sent.

A change is noted on the room; the next presence tick turns what was noted into
one ``presence`` message for those who asked to watch. Somebody who came and
went between two ticks is not mentioned, unless somebody was shown the members
in between, and many changes of one member are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar

from broker.hub.rooms import ALL_ROOM, USER_PREFIX, Member, Room
from broker.protocol.events import SessionId
from broker.protocol.messages import encode_op

MAX_MEMBERS = 500
"""Members listed in one reply or push; the counts beside it are of all."""
PERSONAL_PUSHES = 32
"""Up to this many newcomers in one tick get a push without themselves; in a storm all get the same."""

_Noted = TypeVar("_Noted")


def has_presence(room: Room) -> bool:
    """Whether the room shows its members: not the server's own rooms, and not where it is turned off."""
    return room.options.presence and room.name != ALL_ROOM and not room.name.startswith(USER_PREFIX)


def note_joined(room: Room, member: Member) -> None:
    """``member`` came."""
    if room.left is not None and room.left.pop(member.sink.id, None) is not None:
        return note_changed(room, member)  # went and came back within one tick
    if room.joined is None:
        room.joined = {}
    room.joined[member.sink.id] = member
    return None


def note_left(room: Room, member: Member) -> None:
    """``member`` went."""
    if room.touched is not None:
        room.touched.pop(member.sink.id, None)
    if room.joined is not None and room.joined.pop(member.sink.id, None) is not None and not room.shown:
        return
    if room.left is None:
        room.left = {}
    room.left[member.sink.id] = member.describe()


def note_changed(room: Room, member: Member) -> None:
    """State or acknowledged position of ``member`` changed."""
    if room.joined is not None and member.sink.id in room.joined:
        return
    if room.touched is None:
        room.touched = {}
    room.touched[member.sink.id] = member


def listing(room: Room) -> list[dict[str, Any]]:
    """The members as clients see them, at most ``MAX_MEMBERS``."""
    room.shown = bool(room.joined)  # who has seen a newcomer here must be told when it goes
    return [member.describe() for member in islice(room.everybody(), MAX_MEMBERS)]


def counts(room: Room) -> dict[str, int]:
    """How many sessions, and how many different users among them (an anonymous session is no user)."""
    users = {member.sink.user for member in room.everybody()}
    users.discard(None)
    return {"sessions": room.members, "users": len(users)}


def pushes(room: Room) -> Iterator[tuple[Member, bytes]]:
    """What to tell whom of the changes since the last tick; forgets them.

    Changes beyond ``MAX_MEMBERS`` of a kind stay noted for the next tick: a
    watcher that is never told who left would keep them in its list for ever.
    """
    joined, room.joined = _first(room.joined)
    left, room.left = _first(room.left)
    touched, room.touched = _first(room.touched)
    room.shown = room.shown and room.joined is not None
    watchers = room.watchers
    if not watchers or not (joined or left or touched):
        return
    gone = list(left.values())
    changed = [member.describe() for member in touched.values()]
    came = {key: member.describe() for key, member in joined.items()}
    shared = _encode(room.name, list(came.values()), gone, changed)
    personal = len(came) <= PERSONAL_PUSHES
    for watcher in list(watchers):
        if personal and watcher.sink.id in came:
            # Its join reply listed everybody who was there before; its own coming is no news to it.
            others = list(came)
            later = others[others.index(watcher.sink.id) + 1 :]
            own = _encode(room.name, [came[key] for key in later], gone, changed)
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


def _encode(
    room: str, joined: list[dict[str, Any]], left: list[dict[str, Any]], changed: list[dict[str, Any]]
) -> bytes | None:
    fields: dict[str, Any] = {}
    for name, members in (("joined", joined), ("left", left), ("changed", changed)):
        if members:
            fields[name] = members
    return encode_op("presence", room=room, **fields) if fields else None
