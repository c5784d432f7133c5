"""The connection that hears channels.

What is wanted and what Redis has been told are two sets. A change of the first
is brought to Redis in batches, one command at a time for each channel: while
Redis has not confirmed the last one, nothing else is said about that channel,
so that a confirmation always means what it says. On every tick the two sets are
compared as a whole: whatever went wrong, it does not stay so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import trio

from broker.link import wire
from broker.link.base import LinkError, Message
from broker.link.connection import NOTHING, Connection
from broker.link.counts import Counts
from broker.link.lane import ELSEWHERE, pack
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

BATCH: Final = 1000
"""Channels in one command: some 50 kB, which Redis takes in about a millisecond."""

TICKS: Final = 16
"""How often within ``probe_after`` the subscriber looks after itself."""

FORGIVE_AFTER: Final = 30.0
"""A channel that Redis refused (ACL) is asked for again after this long (s)."""

_PROBE: Final = wire.PROBE + b" "


class _Batch:
    """Channels of one command, of which ``left`` are not yet confirmed."""

    __slots__ = ("channels", "left")

    def __init__(self, channels: list[str]) -> None:
        self.channels = channels
        self.left = len(channels)


class Subscriber(Connection):
    """A connection in subscribed state.

    ``wanted``: channel → whether it is sharded; the same mapping outlives the
    connection, and :meth:`change` tells where it changed. ``on_messages`` gets
    all messages of one read, ``on_settled`` is called when channels were
    confirmed and when nothing is left to be confirmed, ``on_moved`` when a
    sharded channel lives elsewhere now.
    """

    def __init__(
        self,
        name: str,
        counts: Counts,
        *,
        wanted: Mapping[str, bool],
        own_channel: str,
        on_messages: Callable[[list[Message]], None],
        on_settled: Callable[[], None],
        on_moved: Callable[[], None],
    ) -> None:
        super().__init__(name, counts)
        self._wanted = wanted
        self._own = own_channel
        self._on_messages = on_messages
        self._on_settled = on_settled
        self._on_moved = on_moved
        self._heard: dict[bytes, str] = {}
        self._moving: dict[bytes, str] = {}
        self._sharded: set[bytes] = set()
        self._denied: dict[str, float] = {}
        self._sent: deque[_Batch] = deque()
        self._singly: set[str] = set()
        self._homeless: set[str] = set()
        self._changed: set[str] = set(wanted)
        self._wake = trio.Event()
        self._wake.set()
        self._refusals = Throttle()

    @property
    def settled(self) -> bool:
        """Whether everything wanted has been confirmed, but for what was refused."""
        return not (self._changed or self._moving or self._homeless)

    @property
    def heard(self) -> int:
        """How many channels are confirmed."""
        return len(self._heard)

    def hears(self, channel: str) -> bool:
        """Whether ``channel`` is confirmed, and nothing else has been said since."""
        name = channel.encode()
        return name in self._heard and name not in self._moving and channel in self._wanted

    def denied(self, channel: str) -> bool:
        """Whether Redis refused ``channel``."""
        return channel in self._denied

    def change(self, channels: Iterable[str]) -> None:
        """``channels`` have become wanted, or are wanted no more."""
        self._changed.update(channels)
        if self._changed:
            self._wake.set()

    async def run(self, probe: Callable[[], bool], probe_after: float, probe_timeout: float) -> None:
        """Bring changes to Redis, and look after itself, until the connection is over.

        ``probe`` makes something come in, if it can.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            nursery.start_soon(self._watch, probe, probe_after, probe_timeout)
            await self.gone.wait()
            nursery.cancel_scope.cancel()

    async def _tell(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            self._say()

    async def _watch(self, probe: Callable[[], bool], probe_after: float, probe_timeout: float) -> None:
        """Notice silence. Ticks are counted, as by a lane: our own standstill is not Redis's."""
        tick = probe_after / TICKS
        enough = TICKS + round(probe_timeout / tick) - 1
        quiet = 0
        while True:
            reads = self.reads
            await trio.sleep(tick)
            self._compare()
            if self.reads != reads:
                quiet = 0
                continue
            quiet += 1
            if quiet == TICKS - 1:
                self._counts.probes += 1
                if not probe():
                    self.write(pack("PING"))
            elif quiet >= enough:
                self._counts.silences += 1
                self.close(f"nothing heard for {probe_after + probe_timeout:g} s")
                return

    def _compare(self) -> None:
        """Find what is wanted and not heard, or the other way round, whyever."""
        now = trio.current_time()
        for channel in [one for one, since in self._denied.items() if now - since > FORGIVE_AFTER]:
            del self._denied[channel]
        if self._moving or self._changed:
            return
        wrong = (self._wanted.keys() - self._denied.keys()) ^ set(self._heard.values())
        self.change(wrong)

    def _say(self) -> None:
        """Send what changed."""
        changed, self._changed = self._changed, set()
        more: list[str] = []
        more_singly: list[str] = []
        more_sharded: list[str] = []
        less: list[str] = []
        less_sharded: list[str] = []
        self._homeless -= changed
        for channel in changed:
            name = channel.encode()
            if name in self._moving:
                continue  # looked at again when Redis has confirmed
            sharded = self._wanted.get(channel)
            if sharded is None:
                self._denied.pop(channel, None)
                if name not in self._heard:
                    continue
                (less_sharded if name in self._sharded else less).append(channel)
            else:
                if name in self._heard or channel in self._denied:
                    continue
                (more_sharded if sharded else more_singly if channel in self._singly else more).append(
                    channel
                )
            self._moving[name] = channel
        self._command("UNSUBSCRIBE", less, BATCH)
        self._command("SUBSCRIBE", more, BATCH)
        self._command("SUBSCRIBE", more_singly, 1)
        # Channels of one command would have to live in one slot.
        self._command("SUNSUBSCRIBE", less_sharded, 1)
        self._command("SSUBSCRIBE", more_sharded, 1)
        self._sharded.update(channel.encode() for channel in more_sharded)
        self._singly.clear()
        if self.settled:
            self._on_settled()

    def _command(self, word: str, channels: list[str], size: int) -> None:
        """Send ``word`` for ``channels``, ``size`` of them at a time."""
        for start in range(0, len(channels), size):
            batch = channels[start : start + size]
            self._sent.append(_Batch(batch))
            self.write(pack(word, *batch))

    def _received(self, gets: Callable[[], Any]) -> None:
        messages: list[Message] = []
        heard = self._heard
        own = self._own
        confirmed = False
        while (reply := gets()) is not NOTHING:
            if type(reply) is LinkError:
                self._refused(reply)
                confirmed = True
                continue
            kind = reply[0]
            if kind == b"message" or kind == b"smessage":  # noqa: PLR1714 - measured: a set hashes first
                channel = heard.get(reply[1])
                if channel is None:
                    continue  # wanted no more, and Redis has confirmed that already
                if channel == own and reply[2].startswith(_PROBE):
                    continue
                messages.append((channel, reply[2]))
            elif type(kind) is int:
                continue  # +PONG: so it is said to a connection that hears no channel
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
            self._on_settled()

    def _confirm(self, name: bytes, *, heard: bool) -> None:
        channel = self._moving.pop(name, None)
        if channel is None:
            # Said without being asked: a slot has gone to another shard, and its channels with it.
            channel = self._heard.pop(name, None)
            self._sharded.discard(name)
            if channel is not None and channel in self._wanted:
                self._homeless.add(channel)
                self._on_moved()
            return
        batch = self._sent[0]
        batch.left -= 1
        if not batch.left:
            self._sent.popleft()
        if heard:
            self._heard[name] = channel
        else:
            self._heard.pop(name, None)
            self._sharded.discard(name)
        if (channel in self._wanted) != heard:
            self._changed.add(channel)

    def _refused(self, error: LinkError) -> None:
        """Redis refused a whole command."""
        if not self._sent:
            self.close(f"an error that nobody asked for: {error}")
            return
        channels = self._sent.popleft().channels
        for channel in channels:
            self._moving.pop(channel.encode(), None)
        code = error.code
        if code in ELSEWHERE:
            self._homeless.update(channel for channel in channels if channel in self._wanted)
            self._on_moved()
        elif code != "NOPERM":
            self.close(str(error))
        elif len(channels) > 1:
            # One of them, or all: each by itself tells.
            self._singly.update(channels)
            self._changed.update(channels)
        else:
            self._denied[channels[0]] = trio.current_time()
            self._counts.refused_subscriptions += 1
            if (missed := self._refusals.admit("denied")) is not None:
                log.warning("redis refuses a channel", channel=channels[0], why=str(error), suppressed=missed)

    def _lost(self, why: str) -> None:
        self._heard.clear()
        self._moving.clear()
        self._sharded.clear()
