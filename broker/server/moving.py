"""Asking some sessions to move to another node, a few at a time.

After a scale-out the old nodes hold everybody and the new ones nobody: sessions
are long, and a balancer only places new ones. :class:`Mover` asks a random
share of this node's sessions to come back (close code 4503, with a jittered
``retry_after``), spread over a time that the others can bear, so that the
balancer may place them anew.
"""

from __future__ import annotations

import random
from typing import Final

import structlog
import trio

from broker.errors import CloseCode
from broker.protocol.events import SessionId
from broker.server.registry import Registry

log = structlog.get_logger(__name__)

STEP: Final = 0.1
"""Seconds between two looks at who is due, at least: a large move goes in small groups."""
CHUNK: Final = 100
"""Sessions asked between two checkpoints: some 50 µs each, and everybody else waits meanwhile."""
REASON: Final = "please come back: sessions are being spread over the nodes"


class Mover:
    """Carries out one order at a time, in a task of its own; a new order replaces the one before."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._chosen: list[SessionId] = []
        self._over = 0.0
        self._began = 0.0
        self._ordered = trio.Event()
        self._serial = 0
        self.orders = 0
        self.moved = 0
        """Sessions that were asked to move."""

    def order(self, share: float, over: float, now: float) -> int:
        """Begin to move a random ``share`` (0 to 1) of the sessions within ``over`` seconds.

        Returns how many were chosen. A share of 0 ends what is under way.
        """
        there = [each.id for each in self._registry.sessions.values() if each.ending is None]
        self._chosen = random.sample(there, round(share * len(there)))
        self._over, self._began = over, now
        self._serial += 1
        self.orders += 1
        self._ordered.set()
        log.info("sessions are asked to move", sessions=len(self._chosen), of=len(there), over=over)
        return len(self._chosen)

    @property
    def waiting(self) -> int:
        """Chosen sessions that have yet to be asked."""
        return len(self._chosen)

    async def run(self) -> None:
        """Carry out orders until cancelled."""
        while True:
            await self._ordered.wait()
            self._ordered = trio.Event()
            await self._carry_out(self._serial, len(self._chosen))

    async def _carry_out(self, serial: int, count: int) -> None:
        pause = max(STEP, self._over / count) if count else 0.0
        while self._chosen and serial == self._serial:
            elapsed = trio.current_time() - self._began
            due = count if elapsed >= self._over else int(count * elapsed / self._over) + 1
            left = max(0, count - due)
            for _ in range(min(CHUNK, len(self._chosen) - left)):
                self._ask(self._chosen.pop())
            if len(self._chosen) > left:
                await trio.lowlevel.checkpoint()
            elif self._chosen:
                with trio.move_on_after(pause):
                    await self._ordered.wait()

    def _ask(self, identifier: SessionId) -> None:
        session = self._registry.sessions.get(identifier)
        if session is not None and session.ending is None:  # it may have gone by itself meanwhile
            session.disconnect(CloseCode.DRAINING, REASON)
            self.moved += 1

    def statistics(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {"orders": self.orders, "moved": self.moved, "waiting": self.waiting}
