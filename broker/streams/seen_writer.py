"""Acknowledged positions on their way to Redis: gathered, and written about once a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from broker.engine.base import Seen
from broker.engine.open_rooms import OpenRooms
from broker.engine.seen import SeenBuffer
from broker.link.base import Argument, Link, LinkError, Reply
from broker.streams.scripts import ACKNOWLEDGE, StreamNames, life

ACKNOWLEDGE_AFTER: Final = 1.0
"""How long acknowledged positions gather before they are written (s)."""

CLOSED_TTL: Final = 86_400.0
"""How long positions are kept of a room that was closed before they were written (s)."""


class SeenWriter:
    """``settled()`` is called when a write has ended, well or not."""

    def __init__(self, link: Link, names: StreamNames, rooms: OpenRooms, settled: Callable[[], None]) -> None:
        self._link = link
        self._names = names
        self._rooms = rooms
        self._settled = settled
        self._buffer = SeenBuffer()
        self._noted = trio.Event()
        self.leaving = 0
        """Writes under way."""
        self.moved = 0
        self.failures = 0

    def note(self, room: str, who: str, offset: int, ts: float) -> None:
        """``who`` has seen up to ``offset``."""
        self._buffer.note(room, who, offset, ts)
        self._noted.set()

    def of(self, room: str) -> list[Seen]:
        """What is known here and perhaps not yet in Redis."""
        return self._buffer.of(room)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._noted.wait()
            await trio.sleep(ACKNOWLEDGE_AFTER)
            self.flush()

    def flush(self) -> None:
        """Write what is gathered; what cannot be written is gathered again."""
        self._noted = trio.Event()
        if not self._buffer:
            return
        request = self._buffer.take()
        left = len(request.positions)
        failed = False

        def done(reply: Reply | LinkError) -> None:
            nonlocal left, failed
            left -= 1
            if isinstance(reply, LinkError):
                failed = True
                self.failures += 1
            else:
                self.moved += reply
            if left:
                return
            self.leaving -= 1
            # Written twice is written once: the script never moves a position back.
            self._buffer.settle(request, written=not failed)
            if failed:
                self._noted.set()
            self._settled()

        self.leaving += 1
        for room, people in list(request.positions.items()):
            keys, ring = self._names.of(room), self._rooms.get(room)
            ttl = ring.retention.ttl if ring is not None else CLOSED_TTL
            arguments: list[Argument] = [life(ttl)]
            for who, (offset, ts) in people.items():
                arguments += (who, offset, repr(ts))
            self._link.send_script(done, ACKNOWLEDGE, (keys.meta, keys.seen), *arguments)
