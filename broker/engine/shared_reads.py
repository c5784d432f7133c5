"""Slow reads in worker threads, where identical ones that overlap are one read.

When a thousand sessions come back to a room at once, they ask the store the
same question; it is asked once. The read belongs to the engine's nursery, so
that the caller who happened to be first may be cancelled without harm.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import TypeVar, cast

import trio

from broker.engine.flight import Flight
from broker.engine.sqlite_store import STORE_ERRORS
from broker.errors import BrokerError

READERS = 2
"""Reads that run at once. They compute, and should leave a core to the rest."""

T = TypeVar("T")


class SharedReads:
    """Reads by key; see the top of the file."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}
        self._limiter = trio.CapacityLimiter(READERS)
        self.reads = 0
        self.shared = 0
        self.failures = 0

    async def share(self, nursery: trio.Nursery, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """The result of ``read()``, or of an unfinished one with the same ``key``.

        The key must name everything that the result depends on, the moment
        included: an answer from before a caller asked must not be shared with
        it. Raises ``unavailable`` if the store cannot answer.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight("the store stopped")
            nursery.start_soon(self._fly, key, flight, read)
        else:
            self.shared += 1
        return cast("T", await flight.landed())

    async def _fly(self, key: Hashable, flight: Flight, read: Callable[[], Awaitable[T]]) -> None:
        try:
            flight.result = await read()
            flight.failure = None
        except STORE_ERRORS as error:
            self.failures += 1
            flight.failure = f"the store cannot be read ({error})"
        except BrokerError as error:
            flight.failure = error.message
        finally:
            del self._flights[key]
            flight.done.set()

    async def in_thread(self, read: Callable[[], T]) -> T:
        """Call ``read`` in a worker thread when it is its turn."""
        self.reads += 1
        return await trio.to_thread.run_sync(read, limiter=self._limiter)
