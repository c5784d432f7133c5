"""What stands in for the hub, for Redis and for time in tests of the cluster's parts.

:class:`FakeHub` hears what other nodes make happen, and checks that changes fit
what it was told before. :class:`FakeMember` is one of its members. :class:`FakeFeed` is what tells backends.
:class:`HeldLink` leads to a :class:`MemberStore` that does what a test lets it do, one step at a
time; :class:`KnownNodes` is a list of nodes made by hand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import trio

from broker.engine.peers import Mate, NodeInfo
from broker.link.base import Argument, Done, LinkDown, Message, Reply, Script
from broker.link.keys import Keys
from broker.peers.nodes import Nodes
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
    """Implements :class:`broker.peers.peers.Feed`."""

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


class MemberStore:
    """Redis, as far as the scripts ``members`` and ``mates`` go; the scripts' own tests use a real one."""

    def __init__(self) -> None:
        self.hashes: dict[str, dict[str, Any]] = {}
        self.published: deque[Message] = deque()

    def members(self, keys: Sequence[str], arguments: Sequence[Any]) -> int:
        key, versions, channel = keys
        node, after, version, before, _ttl, _command, message, count = arguments[:8]
        found = self.hashes.get(key, {})
        if after == "":
            found = {}
        elif self.hashes.get(versions, {}).get(node, 0) != after or len(found) != before:
            return 0
        pairs, gone = arguments[8 : 8 + 2 * count], arguments[8 + 2 * count :]
        found |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        self.hashes[key] = {session: fields for session, fields in found.items() if session not in gone}
        of_room = self.hashes.setdefault(versions, {})
        if self.hashes[key]:
            of_room[node] = version
        else:
            of_room.pop(node, None)
        if message:
            self.published.append((channel, message))
        return 1

    def mates(self, keys: Sequence[str], asked: Sequence[Any]) -> list[Any]:
        versions, prefix = keys
        of_room = self.hashes.get(versions, {})
        reply: list[Any] = []
        for node in asked or list(of_room):
            if node in of_room:
                pairs = self.hashes.get(f"{prefix}{node}", {}).items()
                flat = [part if isinstance(part, bytes) else part.encode() for pair in pairs for part in pair]
                reply += (node.encode(), str(of_room[node]).encode(), flat)
        return reply


class HeldLink:
    """Implements :class:`broker.link.base.Link`; scripts wait to be executed, and replies to be heard."""

    def __init__(self, store: MemberStore) -> None:
        self.up = True
        self.clustered = False
        self._store = store
        self._commands: deque[tuple[Done, Callable[[], Reply]]] = deque()
        self._replies: deque[tuple[Done, Reply]] = deque()

    def send(self, done: Done, key: str, *command: Argument) -> None:
        done(None)  # the list of rooms to clean up is no matter here

    def send_script(self, done: Done, script: Script, keys: Sequence[str], *arguments: Argument) -> None:
        run = getattr(self._store, script.name)
        self._commands.append((done, lambda: run(keys, arguments)))

    async def call(self, key: str, *command: Argument) -> Reply:
        raise NotImplementedError

    async def call_script(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        raise NotImplementedError

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        """Everything is heard."""

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Everything is heard."""

    def hears(self, channel: str) -> bool:
        return True

    async def heard(self, channel: str) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    def execute(self) -> bool:
        """Redis does the next script; false if there is none."""
        if not self._commands:
            return False
        done, run = self._commands.popleft()
        self._replies.append((done, run()))
        return True

    def reply(self) -> bool:
        """The node hears the next reply; false if there is none."""
        if not self._replies:
            return False
        done, reply = self._replies.popleft()
        done(reply)
        return True

    def break_(self) -> None:
        """The connection breaks: what has not been heard is never heard, executed or not."""
        waiting = [done for done, _ in (*self._replies, *self._commands)]
        self._replies.clear()
        self._commands.clear()
        for done in waiting:
            done(LinkDown("cut"))


class KnownNodes(Nodes):
    """Nodes that are alive because the test says so."""

    def __init__(self, link: HeldLink, keys: Keys, node: str, *others: str) -> None:
        info = NodeInfo(id="", name=node)
        super().__init__(link, keys, lambda: info, lambda _: None, node=node, lease=1.0, parting=1.0)
        for other in others:
            self.know(other)
        self.settled = True

    def know(self, node: str) -> None:
        """It is alive."""
        self._others[node] = NodeInfo(id=node, name=node)

    def forget(self, node: str) -> None:
        """It is no more."""
        del self._others[node]
