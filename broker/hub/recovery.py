"""From a position in the past to live, without a race. Synchronous; the caller reads.

Theory. A member that joins a room with history somewhere in its past is first
*catching up*: it is a member, but stands in no group, so the fan-out does not
send to it. A cursor walks the stored stream page by page. The hub's own
position of the room is the last event it was given; whatever lies beyond it
will still come live. When the cursor meets that position, the pending events
are flushed to the others and the member enters its group, all in one
synchronous step, so that nothing can fall between, and nothing comes twice. No
buffer of live events is needed, because the store has them all.

A page may know more than the hub was given; the rest of it will come live. It
may know less, if it was read before the newest events; then the next one is
read. And the client may know more than the hub, if it was told by another node:
then it goes live when the hub has got there.

The caller drives it::

    while (query := catch_up.query()) is not None:
        frames = catch_up.feed(await engine.history(room, query, retention))
        ...write the frames, waiting for the socket between them...

and stops when :attr:`CatchUp.cancelled` (the session closed, left, or joined
again meanwhile). ``docs/recovery.md`` tells the same to users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING

from broker.engine.base import HistoryPage, HistoryQuery
from broker.hub.fanout import cut
from broker.hub.rooms import Member, MemberState
from broker.protocol.codec import Codec
from broker.protocol.events import Event, Position

if TYPE_CHECKING:
    from broker.hub.hub import Hub

PAGE = 256
"""Events read at once."""

Answer = Callable[[Position | None, bool], None]
"""Called once, before any event: sends the reply with (position, recovered). No position: ephemeral."""


class _Step(Enum):
    SINCE = auto()
    TAIL = auto()
    READ = auto()
    DONE = auto()


class CatchUp:
    """One member's way to live."""

    def __init__(
        self, hub: Hub, member: Member, *, since: Position | None, tail: int, answer: Answer
    ) -> None:
        self._hub = hub
        self._member = member
        self._since = since
        self._tail = tail
        self._answer = answer
        self._epoch = ""
        self._cursor = 0
        self._asked_at = 0
        self._hid = False
        self.answered = False
        """The reply is on its way; what goes wrong from now on is told as ``lost``."""
        self._step = _Step.SINCE if since is not None else _Step.TAIL if tail else _Step.DONE
        if self._step is _Step.DONE:
            self._begin(member.room.position, recovered=False)
            self._go_live()

    @property
    def cancelled(self) -> bool:
        """Whether the membership this works for is no longer the session's."""
        member = self._member
        return member.sink.memberships.get(member.room.name) is not member

    def query(self) -> HistoryQuery | None:
        """What to read next; ``None`` when the member is live, lost, or gone."""
        if self.cancelled or self._step is _Step.DONE:
            return None
        self._asked_at = self._hub.top(self._member.room).offset
        if self._step is _Step.SINCE:
            return HistoryQuery(limit=PAGE, since=self._since)
        if self._step is _Step.TAIL:
            return HistoryQuery(limit=self._tail, tail=self._tail)
        return HistoryQuery(limit=PAGE, since=Position(self._epoch, self._cursor))

    def feed(self, page: HistoryPage) -> Iterator[bytes]:
        """Take what was read; gives the frames to write now, in order.

        After the last frame is taken, :meth:`query` says how it goes on.
        """
        if self.cancelled:
            return
        position = self._hub.top(self._member.room)
        if self._step is _Step.SINCE and not self._take_since(page, position):
            return
        if self._step is _Step.TAIL:
            start = position
            if page.events and page.top.epoch == position.epoch:
                # More may have come since the page was read, or the hub be behind it.
                first = max(page.events[0].offset - 1, position.offset - self._tail)
                start = Position(position.epoch, min(first, position.offset))
            self._begin(start, recovered=False)
        yield from self._send(page, position)

    def give_up(self) -> None:
        """A frame was not taken: tell ``lost`` once the backlog is gone."""
        self._step = _Step.DONE
        self._member.status = MemberState.SUSPENDED
        self._member.sink.on_drained()

    def _take_since(self, page: HistoryPage, position: Position) -> bool:
        """Begin at the client's position if it can be recovered; false when something else must be read."""
        since = self._since
        assert since is not None
        if since.epoch == position.epoch:
            if page.recovered:
                self._begin(since, recovered=True)
                return True
            same = page.top.epoch == since.epoch
            if same and self._asked_at <= page.top.offset < since.offset <= position.offset:
                return False  # read before the event that the client saw last: read again
        self._step = _Step.TAIL if self._tail else _Step.DONE
        if self._step is _Step.DONE:
            self._begin(position, recovered=False)
            self._go_live()
        return False

    def _begin(self, start: Position | None, *, recovered: bool) -> None:
        """Answer the join; events after ``start`` follow."""
        self.answered = True
        here = self._member.room.position
        if recovered and start is not None and here is not None and start.offset > here.offset:
            here = start  # another node told it more than this one was given: live begins after that
        self._answer(here, recovered)
        if not recovered:
            self._hub.send_slots(self._member, start.offset if start is not None else None)
        if start is not None:
            self._epoch = start.epoch
            self._advance(start.offset)
            self._step = _Step.READ

    def _advance(self, offset: int) -> None:
        self._cursor = offset
        self._member.reached = Position(self._epoch, offset)

    def _send(self, page: HistoryPage, position: Position) -> Iterator[bytes]:
        behind = self._cursor < position.offset
        if position.epoch != self._epoch or (behind and page.top.epoch != self._epoch):
            return self._lose("epoch")
        # What the hub has not been given yet will come live.
        events = [event for event in page.events if self._cursor < event.offset <= position.offset]
        if behind and (not events or events[0].offset != self._cursor + 1):
            if self._cursor < page.top.offset:
                return self._lose("trimmed")
            # A page read before the newest events; but it must know those that had come when we asked.
            return self._lose("gap") if page.top.offset < self._asked_at else None
        for piece in cut(events):
            wanted = self._wanted(piece)
            if wanted:
                frame = self._hub.fanout.encode(self._codec(), wanted)
                if frame is None:
                    return self._lose("gap")
                yield frame
                if self.cancelled:
                    return None
            self._advance(piece[-1].offset)
            if self._hub.top(self._member.room).epoch != self._epoch:
                return self._lose("epoch")  # replaced while the frame was written
        if self._cursor >= self._hub.top(self._member.room).offset:
            self._go_live()
        return None

    def _wanted(self, events: list[Event]) -> list[Event]:
        filter_, session = self._member.filter, self._member.sink.id
        wanted = [
            event for event in events if event.exclude != session and (filter_ is None or filter_(event.tags))
        ]
        self._hid = self._hid or len(wanted) < len(events)
        return wanted

    def _codec(self) -> Codec:
        return self._member.sink.codec_for(self._member.room.name)

    def _go_live(self) -> None:
        self._step = _Step.DONE
        member = self._member
        if member.room.position is not None and self._cursor > member.room.position.offset:
            self._hub.go_live_later(member)
            return
        self._hub.go_live(member)
        if self._hid:
            self._hub.fanout.hid_members[member] = None

    def _lose(self, reason: str) -> None:
        self._step = _Step.DONE
        self._member.status = MemberState.SUSPENDED
        self._hub.tell_lost(self._member, reason)
