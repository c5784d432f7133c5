"""When to let ready sockets gather for a millisecond. Sans-IO: ``now`` is passed in.

Theory. Waking up costs a turn of Trio's loop, 25 to 30 µs, whether one socket
is ready or fifty: with 20,000 messages a second that come one by one it is most
of the cost of a message (34 µs at 2 messages a wake-up, 11 at 25;
``python -m bench inbound``). Network cards have the same problem and moderate
their interrupts; this does likewise. While more than ``WORTH`` sockets would be
ready at the end of a ``GATHER``, the pump sleeps that long between two passes.
Below that rate nothing ever waits.

Clients that send their next message only after an answer (a closed loop) slow
down when they are made to wait, and then nothing gathers: a trial that ends like
that is not repeated for a while, twice as long each time.
"""

from __future__ import annotations

from typing import Final

GATHER: Final = 0.001
"""Seconds between two passes; also the resolution of Trio's timers."""
WORTH: Final = 1.5
"""Ready sockets for each ``GATHER`` from which on it is worth it: 1,500 a second."""
WINDOW: Final = 0.02
"""Seconds over which the rate is measured."""
FIRST_HOLD: Final = 0.5
LONGEST_HOLD: Final = 30.0


class Gathering:
    """Decides from the rate of ready sockets. ``active`` says what to do now."""

    __slots__ = ("_hold", "_hold_until", "_ready", "_since", "active")

    def __init__(self, now: float) -> None:
        self.active = False
        self._ready = 0
        self._since = now
        self._hold = FIRST_HOLD
        self._hold_until = now

    def note(self, ready: int, now: float) -> None:
        """A pass found so many ready sockets."""
        self._ready += ready
        elapsed = now - self._since
        if elapsed < WINDOW:
            return
        worth = self._ready * GATHER >= WORTH * elapsed
        if self.active and not worth:
            self._hold_until = now + self._hold
            self._hold = min(self._hold * 2, LONGEST_HOLD)
        elif self.active:
            self._hold = FIRST_HOLD
        self.active = worth and now >= self._hold_until
        self._ready = 0
        self._since = now
