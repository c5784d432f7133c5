"""Clients that check what they are told, by the contract alone.

A :class:`Client` is a session; for each room that it joins it keeps a follower:
:class:`HistoryFollower` where offsets count (ephemeral events there carry their
number and the offset of the stored event before them), :class:`LiveFollower` where there
are none, :class:`LatestFollower` under policy ``latest``. ``listen`` raises
``AssertionError`` at the first message that breaks a promise, ``caught_up``
when something is still missing although everything is at rest.
"""

from __future__ import annotations

from typing import Any, Protocol

from broker.hub.rooms import MemberState
from broker.protocol.events import Event, Position
from tests.hub.fakes import FakeSink, Joining, Node


class Follower(Protocol):
    """What a client knows of one room."""

    position: Position | None

    def __init__(self, client: Client, room: str, /) -> None: ...

    def rejoin(self) -> None:
        """The client joins (again)."""

    def on(self, message: dict[str, Any], /) -> None:
        """Take a message about the room."""

    def caught_up(self) -> None:
        """Everything is at rest."""


class HistoryFollower:
    """A position is where a reply, the last event, or a ``position`` message puts it."""

    def __init__(self, client: Client, room: str) -> None:
        self._client = client
        self._room = room
        self._following = False
        self._tail_up_to = 0
        self._tail = 0
        self._passed = 0
        self.position: Position | None = None

    def rejoin(self) -> None:
        """What is on its way comes before the reply."""

    def _wanted(self, epoch: str, after: int, up_to: int) -> list[int]:
        past = self._client.node.engine.past[epoch]
        return [event.offset for event in past[after:up_to] if self._client.wants(event)]

    def on(self, message: dict[str, Any]) -> None:
        getattr(self, f"_on_{message['op']}")(message)

    def _on_ok(self, message: dict[str, Any]) -> None:
        since, self._tail = self._client.joins[message["id"]]
        here = Position(message["epoch"], message["offset"])
        self._tail_up_to = 0 if message["recovered"] or not self._tail else here.offset
        self.position = since if message["recovered"] else here
        self._following = True

    def _on_event(self, message: dict[str, Any]) -> None:
        assert self._following, "an event without a membership, or after lost"
        assert self.position is not None
        if "offset" not in message:
            self._on_passing(*message["data"])
            return
        epoch, offset = self.position.epoch, message["offset"]
        if offset <= self._tail_up_to:  # the first of the tail
            assert len(self._wanted(epoch, offset - 1, self._tail_up_to)) <= self._tail
        else:
            assert offset > self.position.offset, "twice, or out of order"
            assert self._wanted(epoch, self.position.offset, offset) == [offset], "a silent hole"
        self._tail_up_to = 0
        self.position = Position(epoch, offset)

    def _on_passing(self, number: int, after: int) -> None:
        """An ephemeral event that came to the hub after so many stored ones."""
        assert self.position is not None
        assert number > self._passed, "twice, or out of order"
        assert self.position.offset <= after, "later than a stored event that came after it"
        assert self._wanted(self.position.epoch, self.position.offset, after) == [], "a silent hole"
        self._passed = number

    def _on_lost(self, message: dict[str, Any]) -> None:
        assert self._following
        if message["offset"] >= self._tail_up_to:
            self._on_position(message)
        self.position = Position(message["epoch"], message["offset"])
        self._following = False

    def _on_position(self, message: dict[str, Any]) -> None:
        assert self.position is not None
        told = Position(message["epoch"], message["offset"])
        assert told.epoch == self.position.epoch
        assert self._wanted(told.epoch, self.position.offset, told.offset) == [], "a silent hole"
        self.position = told

    def caught_up(self) -> None:
        room = self._client.node.hub.rooms[self._room]
        member = self._client.sink.memberships[self._room]
        live = member.status is MemberState.LIVE or member in (room.ahead or ())
        assert live == self._following
        if self._following:
            assert self.position is not None
            assert room.position is not None
            assert self.position.epoch == room.position.epoch
            assert self._wanted(room.position.epoch, self.position.offset, room.position.offset) == []


class LiveFollower:
    """Events carry their number as data; none is missing but those that ``lost`` tells."""

    def __init__(self, client: Client, room: str) -> None:
        self._client = client
        self._room = room
        self._due: list[int] = []
        self._earlier: list[int] = []
        self._joined = False
        self._hole = False
        self.position: Position | None = None

    def rejoin(self) -> None:
        """What was due before may still come until the reply does; who was behind is not told any more."""
        self._earlier += self._due
        self._due = []
        self._joined = self._hole = False

    def published(self, number: int, event: Event) -> None:
        """An event was published while the client was a member."""
        if self._client.wants(event):
            self._due.append(number)

    def on(self, message: dict[str, Any]) -> None:
        if message["op"] == "ok":
            self._joined = message["id"] == self._client.newest[self._room]
        elif message["op"] == "event":
            due = self._due if self._joined else self._earlier
            assert message["data"] in due, "twice, out of order, or from before the join"
            index = due.index(message["data"])
            assert not index or self._hole or not self._joined, "a silent hole"
            self._hole = False
            del due[: index + 1]
        elif self._joined:
            assert message["op"] == "lost"
            assert self._due or not message.get("count", 0), "nothing was missing"
            self._hole = "count" not in message  # a filter makes it unknown
            del self._due[: message.get("count", 0)]

    def caught_up(self) -> None:
        assert self._hole or not self._due


class LatestFollower:
    """Of each slot the newest arrives in the end, and nothing older after it."""

    def __init__(self, client: Client, _room: str) -> None:
        self._client = client
        self._published: dict[str | None, int] = {}
        self._seen: dict[str | None, int] = {}
        self.position: Position | None = None

    def rejoin(self) -> None:
        """What was held for the earlier membership is gone."""
        self._published = {}

    def published(self, number: int, event: Event) -> None:
        """An event was published while the client was a member."""
        if self._client.wants(event):
            self._published[event.slot] = number

    def on(self, message: dict[str, Any]) -> None:
        if message["op"] == "lost":
            self._published = {}
        elif message["op"] == "event":
            slot = message.get("slot")
            assert message["data"] > self._seen.get(slot, -1), "twice, or older than what was seen"
            self._seen[slot] = message["data"]

    def caught_up(self) -> None:
        assert self._seen.items() >= self._published.items()


class Client:
    """One session and its followers. With ``tag`` its joins filter for events that have it as tag ``t``."""

    def __init__(self, node: Node, tag: str | None = None, **sink: Any) -> None:
        self.node = node
        self.sink: FakeSink = node.sink(**sink)
        self.joins: dict[int, tuple[Position | None, int]] = {}
        """``since`` and ``tail`` of each join, by its id."""
        self.followers: dict[str, Follower] = {}
        self._tag = tag
        self.newest: dict[str, int] = {}
        """Id of the newest join of each room."""
        self._answered: set[int] = set()

    def wants(self, event: Event) -> bool:
        """Whether an event is meant for this client."""
        shown = self._tag is None or (event.tags or {}).get("t") == self._tag
        return shown and event.exclude != self.sink.id

    def join(
        self, room: str, kind: type[Follower] = HistoryFollower, *, since: bool = False, tail: int = 0
    ) -> Joining:
        """Begin to join; with ``since``, from where the follower stands. The caller drives it."""
        follower = self.followers.get(room)
        if follower is None:
            follower = self.followers[room] = kind(self, room)
        position = follower.position if since else None
        number = self.node.joins + 1
        self.joins[number] = position, tail
        self.newest[room] = number
        if room in self.node.hub.rooms:
            self.node.fanout.settle(self.node.hub.rooms[room])
        follower.rejoin()
        filter_ = {"eq": ["t", self._tag]} if self._tag is not None else None
        return self.node.start_join(self.sink, room, since=position, tail=tail, filter_=filter_)

    def leave(self, room: str) -> None:
        """Leave, if it is there; what is on its way still comes."""
        member = self.sink.memberships.get(room)
        if member is not None:
            self.node.fanout.settle(member.room)
            self.node.hub.leave(member)

    def listen(self) -> None:
        """Take what came."""
        for message in self.sink.received():
            if message["op"] == "ok":
                self._answered.add(message["id"])
            self.followers[message["room"]].on(message)

    def caught_up(self) -> None:
        """At rest: every join is answered and nothing is missing."""
        for room in self.sink.memberships:
            assert self.newest[room] in self._answered
            self.followers[room].caught_up()
