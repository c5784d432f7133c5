"""Filling holes: what did not come by a message is read from the stream.

Rooms ask to be looked at, at once or in a moment; many looks run at a time, but
only one for each room. A look ends when the stream says that there is no more,
so what comes while it runs is either a message of the room's epoch, or in the
next read.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from broker.link.base import LinkError
from broker.logs import Throttle, get_logger
from broker.streams.delivery import GRACE, Delivery, Stream
from broker.streams.past import Past

log = get_logger(__name__)

PAGE: Final = 256
"""Events read at once."""

AT_ONCE: Final = 16
"""Rooms read at a time; the answers share a connection with publishes, which must not wait long."""

AGAIN: Final = 0.5
"""After a read that failed (s)."""


class Repairs:
    """Streams that want to be compared with the store.

    ``lost(stream, epoch)`` is called for one whose stored events end before
    what was delivered of ``epoch``.
    """

    def __init__(
        self, delivery: Delivery, past: Past, lost: Callable[[Stream, str], Awaitable[None]]
    ) -> None:
        self._delivery = delivery
        self._past = past
        self._lost = lost
        self._due: dict[Stream, float] = {}
        self._next = math.inf
        self._wake = trio.Event()
        self._limiter = trio.CapacityLimiter(AT_ONCE)
        self._throttle = Throttle()
        self.holes = 0
        """Holes that did not close by themselves."""
        self.repairs = 0
        self.repaired_events = 0
        self.failed_repairs = 0

    def want(self, stream: Stream, at: float) -> None:
        """Look at the stream at ``at`` (Trio's clock), or before."""
        if at < self._due.get(stream, math.inf):
            self._due[stream] = at
            if at < self._next:
                self._next = at
                self._wake.set()

    def clear(self) -> None:
        """Forget what was wanted."""
        self._due.clear()
        self._next = math.inf

    async def run(self) -> None:
        """Repair until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_at(self._next):
                    await self._wake.wait()
                self._wake = trio.Event()
                now = trio.current_time()
                due = [stream for stream, at in self._due.items() if at <= now]
                for stream in due:
                    del self._due[stream]
                    since = stream.sequencer.hole_since
                    if stream.repairing or (not stream.suspect and since is not None and since + GRACE > now):
                        self._due[stream] = now + GRACE
                    elif stream.suspect or since is not None:
                        self.holes += since is not None
                        stream.suspect = False
                        stream.repairing = True
                        nursery.start_soon(self._repair, stream)
                    # Else the hole has closed by itself, as most do.
                self._next = min(self._due.values(), default=math.inf)

    async def _repair(self, stream: Stream) -> None:
        try:
            async with self._limiter:
                await self._read(stream)
        except LinkError as error:
            self.failed_repairs += 1
            if (missed := self._throttle.admit("read")) is not None:
                log.warning(
                    "a room's stream cannot be read", room=stream.room, error=str(error), suppressed=missed
                )
            stream.suspect = True
            self.want(stream, trio.current_time() + AGAIN)
        finally:
            stream.repairing = False
            if stream.sequencer.hole_since is not None:
                self.want(stream, trio.current_time() + GRACE)

    async def _read(self, stream: Stream) -> None:
        delivery, sequencer = self._delivery, stream.sequencer
        self.repairs += 1
        more = True
        while more and delivery.streams.get(stream.room) is stream:
            asked = sequencer.position
            chunk = await self._past.since(stream.room, asked, PAGE)
            if delivery.streams.get(stream.room) is not stream or sequencer.epoch != asked.epoch:
                continue  # closed, or moved by somebody else
            top = chunk.page.top
            if top.epoch != asked.epoch:
                # Read on: messages of the new epoch were thrown away until now.
                delivery.move(stream, top)
            elif top.offset < asked.offset:
                await self._lost(stream, asked.epoch)
            else:
                self.repaired_events += delivery.fill(stream, chunk)
                more = chunk.page.more
