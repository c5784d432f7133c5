"""What the broker says, as typed values. No IO.

Shapes are checked here and nowhere else: :func:`msgspec.convert` refuses a
message with a missing or wrong field, ignores fields it does not know, and the
connection ends with 1007. Past this module nobody sees a dict.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from broker.protocol.events import Position, Tags

Pause = Annotated[float, msgspec.Meta(ge=0)]
"""Seconds to wait."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event.

    ``ts`` is the time of publication (Unix seconds). ``offset`` and ``epoch``
    are its place in a room with history and ``None`` elsewhere; ``user`` is the
    publisher, where there is one.
    """

    room: str
    name: str = msgspec.field(name="event")
    data: Any = None
    ts: float
    offset: int | None = None
    epoch: str | None = None
    user: str | None = None
    key: str | None = None
    slot: str | None = None
    tags: dict[str, str | int | float] | None = None

    @property
    def position(self) -> Position | None:
        """Where a later ``join(since=…)`` goes on after this event."""
        if self.offset is None or self.epoch is None:
            return None
        return Position(self.epoch, self.offset)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One session in a room. ``joined_at`` is Unix seconds, ``seen`` an acknowledged offset."""

    session: str
    user: str | None = None
    info: Any = None
    state: Any = None
    joined_at: float | None = None
    seen: int | None = None


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Who came, went, or changed state since the last one."""

    room: str
    joined: tuple[Member, ...] = ()
    left: tuple[Member, ...] = ()
    changed: tuple[Member, ...] = ()


class Lost(msgspec.Struct, frozen=True, kw_only=True):
    """Events are missing here and will not come.

    ``reason`` is the broker's, or ``unread`` when this client kept nothing
    because nobody iterated. ``count`` is ``None`` where it is not known.
    """

    room: str
    reason: str
    count: int | None = None


class Rejoined(msgspec.Struct, frozen=True, kw_only=True):
    """The room was joined again; what comes after it in the stream came after it in time.

    ``recovered``: nothing was missed. Else there is a hole right here, as large
    as ``position`` is beyond the last event. ``reason``: ``reconnect``, or that
    of a ``lost`` message.
    """

    room: str
    reason: str
    recovered: bool
    position: Position | None


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """The room was taken away (permission, administrator), or could not be joined again."""

    room: str
    code: str


Item = Event | Presence | Lost | Rejoined | Left
"""What a stream carries, in order."""


class Dictionary(msgspec.Struct, frozen=True):
    """A zstd dictionary that the broker offers for the rooms of a pattern."""

    id: int
    url: str
    sha256: str
    rooms: str = "*"


class Place(msgspec.Struct, frozen=True):
    """A position as it is written; without ``epoch`` the room keeps no history."""

    epoch: str | None = None
    offset: int = 0

    @property
    def position(self) -> Position | None:
        """The same as the rest of the package speaks of it."""
        return None if self.epoch is None else Position(self.epoch, self.offset)


Places = dict[str, Place | None]
"""Where the rooms that the broker joined for a session stand."""


class Limits(msgspec.Struct, frozen=True):
    """What the broker accepts: ``message`` and ``state`` in bytes, ``batch`` and ``rooms`` in numbers."""

    message: int = 64 * 1024
    batch: int = 1
    rooms: int | None = None
    state: int | None = None
    filter: Any = None


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's first message. ``expires`` is Unix seconds, ``ping`` seconds."""

    session: str
    protocol: int = 1
    user: str | None = None
    expires: float | None = None
    node: str = ""
    server: str = ""
    ping: Annotated[float, msgspec.Meta(gt=0)] = 25.0
    limits: Limits = Limits()
    dicts: tuple[Dictionary, ...] = ()
    rooms: Places = {}


class Members(msgspec.Struct, frozen=True):
    """Answer to ``presence``: at most 500 members, and how many sessions and users there are in all."""

    members: tuple[Member, ...] = ()
    sessions: int = 0
    users: int = 0


class History(msgspec.Struct, frozen=True):
    """Part of a room's past, in ascending order; ``more`` lies further in the direction of reading.

    ``position``: the room's newest. ``recovered``: whether the events follow
    ``since`` without a hole; true where nothing was to be followed.
    """

    events: tuple[Event, ...]
    position: Position
    more: bool
    recovered: bool = True


class Joined(Place, frozen=True):
    """Reply to ``join``; without ``epoch`` the room is ephemeral."""

    recovered: bool = False
    members: tuple[Member, ...] = ()


class Authenticated(msgspec.Struct, frozen=True):
    """Reply to ``auth``."""

    user: str | None = None
    expires: float | None = None
    rooms: Places = {}


class Bye(msgspec.Struct, frozen=True):
    """The broker's last message. ``retry_after`` (s) is ``None`` for never."""

    code: int
    reason: str = ""
    retry_after: Pause | None = None


class Dicts(msgspec.Struct, frozen=True):
    """New dictionaries."""

    dicts: tuple[Dictionary, ...]


class Moved(msgspec.Struct, frozen=True):
    """``position``: everything meant for this session is delivered up to here."""

    room: str
    epoch: str
    offset: int


class Refusal(msgspec.Struct, frozen=True):
    """``error``: without ``id`` it answers a message that carried none, and names its ``op``."""

    code: str
    message: str = ""
    retry: bool = False
    retry_after: Pause | None = None
    room: str | None = None


def read_event(message: dict[str, Any], epoch: str | None) -> Event:
    """An ``event`` message of a room whose stream is known by ``epoch``."""
    message["epoch"] = epoch  # not on the wire: it is the room's, and a copy would cost more than the key
    return msgspec.convert(message, Event)


def read_history(reply: dict[str, Any]) -> History:
    """The reply to ``history``."""
    page = msgspec.convert(reply, _Page)
    events = tuple(read_event(event, page.epoch) for event in page.events)
    return History(events, Position(page.epoch, page.offset), page.more, page.recovered)


class _Page(msgspec.Struct):
    events: list[dict[str, Any]]
    epoch: str
    offset: int
    more: bool = False
    recovered: bool = True


__all__ = [
    "Authenticated",
    "Bye",
    "Dictionary",
    "Dicts",
    "Event",
    "History",
    "Item",
    "Joined",
    "Left",
    "Limits",
    "Lost",
    "Member",
    "Members",
    "Moved",
    "Place",
    "Places",
    "Position",
    "Presence",
    "Refusal",
    "Rejoined",
    "Tags",
    "Welcome",
    "read_event",
    "read_history",
]
