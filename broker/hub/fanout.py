"""From pending events to every member's socket: the loop that must cost what `send` costs.

Theory. A publish appends to its room and marks the room dirty; nothing is sent
then. A *round* takes every dirty room, joins what is pending into one batch,
encodes it once for each group (codec, filter), and hands the same bytes object
to each member's socket. Messages posted to single sessions go out before the
rooms, or after them where they answer for events in them. While a round runs
new events gather for the next one, so batches grow with load and nothing waits
when idle; a room with a ``batch_window`` stays out of the rounds until that is
over, or until a member must be answered for what it published there.

A round is a generator that yields every ``CHUNK`` sends: the task that drives it
gives way there, and :meth:`FanOut.flush` drains it at once where order demands it
(a join while events are pending). Nothing here awaits a client; a member whose
outbox is full is handed to the room's policy.

``bench fanout`` measures this file against a C loop of ``send``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from math import inf

import structlog

from broker.hub.rooms import Group, Member, Room, Sendable, Sink, Snapshot, Verdict
from broker.protocol.codec import Codec, Encoder
from broker.protocol.events import Event
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
    ``wake`` when there is work and nobody drives a round yet or when :meth:`due`
    has come nearer, ``sent(ts)`` with the timestamp of an event in one batch of
    ``SAMPLE`` once it is sent. ``clock`` tells seconds; it times windows.

    The driver sleeps until it is woken or something is due, then calls
    :meth:`step` until that is false.
    """

    def __init__(
        self,
        encoder: Encoder,
        refused: Refused,
        wake: Callable[[], None],
        clock: Callable[[], float],
        sent: Callable[[float], None] | None = None,
    ) -> None:
        self._encoder = encoder
        self._refused = refused
        self._wake = wake
        self._clock = clock
        self._sent = sent
        self._dirty: list[Room] = []
        self._windows: list[tuple[float, int, Room]] = []
        """Heap of rooms that gather events: when their window ends, a number that decides ties."""
        self._windows_opened = 0
        self._posted: deque[Sink] = deque()
        self._waiting: list[Sink] = []
        # The round that runs: rooms to come, the room and batch it is at, whom to answer at its end.
        self._rooms: deque[Room] = deque()
        self._sending: tuple[Room, list[Event]] | None = None
        self._sealed: deque[Sink] = deque()
        self._round: Iterator[None] = self._rounds()
        self.in_round = False
        self.running = False
        """A round is executing further up the stack, so nobody may call :meth:`flush`."""
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
        """Batches that a fault of ours cut short."""

    # -- work comes in --------------------------------------------------------

    def mark(self, room: Room) -> None:
        """``room``, which was not dirty, has pending events."""
        room.dirty = True
        if room.options.batch_window:
            self._open_window(room)
            return
        self._dirty.append(room)
        if not (self.in_round or self.driven):
            self._wake()

    def _open_window(self, room: Room) -> None:
        due = self._clock() + room.options.batch_window
        sooner = due < self.due()
        self._windows_opened += 1
        heappush(self._windows, (due, self._windows_opened, room))
        if sooner:
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

    def due(self) -> float:
        """When the next window ends, by the clock; infinity when none is open."""
        return self._windows[0][0] if self._windows else inf

    def settle(self, room: Room) -> None:
        """Send what was published to ``room`` so far, all of it, before its membership changes.

        Else a member that comes now would stand in a group that has yet to get
        events from before it came.
        """
        if room.pending or (self._sending is not None and self._sending[0] is room):
            self.flush()

    def _end_windows(self, now: float) -> None:
        while self._windows and self._windows[0][0] <= now:
            self._dirty.append(heappop(self._windows)[2])

    def _cut_windows(self, waiting: list[Sink]) -> None:
        """End the windows of rooms whose events must precede an answer to one of ``waiting``."""
        kept = []
        for window in self._windows:
            room = window[2]
            if room.has_history and any(room.name in sink.memberships for sink in waiting):
                self._dirty.append(room)
            else:
                kept.append(window)
        heapify(kept)
        self._windows = kept

    def step(self) -> bool:
        """Do up to ``CHUNK`` sends; true while there is more."""
        assert not self.running, "a round cannot run inside a round"
        if self._windows:
            self._end_windows(self._clock())
        self.running = True
        try:
            next(self._round)
        except Exception:  # this batch is lost, and that is told; the rest must not be
            self.faults += 1
            log.exception("fault in the fan-out")
            self._round = self._rounds()
            self._give_up_batch()
        finally:
            self.running = False
        return self.busy

    def _give_up_batch(self) -> None:
        if self._sending is not None:
            room, events = self._sending
            self._sending = None
            for member in list(room.everybody()):
                self._refused(member, events, Verdict.SPOILED)

    def flush(self) -> None:
        """Send everything that is pending now, at once, whatever windows are open."""
        self._end_windows(inf)
        while self.busy:
            self.step()

    def _rounds(self) -> Iterator[None]:
        budget = CHUNK
        while True:
            self.in_round = True
            # One pass over what there is now: were rooms that get new events meanwhile served
            # again and again, a busy one would keep all answers waiting for as long as it is busy.
            self._seal_posts()
            self._flush_posts()
            self._rooms.extend(self._dirty)
            self._dirty.clear()
            while self._rooms:
                room = self._rooms.popleft()
                events, room.pending = room.pending, []
                room.dirty = False
                for piece in cut(events):
                    self._sending = room, piece
                    for sends in self._send(room, piece):
                        budget -= sends
                        if budget <= 0:
                            yield
                            budget = CHUNK
                            self._flush_posts()  # what was said meanwhile precedes what comes now
                self._sending = None
            while self._sealed:
                self._sealed.popleft().flush_posts(after_events=True)
            self.in_round = False
            yield
            budget = CHUNK

    def _seal_posts(self) -> None:
        waiting, self._waiting = self._waiting, []
        for sink in waiting:
            sink.seal_posts()
        if self._windows and waiting:
            self._cut_windows(waiting)
        self._sealed += waiting

    def _flush_posts(self) -> None:
        while self._posted:
            self._posted.popleft().flush_posts()

    def _send(self, room: Room, events: list[Event]) -> Iterator[int]:
        """Send one batch to the room; yields how many sends were done since the last yield."""
        room.turn += 1
        room.sent += len(events)
        for group in list(room.groups.values()):
            chosen = events if group.filter is None else [e for e in events if group.filter(e.tags)]
            if len(chosen) < len(events):
                self.hid_groups[group] = room
                if not chosen:
                    yield 1  # it was work, and a room may have thousands of such groups
                    continue
            members = group.snapshot()
            excluded = {event.exclude for event in chosen if event.exclude is not None}
            apart = [member for member in group.members if member.sink.id in excluded] if excluded else []
            if apart:
                members = Snapshot(member for member in group.members if member.sink.id not in excluded)
            if len(members):
                frame = self._encode(group, chosen, members)
                if frame is not None:
                    self.batches += 1
                    yield from self._send_frame(room, group, members, chosen, frame)
                    if self._sent is not None and self.batches % SAMPLE == 0:
                        self._sent(chosen[0].ts)
            for member in apart:
                yield self._send_own(group, member, chosen)

    def _send_frame(
        self, room: Room, group: Group, members: Snapshot, events: list[Event], frame: bytes
    ) -> Iterator[int]:
        """Send one frame to many, giving way in between."""
        current = group.snapshot()
        for position in range(0, len(members.behind), CHUNK):
            part = members.behind[position : position + CHUNK]
            self._write_careful(group, part, events, frame)
            yield len(part)
        count = len(members.direct)
        # In a large room start elsewhere each time, so that nobody is always last.
        start = room.turn * CHUNK % count if count > CHUNK else 0
        for position, end in _chunks(start, count):
            if group.snapshot() is not current:  # somebody came, went, or got a backlog meanwhile
                self._write_careful(group, members.direct[position:end], events, frame)
            else:
                whole = end - position == count
                self.frames += end - position
                self.deliveries += (end - position) * len(events)
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
                self.frames -= 1
                self.deliveries -= len(events)
                self._refused(member, events, verdict)

    def _write_careful(
        self, group: Group, members: Iterable[Member], events: list[Event], frame: bytes
    ) -> None:
        """The same for those who must be asked: who left meanwhile gets nothing."""
        for member in members:
            if member not in group.members:
                continue
            latest = member.room.options.slow == "latest"
            if latest and (member.held is not None or member.sink.backlogged):
                verdict: int = Verdict.FULL  # gets only the newest of each slot, later
            else:
                verdict = member.sink.write(frame)
            if verdict:
                self._refused(member, events, verdict)
            else:
                self.frames += 1
                self.deliveries += len(events)

    def _send_own(self, group: Group, member: Member, events: list[Event]) -> int:
        """Send its own selection to a session that asked for no echo of some events."""
        own = [event for event in events if event.exclude != member.sink.id]
        if member in group.members:
            self.hid_members[member] = None
            if own and (frame := self._encode(group, own, [member])) is not None:
                self._write_careful(group, [member], own, frame)
        return 1

    def _encode(self, group: Group, events: list[Event], members: Iterable[Member]) -> bytes | None:
        """The frame for ``members``, who are told when there is none."""
        frame = self.encode(group.codec, events)
        if frame is None:
            for member in members:
                self._refused(member, events, Verdict.SPOILED)
        return frame

    def encode(self, codec: Codec, events: list[Event]) -> bytes | None:
        """One frame with ``events``; ``None`` if it cannot be made, which the caller must tell as lost."""
        try:
            return self._encoder.encode(codec, batch([event.wire for event in events]))
        except Exception:  # one bad batch must not stop the fan-out
            self.encodings_failed += 1
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
