"""Who is where: every coming, going and change is told to watchers here and to the other nodes.

Owned by the hub, which calls in when a member of its own comes, goes, or
changes, and passes on what other nodes say of theirs (:mod:`broker.hub.mates`).
Watchers are told by the next :meth:`Roster.push`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from broker.engine.peers import Described, Mate, Peers
from broker.hub import presence
from broker.hub.mates import Changes, Mates
from broker.hub.rooms import Member, Opening, Room
from broker.protocol.events import SessionId

PARTED_KEPT: Final = 1024
"""Nodes of which is remembered that they drain. An id never comes back, so the oldest may be forgotten."""


class Roster:
    """``rooms`` are the hub's, ``openings`` those that are being opened."""

    def __init__(self, peers: Peers, rooms: Mapping[str, Room], openings: Mapping[str, Opening]) -> None:
        self._peers = peers
        self._rooms = rooms
        self._openings = openings
        self._stirred: dict[Room, None] = {}
        """Rooms with something to tell."""
        self._parted: dict[str, None] = {}
        """Nodes that drain, or did."""

    # -- members here -----------------------------------------------------------

    def came(self, member: Member) -> None:
        """A session came into a room."""
        room = member.room
        if presence.has_presence(room):
            presence.note_joined(room, member.sink.id, member)
            if room.mates and (replaced := room.mates.replace(member.sink.user)) is not None:
                presence.note_left(room, replaced.session, replaced)
            self._stir(room)
        self._announce(member, member)

    def came_again(self, member: Member) -> None:
        """A session joined anew; it shows what it showed before, but by another object."""
        room, session = member.room, member.sink.id
        if room.joined is not None and session in room.joined:
            room.joined[session] = member
        elif room.touched is not None and session in room.touched:
            room.touched[session] = member
        self._announce(member, member)

    def went(self, member: Member) -> None:
        """It left."""
        if presence.has_presence(member.room):
            presence.note_left(member.room, member.sink.id, member)
            self._stir(member.room)
        self._announce(member, None)

    def changed(self, member: Member) -> None:
        """What it shows has changed, which matters only where members are shown."""
        if presence.has_presence(member.room):
            self.introduced(member)

    def introduced(self, member: Member) -> None:
        """Who it is may have changed."""
        if presence.has_presence(member.room):
            presence.note_changed(member.room, member.sink.id, member)
            self._stir(member.room)
        self._announce(member, member)

    def _announce(self, member: Member, described: Described | None) -> None:
        if not presence.of_server(member.room):
            self._peers.touch(member.room.name, member.sink.id, member.sink.user, described)

    # -- members on other nodes: see ``Events`` in ``engine/peers.py`` --------------

    def know(self, room: str, node: str, mates: Mapping[SessionId, Mate]) -> None:
        """``node`` has these members in ``room``, and no others."""
        found = self._find(room)
        if found is not None and (mates or found.mates is not None):
            self._show(found, self._mates(found).know(node, mates))

    def change(self, room: str, node: str, news: Sequence[Mate], gone: Sequence[SessionId]) -> None:
        """``node`` has ``news`` in ``room``, perhaps otherwise than before, and ``gone`` no more."""
        found = self._find(room)
        if found is not None:
            self._show(found, self._mates(found).change(node, news, gone))

    def part(self, node: str) -> None:
        """``node`` drains: its members are shown until their users have come back, or it has gone."""
        self._parted[node] = None
        if len(self._parted) > PARTED_KEPT:
            del self._parted[next(iter(self._parted))]
        opening = (opening.room for opening in self._openings.values())
        for room in (*self._rooms.values(), *opening):
            if room.mates is not None:
                room.mates.part()

    def _find(self, name: str) -> Room | None:
        """The room, if it shows its members."""
        room = self._rooms.get(name)
        if room is None:
            opening = self._openings.get(name)
            room = opening.room if opening is not None else None
        return room if room is not None and presence.has_presence(room) else None

    def _mates(self, room: Room) -> Mates:
        if room.mates is None:
            room.mates = Mates(self._parted)
        return room.mates

    def _show(self, room: Room, changes: Changes) -> None:
        if not room.mates:
            room.mates = None
        for mate in changes.came:
            presence.note_joined(room, mate.session, mate)
        for mate in changes.changed:
            presence.note_changed(room, mate.session, mate)
        for mate in changes.went:
            presence.note_left(room, mate.session, mate)
        self._stir(room)

    # -- watchers ---------------------------------------------------------------

    def _stir(self, room: Room) -> None:
        if room.watchers:
            self._stirred[room] = None
        else:
            room.joined = room.left = room.touched = None  # nobody watches

    def push(self) -> None:
        """Tell watchers what changed since the last call."""
        if not self._stirred:
            return
        stirred, self._stirred = self._stirred, {}
        for room in stirred:
            for watcher, message in presence.pushes(room):
                watcher.sink.post(message)
            if room.joined or room.left or room.touched:
                self._stirred[room] = None  # more than one push may hold
