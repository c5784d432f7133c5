"""An event: what a publisher said in a room, encoded once.

Made by the command table (from clients), the admin API and the engine (from
the store); read by the hub, which sends ``wire`` to everyone it is meant for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NewType

import msgspec
import orjson

from broker.errors import BrokerError, ErrorCode

SessionId = NewType("SessionId", str)
UserId = NewType("UserId", str)

Tags = Mapping[str, str | int | float]


class Position(NamedTuple):
    """A place in a room's stream: everything up to and including ``offset``."""

    epoch: str
    offset: int


class Event:
    """One event.

    ``body`` is the JSON of the whole ``event`` message without its offset;
    ``wire`` is the message as clients get it. They are one and the same in an
    ephemeral room. ``position`` is set by the engine once the event is stored.
    ``exclude`` is the session that asked for ``echo: false``. ``publisher``
    scopes ``key``: the user, else the session.
    """

    __slots__ = ("body", "exclude", "key", "position", "publisher", "room", "slot", "tags", "ts", "wire")

    def __init__(
        self,
        room: str,
        body: bytes,
        ts: float,
        *,
        publisher: str = "",
        key: str | None = None,
        slot: str | None = None,
        tags: Tags | None = None,
        exclude: SessionId | None = None,
    ) -> None:
        self.room = room
        self.body = body
        self.wire = body
        self.ts = ts
        self.publisher = publisher
        self.key = key
        self.slot = slot
        self.tags = tags
        self.exclude = exclude
        self.position: Position | None = None

    def place(self, position: Position) -> None:
        """Give the event its place in the stream; ``wire`` carries the offset from now on."""
        self.position = position
        self.wire = b'%b,"offset":%d}' % (self.body[:-1], position.offset)

    @property
    def offset(self) -> int:
        """Offset in the room, 0 in an ephemeral one."""
        return self.position.offset if self.position is not None else 0


class _Stored(msgspec.Struct):
    """The fields of a stored event that the hub must know again."""

    ts: float
    slot: str | None = None
    tags: dict[str, str | int | float] | None = None


_stored = msgspec.json.Decoder(_Stored)


def restore(room: str, wire: bytes, position: Position) -> Event:
    """The event whose ``wire`` form the engine kept."""
    fields = _stored.decode(wire)
    event = Event(room, wire, fields.ts, slot=fields.slot, tags=fields.tags)
    event.position = position
    return event


def make_event(
    room: str,
    name: str,
    data: Any,
    ts: float,
    *,
    user: str | None = None,
    publisher: str = "",
    key: str | None = None,
    slot: str | None = None,
    tags: Tags | None = None,
    exclude: SessionId | None = None,
) -> Event:
    """Encode an event once.

    Raises ``bad_message`` if ``data`` cannot be said in JSON that every client
    can read (an integer beyond 64 bits, a lone surrogate).
    """
    message: dict[str, Any] = {"op": "event", "room": room, "event": name, "data": data, "ts": ts}
    if user is not None:
        message["user"] = user
    if key is not None:
        message["key"] = key
    if slot is not None:
        message["slot"] = slot
    if tags is not None:
        message["tags"] = tags
    try:
        body = orjson.dumps(message)
    except TypeError as error:
        raise BrokerError(ErrorCode.BAD_MESSAGE, f"data cannot be encoded: {error}", room=room) from None
    return Event(room, body, ts, publisher=publisher, key=key, slot=slot, tags=tags, exclude=exclude)
