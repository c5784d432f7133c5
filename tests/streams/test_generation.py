"""When the store begins another generation, and when nobody must be told anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import redis
import trio

from broker.link.base import Argument, Done, LinkError, Reply, Script
from broker.link.keys import Keys
from broker.streams.generation import Generation
from broker.streams.scripts import Tokens
from tests.link.linked import until
from tests.redis_server import RedisServer, redis_server

KEYS = Keys("broker:")


class ClientLink:
    """A link that is one blocking client, and nothing but calls."""

    up = True

    def __init__(self, client: redis.Redis, *, clustered: bool = False) -> None:
        self.clustered = clustered
        self._execute: Callable[..., Any] = client.execute_command
        client.response_callbacks.clear()  # replies as they come

    async def call(self, key: str, *command: Argument) -> Reply:
        await trio.lowlevel.checkpoint()
        try:
            reply: Reply = self._execute(*command)
        except redis.ResponseError as error:
            raise LinkError(str(error)) from None
        return reply

    async def call_script(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        return await self.call(keys[0], "EVAL", script.source, len(keys), *keys, *arguments)

    def send(self, done: Done, key: str, *command: Argument) -> None:
        raise NotImplementedError

    def send_script(self, done: Done, script: Script, keys: Sequence[str], *arguments: Argument) -> None:
        raise NotImplementedError

    def subscribe(self, channels: Iterable[str], *, sharded: bool) -> None:
        raise NotImplementedError

    def unsubscribe(self, channels: Iterable[str]) -> None:
        raise NotImplementedError

    def hears(self, channel: str) -> bool:
        raise NotImplementedError

    async def heard(self, channel: str) -> bool:
        raise NotImplementedError


class Company:
    """Nodes on one store. What a run of Redis is called is up to the test."""

    def __init__(self, client: redis.Redis, link: ClientLink) -> None:
        self.client = client
        self.link = link

    def node(self, name: str, *, patience: float = 60.0) -> Generation:
        self.client.zadd(KEYS.leases, {name: 1.0})
        self.client.hset(KEYS.nodes, name, json.dumps({"id": name, "draining": False}))
        return Generation(KEYS, lambda: name, Tokens(), patience=patience)

    async def greet(self, run: str, *nodes: Generation) -> None:
        for node in nodes:
            await node.greet(self.link, run)

    def store(self, count: int, *told: Generation) -> None:
        """Events are stored, and these nodes are told."""
        commits: Any = self.client.hincrby(KEYS.store, "commits", count)
        for node in told:
            assert node.saw(node.epoch("room"), commits)

    def lose(self, count: int) -> None:
        """The newest events vanish."""
        self.client.hincrby(KEYS.store, "commits", -count)

    def waiting(self) -> set[str]:
        value: Any = self.client.hget(KEYS.store, "witnesses")
        return set(value.decode().split())


@pytest.fixture
def company(redis_at: RedisServer) -> Iterator[Company]:
    with redis_at.client() as client, redis_at.client(protocol=2) as raw:
        yield Company(client, ClientLink(raw))


async def test_the_first_node_begins_a_generation_and_the_others_take_it_over(company: Company) -> None:
    one, two = company.node("one"), company.node("two")
    await company.greet("r1", one, two)
    assert one.value == two.value != ""
    assert one.epoch("room") == f"room.{one.value}"
    assert (one.changes, two.changes) == (0, 0)


async def test_a_reconnect_to_the_same_run_changes_nothing(company: Company) -> None:
    one, two = company.node("one"), company.node("two")
    await company.greet("r1", one, two)
    before = one.value
    company.store(5, one)
    await company.greet("r1", one, two, one)
    assert one.value == two.value == before
    assert one.commits == 5


async def test_a_clean_failover_is_told_to_nobody(company: Company) -> None:
    one, two, three = nodes = [company.node(name) for name in ("one", "two", "three")]
    await company.greet("r1", *nodes)
    before = one.value
    company.store(5, one, two)
    await company.greet("r2", two)
    assert company.waiting() == {"one", "three"}
    assert two.pending == 2
    company.store(5, two)  # what the new run stores itself proves nothing
    await company.greet("r2", one, two, three)
    await company.greet("r2", two)
    assert company.waiting() == set()
    assert {node.value for node in nodes} == {before}
    assert two.pending == 0


async def test_a_node_that_has_seen_more_proves_a_loss(company: Company) -> None:
    one, two = nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    before = one.value
    company.store(5, one)
    company.lose(2)
    await company.greet("r2", two)
    assert two.value == before
    company.store(9, two)  # by now the count says nothing any more
    await company.greet("r2", one)
    assert one.value != before
    assert await two.look(company.link)
    assert two.value == one.value
    assert (one.changes, two.changes) == (1, 1)
    await company.greet("r2", one, two)
    assert one.changes == two.changes == 1


async def test_a_witness_that_does_not_come_is_a_loss(company: Company) -> None:
    one, _two = nodes = [company.node("one", patience=0.0), company.node("two")]
    await company.greet("r1", *nodes)
    before = one.value
    await company.greet("r2", one)
    assert one.value != before
    assert company.waiting() == set()


async def test_a_witness_has_time_to_come(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    before = nodes[0].value
    await company.greet("r2", nodes[0])
    assert not await nodes[0].look(company.link)
    assert nodes[0].pending == 1
    company.client.hincrby(KEYS.store, "run_since", -60_001)
    assert await nodes[0].look(company.link)
    assert nodes[0].value != before


async def test_nodes_that_drain_are_no_witnesses(company: Company) -> None:
    nodes = [company.node(name) for name in ("one", "two", "three")]
    company.client.hset(KEYS.nodes, "two", json.dumps({"draining": True}))
    company.client.hset(KEYS.nodes, "three", "not JSON")
    await company.greet("r1", nodes[0])
    await company.greet("r2", nodes[0])
    assert company.waiting() == {"three"}


async def test_another_run_before_all_have_come_is_a_loss(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    before = nodes[0].value
    await company.greet("r2", nodes[0])
    assert nodes[0].value == before
    await company.greet("r3", nodes[0])
    assert nodes[0].value != before


async def test_an_empty_store_begins_anew(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    before = nodes[0].value
    company.store(5, *nodes)
    company.client.flushall()
    assert [await node.look(company.link) for node in nodes] == [True, True]
    assert nodes[0].value == nodes[1].value != before
    assert nodes[0].commits == 0
    company.store(5, *nodes)
    company.client.zadd(KEYS.leases, {"one": 1, "two": 1})
    await company.greet("r1", nodes[0])  # only one of them reconnects
    assert company.waiting() == set()
    assert not await nodes[1].look(company.link)
    assert [node.changes for node in nodes] == [1, 1]


async def test_a_generation_that_a_publish_began_is_like_any_other(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    company.client.delete(KEYS.store)
    company.client.hset(KEYS.store, mapping={"generation": "new", "commits": 1})
    assert [await node.look(company.link) for node in nodes] == [True, True]
    company.store(5, *nodes)
    await company.greet("r1", nodes[0])
    assert company.waiting() == set()
    assert not await nodes[1].look(company.link)
    assert [node.value for node in nodes] == ["new", "new"]
    company.lose(3)
    assert await nodes[1].look(company.link)


async def test_a_count_that_has_fallen_is_a_loss_without_another_run(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    company.store(5, nodes[0])
    assert not await nodes[0].look(company.link)
    company.lose(1)
    assert not await nodes[1].look(company.link)
    assert await nodes[0].look(company.link)
    assert nodes[0].commits == 4


async def test_a_room_that_is_behind_is_a_loss_once(company: Company) -> None:
    nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    assert await nodes[0].look(company.link, behind=True)
    # The other found the same, and is told of the generation that there is by now.
    assert await nodes[1].look(company.link, behind=True)
    assert nodes[0].value == nodes[1].value


async def test_what_belongs_to_another_generation_is_not_counted(company: Company) -> None:
    one = company.node("one")
    await company.greet("r1", one)
    assert not one.saw("room.other", 77)
    assert one.commits == 0


async def test_what_a_run_stored_before_it_was_greeted_proves_nothing(company: Company) -> None:
    """The subscription may be back before the lane, and bring what others publish by then."""
    one, two = nodes = [company.node("one"), company.node("two")]
    await company.greet("r1", *nodes)
    before = one.value
    company.store(5, one)
    await company.greet("r2", two)
    company.store(5, two)
    mark: Any = company.client.hget(KEYS.store, "mark")
    assert one.heard(one.epoch("room"), 10, mark.decode())
    assert one.commits == 5
    await company.greet("r2", one)
    assert (one.value, one.commits) == (before, 10)
    assert one.heard(one.epoch("room"), 12, mark.decode())
    assert one.commits == 12


async def test_in_a_redis_cluster_rooms_have_epochs_of_their_own(redis_at: RedisServer) -> None:
    with redis_at.client() as client:
        link = ClientLink(client, clustered=True)
        one = Generation(KEYS, lambda: "one", Tokens())
        await one.greet(link, "r1")
        assert not await one.look(link, behind=True)
        assert one.epoch("room") == "room"
        assert client.exists(KEYS.store) == 0


# What cannot have lost anything


async def pending_after(server: RedisServer, **client: Any) -> int:
    """Witnesses that are waited for on this server."""
    with server.client() as direct, server.client(protocol=2, **client) as raw:
        company = Company(direct, ClientLink(raw))
        nodes = [company.node("one"), company.node("two")]
        await company.greet("r1", *nodes)
        await company.greet("r2", nodes[0])
        return nodes[0].pending


@pytest.mark.parametrize(
    ("options", "pending"),
    [
        ({}, 1),
        ({"appendonly": "yes", "appendfsync": "everysec"}, 1),
        ({"appendonly": "yes", "appendfsync": "always"}, 0),
    ],
)
async def test_who_syncs_every_write_needs_no_witnesses(options: dict[str, Any], pending: int) -> None:
    with redis_server(**options) as server:
        assert await pending_after(server) == pending


async def test_who_may_not_ask_does_not_know() -> None:
    with redis_server(appendonly="yes", appendfsync="always") as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "&*", "+@all", "-config")
        assert await pending_after(server, username="app", password="secret") == 1


async def test_a_promoted_replica_may_have_been_behind() -> None:
    always: dict[str, Any] = {"appendonly": "yes", "appendfsync": "always"}
    with redis_server(**always, repl_diskless_sync_delay="0") as primary, redis_server(**always) as replica:
        with replica.client() as client:
            client.replicaof("127.0.0.1", primary.port)
            await until(lambda: client.info("replication")["master_link_status"] == "up")
            client.replicaof("NO", "ONE")
        assert await pending_after(replica) == 1
