"""Asking the sentinels where the primary is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from broker.link.base import LinkDown, LinkError, Reply
from broker.link.counts import Counts
from broker.link.dial import Dialer, Refused, refusal
from broker.link.lane import Lane, pack
from broker.link.questions import newest
from broker.link.target import Address, Target
from broker.logs import Throttle

LOOK_EVERY: Final = 3.0
"""Between two looks whether the primary is still the one in use (s)."""


class Opinion(NamedTuple):
    """What one sentinel says."""

    epoch: int
    """Counts failovers: the greater of two is newer."""
    address: Address


class Sentinels:
    """The sentinels of one service."""

    def __init__(self, target: Target, dialer: Dialer, answer_timeout: float) -> None:
        assert target.service is not None
        self._service = target.service
        self._addresses = target.addresses
        self._dialer = dialer
        self._timeout = answer_timeout
        self._counts = Counts()  # asking is no traffic of the link's

    async def find(self) -> Address:
        """The primary of now. Raises :class:`LinkDown` when no sentinel tells."""
        opinion = await newest(self._addresses, self._ask, lambda opinion: opinion.epoch)
        return opinion.address

    async def watch(self, used: Callable[[], Address | None], moved: Callable[[Address], None]) -> None:
        """Look now and then whether the primary is still the one in use: it does not always break."""
        while True:
            await trio.sleep(LOOK_EVERY)
            address = used()
            if address is None:
                continue
            try:
                found = await self.find()
            except LinkDown:
                continue  # without sentinels there is no better primary to be had
            if found != address and used() == address:
                moved(found)

    async def _ask(self, address: Address) -> Opinion:
        lane = Lane("sentinel", self._counts, (), self._timeout, Throttle())
        try:
            await self._dialer.open(lane, address, to_sentinel=True)
            [reply] = await lane.ask(pack("SENTINEL", "MASTER", self._service))
            if isinstance(reply, LinkError):
                raise refusal(reply)
        except Refused as error:
            raise Refused(
                f"sentinel {address}: {error.problem}", "give ?sentinel_username= and &sentinel_password="
            ) from error
        except LinkError as error:
            raise LinkDown(f"sentinel {address}: {error}") from error
        finally:
            lane.close("asked")
        return _opinion(reply)


def _opinion(reply: Reply) -> Opinion:
    fields = dict(zip(reply[::2], reply[1::2], strict=True))
    address = Address(fields[b"ip"].decode(), int(fields[b"port"]))
    return Opinion(int(fields.get(b"config-epoch", 0)), address)
