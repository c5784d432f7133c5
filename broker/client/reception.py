"""What the broker's messages do to rooms and streams. Survives connections.

Called by the reader of the connection of the moment, in the order of arrival.
Each message is applied synchronously; the reader waits only where a full stream
holds it back, which is the client's back-pressure.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from broker.client.errors import ClientError, RoomClosed
from broker.client.messages import (
    Item,
    Joined,
    Left,
    Lost,
    Moved,
    Places,
    Position,
    Presence,
    Rejoined,
    read_event,
)
from broker.client.rooms import Owner, Room, Stream

log = logging.getLogger("broker.client")


class Reception:
    """Rooms and streams of one client.

    ``owner`` leaves rooms. ``awaiting`` tells whether a request waits for its
    reply (see :data:`~broker.client.rooms.OVERDRAFT`). ``resume(room, reason)``
    is to join a room again that the broker stopped after a ``lost``.
    """

    def __init__(
        self,
        owner: Owner,
        buffer: int,
        *,
        awaiting: Callable[[], bool],
        resume: Callable[[Room, str], None],
    ) -> None:
        self.rooms: dict[str, Room] = {}
        self.given: dict[str, Room] = {}
        """Joined by the broker: ``all`` and ``user:<id>``. They keep no items; streams get them."""
        self.events = 0
        self.stalled = False
        self._owner = owner
        self._buffer = buffer
        self._awaiting = awaiting
        self._resume = resume
        self._streams: list[weakref.ref[Stream]] = []
        self._on_progress = trio.lowlevel.ParkingLot()
        self._handlers: dict[str, Callable[[dict[str, Any]], Awaitable[None]]] = {
            "event": self._on_event,
            "position": self._on_position,
            "presence": self._on_presence,
            "lost": self._on_lost,
            "left": self._on_left,
        }

    async def take(self, op: str, message: dict[str, Any]) -> None:
        """Apply one message; unknown ops are ignored. Raises :class:`msgspec.ValidationError`."""
        handler = self._handlers.get(op)
        if handler is not None:
            await handler(message)

    def progress(self) -> None:
        """Something was read, or a request was made: let the reader look again."""
        self._on_progress.unpark_all()

    @property
    def waiting_items(self) -> int:
        """Items received and not yet read."""
        streams = [stream for reference in self._streams if (stream := reference()) is not None]
        return sum(len(stream) for stream in (*self.rooms.values(), *streams))

    # ---------------------------------------------------------------- rooms

    def holds(self, room: Room) -> bool:
        """Whether the room is still joined."""
        return self.rooms.get(room.name) is room or self.given.get(room.name) is room

    def joined(self, name: object) -> bool:
        """Whether a room of this name is joined, by us or by the broker."""
        return isinstance(name, str) and (name in self.rooms or name in self.given)

    def register(self, room: Room, reply: dict[str, Any]) -> None:
        """A first join succeeded. A handle that stood for the room before ends."""
        room.joined(msgspec.convert(reply, Joined))
        before = self.rooms.get(room.name)
        self.rooms[room.name] = room
        if before is not None:
            before.end(None)

    def resumed(self, room: Room, reason: str, reply: dict[str, Any]) -> None:
        """A later join succeeded; whoever reads the room is told before the events that follow."""
        if not self.holds(room):
            return
        joined = msgspec.convert(reply, Joined)
        room.resuming = False
        room.joined(joined)
        notice = Rejoined(room=room.name, reason=reason, recovered=joined.recovered, position=joined.position)
        self._note(room, notice)

    def forget(self, room: Room) -> None:
        """The room was left."""
        if self.rooms.get(room.name) is room:
            del self.rooms[room.name]
        room.end(None)

    def close(self, room: Room, code: str) -> None:
        """The room was taken away."""
        if not self.holds(room):
            return
        self._note(room, Left(room=room.name, code=code))
        owned = self.rooms if self.rooms.get(room.name) is room else self.given
        del owned[room.name]
        room.end(RoomClosed(room.name, code))

    def greet(self, places: Places) -> list[Room]:
        """Take over the rooms that the broker joined for a new session; returns those that missed events."""
        before, self.given = self.given, {}
        self.grant(places)
        if not self._elsewhere:
            return []
        missed = []
        for name, room in self.given.items():
            old = before.get(name)
            if old is None or old.position is None or room.position in (None, old.position):
                continue
            room.position = old.position
            if name not in self.rooms:
                missed.append(room)
        return missed

    def grant(self, places: Places) -> None:
        """Rooms that the broker joined (``welcome``, ``auth``)."""
        for name, place in places.items():
            if name not in self.given:
                at = place.position if place is not None else None
                self.given[name] = Room(name, self._owner, 0, self.progress, since=at)

    # -------------------------------------------------------------- streams

    def stream(self) -> Stream:
        """A stream of everything, held weakly: once nobody reads it, it must not hold the reader back."""
        stream = Stream(self._buffer, self.progress)
        self._streams.append(weakref.ref(stream, self._dropped))
        return stream

    def end(self, error: ClientError | None) -> None:
        """Nothing more comes, for anyone."""
        for reference in self._streams:
            stream = reference()
            if stream is not None:
                stream.end(error)
        for room in self.rooms.values():
            room.end(error)
        self.rooms.clear()
        self.given.clear()

    @property
    def _elsewhere(self) -> bool:
        """Whether events are read from a stream of everything."""
        return any((stream := reference()) is not None and not stream.ended for reference in self._streams)

    def _dropped(self, reference: weakref.ref[Stream]) -> None:
        self._streams.remove(reference)
        self.progress()

    async def _deliver(self, room: Room | None, item: Item) -> None:
        if room is not None:
            if room.keeps(elsewhere=self._elsewhere):
                await self._put(lambda: room, item)
            else:
                room.skip(item)
        for reference in tuple(self._streams):
            await self._put(reference, item)

    async def _put(self, reference: Callable[[], Stream | None], item: Item) -> None:
        while (stream := reference()) is not None and stream.full(overdraft=self._awaiting()):
            if not stream.iterated and not stream.reported:
                stream.reported = True
                # As text: a handler that keeps its records must not keep the stream.
                log.warning("%s is full and nobody iterates it: the client stands still", repr(stream))
            del stream  # or waiting for its reader would keep it alive after the reader is gone
            self.stalled = True
            await self._on_progress.park()
        self.stalled = False
        if stream is not None:
            stream.put(item)

    def _note(self, room: Room, item: Item) -> None:
        """Deliver without waiting: notices are few."""
        if room.keeps(elsewhere=self._elsewhere):
            room.put(item)
        for reference in tuple(self._streams):
            stream = reference()
            if stream is not None:
                stream.put(item)

    # ------------------------------------------------------------- messages

    def _find(self, name: str) -> Room | None:
        return self.rooms.get(name) or self.given.get(name)

    async def _on_event(self, message: dict[str, Any]) -> None:
        room = self._find(str(message.get("room")))
        position = room.position if room is not None else None
        event = read_event(message, position.epoch if position is not None else None)
        if room is not None and event.offset is not None:
            room.advance(event.offset)
        self.events += 1
        await self._deliver(room, event)

    async def _on_position(self, message: dict[str, Any]) -> None:
        moved = msgspec.convert(message, Moved)
        room = self._find(moved.room)
        if room is None or room.position is None:
            return
        if moved.epoch == room.position.epoch:
            room.advance(moved.offset)
        else:
            room.position = Position(moved.epoch, moved.offset)

    async def _on_presence(self, message: dict[str, Any]) -> None:
        change = msgspec.convert(message, Presence)
        room = self._find(change.room)
        if room is not None:
            room.observe(change)
            await self._deliver(room, change)

    async def _on_lost(self, message: dict[str, Any]) -> None:
        lost = msgspec.convert(message, Lost)
        room = self._find(lost.room)
        if room is None:
            return
        if room.position is None:
            await self._deliver(room, lost)  # live events go on
        elif not room.resuming:
            # Nothing more comes before the next join, so our own position is
            # the end of what we have.
            room.resuming = True
            self._resume(room, lost.reason)

    async def _on_left(self, message: dict[str, Any]) -> None:
        left = msgspec.convert(message, Left)
        room = self._find(left.room)
        if room is not None:
            self.close(room, left.code)
