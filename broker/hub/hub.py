"""The centre: every room of this node, and what happens in them. Synchronous.

The edge calls in with sinks (sessions), the engine with stored events, other
nodes with ephemeral ones and with who is there; the hub keeps both directions of
every index and leaves sending to the fan-out. Nothing here waits, so nothing
interleaves, so there are no locks.

What is said here is told to the other nodes first and then delivered here; what
comes from them is only delivered. So no event can come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from broker.config import Config, RoomOptions
from broker.engine.base import Done, Engine, Retention, Seen
from broker.engine.peers import Mate, Peers
from broker.errors import BrokerError, ErrorCode
from broker.hub.fanout import FanOut
from broker.hub.rooms import ALL_ROOM, USER_PREFIX, Member, MemberState, Opening, Passing, Room, Sink
from broker.hub.roster import Roster
from broker.hub.routing import NO_COPIES, Copying, Routing
from broker.hub.slow import SlowMembers
from broker.protocol.codec import Encoder
from broker.protocol.events import Event, Position, SessionId, UserId
from broker.protocol.filters import Filter
from broker.protocol.messages import encode_op

LINGER = 5.0
"""Seconds an empty room is kept: a reload or a short reconnect finds it warm."""


class Hub:
    """Rooms, members, publishing. Implements :class:`~broker.engine.peers.Events`.

    ``monotonic`` and ``wall`` are clocks in seconds. ``wake`` and
    ``write_all`` are for the fan-out. ``sample`` is offered (namespace, wire
    form) of each event in namespaces with ``record``; ``sent`` is for the fan-out too.
    ``routing``: rules that copy events into other rooms, if there are any.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        encoder: Encoder,
        *,
        peers: Peers,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        wake: Callable[[], None],
        sample: Callable[[str, bytes], None] | None = None,
        sent: Callable[[float], None] | None = None,
        routing: Routing | None = None,
    ) -> None:
        self._config = config
        self._engine = engine
        self._peers = peers
        self._monotonic = monotonic
        self._wall = wall
        self._sample = sample
        self._routing = routing
        self.encoder = encoder
        self.rooms: dict[str, Room] = {}
        self.fanout = FanOut(encoder, self._refused, wake, monotonic, sent)
        self.slow = SlowMembers(self.fanout, config.limits.outbox_bytes)
        self._idle: dict[Room, None] = {}
        self._openings: dict[str, Opening] = {}
        """Rooms that somebody is opening; some may be there already, opened by somebody faster."""
        self._roster = Roster(peers, self.rooms, self._openings)
        self.published = 0
        self.received = 0
        """Ephemeral events from other nodes and from backends, for rooms that are here."""

    # -- rooms ----------------------------------------------------------------

    def options(self, room: str) -> RoomOptions:
        """Options of the room's namespace."""
        return self._config.options(room)

    def retention(self, room: str) -> Retention:
        """How much of its past the engine keeps."""
        options = self._config.options(room)
        return Retention(options.history, options.history_ttl)

    def find(self, name: str) -> Room | None:
        """The room, if it is alive or can be made so without waiting.

        ``None``: its stream must first be opened, what it remembers be read, and
        its events from elsewhere arrive here; then call :meth:`obtain`, inside :meth:`opening`.
        """
        room = self.rooms.get(name)
        if room is not None or self._config.options(name).history:
            return room
        if name in self._openings or not self._peers.attached(name):
            return None
        return self.obtain(name, None)

    @contextmanager
    def opening(self, name: str) -> Iterator[None]:
        """While the caller opens the stream and attaches to the room: what is heard of it is kept.

        If nobody has made the room when the last who opens it is done, for
        whatever reason, stream and peers are told that nobody needs it.
        """
        opening = self._openings.get(name)
        if opening is None:
            opening = self._openings[name] = Opening(Room(name, self._config.options(name), None))
        opening.openers += 1
        try:
            yield
        finally:
            opening.openers -= 1
            if not opening.openers:
                del self._openings[name]
                if name not in self.rooms:
                    self._let_go(name)

    def obtain(
        self, name: str, position: Position | None, past: Iterable[Event] = (), seen: Iterable[Seen] = ()
    ) -> Room:
        """The room, made if need be, with its stream at ``position``.

        ``past`` refills the slots of a room with ``last_value``, ``seen`` what users have acknowledged.
        """
        room = self.rooms.get(name)
        if room is None:
            if len(self.rooms) >= self._config.limits.rooms:
                raise BrokerError(ErrorCode.LIMIT_EXCEEDED, "this node is full of rooms", room=name)
            opening = self._openings.get(name)
            room = opening.room if opening is not None else Room(name, self._config.options(name), None)
            self.rooms[name] = room
            room.position = position
            room.recall(past)
            room.seen.update((UserId(who), offset) for who, offset, _ in seen)
            self._rest(room)
        return room

    def _let_go(self, name: str) -> None:
        """Nobody here needs the room."""
        if self._config.options(name).history:
            self._engine.close(name)
        self._peers.detach(name)

    def needs_past(self, name: str) -> bool:
        """Whether :meth:`obtain` wants the stored events of ``name``, to know its slots again."""
        options = self._config.options(name)
        return bool(options.last_value and options.history)

    def top(self, room: Room) -> Position:
        """Newest position of a room with history."""
        assert room.position is not None
        return room.position

    # -- joining and leaving ----------------------------------------------------

    def join(self, sink: Sink, room: Room, filter_: Filter | None = None, *, watches: bool = False) -> Member:
        """Make ``sink`` a member that is not live yet; call :meth:`go_live` or drive a ``CatchUp``.

        Replaces an earlier membership and keeps its presence. What was
        published until now still goes to the earlier one.
        """
        self.fanout.settle(room)
        old = sink.memberships.get(room.name)
        member = Member(sink, room, filter_, watches, self._wall())
        if old is not None:
            member.joined_at, member.state, member.seen = old.joined_at, old.state, old.seen
            room.exit(old)
            self.fanout.hid_members.pop(old, None)
        elif sink.user is not None and room.position is not None:
            member.seen = min(room.seen.get(sink.user, 0), room.position.offset)
        room.enter(member)
        self._idle.pop(room, None)
        if old is None:
            self._roster.came(member)
        else:
            self._roster.came_again(member)
        return member

    def go_live(self, member: Member) -> None:
        """From now on the member gets every event; what is pending goes to the others first."""
        self.fanout.settle(member.room)
        member.room.make_live(member)

    def go_live_later(self, member: Member) -> None:
        """The member has more than the hub was given: it goes live when that has been delivered."""
        room = member.room
        if room.ahead is None:
            room.ahead = {}
        room.ahead[member] = None

    def _overtake(self, room: Room) -> None:
        ahead, room.ahead = room.ahead or {}, None
        for member in ahead:
            assert member.reached is not None
            if member.reached.offset <= self.top(room).offset:
                self.go_live(member)
            else:
                self.go_live_later(member)

    def send_slots(self, member: Member, up_to: int | None = None) -> None:
        """Send the newest event of every slot (up to an offset), as far as the filter lets them pass."""
        room = member.room
        if room.slots is None or not room.options.last_value:
            return
        for event in room.slots.values():
            if up_to is not None and event.offset > up_to:
                continue
            if member.filter is None or member.filter(event.tags):
                member.sink.post(event.wire)

    def leave(self, member: Member) -> None:
        """End a membership. One that has ended already is left alone."""
        room = member.room
        if member.sink.memberships.get(room.name) is not member:
            return
        room.exit(member)
        self.fanout.hid_members.pop(member, None)
        self._roster.went(member)
        if not room.members:
            self._rest(room)

    def leave_all(self, sink: Sink) -> None:
        """End every membership of a session that is gone."""
        for member in list(sink.memberships.values()):
            self.leave(member)

    def take_away(self, member: Member, code: ErrorCode) -> None:
        """End a membership against the session's will, and say so."""
        self.leave(member)
        member.sink.post(encode_op("left", room=member.room.name, code=code))

    def regroup(self, sink: Sink) -> None:
        """Encode for ``sink`` anew: its codec for some rooms has changed."""
        for member in sink.memberships.values():
            self.fanout.settle(member.room)  # which may find that it is too slow
            if member.group is not None:
                if member.group in self.fanout.hid_groups:
                    self.fanout.hid_members[member] = None
                member.room.set_apart(member, MemberState.CATCHING_UP)
                member.room.make_live(member)

    # -- publishing -------------------------------------------------------------

    def publish(self, event: Event, options: RoomOptions, done: Done | None = None) -> Copying | None:
        """Hand an event to everyone it is meant for, on all nodes; in a room with history once it is stored.

        ``options`` are those of the event's room, which the caller has at hand.

        ``done`` is called with the position, or with the error, once the event
        and its copies by the rules are stored; in an ephemeral room it is not
        called. There the copies are returned, and may be waited for.
        """
        if self._routing is not None:
            try:
                copies = self._routing.copies(event)
            except BrokerError as error:
                return self._refuse(error, options, done)
            if copies:
                return self._publish_with(copies, event, options, done or _ignore)
        self._publish(event, options, done)
        return None

    def _refuse(self, error: BrokerError, options: RoomOptions, done: Done | None) -> Copying | None:
        if not options.history:
            return Copying.refused(error)
        if done is not None:
            done(error)
        return None

    def _publish_with(
        self, copies: Sequence[Event], event: Event, options: RoomOptions, done: Done
    ) -> Copying | None:
        """The event, then its copies: there is none of an event that was not stored."""
        if not options.history:
            self._publish(event, options, None)
            return self._publish_copies(copies)

        def stored(outcome: Position | BrokerError) -> None:
            if isinstance(outcome, BrokerError):
                done(outcome)
            else:
                self._publish_copies(copies).then(lambda error: done(outcome if error is None else error))

        self._publish(event, options, stored)
        return None

    def _publish_copies(self, copies: Sequence[Event]) -> Copying:
        copying = Copying()
        for copy in copies:
            options = self._config.options(copy.room)
            if options.history:
                copying.expect()
            try:
                self._publish(copy, options, copying.stored)
            except BrokerError as error:  # of an ephemeral room, when the node is full of rooms
                copying.fail(error)
        copying.close()
        return copying

    def _publish(self, event: Event, options: RoomOptions, done: Done | None) -> None:
        self.published += 1
        if options.record and self._sample is not None:
            self._sample(event.room.partition(":")[0], event.body)
        if options.history:
            self._engine.publish(event, Retention(options.history, options.history_ttl), done or _ignore)
            return
        remember = event.slot is not None and options.last_value
        room = self.find(event.room) if remember else self.rooms.get(event.room)
        self._peers.relay(event, remember=options.history_ttl if remember else 0.0)
        if room is not None:
            self._pass_on(event, room)
        elif remember:
            self._keep_slot(event)

    def receive(self, events: Sequence[Event]) -> None:
        """Take ephemeral events from elsewhere. A room with history passes them on, and keeps none."""
        for event in events:
            room = self.rooms.get(event.room)
            if room is None:
                self._keep_slot(event)
                continue
            self.received += 1
            if room.position is None:
                self._pass_on(event, room)
            else:
                self._send_later(room, Passing(event, room.position))

    def _pass_on(self, event: Event, room: Room) -> None:
        """An ephemeral event, to who is here in an ephemeral room."""
        self._accept(room, event)
        if room.slots is not None:
            room.idle_since = self._monotonic()  # what was said last is remembered from now on

    def _keep_slot(self, event: Event) -> None:
        """The room is not here, but if it is being opened, what was read of its slots may be older."""
        opening = self._openings.get(event.room)
        if opening is not None and event.slot is not None:
            options = opening.room.options
            if options.last_value and not options.history:
                opening.room.remember(event)

    def deliver(self, events: Sequence[Event]) -> None:
        """Take stored events from the engine, in order per room."""
        for event in events:
            room = self.rooms.get(event.room)
            if room is None or event.position is None or room.position is None:
                continue
            if event.position.epoch != room.position.epoch:
                self._begin_again(room)
            elif event.position.offset <= room.position.offset:
                continue  # known already from when the room was opened
            elif event.position.offset > room.position.offset + 1:
                self.slow.break_off(room, "gap")
            room.position = event.position
            self._accept(room, event)
            if room.ahead:
                self._overtake(room)

    def moved(self, name: str, position: Position) -> None:
        """The engine's word that a room's stream is at ``position``, though no event says so."""
        room = self.rooms.get(name)
        if room is None or room.position is None:
            return
        if position.epoch != room.position.epoch:
            self._begin_again(room)
        elif position.offset > room.position.offset:
            self.slow.break_off(room, "gap")
        else:
            return
        room.position = position

    def _begin_again(self, room: Room) -> None:
        """The stream is another; what was known of the old one counts no more."""
        self.slow.break_off(room, "epoch")
        room.slots = None
        room.seen.clear()
        for member in room.everybody():
            if member.seen:
                member.seen = 0
                self._roster.changed(member)

    def _accept(self, room: Room, event: Event) -> None:
        if event.slot is not None and room.options.last_value:
            room.remember(event)
        self._send_later(room, event)

    def _send_later(self, room: Room, event: Event) -> None:
        if room.groups:
            room.pending.append(event)
            if not room.dirty:
                self.fanout.mark(room)
        else:
            room.sent += 1

    # -- slow members -----------------------------------------------------------

    def _refused(self, member: Member, events: list[Event], verdict: int) -> None:
        self.slow.refused(member, events, verdict)

    def resume(self, sink: Sink) -> None:
        """The backlog of ``sink`` is gone: tell it what it missed, and go on."""
        self.slow.resume(sink)

    def tell_lost(self, member: Member, reason: str) -> None:
        """Say that events are missing. With history nothing more comes until the next join."""
        self.slow.tell_lost(member, reason)

    # -- presence and acknowledgements ------------------------------------------

    def set_state(self, member: Member, state: dict[str, Any]) -> None:
        """Own presence state of a member."""
        member.state = state
        self._roster.changed(member)

    def introduce(self, member: Member) -> None:
        """Who the member is, or what its token shows of it, may have changed."""
        self._roster.introduced(member)

    def unwatch(self, member: Member) -> None:
        """Push no more presence to the member: it may not see it any longer."""
        member.watches = False
        member.room.watchers.pop(member, None)

    def acknowledge(self, member: Member, offset: int) -> None:
        """The member has seen everything up to ``offset``. Going back changes nothing."""
        room = member.room
        if room.position is None:
            raise BrokerError(ErrorCode.BAD_MESSAGE, "an ephemeral room has no offsets", room=room.name)
        if offset > room.position.offset:
            raise BrokerError(
                ErrorCode.BAD_MESSAGE,
                f"offset {offset} is beyond the room's {room.position.offset}",
                room=room.name,
            )
        if offset > member.seen:
            member.seen = offset
            if member.sink.user is not None:
                room.seen[member.sink.user] = offset
            who = member.sink.user if member.sink.user is not None else member.sink.id
            self._engine.acknowledge(room.name, who, offset, self._wall())
            self._roster.changed(member)

    # -- members on other nodes ---------------------------------------------------

    def know_mates(self, room: str, node: str, mates: Mapping[SessionId, Mate]) -> None:
        """``node`` has these members in ``room``, and no others."""
        self._roster.know(room, node, mates)

    def change_mates(
        self, room: str, node: str, came: Sequence[Mate], changed: Sequence[Mate], went: Sequence[SessionId]
    ) -> None:
        """What changed since the last word about ``node`` and ``room``."""
        self._roster.change(room, node, (*came, *changed), went)

    def part_mates(self, node: str) -> None:
        """``node`` drains: its members are shown until their users have come back, or it has gone."""
        self._roster.part(node)

    # -- sweeps, called by the clock --------------------------------------------

    def push_presence(self) -> None:
        """Tell watchers what changed since the last call."""
        self._roster.push()

    def push_positions(self) -> None:
        """Tell members from whom events were hidden how far they are. At most every 5 s."""
        fanout = self.fanout
        fanout.flush()
        groups, fanout.hid_groups = fanout.hid_groups, {}
        members, fanout.hid_members = fanout.hid_members, {}
        for group in groups:
            members.update(group.members)
        for member in members:
            if member.held is None:
                self._push_position(member)

    def _push_position(self, member: Member) -> None:
        position = member.room.position
        if position is not None and member.status is MemberState.LIVE:
            member.sink.post(encode_op("position", room=member.room.name, **position._asdict()))

    def sweep_idle(self) -> None:
        """Forget rooms that have been empty for a while."""
        now = self._monotonic()
        for room in list(self._idle):
            lingers = room.options.history_ttl if room.slots and not room.has_history else LINGER
            if now - room.idle_since >= lingers and not room.dirty and room.name not in self._openings:
                del self._idle[room]
                del self.rooms[room.name]
                self._let_go(room.name)

    def _rest(self, room: Room) -> None:
        room.idle_since = self._monotonic()
        self._idle[room] = None

    # -- for people -------------------------------------------------------------

    async def seen(self, room: str) -> list[Seen]:
        """Who has acknowledged how much of ``room``."""
        return await self._engine.acknowledgements(room)

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            "rooms": len(self.rooms),
            "published": self.published,
            "received": self.received,
            "deliveries": self.fanout.deliveries,
            "frames": self.fanout.frames,
            "batches": self.fanout.batches,
            "dropped": self.slow.dropped,
            "superseded": self.slow.superseded,
            "lost_told": self.slow.lost_told,
            "encodings_failed": self.fanout.encodings_failed,
            "fanout_faults": self.fanout.faults,
            "raw_bytes": self.encoder.raw_bytes,
            "encoded_bytes": self.encoder.encoded_bytes,
            **(self._routing.statistics() if self._routing is not None else NO_COPIES),
        }


def _ignore(outcome: Position | BrokerError) -> None:
    """For publishers that do not ask."""


__all__ = ["ALL_ROOM", "USER_PREFIX", "Hub"]
