"""Cleaning up after nodes that are no more: their members in every room.

One node is told of each death, and does it. What it does not get done, because
it dies as well, expires by itself, and nobody reads it before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from broker.link.base import Done, Link, LinkError, Reply, load_script
from broker.link.keys import Keys
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

BATCH: Final = 256
"""Rooms cleaned up in one go."""
AGAIN: Final = 1.0
"""After Redis could not be reached (s)."""

BURY: Final = load_script("bury")


class Graves:
    """Dead nodes that this one cleans up after."""

    def __init__(self, link: Link, keys: Keys) -> None:
        self._link = link
        self._keys = keys
        self._dead: list[str] = []
        self._wake = trio.Event()
        self._throttle = Throttle()
        self.cleaned_rooms = 0
        self.failed = 0

    def add(self, node: str) -> None:
        """Clean up after ``node``, soon."""
        self._dead.append(node)
        self._wake.set()

    def add_rooms(self, node: str, rooms: Iterable[str]) -> None:
        """The same in some rooms only: a frozen node spoke up there after it had been cleaned up after."""
        for room in rooms:
            self._empty_room(self._ignore, node, room)

    def _empty_room(self, done: Done, node: str, room: str) -> None:
        keys = [self._keys.members(room, node), self._keys.member_nodes(room)]
        self._link.send_script(done, BURY, keys, node)

    def _ignore(self, reply: Reply | LinkError) -> None:
        """Whoever reads the room next comes here again."""
        if isinstance(reply, LinkError):
            self.failed += 1
        else:
            self.cleaned_rooms += 1

    async def run(self) -> None:
        """Clean up until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._dead:
                try:
                    await self._bury(self._dead[0])
                except LinkError as error:
                    self.failed += 1
                    missed = self._throttle.admit("bury", trio.current_time())
                    if missed is not None:
                        log.warning("cannot clean up after a node", why=str(error), suppressed=missed)
                    await trio.sleep(AGAIN)
                else:
                    del self._dead[0]

    async def _bury(self, node: str) -> None:
        index = self._keys.member_rooms(node)
        while rooms := await self._link.call(index, "SRANDMEMBER", index, BATCH):
            await self._empty(node, [room.decode() for room in rooms])
            await self._link.call(index, "SREM", index, *rooms)
            self.cleaned_rooms += len(rooms)

    async def _empty(self, node: str, rooms: list[str]) -> None:
        """Forget the node's members of ``rooms``, in one pipeline."""
        failures: list[LinkError] = []
        landed = trio.Event()
        left = len(rooms)

        def done(reply: Reply | LinkError) -> None:
            nonlocal left
            left -= 1
            if isinstance(reply, LinkError):
                failures.append(reply)
            if not left:
                landed.set()

        for room in rooms:
            self._empty_room(done, node, room)
        await landed.wait()
        if failures:
            raise failures[0]

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {"cleaned_rooms": self.cleaned_rooms, "failed_cleanings": self.failed}
