"""From pending events to every member's socket: the loop that must cost what `send` costs.

Theory. A publish appends to its room and marks the room dirty; nothing is sent
then. A *round* takes every dirty room, joins what is pending into one batch,
encodes it once for each group (codec, filter), and hands the same bytes object
to each member's socket; then it flushes the messages posted to single sessions.
While a round runs new events gather, so batches grow with load and nothing
waits when idle. A round is a generator that yields every ``CHUNK`` sends: the
task that drives it gives way there, and :meth:`FanOut.flush` drains it at once
where order demands it (a join while events are pending). Nothing here awaits a
client; a member whose outbox is full is handed to the room's policy.

``bench fanout`` measures this file against a C loop of ``send``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from broker.hub.rooms import Group, Member, Room, Sink, Verdict
from broker.protocol.codec import Encoder
from broker.protocol.events import Event, SessionId
from broker.protocol.messages import batch

CHUNK = 128
"""Sends between two chances for other tasks: about a millisecond."""
FRAME_BYTES = 64 * 1024
"""A batch is cut where its JSON passes this, so that one frame never fills an outbox."""

Refused = Callable[[Member, list[Event], int], None]
WriteAll = Callable[[Sequence[Member], bytes], Sequence[tuple[Member, int]]]
"""Hands one frame to each member's sink; returns those that did not take it, with their verdicts."""


def write_each(members: Sequence[Member], frame: bytes) -> list[tuple[Member, int]]:
    """What every :data:`WriteAll` means."""
    return [(member, verdict) for member in members if (verdict := member.sink.write(frame))]


class FanOut:
    """Drives rounds. ``refused(member, events, verdict)`` is called for each send not taken.

    ``wake`` is called when there is work and nobody drives a round yet.
    ``write_all`` is the hot loop, where the edge has one that is faster than :func:`write_each`.
    """

    def __init__(
        self,
        encoder: Encoder,
        refused: Refused,
        wake: Callable[[], None],
        write_all: WriteAll | None = None,
    ) -> None:
        self._encoder = encoder
        self._refused = refused
        self._wake = wake
        self._write_all = write_all or write_each
        self._dirty: list[Room] = []
        self._posted: list[Sink] = []
        self._round: Iterator[None] = self._rounds()
        self.in_round = False
        self.driven = False
        """Somebody will call :meth:`step` soon; no need to wake the fan-out task."""
        self.hid_groups: dict[Group, Room] = {}
        """Groups from which a filter hid events since they were last told a position."""
        self.hid_members: dict[Member, None] = {}
        """The same for members that asked for no echo, or got only the latest."""
        self.deliveries = 0
        """Events handed to sockets, counted per member."""
        self.frames = 0
        """Frames handed to sockets."""
        self.batches = 0
        self.encodings_failed = 0

    # -- work comes in --------------------------------------------------------

    def mark(self, room: Room) -> None:
        """``room`` has pending events."""
        if not room.dirty:
            room.dirty = True
            self._dirty.append(room)
            if not (self.in_round or self.driven):
                self._wake()

    def posted(self, sink: Sink) -> None:
        """``sink`` has posted messages; called once until they are flushed."""
        self._posted.append(sink)
        if not (self.in_round or self.driven):
            self._wake()

    # -- and goes out -----------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether something waits to be sent."""
        return self.in_round or bool(self._dirty) or bool(self._posted)

    def step(self) -> bool:
        """Do up to ``CHUNK`` sends; true while there is more."""
        next(self._round)
        return self.in_round or bool(self._dirty) or bool(self._posted)

    def flush(self) -> None:
        """Send everything that is pending now, at once."""
        while self.busy:
            next(self._round)

    def _rounds(self) -> Iterator[None]:
        budget = CHUNK
        while True:
            self.in_round = True
            while self._dirty:
                rooms, self._dirty = self._dirty, []
                for room in rooms:
                    events, room.pending = room.pending, []
                    room.dirty = False
                    for piece in cut(events):
                        for sends in self._send(room, piece):
                            budget -= sends
                            if budget <= 0:
                                yield
                                budget = CHUNK
            sinks, self._posted = self._posted, []
            for sink in sinks:
                sink.flush_posts()
            self.in_round = False
            yield
            budget = CHUNK

    def _send(self, room: Room, events: list[Event]) -> Iterator[int]:
        """Send one batch to the room; yields how many sends were done since the last yield."""
        room.turn += 1
        room.sent += len(events)
        for group in list(room.groups.values()):
            chosen = events if group.filter is None else [e for e in events if group.filter(e.tags)]
            if len(chosen) < len(events):
                self.hid_groups[group] = room
                if not chosen:
                    continue
            members = group.snapshot()
            excluded = {event.exclude for event in chosen if event.exclude is not None}
            if excluded:
                members = self._without(group, members, chosen, excluded)
            if not members:
                continue
            frame = self._encode(group, chosen)
            if frame is None:
                continue
            self.batches += 1
            if room.options.slow == "latest":
                yield from self._send_latest(members, chosen, frame)
            else:
                yield from self._send_frame(room, group, members, chosen, frame)

    def _send_frame(
        self, room: Room, group: Group, members: list[Member], events: list[Event], frame: bytes
    ) -> Iterator[int]:
        """Send one frame to many, giving way in between."""
        start = room.turn % len(members)
        if start and len(members) > 1:
            members = members[start:] + members[:start]
        self.frames += len(members)
        self.deliveries += len(members) * len(events)
        if len(members) <= CHUNK:
            for member, verdict in self._write_all(members, frame):
                self._refused(member, events, verdict)
            yield len(members)
            return
        rest = iter(members)
        current = group.snapshot()
        while part := list(islice(rest, CHUNK)):
            for member, verdict in self._write_all(part, frame):
                self._refused(member, events, verdict)
            yield len(part)
            if group.snapshot() is not current:  # somebody came or went while others ran
                current = group.snapshot()
                rest = iter([member for member in rest if member in group.members])

    def _send_latest(self, members: list[Member], events: list[Event], frame: bytes) -> Iterator[int]:
        """Policy ``latest``: who has a backlog gets only the newest of each slot, later."""
        for member in members:
            if member.held is not None or member.sink.backlogged:
                self._refused(member, events, Verdict.FULL)
            elif verdict := member.sink.write(frame):
                self._refused(member, events, verdict)
            else:
                self.frames += 1
                self.deliveries += len(events)
        yield len(members)

    def _without(
        self, group: Group, members: list[Member], events: list[Event], excluded: set[SessionId]
    ) -> list[Member]:
        """Send their own selection to sessions that asked for no echo; return the others."""
        apart = [member for member in members if member.sink.id in excluded]
        if not apart:
            return members
        for member in apart:
            own = [event for event in events if event.exclude != member.sink.id]
            self.hid_members[member] = None
            if own and (frame := self._encode(group, own)) is not None:
                self.frames += 1
                self.deliveries += len(own)
                if verdict := member.sink.write(frame):
                    self._refused(member, own, verdict)
        skip = set(apart)
        return [member for member in members if member not in skip]

    def _encode(self, group: Group, events: list[Event]) -> bytes | None:
        try:
            return self._encoder.encode(group.codec, batch([event.wire for event in events]))
        except Exception:  # one bad batch must not stop the fan-out; it is counted and told
            self.encodings_failed += 1
            for member in group.snapshot():
                self._refused(member, events, Verdict.SPOILED)
            return None


def cut(events: list[Event]) -> Iterator[list[Event]]:
    """``events`` in pieces whose JSON stays within ``FRAME_BYTES``, but at least one event each."""
    total = sum(len(event.wire) for event in events)
    if total <= FRAME_BYTES:
        if events:
            yield events
        return
    piece: list[Event] = []
    size = 0
    for event in events:
        if piece and size + len(event.wire) > FRAME_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(event)
        size += len(event.wire)
    yield piece
