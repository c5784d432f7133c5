"""The rooms that the hub holds open, each with its ring.

Belongs to the Trio thread: what stands here has been delivered. Opening asks
the writer once, however many wait for it; a room that nobody waits for any
more when the answer comes is closed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from broker.engine.base import Retention
from broker.engine.batch import Close, Open, Request, unavailable
from broker.engine.ring import Ring
from broker.protocol.events import Event, Position


class _Opening:
    """A room that is being opened, and how many wait for it."""

    __slots__ = ("done", "failure", "waiters")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.failure: str | None = None
        self.waiters = 0


class OpenRooms:
    """Rings by room.

    ``request(request, urgent)`` hands something to the writer, or raises ``unavailable``.
    """

    def __init__(self, ring_events: int, request: Callable[[Request, bool], None]) -> None:
        self._ring_events = ring_events
        self._request = request
        self._rings: dict[str, Ring] = {}
        self._opening: dict[str, _Opening] = {}

    def __len__(self) -> int:
        return len(self._rings)

    @property
    def events(self) -> int:
        """Events in all rings together."""
        return sum(map(len, self._rings.values()))

    def get(self, room: str) -> Ring | None:
        """The ring of an open room."""
        return self._rings.get(room)

    def append(self, events: Sequence[Event]) -> None:
        """Take events that are about to be delivered."""
        rings = self._rings
        for event in events:
            ring = rings.get(event.room)
            if ring is not None:
                ring.append(event)

    def clear(self) -> None:
        """Forget all rooms; the engine has ended."""
        self._rings.clear()

    async def open(self, room: str, retention: Retention) -> Ring:
        """Return the room's ring, opened if need be. Raises ``unavailable``."""
        while True:
            ring = self._rings.get(room)
            if ring is not None:
                ring.claimed = True
                ring.retention = retention
                return ring
            await self._wait(room, self._opening.get(room) or self._start(room, retention))

    def close(self, room: str) -> None:
        """Drop the ring. Unknown rooms are ignored."""
        if self._rings.pop(room, None) is not None:
            # No hurry: this only lets the room vanish one day.
            self._request(Close(room), False)

    async def _wait(self, room: str, opening: _Opening) -> None:
        opening.waiters += 1
        try:
            await opening.done.wait()
        except trio.Cancelled:
            opening.waiters -= 1
            # It may have been opened between the cancellation and now. Others
            # who wait for it will find it gone, and open it again.
            ring = self._rings.get(room)
            if opening.done.is_set() and ring is not None and not ring.claimed:
                self.close(room)
            raise
        if opening.failure is not None:
            raise unavailable(opening.failure, room)

    def _start(self, room: str, retention: Retention) -> _Opening:
        opening = _Opening()

        def finished(top: Position | None, failure: str | None) -> None:
            del self._opening[room]
            opening.failure = failure
            opening.done.set()
            if top is None:
                return
            self._rings[room] = Ring(top, retention, self._ring_events)
            if not opening.waiters:
                self.close(room)

        self._request(Open(room, retention, finished, keep=True), True)
        self._opening[room] = opening
        return opening
