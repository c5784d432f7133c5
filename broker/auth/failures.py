"""How long to hold back after refused tokens: a sans-IO table, asked by the handshake and ``auth``."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from typing import Final, NamedTuple

FREE_FAILURES: Final = 10
"""Refusals without delay: a client with a stale token tries once or twice before it fetches a new one."""

FIRST_DELAY: Final = 0.25
"""Seconds after the first refusal that is delayed; doubles with each further one."""

MAX_DELAY: Final = 4.0
"""Below the 10 s within which a session must authenticate, so that the answer still reaches it."""

FORGET_SECONDS: Final = 300.0
"""An address without a refusal for this long starts anew."""

CAPACITY: Final = 10_000
"""Addresses remembered (about 2 MB); the one refused longest ago gives way."""


class _Record(NamedTuple):
    failures: int
    last: float


class FailureDelay:
    """Exponential delay per address after refused tokens.

    Delay the *answer to a refused token* by what :meth:`failed` returns: then
    an office behind one address never waits because of a colleague's broken
    script, while guessing gets slower and holds one of the address's few
    unauthenticated sessions. Do not count tokens that have merely expired; they
    were genuine. IPv6 addresses count as their /64, which is what one customer
    gets. ``now`` is any clock that does not step back, in seconds.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._records: OrderedDict[str, _Record] = OrderedDict()  # oldest refusal first

    def __len__(self) -> int:
        return len(self._records)

    def failed(self, address: str, now: float) -> float:
        """Count a refused token from ``address``; return the seconds to hold its answer back."""
        network = _network(address)
        record = self._records.pop(network, None)
        failures = 1
        if record is not None and now - record.last < FORGET_SECONDS:
            failures += record.failures
        self._records[network] = _Record(failures, now)
        if len(self._records) > self._capacity:
            self._records.popitem(last=False)
        return _delay(failures)

    def delay(self, address: str, now: float) -> float:
        """Seconds of the current hold-back of ``address`` that are still to come; 0 for nearly everyone."""
        if not self._records:
            return 0.0
        record = self._records.get(_network(address))
        if record is None:
            return 0.0
        return max(0.0, record.last + _delay(record.failures) - now)

    def sweep(self, now: float) -> None:
        """Drop what is forgotten. Call every minute or so; the table is bounded without it as well."""
        while self._records:
            network, record = next(iter(self._records.items()))
            if now - record.last < FORGET_SECONDS:
                return
            del self._records[network]


def _delay(failures: int) -> float:
    doublings = failures - FREE_FAILURES - 1
    if doublings < 0:
        return 0.0
    return min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(doublings, 32))


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # a Unix socket's peer or a proxy's word: counted under its own name
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))
