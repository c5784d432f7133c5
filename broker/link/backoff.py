"""Pauses between attempts to connect."""

from __future__ import annotations

import random
from typing import Final

import trio

FIRST: Final = 0.05
LONGEST: Final = 2.0
"""Seconds. A pause is random below a bound that doubles between the two.

Full jitter: nodes that lost Redis together do not come back together.
"""


class Backoff:
    """One pause after the other, each below twice the bound of the last."""

    def __init__(self) -> None:
        self._bound = FIRST
        self._since: float | None = None

    def succeeded(self) -> None:
        """A connection is there. Only one that lasts makes the next pause short again."""
        self._since = trio.current_time()

    async def pause(self) -> None:
        """Wait before the next attempt."""
        if self._since is not None and trio.current_time() - self._since > LONGEST:
            self._bound = FIRST
        self._since = None
        bound, self._bound = self._bound, min(self._bound * 2, LONGEST)
        await trio.sleep(random.uniform(0, bound))
