"""The newest events of one open room, in memory.

Owned by the embedded engine, which appends every stored event. It answers a
history query only if the answer is exactly what the store would say.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.engine.base import HistoryPage, HistoryQuery, Retention
from broker.engine.selection import select
from broker.protocol.events import Event, Position


class Ring:
    """Events ``top.offset - len + 1`` to ``top.offset`` of one stream.

    ``claimed`` tells whether somebody was handed the open room; the engine
    drops an unclaimed ring if whoever asked for it was cancelled.
    """

    __slots__ = ("_capacity", "_events", "_spill", "claimed", "retention", "top")

    def __init__(self, top: Position, retention: Retention, capacity: int) -> None:
        self.top = top
        self.retention = retention
        self.claimed = False
        self._capacity = capacity
        # A list that is cut once in a while: an empty one is 56 bytes, where an
        # empty deque is 760, and most open rooms are quiet.
        self._spill = capacity + max(capacity // 4, 16)
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._events)

    @property
    def newest(self) -> Event | None:
        """The event at ``top``, if it is here."""
        return self._events[-1] if self._events else None

    def append(self, event: Event) -> None:
        """Take the event after ``top``; it must be placed."""
        assert event.position is not None
        self.top = event.position
        events = self._events
        events.append(event)
        if len(events) > self._spill:
            del events[: len(events) - self._capacity]

    def restart(self, top: Position) -> None:
        """Forget everything: the stream goes on after ``top``, and what we have does not lead there."""
        self.top = top
        self._events.clear()

    def extend_left(self, older: Sequence[Event]) -> None:
        """Take events that were read from the store, as far as they touch ours and fit.

        So the second reader of a quiet room needs no disk.
        """
        space = self._capacity - len(self._events)
        first = self.top.offset - len(self._events) + 1
        fitting = [event for event in older if first - space <= event.offset < first]
        if fitting and fitting[-1].offset == first - 1:
            self._events[:0] = fitting

    def page(self, query: HistoryQuery, now: float) -> HistoryPage | None:
        """Answer ``query``, or ``None`` if older events than ours would matter."""
        events, top = self._events, self.top
        below = top.offset - len(events)  # the newest offset that is not ours
        expired = 0
        oldest = now - self.retention.ttl
        for event in events:
            if event.ts > oldest:
                break
            expired += 1
        size_floor = max(top.offset - self.retention.size, 0)
        floor = max(size_floor, below + expired)
        # The true floor lies below our first event, we cannot say where, unless
        # nothing older is kept at all.
        exact = expired > 0 or below <= size_floor

        def first_since(ts: float) -> int:
            for offset in range(floor + 1, top.offset + 1):
                if events[offset - below - 1].ts >= ts:
                    return offset
            return top.offset + 1

        chosen = select(query, top, floor, first_since)
        if not exact:
            if query.since is not None:
                if query.since.epoch == top.epoch and query.since.offset < below:
                    return None
            elif chosen.first <= below + 1:
                return None
        kept = events[chosen.first - below - 1 : chosen.last - below]
        return HistoryPage(kept, top, chosen.recovered, chosen.more)
