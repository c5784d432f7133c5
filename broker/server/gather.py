"""When to let ready sockets gather for a moment. Sans-IO: ``now`` is passed in.

Theory. Waking up costs a turn of Trio's loop, 25 to 30 µs, whether one socket
is ready or fifty: with 20,000 messages a second that come one by one it is most
of the cost of a message (34 µs at 2 messages a wake-up, 11 at 25;
``python -m bench inbound``). Network cards have the same problem and moderate
their interrupts; this does likewise. While more than ``WORTH`` sockets would be
ready at the end of a ``GATHER``, the pump sleeps that long between two passes.
Below that rate nothing ever waits.

Clients that send their next message only after an answer (a closed loop) slow
down when they are made to wait. Where the rate falls below ``KEPT`` of what it
was without gathering, it ends, and is not tried again for a while, twice as
long each time.
"""

from __future__ import annotations

from typing import Final

GATHER: Final = 0.0015
"""Seconds between two passes."""
WORTH: Final = 2.25
"""Ready sockets for each ``GATHER`` from which on it is worth it: 1,500 a second."""
KEPT: Final = 0.6
"""Share of its rate that traffic keeps which does not wait for us, with room for chance."""
WINDOW: Final = 0.02
"""Seconds over which the rate is measured."""
FIRST_HOLD: Final = 0.5
LONGEST_HOLD: Final = 30.0


class Gathering:
    """Decides from the rate of ready sockets. ``active`` says what to do now."""

    __slots__ = ("_before", "_hold", "_hold_until", "_ready", "_since", "active")

    def __init__(self, now: float) -> None:
        self.active = False
        self._ready = 0
        self._since = now
        self._before = 0.0
        self._hold = FIRST_HOLD
        self._hold_until = now

    def note(self, ready: int, now: float) -> None:
        """A pass found so many ready sockets."""
        self._ready += ready
        elapsed = now - self._since
        if elapsed < WINDOW:
            return
        rate = self._ready / elapsed
        worth = rate * GATHER >= WORTH
        if not self.active:
            self.active = worth and now >= self._hold_until
            self._before = rate
        elif worth and rate >= KEPT * self._before:
            self._hold = FIRST_HOLD
        else:
            self.active = False
            self._hold_until = now + self._hold
            self._hold = min(self._hold * 2, LONGEST_HOLD)
        self._ready = 0
        self._since = now
