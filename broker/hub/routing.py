"""Copies of events in other rooms: what the hub asks of the rules, and what becomes of the copies.

The rules themselves (:mod:`broker.router`) are the application's. A copy is
published like any event of its room, after the event that it is a copy of, and
is not routed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from broker.errors import BrokerError
from broker.protocol.events import Event, Position

Copied = Callable[[BrokerError | None], None]
"""Called once all copies are stored, with the first error if there was one. Must not raise."""


NO_COPIES: Final = {"routed": 0, "route_missing": 0, "route_misfits": 0, "route_refused": 0}
"""Counters of a hub without rules."""


class Routing(Protocol):
    """The rules."""

    def copies(self, event: Event) -> Sequence[Event]:
        """What to publish after ``event``. Raises :class:`BrokerError` if ``event`` must not be published."""

    def statistics(self) -> Mapping[str, int]:
        """Counters, by the names of :data:`NO_COPIES`."""


class Copying:
    """Copies of one event on their way to the store.

    For each that will be stored, :meth:`expect` and later :meth:`stored`; after
    the last one :meth:`close`. Errors of the others go to :meth:`fail`.
    """

    __slots__ = ("_copied", "_error", "_waiting")

    def __init__(self) -> None:
        self._waiting = 1  # for close()
        self._error: BrokerError | None = None
        self._copied: Copied | None = None

    @classmethod
    def refused(cls, error: BrokerError) -> Copying:
        """Nothing was published."""
        copying = cls()
        copying.fail(error)
        copying.close()
        return copying

    def expect(self) -> None:
        """One more will be stored."""
        self._waiting += 1

    def stored(self, outcome: Position | BrokerError) -> None:
        """One was stored, or not; a ``Done`` of the engine."""
        if isinstance(outcome, BrokerError):
            self.fail(outcome)
        self.close()

    def fail(self, error: BrokerError) -> None:
        """The first error is the one that is told."""
        if self._error is None:
            self._error = error

    def close(self) -> None:
        """One thing less to wait for."""
        self._waiting -= 1
        if not self._waiting and self._copied is not None:
            self._copied(self._error)

    def then(self, copied: Copied) -> None:
        """Call ``copied`` when all are stored; now, if they are."""
        if self._waiting:
            self._copied = copied
        else:
            copied(self._error)
