"""Token buckets. Sans-IO: ``now`` is passed in."""

from __future__ import annotations

from typing import Final

from broker.config import Rate, Rates

ENOUGH: Final = 0.999
"""Of a token passes for one, so that who waits as long as told is not sent away for a rounding error."""


class Bucket:
    """Holds up to ``burst`` tokens and gains ``rate`` a second; starts full."""

    __slots__ = ("_burst", "_rate", "_stamp", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._stamp = now

    def take(self, now: float) -> float:
        """Take one token: 0.0 if there was one, else the seconds until there is."""
        tokens = min(self._burst, self._tokens + (now - self._stamp) * self._rate)
        self._stamp = now
        if tokens >= ENOUGH:
            self._tokens = tokens - 1.0
            return 0.0
        self._tokens = tokens
        return (1.0 - tokens) / self._rate


class RateLimiter:
    """The buckets of one session or user, one for each rate class, made when first used."""

    __slots__ = ("_buckets", "_factor", "_rates")

    def __init__(self, rates: Rates, factor: float = 1.0) -> None:
        self._rates = rates
        self._factor = factor
        self._buckets: dict[str, Bucket] = {}

    def take(self, kind: str, now: float) -> float:
        """Seconds to wait until one more of ``kind`` is allowed; 0.0 takes it."""
        bucket = self._buckets.get(kind)
        if bucket is None:
            rate: Rate = getattr(self._rates, kind)
            if not rate.rate:
                return 0.0
            bucket = Bucket(rate.rate * self._factor, rate.burst * self._factor, now)
            self._buckets[kind] = bucket
        return bucket.take(now)
