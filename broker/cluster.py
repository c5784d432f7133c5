"""A node among others: builds what one Redis makes of it, and runs it in order.

The one place that knows all parts. What comes in from the link is handed out
here, many messages at once, in the order in which Redis sent them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from broker.backends.ingest import Ingest
from broker.backends.leases import LEASE
from broker.backends.lifecycle import DEPART, DUE, WRITE, Lifecycle
from broker.backends.reader import READ_STREAM, REMEMBERED, Reader
from broker.backends.rejected import REJECT, Rejected
from broker.backends.said import PUBLISHER
from broker.config import Config, RoomOptions
from broker.engine.base import Done
from broker.engine.peers import Events, NodeInfo
from broker.link import wire
from broker.link.base import Message
from broker.link.bridge import RedisLink
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.link.wire import Head
from broker.logs import Throttle, get_logger
from broker.peers import peers as peer_scripts
from broker.peers.nodes import new_id
from broker.peers.peers import RedisPeers
from broker.protocol.events import Event, Position
from broker.streams import scripts as stream_scripts
from broker.streams.engine import RedisEngine
from broker.streams.generation import Generation
from broker.streams.scripts import Tokens

log = get_logger(__name__)

SCRIPTS: Final = (
    *stream_scripts.SCRIPTS,
    *peer_scripts.SCRIPTS,
    LEASE,
    READ_STREAM,
    REJECT,
    WRITE,
    DEPART,
    DUE,
)
PARTING: Final = 5.0
"""Seconds that members of a drained node are kept beyond ``server.retry_after``, for their way back."""


class Centre(Events, Protocol):
    """The hub, as a cluster sees it."""

    def deliver(self, events: Any, /) -> None:
        """Stored events, in order per room."""

    def moved(self, room: str, position: Position, /) -> None:
        """An open room's stream is at ``position``, with no event to deliver."""

    def publish(self, event: Event, options: RoomOptions, done: Done | None = None) -> None:
        """The gate that every event goes through, whoever says it."""


class RedisCluster:
    """Engine and peers of one node.

    ``describe`` gives what the node says of itself, ``wall`` is Unix time (s).
    """

    def __init__(
        self, config: Config, *, describe: Callable[[], NodeInfo], wall: Callable[[], float]
    ) -> None:
        settings = config.redis
        node = new_id()
        self._config = config
        self._wall = wall
        self._keys = Keys(settings.prefix)
        self._throttle = Throttle()
        self._bad_messages = 0
        self._ending = False
        self._link = RedisLink(
            settings,
            scripts=SCRIPTS,
            own_channel=self._keys.node(node),
            on_messages=self._take,
            greet=self._greet,
            on_up=self._on_up,
            on_down=self._on_down,
        )
        self._interest = Interest(self._link, self._keys)
        self._generation = Generation(self._keys, lambda: self.peers.id, Tokens())
        self._lifecycle = Lifecycle(
            self._link,
            self._keys,
            settings,
            node=lambda: self.peers.id,
            alive=self._alive,
            clock=wall,
        )
        self.engine = RedisEngine(
            self._link,
            self._keys,
            self._interest,
            self._generation,
            ring_events=config.store.ring_events,
            sweep_interval=settings.sweep_interval,
            replicas=settings.replicas,
            key_windows={PUBLISHER: REMEMBERED},
            clock=wall,
        )
        self.peers = RedisPeers(
            self._link,
            self._keys,
            self._interest,
            settings,
            describe,
            parting=config.server.retry_after + PARTING,
            slot_limit=lambda room: config.options(room).slots,
            node=node,
            feed=self._lifecycle if settings.lifecycle else None,
        )
        self._rejected = Rejected(self._link, self._keys, settings.lifecycle_length)
        self._ingest: Ingest | None = None
        self._reader: Reader | None = None

    async def run(
        self, hub: Centre, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run until cancelled. Started once Redis answers, or once it is clear that it does not now.

        Raises :class:`~broker.errors.ConfigurationError` if Redis can never be used with these settings.
        """
        options = self._config.options
        self._ingest = Ingest(hub, self._rejected, options, self.peers.remember, clock=self._wall)
        self._reader = Reader(
            self._link,
            self._keys,
            self._rejected,
            options,
            node=self.peers.id,
            settings=self._config.redis,
            publish=lambda event, done: hub.publish(event, options(event.room), done),
            tell=lambda event: hub.publish(event, options(event.room)),
            clock=self._wall,
        )
        async with trio.open_nursery() as nursery:
            link = trio.CancelScope()
            await nursery.start(self._run_link, link)
            link.shield = True  # it outlives the others, which have last words to say
            try:
                async with trio.open_nursery() as parts:
                    parts.start_soon(self._interest.run)
                    await parts.start(self.engine.run, hub.deliver, hub.moved)
                    await parts.start(self.peers.run, hub)
                    await parts.start(self._reader.run)
                    if self._config.redis.lifecycle:
                        parts.start_soon(self._lifecycle.run)
                    task_status.started()
            finally:
                self._ending = True
                link.cancel()

    async def _run_link(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await self._link.run(task_status=task_status)

    def _alive(self) -> list[str]:
        return self.peers.alive()

    # -- what the link says -------------------------------------------------------------

    async def _greet(self, run_id: str) -> None:
        await self._generation.greet(self._link, run_id)

    def _on_up(self) -> None:
        self.engine.reconnected()
        self.peers.on_up()

    def _on_down(self, why: str) -> None:
        self.engine.disconnected()
        if not self._ending:
            log.warning("Redis is away; ephemeral rooms go on here, the others wait", why=why)

    def _take(self, messages: list[Message]) -> None:
        """HOT: everything that other nodes and backends say comes through here."""
        stored: list[tuple[str, Head]] = []
        said: list[tuple[str, bytes]] = []
        find = self._interest.find
        for channel, payload in messages:
            place = find(channel)
            if place is not None and place.kind == "backend":
                said.append((place.room, payload))
                continue
            try:
                head = wire.unpack(payload)
            except wire.WireError as error:
                self._cannot_read(channel, error)
                continue
            if place is None:
                self.peers.take_node(head)
            elif head.kind == wire.DURABLE:
                stored.append((place.room, head))
            else:
                self.peers.take_live(place.room, head)
        if stored:
            self.engine.take(stored)
        if said and self._ingest is not None:
            self._ingest.take(said)

    def _cannot_read(self, channel: str, error: wire.WireError) -> None:
        self._bad_messages += 1
        missed = self._throttle.admit("message")
        if missed is not None:
            log.warning("a message cannot be read", channel=channel, why=str(error), suppressed=missed)

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges of the parts that nobody else asks, by part."""
        parts: dict[str, Any] = {
            "link": self._link.statistics(),
            "interest": self._interest.statistics(),
            "rejected": self._rejected.statistics(),
            "lifecycle": self._lifecycle.statistics(),
            "unreadable": self._bad_messages,
        }
        if self._ingest is not None:
            parts["ingest"] = self._ingest.statistics()
        if self._reader is not None:
            parts["reader"] = self._reader.statistics()
        return parts
