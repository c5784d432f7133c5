"""Leases: who is alive, who is not, and who only seems so."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import pytest
import redis

from broker.engine.peers import NodeInfo
from broker.link.keys import Keys
from broker.peers.nodes import HEARTBEAT
from tests.peers.company import Company, Fellow, company, until
from tests.redis_server import RedisServer

LEASE = 10_000


class Beat(NamedTuple):
    """Answer to one heartbeat."""

    status: int
    settled: int
    ended: list[str]
    nodes: list[str]


class Book:
    """The script alone."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.keys = Keys("test:")

    def beat(self, node: str, mode: str = "keep", length: int = LEASE) -> Beat:
        keys = self.keys
        answer: Any = self.client.eval(
            HEARTBEAT.source, 3, keys.leases, keys.nodes, keys.beats, node, mode, length, "{}", LEASE
        )
        status, settled, ended, listing = answer
        return Beat(status, settled, self._names(ended), self._names(listing[::2]))

    def _names(self, raw: list[bytes]) -> list[str]:
        return sorted(one.decode() for one in raw)

    def settle(self) -> None:
        self.client.hset(self.keys.beats, "began", 1)

    def end(self, *nodes: str) -> None:
        for node in nodes:
            self.client.zadd(self.keys.leases, {node: 1})

    def nobody_beat_for(self, milliseconds: int) -> None:
        last = int(self.client.hget(self.keys.beats, "last") or 0)
        self.client.hset(self.keys.beats, "last", last - milliseconds)


@pytest.fixture
def book(redis_at: RedisServer) -> Any:
    with redis_at.client() as client:
        yield Book(client)


# -- the script -------------------------------------------------------------------------


def test_who_takes_a_lease_is_listed(book: Book) -> None:
    assert book.beat("a", "first") == (1, 0, [], ["a"])
    assert book.beat("b", "first") == (1, 0, [], ["a", "b"])


def test_an_ended_lease_is_told_once(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.beat("c", "first")
    book.settle()
    book.end("a")
    assert book.beat("b") == (1, 1, ["a"], ["b", "c"])
    assert book.beat("c") == (1, 1, [], ["b", "c"])


def test_who_was_taken_out_hears_of_it(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.settle()
    book.end("a")
    book.beat("b")
    assert book.beat("a").status == 0
    assert book.beat("b").nodes == ["b"]


def test_a_late_node_that_nobody_missed_goes_on(book: Book) -> None:
    book.beat("a", "first")
    book.settle()
    book.end("a")
    assert book.beat("a") == (1, 1, [], ["a"])


def test_when_redis_was_away_everybody_gets_time_to_come_back(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.settle()
    book.end("a", "b")
    book.nobody_beat_for(60_000)
    assert book.beat("a") == (1, 0, [], ["a", "b"])
    assert book.beat("b") == (1, 0, [], ["a", "b"])


def test_what_redis_has_lost_is_entered_again(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.settle()
    book.client.flushall()
    assert book.beat("a") == (2, 0, [], ["a"])
    assert book.beat("b") == (2, 0, [], ["a", "b"])
    assert book.beat("a").status == 1


def test_leases_that_redis_has_evicted_are_no_deaths(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.settle()
    book.client.delete(book.keys.leases)
    assert book.beat("a") == (2, 0, [], ["a"])
    assert book.beat("b") == (2, 0, [], ["a", "b"])
    book.client.delete(book.keys.nodes)
    book.settle()
    assert book.beat("a") == (1, 1, [], ["a", "b"])


def test_who_is_listed_without_a_lease_is_taken_out(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.client.zrem(book.keys.leases, "b")
    assert book.beat("a") == (1, 0, [], ["a"])
    book.settle()
    assert book.beat("a") == (1, 1, ["b"], ["a"])
    assert book.client.hkeys(book.keys.nodes) == [b"a"]


def test_the_last_lease_of_a_node_is_as_long_as_it_wants_and_ends(book: Book) -> None:
    book.beat("a", "first")
    book.beat("b", "first")
    book.settle()
    book.beat("a", "part", 60_000)
    before = book.client.zscore(book.keys.leases, "a")
    assert book.beat("a", "look").nodes == ["a", "b"]
    assert book.client.zscore(book.keys.leases, "a") == before
    book.end("a")
    assert book.beat("b").ended == ["a"]
    assert book.beat("a", "part", 60_000).nodes == ["b"], "who is no more does not come back by parting"


# -- nodes ------------------------------------------------------------------------------


async def test_nodes_know_each_other_at_once(redis_at: RedisServer) -> None:
    async with company(redis_at, lease=600.0) as nodes:  # so that only news can be the reason
        first = await nodes.start("first")
        assert first.names() == ["first"]
        third = await nodes.start("third")
        second = await nodes.start("second")
        await until(lambda: first.names() == ["first", "second", "third"])
        await until(lambda: second.names() == ["second", "first", "third"])
        await until(lambda: third.names() == ["third", "first", "second"])
        assert len({first.peers.id, second.peers.id, third.peers.id}) == 3
        assert set(first.peers.alive()) == set(second.peers.alive())


async def test_what_a_node_says_of_itself_is_renewed(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        there.sessions = 42
        await nodes.look_until(lambda: here.peers.nodes()[1].sessions == 42)
        assert here.peers.nodes()[1].id == there.peers.id


async def test_a_node_that_died_is_gone_everywhere(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there, dead = await nodes.start_all("here", "there", "dead")
        dead.die()
        nodes.expire(dead)
        await until(lambda: here.names() == ["here", "there"] and there.names() == ["there", "here"])
        assert here.count("buried_nodes") + there.count("buried_nodes") == 1
        assert nodes.left_of(dead) == []


async def taken_for_dead(nodes: Company, fellow: Fellow) -> None:
    former = fellow.peers.id
    nodes.take_out(fellow)
    await nodes.look_until(lambda: fellow.peers.id != former)


async def test_a_node_that_was_taken_for_dead_goes_on_under_a_new_id(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, frozen = await nodes.start_all("here", "frozen")
        former = frozen.peers.id
        await taken_for_dead(nodes, frozen)
        await until(lambda: [info.id for info in here.peers.nodes()[1:]] == [frozen.peers.id])
        assert frozen.count("fenced") == 1
        assert former not in here.peers.alive()
        await until(lambda: frozen.link.hears(nodes.keys.node(frozen.peers.id)))


async def test_redis_losing_everything_makes_no_node_die(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        here, there = await nodes.start_all("here", "there")
        ids = set(here.peers.alive())
        with nodes.client() as client:
            client.flushall()
        await nodes.look_until(lambda: here.count("forgotten") and there.count("forgotten"))
        assert set(here.peers.alive()) == set(there.peers.alive()) == ids
        assert here.count("settled") == 0


async def test_a_node_that_drains_is_told_at_once_and_stays_for_a_while(redis_at: RedisServer) -> None:
    async with company(redis_at, lease=600.0) as nodes:
        here, leaving = await nodes.start_all("here", "leaving")
        await here.peers.attach("r")
        leaving.come("r", "s1", "u1")
        await until(lambda: here.sees("r") == {"s1"})
        await leaving.peers.part()
        await until(lambda: here.hub.parted == [leaving.peers.id])
        assert here.peers.nodes()[1].draining
        leaving.go("r", "s1")
        leaving.die()
        nodes.look()
        here.come("r", "s2", "u1")
        await until(lambda: here.count("told_changes") == 1)
        assert here.sees("r") == {"s1"}
        nodes.expire(leaving)
        await nodes.look_until(lambda: not here.sees("r"))
        assert here.hub.told == [("came", "r", "s1"), ("went", "r", "s1")]
        assert here.hub.parted == [leaving.peers.id]
        await until(lambda: nodes.left_of(leaving) == [])


async def test_what_another_version_says_of_itself_may_be_unreadable(redis_at: RedisServer) -> None:
    async with company(redis_at) as nodes:
        (here,) = await nodes.start_all("here")
        with nodes.client() as client:
            client.zadd(nodes.keys.leases, {"odd": 9e15, "newer": 9e15})
            client.hset(nodes.keys.nodes, "odd", "?")
            newer = msgspec.to_builtins(NodeInfo(id="newer", name="newer")) | {"mood": "good"}
            client.hset(nodes.keys.nodes, "newer", msgspec.json.encode(newer))
        await nodes.look_until(lambda: here.names() == ["here", "newer", "odd"])
        assert here.count("unreadable_nodes") >= 1
