"""One primary and the connections to it: the hot lane, the subscriber, the pool for calls.

A server behind ``redis://`` or Sentinel is one shard; a Redis Cluster has
several. Each connection is opened anew when it breaks. The lane leads: it finds
the primary, and a subscriber that finds itself on another server makes it look again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from broker.config import Redis
from broker.link import wire
from broker.link.backoff import Backoff
from broker.link.base import LinkDown, LinkError, Message, Script
from broker.link.counts import Counts
from broker.link.dial import Dialer, Refused, refusal
from broker.link.lane import Lane, pack
from broker.link.pool import Pool
from broker.link.subscriber import Subscriber
from broker.link.target import Address
from broker.logs import Throttle, get_logger

log = get_logger(__name__)

ENDED: Final = "the link has ended"


@dataclass(frozen=True)
class Terms:
    """What all shards of a link have in common."""

    settings: Redis
    dialer: Dialer
    scripts: Sequence[Script]
    own_channel: str
    counts: Counts
    throttle: Throttle
    clustered: bool


class Events(NamedTuple):
    """What a shard tells the link; all called on the Trio thread."""

    ready: Callable[[], None]
    """The lane can be used."""
    lost: Callable[[str], None]
    """The lane or the subscriber is gone."""
    settled: Callable[[], None]
    """Channels were confirmed."""
    refused: Callable[[Refused], None]
    """Redis is there and will not have us."""
    moved: Callable[[], None]
    """In a cluster: a key lives elsewhere now."""
    unheard: Callable[[], None]
    """In a cluster: a channel lives elsewhere now, and is not heard meanwhile."""
    messages: Callable[[list[Message]], None]


class Server(NamedTuple):
    """Who answered."""

    run_id: str
    primary: bool


class Shard:
    """Connections to one primary, whose address ``find`` tells before each attempt."""

    def __init__(
        self,
        terms: Terms,
        events: Events,
        find: Callable[[], Awaitable[Address | None]],
        wanted: dict[str, bool],
    ) -> None:
        self.wanted = wanted
        """Channels to hear on this shard: name → whether sharded."""
        self.lane: Lane | None = None
        """The hot lane, once it can be used."""
        self.subscriber: Subscriber | None = None
        self.run_id = ""
        """Of the primary that the lane has found."""
        self.address: Address | None = None
        self._terms = terms
        self._events = events
        self._find = find
        self._may_hear = trio.Event()
        self._probes = 0
        self.pool = Pool(self._open_call)

    @property
    def settled(self) -> bool:
        """Whether commands are answered and everything wanted is heard."""
        return self.lane is not None and self.subscriber is not None and self.subscriber.settled

    def tell(self, channels: Iterable[str]) -> None:
        """``wanted`` has changed for ``channels``."""
        if self.subscriber is not None:
            self.subscriber.change(channels)

    def hear(self) -> None:
        """Let the subscriber connect: the link has been greeted."""
        self._may_hear.set()

    async def run(self) -> None:
        """Keep connections until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pool.run)
            nursery.start_soon(self._keep_lane)
            nursery.start_soon(self._keep_subscriber)

    # -- commands -----------------------------------------------------------------------

    async def _keep_lane(self) -> None:
        backoff = Backoff()
        while True:
            try:
                lane = await self._open_hot()
            except LinkError as error:
                self._report(error)
            else:
                backoff.succeeded()
                self.lane = lane
                try:
                    self._events.ready()
                    await lane.run()
                finally:
                    self.lane = None
                    if self._may_hear.is_set():  # else somebody waits for this very event
                        self._may_hear = trio.Event()
                    lane.close(ENDED)
                    self.pool.close(lane.why or "")
                    self._events.lost(lane.why or "")
            await backoff.pause()

    async def _open_hot(self) -> Lane:
        """Find the primary and make it ready."""
        self.address = await self._find()
        lane, server = await self._open("commands")
        try:
            if not server.primary:
                raise LinkDown("this server is a replica")
            await lane.load_scripts()
        except LinkError as error:
            lane.close(str(error))
            raise refusal(error) from error
        self.run_id = server.run_id
        if self._terms.clustered:
            lane.on_moved = self._events.moved
        return lane

    async def _open_call(self) -> Lane:
        lane, server = await self._open("calls")
        if server.run_id != self.run_id:
            lane.close("another server")
            self._suspect()
            raise LinkDown("another server answers at this address")
        return lane

    async def _open(self, purpose: str) -> tuple[Lane, Server]:
        """Connect, and ask who is there. Raises :class:`LinkDown`."""
        terms = self._terms
        lane = Lane(purpose, terms.counts, terms.scripts, terms.settings.answer_timeout, terms.throttle)
        await terms.dialer.open(lane, self.address)
        terms.counts.connects += 1
        _, *replies = await lane.ask(
            pack("CLIENT", "SETNAME", f"{terms.own_channel}/{purpose}"),  # only for people: CLIENT LIST
            pack("INFO", "server"),
            pack("INFO", "replication"),
        )
        facts: dict[bytes, bytes] = {}
        for reply in replies:
            if isinstance(reply, LinkError):
                lane.close(str(reply))
                failure = refusal(reply)
                raise failure if isinstance(failure, LinkDown) else LinkDown(str(reply))
            facts.update(line.split(b":", 1) for line in reply.split(b"\r\n") if b":" in line)
        mode = facts.get(b"redis_mode", b"").decode()
        if mode == "sentinel" or (mode == "cluster") != terms.clustered:
            lane.close(mode)
            scheme = "redis" if mode == "standalone" else f"redis+{mode}"
            raise Refused(f"this is a {mode} server", f"write {scheme}:// (or rediss…)")
        return lane, Server(facts.get(b"run_id", b"").decode(), facts.get(b"role") == b"master")

    def move(self, address: Address) -> None:
        """The primary is at ``address`` now: go there."""
        if self.lane is not None and self.address != address:
            self.lane.close(f"the primary is now {address}")

    def _suspect(self) -> None:
        """Look for the primary again."""
        if self.lane is not None:
            self.lane.close("another server answers now")

    def _report(self, error: LinkError) -> None:
        self._terms.counts.connect_failures += 1
        if isinstance(error, Refused):
            self._events.refused(error)
        if (missed := self._terms.throttle.admit(("connect", str(error)))) is not None:
            log.warning("redis cannot be used", address=str(self.address), why=str(error), suppressed=missed)

    # -- subscriptions --------------------------------------------------------------------

    async def _keep_subscriber(self) -> None:
        backoff = Backoff()
        while True:
            await self._may_hear.wait()
            try:
                subscriber = await self._open_subscriber()
            except LinkError as error:
                self._report(error)
            else:
                backoff.succeeded()
                self.subscriber = subscriber
                settings = self._terms.settings
                try:
                    await subscriber.run(self._probe, settings.probe_after, settings.probe_timeout)
                finally:
                    self.subscriber = None
                    subscriber.close(ENDED)
                    self._events.lost(subscriber.why or "")
            await backoff.pause()

    async def _open_subscriber(self) -> Subscriber:
        lane, server = await self._open("subscriber")
        if server.run_id != self.run_id:
            lane.close("another server")
            self._suspect()
            raise LinkDown("another server answers at this address")
        subscriber = Subscriber(
            "subscriber",
            self._terms.counts,
            wanted=self.wanted,
            own_channel=self._terms.own_channel,
            on_messages=self._events.messages,
            on_settled=self._events.settled,
            on_moved=self._events.unheard,
        )
        subscriber.attach(lane.release())
        return subscriber

    def _probe(self) -> bool:
        """Speak to ourselves through Redis; false where that is not possible."""
        own = self._terms.own_channel
        if self.lane is None or own not in self.wanted:
            return False
        self._probes += 1
        self.lane.send(_ignore, pack("PUBLISH", own, wire.pack(wire.PROBE, self._probes)))
        return True


def _ignore(_: object) -> None:
    """A probe's answer is the probe itself, on the subscriber."""
