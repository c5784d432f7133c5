"""Rooms, their members, and the groups that get the same bytes.

Owned by the hub; nobody else changes these objects. A member stands in its
session's ``memberships`` and in one group of its room; both directions change
together in :meth:`Room.enter` and :meth:`Room.exit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from broker.config import RoomOptions
from broker.engine.peers import Mate
from broker.errors import CloseCode
from broker.hub.mates import Mates
from broker.protocol.codec import Codec
from broker.protocol.events import Event, Position, SessionId, UserId
from broker.protocol.filters import Filter

ALL_ROOM = "all"
USER_PREFIX = "user:"


class Verdict(IntEnum):
    """What became of a frame handed to a sink. ``TAKEN`` is 0, so that the common case tests false."""

    TAKEN = 0
    FULL = 1
    """The outbox is at its limit; the frame was not taken, the room's policy decides."""
    CLOSED = 2
    SPOILED = 3
    """The batch could not be encoded; nobody in the group gets it."""


class Sendable(Protocol):
    """A non-blocking socket."""

    def send(self, data: bytes, /) -> int:
        """Send what it takes now, return how much; raises ``OSError``."""


class Sink(Protocol):
    """A session as the hub sees it. Implemented in ``server``; every method returns at once."""

    id: SessionId
    user: UserId | None
    info: Any
    memberships: dict[str, Member]

    @property
    def direct(self) -> Sendable | None:
        """What whole frames may be sent to directly; ``None`` while they must go through :meth:`write`.

        Whoever changes it calls :meth:`Group.changed` for each group of ``memberships``.
        """

    @property
    def backlogged(self) -> bool:
        """Whether bytes wait for the socket."""

    @property
    def posts_wait(self) -> bool:
        """Whether posted messages wait for events, and all that is posted now behind them."""

    def codec_for(self, room: str) -> Codec:
        """How frames of ``room`` are encoded for this session."""

    def write(self, frame: bytes) -> int:
        """Hand over one whole frame; see :class:`Verdict`."""

    def sent(self, frame: bytes, size: int) -> int:
        """See to a frame of which ``direct`` took only ``size`` bytes (-1: an error); a :class:`Verdict`."""

    def post(self, message: bytes, *, after_events: bool = False) -> None:
        """Queue one message for the end of this round.

        It goes out before any event that is not on its way yet, except that one
        posted with ``after_events`` waits for those that are pending in rooms now.
        """

    def seal_posts(self) -> None:
        """What waits for events has those of the round that begins now to wait for, no later ones."""

    def flush_posts(self, *, after_events: bool = False) -> None:
        """Send the posted messages now, and the sealed ones too if their events are on their way."""

    def on_drained(self) -> None:
        """Ask for :meth:`Hub.resume` once the backlog is gone, or soon if there is none."""

    def disconnect(self, code: CloseCode, reason: str) -> None:
        """End the session in good order."""


class MemberState(IntEnum):
    """Where a member stands between joining and leaving (``docs/recovery.md``)."""

    CATCHING_UP = 0
    """Reads the past; live events are not sent to it yet."""
    LIVE = 1
    """In a group: gets every event."""
    SUSPENDED = 2
    """Fell behind; will be told ``lost`` when its backlog is gone."""
    LOST = 3
    """Was told ``lost`` in a room with history; gets nothing until it joins again."""


class Passing(Event):
    """An ephemeral event in a room with history: it has no place in the stream, but comes ``after`` one."""

    __slots__ = ("after",)

    def __init__(self, event: Event, after: Position) -> None:
        super().__init__(
            event.room, event.body, event.ts, slot=event.slot, tags=event.tags, exclude=event.exclude
        )
        self.after = after


class Held:
    """Policy ``latest``: the newest event of each slot, for a member that has a backlog.

    Events without a slot share one. ``size`` counts the bytes that wait.
    """

    __slots__ = ("_by_slot", "size")

    def __init__(self) -> None:
        self._by_slot: dict[str | None, Event] = {}
        self.size = 0

    def put(self, event: Event) -> bool:
        """Take an event; true when it took the place of an older one."""
        older = self._by_slot.pop(event.slot, None)  # popped, so that the order stays that of publishing
        self._by_slot[event.slot] = event
        self.size += len(event.wire) - (len(older.wire) if older is not None else 0)
        return older is not None

    def events(self) -> list[Event]:
        """What waits, oldest first."""
        return list(self._by_slot.values())


class Member:
    """One session in one room, from one join until the next or the leave.

    Its identity is the generation of the join: whoever waited and comes back
    checks that the session's membership still is this very object.
    """

    __slots__ = (
        "filter",
        "group",
        "held",
        "joined_at",
        "missed_from",
        "reached",
        "reason",
        "room",
        "seen",
        "sink",
        "state",
        "status",
        "watches",
    )

    def __init__(self, sink: Sink, room: Room, filter_: Filter | None, watches: bool, now: float) -> None:
        self.sink = sink
        self.room = room
        self.filter = filter_
        self.watches = watches
        """Wants presence pushes."""
        self.joined_at = now
        self.status = MemberState.CATCHING_UP
        self.group: Group | None = None
        self.state: dict[str, Any] | None = None
        self.seen = 0
        self.reached: Position | None = None
        """Up to where it was sent everything, in a room with history; kept while it is behind."""
        self.missed_from = 0
        """While suspended: the room's ``sent`` when it fell behind."""
        self.reason = "slow"
        """While suspended: why, as ``lost`` will say."""
        self.held: Held | None = None
        """Policy ``latest``: what waits until the backlog is gone."""

    def describe(self) -> dict[str, Any]:
        """The member as clients see it (see ``docs/protocol.md``, presence)."""
        sink = self.sink
        return {
            "user": sink.user,
            "session": sink.id,
            "info": sink.info,
            "state": self.state,
            "joined_at": self.joined_at,
            "seen": self.seen,
        }


Shown = Member | Mate
"""Whoever presence shows: a member here, or on another node."""


class Left(NamedTuple):
    """Somebody who went: as it was, and whether watchers had been told of its coming."""

    fields: Any
    known: bool


class Snapshot:
    """Members of a group at one moment, never changed.

    ``sockets`` are those of ``direct``, in the same order, and all that the hot
    loop touches: walking from member to session to connection to socket costs
    three more cache misses a send, for the kernel's own work has emptied the
    caches in between (6 % of a delivery, ``python -m bench fanout``). ``behind``
    are the members whose sinks must be asked.
    """

    __slots__ = ("behind", "direct", "sockets")

    def __init__(self, members: Iterable[Member]) -> None:
        self.direct: list[Member] = []
        self.behind: list[Member] = []
        self.sockets: list[Sendable] = []
        for member in members:
            socket = member.sink.direct
            if socket is not None:
                self.direct.append(member)
                self.sockets.append(socket)
            else:
                self.behind.append(member)

    def __len__(self) -> int:
        return len(self.direct) + len(self.behind)

    def __iter__(self) -> Iterator[Member]:
        yield from self.behind
        yield from self.direct


class Group:
    """Members of one room that get the same bytes: same codec, same filter."""

    __slots__ = ("_snapshot", "codec", "filter", "members")

    def __init__(self, codec: Codec, filter_: Filter | None) -> None:
        self.codec = codec
        self.filter = filter_
        self.members: dict[Member, None] = {}
        self._snapshot: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """The members as the fan-out goes through them; a new object after every change."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self.members)
        return self._snapshot

    def changed(self) -> None:
        """A member came or went, or its socket cannot be written to directly any more, or can again."""
        self._snapshot = None


class Room:
    """A room that somebody here is in, or that has something to remember."""

    __slots__ = (
        "ahead",
        "apart",
        "dirty",
        "groups",
        "idle_since",
        "joined",
        "left",
        "mates",
        "members",
        "name",
        "options",
        "pending",
        "position",
        "seen",
        "sent",
        "shown",
        "slots",
        "touched",
        "turn",
        "watchers",
    )

    def __init__(self, name: str, options: RoomOptions, position: Position | None) -> None:
        self.name = name
        self.options = options
        self.position = position
        """Last event handed to the hub; ``None`` in an ephemeral room."""
        self.groups: dict[tuple[Codec, Filter | None], Group] = {}
        self.members = 0
        """Members in any state."""
        self.pending: list[Event] = []
        """Events that the fan-out has yet to send."""
        self.dirty = False
        self.sent = 0
        """Events fanned out so far, to count what a suspended member missed."""
        self.turn = 0
        """Where the next fan-out starts, so that nobody is always last."""
        self.slots: dict[str, Event] | None = None
        self.seen: dict[UserId, int] = {}
        """Up to where each user has acknowledged, so that they find it again when they come back."""
        self.watchers: dict[Member, None] = {}
        """Members that asked for presence pushes."""
        self.apart: dict[Member, None] = {}
        """Members that stand in no group: catching up, suspended, lost."""
        self.ahead: dict[Member, None] | None = None
        """Those of them that have more than the hub was given; live once it has that, too."""
        self.mates: Mates | None = None
        """Members on other nodes; none is in ``members``."""
        self.joined: dict[SessionId, Shown] | None = None
        self.left: dict[SessionId, Left] | None = None
        self.touched: dict[SessionId, Shown] | None = None
        self.shown = False
        """Somebody was shown the members while watchers had yet to be told who came and went."""
        self.idle_since = 0.0

    @property
    def has_history(self) -> bool:
        """Whether events here have offsets."""
        return self.position is not None

    def everybody(self) -> Iterator[Member]:
        """Every member here, live or not."""
        for group in self.groups.values():
            yield from group.members
        yield from self.apart

    def enter(self, member: Member) -> None:
        """Take a new member in, not live yet."""
        self.members += 1
        self.apart[member] = None
        member.sink.memberships[self.name] = member
        if member.watches:
            self.watchers[member] = None

    def exit(self, member: Member) -> None:
        """Let a member go, whatever its status."""
        self.set_apart(member, member.status)
        del self.apart[member]
        if self.ahead is not None:
            self.ahead.pop(member, None)
        self.members -= 1
        self.watchers.pop(member, None)
        if member.sink.memberships.get(self.name) is member:
            del member.sink.memberships[self.name]

    def make_live(self, member: Member) -> None:
        """Put the member into its group: it gets every event that is published from now on."""
        key = (member.sink.codec_for(self.name), member.filter)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(*key)
        del self.apart[member]
        group.members[member] = None
        group.changed()
        member.group = group
        member.status = MemberState.LIVE

    def set_apart(self, member: Member, status: MemberState) -> None:
        """Take the member out of its group; it stays a member in ``status``."""
        member.status = status
        group = member.group
        if group is None:
            return
        member.group = None
        del group.members[member]
        group.changed()
        self.apart[member] = None
        if not group.members:
            del self.groups[group.codec, group.filter]

    def recall(self, past: Iterable[Event]) -> None:
        """Remember what is older than all that is remembered yet."""
        newer, self.slots = self.slots or {}, None
        for event in (*past, *newer.values()):
            self.remember(event)

    def remember(self, event: Event) -> None:
        """Keep the newest event of each slot."""
        if event.slot is None:
            return
        if self.slots is None:
            self.slots = {}
        self.slots.pop(event.slot, None)  # so that the order is the order of publishing
        self.slots[event.slot] = event
        if len(self.slots) > self.options.slots:
            del self.slots[next(iter(self.slots))]


class Opening:
    """A room that somebody is opening: it takes in what other nodes say of it, and is in no table yet.

    ``openers`` are at it; the fastest puts it into the hub's table.
    """

    __slots__ = ("openers", "room")

    def __init__(self, room: Room) -> None:
        self.room = room
        self.openers = 0
