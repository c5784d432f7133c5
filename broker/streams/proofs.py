"""Whether a shard of a Redis Cluster still has what was delivered: one event of each open room proves it.

Theory. A replica that takes over has the beginning of every stream and may lack
the end, whose offsets it gives to other events. Once it has given away as many
as it lacked, offsets prove nothing any more. So when the link falls, the newest
delivered event of each open room is noted, before anything of a new primary can
be heard; and once the link is up the store is asked what it has at that place.
The same event there means that all before it are the same, too.

Of a room in which nothing was delivered since it was opened, a sweep has asked
what stood at its end.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha1
from typing import NamedTuple

from broker.engine.open_rooms import OpenRooms
from broker.protocol.events import Position


class Proof(NamedTuple):
    """What the store must have at a place."""

    position: Position
    digest: str


class Proofs:
    """Of the open rooms."""

    def __init__(self, rooms: OpenRooms) -> None:
        self._rooms = rooms
        self._due: dict[str, Proof] = {}
        """To be looked at."""
        self._ends: dict[str, Proof] = {}
        """What stood at the end of quiet rooms."""

    def note(self, rooms: Collection[str]) -> None:
        """The link is down: whoever answers next must know what was delivered in ``rooms``."""
        for room in rooms:
            ring = self._rooms.get(room)
            if ring is None or ((due := self._due.get(room)) and due.position.epoch == ring.top.epoch):
                continue  # what is noted has yet to be looked at
            newest = ring.newest
            if newest is not None and newest.position is not None:
                digest = sha1(newest.body, usedforsecurity=False).hexdigest()
                self._due[room] = Proof(newest.position, digest)
            elif (end := self._ends.get(room)) and end.position.epoch == ring.top.epoch:
                self._due[room] = end

    def place(self, room: str, end: Position) -> int:
        """The offset at which the store is to be asked; ``end``: where the room is."""
        due = self._due.get(room)
        return due.position.offset if due is not None and due.position.epoch == end.epoch else end.offset

    def holds(self, room: str, asked: Position, digest: str | None) -> bool:
        """Take what the store has at ``asked``; false if it was another event that was delivered.

        What was trimmed proves nothing, and refutes nothing.
        """
        due = self._due.get(room)
        if due is not None and due.position == asked:
            if digest is not None and digest != due.digest:
                return False  # and it stays noted until the room has another epoch
            del self._due[room]
            return True
        if digest is not None:
            self._ends[room] = Proof(asked, digest)
        return True

    def keep(self, rooms: Collection[str]) -> None:
        """Forget all rooms but these, which are open."""
        for kept in (self._due, self._ends):
            for room in kept.keys() - rooms:
                del kept[room]
