"""Stored events on their way to the hub: from answers and messages, in order per room.

Everything that may be delivered comes through here, and leaves in the order in
which it came to be known: events gather in ``passed``, the answers to their
publishers behind them, and :meth:`Delivery.flush` hands over both, events
first. Synchronous; nothing here waits, so nothing interleaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import trio

from broker.engine.base import Deliver, Done, Moved
from broker.engine.batch import unavailable
from broker.engine.open_rooms import OpenRooms
from broker.errors import BrokerError
from broker.link.wire import Head
from broker.logs import Throttle, get_logger
from broker.protocol.events import Event, Position
from broker.streams.generation import Generation
from broker.streams.past import Chunk, place
from broker.streams.scripts import StreamKeys
from broker.streams.sequencer import Sequencer

log = get_logger(__name__)

GRACE: Final = 0.05
"""How old a hole must be before it is filled from the stream (s): answers and messages come on two
connections, so short holes are usual, and most close by themselves."""

LATE: Final = 0.5
"""How long the publisher of a stored event waits for what stands before it (s). Publishers must hear
within 2 s, and filling a hole may take longer when Redis goes away just then."""

HELD: Final = 256
"""Messages kept for a room that is being opened; what is beyond is read from the stream."""


BEHIND: Final = "stored, but what stands before it cannot be read now"


class Stream:
    """One open room."""

    __slots__ = ("keys", "refresh_at", "repairing", "room", "sequencer", "suspect", "ttl", "waiting")

    def __init__(self, room: str, keys: StreamKeys, top: Position, ttl: float) -> None:
        self.room = room
        self.keys = keys
        self.ttl = ttl
        self.sequencer = Sequencer(top)
        self.waiting: list[tuple[Position, Done, float]] = []
        """Publishers whose event is stored and has not passed yet, and since when (Trio's clock)."""
        self.refresh_at = 0.0
        """When the names of the room must next be kept from expiring (Trio's clock)."""
        self.suspect = False
        """Whether it must be compared with the store even if no event is known to be missing."""
        self.repairing = False


class Delivery:
    """The open rooms' streams. ``origin`` is what messages of this node carry.

    ``repair(stream, at)`` asks for a look at the stream in the store at a Trio
    time, ``strange()`` says that an event of another generation came, ``failed``
    takes what a callback raised.
    """

    def __init__(
        self,
        rooms: OpenRooms,
        generation: Generation,
        origin: str,
        *,
        repair: Callable[[Stream, float], None],
        strange: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._rooms = rooms
        self._generation = generation
        self._origin = origin
        self.repair = repair
        self._strange = strange
        self._failed = failed
        self._throttle = Throttle()
        self._passed: list[Event] = []
        self._answers: list[tuple[Done, Position | BrokerError]] = []
        self._held: dict[str, list[Head]] = {}
        self.streams: dict[str, Stream] = {}
        self._waiting: dict[Stream, None] = {}
        """Streams that had publishers waiting when they were looked at last."""
        self.late = 0
        self.deliver: Deliver
        self.moved: Moved
        self.batches = 0
        self.largest_batch = 0
        self.received = 0
        self.known = 0
        self.bad_messages = 0
        self.moves = 0

    # -- rooms ------------------------------------------------------------------------

    def hold(self, room: str) -> None:
        """The room is being opened: keep its messages until :meth:`begin`."""
        self._held[room] = []

    def release(self, room: str) -> None:
        """It was not opened."""
        self._held.pop(room, None)

    def begin(self, stream: Stream, ready: Callable[[], None]) -> None:
        """The room is open. ``ready`` is called once everything up to its top has been delivered."""
        self.flush()
        held = self._held.pop(stream.room, [])
        self.streams[stream.room] = stream
        ready()
        if self.streams.get(stream.room) is not stream:
            return  # nobody waits for it any more
        now = trio.current_time()
        for head in held:
            self._hear(stream, head, now)
        if len(held) >= HELD:
            self.suspect(stream, now)
        self.flush()

    def end(self, room: str) -> None:
        """The room is closed: nobody here waits for its events."""
        stream = self.streams.pop(room, None)
        if stream is not None and stream.waiting:
            self._answers += [(done, position) for position, done, _ in stream.waiting]
            self.flush()

    # -- what comes in ------------------------------------------------------------------

    def take(self, messages: Sequence[tuple[str, Head]]) -> None:
        """Take messages about stored events, in the order in which they were read."""
        now = trio.current_time()
        streams, held = self.streams, self._held
        self.received += len(messages)
        for room, head in messages:
            stream = streams.get(room)
            if stream is not None:
                self._hear(stream, head, now)
            elif held and (waiting := held.get(room)) is not None and len(waiting) < HELD:
                waiting.append(head)
        if self._passed or self._answers:
            self.flush()

    def _hear(self, stream: Stream, head: Head, now: float) -> None:
        """One message."""
        try:
            epoch, number, exclude, commits, mark, origin = head.words
            offset = int(number)
            if not self._generation.heard(epoch, int(commits), mark):
                self._strange()
        except ValueError as error:
            self._refuse(stream, error)
            return
        sequencer = stream.sequencer
        if epoch != sequencer.epoch:
            self._foreign(stream, epoch, now)
            return
        if offset <= sequencer.offset or offset in sequencer.ahead:
            self.known += 1
            return
        if origin == self._origin:
            # Its answer brings the event itself, in the order of the calls.
            self.known += 1
            self._expect(stream, offset, now)
            return
        try:
            event = place(
                stream.room, head.body, Position(epoch, offset), None if exclude == "-" else exclude
            )
        except msgspec.MsgspecError as error:
            self._refuse(stream, error)
            return
        self._offer(stream, event, now)

    def _offer(self, stream: Stream, event: Event, now: float) -> None:
        sequencer = stream.sequencer
        whole = sequencer.hole_since is None
        sequencer.offer(event, now, self._passed)
        if whole and sequencer.hole_since is not None:
            self.repair(stream, now + GRACE)
        if stream.waiting:
            self._let_go(stream)

    def _expect(self, stream: Stream, offset: int, now: float) -> None:
        """There is such an event, and it will come by another way."""
        if stream.sequencer.hole_since is None:
            self.repair(stream, now + GRACE)
        stream.sequencer.expect(offset, now)

    def _foreign(self, stream: Stream, epoch: str, now: float) -> None:
        """An event of another epoch: a latecomer of an old one, or news that the store must explain."""
        if stream.sequencer.is_retired(epoch):
            self.known += 1
        else:
            self.suspect(stream, now)

    def suspect(self, stream: Stream, now: float) -> None:
        """Have the stream compared with the store at once."""
        stream.suspect = True
        self.repair(stream, now)

    def _refuse(self, stream: Stream, error: Exception) -> None:
        self.bad_messages += 1
        if (missed := self._throttle.admit(stream.room)) is not None:
            log.error("a message cannot be read", room=stream.room, error=str(error), suppressed=missed)

    # -- what was published here -----------------------------------------------------------

    def stored(self, event: Event, position: Position, done: Done, *, again: bool) -> None:
        """An event of this node is stored; ``again``: it had been before. Call :meth:`flush` soon."""
        stream = self.streams.get(event.room)
        if not again:
            event.place(position)
        if stream is None:
            if not again:
                self._passed.append(event)
            self._answers.append((done, position))
            return
        sequencer = stream.sequencer
        if position.epoch != sequencer.epoch:
            if again or sequencer.is_retired(position.epoch):
                self._answers.append((done, position))
                return
            now = trio.current_time()
            self._wait(stream, position, done, now)
            self.suspect(stream, now)
        elif position.offset <= sequencer.offset:
            self._answers.append((done, position))
        else:
            now = trio.current_time()
            self._wait(stream, position, done, now)
            if not again:
                self._offer(stream, event, now)
            else:
                self._expect(stream, position.offset, now)

    def _wait(self, stream: Stream, position: Position, done: Done, now: float) -> None:
        stream.waiting.append((position, done, now))
        self._waiting[stream] = None

    def answer_late(self, now: float) -> None:
        """Tell those who have waited for too long that it is not known when their event will pass."""
        for stream in list(self._waiting):
            still = []
            for position, done, since in stream.waiting:
                if now - since < LATE:
                    still.append((position, done, since))
                else:
                    self.late += 1
                    self._answers.append((done, unavailable(BEHIND, stream.room)))
            stream.waiting = still
            if not still:
                del self._waiting[stream]
        self.flush()

    def answer(self, done: Done, error: BrokerError) -> None:
        """An event is not stored. Call :meth:`flush` soon."""
        self._answers.append((done, error))

    def _let_go(self, stream: Stream) -> None:
        """Answer those whose event has passed, or will never."""
        sequencer = stream.sequencer
        still = []
        for position, done, since in stream.waiting:
            if position.epoch == sequencer.epoch:
                passed = position.offset <= sequencer.offset
            else:
                passed = sequencer.is_retired(position.epoch)
            if passed:
                self._answers.append((done, position))
            else:
                still.append((position, done, since))
        stream.waiting = still

    # -- what was read --------------------------------------------------------------------

    def fill(self, stream: Stream, chunk: Chunk) -> int:
        """Take what was read of the stream's own epoch; how many events were missing."""
        now = trio.current_time()
        sequencer = stream.sequencer
        filled = 0
        for event in chunk.page.events:
            if event.offset > sequencer.offset + 1:
                self._skip(stream, event.offset - 1, now)
            if event.offset > sequencer.offset:
                filled += 1
                sequencer.offer(event, now, self._passed)
        self._skip(stream, chunk.reached if chunk.page.more else chunk.page.top.offset, now)
        self._let_go(stream)
        self.flush()
        return filled

    def _skip(self, stream: Stream, offset: int, now: float) -> None:
        """What there was up to ``offset`` cannot be had any more."""
        sequencer = stream.sequencer
        if offset <= sequencer.offset:
            return
        self.flush()
        self._jump(stream, Position(sequencer.epoch, offset))
        sequencer.skip(offset, now, self._passed)

    def move(self, stream: Stream, top: Position) -> None:
        """The stream has another epoch."""
        self.flush()
        stream.sequencer.restart(top)
        self._jump(stream, top)
        self._let_go(stream)
        self.flush()

    def _jump(self, stream: Stream, position: Position) -> None:
        self.moves += 1
        log.warning(
            "a room's stream has moved", room=stream.room, epoch=position.epoch, offset=position.offset
        )
        ring = self._rooms.get(stream.room)
        if ring is not None:
            ring.restart(position)
        self._call(self.moved, stream.room, position)

    # -- out ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Deliver what has passed, then answer."""
        while self._passed or self._answers:
            events, self._passed = self._passed, []
            answers, self._answers = self._answers, []
            if events:
                self.batches += 1
                self.largest_batch = max(self.largest_batch, len(events))
                self._rooms.append(events)
                self._call(self.deliver, events)
            for done, outcome in answers:
                self._call(done, outcome)

    def _call(self, callback: Callable[..., Any], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception as error:  # a bug of the hub; the others get what is theirs before it is raised
            self._failed(error)
