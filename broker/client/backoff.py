"""How long to wait before connecting again: exponential, with full jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delay before attempt n: uniform between 0 and ``min(cap, base * factor ** n)`` seconds.

    Full jitter, because after a broker's restart all its clients wait at once,
    and any lower bound would bring them back in waves
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    ``stable``: a connection that lived this long (s) starts the count anew. Not
    the mere success of connecting: a session thrown out right after its
    welcome would otherwise hammer the broker.
    """

    base: float = 0.5
    factor: float = 2.0
    cap: float = 30.0
    stable: float = 10.0
    rng: random.Random = field(default_factory=random.Random, repr=False, compare=False)

    def delay(self, attempt: int) -> float:
        """Seconds to wait before the ``attempt``-th try in a row, counted from 0."""
        # 64 doublings pass any cap; beyond about 1,000 the power leaves the range of floats.
        return self.rng.uniform(0.0, min(self.cap, self.base * self.factor ** min(attempt, 64)))
