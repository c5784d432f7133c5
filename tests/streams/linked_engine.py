"""An engine with a link of its own, so that ``run`` is all that it needs, and several of them together."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import redis
import trio

from broker.config import Redis
from broker.engine.base import Deliver, Moved, stays
from broker.errors import BrokerError, ErrorCode
from broker.link import wire
from broker.link.base import Message
from broker.link.bridge import RedisLink
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.protocol.events import Position
from broker.streams.engine import RedisEngine
from broker.streams.generation import Generation
from broker.streams.scripts import SCRIPTS, Tokens
from tests.engine.contract import ManualClock, Reply, Rig
from tests.link.linked import until
from tests.redis_server import RedisServer

_numbers = itertools.count(1)


class ShardLink(RedisLink):
    """A link that calls itself one to a Redis Cluster. What is published in shards it does not hear."""

    @property
    def clustered(self) -> bool:
        return True


class LinkedEngine(RedisEngine):
    """What the composition of a node does for its engine, and no more."""

    def __init__(
        self,
        server: RedisServer,
        clock: Callable[[], float],
        *,
        prefix: str = "broker:",
        ring_events: int = 4,
        sweep_interval: float = 5.0,
        replicas: int = 0,
        key_windows: Mapping[str, float] = MappingProxyType({}),
        patience: float = 60.0,
        link: type[RedisLink] = RedisLink,
        url: str | None = None,
        **settings: Any,
    ) -> None:
        self.server = server
        self.keys = Keys(prefix)
        self.name = f"node{next(_numbers)}"
        self.hears: Callable[[str, wire.Head], bool] = lambda _room, _head: True
        """Which messages reach the engine: a test makes it deaf."""
        self.generation = Generation(self.keys, lambda: self.name, Tokens(), patience=patience)
        self.ups = 0
        self.link = link(
            Redis(url=url or server.url, **settings),
            scripts=SCRIPTS,
            own_channel=self.keys.node(self.name),
            on_messages=self._on_messages,
            greet=lambda run_id: self.generation.greet(self.link, run_id),
            on_up=self._on_up,
            on_down=lambda _why: self.disconnected(),
        )
        self.interest = Interest(self.link, self.keys)
        super().__init__(
            self.link,
            self.keys,
            self.interest,
            self.generation,
            ring_events=ring_events,
            sweep_interval=sweep_interval,
            replicas=replicas,
            key_windows=key_windows,
            clock=clock,
        )

    def _on_up(self) -> None:
        self.ups += 1
        self.reconnected()

    def _on_messages(self, messages: list[Message]) -> None:
        found = []
        for channel, payload in messages:
            place = self.interest.find(channel)
            if place is not None and payload.startswith(wire.DURABLE):
                head = wire.unpack(payload)
                if self.hears(place.room, head):
                    found.append((place.room, head))
        if found:
            self.take(found)

    async def run(
        self,
        deliver: Deliver,
        moved: Moved = stays,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        if self._started:
            raise RuntimeError("this engine runs already")
        async with trio.open_nursery() as nursery:
            link_scope = await nursery.start(self._keep_link)
            try:
                await super().run(deliver, moved, task_status=task_status)
            finally:
                link_scope.cancel()

    async def _keep_link(
        self, *, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The link ends after the engine, which still waits for answers."""
        with trio.CancelScope(shield=True) as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.link.run)
                nursery.start_soon(self.interest.run)
                task_status.started(scope)


class RedisHarness:
    """Engines on one server, under one prefix."""

    survives = True

    def __init__(self, server: RedisServer, **options: Any) -> None:
        self.clock = ManualClock()
        self._server = server
        self._options = {"prefix": f"broker{next(_numbers)}:"} | options

    def engine(self, *, ring_events: int = 4, **options: Any) -> LinkedEngine:
        return LinkedEngine(
            self._server, self.clock, **(self._options | {"ring_events": ring_events} | options)
        )

    def fresh(self) -> RedisHarness:
        options = {name: value for name, value in self._options.items() if name != "prefix"}
        return RedisHarness(self._server, **options)


class ClusterRig(Rig):
    """A running engine of several, what it delivered, and where it said that streams have moved."""

    engine: LinkedEngine

    def __init__(self, engine: LinkedEngine, clock: ManualClock) -> None:
        super().__init__(engine, clock)
        self.moves: list[tuple[str, Position]] = []
        self.alone = trio.CancelScope()
        """Ends this engine, and no other."""

    def moved(self, room: str, position: Position) -> None:
        self.moves.append((room, position))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.alone:
            await self.engine.run(self.deliver, self.moved, task_status=task_status)

    def count(self, name: str) -> int:
        return int(self.engine.statistics()[name])

    async def caught_up(self, room: str, offset: int) -> None:
        """Wait until the open room is at ``offset``."""
        await until(lambda: (top := self.engine.position(room)) is not None and top.offset >= offset)


@asynccontextmanager
async def together(harness: RedisHarness, count: int = 2, **options: Any) -> AsyncIterator[list[ClusterRig]]:
    """Several engines on one store."""
    rigs = [ClusterRig(harness.engine(**options), harness.clock) for _ in range(count)]
    async with trio.open_nursery() as nursery:
        for rig in rigs:
            rig.scope = nursery.cancel_scope
            await nursery.start(rig.run)
        yield rigs
        nursery.cancel_scope.cancel()


def redis_of(rig: ClusterRig) -> redis.Redis:
    """A client of the rig's server."""
    return rig.engine.server.client()


async def refusal(reply: Reply) -> BrokerError:
    answer = await reply.answer()
    assert isinstance(answer, BrokerError), answer
    assert answer.code is ErrorCode.UNAVAILABLE
    assert answer.retry_after
    return answer
