"""The connection that hears channels.

What is wanted and what Redis has been told are two sets; each change of the
first is brought to Redis in batches, one command at a time for each channel:
while Redis has not confirmed the last one, nothing else is said about that
channel, so that a confirmation always means what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import trio

from broker.cluster import wire
from broker.cluster.bridge_connection import NOTHING, Connection
from broker.cluster.bridge_counts import Counts
from broker.cluster.bridge_lane import pack
from broker.cluster.link import LinkError, Message
from broker.logs import get_logger

log = get_logger(__name__)

BATCH: Final = 1000
"""Channels in one command: some 50 kB, which Redis takes in about a millisecond."""

_PROBE: Final = wire.PROBE + b" "
_ADD: Final = {False: "SUBSCRIBE", True: "SSUBSCRIBE"}
_REMOVE: Final = {False: "UNSUBSCRIBE", True: "SUNSUBSCRIBE"}


class Wanted(Protocol):
    """What a subscriber has to hear; it outlives the subscriber."""

    def __contains__(self, channel: object, /) -> bool: ...

    def __iter__(self) -> Iterable[str]: ...


class Subscriber(Connection):
    """A connection in subscribed state, for channels of one kind (plain, or all on one shard)."""

    def __init__(
        self,
        name: str,
        counts: Counts,
        *,
        wanted: dict[str, bool],
        own_channel: str,
        on_messages: Callable[[list[Message]], None],
        on_confirmed: Callable[[], None],
    ) -> None:
        super().__init__(name, counts)
        self._wanted = wanted
        self._own = own_channel
        self._on_messages = on_messages
        self._on_confirmed = on_confirmed
        self.heard: dict[bytes, str] = {}
        """Confirmed channels, by their name as Redis says it."""
        self._moving: dict[bytes, str] = {}
        self._sent: deque[tuple[list[str], bool]] = deque()
        self._changed: set[str] = set(wanted)
        self._wake = trio.Event()
        self._wake.set()

    @property
    def settled(self) -> bool:
        """Whether everything wanted has been confirmed."""
        return not self._changed and not self._moving

    def hears(self, channel: str) -> bool:
        """Whether the channel is confirmed and nothing else has been said since."""
        name = channel.encode()
        return name in self.heard and name not in self._moving

    def change(self, channels: Iterable[str]) -> None:
        """``channels`` have become wanted, or are wanted no more."""
        self._changed.update(channels)
        self._wake.set()

    async def run(self) -> None:
        """Bring changes to Redis until the connection is over."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    async def _tell(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self.tell()

    def tell(self) -> None:
        """Send what changed."""
        changed, self._changed = self._changed, set()
        batches: dict[tuple[bool, bool], list[str]] = {}
        for channel in changed:
            name = channel.encode()
            if name in self._moving:
                continue  # looked at again when Redis has confirmed
            wanted = channel in self._wanted
            if wanted == (name in self.heard):
                continue
            batches.setdefault((wanted, False), []).append(channel)
            self._moving[name] = channel
        for (wanted, sharded), channels in batches.items():
            word = (_ADD if wanted else _REMOVE)[sharded]
            for start in range(0, len(channels), BATCH):
                batch = channels[start : start + BATCH]
                self._sent.append((batch, wanted))
                self.write(pack(word, *batch))
        if self.settled:
            self._on_confirmed()

    def _received(self, gets: Callable[[], Any]) -> None:
        messages: list[Message] = []
        heard = self.heard
        own = self._own
        confirmed = False
        while (reply := gets()) is not NOTHING:
            if type(reply) is LinkError:
                self._refused(reply)
                confirmed = True
                continue
            kind = reply[0]
            if kind == b"message" or kind == b"smessage":
                channel = heard.get(reply[1])
                if channel is None:
                    continue  # its unsubscription is under way
                if channel is own and reply[2].startswith(_PROBE):
                    continue
                messages.append((channel, reply[2]))
            elif kind.endswith(b"unsubscribe"):
                self._confirm(reply[1], heard=False)
                confirmed = True
            elif kind.endswith(b"subscribe"):
                self._confirm(reply[1], heard=True)
                confirmed = True
        if messages:
            self._counts.messages += len(messages)
            self._on_messages(messages)
        if confirmed:
            if self._changed:
                self._wake.set()
            elif self.settled:
                self._on_confirmed()

    def _confirm(self, name: bytes, *, heard: bool) -> None:
        channel = self._moving.pop(name, None)
        if channel is None:
            return
        if heard:
            self.heard[name] = self._own if channel == self._own else channel
        else:
            self.heard.pop(name, None)
        if (channel in self._wanted) != heard:
            self._changed.add(channel)

    def _refused(self, error: LinkError) -> None:
        raise NotImplementedError(error)

    def _lost(self, why: str) -> None:
        self.heard.clear()
        self._moving.clear()
