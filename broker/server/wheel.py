"""Deadlines of 10,000 sessions without 10,000 timers.

Sessions lie in buckets of one second; each tick takes the buckets that are due
and asks each session in them what is overdue and when it wants to be asked
again. Sans-IO: ``now`` is passed in.
"""

from __future__ import annotations

from math import ceil
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
    """Asks each :class:`Timed` when its time has come, rounded up to a second."""

    def __init__(self) -> None:
        self._buckets: dict[int, list[Timed]] = {}
        self._next = 0
        self.faults = 0
        """Exceptions that somebody raised when asked."""

    def add(self, timed: Timed, when: float) -> None:
        """Ask ``timed`` at ``when`` (seconds, the clock of :meth:`advance`), or at the next tick."""
        self._buckets.setdefault(max(ceil(when), self._next), []).append(timed)

    def advance(self, now: float) -> None:
        """Ask everyone whose second has come."""
        due = [second for second in self._buckets if second <= now]
        self._next = int(now) + 1
        for second in sorted(due):
            for timed in self._buckets.pop(second):
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
