"""The lifecycle feed, on a real Redis: who comes and goes, in the cluster and not on a node."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from broker.backends.lifecycle import DEPART, DUE, WRITE, Lifecycle
from broker.config import Redis
from broker.link.base import Message
from broker.link.bridge import RedisLink
from broker.link.keys import Keys
from broker.protocol.events import SessionId, UserId
from tests.redis_server import RedisServer

PATIENCE = 20.0
ANN, BOB = UserId("ann"), UserId("bob:1")
KEYS = Keys("broker:")


class Feed:
    """A cluster of nodes that only tell who is there, and what came of it."""

    def __init__(self, server: RedisServer, grace: float) -> None:
        self.server = server
        self.settings = Redis(url=server.url, lifecycle_grace=grace, lifecycle_length=1000)
        self.alive: list[str] = []
        self.client = server.client(decode_responses=True)

    def read(self) -> list[tuple[str, ...]]:
        """Everything that was told: the event, the room if any, and who."""
        entries: Any = self.client.xrange(KEYS.lifecycle)
        assert all(abs(float(fields["ts"]) - time.time()) < 3600 for _, fields in entries)
        return [
            tuple(fields[name] for name in ("event", "room", "user", "session") if name in fields)
            for _, fields in entries
        ]

    def added(self) -> int:
        """Entries that were ever added."""
        info: Any = self.client.xinfo_stream(KEYS.lifecycle)
        return int(info["entries-added"])

    async def until(self, condition: Callable[[list[tuple[str, ...]]], object]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition(self.read()):
                await wait_all_tasks_blocked(0.005)

    async def told(self, *entries: tuple[str, ...]) -> None:
        """Wait until exactly these were told, in any order."""
        await self.until(lambda read: len(read) >= len(entries))
        assert sorted(self.read()) == sorted(entries)

    @asynccontextmanager
    async def node(self, name: str) -> AsyncIterator[Lifecycle]:
        """A node that is alive until the block ends, and then is dead without a word."""

        async def greet(_run: str) -> None:
            pass

        def ignore(_messages: list[Message] | str) -> None:
            pass

        link = RedisLink(
            self.settings,
            scripts=[WRITE, DEPART, DUE],
            own_channel=KEYS.node(name),
            on_messages=ignore,
            greet=greet,
            on_up=lambda: None,
            on_down=ignore,
        )
        feed = Lifecycle(
            link, KEYS, self.settings, node=lambda: name, alive=lambda: self.alive, clock=time.time
        )
        self.alive.append(name)
        async with trio.open_nursery() as nursery:
            await nursery.start(link.run)
            nursery.start_soon(feed.run)
            yield feed
            nursery.cancel_scope.cancel()
        self.alive.remove(name)


@pytest.fixture
def feed(redis_at: RedisServer) -> Feed:
    return Feed(redis_at, grace=0.0)


@pytest.fixture
def patient(redis_at: RedisServer) -> Feed:
    """A feed whose grace time never ends."""
    return Feed(redis_at, grace=3600.0)


async def test_a_session_comes_and_goes(feed: Feed) -> None:
    async with feed.node("a") as node:
        node.appeared(SessionId("s1"), ANN)
        node.came("deal:1", SessionId("s1"), ANN)
        came = [("connected", "ann"), ("joined", "deal:1", "ann"), ("occupied", "deal:1")]
        await feed.told(*came)
        node.went("deal:1", SessionId("s1"), ANN)
        node.vanished(SessionId("s1"), ANN)
        await feed.told(*came, ("left", "deal:1", "ann"), ("vacated", "deal:1"), ("disconnected", "ann"))
        assert node.statistics() == {"told": 6, "failed": 0, "waiting": 0}


async def test_a_second_session_is_no_news(feed: Feed) -> None:
    async with feed.node("a") as a, feed.node("b") as b:
        a.appeared(SessionId("s1"), BOB)
        a.came("deal:1", SessionId("s1"), BOB)
        expected = [("connected", "bob:1"), ("joined", "deal:1", "bob:1"), ("occupied", "deal:1")]
        await feed.told(*expected)
        b.appeared(SessionId("s2"), BOB)
        b.came("deal:1", SessionId("s2"), BOB)
        b.came("deal:2", SessionId("s2"), BOB)
        expected += [("joined", "deal:2", "bob:1"), ("occupied", "deal:2")]
        await feed.told(*expected)
        a.went("deal:1", SessionId("s1"), BOB)
        a.came("deal:3", SessionId("s1"), BOB)
        await feed.told(*expected, ("joined", "deal:3", "bob:1"), ("occupied", "deal:3"))


async def test_an_anonymous_session_is_somebody(feed: Feed) -> None:
    async with feed.node("a") as node:
        node.appeared(SessionId("s1"), None)
        await feed.told(("connected", "s1"))
        node.appeared(SessionId("s1"), ANN)  # it authenticated
        await feed.told(("connected", "s1"), ("connected", "ann"), ("disconnected", "s1"))


async def test_who_is_back_in_time_has_not_been_away(patient: Feed) -> None:
    async with patient.node("a") as a, patient.node("b") as b:
        a.appeared(SessionId("s1"), ANN)
        a.came("deal:1", SessionId("s1"), ANN)
        came = [("connected", "ann"), ("joined", "deal:1", "ann"), ("occupied", "deal:1")]
        await patient.told(*came)
        a.went("deal:1", SessionId("s1"), ANN)
        a.vanished(SessionId("s1"), ANN)
        await patient.until(lambda _: patient.client.zcard(KEYS.departures) == 3)
        b.appeared(SessionId("s2"), ANN)
        b.came("deal:1", SessionId("s2"), ANN)
        await patient.until(lambda _: patient.client.zcard(KEYS.departures) == 0)
        b.came("deal:2", SessionId("s2"), ANN)
        await patient.told(*came, ("joined", "deal:2", "ann"), ("occupied", "deal:2"))


async def test_a_visit_within_one_flush_is_not_mentioned(feed: Feed) -> None:
    async with feed.node("a") as node:
        node.came("deal:1", SessionId("s1"), ANN)
        node.went("deal:1", SessionId("s1"), ANN)
        node.came("deal:2", SessionId("s1"), ANN)
        await feed.told(("joined", "deal:2", "ann"), ("occupied", "deal:2"))


async def test_a_dead_node_takes_its_people_along(feed: Feed) -> None:
    async with feed.node("b") as b:
        b.came("deal:1", SessionId("s2"), BOB)
        async with feed.node("a") as a:
            a.appeared(SessionId("s1"), ANN)
            a.came("deal:1", SessionId("s1"), ANN)
            a.came("deal:1", SessionId("s3"), BOB)
            came = [
                ("connected", "ann"),
                ("joined", "deal:1", "ann"),
                ("joined", "deal:1", "bob:1"),
                ("occupied", "deal:1"),
            ]
            await feed.told(*came)
        await feed.told(*came, ("left", "deal:1", "ann"), ("disconnected", "ann"))
        assert feed.client.smembers(KEYS.writers) == {"b"}


async def test_who_moves_from_a_dead_node_has_not_been_away(feed: Feed) -> None:
    async with feed.node("b") as b:
        async with feed.node("a") as a:
            a.came("deal:1", SessionId("s1"), ANN)
            came = [("joined", "deal:1", "ann"), ("occupied", "deal:1")]
            await feed.told(*came)
            b.came("deal:1", SessionId("s2"), ANN)
            await feed.until(lambda _: feed.client.hexists(KEYS.who("deal:1"), "b:uann"))
        await feed.until(lambda _: not feed.client.hexists(KEYS.who("deal:1"), "a:uann"))
        b.came("deal:2", SessionId("s2"), ANN)
        await feed.told(*came, ("joined", "deal:2", "ann"), ("occupied", "deal:2"))


async def test_a_store_that_forgot_is_told_again(feed: Feed) -> None:
    async with feed.node("a") as node:
        node.came("deal:1", SessionId("s1"), ANN)
        came = [("joined", "deal:1", "ann"), ("occupied", "deal:1")]
        await feed.told(*came)
        feed.client.flushall()
        node.write_all()
        await feed.told(*came)
        node.went("deal:1", SessionId("s1"), ANN)
        await feed.told(*came, ("left", "deal:1", "ann"), ("vacated", "deal:1"))


async def test_the_feed_is_capped(redis_at: RedisServer) -> None:
    feed = Feed(redis_at, grace=0.0)
    feed.settings = msgspec.structs.replace(feed.settings, lifecycle_length=10)
    async with feed.node("a") as node:
        for number in range(1000):
            node.appeared(SessionId(f"s{number}"), None)
        await feed.until(lambda read: read and feed.added() == 1000)
        assert len(feed.read()) < 300  # Redis trims by whole nodes of its tree


async def test_a_refused_write_is_counted_and_tried_again(feed: Feed) -> None:
    async with feed.node("a") as node:
        feed.client.set(KEYS.who("deal:1"), "not a hash")
        node.came("deal:1", SessionId("s1"), ANN)
        await feed.until(lambda _: node.failed)
        feed.client.delete(KEYS.who("deal:1"))
        await feed.told(("joined", "deal:1", "ann"), ("occupied", "deal:1"))
