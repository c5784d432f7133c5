"""Which rooms this node listens to, and on which channels.

A room has two: what nodes tell each other, and what backends publish. Both
directions of the index, room to channels and channel to room, change together
in :meth:`Interest.want` and :meth:`Interest.sweep` and nowhere else.

Two parts of the node want rooms for reasons of their own, the engine and the
peers; a room is listened to while any of them does, and a moment longer, so
that somebody who reloads a page costs Redis nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final, Literal, NamedTuple, Protocol

import trio

from broker.link.keys import Keys

RELEASE_AFTER: Final = 1.0
"""How long a room is still listened to when nobody wants it any more (s)."""

Kind = Literal["live", "backend"]


class Place(NamedTuple):
    """What a channel is."""

    kind: Kind
    room: str


class Subscriptions(Protocol):
    """As much of a :class:`~broker.link.base.Link` as is needed here."""

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        """Hear of them."""

    def unsubscribe(self, channels: Iterable[str]) -> None:
        """Hear of them no more."""

    def hears(self, channel: str) -> bool:
        """Whether it is heard now."""

    async def heard(self, channel: str) -> bool:
        """Wait until it is, or until the link goes down."""


class Interest:
    """Keeps the link subscribed to the channels of wanted rooms. :meth:`run` lets go of the others."""

    def __init__(self, link: Subscriptions, keys: Keys) -> None:
        self._link = link
        self._keys = keys
        self._holders: dict[str, set[str]] = {}
        self._released: dict[str, float] = {}
        self._places: dict[str, Place] = {}
        self.find = self._places.get
        """What a channel is, or ``None``; asked for every message that comes in."""

    def want(self, room: str, holder: str) -> None:
        """Listen to ``room`` for ``holder``; again is the same as once."""
        holders = self._holders.get(room)
        if holders is not None:
            holders.add(holder)
            return
        self._holders[room] = {holder}
        if self._released.pop(room, None) is not None:
            return  # still listened to
        live, backend = self._keys.live(room), self._keys.backend(room)
        self._places[live] = Place("live", room)
        self._places[backend] = Place("backend", room)
        self._link.subscribe((live,), sharded=True)
        self._link.subscribe((backend,), sharded=False)

    def release(self, room: str, holder: str) -> None:
        """``holder`` needs ``room`` no more; nothing happens when it did not want it."""
        holders = self._holders.get(room)
        if holders is None or holder not in holders:
            return
        holders.discard(holder)
        if not holders:
            del self._holders[room]
            self._released[room] = trio.current_time()

    def sweep(self, now: float) -> None:
        """Let go of rooms that nobody has wanted for :data:`RELEASE_AFTER`; ``now`` by Trio's clock."""
        channels: list[str] = []
        # In the order of their release: the first one that is too young ends the search.
        for room, since in list(self._released.items()):
            if now - since < RELEASE_AFTER:
                break
            del self._released[room]
            channels += (self._keys.live(room), self._keys.backend(room))
        for channel in channels:
            del self._places[channel]
        if channels:
            self._link.unsubscribe(channels)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await trio.sleep(RELEASE_AFTER / 2)
            self.sweep(trio.current_time())

    def hears(self, room: str) -> bool:
        """Whether both channels of ``room`` are heard now."""
        return self._link.hears(self._keys.live(room)) and self._link.hears(self._keys.backend(room))

    async def wait(self, room: str) -> bool:
        """Wait until both channels are heard; false when the link is down, or nobody wants the room."""
        return await self._link.heard(self._keys.live(room)) and await self._link.heard(
            self._keys.backend(room)
        )

    def rooms(self) -> Collection[str]:
        """Rooms that are wanted now."""
        return self._holders.keys()

    def statistics(self) -> dict[str, int]:
        """Sizes for ``/api/stats``."""
        return {"rooms": len(self._holders), "released": len(self._released)}
