"""From a position in the past to live, without a race. Synchronous; the caller reads.

Theory. A member that joins a room with history somewhere in its past is first
*catching up*: it is a member, but stands in no group, so the fan-out does not
send to it. A cursor walks the stored stream page by page. The hub's own
position of the room is the last event it was given; whatever lies beyond it
will still come live. When the cursor meets that position, the pending events
are flushed to the others and the member enters its group, all in one
synchronous step, so that nothing can fall between, and nothing comes twice. No
buffer of live events is needed, because the store has them all.

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
from broker.protocol.events import Event, Position
from broker.protocol.messages import batch

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
        if self._step is _Step.SINCE:
            assert self._since is not None
            if page.recovered and self._since.epoch == position.epoch:
                self._begin(Position(position.epoch, self._since.offset), recovered=True)
            else:
                self._step = _Step.TAIL if self._tail else _Step.DONE
                if self._step is _Step.DONE:
                    self._begin(position, recovered=False)
                    self._go_live()
                return
        elif self._step is _Step.TAIL:
            first = page.events[0].offset - 1 if page.events else position.offset
            self._begin(Position(position.epoch, first), recovered=False)
        yield from self._send(page, position)

    def give_up(self) -> None:
        """A frame was not taken: tell ``lost`` once the backlog is gone."""
        self._step = _Step.DONE
        self._member.status = MemberState.SUSPENDED
        self._member.sink.on_drained()

    def _begin(self, start: Position | None, *, recovered: bool) -> None:
        """Answer the join; events after ``start`` follow."""
        self.answered = True
        self._answer(self._member.room.position, recovered)
        if not recovered:
            self._hub.send_slots(self._member, start.offset if start is not None else None)
        if start is not None:
            self._epoch = start.epoch
            self._cursor = self._member.offset = start.offset
            self._step = _Step.READ

    def _send(self, page: HistoryPage, position: Position) -> Iterator[bytes]:
        if position.epoch != self._epoch or page.top.epoch != self._epoch:
            return self._lose("epoch")
        # What the hub has not been given yet will come live.
        events = [event for event in page.events if self._cursor < event.offset <= position.offset]
        if events and events[0].offset != self._cursor + 1:
            return self._lose("trimmed")
        if not events and self._cursor < min(position.offset, page.top.offset):
            return self._lose("trimmed")  # where the page is merely older than the position, read again
        for piece in cut(events):
            frame = self._frame(piece)
            if frame is not None:
                yield frame
                if self.cancelled:
                    return None
            self._cursor = self._member.offset = piece[-1].offset
        if self._cursor >= self._hub.top(self._member.room).offset:
            self._go_live()
        return None

    def _frame(self, events: list[Event]) -> bytes | None:
        member = self._member
        wanted = [event for event in events if member.filter is None or member.filter(event.tags)]
        if not wanted:
            return None
        payload = batch([event.wire for event in wanted])
        return self._hub.encoder.encode(member.sink.codec_for(member.room.name), payload)

    def _go_live(self) -> None:
        self._step = _Step.DONE
        self._hub.go_live(self._member)

    def _lose(self, reason: str) -> None:
        self._step = _Step.DONE
        self._member.status = MemberState.SUSPENDED
        self._member.offset = self._cursor
        self._hub.tell_lost(self._member, reason)
