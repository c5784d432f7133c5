"""Asking the sentinels where the primary is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from broker.cluster.bridge_counts import Counts
from broker.cluster.bridge_dial import Dialer
from broker.cluster.bridge_lane import Lane, pack
from broker.cluster.link import LinkDown, LinkError, Reply
from broker.cluster.target import Address, Target
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

PATIENCE: Final = 0.3
"""How long the others may take when the first sentinel has answered (s)."""

LOOK_EVERY: Final = 3.0
"""Between two looks whether the primary is still the one we use (s)."""


class Opinion(NamedTuple):
    """What one sentinel says; of two, the greater is newer."""

    epoch: int
    """Counts failovers."""
    address: Address


class Sentinels:
    """The sentinels of one service.

    All are asked at once and the newest answer counts, so that a sentinel that
    is cut off from the others, perhaps together with an old primary, does not
    lead us there.
    """

    def __init__(self, target: Target, dialer: Dialer, answer_timeout: float) -> None:
        assert target.service is not None
        self._service = target.service
        self._addresses = target.addresses
        self._dialer = dialer
        self._timeout = answer_timeout
        self._counts = Counts()  # asking is no traffic of the link's

    async def find(self) -> Address:
        """The primary of now. Raises :class:`LinkDown` when no sentinel tells."""
        opinions: list[Opinion] = []
        failures: list[LinkDown] = []
        async with trio.open_nursery() as nursery:

            async def ask(address: Address) -> None:
                try:
                    opinions.append(await self._ask(address))
                except LinkDown as error:
                    failures.append(error)
                if len(opinions) + len(failures) == len(self._addresses):
                    nursery.cancel_scope.cancel()
                elif len(opinions) == 1:
                    nursery.cancel_scope.deadline = min(
                        nursery.cancel_scope.deadline, trio.current_time() + PATIENCE
                    )

            for address in self._addresses:
                nursery.start_soon(ask, address)
        if opinions:
            return max(opinions).address
        raise failures[0] if failures else LinkDown("no sentinel answers")

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
        await self._dialer.open(lane, address, to_sentinel=True)
        try:
            [reply] = await lane.ask(pack("SENTINEL", "MASTER", self._service))
        finally:
            lane.close("asked")
        if isinstance(reply, LinkError):
            raise LinkDown(f"sentinel {address}: {reply}")
        return _opinion(reply)


def _opinion(reply: Reply) -> Opinion:
    fields = dict(zip(reply[::2], reply[1::2], strict=True))
    epoch = int(fields.get(b"config-epoch", b"0"))
    # A name that is announced (``sentinel announce-hostnames``) or an address.
    address = Address(fields[b"ip"].decode(), int(fields[b"port"]))
    return Opinion(epoch, address)
