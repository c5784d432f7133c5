"""Leases: at most one node at a time does something, by the clock of Redis.

A lease that was lost may be found out about late: whoever was frozen believes
in it until it asks. So :attr:`Lease.held` also goes by this node's own clock,
from before the question was sent, and ends early rather than late; and what is
done under a lease must do no harm when it is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

import trio

from broker.link.base import Link, LinkError, load_script

LEASE: Final = load_script("lease")

FAREWELL: Final = 0.5
"""Seconds that giving a lease back may take when the node ends; then it ends by itself."""


class Standing(IntEnum):
    """What Redis said of a lease; the numbers are those of the scripts."""

    OTHERS = 0
    TAKEN = 1
    """It was free, and is ours now."""
    KEPT = 2
    """It was ours before."""


class Lease:
    """One lease, as one node sees it. ``key`` names it, ``who`` is this node, ``duration`` is in seconds."""

    def __init__(
        self,
        link: Link,
        key: str,
        who: str,
        duration: float,
        *,
        monotonic: Callable[[], float] = trio.current_time,
    ) -> None:
        self._link = link
        self._monotonic = monotonic
        self.key = key
        self.who = who
        self.duration = duration
        self._until = 0.0
        self._taken_over = 0
        self._lost = 0

    @property
    def duration_ms(self) -> int:
        """As the scripts take it."""
        return max(1, int(self.duration * 1000))

    @property
    def held(self) -> bool:
        """Whether it is ours for certain."""
        return self._monotonic() < self._until

    def learn(self, standing: Standing, asked_at: float) -> None:
        """Note what Redis said to a question sent at ``asked_at`` (this node's monotonic clock)."""
        if standing is not Standing.KEPT:
            self._lost += self._until > 0
            self._taken_over += standing is Standing.TAKEN
        self._until = asked_at + self.duration if standing is not Standing.OTHERS else 0.0

    async def hold(self) -> bool:
        """Take it if it is free, keep it if it is ours. Raises :class:`LinkError`."""
        asked_at = self._monotonic()
        reply = await self._link.call_script(LEASE, (self.key,), self.who, self.duration_ms)
        self.learn(Standing(reply), asked_at)
        return self.held

    async def release(self) -> None:
        """Give it back, if it is ours, so that another may take it at once. For the end; raises nothing."""
        self._until = 0.0
        with trio.move_on_after(FAREWELL, shield=True):
            try:
                await self._link.call_script(LEASE, (self.key,), self.who, 0)
            except LinkError:
                return  # it ends by itself

    def statistics(self) -> dict[str, int]:
        """``held`` now (0 or 1); ``taken_over`` and ``lost``, times that it became ours and ceased to be."""
        return {"held": int(self.held), "taken_over": self._taken_over, "lost": self._lost}
