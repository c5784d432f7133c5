"""Other nodes whose answers wait until a test lets them go."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from broker.engine.peers import Mate, Peers
from broker.errors import BrokerError, ErrorCode
from broker.protocol.events import Event


class HeldPeers:
    """Stands in front of a running broker's peers: rooms are attached only by :meth:`release`."""

    def __init__(self, peers: Peers) -> None:
        self._go = trio.Event()
        self.attachments: set[str] = set()
        self.asked: list[tuple[str, bool]] = []
        """Room, and whether its slots were wanted, for each call of ``attach``."""
        self.slots: Sequence[Event] = ()
        self.elsewhere: dict[str, list[Mate]] = {}
        self.away = False
        """Members elsewhere cannot be asked for."""
        peers.attached = self._attached  # type: ignore[method-assign]
        peers.attach = self._attach  # type: ignore[method-assign]
        peers.detach = self._detach  # type: ignore[method-assign]
        peers.mates = self._mates  # type: ignore[method-assign]

    def release(self) -> None:
        """Let everything go."""
        self._go.set()

    def _attached(self, room: str) -> bool:
        return room in self.attachments

    def _detach(self, room: str) -> None:
        self.attachments.discard(room)

    async def _attach(self, room: str, *, slots: bool = False) -> Sequence[Event]:
        self.asked.append((room, slots))
        self.attachments.add(room)
        await self._go.wait()
        return self.slots if slots else ()

    async def _mates(self, room: str) -> Sequence[Mate]:
        await self._go.wait()
        if self.away:
            raise BrokerError(ErrorCode.UNAVAILABLE, "the other nodes cannot be asked")
        return self.elsewhere.get(room, ())
