"""From pending events to every member's socket: the loop that must cost what `send` costs.

Theory. A publish appends to its room and marks the room dirty; nothing is sent
then. A *round* takes every dirty room, joins what is pending into one batch,
encodes it once for each group (codec, filter), and hands the same bytes object
to each member's socket. Messages posted to single sessions go out before the
rooms, or after them where they answer for events in them.
While a round runs new events gather, so batches grow with load and nothing
waits when idle. A round is a generator that yields every ``CHUNK`` sends: the
task that drives it gives way there, and :meth:`FanOut.flush` drains it at once
where order demands it (a join while events are pending). Nothing here awaits a
client; a member whose outbox is full is handed to the room's policy.

``bench fanout`` measures this file against a C loop of ``send``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog

from broker.hub.rooms import Group, Member, Room, Sendable, Sink, Snapshot, Verdict
from broker.protocol.codec import Encoder
from broker.protocol.events import Event, SessionId
from broker.protocol.messages import batch

log = structlog.get_logger(__name__)

CHUNK = 256
"""Sends between two chances for other tasks: between one and two milliseconds."""
SAMPLE = 16
"""One batch in so many has its latency measured."""
FRAME_BYTES = 64 * 1024
"""A batch is cut where its JSON passes this, so that one frame never fills an outbox."""

Refused = Callable[[Member, list[Event], int], None]


def send_all(sockets: Sequence[Sendable], frame: bytes) -> list[tuple[Sendable, int]]:
    """Send ``frame`` to each socket: the hottest loop there is.

    Returns those that took less, with the bytes they took, -1 for an error.
    """
    short: list[tuple[Sendable, int]] = []
    size = len(frame)
    for socket in sockets:
        try:
            sent = socket.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = -1
        if sent != size:
            short.append((socket, sent))
    return short


class FanOut:
    """Drives rounds.

    ``refused(member, events, verdict)`` is called for each send not taken,
    ``wake`` when there is work and nobody drives a round yet, ``sent(ts)`` with
    the timestamp of an event in one batch of ``SAMPLE`` once it is sent.
    """

    def __init__(
        self,
        encoder: Encoder,
        refused: Refused,
        wake: Callable[[], None],
        sent: Callable[[float], None] | None = None,
    ) -> None:
        self._encoder = encoder
        self._refused = refused
        self._wake = wake
        self._sent = sent
        self._dirty: list[Room] = []
        self._posted: list[Sink] = []
        self._waiting: list[Sink] = []
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
        self.faults = 0
        """Rounds that a fault of ours cut short."""

    # -- work comes in --------------------------------------------------------

    def mark(self, room: Room) -> None:
        """``room`` has pending events."""
        if not room.dirty:
            room.dirty = True
            self._dirty.append(room)
            if not (self.in_round or self.driven):
                self._wake()

    def posted(self, sink: Sink, *, after_events: bool) -> None:
        """``sink`` has posted messages, to be flushed before the rooms are served, or after them."""
        (self._waiting if after_events else self._posted).append(sink)
        if not (self.in_round or self.driven):
            self._wake()

    # -- and goes out -----------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether something waits to be sent."""
        return self.in_round or bool(self._dirty or self._posted or self._waiting)

    def step(self) -> bool:
        """Do up to ``CHUNK`` sends; true while there is more."""
        try:
            next(self._round)
        except Exception:  # the rest of this round is lost; the next one must not be
            self.faults += 1
            log.exception("fault in the fan-out")
            self._round = self._rounds()
            self.in_round = False
        return self.busy

    def flush(self) -> None:
        """Send everything that is pending now, at once."""
        while self.busy:
            self.step()

    def _rounds(self) -> Iterator[None]:
        budget = CHUNK
        while True:
            self.in_round = True
            self._flush_posts()
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
                                self._flush_posts()  # what was said meanwhile precedes what comes now
            sinks, self._waiting = self._waiting, []
            for sink in sinks:
                sink.flush_posts(after_events=True)
            self.in_round = False
            yield
            budget = CHUNK

    def _flush_posts(self) -> None:
        while self._posted:
            sinks, self._posted = self._posted, []
            for sink in sinks:
                sink.flush_posts()

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
            if not len(members):
                continue
            frame = self._encode(group, chosen)
            if frame is None:
                continue
            self.batches += 1
            yield from self._send_frame(room, group, members, chosen, frame)
            if self._sent is not None and self.batches % SAMPLE == 0:
                self._sent(chosen[0].ts)

    def _send_frame(
        self, room: Room, group: Group, members: Snapshot, events: list[Event], frame: bytes
    ) -> Iterator[int]:
        """Send one frame to many, giving way in between."""
        self.frames += len(members)
        self.deliveries += len(members) * len(events)
        current = group.snapshot()
        latest = room.options.slow == "latest"
        for member in members.behind:
            if latest:  # who has a backlog gets only the newest of each slot, later
                self._refused(member, events, Verdict.FULL)
            elif verdict := member.sink.write(frame):
                self._refused(member, events, verdict)
        if members.behind:
            yield len(members.behind)
        count = len(members.direct)
        # In a large room start elsewhere each time, so that nobody is always last.
        start = room.turn * CHUNK % count if count > CHUNK else 0
        for position, end in _chunks(start, count):
            if group.snapshot() is not current:  # somebody came, went, or got a backlog meanwhile
                self._write_careful(group, members.direct[position:end], events, frame, latest=latest)
            else:
                whole = end - position == count
                short = send_all(members.sockets if whole else members.sockets[position:end], frame)
                if short:
                    self._see_to(members, short, events, frame)
            yield end - position

    def _see_to(
        self, members: Snapshot, short: list[tuple[Sendable, int]], events: list[Event], frame: bytes
    ) -> None:
        by_socket = dict(zip(map(id, members.sockets), members.direct, strict=True))
        for socket, size in short:
            member = by_socket[id(socket)]
            if verdict := member.sink.sent(frame, size):
                self._refused(member, events, verdict)

    def _write_careful(
        self, group: Group, members: list[Member], events: list[Event], frame: bytes, *, latest: bool
    ) -> None:
        """The same for members of an outdated snapshot: who left gets nothing."""
        for member in members:
            if member not in group.members:
                continue
            if latest and member.sink.backlogged:
                self._refused(member, events, Verdict.FULL)
            elif verdict := member.sink.write(frame):
                self._refused(member, events, verdict)

    def _without(
        self, group: Group, members: Snapshot, events: list[Event], excluded: set[SessionId]
    ) -> Snapshot:
        """Send their own selection to sessions that asked for no echo; return the others."""
        apart = {member: None for member in group.members if member.sink.id in excluded}
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
        return Snapshot(member for member in group.members if member not in apart)

    def _encode(self, group: Group, events: list[Event]) -> bytes | None:
        try:
            return self._encoder.encode(group.codec, batch([event.wire for event in events]))
        except Exception:  # one bad batch must not stop the fan-out; it is counted and told
            self.encodings_failed += 1
            for member in list(group.members):
                self._refused(member, events, Verdict.SPOILED)
            return None


def _chunks(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Slices of at most ``CHUNK`` that cover ``count`` places once, beginning at ``start``."""
    for low, high in ((start, count), (0, start)):
        for position in range(low, high, CHUNK):
            yield position, min(position + CHUNK, high)


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
