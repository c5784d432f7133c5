"""What stands in for the hub in tests of the cluster's parts.

:class:`FakeHub` hears what other nodes make happen, and checks that changes fit
what it was told before. :class:`FakeMember` is one of its members. :class:`FakeFeed` is what tells backends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from broker.engine.peers import Mate
from broker.protocol.events import Event, SessionId, UserId


class FakeMember:
    """A member of a room, on its own node."""

    def __init__(self, session: str, user: str | None = None, state: Any = None) -> None:
        self.session = SessionId(session)
        self.user = UserId(user) if user is not None else None
        self.state = state

    def describe(self) -> dict[str, Any]:
        return {"user": self.user, "session": self.session, "info": None, "state": self.state}


class FakeHub:
    """Implements :class:`broker.engine.peers.Events`."""

    def __init__(self) -> None:
        self.received: list[Event] = []
        self.batches = 0
        self.told: list[tuple[Any, ...]] = []
        """Who came, changed and went, one entry each: (what, room, session)."""
        self.parted: list[str] = []
        self.faults: list[str] = []
        """Changes that do not fit what was known."""
        self._mates: dict[str, dict[str, dict[SessionId, Mate]]] = {}

    def receive(self, events: Sequence[Event]) -> None:
        self.batches += 1
        self.received += events

    def know_mates(self, room: str, node: str, mates: Mapping[SessionId, Mate]) -> None:
        before = self._of(room, node)
        for session in before:
            if session not in mates:
                self.told.append(("went", room, session))
        for session, mate in mates.items():
            if session not in before:
                self.told.append(("came", room, session))
            elif mate != before[session]:
                self.told.append(("changed", room, session))
        self._mates[room][node] = dict(mates)

    def change_mates(
        self, room: str, node: str, came: Sequence[Mate], changed: Sequence[Mate], went: Sequence[SessionId]
    ) -> None:
        known = self._of(room, node)
        for what, mates in (("came", came), ("changed", changed)):
            for mate in mates:
                if (mate.session in known) == (what == "came"):
                    self.faults.append(f"{mate.session} {what} in {room}, by {node}")
                known[mate.session] = mate
                self.told.append((what, room, mate.session))
        for session in went:
            if known.pop(session, None) is None:
                self.faults.append(f"{session} went from {room}, by {node}")
            self.told.append(("went", room, session))

    def part_mates(self, node: str) -> None:
        self.parted.append(node)

    def _of(self, room: str, node: str) -> dict[SessionId, Mate]:
        return self._mates.setdefault(room, {}).setdefault(node, {})

    def mates(self, room: str) -> dict[str, bytes]:
        """Who is in the room elsewhere, and as what."""
        found = [mates for mates in self._mates.get(room, {}).values() if mates]
        return {session: mate.fields for mates in found for session, mate in mates.items()}

    def forget(self, room: str) -> None:
        """Nobody is in the room any more."""
        self._mates.pop(room, None)


class FakeFeed:
    """Implements :class:`broker.cluster.peers.Feed`."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def appeared(self, session: SessionId, user: UserId | None) -> None:
        self.told.append(f"appeared {session} {user}")

    def vanished(self, session: SessionId, user: UserId | None) -> None:
        self.told.append(f"vanished {session} {user}")

    def came(self, room: str, session: SessionId, user: UserId | None) -> None:
        self.told.append(f"came {room} {session} {user}")

    def went(self, room: str, session: SessionId, user: UserId | None) -> None:
        self.told.append(f"went {room} {session} {user}")

    def write_all(self) -> None:
        self.told.append("write all")
