"""Several nodes in one process, each with its own link to one Redis: :class:`Company`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import redis
import trio

from broker.config import Redis
from broker.engine.peers import NodeInfo
from broker.link import wire
from broker.link.base import Message
from broker.link.bridge import RedisLink
from broker.link.interest import Interest
from broker.link.keys import Keys
from broker.peers.nodes import new_id
from broker.peers.peers import SCRIPTS, Feed, RedisPeers
from broker.protocol.events import SessionId, UserId
from tests.peers.fakes import FakeHub, FakeMember
from tests.redis_server import RedisServer

DEADLINE = 30.0
"""Seconds of real time after which something that should have happened fails the test."""
LEASE = 3.0
PARTING = 60.0
SLOTS = 3


async def until(condition: Callable[[], Any]) -> None:
    """Return when ``condition()`` is true."""
    with trio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what it depends on does not know of us
            await trio.sleep(0.005)


class Fellow:
    """One node: a link, and peers that talk to a :class:`FakeHub`."""

    def __init__(self, company: Company, name: str, lease: float, feed: Feed | None) -> None:
        node = new_id()
        self.name = name
        self.hub = FakeHub()
        self.members: dict[str, dict[str, FakeMember]] = {}
        """Room → session → member, as its own hub knows them."""
        self.sessions = 0
        self.deaf: set[bytes] = set()
        """Kinds of messages that do not get through."""
        self.scope = trio.CancelScope()
        keys = company.keys
        settings = Redis(url=company.server.url, node_lease=lease, answer_timeout=5.0)
        self.link = RedisLink(
            settings,
            scripts=SCRIPTS,
            own_channel=keys.node(node),
            on_messages=self._take,
            greet=self._greet,
            on_up=self._on_up,
            on_down=lambda _why: None,
        )
        self.interest = Interest(self.link, keys)
        self.peers = RedisPeers(
            self.link,
            keys,
            self.interest,
            settings,
            self._describe,
            parting=PARTING,
            slot_limit=lambda _room: SLOTS,
            node=node,
            feed=feed,
        )

    def _describe(self) -> NodeInfo:
        return NodeInfo(id="", name=self.name, sessions=self.sessions)

    async def _greet(self, _run_id: str) -> None:
        await trio.lowlevel.checkpoint()

    def _on_up(self) -> None:
        self.peers.on_up()

    def _take(self, messages: Sequence[Message]) -> None:
        for channel, payload in messages:
            head = wire.unpack(payload)
            if head.kind in self.deaf:
                continue
            place = self.interest.find(channel)
            if place is None:
                self.peers.take_node(head)
            else:
                self.peers.take_live(place.room, head)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.link.run)
                nursery.start_soon(self.interest.run)
                await nursery.start(self.peers.run, self.hub)
                task_status.started()

    def die(self) -> None:
        """End without a word to anybody."""
        self.scope.cancel()

    # -- what its hub does ----------------------------------------------------------------

    def come(self, room: str, session: str, user: str | None = None, state: Any = None) -> None:
        """A session joins, or changes its state."""
        member = FakeMember(session, user, state)
        self.members.setdefault(room, {})[session] = member
        self.peers.touch(room, SessionId(session), member.user, member)

    def go(self, room: str, session: str) -> None:
        """A session leaves."""
        member = self.members[room].pop(session)
        user = UserId(member.user) if member.user is not None else None
        self.peers.touch(room, SessionId(session), user, None)

    # -- what it sees ---------------------------------------------------------------------

    def sees(self, room: str) -> set[str]:
        """Sessions of other nodes."""
        return set(self.hub.mates(room))

    def names(self) -> list[str]:
        """Nodes that it takes for alive, itself first."""
        return [info.name for info in self.peers.nodes()]

    def count(self, name: str) -> int:
        """One of its statistics."""
        number = self.peers.statistics()[name]
        assert isinstance(number, int)
        return number


class Company:
    """Nodes by name."""

    def __init__(self, server: RedisServer, nursery: trio.Nursery, prefix: str, lease: float) -> None:
        self.server = server
        self.keys = Keys(prefix)
        self._nursery = nursery
        self._lease = lease
        self.fellows: list[Fellow] = []

    async def start(self, name: str, *, feed: Feed | None = None) -> Fellow:
        """Start one node; returns when its tasks run."""
        fellow = self.build(name, feed=feed)
        await self.run(fellow)
        return fellow

    def build(self, name: str, *, feed: Feed | None = None) -> Fellow:
        """Make a node that does not run yet."""
        fellow = Fellow(self, name, self._lease, feed)
        self.fellows.append(fellow)
        return fellow

    async def run(self, fellow: Fellow) -> None:
        """Start it."""
        await self._nursery.start(fellow.run)

    async def start_all(self, *names: str) -> list[Fellow]:
        """Start nodes; returns when each knows all, and absence counts."""
        fellows = [await self.start(name) for name in names]
        await until(lambda: all(len(fellow.names()) == len(names) for fellow in fellows))
        await self.settle()
        return fellows

    async def settle(self) -> None:
        """Have the leases been kept for long, by the book: absence counts."""
        living = [fellow for fellow in self.fellows if not fellow.scope.cancel_called]
        with self.client() as client:
            client.hset(self.keys.beats, "began", 1)
        for fellow in living:
            await self.look_until(lambda fellow=fellow: fellow.count("settled"))  # type: ignore[misc]

    def look(self) -> None:
        """Have every node look at the list of nodes now."""
        with self.client() as client:
            client.publish(self.keys.everybody, wire.pack(wire.ASK, "test", 0))

    async def look_until(self, condition: Callable[[], Any]) -> None:
        """Have every node look until ``condition()`` is true."""
        with trio.fail_after(DEADLINE):
            while not condition():
                self.look()
                await trio.sleep(0.05)

    def client(self) -> redis.Redis:
        return self.server.client()

    def expire(self, fellow: Fellow) -> None:
        """Its lease has ended long ago."""
        with self.client() as client:
            client.zadd(self.keys.leases, {fellow.peers.id: 1.0})

    def take_out(self, fellow: Fellow) -> None:
        """Others have taken it for dead, and said so to nobody yet."""
        with self.client() as client, client.pipeline() as pipeline:
            pipeline.zrem(self.keys.leases, fellow.peers.id)
            pipeline.hdel(self.keys.nodes, fellow.peers.id)
            pipeline.execute()

    def left_of(self, fellow: Fellow) -> list[str]:
        """What Redis still keeps of it."""
        node = fellow.peers.id
        with self.client() as client:
            found = [key.decode() for key in client.keys(f"{self.keys.prefix}*{node}*")]
            for key in client.keys(f"{self.keys.prefix}{{*}}:members"):
                if client.hexists(key, node):
                    found.append(key.decode())
            if client.zscore(self.keys.leases, node) is not None or client.hexists(self.keys.nodes, node):
                found.append("lease")
        return found


@contextlib.asynccontextmanager
async def company(server: RedisServer, prefix: str = "test:", lease: float = LEASE) -> AsyncIterator[Company]:
    """A company that ends with the block; no change that its hubs were told of was impossible."""
    async with trio.open_nursery() as nursery:
        found = Company(server, nursery, prefix, lease)
        yield found
        for fellow in found.fellows:
            assert fellow.hub.faults == []
        nursery.cancel_scope.cancel()
