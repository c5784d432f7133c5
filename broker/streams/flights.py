"""Reads that are the same are made once, for everybody who asked before they began.

When a thousand sessions come back to a room at once, they ask Redis the same
question. Whoever asks while a read is under way may know, from another node, of
something that it does not see yet; so it is not shared with them, but all of
them share the next one. However many ask, two reads are the most that each of
them waits for. A read belongs to the engine's nursery, so that the caller who
happened to be first may be cancelled without harm.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Final, TypeVar, cast

import trio

from broker.engine.flight import Flight
from broker.link.base import LinkError

READS: Final = 4
"""Reads that run at once; the link has a few connections for them, which others use as well."""

T = TypeVar("T")


class Flights:
    """Reads by key, which must name everything that the result depends on."""

    def __init__(self) -> None:
        self._boarding: dict[Hashable, Flight] = {}
        self._flying: dict[Hashable, Flight] = {}
        self._limiter = trio.CapacityLimiter(READS)
        self.reads = 0
        self.shared = 0
        self.failures = 0

    async def share(self, nursery: trio.Nursery, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """The result of a ``read()`` that begins from now on. Raises ``unavailable``."""
        flight = self._boarding.get(key)
        if flight is None:
            flight = self._boarding[key] = Flight("the store is not running")
            nursery.start_soon(self._fly, key, flight, self._flying.get(key), read)
        else:
            self.shared += 1
        return cast("T", await flight.landed())

    async def _fly(
        self, key: Hashable, flight: Flight, before: Flight | None, read: Callable[[], Awaitable[T]]
    ) -> None:
        try:
            if before is not None:
                await before.done.wait()
            async with self._limiter:
                del self._boarding[key]
                self._flying[key] = flight
                self.reads += 1
                flight.result = await read()
                flight.failure = None
        except LinkError as error:
            self.failures += 1
            flight.failure = f"the store cannot be read ({error})"
        finally:
            for flights in (self._boarding, self._flying):
                if flights.get(key) is flight:
                    del flights[key]
            flight.done.set()
