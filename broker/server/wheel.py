"""Deadlines of 10,000 sessions without 10,000 timers.

Sessions lie in buckets of one slot of time; each tick takes the buckets that are
due and asks each session in them what is overdue and when it wants to be asked
again. Slots should be short: 10,000 sessions have 400 pings a second, and sent
all at once they hold everybody else up for 4 ms. Sans-IO: ``now`` is passed in.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Final, Protocol

import structlog

log = structlog.get_logger(__name__)

AFTER_FAULT: Final = 10.0
"""Seconds until one that raised is asked again: neither forgotten nor a flood of log lines."""


class Timed(Protocol):
    """Something with deadlines."""

    def tick(self, now: float) -> float | None:
        """Act on what is overdue; return when to be asked next, or ``None`` for never."""


class Wheel:
    """Asks each :class:`Timed` when its time has come, rounded up to a ``slot`` (s)."""

    def __init__(self, slot: float = 1.0) -> None:
        self._slot = slot
        self._buckets: dict[int, list[Timed]] = {}
        self._next = 0
        self.faults = 0
        """Exceptions that somebody raised when asked."""

    def add(self, timed: Timed, when: float) -> None:
        """Ask ``timed`` at ``when`` (seconds, the clock of :meth:`advance`), or at the next tick."""
        self._buckets.setdefault(max(ceil(when / self._slot), self._next), []).append(timed)

    def advance(self, now: float) -> None:
        """Ask everyone whose slot has come."""
        current = floor(now / self._slot)
        due = [slot for slot in self._buckets if slot <= current]
        self._next = current + 1
        for slot in sorted(due):
            for timed in self._buckets.pop(slot):
                try:
                    when = timed.tick(now)
                except Exception:  # a fault of ours, met by one session, must not end the others
                    self.faults += 1
                    log.exception("fault in a deadline")
                    when = now + AFTER_FAULT
                if when is not None:
                    self.add(timed, when)

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))
